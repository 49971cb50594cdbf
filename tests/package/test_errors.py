"""Every bad call has a clear error: which argument, what was expected, what came."""

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_calls import BAD, GOOD, KEY, LABELS, LOSSES, ODD_KINDS, ODD_SHAPES, P, Z, bools, ints
from checked import checked_in_scan, checked_loss
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P_
from meshes import make_mesh

import xentjax as xj


def identity(bad):
    return f"{bad.function.__name__}-{bad.argument}-{bad.given}"


def call(bad, traced):
    """Makes the call, with its arrays as they are or as a trace sees them: without values."""
    leaves, treedef = jax.tree.flatten((bad.args, bad.kwargs), is_leaf=lambda x: x is None)
    arrays = [x for x in leaves if isinstance(x, jax.Array)]

    def function(arrays):
        arrays = iter(arrays)
        filled = [next(arrays) if isinstance(x, jax.Array) else x for x in leaves]
        args, kwargs = jax.tree.unflatten(treedef, filled)
        return bad.function(*args, **kwargs)

    return jax.eval_shape(function, arrays) if traced else function(arrays)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("bad", BAD, ids=identity)
def test_error_names_the_argument_the_expected_and_the_given(bad, traced):
    with pytest.raises(bad.error) as raised:
        call(bad, traced)
    wanted = rf"\b{re.escape(bad.argument)}: expected .*{bad.expected}.*got .*{bad.given}"
    assert re.search(wanted, str(raised.value), re.DOTALL), str(raised.value)


def test_every_public_function_is_in_the_table():
    functions = {getattr(xj, name) for name in xj.__all__}
    # A switch of no arguments, a type alias, and classes whose parts are checked where they go.
    functions -= {xj.value_checks, xj.Targets}
    functions = {f for f in functions if not isinstance(f, type)}
    # Those that return a function or run in a shard_map have their errors in tests of their own.
    functions = {f for f in functions if "._parallel." not in f.__module__} - {xj.explain}
    assert functions == {bad.function for bad in BAD}


# Odd values of every argument of every function.


def good_call(function, options):
    """Calls a function, and the function that it makes if it makes one, in a trace."""

    def run():
        out = function(**options)
        if function in (xj.soft_cap, xj.temperature):
            return out(Z)
        arrays = (Z, LABELS)
        return out(jnp.float32(1), arrays) if callable(out) else out

    return jax.eval_shape(run)


@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
def test_odd_values_have_an_error_that_names_the_argument(function):
    options = GOOD[function]
    names = "|".join(inspect.signature(function).parameters)
    if "pmap" not in function.__name__ and function is not xj.per_example:
        good_call(function, options)
    accepted, unclear = [], []
    for name in options:
        odd = {k: (v, name) for k, v in ODD_KINDS.items()}
        # Arrays of a wrong shape may be held against the others, which are then named.
        odd |= {"shape of " + k: (v, names) for k, v in ODD_SHAPES.items()}
        for kind, (value, named) in odd.items():
            if name == "axis_name" and isinstance(value, Hashable):
                continue
            try:
                good_call(function, options | {name: value})
            except (ValueError, TypeError) as error:
                if not re.match(rf"({named})\b[^:]*: expected .*, got ", str(error), re.DOTALL):
                    unclear.append((name, kind, error))
            else:
                accepted.append((name, kind.removeprefix("shape of ")))
    assert not unclear
    # Labels of any shape are targets of something, and so are losses and logits.
    takes_any = {"targets", "p", "logits", "losses", "nats", "b", "a", "cosines"}
    assert {name for name, _ in accepted} <= takes_any, accepted
    of_yes_or_no = {"bools"} if function is xj.smooth_binary_labels else set()
    kinds = {"floats", "ints", "nan", "negative", "float8"} | of_yes_or_no
    assert {kind for _, kind in accepted} <= kinds


def test_good_calls_are_those_of_every_function():
    inside = {f for f in GOOD if f is not xj.per_example}
    functions = {getattr(xj, name) for name in xj.__all__} - {xj.value_checks, xj.Targets}
    functions -= {xj.explain}  # Its errors are tested beside it.
    functions = {f for f in functions if not isinstance(f, type)}
    # They run inside a shard_map only, and their errors are tested there.
    functions -= {f for f in functions if f.__name__.startswith("vocab_parallel")}
    assert inside == functions - {xj.per_example}
    for function, options in GOOD.items():
        assert set(inspect.signature(function).parameters) - {"axis_name"} == set(options) - {
            "axis_name"
        }


