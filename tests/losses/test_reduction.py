"""Means that stay right: masks, weights, microbatches, lanes; against float64 NumPy."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mainly

import xentjax
from xentjax import WeightedSum

RNG = np.random.default_rng(0)
LOSSES = RNG.exponential(2.0, (6, 4)).astype(np.float32)
MASK = RNG.random(LOSSES.shape) < 0.6
WEIGHTS = RNG.uniform(0, 3, LOSSES.shape).astype(np.float32)
# Both sums are of 24 numbers that are not negative: 24 ulp if they were added one by one.
RTOL = 24 * float(np.finfo(np.float32).eps)

SELECTIONS = {
    "all": {},
    "where": {"where": MASK},
    "weights": {"weights": WEIGHTS},
    "where and weights": {"where": MASK, "weights": WEIGHTS},
}


def total_and_weight(losses, where=None, weights=None):
    """Σ w · loss and Σ w in float64, by picking the losses that are kept."""
    losses = np.asarray(losses, float)
    keep = np.ones(losses.shape, bool) if where is None else np.asarray(where)
    w = np.ones(losses.shape) if weights is None else np.asarray(weights, float)
    return (w * losses)[keep].sum(), w[keep].sum()


@pytest.mark.parametrize("name", SELECTIONS)
def test_mean_against_float64(name):
    selection = SELECTIONS[name]
    total, weight = total_and_weight(LOSSES, **selection)
    mean = xentjax.weighted_mean(LOSSES, **selection)
    assert (mean.shape, mean.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(mean, total / weight, rtol=RTOL)
    parts = xentjax.weighted_sum(LOSSES, **selection)
    np.testing.assert_allclose([parts.total, parts.weight], [total, weight], rtol=RTOL)
    np.testing.assert_array_equal(parts.mean(), mean)


@pytest.mark.parametrize("name", SELECTIONS)
def test_gradient_is_each_ones_share(name):
    selection = SELECTIONS[name]
    _, weight = total_and_weight(LOSSES, **selection)
    want = np.asarray(selection.get("weights", np.ones_like(LOSSES)), float) / weight
    want = np.where(selection.get("where", True), want, 0)
    got = jax.grad(functools.partial(xentjax.weighted_mean, **selection))(LOSSES)
    np.testing.assert_allclose(got, want, rtol=RTOL)


def test_gradient_to_the_weights():
    """∂mean/∂w = (loss − mean) / Σ w."""
    total, weight = total_and_weight(LOSSES, MASK, WEIGHTS)
    got = jax.grad(lambda w: xentjax.weighted_mean(LOSSES, where=MASK, weights=w))(WEIGHTS)
    want = np.where(MASK, (LOSSES.astype(float) - total / weight) / weight, 0)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "selection",
    [{"where": np.zeros_like(MASK)}, {"weights": np.zeros_like(WEIGHTS)}],
    ids=["where", "weights"],
)
def test_nothing_kept_is_0_with_zero_gradient(selection):
    mean = functools.partial(xentjax.weighted_mean, **selection)
    value, gradient = jax.value_and_grad(mean)(LOSSES)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(LOSSES))
    np.testing.assert_array_equal(jax.jvp(mean, (LOSSES,), (LOSSES,))[1], 0)
    if "weights" in selection:
        to_weights = jax.grad(lambda w: xentjax.weighted_mean(LOSSES, weights=w))
        np.testing.assert_array_equal(to_weights(selection["weights"]), np.zeros_like(LOSSES))


def test_empty_batch_is_0():
    empty = np.zeros((0, 3), np.float32)
    assert xentjax.weighted_mean(empty) == 0
    assert jax.grad(xentjax.weighted_mean)(empty).shape == empty.shape
    assert WeightedSum.zero().mean() == 0


@pytest.mark.parametrize("axis", [0, -1, (0, 1), [1, 0]])
@pytest.mark.parametrize("name", mainly(SELECTIONS, "where and weights"))
def test_mean_along_axes(name, axis):
    """Of each sequence or image by itself, those that keep nothing among them."""
    selection = {
        k: np.where(np.arange(4) == 3, 0, v).astype(v.dtype) for k, v in SELECTIONS[name].items()
    }
    along = {"axis": tuple(axis) if isinstance(axis, list) else axis}
    where, weights = selection.get("where", True), selection.get("weights", 1.0)
    kept = np.where(where, weights, 0).astype(float) * np.ones(LOSSES.shape)
    total, weight = (kept * LOSSES).sum(**along), kept.sum(**along)
    want = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    got = xentjax.weighted_mean(LOSSES, axis=axis, **selection)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=RTOL)
    lanes = jax.vmap(
        lambda x, s: xentjax.weighted_mean(x, axis=axis, axis_name="lanes", **s),
        axis_name="lanes",
    )
    stacked = {k: np.stack([v, v]) for k, v in selection.items()}
    both = lanes(np.stack([LOSSES, 3 * LOSSES]), stacked)
    np.testing.assert_allclose(both, np.stack([2 * want] * 2), rtol=2 * RTOL)


def test_weight_0_drops_an_infinite_loss_and_its_gradient():
    losses, weights = jnp.array([1.0, np.inf, -np.inf]), jnp.array([1.0, 0.0, 0.0])

    def mean(losses, weights):
        return xentjax.weighted_mean(losses, weights=weights)

    value, (to_losses, to_weights) = jax.value_and_grad(mean, (0, 1))(losses, weights)
    assert value == 1
    np.testing.assert_array_equal(to_losses, [1, 0, 0])
    assert np.isfinite(to_weights).all()
    assert mean(losses[:2], jnp.ones(2)) == np.inf
    assert np.isnan(mean(jnp.array([1.0, np.nan]), weights[:2]))  # NaN is nobody's 0.


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool, np.float16, np.float64])
def test_weights_of_any_real_dtype(dtype):
    counts = np.array([[2, 1, 0, 1]] * 6).astype(dtype)
    want = xentjax.weighted_mean(LOSSES, weights=counts.astype(np.float32))
    for x64 in (False, True):
        with jax.enable_x64(x64):
            got = xentjax.weighted_mean(LOSSES, weights=counts)
            assert (got, got.dtype) == (want, jnp.float32)


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 1e30])
def test_derivatives_of_the_mean_at_any_size_of_the_weight(size):
    """The plain quotient's derivative divides by the square of the weight."""
    total, weight = np.float32(2 * size), np.float32(size)
    t, w = float(total), float(weight)

    def mean(total, weight):
        return WeightedSum(total, weight).mean()

    to_total, to_weight = jax.grad(mean, (0, 1))(total, weight)
    np.testing.assert_allclose([to_total, to_weight], [1 / w, -t / w**2], rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(mean, (total, weight), (weight, weight))[1], -1, rtol=1e-6)
    if 1e-19 < size < 1e19:  # 1 / w² is a float32.
        for modes in (jax.hessian, lambda f, n: jax.jacfwd(jax.jacfwd(f, n), n)):
            second = modes(mean, (0, 1))(total, weight)
            want = [[0, -1 / w**2], [-1 / w**2, 2 * t / w**3]]
            np.testing.assert_allclose(second, want, rtol=1e-6)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_what_is_masked_out_is_not_looked_at(junk):
    losses, weights = LOSSES.copy(), WEIGHTS.copy()
    losses[~MASK], weights[~MASK] = junk, junk

    def mean(x, w):
        return xentjax.weighted_mean(x, where=MASK, weights=w)

    got, gradients = jax.value_and_grad(mean, (0, 1))(losses, weights)
    want, clean = jax.value_and_grad(mean, (0, 1))(LOSSES, WEIGHTS)
    assert got == want
    jax.tree.map(np.testing.assert_array_equal, gradients, clean)


