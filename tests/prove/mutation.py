"""Mutation testing of the mathematics: does a test fail for each small fault put into the code?

`python tests/prove/mutation.py [NUMBER] [SEED] [FILE...]` draws NUMBER mutants at random (all
without it), of all files or of some, runs on each the tests of its file, and prints the score and
the survivors. docs/mutation.md has the method, the score, and why some survivors change no result.

mutmut and cosmic-ray start a process for each mutant. Here that imports JAX and compiles for ten
seconds before a fault is found, and cosmic-ray makes 6,674 mutants of twelve files. So each mutant
is a fork of one process that has JAX and pytest already, the tests of its file end at the first
failure, and what a fault does not change is compiled once: JAX keeps it in a folder by its text.
"""

import ast
import atexit
import copy
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "mutation.md"
TIMEOUT = 600  # Seconds of a processor; a mutant that takes longer is found.

SOFTMAX = (
    "tests/losses/test_softmax.py::test_exact_from_margin_minus_80_to_80",
    "tests/losses/test_softmax.py::test_limits",
    "tests/losses/test_softmax.py::test_stats",
    "tests/losses/test_softmax.py::test_class_mask_is_a_smaller_problem",
    "tests/losses/test_softmax.py::test_a_targets_gradient_is_lse_minus_logit",
    "tests/losses/test_softmax.py::test_an_example_without_a_class_is_masked_out",
    "tests/losses/test_softmax.py::test_a_masked_nan_row_has_second_derivatives",
    "tests/losses/test_softmax.py::test_every_target_form_is_exact",
    "tests/losses/test_softmax.py::test_correct_is_the_heaviest_target",
    "tests/losses/test_softmax.py::test_one_hot_is_exact_as_labels_are",
    "tests/softmax/test_passes.py::test_two_leaders_in_any_chunks",
    "tests/softmax/test_passes.py::test_mass_however_small_on_an_impossible_class_costs_infinity",
    "tests/softmax/test_passes.py::test_one_class_has_no_loss",
    "tests/softmax/test_passes.py::test_a_long_sum_loses_no_digits",
    "tests/softmax/test_passes.py::test_one_class_is_left_out_though_floats_do_not_count_that_far",
    "tests/package/test_extremes.py::test_extreme_call",
    "tests/properties/test_laws.py",
)
DEVICES = (
    "tests/parallel/test_vocab_parallel.py::test_every_target_form",
    "tests/parallel/test_vocab_parallel.py::test_confident_predictions_stay_exact",
)
STATS = (
    "tests/parallel/test_vocab_parallel_stats.py::test_statistics_are_those_of_one_device",
    "tests/parallel/test_vocab_parallel_stats.py::"
    "test_second_derivatives_of_the_entropy_are_those_of_one_device",
)
HEAD = (
    "tests/losses/test_linear.py::test_every_reduction_and_layout_in_chunks_of_tokens",
    "tests/losses/test_linear.py::test_masked_tokens_may_hold_anything",
    "tests/losses/test_linear.py::test_all_masked_is_zero_with_zero_gradients",
    "tests/losses/test_linear.py::test_an_invalid_label_is_nan_in_its_row_alone",
    "tests/losses/test_linear.py::test_stats_are_those_of_full_logits",
    "tests/losses/test_linear.py::test_every_gradient_for_every_target_form",
    "tests/losses/test_linear.py::test_small_and_empty_sizes",
    "tests/losses/test_linear_options.py::test_a_teacher",
    "tests/losses/test_linear_options.py::test_a_class_mask_a_z_loss_and_masked_tokens",
    "tests/losses/test_linear_options.py::test_chunks_after_the_end_are_left_out",
)
HEAD_TWICE = (
    "tests/losses/test_linear_options.py::test_second_derivatives_where_logits_are_far_apart",
    "tests/losses/test_linear.py::test_whole_hessians",
    "tests/losses/test_linear_options.py::test_second_derivatives_along_a_line",
)
HEAD_TEACHER = (
    "tests/losses/test_linear_options.py::test_statistics_of_a_teacher",
    "tests/losses/test_linear_options.py::test_a_confident_teacher_and_student_keep_their_digits",
    "tests/losses/test_linear_options.py::test_a_teacher_whose_logits_are_far_apart",
    "tests/losses/test_linear_options.py::test_a_teacher_whose_first_block_has_no_class",
    "tests/losses/test_linear_options.py::test_the_first_of_equal_classes_is_a_teachers_label",
)
DEVICES_TWICE = (
    "tests/parallel/test_vocab_parallel_modes.py::test_every_mode_from_outside",
    "tests/parallel/test_vocab_parallel_modes.py::test_derivatives_of_targets",
)
HEAD_DEVICES = ("tests/parallel/test_vocab_parallel_linear.py::test_every_reduction_and_layout",)
SIGMOID = (
    "tests/losses/test_sigmoid.py::test_second_derivative_is_exact",
    "tests/losses/test_sigmoid.py::test_binary_cross_entropy_is_exact",
    "tests/losses/test_sigmoid.py::test_binary_cross_entropy_at_0_and_1",
    "tests/losses/test_sigmoid.py::test_shaped_losses_and_two_derivatives_are_exact",
    "tests/losses/test_sigmoid.py::test_shaped_losses_of_certainty",
    "tests/losses/test_sigmoid.py::test_weights_are_one_for_all_one_for_each_label_or_one_for_each_element",
    "tests/losses/test_sigmoid.py::test_masked_elements_have_loss_and_gradient_0",
    "tests/losses/test_sigmoid.py::test_multilabel_mask_of_examples",
    "tests/losses/test_sigmoid.py::test_second_derivative_beyond_the_range_of_exp",
    "tests/losses/test_sigmoid.py::test_loss_and_gradient_are_exact",
    "tests/losses/test_sigmoid.py::test_certainty",
    "tests/package/test_extremes.py::test_extreme_call",
    "tests/losses/test_sigmoid.py::test_no_cotangent_has_no_gradient_however_certain_the_logit",
    "tests/losses/test_sigmoid.py::test_second_derivatives_of_shaped_losses_in_a_loop",
    "tests/losses/test_sigmoid.py::test_second_derivatives_in_every_mode",
)
TARGETS = (
    "tests/targets/test_targets.py::test_dense_targets_writes_every_form_out",
    "tests/targets/test_targets.py::test_operation_on_any_form_is_the_operation_on_masses",
    "tests/targets/test_targets.py::test_laws",
    "tests/targets/test_targets.py::test_background_alone",
    "tests/targets/test_targets.py::test_label_outside_the_classes_makes_its_row_nan",
    "tests/targets/test_targets.py::test_dense_targets_with_another_class_axis",
    "tests/targets/test_targets.py::test_derivatives_to_the_shares",
    "tests/targets/test_targets.py::test_size_grows_no_more_than_it_must",
    "tests/targets/test_targets.py::test_operations_nest_in_any_order",
)
ON_A_MESH = ("tests/package/test_walk.py::test_arrays_split_over_devices",)
FILES = {
    "_jax/arithmetic.py": (
        "tests/jax_helpers/test_arithmetic.py",
        "tests/losses/test_information.py::test_derivatives_at_small_probabilities",
    ),
    "_losses/calibration.py": ("tests/losses/test_calibration.py",),
    "_losses/contrast.py": ("tests/losses/test_contrast.py", *ON_A_MESH),
    "_losses/curvature.py": ("tests/losses/test_curvature.py",),
    "_losses/divergence.py": (
        "tests/losses/test_softmax_information.py",
        "tests/losses/test_target_information.py",
        "tests/package/test_extremes.py::test_extreme_call",
    ),
    "_losses/information.py": (
        "tests/losses/test_information.py",
        "tests/package/test_extremes.py::test_extreme_call",
    ),
    "_losses/linear.py": (
        "tests/softmax/test_head_plan.py::test_a_budget_is_for_every_platform",
        *HEAD,
        *HEAD_DEVICES,
        *STATS,
        *ON_A_MESH,
    ),
    "_losses/margins.py": ("tests/losses/test_margins.py",),
    "_losses/reduction.py": (
        "tests/losses/test_reduction.py",
        "tests/package/test_extremes.py::test_extreme_call",
    ),
    "_losses/shapes.py": ("tests/losses/test_shapes.py",),
    "_losses/sigmoid.py": SIGMOID,
    "_losses/softmax.py": (*SOFTMAX, *STATS),
    "_losses/softmax_information.py": ("tests/losses/test_softmax_information.py",),
    "_losses/stats.py": (*SOFTMAX[:8], *STATS),
    "_losses/target_information.py": ("tests/losses/test_target_information.py", *ON_A_MESH),
    "_softmax/cross_entropy.py": (*SOFTMAX, *DEVICES, *DEVICES_TWICE),
    "_softmax/head_blocks.py": (*HEAD, *HEAD_TWICE, *HEAD_DEVICES),
    "_softmax/head_buckets.py": ("tests/losses/test_buckets.py",),
    "_softmax/head_kept.py": HEAD,
    "_softmax/head_recomputed.py": (
        *HEAD,
        "tests/losses/test_linear_memory.py::"
        "test_float16_gradients_of_a_mean_of_many_tokens_do_not_underflow",
        *HEAD_DEVICES,
        *STATS,
    ),
    "_softmax/head_reference.py": (*HEAD_TWICE, *DEVICES_TWICE),
    "_softmax/head_teacher.py": (*HEAD_TEACHER, *HEAD, *HEAD_DEVICES),
    "_softmax/partial.py": (
        *SOFTMAX,
        *DEVICES,
        *STATS,
        "tests/losses/test_linear.py::test_stats_are_those_of_full_logits",
        "tests/losses/test_linear_options.py::test_a_teacher_whose_first_block_has_no_class",
    ),
    "_softmax/passes.py": SOFTMAX,
    "_softmax/reference.py": (
        "tests/softmax/test_passes.py::test_the_oracle_and_the_reference_are_right_to_50_digits",
        "tests/jax_helpers/test_rule.py::test_every_mode_to_every_float_argument",
        "tests/jax_helpers/test_rule.py::test_losses_in_loops_are_differentiated_three_times",
        "tests/losses/test_target_information.py",
        *SOFTMAX[:8],
        *DEVICES,
        *DEVICES_TWICE,
        *STATS,
    ),
    "_targets/balance.py": ("tests/losses/test_sigmoid.py::test_class_balanced_weights",),
    "_targets/binary.py": (
        "tests/losses/test_sigmoid.py::test_smoothing_of_yes_and_no_and_of_classes_are_told_apart",
    ),
    "_targets/mass.py": SOFTMAX,
    "_targets/mixing.py": ("tests/targets/test_mixing.py",),
    "_targets/top_k.py": ("tests/targets/test_top_k.py", "tests/losses/test_buckets.py"),
    "_targets/transforms.py": TARGETS,
}
"""The files of the mathematics, and the tests that a fault in each must fail, quick ones first.

The examples of the file's own docstrings are before them.
"""