def test_labels_for_another_axis_have_a_hint_where_there_is_an_axis_to_choose():
    wrong = jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match=r"they fit classes along axis=0"):
        xj.softmax_cross_entropy(Z, wrong)
    with pytest.raises(ValueError, match=r"targets: expected shape \(4,\)") as raised:
        xj.linear_softmax_cross_entropy(jnp.ones((4, 2)), jnp.ones((2, 3)), wrong)
    assert "axis" not in str(raised.value)


@pytest.mark.parametrize(
    ("transform", "wanted"),
    [
        (xj.soft_cap, r"soft_cap itself; call soft_cap\(30.0\) first"),
        (xj.temperature, "temperature itself"),
        (lambda c: lambda z: z / c, "one that returns <function"),
        (lambda z: (z, z), r"one that returns \("),
        (lambda z: None, "one that returns None"),
        (lambda z: z > 0, r"one that returns bool\[2, 3\]"),
        (lambda z: z.T, r"one that returns float32\[3, 2\]"),
        (lambda z: z - z.mean(), "reduce_sum mixes"),
        (lambda z: z[::-1], "rev mixes"),
        (jnp.sort, "sort mixes"),
        (jax.nn.softmax, "mixes"),
        (lambda z: jnp.cumsum(z, -1), "cumsum mixes"),
        (lambda z: z @ jnp.ones((z.shape[-1],) * 2), "dot_general mixes"),
        (lambda z: jnp.where(jnp.arange(z.shape[-1]) == 0, -jnp.inf, z), "by their place"),
        (lambda z: z + jax.random.normal(KEY, z.shape), "by their place"),
        (lambda z: jax.lax.fori_loop(0, 3, lambda i, c: c + c[::-1], z), "rev mixes"),
        (lambda z: z * jnp.ones(5), r"one that fails for float32\[2, 3\]: .*shapes"),
        (lambda z: z.at[:, 0].set(0), r"one that fails for float32\[\]"),
    ],
)
def test_logit_transforms_that_are_not_elementwise(transform, wanted):
    head = xj.linear_softmax_cross_entropy
    message = rf"logit_transform: expected an elementwise function.*got (one )?.*{wanted}"
    with pytest.raises((ValueError, TypeError), match=message):
        head(jnp.ones((4, 2)), jnp.ones((2, 3)), LABELS, logit_transform=transform)


SQUARE = jax.custom_jvp(lambda z: z * z)
SQUARE.defjvp(lambda primals, tangents: (SQUARE(*primals), 2 * primals[0] * tangents[0]))


@pytest.mark.parametrize(
    "transform",
    [
        jnp.tanh,
        jax.nn.gelu,
        jax.nn.silu,
        jax.nn.hard_tanh,
        SQUARE,
        jax.jit(jnp.sin),
        jax.checkpoint(jnp.sin),
        jnp.nan_to_num,
        lambda z: jnp.where(z > 0, z, 0.1 * z),
        lambda z: jnp.clip(z, -1, 1),
        lambda z: z * LOSSES[0] + jnp.zeros_like(z),
        lambda z: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c) * (i + 1), z),
        lambda z: jax.lax.cond(LOSSES[0] > 0, jnp.tanh, jnp.sin, z),
    ],
)
def test_logit_transforms_that_are_elementwise(transform):
    inputs, kernel = jnp.arange(8.0).reshape(4, 2) / 8, jnp.arange(6.0).reshape(2, 3) / 6
    loss = xj.linear_softmax_cross_entropy(inputs, kernel, LABELS, logit_transform=transform)
    want = xj.softmax_cross_entropy(transform(inputs @ kernel), LABELS).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-6)


def test_a_cap_keeps_the_dtype_of_logits_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for number in (3, 3.0, jnp.float32(3), jnp.int32(3), np.float64(3)):
            for dtype in (jnp.bfloat16, jnp.float32):
                z = jnp.ones(2, dtype)
                assert xj.soft_cap(number)(z).dtype == xj.temperature(number)(z).dtype == dtype