def test_what_is_kept_is_not_hidden():
    losses = LOSSES.copy()
    losses[MASK.nonzero()[0][0], MASK.nonzero()[1][0]] = np.nan
    assert np.isnan(xentjax.weighted_mean(losses, where=MASK))


def test_ignored_labels_end_to_end():
    """The same mask for loss and mean: a label of −100 leaves neither NaN nor gradient."""
    logits = RNG.standard_normal((4, 3)).astype(np.float32)
    labels = np.array([1, -100, 0, -100])
    keep = labels != -100

    def mean(logits):
        losses = xentjax.softmax_cross_entropy(logits, labels, where=keep)
        return xentjax.weighted_mean(losses, where=keep)

    value, gradient = jax.value_and_grad(mean)(logits)
    p = np.exp(logits.astype(float))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(value, -np.log(p[[0, 2], [1, 0]]).mean(), rtol=1e-6)
    want = np.where(keep[:, None], (p - np.eye(3)[labels % 3]) / 2, 0)
    np.testing.assert_allclose(gradient, want, rtol=0, atol=1e-7)


# Accumulation.


def test_parts_add_up_to_the_whole_and_their_means_do_not():
    """Two microbatches, of 4 tokens and of 1: losses 1, 2, 3, 4 and 40.

    The mean is 50 / 5 = 10. The mean of the means 2.5 and 40 is 21.25.
    """
    first = xentjax.weighted_sum(jnp.array([1.0, 2.0, 3.0, 4.0]))
    keep = jnp.array([True, False, False, False])
    second = xentjax.weighted_sum(jnp.array([40.0, 9.0, 9.0, 9.0]), where=keep)
    assert (first + second).mean() == 10
    assert (first.mean() + second.mean()) / 2 == 21.25
    assert sum([first, second], start=WeightedSum.zero()).mean() == 10


