"""Every bad call has a clear error: which argument, what was expected, what came."""

import contextlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_calls import BAD, KEY, LABELS, LOSSES, P, Z, bools, ints
from jax.experimental import checkify

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
    functions -= {xj.label_checks, xj.Targets}
    functions = {f for f in functions if not isinstance(f, type)}
    # Those that return a function or run in a shard_map have their errors in tests of their own.
    functions = {f for f in functions if "._parallel." not in f.__module__}
    assert functions == {bad.function for bad in BAD}


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
        (xj.sigmoid_binary_cross_entropy, (Z, Z), "pos_weight"),
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
def test_label_checks_name_position_and_label(function, bad, as_array):
    wanted = rf"targets: expected labels in \[0, 4\), got {bad} at position \[1 2\]"
    with xj.label_checks(), pytest.raises(ValueError, match=wanted):
        function(LOGITS, as_array(labels_with(bad)))


def test_label_checks_see_through_operations():
    targets = xj.smooth_labels(xj.mix_targets(labels_with(0), labels_with(9), 0.5), 0.1)
    with xj.label_checks(), pytest.raises(ValueError, match=r"got 9 at position \[1 2\]"):
        xj.softmax_cross_entropy(LOGITS, targets)


def test_label_checks_leave_out_what_is_masked_out():
    labels = labels_with(-100, (slice(None), 0))
    keep = labels >= 0
    with xj.label_checks():
        losses = xj.softmax_cross_entropy(LOGITS, labels, where=keep)
        np.testing.assert_allclose(losses, np.where(keep, math.log(4), 0), rtol=1e-6)
        labels[1, 1] = 4
        with pytest.raises(ValueError, match=r"got 4 at position \[1 1\]"):
            xj.softmax_cross_entropy(LOGITS, labels, where=keep)
        with pytest.raises(ValueError, match=r"got -100 at position \[0 0\]"):
            xj.softmax_cross_entropy(LOGITS, labels, where=bools(2, 3, 4))


def test_label_checks_with_another_class_axis():
    with xj.label_checks():
        xj.softmax_cross_entropy(LOGITS, ints(2, 4), axis=1)
        with pytest.raises(ValueError, match=r"labels in \[0, 3\), got 3 at position \[0 1\]"):
            xj.softmax_cross_entropy(LOGITS, jnp.array([[0, 3, 0, 0]] * 2), axis=1)


def test_label_checks_are_off_unless_they_are_on():
    bad = labels_with(4)

    def is_nan():
        return np.isnan(xj.softmax_cross_entropy(LOGITS, bad)).sum() == 1

    assert is_nan()
    with contextlib.suppress(KeyError), xj.label_checks():
        raise KeyError
    assert is_nan()
    with xj.label_checks():
        with xj.label_checks():
            pass
        with pytest.raises(ValueError, match="targets"):
            is_nan()
    assert is_nan()


def test_label_checks_under_jit():
    """With checkify the error is a value; without it, jax says that checkify is missing."""

    def loss(labels):
        with xj.label_checks():
            return xj.softmax_cross_entropy(LOGITS, labels).sum()

    checked = checkify.checkify(jax.jit(loss))
    error, _ = checked(labels_with(3))
    assert error.get() is None
    error, value = checked(labels_with(-5))
    assert np.isnan(value)
    with pytest.raises(ValueError, match=r"got -5 at position \[1 2\]"):
        error.throw()
    error, _ = checkify.checkify(jax.value_and_grad(loss, allow_int=True))(labels_with(-5))
    assert "got -5 at position [1 2]" in str(error.get())
    with pytest.raises(ValueError, match=r"checkify"):
        jax.jit(loss)(labels_with(3))
