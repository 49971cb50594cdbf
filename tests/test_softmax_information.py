"""Surprisal, entropy and divergence of logits: against mpmath, and the forms of probabilities."""

import functools
import math

import jax
import mpmath
import numpy as np
import pytest

import xentjax

MP = mpmath.mp.clone()
MP.dps = 50


def exact(x):
    return MP.mpf(float(x))


def test_logit_forms_agree_with_probability_forms():
    with jax.enable_x64(True):
        rng = np.random.default_rng(13)
        a, b = 3 * rng.standard_normal((2, 12, 7))
        p, q = jax.nn.softmax(a), jax.nn.softmax(b)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15)
        close(xentjax.softmax_surprisal(a), xentjax.surprisal(p))
        close(xentjax.softmax_entropy(a), xentjax.entropy(p))
        got, want = xentjax.softmax_kl_divergence(a, b), xentjax.kl_divergence(p, q)
        close(got, want)
        close(xentjax.softmax_cross_entropy(a, q), xentjax.cross_entropy(q, p))

        def through_softmax(measure):
            return lambda *logits: measure(*map(jax.nn.softmax, logits)).sum()

        got = jax.grad(lambda z: xentjax.softmax_entropy(z).sum())(a)
        close(got, jax.grad(through_softmax(xentjax.entropy))(a))
        got = jax.grad(lambda *z: xentjax.softmax_kl_divergence(*z).sum(), (0, 1))(a, b)
        want = jax.grad(through_softmax(xentjax.kl_divergence), (0, 1))(a, b)
        close(got, want)


def mp_surprisals(z):
    z = [exact(x) for x in z]
    normalizer = MP.log(MP.fsum(map(MP.exp, z)))
    return [normalizer - x for x in z]


@pytest.mark.parametrize("margin", [-80.0, -20.0, -1.0, 0.0, 0.5, 10.0, 17.0, 30.0, 80.0])
def test_logit_forms_are_exact_when_confident(margin):
    a = np.array([[margin, 0.0, -1.5], [2.0, 2.0 - margin, 2.0]], np.float32)
    b = np.array([[0.3, -0.2, margin], [margin, 1.0, 0.0]], np.float32)
    surprisals, entropies = xentjax.softmax_surprisal(a), xentjax.softmax_entropy(a)
    divergences = xentjax.softmax_kl_divergence(a, b)
    for i in range(len(a)):
        s, r = mp_surprisals(a[i]), mp_surprisals(b[i])
        np.testing.assert_allclose(surprisals[i], np.array(s, float), rtol=1e-6)
        p = [MP.exp(-x) for x in s]
        entropy = MP.fsum(x * y for x, y in zip(p, s, strict=True))
        np.testing.assert_allclose(entropies[i], float(entropy), rtol=1e-6)
        terms = [x * (v - u) for x, u, v in zip(p, s, r, strict=True)]
        size = MP.fsum(x * (u + v) for x, u, v in zip(p, s, r, strict=True))
        assert abs(exact(divergences[i]) - MP.fsum(terms)) <= 1e-6 * size


def test_impossible_classes_of_logits():
    inf = np.inf
    a = np.array([[0.0, 0.0, -inf], [0.0, -inf, -inf]], np.float32)
    b = np.array([[0.0, 1.0, 2.0], [0.0, 0.0, -inf]], np.float32)
    np.testing.assert_allclose(xentjax.softmax_entropy(a), [math.log(2), 0], rtol=1e-7)
    np.testing.assert_allclose(
        xentjax.softmax_surprisal(a), [[math.log(2)] * 2 + [inf], [0, inf, inf]], rtol=1e-7
    )
    normalizer = math.log(1 + math.e + math.e**2)
    want = [normalizer - 0.5 - math.log(2), math.log(2)]
    np.testing.assert_allclose(xentjax.softmax_kl_divergence(a, b), want, rtol=1e-6)
    np.testing.assert_array_equal(xentjax.softmax_kl_divergence(b, a), [inf, inf])
    to_a, to_b = jax.grad(lambda *z: xentjax.softmax_kl_divergence(*z).sum(), (0, 1))(a, b)
    np.testing.assert_allclose(to_b, jax.nn.softmax(b) - jax.nn.softmax(a), rtol=1e-6, atol=1e-7)
    # p_v · ((s_q − s_p)_v − KL), by hand for the first row.
    np.testing.assert_allclose(to_a, [[0.25, -0.25, 0], [0, 0, 0]], atol=1e-6)
    assert np.isfinite(jax.grad(lambda z: xentjax.softmax_entropy(z).sum())(a)).all()