class Mutant(NamedTuple):
    """A file of xentjax with one fault.

    Attributes:
      file: Below xentjax.
      place: The function, or Class.function.
      change: The smallest expression around the fault that tells it, before and after.
      line: Where it is.
      source: Makes the text of the file with its fault.
    """

    file: str
    place: str
    change: str
    line: int
    source: Callable[[], str]

    @property
    def name(self) -> str:
        """What the table of docs/mutation.md calls it."""
        return f"{self.file} {self.place}: {self.change}"


# The faults.

OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
BOUNDARY = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
NEGATION = {ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt}
NAMES = {
    "log1p": "log",
    "exp": "expm1",
    "expm1": "exp",
    "maximum": "minimum",
    "minimum": "maximum",
    "max": "min",
    "min": "max",
    "argmax": "argmin",
    "any": "all",
    "all": "any",
    "zeros_like": "ones_like",
    "ones_like": "zeros_like",
    "psum": "pmax",
    "pmax": "psum",
}
TELLING = 20  # Characters of an expression that tell one place from another.
CHECKS = ("checks", "value_checks")
HINTS = ("unique_indices",)


def faults(node: ast.AST) -> Iterator[ast.AST]:
    """Yields a node with one fault, for each fault that it can have."""
    match node:
        case ast.BinOp() | ast.BoolOp() if type(node.op) in OPERATORS:
            yield _with(node, op=OPERATORS[type(node.op)]())
        case ast.Compare(ops=[op]) if type(op) in OPERATORS:
            yield _with(node, ops=[OPERATORS[type(op)]()])
        case ast.Compare(ops=[op]) if type(op) in NEGATION:
            yield _with(node, ops=[NEGATION[type(op)]()])
            if not _is_threshold(node):
                yield _with(node, ops=[BOUNDARY[type(op)]()])
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int())):
            return  # An axis counted from the other end.
        case ast.UnaryOp(op=ast.USub() | ast.Invert() | ast.Not()):
            yield node.operand
        case ast.Constant(value=bool(value)):
            yield _with(node, value=not value)
        case ast.Constant(value=int(value) | float(value)) if value + 1 != value:
            yield _with(node, value=value + 1)
        case ast.Attribute(attr=name) if name in NAMES:
            yield _with(node, attr=NAMES[name])
        case ast.Call(args=[condition, a, b]) if _is_choice(node):
            yield _with(node, args=[condition, b, a])
            yield a
            yield b


