"""Extreme calls, each with its exact value and gradient: infinities, the ends of a dtype, nothing.

XLA's CPU code makes 0 of numbers below the smallest normal one (jaxlib 0.10.2), so a truth below it
is 0 here.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import jit

import xentjax as xj

INF, NAN = math.inf, math.nan
MAX = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)
HALF = 65504.0  # The largest number of float16.
LOG2, LOG3 = math.log(2), math.log(3)


class Extreme(NamedTuple):
    """A call function(x, *rest), its values, and the gradient of their sum to x."""

    function: Any
    x: Any
    rest: tuple[Any, ...]
    values: Any
    gradient: Any


def of_softmax(rows):
    """(logits, label or masses, loss, gradient) of one example each."""
    for z, target, loss, gradient in rows:
        label = isinstance(target, int)
        targets = np.array([target], np.int32 if label else np.float32)
        yield Extreme(xj.softmax_cross_entropy, [z], (targets,), [loss], [gradient])


SOFTMAX = [
    ([5], 0, 0, [0]),
    ([-MAX], 0, 0, [0]),
    ([MAX, -MAX], 0, 0, [0, 0]),
    ([MAX, -MAX], 1, INF, [1, -1]),  # 2 · MAX.
    ([1e38, -1e38], 1, 2e38, [1, -1]),
    ([-MAX, -MAX], 0, LOG2, [-0.5, 0.5]),
    ([MAX, MAX], 1, LOG2, [0.5, -0.5]),
    ([TINY, -TINY], 0, LOG2, [-0.5, 0.5]),
    ([1e-45, -1e-45], 0, LOG2, [-0.5, 0.5]),
    ([-0.0, 0.0], 1, LOG2, [0.5, -0.5]),
    ([80, 0], 0, math.exp(-80), [-math.exp(-80), math.exp(-80)]),
    ([200, 0], 0, 0, [0, 0]),
    ([200, 0], 1, 200, [1, -1]),
    ([0, 0], -1, NAN, [NAN, NAN]),
    ([0, 0], 2, NAN, [NAN, NAN]),
    ([0, 0], 2**31 - 1, NAN, [NAN, NAN]),
    ([0, 0], -(2**31), NAN, [NAN, NAN]),
    ([NAN, 0], 1, NAN, [NAN, NAN]),
    ([-INF, 0], 1, 0, [0, 0]),
    ([-INF, 0], 0, INF, [-1, 1]),
    ([-INF, -INF], 0, INF, [-1, 0]),
    ([1, 2], [0, 0], 0, [0, 0]),
    ([0, 0], [1e38, 1e38], 2e38 * LOG2, [0, 0]),
    ([0, 0], [3e38, 0], 3e38 * LOG2, [-1.5e38, 1.5e38]),
    ([0, 0], [1e-25, 0], 1e-25 * LOG2, [-0.5e-25, 0.5e-25]),
    ([0, 0], [NAN, 0], NAN, [NAN, NAN]),
    ([-INF, 0], [0, 1], 0, [0, 0]),
    ([-INF, 0], [0.5, 0.5], INF, [-0.5, 0.5]),
]


def elementwise(function, rows, **options):
    """(prediction, target, loss, slope) of one element each, in one call."""
    x, t, losses, slopes = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    yield Extreme(lambda x, t: function(x, t, **options), x, (t,), losses, slopes)


SIGMOID = [
    (INF, 1, 0, 0),
    (-INF, 0, 0, 0),
    (INF, 0, INF, 1),
    (-INF, 1, INF, -1),
    (0, 0.5, LOG2, 0),
    (MAX, 1, 0, 0),
    (-MAX, 0, 0, 0),
    (MAX, 0, MAX, 1),
    (MAX, 0.5, MAX / 2, 0.5),
    (80, 1, math.exp(-80), -math.exp(-80)),
    (200, 1, 0, 0),
    (200, 0.5, 100, 0.5),
    (-200, 1, 200, -1),
    (NAN, 1, NAN, NAN),
]
BINARY = [
    (0, 0, 0, 1),
    (1, 1, 0, -1),
    (0, 1, INF, -INF),
    (1, 0, INF, INF),
    (0.5, 0.5, LOG2, 0),
    (TINY, 1, -math.log(TINY), -1 / TINY),
    (1 - 2.0**-24, 1, 2.0**-24, -1),
    (2.0**-24, 0, 2.0**-24, 1),
]
PAIRS = [  # (p, q, KL, JS)
    ([1, 0], [1, 0], 0, 0),
    ([0.5, 0.5], [0.5, 0.5], 0, 0),
    ([0, 0], [0, 0], 0, 0),
    ([1, 0], [0, 1], INF, LOG2),
    ([0.5, 0.5], [1, 0], INF, 0.5 * (LOG2 + math.log(2 / 3) + 0.5 * math.log(4 / 3))),
    ([1, 0], [0.5, 0.5], LOG2, 0.5 * (LOG2 + math.log(2 / 3) + 0.5 * math.log(4 / 3))),
    ([1, 0], [1, 1e-30], 0, 0.5e-30 * LOG2),
    ([0, 1], [TINY, 1], 0, 0),
    ([1e-38, 1], [0.5, 0.5], LOG2, 0.5 * (LOG2 + math.log(2 / 3) + 0.5 * math.log(4 / 3))),
]
LOGIT_PAIRS = [  # (p_logits, q_logits, KL, ∂KL/∂q_logits)
    ([0, 0], [0, 0], 0, [0, 0]),
    ([MAX, -MAX], [MAX, -MAX], 0, [0, 0]),
    ([-INF, 0], [-INF, 0], 0, [0, 0]),
    ([-INF, 0], [0, 0], LOG2, [0.5, -0.5]),
    ([0, 0], [-INF, 0], INF, [-0.5, 0.5]),
    ([0, 200], [200, 0], 200, [1, -1]),
    ([0, 0], [1e4, 1e4], 0, [0, 0]),
]
ENTROPIES = [
    ([0, 0], LOG2),
    ([MAX, -MAX], 0),
    ([MAX, MAX], LOG2),
    ([-INF, 0], 0),
    ([-INF, -INF], 0),
    ([200, 0], 0),
    ([60, 0], 61 * math.exp(-60)),
    ([NAN, 0], NAN),
]
MEANS = [  # (losses, weights, mean, gradient)
    ([1, INF], [1, 0], 1, [1, 0]),
    ([1, NAN], [1, 0], NAN, [1, 0]),
    ([1, 2], [0, 0], 0, [0, 0]),
    ([1, 3], [1e-30, 3e-30], 2.5, [0.25, 0.75]),
    ([1, 3], [1e30, 3e30], 2.5, [0.25, 0.75]),
    ([1, 3], [2.0**-120, 2.0**-120], 2, [0.5, 0.5]),
    ([1e38, 1e38], [1, 1], 1e38, [0.5, 0.5]),
    ([-0.0, 0.0], [1, 1], 0, [0.5, 0.5]),
]


def kl_of_logits(q, p):
    return xj.softmax_kl_divergence(p, q)


def calls():
    yield from of_softmax(SOFTMAX)
    yield from elementwise(xj.sigmoid_binary_cross_entropy, SIGMOID)
    yield from elementwise(xj.binary_cross_entropy, BINARY)
    p, q, kl, js = (np.array(column, np.float32) for column in zip(*PAIRS, strict=True))
    yield Extreme(xj.kl_divergence, p, (q,), kl, None)
    yield Extreme(xj.js_divergence, p, (q,), js, None)
    yield Extreme(xj.js_divergence, q, (p,), js, None)
    p, q, kl, gradient = zip(*LOGIT_PAIRS, strict=True)
    yield Extreme(kl_of_logits, q, (np.array(p, np.float32),), kl, gradient)
    z, entropies = zip(*ENTROPIES, strict=True)
    yield Extreme(xj.softmax_entropy, z, (), entropies, None)
    yield Extreme(xj.surprisal, [0, 1, TINY, INF], (), [INF, 0, -math.log(TINY), -INF], None)
    yield Extreme(xj.perplexity, [0, 88, 89, -INF], (), [1, math.exp(88), INF, 0], None)
    yield Extreme(xj.entropy, [[1, 0], [0.5, 0.5], [0, 0]], (), [0, LOG2, 0], None)
    yield Extreme(xj.soft_cap(2.0), [INF, -INF, MAX, 0], (), [2, -2, 2, 0], [0, 0, 0, 1])
    yield Extreme(xj.soft_cap(1e30), [1, MAX, -1], (), [1, 1e30, -1], [1, 0, 1])
    yield Extreme(xj.temperature(1e-30), [1e-10, 0, INF], (), [1e20, 0, INF], [1e30] * 3)
    for losses, weights, mean, gradient in MEANS:
        rest = (np.array(weights, np.float32),)
        yield Extreme(lambda x, w: xj.weighted_mean(x, weights=w), losses, rest, mean, gradient)
    yield Extreme(xj.weighted_mean, [], (), 0, [])
    half = np.array([[HALF, -HALF], [HALF, HALF]], np.float16)
    labels = np.array([1, 0], np.int32)
    yield Extreme(
        xj.softmax_cross_entropy, half, (labels,), [2 * HALF, LOG2], [[1, -1], [-0.5, 0.5]]
    )
    many = np.full(2**16 + 7, 6e4, np.float16)  # Their sum and their count exceed float16.
    yield Extreme(xj.weighted_mean, many, (), float(np.float16(6e4)), None)
    nothing = np.zeros((2, 0), np.float32), np.zeros((0, 3), np.float32)
    yield Extreme(
        xj.linear_softmax_cross_entropy,
        *nothing[:1],
        (nothing[1], labels),
        LOG3,
        np.zeros((2, 0)),
    )
    background = jnp.ones(2)
    yield Extreme(
        lambda z, m: xj.softmax_cross_entropy(
            z, xj.SparseTargets(jnp.zeros((2, 0), int), jnp.zeros((2, 0)), m)
        ),
        [[0, 0], [1, 1]],
        (background,),
        [LOG2, LOG2],
        [[0, 0], [0, 0]],
    )
    for alpha, loss in [(0.0, [0, 0]), (1.0, [200 * 2 / 3, INF])]:
        yield Extreme(
            lambda z, y, alpha=alpha: xj.softmax_cross_entropy(z, xj.smooth_labels(y, alpha)),
            [[200, 0, 0], [200, -INF, 0]],
            (np.array([0, 0]),),
            loss,
            None,
        )


CALLS = list(calls())


@pytest.fixture(scope="module")
def answers():
    """The values and gradients of all calls, compiled as one program."""

    def both(function, x, rest):
        def total(x):
            values = function(x, *rest)
            return values.sum().astype(jnp.float32), values

        (_, values), gradient = jax.value_and_grad(total, has_aux=True)(x)
        return values, gradient

    def every(arrays):
        return [both(call.function, x, r) for call, (x, r) in zip(CALLS, arrays, strict=True)]

    def floats(x):
        return np.asarray(x, np.float16 if getattr(x, "dtype", None) == np.float16 else np.float32)

    return jit(every)([(floats(call.x), call.rest) for call in CALLS])


@pytest.mark.parametrize("index", range(len(CALLS)))
def test_extreme_call(answers, index):
    call, (values, gradient) = CALLS[index], answers[index]
    with np.errstate(over="ignore"):
        wanted = np.asarray(call.values, np.float32)
    np.testing.assert_allclose(values, wanted, rtol=2e-6, atol=TINY)
    if call.gradient is not None:
        wanted = np.asarray(call.gradient, np.float32)
        np.testing.assert_allclose(gradient, wanted, rtol=2e-6, atol=TINY)


def test_there_are_many():
    """Elements with an exact outcome of their own, beside the errors of bad_calls."""
    assert sum(np.size(call.values) for call in CALLS) >= 90


@pytest.mark.parametrize("name", ["dog", 3, ["dog"], ("dog", "cat"), 1.5])
def test_an_axis_that_no_map_has(name):
    losses = jnp.ones(3)
    message = r"axis_name: expected axes of a jax\.vmap, jax\.pmap or jax\.shard_map around, got "
    for function in (
        lambda: xj.weighted_mean(losses, axis_name=name),
        lambda: xj.weighted_sum(losses).psum(name),
        lambda: xj.vocab_parallel_softmax_cross_entropy(
            jnp.ones((3, 2)), jnp.zeros(3, int), axis_name=name
        ),
    ):
        with pytest.raises(ValueError, match=message):
            function()
