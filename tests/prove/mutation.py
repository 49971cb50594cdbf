"""Mutation testing of the mathematics: does a test fail for each small fault put into the code?

`python tests/prove/mutation.py [NUMBER] [SEED]` makes NUMBER mutants (all without it), drawn evenly
from the files, runs on each the tests that it must fail, and prints the score and the survivors.

mutmut and cosmic-ray start a process for each mutant. Here that imports JAX and compiles for ten
seconds before a fault is found, and cosmic-ray makes 6,674 mutants of twelve files. So each mutant
is a fork of one process that has JAX and pytest already, and the tests of its file end at the first
failure.
"""

import ast
import copy
import importlib.abc
import importlib.machinery
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # Seconds of a mutant; one that takes longer is found.

SOFTMAX = (
    "tests/losses/test_softmax.py::test_every_target_form_is_exact",
    "tests/losses/test_softmax.py::test_limits",
    "tests/losses/test_softmax.py::test_class_mask_is_a_smaller_problem",
    "tests/losses/test_softmax.py::test_a_targets_gradient_is_lse_minus_logit",
    "tests/losses/test_softmax.py::test_exact_from_margin_minus_80_to_80",
    "tests/losses/test_softmax.py::test_stats",
    "tests/losses/test_softmax.py::test_correct_is_the_heaviest_target",
    "tests/losses/test_softmax.py::test_an_example_without_a_class_is_masked_out",
    "tests/properties",
    "tests/softmax/test_passes.py",
    "tests/jax_helpers/test_rule.py",
)
FILES = {
    "_softmax/reference.py": ("tests/jax_helpers/test_rule.py", *SOFTMAX),
    "_softmax/partial.py": SOFTMAX,
    "_softmax/passes.py": SOFTMAX,
    "_targets/mass.py": SOFTMAX,
    "_losses/sigmoid.py": ("tests/losses/test_sigmoid.py", "tests/package/test_extremes.py"),
    "_losses/reduction.py": ("tests/losses/test_reduction.py", "tests/package/test_extremes.py"),
}
"""The files of the mathematics, and the tests that a fault in each must fail, quick ones first."""


class Mutant(NamedTuple):
    """A file of xentjax with one fault."""

    file: str
    line: int
    change: str
    source: str

    def __str__(self) -> str:
        """Says where the fault is."""
        return f"{self.file}:{self.line}: {self.change}"


# The faults.

OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
NAMES = {
    "log1p": "log",
    "exp": "expm1",
    "maximum": "minimum",
    "minimum": "maximum",
    "max": "min",
    "argmax": "argmin",
    "zeros_like": "ones_like",
    "ones_like": "zeros_like",
    "psum": "pmax",
    "pmax": "psum",
}


def faults(node: ast.AST) -> Iterator[ast.AST]:
    """Yields a node with one fault, for each fault that it can have."""
    match node:
        case ast.BinOp() | ast.BoolOp() if type(node.op) in OPERATORS:
            yield _with(node, op=OPERATORS[type(node.op)]())
        case ast.Compare(ops=[op]) if type(op) in OPERATORS:
            yield _with(node, ops=[OPERATORS[type(op)]()])
        case ast.UnaryOp(op=ast.USub() | ast.Invert() | ast.Not()):
            yield node.operand
        case ast.Constant(value=bool(value)):
            yield _with(node, value=not value)
        case ast.Constant(value=int(value) | float(value)):
            yield _with(node, value=value + 1)
        case ast.Attribute(attr=name) if name in NAMES:
            yield _with(node, attr=NAMES[name])
        case ast.Call(func=ast.Attribute(attr="where"), args=[condition, a, b]):
            yield _with(node, args=[condition, b, a])
            yield a
            yield b


def _with(node: ast.AST, **changes: object) -> ast.AST:
    node = copy.deepcopy(node)
    for name, value in changes.items():
        setattr(node, name, value)
    return node