@pytest.mark.parametrize("where", ["eager", "traced"])
def test_shares_in_arrays_are_checked_when_there_is_a_value(where):
    shares = jnp.array([0, 0.5, 1, -1])

    def mix(lam):
        return xj.mix_targets(LABELS, LABELS, lam)

    if where == "eager":
        with pytest.raises(ValueError, match=r"lam: expected values in \[0, 1\], got .*-1"):
            mix(shares)
    else:
        jax.eval_shape(mix, shares)


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (xj.softmax_cross_entropy, (Z, LABELS), "label_smoothing"),
        (xj.softmax_cross_entropy_with_stats, (Z, LABELS), "reduction"),
        (xj.sigmoid_binary_cross_entropy, (Z, Z), "weight"),
        (xj.multilabel_cross_entropy, (Z, Z), "reduction"),
        (xj.binary_cross_entropy, (P, P), "eps"),
        (xj.smooth_labels, (LABELS, 0.1), "num_classes"),
        (xj.weighted_mean, (LOSSES,), "keepdims"),
        (xj.entropy, (P,), "dim"),
        (xj.mixup, (KEY, Z, LABELS, 1.0), "lam"),
    ],
)
def test_unknown_argument(function, args, name):
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) .*'{name}'"):
        function(*args, **{name: 1})


@pytest.mark.parametrize("function", [xj.softmax_cross_entropy, xj.cross_entropy, xj.weighted_mean])
def test_options_are_named(function):
    args = (LOSSES,) if function is xj.weighted_mean else (P, P)
    with pytest.raises(TypeError, match=r"positional argument"):
        function(*args, None)


# The debug switch for labels.

LOGITS = jnp.zeros((2, 3, 4))


def labels_with(bad, position=(1, 2)):
    labels = np.zeros((2, 3), np.int32)
    labels[position] = bad
    return labels


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("bad", [4, -1, -100, 7000])
@pytest.mark.parametrize(
    "function", [xj.softmax_cross_entropy, xj.softmax_cross_entropy_with_stats]
)
def test_value_checks_name_position_and_label(function, bad, as_array):
    wanted = rf"targets: expected labels in \[0, 4\), got {bad} at position \[1 2\]"
    with xj.value_checks(), pytest.raises(ValueError, match=wanted):
        function(LOGITS, as_array(labels_with(bad)))


def test_value_checks_see_through_operations():
    targets = xj.smooth_labels(xj.mix_targets(labels_with(0), labels_with(9), 0.5), 0.1)
    with xj.value_checks(), pytest.raises(ValueError, match=r"got 9 at position \[1 2\]"):
        xj.softmax_cross_entropy(LOGITS, targets)


def test_value_checks_leave_out_what_is_masked_out():
    labels = labels_with(-100, (slice(None), 0))
    keep = labels >= 0
    with xj.value_checks():
        losses = xj.softmax_cross_entropy(LOGITS, labels, where=keep)
        np.testing.assert_allclose(losses, np.where(keep, math.log(4), 0), rtol=1e-6)
        labels[1, 1] = 4
        with pytest.raises(ValueError, match=r"got 4 at position \[1 1\]"):
            xj.softmax_cross_entropy(LOGITS, labels, where=keep)
        with pytest.raises(ValueError, match=r"got -100 at position \[0 0\]"):
            xj.softmax_cross_entropy(LOGITS, labels, where=bools(2, 3, 4))


def test_value_checks_with_another_class_axis():
    with xj.value_checks():
        xj.softmax_cross_entropy(LOGITS, ints(2, 4), axis=1)
        with pytest.raises(ValueError, match=r"labels in \[0, 3\), got 3 at position \[0 1\]"):
            xj.softmax_cross_entropy(LOGITS, jnp.array([[0, 3, 0, 0]] * 2), axis=1)


def test_value_checks_are_off_unless_they_are_on():
    bad = labels_with(4)

    def is_nan():
        return np.isnan(xj.softmax_cross_entropy(LOGITS, bad)).sum() == 1

    assert is_nan()
    with contextlib.suppress(KeyError), xj.value_checks():
        raise KeyError
    assert is_nan()
    with xj.value_checks():
        with xj.value_checks():
            pass
        with pytest.raises(ValueError, match="targets"):
            is_nan()
    assert is_nan()