def test_uneven_parts_add_up():
    whole = xentjax.weighted_sum(LOSSES, where=MASK, weights=WEIGHTS)
    parts = WeightedSum.zero()
    for rows in (slice(0, 1), slice(1, 4), slice(4, 4), slice(4, 6)):
        parts += xentjax.weighted_sum(LOSSES[rows], where=MASK[rows], weights=WEIGHTS[rows])
    np.testing.assert_allclose(parts.mean(), whole.mean(), rtol=RTOL)
    number: Any = 1.0
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = whole + number


@functools.partial(jax.jit, static_argnums=2)
def add_often(parts, losses, times):
    def step(_, parts):
        return parts + xentjax.weighted_sum(losses)

    return jax.lax.fori_loop(0, times, step, parts)


@pytest.mark.parametrize("loss", [3.0, 2.7182818, 1.1])
def test_sums_do_not_saturate(loss):
    """In float32, 2²⁵ additions of 3.0 one by one come to the mean 4.0."""
    losses = jnp.array([loss], jnp.float32)
    parts = add_often(WeightedSum.zero(), losses, 2**21)
    assert parts.weight == 2**21
    np.testing.assert_allclose(parts.mean(), losses[0], rtol=2e-7)
    # The last of 10¹⁰ tokens count as much as the first.
    many = WeightedSum(np.float32(1e10 * loss), np.float32(1e10))
    more = add_often(many, losses, 2**18)

    def exact(total, errors):
        return sum(map(float, (total, *errors)))

    gained = exact(more.total, more.total_errors) - float(many.total)
    assert gained == 2**18 * float(losses[0])
    assert exact(more.weight, more.weight_errors) - 1e10 == 2**18
    doubled = functools.reduce(lambda s, _: s + s, range(12), parts)  # 2³³ losses.
    np.testing.assert_allclose(doubled.mean(), losses[0], rtol=2e-7)


def test_sums_of_unlike_batches_do_not_saturate():
    sizes = [1, 2**24, 7, 2**22, 1, 1] * 3
    rows = [WeightedSum(np.float32(2.5 * n), np.float32(n)) for n in sizes]
    many = WeightedSum(np.float32(2.5e10), np.float32(1e10))
    whole = sum([many, *rows, *rows[::-1]])
    want = 1e10 + 2 * sum(sizes)
    assert float(whole.weight) == float(np.float32(want))
    assert sum(map(float, (whole.weight, *whole.weight_errors))) == want
    lanes = jax.tree.map(lambda *x: jnp.stack(x), many, *rows)
    summed = jax.vmap(lambda s: s.psum("lanes"), axis_name="lanes")(lanes)
    np.testing.assert_allclose(summed.mean(), np.full(len(rows) + 1, 2.5), rtol=1e-6)


@pytest.mark.parametrize("junk", [np.inf, np.nan])
def test_a_sum_that_is_not_finite_stays_as_it_is(junk):
    parts = WeightedSum.zero() + xentjax.weighted_sum(jnp.array([junk, 1.0]))
    np.testing.assert_array_equal([parts.mean(), (parts + parts).mean()], junk)
    assert parts.weight == 2


def test_the_built_in_sum():
    parts = [xentjax.weighted_sum(row) for row in LOSSES]
    np.testing.assert_allclose(sum(parts).mean(), LOSSES.mean(), rtol=RTOL)
    assert isinstance(jax.jit(sum)(parts), WeightedSum)
    one: Any = 1
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = one + parts[0]


def test_sums_given_as_they_are():
    """Two sums of a caller's own, in any dtype, as PyTorch's mean under weights needs them."""
    assert WeightedSum(6.0, 4).mean() == 1.5
    with pytest.raises(
        ValueError, match=r"weight: expected shape \(\) .*that of total.*got .*\[1\]"
    ):
        WeightedSum(jnp.ones(()), jnp.ones(1))
    with pytest.raises(TypeError, match=r"total: expected a floating-point array, got int32\[\]"):
        WeightedSum(jnp.int32(3), jnp.ones(()))


