"""Margins: the loss of a lower label's logit, however the loss was found."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from cases import jit, relative_error

import xentjax

RNG = np.random.default_rng(0)
LABELS = np.array([0, 3, 2, 1, 3, 0])


def exact(losses, margins):
    pairs = zip(np.ravel(losses), np.ravel(margins), strict=True)
    return [
        mpmath.log1p(mpmath.exp(mpmath.mpf(float(m))) * mpmath.expm1(mpmath.mpf(float(x))))
        for x, m in pairs
    ]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float64", 1e-14)])
def test_losses_and_slopes_are_exact(dtype, bound):
    """From losses that nobody would print to those of hopeless predictions."""
    with jax.enable_x64(True):
        losses, margins = np.meshgrid(
            np.array([1e-20, 1e-9, 1e-3, 0.3, 1.0, 7.0, 29.0, 81.0, 1e4], dtype),
            np.array([0.0, 1e-3, 0.5, 10.0, 22.4, 60.0, 128.0, 400.0], dtype),
        )

        @jit
        def value_and_slopes(losses, margins):
            slopes = jax.grad(lambda *a: xentjax.additive_margin(*a).sum(), (0, 1))
            return xentjax.additive_margin(losses, margins), *slopes(losses, margins)

        got, by_loss, by_margin = map(np.asarray, value_and_slopes(losses, margins))
        assert got.dtype == by_loss.dtype == dtype
        want = exact(losses, margins)
        # Where l is tiny and m is past 80, what is left is a difference: of numbers below m.
        normal = (losses + margins < 80) | (losses > 1e-9)
        pick = np.flatnonzero(normal)
        assert relative_error(got.ravel()[pick], [want[i] for i in pick]) <= bound
        np.testing.assert_allclose(got.ravel(), np.array(want, float), rtol=bound, atol=128 * bound)
        # dl'/dm is 1 − exp(−l'), and dl'/dl is that over 1 − exp(−l).
        shares = [-mpmath.expm1(-w) for w in want]
        of_losses = [-mpmath.expm1(-mpmath.mpf(float(x))) for x in losses.ravel()]
        ratios = [a / b for a, b in zip(shares, of_losses, strict=True)]
        pick = [i for i in pick if ratios[i] < 1e37]
        assert relative_error(by_margin.ravel()[pick], [shares[i] for i in pick]) <= 40 * bound
        assert relative_error(by_loss.ravel()[pick], [ratios[i] for i in pick]) <= 40 * bound


def test_ends():
    slope = jax.grad(xentjax.additive_margin)
    assert xentjax.additive_margin(0.0, 3.0) == 0
    np.testing.assert_allclose(slope(0.0, 3.0), np.exp(3), rtol=1e-6)
    assert xentjax.additive_margin(np.inf, 3.0) == np.inf
    assert slope(np.inf, 3.0) == 1
    assert np.isnan(xentjax.additive_margin(np.nan, 3.0))
    for margin in (85.0, 100.0, 1e4):  # exp(−100) is no float32.
        assert xentjax.additive_margin(0.0, margin) == 0
        assert jax.grad(xentjax.additive_margin, 1)(0.0, margin) == 0
    assert slope(0.0, 100.0) == np.inf
    both = np.log1p(np.exp(80.5) * 1e-34)  # Of a loss as small as exp(−m).
    np.testing.assert_allclose(xentjax.additive_margin(1e-34, 80.5), both, rtol=1e-5)


def face_losses(inputs, kernel, labels, scale, margin, angular, head):
    """ArcFace's or CosFace's losses of unit features and unit kernel rows, as the page has them."""
    losses, stats = head(inputs, kernel, labels, class_axis=0, logit_transform=lambda z: scale * z)
    if angular:
        cosines = (stats.log_normalizer - losses) / scale
        margin = xentjax.angular_margin(cosines, margin)
    return xentjax.additive_margin(losses, scale * margin)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(("angular", "margin"), [(True, 0.5), (False, 0.35)])
def test_faces_through_the_head_are_those_of_the_formula(angular, margin):
    inputs, kernel, scale = (
        unit(RNG.standard_normal((6, 3))),
        unit(RNG.standard_normal((5, 3))),
        8.0,
    )
    inputs[0] = -kernel[LABELS[0]]  # Past π − m.
    inputs[0] = unit(inputs[0] + 0.1)

    def plain(inputs, kernel):
        cosines = inputs @ kernel.T
        own = (cosines * jax.nn.one_hot(LABELS, 5)).sum(-1)
        angle = jnp.arccos(own)
        turned = jnp.where(
            angle <= jnp.pi - margin, jnp.cos(angle + margin), own - margin * np.sin(margin)
        )
        lower = turned if angular else own - margin
        logits = scale * jnp.where(jax.nn.one_hot(LABELS, 5) == 1, lower[:, None], cosines)
        return jax.nn.logsumexp(logits, axis=-1) - scale * lower

    head = xentjax.linear_softmax_cross_entropy_with_stats
    ours = functools.partial(
        face_losses, labels=LABELS, scale=scale, margin=margin, angular=angular, head=head
    )

    def with_gradient(losses):
        def total(*args):
            each = losses(*args)
            return (jnp.arange(1.0, 7.0) * each).sum(), each

        return jit(jax.grad(total, (0, 1), has_aux=True))

    with jax.enable_x64(True):
        got, want = (with_gradient(f)(inputs, kernel) for f in (ours, plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), got, want)


def test_an_angle_of_0_and_a_cosine_past_1_have_a_finite_gradient():
    cosines = jnp.array([1.0, 1 + 1e-6, -1.0, -1 - 1e-6])
    margins, gradient = jit(jax.value_and_grad(lambda c: xentjax.angular_margin(c, 0.5).sum()))(
        cosines
    )
    want = 2 * (1 - np.cos(0.5)) + 2 * 0.5 * np.sin(0.5)
    np.testing.assert_allclose(margins, want, rtol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("face", [xentjax.additive_margin, xentjax.angular_margin])
def test_a_nan_stays_and_has_no_gradient_where_it_is_masked(face):
    numbers, keep = np.float32([np.nan, 0.25]), np.array([False, True])
    out, pull_back = jax.vjp(lambda x: face(x, 0.5), numbers)
    np.testing.assert_array_equal(np.isnan(out), ~keep)
    (gradient,) = pull_back(jnp.float32(keep))
    np.testing.assert_array_equal(gradient, [0, jax.grad(face)(numbers[1], 0.5)])