def _is_threshold(node: ast.AST) -> bool:
    """Returns whether a node compares with a number other than 0, to choose between two ways."""
    match node:
        case ast.Compare(ops=[op], comparators=[ast.Constant(value=value)]):
            return value != 0 and type(op) in NEGATION
    return False


def _is_choice(node: ast.AST) -> bool:
    """Returns whether a node is where(condition, a, b) or select(condition, a, b)."""
    match node:
        case ast.Call(func=ast.Attribute(attr="where" | "select"), args=[_, _, _]):
            return True
    return False


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def _with(node: ast.AST, **changes: object) -> ast.AST:
    node = copy.deepcopy(node)
    for name, value in changes.items():
        setattr(node, name, value)
    return node


def code_of(body: Sequence[ast.stmt], place: str) -> Iterator[tuple[str, list[ast.AST], str, Any]]:
    """Yields each place of an expression in a function: (its name, nodes around it, field, index).

    Annotations, decorators and the defaults of arguments are left out, and so are checks of
    arguments and the texts of errors.
    """
    for statement in body:
        match statement:
            case ast.ClassDef():
                yield from code_of(statement.body, f"{place}.{statement.name}".lstrip("."))
            case ast.FunctionDef():
                name = f"{place}.{statement.name}".lstrip(".")
                for each in statement.body:
                    if isinstance(each, ast.FunctionDef):
                        yield from code_of([each], name)
                    else:
                        yield from _expressions([each], name)


