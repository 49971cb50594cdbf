"""Every row of the README's tables of names, recipes and memory, run; `bench` makes those of speed.

A recipe for optax stands beside optax itself, and one for PyTorch's cross-entropies beside the
answers that PyTorch gave (`support/torch_answers.json`); others beside the formulas of
`support/formulas.py`. A figure of memory is that of the program, compiled anew.
"""

import ast
import functools
import inspect
import itertools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import jit, mainly
from formulas import FORMULAS
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from record_torch_answers import ANSWERS

import xentjax

README = (Path(__file__).parents[2] / "README.md").read_text()
OURS = {name: getattr(xentjax, name) for name in xentjax.__all__}


def rows_of(*header):
    """Returns the rows of all tables with this header, each a tuple of its cells."""
    head = re.escape(f"| {' | '.join(header)} |")
    tables = re.findall(rf"^{head}\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert tables, header
    cells = [
        [c.strip() for c in line.strip("|").split(" | ")]
        for line in "".join(tables).split("\n")[:-1]
    ]
    assert all(len(row) == len(header) for row in cells)
    return [tuple(row) for row in cells]


LIBRARIES = ("torch", "optax", "Keras", "timm", "Flax's lm1b", "torchvision")


def recipes(library):
    """Returns (theirs, ours) of each row, as code."""
    table = rows_of("library", "there", "here")
    assert {row[0] for row in table} == set(LIBRARIES)
    return [tuple(cell.strip("`") for cell in row[1:]) for row in table if row[0] == library]


def recorded(theirs):
    """Returns whether PyTorch's answers to a call are recorded."""
    return re.match(r"(binary_)?cross_entropy(_with_logits)?\(z,", theirs)


def values():
    """Returns what the README's names stand for, in float64."""
    rng = np.random.default_rng(0)
    keep = np.ones((6, 4), bool)
    keep[[0, 1, 5], [1, 2, 0]] = False
    views = 3 * rng.standard_normal((3, 6, 4))
    numbers = {
        "z": 4 * rng.standard_normal((6, 4)),
        "x": 2 * rng.standard_normal((6, 4)),
        "y": rng.integers(0, 4, 6),
        "t": rng.dirichlet(np.ones(4), 6),
        "b": rng.integers(0, 2, (6, 4)).astype(float),
        "k": rng.random(6),
        "keep": keep,
        "a": np.float64(0.15),
        "s": views,
    }
    return {name: jnp.asarray(x) for name, x in numbers.items()}


THEIRS = {"optax": vars(optax.losses), **FORMULAS}
SHARED = {
    "one_hot": jax.nn.one_hot,
    "log_softmax": jax.nn.log_softmax,
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "where": jnp.where,
    "inf": jnp.inf,
}


@functools.cache
def answers(library):
    """Returns [(their losses and gradient, ours)] of each row, all compiled as one program."""
    rows = [row for row in recipes(library) if library != "torch" or not recorded(row[0])]

    def loss_and_gradient(code, names, known):
        varied = "s" if re.search(r"\bs\b", code) else "z"

        def loss(x):
            now = known | {varied: x}
            losses = eval(code, names | now | {"q": jax.nn.softmax(now["s"])})
            return losses.sum(), losses

        gradient, losses = jax.grad(loss, has_aux=True)(known[varied])
        return losses, gradient

    @jit
    def every(known):
        theirs, ours = SHARED | THEIRS[library], {"jnp": jnp, "jax": jax} | OURS
        return [
            (loss_and_gradient(a, theirs, known), loss_and_gradient(b, ours, known))
            for a, b in rows
        ]

    with jax.enable_x64(True):
        return dict(zip(rows, every(values()), strict=True))


@pytest.mark.parametrize(
    ("library", "row"),
    [
        (library, row)
        for library in LIBRARIES
        for row in recipes(library)
        if library != "torch" or not recorded(row[0])
    ],
    ids=lambda x: x if isinstance(x, str) else x[0][:50],
)
def test_a_recipe_gives_the_same(library, row):
    want, got = answers(library)[row]
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def test_mass_on_a_masked_class_costs_infinity():
    """As the README says, in `optax.safe_softmax_cross_entropy` and here."""
    z, t = jnp.array([[1.0, -jnp.inf, 2.0]]), jnp.array([[0.5, 0.25, 0.25]])
    assert xentjax.softmax_cross_entropy(z, t) == optax.safe_softmax_cross_entropy(z, t) == jnp.inf
    assert xentjax.softmax_cross_entropy(z, t, where=z > -jnp.inf) == jnp.inf


def test_smoothing_over_allowed_classes():
    (recipe,) = re.findall(r"`(smooth_labels\(y, a, background=.*?)`", README)
    z, y = jnp.array([[1.0, 5.0, 2.0]]), jnp.array([2])
    allowed = jnp.array([1.0, 0.0, 1.0])
    targets = eval(recipe, OURS | {"y": y, "a": 0.2, "allowed": allowed})
    loss = xentjax.softmax_cross_entropy(z, targets, where=allowed[None] == 1)
    surprisals = np.log(np.exp(1) + np.exp(2)) - np.array([1.0, 2.0])
    np.testing.assert_allclose(loss, [surprisals @ [0.1, 0.9]], rtol=1e-6)


# From PyTorch.


def called(code):
    """Returns a call as (function, whether targets are dense, options: values, options: names)."""
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Name)
    _, target = call.args
    assert isinstance(target, ast.Name)
    names = {k.arg: k.value.id for k in call.keywords if isinstance(k.value, ast.Name)}
    values = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg not in names}
    return call.func.id, target.id == "t", values, names


