"""Calibration against SciPy's minimum, loops in float64, and exact formulas."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from cases import jit, target_forms
from scipy.optimize import brentq, minimize_scalar
from scipy.special import softmax

import xentjax

RNG = np.random.default_rng(0)
Z = 3 * RNG.normal(size=(40, 6))
GUESS = np.where(RNG.random(40) < 0.4, Z.argmax(-1), RNG.integers(0, 6, 40))
MASK = RNG.random(40) < 0.7


def mean_loss(inverse, z, masses):
    z = inverse * z
    lse = z.max(-1) + np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1))
    return float((masses.sum(-1) * lse - (masses * z).sum(-1)).mean())


def best(z, masses):
    """Returns SciPy's temperature, to the half of the digits that a minimum has."""
    options = {"xatol": 1e-12}
    found = minimize_scalar(
        mean_loss, args=(z, masses), bounds=(1e-3, 10), method="bounded", options=options
    )
    return 1 / found.x


fit = jit(xentjax.fit_temperature)
ONE_HOT = np.eye(6)[GUESS]


def test_temperature_is_the_minimum_for_targets_of_every_form():
    with jax.enable_x64(True):
        np.testing.assert_allclose(fit(Z, GUESS), best(Z, ONE_HOT), rtol=1e-6)
        masked = xentjax.fit_temperature(Z, GUESS, where=MASK)
        np.testing.assert_allclose(masked, best(Z[MASK], ONE_HOT[MASK]), rtol=1e-6)
        prior = xentjax.smooth_labels(GUESS, 0.2, background=RNG.dirichlet(np.ones(6)))
        dense = np.asarray(xentjax.dense_targets(prior, 6))
        for targets in (prior, dense):
            np.testing.assert_allclose(fit(Z, targets), best(Z, dense), rtol=1e-6)


def test_temperature_where_classes_are_impossible():
    """A logit of −∞ is one that is far below the others, at any temperature."""
    ruled_out = (np.arange(6) % 3 == np.arange(40)[:, None] % 3) & (ONE_HOT == 0)
    with jax.enable_x64(True):
        got = fit(np.where(ruled_out, -np.inf, Z), GUESS)
        np.testing.assert_allclose(got, best(np.where(ruled_out, -1e6, Z), ONE_HOT), rtol=1e-6)


def test_temperature_follows_the_scale_of_the_logits():
    """And float32 finds it to a few ulp, however large or small they are."""
    with jax.enable_x64(True):
        want = float(fit(Z, GUESS))
        for scale in (1e-4, 1.0, 1e4):
            np.testing.assert_allclose(fit(scale * Z, GUESS) / scale, want, rtol=1e-12)
    for scale in (1e-4, 1.0, 1e4):
        got = fit((scale * Z).astype(np.float32), GUESS)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got / scale, want, rtol=1e-5)


def test_temperature_of_logits_of_unlike_sizes():
    """Newton's method takes a dozen steps from a start far below, and few from one above."""
    for seed, is_below in ((0, True), (1, True), (4, True), (1, False), (6, False)):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(60, 4))
        if is_below:
            labels = (3 * z + rng.gumbel(size=z.shape)).argmax(-1)
        else:
            labels = rng.permuted(z.argsort(-1)[:, 1:], axis=-1)[:, 0]
        z *= np.exp(rng.normal(0, 2.5, (60, 1)))

        def slope(inverse, z=z, labels=labels):
            p = softmax(inverse * z, -1)
            return ((p * z).sum(-1) - z[np.arange(60), labels]).mean()

        best_inverse = brentq(slope, 1e-9, 1e3, xtol=1e-300, rtol=1e-14)
        with jax.enable_x64(True):
            np.testing.assert_allclose(fit(z, labels), 1 / best_inverse, rtol=1e-12)


def test_derivatives_of_the_temperature():
    """The first and the second, in forward and in reverse mode, beside differences of τ itself."""
    with jax.enable_x64(True):
        direction = RNG.normal(size=Z.shape)

        def along(s):
            return xentjax.fit_temperature(Z + s * direction, GUESS)

        first, second, reverse = jit(
            lambda s: (
                jax.jacfwd(along)(s),
                jax.jacfwd(jax.grad(along))(s),
                jax.grad(along)(s),
            )
        )(0.0)
        step = 1e-3
        low, middle, high = (float(fit(Z + s * direction, GUESS)) for s in (-step, 0, step))
        np.testing.assert_allclose(first, (high - low) / (2 * step), rtol=1e-5)
        np.testing.assert_allclose(reverse, first, rtol=1e-12)
        np.testing.assert_allclose(second, (high - 2 * middle + low) / step**2, rtol=1e-4)