def _expressions(around: list[ast.AST], place: str):
    node = around[-1]
    match node:
        case ast.JoinedStr() | ast.Raise():
            return
        case ast.FunctionDef():
            yield from code_of([node], place)
            return
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=module)))):
            if module in CHECKS:
                return
        case (
            ast.Call(func=ast.Name(id="as_number")) | ast.Call(func=ast.Attribute(attr="as_number"))
        ):
            return
        case ast.keyword(arg=name) if name in HINTS:
            return
        case ast.Compare() if _is_threshold(node):
            yield from _expressions([*around, node.left], place)
            return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "ctx", "op", "ops"):
            continue
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children):
            if not isinstance(child, ast.AST):
                continue
            if isinstance(child, ast.expr) and not (_is_choice(node) and _is_number(child)):
                yield place, around, field, index if isinstance(value, list) else None
            yield from _expressions([*around, child], place)


def _told(node: ast.AST, around: list[ast.AST]) -> ast.AST:
    """Returns the smallest expression around a node whose text tells which it is."""
    told = node
    for outer in reversed(around):
        if len(ast.unparse(told)) >= TELLING or not isinstance(outer, ast.expr | ast.keyword):
            break
        told = outer if isinstance(outer, ast.expr) else told
    return told


def mutants_of(file: str) -> Iterator[Mutant]:
    """Yields every mutant of a file."""
    tree = ast.parse(_text(file))
    for place, around, field, index in list(code_of(tree.body, "")):
        parent = around[-1]
        value = getattr(parent, field)
        node = value if index is None else value[index]
        shown = _told(node, around)
        for new in faults(node):
            fresh = ast.fix_missing_locations(ast.copy_location(new, node))

            def apply(text_of, parent=parent, field=field, index=index, fresh=fresh, value=value):
                new = fresh if index is None else [*value[:index], fresh, *value[index + 1 :]]
                setattr(parent, field, new)
                try:
                    return text_of()
                finally:
                    setattr(parent, field, value)

            def text(shown=shown):
                return ast.unparse(shown).split("\n")[0]

            before = text()
            after = apply(text) if shown is not node else ast.unparse(fresh)
            source = functools.partial(apply, functools.partial(ast.unparse, tree))
            yield Mutant(file, place, f"{before} → {after}", node.lineno, source)