def recorded_answers(function, is_dense, values, names):
    """Yields PyTorch's answers to calls with these options."""
    defaults = {"reduction": "mean"}
    for case in json.loads(ANSWERS.read_text()):
        options = defaults | case["options"]
        if (
            case["function"] == function
            and (np.asarray(case["target"]).dtype.kind == "f") == is_dense
            and len(np.shape(case["input"])) == 2
            and set(options) == set(defaults | values | names)
            and all(options[k] == x for k, x in (defaults | values).items())
        ):
            yield case


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [row for row in recipes("torch") if recorded(row[0])],
    ids=lambda code: code[:60],
)
def test_a_recipe_for_torch_gives_what_torch_answered(theirs, ours):
    function, is_dense, values, options = called(theirs)
    cases = list(recorded_answers(function, is_dense, values, options))
    assert cases, "PyTorch's answer to this call is not recorded"
    with jax.enable_x64(True):
        for case in cases:
            numbers = {name: case["options"][option] for option, name in options.items()}
            numbers["t" if is_dense else "y"] = case["target"]
            known = {name: jnp.asarray(np.asarray(x)) for name, x in numbers.items()}

            def loss(z, known=known):
                losses = eval(ours, {"jnp": jnp} | OURS | known | {"z": z})
                return losses.sum(), losses

            z = jnp.asarray(np.asarray(case["input"]))
            gradient, losses = jit(jax.grad(loss, has_aux=True))(z)
            np.testing.assert_allclose(losses, case["loss"], rtol=1e-13, atol=1e-14)
            np.testing.assert_allclose(gradient, case["gradient"], rtol=0, atol=1e-14)


# What to use.


def test_every_public_name_is_in_a_table():
    named = {name for _, use in rows_of("for", "use") for name in re.findall(r"`(\w+)`", use)}
    named |= {
        f"{name}_with_stats" for name in named if name.endswith("linear_softmax_cross_entropy")
    }
    named |= {"vocab_parallel_softmax_cross_entropy_with_stats"}
    not_for_users_to_call = {"SoftmaxStats", "ReliabilityBins", "Targets"}
    assert named - {"_with_stats"} == set(xentjax.__all__) - not_for_users_to_call


@pytest.mark.parametrize("row", rows_of("for", "use"), ids=lambda row: row[0])
def test_a_row_names_functions_with_an_example(row):
    """The doctests run the examples."""
    names = re.findall(r"`(\w+)`", row[1])
    assert names
    for name in names:
        if name != "_with_stats":
            assert ">>> " in inspect.getdoc(OURS[name])


# What the README says of the order of composition.


def test_mixing_commutes_with_both_others_and_they_not_with_each_other():
    y, w = jnp.array([0, 2, 1]), jnp.array([1.0, 5.0, 2.0])

    def smooth(t):
        return xentjax.smooth_labels(t, 0.2)

    def reweight(t):
        return xentjax.reweight_targets(t, w)

    def mix(t, other):
        return xentjax.mix_targets(t, other, 0.7)

    def dense(t):
        return np.asarray(xentjax.dense_targets(t, 3))

    for f in (smooth, reweight):
        mixed = dense(f(mix(y, y[::-1])))
        np.testing.assert_allclose(dense(mix(f(y), f(y[::-1]))), mixed, rtol=1e-6)
    assert np.abs(dense(smooth(reweight(y))) - dense(reweight(smooth(y)))).max() > 0.1