def code_of(tree: ast.Module) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Yields each place of an expression in a function, as (parent, field, index).

    Annotations, decorators and the defaults of arguments are left out, and so are the texts of
    errors.
    """
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for statement in function.body:
            if isinstance(statement, ast.FunctionDef):
                continue  # It has its own turn.
            for parent in ast.walk(statement):
                if isinstance(parent, ast.FunctionDef | ast.JoinedStr):
                    continue
                for field, value in ast.iter_fields(parent):
                    if field in ("annotation", "returns", "decorator_list"):
                        continue
                    if isinstance(value, list):
                        yield from ((parent, field, i) for i in range(len(value)))
                    else:
                        yield parent, field, None


def mutants_of(file: str) -> Iterator[Mutant]:
    """Yields every mutant of a file."""
    source = (ROOT / "xentjax" / file).read_text(encoding="utf-8")
    tree, seen = ast.parse(source), set()
    for parent, field, index in code_of(tree):
        old = getattr(parent, field)
        node = old if index is None else old[index]
        if not isinstance(node, ast.expr) or (id(parent), field, index) in seen:
            continue
        seen.add((id(parent), field, index))
        for new in faults(node):
            fresh = ast.fix_missing_locations(ast.copy_location(new, node))
            setattr(
                parent, field, fresh if index is None else [*old[:index], fresh, *old[index + 1 :]]
            )
            change = f"{ast.unparse(node)} -> {ast.unparse(fresh)}"
            yield Mutant(file, node.lineno, change, ast.unparse(tree))
            setattr(parent, field, old)


# The run.


class Loader(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports the file of a mutant with its fault."""

    def __init__(self, mutant: Mutant) -> None:
        self._source = mutant.source
        name = "xentjax." + mutant.file.removesuffix(".py").replace("/", ".")
        super().__init__(name, str(ROOT / "xentjax" / mutant.file))

    def find_spec(self, fullname, path=None, target=None):
        del path, target
        return importlib.machinery.ModuleSpec(fullname, self) if fullname == self.name else None

    def get_code(self, fullname):
        del fullname
        return compile(self._source, self.path, "exec")


def is_killed(mutant: Mutant, tests: Sequence[str]) -> bool:
    """Returns whether some test fails in a fork of this process that has the mutant."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.meta_path.insert(0, Loader(mutant))
        os._exit(_run(tests))
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _run(tests: Sequence[str]) -> int:
    import pytest  # noqa: PLC0415

    # Assertions as they stand: pytest warns of packages that are imported before it rewrites them.
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", *tests]))


def main(number: int | None = None, seed: int = 0) -> int:
    """Prints the score and the survivors; returns 1 where the tests fail without a fault."""
    _preload()
    for file, tests in FILES.items():
        source = (ROOT / "xentjax" / file).read_text(encoding="utf-8")
        if is_killed(Mutant(file, 0, "no fault", source), tests):
            print(f"error: the tests of {file} fail without a fault", file=sys.stderr)
            return 1
    rng = random.Random(seed)
    every = {file: list(mutants_of(file)) for file in FILES}
    sample = [m for file, ms in every.items() for m in _drawn(rng, ms, number)]
    survivors: list[Mutant] = []
    for count, mutant in enumerate(sample, 1):
        killed = is_killed(mutant, FILES[mutant.file])
        survivors += [] if killed else [mutant]
        print(f"{count}/{len(sample)} {'killed' if killed else 'SURVIVED'} {mutant}", flush=True)
    score = 1 - len(survivors) / len(sample)
    total = sum(map(len, every.values()))
    print(f"{len(sample)} of {total} mutants, {len(survivors)} survived: {score:.1%} killed")
    return 0


def _drawn(rng: random.Random, mutants: list[Mutant], number: int | None) -> list[Mutant]:
    share = len(mutants) if number is None else max(1, number // len(FILES))
    return rng.sample(mutants, min(share, len(mutants)))


def _preload() -> None:
    """Imports what the tests need, but for xentjax; no computation may start before a fork."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
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
    sys.exit(main(*map(int, sys.argv[1:])))