@pytest.mark.parametrize(
    ("function", "position"),
    [
        (checked_loss, "[1 2]"),
        (jax.value_and_grad(checked_loss), "[1 2]"),
        (jax.grad(jax.checkpoint(checked_loss)), "[1 2]"),
        (jax.vmap(checked_loss), "[2]"),
        (jax.vmap(jax.grad(checked_loss)), "[2]"),
        (checked_in_scan, "[2]"),
        (lambda z, y: jax.lax.cond(z.sum() == 0, checked_loss, lambda z, y: 0.0, z, y), "[1 2]"),
    ],
)
def test_value_checks_in_compiled_functions(function, position):
    """With checkify the error is a value; without it, our error says how to add it."""
    bad = jnp.asarray(labels_with(-5))
    error, _ = checkify.checkify(jax.jit(function))(LOGITS, jnp.asarray(labels_with(3)))
    assert error.get() is None
    for checked in (checkify.checkify(jax.jit(function)), jax.jit(checkify.checkify(function))):
        error, _ = checked(LOGITS, bad)
        assert f"targets: expected labels in [0, 4), got -5 at position {position}" in error.get()
    wanted = r"^value_checks of xentjax: expected checkify .*`.*checkify\.checkify\(jax\.jit\(f\)\)"
    with pytest.raises(ValueError, match=wanted):
        jax.jit(function)(LOGITS, bad)


@pytest.mark.parametrize("function", ["logits", "head"])
def test_value_checks_with_classes_split_over_devices(function):
    mesh = make_mesh((2, 2), ("data", "model"))

    def loss_of_logits(logits, labels):
        with xj.value_checks():
            return xj.vocab_parallel_softmax_cross_entropy(logits, labels, axis_name="model")

    def loss_of_head(kernel, labels):
        head = functools.partial(xj.vocab_parallel_linear_softmax_cross_entropy, axis_name="model")
        with xj.value_checks():
            return head(jnp.ones((2, 3)), kernel, labels, reduction="none")

    loss, specs = (
        (loss_of_logits, (P_("data", "model"), P_("data")))
        if function == "logits"
        else (loss_of_head, (P_(None, "model"), P_("data")))
    )
    array = jnp.zeros((4, 4) if function == "logits" else (3, 4))
    split = jax.jit(jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P_("data")))
    error, losses = checkify.checkify(split)(array, jnp.array([0, 3, 1, 2]))
    assert error.get() is None
    np.testing.assert_allclose(losses, math.log(4), rtol=1e-6)
    error, _ = checkify.checkify(split)(array, jnp.array([0, 3, 1, 7]))
    assert "targets: expected labels in [0, 4), got 7 at position [1]" in error.get()
    with pytest.raises(ValueError, match=r"value_checks of xentjax: expected checkify"):
        split(array, jnp.array([0, 3, 1, 7]))


(UNKNOWN,) = jax.export.symbolic_shape("v")
X, KERNEL, LABELS = jnp.ones((4, 3)), jnp.ones((3, 5)), jnp.zeros(4, int)


@pytest.mark.parametrize(
    ("function", "shape", "named", "counted"),
    [
        (lambda z: xj.softmax_cross_entropy(z, LABELS), (4, UNKNOWN), "logits", "classes"),
        (xj.softmax_entropy, (4, UNKNOWN), "logits", "classes"),
        (lambda z: xj.top_k_targets(z, 2).weights, (4, UNKNOWN), "logits", "classes"),
        (lambda z: xj.bucket_logits(z, LABELS[:, None]), (4, UNKNOWN), "logits", "classes"),
        (
            lambda w: xj.linear_softmax_cross_entropy(X, w, LABELS),
            (3, UNKNOWN),
            "kernel",
            "classes",
        ),
        (
            lambda x: xj.linear_softmax_cross_entropy(x, KERNEL, LABELS),
            (4, UNKNOWN),
            "inputs",
            "features",
        ),
        (lambda x: xj.info_nce(x, x, temperature=1), (UNKNOWN, 3), "keys", "rows"),
        (lambda x: xj.info_nce(x, x, temperature=1), (4, UNKNOWN), "queries", "features"),
    ],
)
def test_sizes_that_sums_depend_on_are_known(function, shape, named, counted):
    """`jax.export` may know a size by name alone."""
    wanted = rf"^{named}: expected a known number of {counted}, got v\b"
    with pytest.raises(ValueError, match=wanted):
        jax.export.export(jax.jit(function))(jax.ShapeDtypeStruct(shape, jnp.float32))