# The run.


class Loader(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports a file of xentjax with another text."""

    def __init__(self, file: str, source: str) -> None:
        self._source = source
        name = "xentjax." + file.removesuffix(".py").replace("/", ".")
        super().__init__(name, str(ROOT / "xentjax" / file))

    def find_spec(self, fullname, path=None, target=None):
        del path, target
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname):
        del fullname
        return compile(self._source, self.path, "exec")


def fails(tests: Sequence[str], *loaders: Loader) -> bool:
    """Returns whether some test fails in a fork of this process that has these loaders."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (TIMEOUT, TIMEOUT))
        sys.meta_path[:0] = loaders
        os._exit(_run(tests))
    return os.waitpid(child, 0)[1] != 0


def _run(tests: Sequence[str]) -> int:
    import pytest  # noqa: PLC0415

    # Assertions as they stand: pytest warns of packages that are imported before it rewrites them.
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", *tests]))


def main(number: int | None = None, seed: int = 0, *files: str) -> int:
    """Prints the score and the survivors; returns 1 where the tests fail without a fault."""
    _preload()
    files = files or tuple(FILES)
    every = [m for file in files for m in mutants_of(file)]
    explained = explanations()
    strange = explained.keys() - {m.name for file in FILES for m in mutants_of(file)}
    for name in sorted(strange):
        print(f"error: {PAGE.name} explains a mutant that there is not: {name}", file=sys.stderr)
    tests = dict.fromkeys(test for file in files for test in tests_of(file))
    loaders = [Loader(f, ast.unparse(ast.parse(_text(f)))) for f in files]
    if strange:
        return 1
    if fails(tuple(tests), *loaders):
        print("error: the tests fail without a fault", file=sys.stderr)
        return 1
    sample = every if number is None else random.Random(seed).sample(every, min(number, len(every)))
    survivors = []
    for count, mutant in enumerate(sample, 1):
        start, is_explained = time.monotonic(), mutant.name in explained
        loader = Loader(mutant.file, mutant.source())
        killed = not is_explained and fails(tests_of(mutant.file), loader)
        fate = "killed" if killed else "explained" if is_explained else "SURVIVED"
        survivors += [] if killed else [mutant]
        seconds = time.monotonic() - start
        print(
            f"{count}/{len(sample)} {fate} {seconds:.0f} s {mutant.line} {mutant.name}", flush=True
        )
    killed = len(sample) - len(survivors)
    faulty = len(sample) - sum(m.name in explained for m in survivors)
    print(f"{len(sample)} of {len(every)} mutants, {killed} killed: {killed / len(sample):.1%}")
    print(f"{faulty} change a result, {killed} of these killed: {killed / faulty:.1%}")
    return 0


def tests_of(file: str) -> tuple[str, ...]:
    """Returns the tests that a fault in a file must fail, its docstrings' first."""
    return (f"xentjax/{file}", *FILES[file])


def _text(file):
    return (ROOT / "xentjax" / file).read_text(encoding="utf-8")


def explanations() -> dict[str, str]:
    """Returns why some mutants change no result, by their names: the tables of docs/mutation.md."""
    rows = re.findall(r"^\| `(.+)` \| `(.+)` \| (.+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    return {f"{place}: {change}".replace("\\|", "|"): why for place, change, why in rows}


def _preload() -> None:
    """Imports what the tests need, but for xentjax; no computation may start before a fork."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory()
        atexit.register(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    for name in (
        "jax",
        "chex",
        "jaxtyping",
        "mpmath",
        "hypothesis",
        "optax",
        "pytest",
        "scipy.stats",
    ):
        __import__(name)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3]), *sys.argv[3:]))