# Memory. The README's figures are those of one version of jax.

MIB = 2**20
FEATURES = 2304
is_readmes_jax = pytest.mark.skipif(jax.__version__ != "0.10.2", reason="other programs")


def number(cell):
    return float(re.sub(r",(?=\d{3})| MiB", "", cell))


def memory_of(loss, tokens, classes, dtype=jnp.float32, has_teacher=False, **options):
    """Returns MiB of (temporaries, gradients) on each device for a loss and its gradients."""
    shape = jax.ShapeDtypeStruct
    head = shape((tokens, FEATURES), dtype), shape((FEATURES, classes), dtype)
    targets = xentjax.LinearTargets(*head) if has_teacher else shape((tokens,), jnp.int32)

    def function(inputs, kernel, targets, options):
        return loss(inputs, kernel, targets, **options)

    gradients = jax.jit(jax.value_and_grad(function, (0, 1)))
    compiled = gradients.lower(*head, targets, options).compile()
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes / MIB, memory.output_size_in_bytes / MIB


def assert_as_printed(actual, printed):
    """Another processor's vector width may move a buffer or two."""
    assert 0.9 * printed - 1 <= actual <= 1.1 * printed + 1


# The heads of the README's table, and the columns of their figures.
HEADS = {
    "labels": {},
    "labels, `class_mask` and `z_loss`": {
        "class_mask": jax.ShapeDtypeStruct((256000,), jnp.bool),
        "z_loss": jax.ShapeDtypeStruct((), jnp.float32),
    },
    "labels, `where`, however much it masks": {"where": jax.ShapeDtypeStruct((8192,), jnp.bool)},
    "a teacher of the same size": {"has_teacher": True},
}
BUDGET_0 = ", `memory_budget=0`"
COLUMNS = ("float32", "float32" + BUDGET_0, "bfloat16", "bfloat16" + BUDGET_0)
FIGURES = {
    row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in rows_of("the head of", *COLUMNS)
}


def test_the_table_has_every_head():
    assert set(FIGURES) == set(HEADS)


@is_readmes_jax
@pytest.mark.parametrize(
    "case",
    mainly(
        itertools.product(HEADS, COLUMNS),
        ("labels", "float32"),
        ("labels", "bfloat16"),
        ("labels, `where`, however much it masks", "float32" + BUDGET_0),
        ("a teacher of the same size", "bfloat16" + BUDGET_0),
    ),
    ids=", ".join,
)
def test_memory_of_the_head(case):
    head, column = case
    dtype, _, budget = column.partition(",")
    loss = functools.partial(
        xentjax.linear_softmax_cross_entropy, memory_budget=0 if budget else None
    )
    temporaries, gradients = memory_of(loss, 8192, 256000, dtype, **HEADS[head])
    assert_as_printed(temporaries, number(FIGURES[head][column]))
    (printed,) = re.findall(rf"([\d,]+ MiB) in {dtype}", README)
    assert_as_printed(gradients, number(printed))


CLASSES = (32000, 128000, 256000)
TABLE = rows_of("N", *(f"V = {classes:,}" for classes in CLASSES))


@is_readmes_jax
@pytest.mark.parametrize("i", range(len(TABLE)))
def test_memory_hardly_grows_with_tokens_and_classes(i):
    """One figure of each row, for each takes seconds to compile."""
    tokens, *cells = TABLE[i]
    budget = None if i == 0 else 0
    loss = functools.partial(xentjax.linear_softmax_cross_entropy, memory_budget=budget)
    actual, _ = memory_of(loss, int(number(tokens)), CLASSES[i])
    assert_as_printed(actual, number(cells[i].split(", ")[budget == 0]))


@is_readmes_jax
def test_memory_of_the_head_on_many_devices():
    """The last column: eight devices share the vocabulary."""
    header = ("devices that share the vocabulary", "1", "2", "4", "8")
    (_, *temporaries), (_, *gradients) = rows_of(*header)
    head = functools.partial(xentjax.vocab_parallel_linear_softmax_cross_entropy, axis_name="model")
    loss = jax.shard_map(
        head,
        mesh=make_mesh((8,), ("model",)),
        in_specs=(P(), P(None, "model"), P()),
        out_specs=P(),
    )
    actual = memory_of(loss, 8192, 256000)
    assert_as_printed(actual[0], number(temporaries[-1]))
    assert_as_printed(actual[1], number(gradients[-1]))