def test_temperature_without_a_minimum():
    z = Z.astype(np.float32)
    assert fit(z, z.argmax(-1)) == 0
    assert fit(z, z.argmin(-1)) == np.inf
    assert fit(0 * z, GUESS) == 1
    assert fit(z[:0], GUESS[:0]) == 1
    impossible = np.where(np.arange(6) == (GUESS[:, None] + 1) % 6, -np.inf, z)
    assert np.isfinite(fit(impossible, GUESS))


# Expected calibration error.


def calibration_error(z, labels, num_bins):
    """Guo et al. 2017, equation 3, as a loop."""
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    confidence, correct = p.max(-1), p.argmax(-1) == labels
    total = 0.0
    for b in range(num_bins):
        inside = (confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)
        if inside.any():
            gap = confidence[inside].mean() - correct[inside].mean()
            total += inside.mean() * abs(gap)
    return total


def test_expected_calibration_error_is_that_of_the_loop():
    with jax.enable_x64(True):
        for bins in (1, 7, 15):
            got = xentjax.expected_calibration_error(Z, GUESS, num_bins=bins)
            np.testing.assert_allclose(got, calibration_error(Z, GUESS, bins), rtol=1e-12)
        unsure = Z / 10  # The first of two bins has some of these, and so has the second.
        bins = xentjax.reliability_bins(unsure, GUESS, num_bins=2)
        is_sure = softmax(unsure, -1).max(-1) > 0.5
        np.testing.assert_array_equal(bins.count, [(~is_sure).sum(), is_sure.sum()])
        masked = xentjax.expected_calibration_error(Z, GUESS, where=MASK)
        np.testing.assert_allclose(masked, calibration_error(Z[MASK], GUESS[MASK], 15), rtol=1e-12)
        other = xentjax.expected_calibration_error(Z.T, GUESS, axis=0)
        np.testing.assert_allclose(other, calibration_error(Z, GUESS, 15), rtol=1e-12)
    assert xentjax.expected_calibration_error(Z[:0], GUESS[:0]) == 0


def test_bins_add_over_batches():
    with jax.enable_x64(True):
        parts = [xentjax.reliability_bins(Z[s], GUESS[s]) for s in (slice(0, 13), slice(13, 40))]
        whole = jax.tree.map(jnp.add, *parts)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
            whole,
            xentjax.reliability_bins(Z, GUESS),
        )
        assert whole.count.sum() == 40
        np.testing.assert_allclose(
            whole.expected_calibration_error(), calibration_error(Z, GUESS, 15), rtol=1e-12
        )


def test_a_label_outside_the_classes_is_nan_and_no_other_classs():
    labels = np.where(np.arange(40) == 3, -1, GUESS)
    assert np.isnan(xentjax.expected_calibration_error(Z, labels))
    assert np.isfinite(xentjax.expected_calibration_error(Z, labels, where=labels >= 0))


# Brier score.


@pytest.mark.parametrize("margin", [-60.0, 0.0, 5.0, 30.0])
def test_brier_score_is_exact_however_confident(margin):
    z = np.array([[margin, 0.0, -1.5]], np.float32)
    got = xentjax.brier_score(z, np.array([0]))
    exponentials = [mpmath.exp(mpmath.mpf(float(x))) for x in z[0]]
    p = [e / mpmath.fsum(exponentials) for e in exponentials]
    want = (p[1] + p[2]) ** 2 + p[1] ** 2 + p[2] ** 2
    np.testing.assert_allclose(got, [float(want)], rtol=1e-5)


def test_brier_score_of_targets_of_every_form_and_its_gradient():
    with jax.enable_x64(True):
        forms = dict(target_forms(3, 5))
        z = jnp.asarray(RNG.normal(size=(3, 5)))

        @jit
        def every(z):
            return {
                name: (
                    jax.value_and_grad(lambda z, t=t: xentjax.brier_score(z, t).sum())(z),
                    jax.value_and_grad(lambda z, t=t: plain_brier(z, t))(z),
                )
                for name, t in forms.items()
            }

        def plain_brier(z, t):
            dense = xentjax.dense_targets(t, 5)
            total = dense.sum(-1, keepdims=True)
            return ((total * jax.nn.softmax(z) - dense) ** 2).sum()

        for got, want in every(z).values():
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, want)