@pytest.mark.parametrize(
    "case",
    mainly(
        [
            (dtype, x64, promotion)
            for promotion in ("standard", "strict")
            for dtype, x64 in [
                *itertools.product(["float32", "bfloat16", "float16"], [False, True]),
                ("float64", True),
            ]
        ],
        *[("float32", True, "strict"), ("bfloat16", False, "strict"), ("float64", True, "strict")],
    ),
    ids=str,
)
def test_carry_keeps_its_dtype(case):
    """`zero()` is a carry for losses of every dtype but float64, and `zero(float64)` for that."""
    dtype, x64, promotion = case
    with (
        jax.enable_x64(x64),
        jax.numpy_dtype_promotion(promotion),
        jax.numpy_rank_promotion("raise"),
    ):
        wide = jnp.float64 if dtype == "float64" else jnp.float32
        losses = jnp.asarray(LOSSES, dtype)

        def step(parts, row):
            x, keep, w = row
            return parts + xentjax.weighted_sum(x, where=keep, weights=w), None

        def mean(losses):
            carry, rows = WeightedSum.zero(wide), (losses, MASK, WEIGHTS)
            return jax.lax.scan(step, carry, rows)[0].mean()

        value, gradient = jax.jit(jax.value_and_grad(mean))(losses)
        assert (value.dtype, gradient.dtype) == (wide, losses.dtype)
        np.testing.assert_allclose(
            value, np.average(losses.astype(float), weights=MASK * WEIGHTS), rtol=RTOL
        )


def test_scan_accumulates():
    """The gradient of the accumulated mean is that of the whole."""

    def accumulated(losses):
        def step(parts, microbatch):
            x, keep, w = microbatch
            return parts + xentjax.weighted_sum(x, where=keep, weights=w), None

        parts, _ = jax.lax.scan(step, WeightedSum.zero(), (losses, MASK, WEIGHTS))
        return parts.mean()

    def whole(losses):
        return xentjax.weighted_mean(losses, where=MASK, weights=WEIGHTS)

    got, want = (jax.jit(jax.value_and_grad(f))(LOSSES) for f in (accumulated, whole))
    np.testing.assert_allclose(got[0], want[0], rtol=RTOL)
    np.testing.assert_allclose(got[1], want[1], rtol=RTOL)


def test_lanes_of_vmap():
    """`axis_name` sums over the lanes: each has the mean of all, and so do parts by psum."""
    whole = xentjax.weighted_mean(LOSSES, where=MASK, weights=WEIGHTS)

    def lane(x, keep, w):
        return xentjax.weighted_mean(x, where=keep, weights=w, axis_name="lanes")

    def parts(x, keep, w):
        return xentjax.weighted_sum(x, where=keep, weights=w).psum("lanes").mean()

    for f in (lane, parts):
        means = jax.vmap(f, axis_name="lanes")(LOSSES, MASK, WEIGHTS)
        np.testing.assert_allclose(means, np.full(len(LOSSES), whole), rtol=RTOL)

    def of_both(x, keep, w):
        return xentjax.weighted_mean(x, where=keep, weights=w, axis_name=("rows", "columns"))

    both = jax.vmap(jax.vmap(of_both, axis_name="columns"), axis_name="rows")
    np.testing.assert_allclose(both(LOSSES, MASK, WEIGHTS), np.full_like(LOSSES, whole), rtol=RTOL)
    # A lane that keeps nothing has the mean of the others.
    one = np.zeros_like(MASK)
    one[2, 1] = True
    means = jax.vmap(lane, axis_name="lanes")(LOSSES, one, np.ones_like(WEIGHTS))
    np.testing.assert_allclose(means, np.full(len(LOSSES), LOSSES[2, 1]), rtol=RTOL)


def test_weighted_sum_is_a_pytree():
    parts = xentjax.weighted_sum(LOSSES)
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(parts)
    assert isinstance(doubled, WeightedSum)
    np.testing.assert_allclose(doubled.total, 2 * parts.total)
    np.testing.assert_array_equal(doubled.mean(), parts.mean())
    stacked = jax.vmap(xentjax.weighted_sum)(LOSSES)
    assert stacked.total.shape == (len(LOSSES),)
    np.testing.assert_allclose(jax.vmap(WeightedSum.mean)(stacked), LOSSES.mean(-1), rtol=RTOL)


@pytest.mark.parametrize("low", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_summed_in_float32(low):
    """4000 losses of 30 overflow float16 and stick at 8192 in bfloat16."""
    losses, ones = jnp.full(4000, 30, low), jnp.ones(4000, low)
    for parts in (xentjax.weighted_sum(losses), xentjax.weighted_sum(losses, weights=ones)):
        assert (parts.total.dtype, parts.weight.dtype) == (jnp.float32, jnp.float32)
        assert (parts.total, parts.weight) == (120_000, 4000)
    assert jax.grad(xentjax.weighted_mean)(losses).dtype == low


def test_float64_stays():
    with jax.enable_x64(True):
        losses = RNG.random(100)
        mean = xentjax.weighted_mean(losses)
        assert mean.dtype == jnp.float64
        np.testing.assert_allclose(mean, losses.mean(), rtol=1e-15)
        assert WeightedSum.zero(jnp.float64).total.dtype == jnp.float64
        parts = WeightedSum.zero() + xentjax.weighted_sum(losses.astype(np.float32))
        assert parts.mean().dtype == jnp.float32
