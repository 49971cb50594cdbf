"""Faults that loss libraries are known for, by their kind; none is here.

Others of these kinds have tests beside what they test: chunks that do not divide and padded lanes
in losses/test_linear.py, shares of devices in parallel/, offsets that all logits share and logits
of −inf under `where` in losses/test_softmax.py, 0 · log 0 and sums in float16 in test_extremes.py.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import contract, jit, loss_and_gradient

import xentjax as xj


@pytest.mark.parametrize("shape", [(5, 7), (3, 6000)], ids=str)
def test_logits_that_are_scaled_in_the_same_program(shape):
    """A compiler may make the product again, with one rounding less where the largest is taken off.

    The logits then do not have the maximum that was found. That is a NaN in some formulas, and a
    leader that nobody is in others.
    """
    rng = np.random.default_rng(0)
    z = (rng.normal(size=shape) * 20).astype(np.float32)
    labels, scale = z.argmax(-1), np.float32(1.1)

    def scaled(z, scale):
        losses = xj.softmax_cross_entropy(z * scale, labels)
        return losses.sum(), losses

    (_, losses), gradient = jax.jit(jax.value_and_grad(scaled, has_aux=True))(z, scale)
    exact = z.astype(np.float64) * np.float64(scale)
    gaps = exact - exact.max(-1, keepdims=True)
    rest = np.where(np.arange(shape[1]) == labels[:, None], 0, np.exp(gaps)).sum(-1)
    # The products are rounded, or not: half an ulp of the largest one, or none.
    slack = contract(exact) + 2.0**-23 * np.abs(exact).max()
    np.testing.assert_allclose(losses, np.log1p(rest), rtol=slack)
    entries = gradient[np.arange(shape[0]), labels] / scale
    np.testing.assert_allclose(entries, -rest / (1 + rest), rtol=slack)
    assert np.isfinite(gradient).all()


def test_more_classes_than_float16_can_count():
    losses, gradient = loss_and_gradient(np.zeros((1, 2**16 + 64), np.float16), np.array([3]))
    np.testing.assert_allclose(losses, np.log(2**16 + 64), rtol=1e-6)
    assert gradient.dtype == np.float16
    assert gradient[0, 3] == np.float16(-1)


def test_the_head_gives_each_token_the_weight_of_its_own_cotangent():
    """Not that of the first one."""
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=s).astype(np.float32) for s in ((6, 3), (3, 5)))
    labels, cotangents = rng.integers(0, 5, 6), rng.normal(size=6).astype(np.float32)
    cotangents[0] = 0

    def head(x, kernel):
        options = {"reduction": "none", "memory_budget": 0}
        return xj.linear_softmax_cross_entropy(x, kernel, labels, **options) @ cotangents

    def dense(x, kernel):
        return xj.softmax_cross_entropy(x @ kernel, labels) @ cotangents

    got, want = (jit(jax.grad(f, (0, 1)))(x, kernel) for f in (head, dense))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["labels", "smoothed", "dense"])
def test_more_logits_than_int32_can_count(form):
    """N · V > 2³¹: no index is one number for both axes."""
    tokens, classes = 2**16 + 1, 2**15 + 1
    logits = jax.ShapeDtypeStruct((tokens, classes), jnp.float32)
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def loss(z, t):
        t = xj.smooth_labels(t, 0.1) if form == "smoothed" else t
        return xj.softmax_cross_entropy(z, t).sum()

    targets = logits if form == "dense" else labels
    lowered = jax.jit(jax.value_and_grad(loss)).lower(logits, targets)
    value, gradient = lowered.out_info
    assert (value.shape, gradient.shape) == ((), logits.shape)
    sizes = {
        int(n)
        for shape in re.findall(r"tensor<([\dx]+)x", lowered.as_text())
        for n in shape.split("x")
    }
    assert max(sizes) < 2**31
    assert tokens * classes not in sizes


def test_donated_logits():
    rng = np.random.default_rng(0)
    z, labels = rng.normal(size=(4, 6)).astype(np.float32), np.arange(4)

    def step(z):
        return z - jax.grad(lambda z: xj.softmax_cross_entropy(z, labels).sum())(z)

    want = jax.jit(step)(z)
    donated = jnp.array(z)
    got = jax.jit(step, donate_argnums=0)(donated)
    assert donated.is_deleted()
    np.testing.assert_array_equal(got, want)


def test_a_train_step_is_traced_once():
    @jax.jit
    @functools.partial(chex.assert_max_traces, n=1)
    def step(z, labels, alpha):
        targets = xj.smooth_labels(labels, alpha)
        return jax.grad(lambda z: xj.weighted_mean(xj.softmax_cross_entropy(z, targets)))(z)

    for seed in range(3):
        z = np.random.default_rng(seed).normal(size=(4, 6)).astype(np.float32)
        step(z, np.full(4, seed), 0.1 * seed)
