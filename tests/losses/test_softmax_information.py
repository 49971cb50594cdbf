"""Surprisal, entropy and divergence of logits: against mpmath, and the forms of probabilities."""

import functools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import xentjax

MP = mpmath.mp.clone()
MP.dps = 50


def exact(x):
    return MP.mpf(float(x))


def of_logits(a, b):
    return {
        "surprisal": xentjax.softmax_surprisal(a),
        "entropy": xentjax.softmax_entropy(a),
        "divergence": xentjax.softmax_kl_divergence(a, b),
        "cross-entropy": xentjax.softmax_cross_entropy(a, jax.nn.softmax(b)),
    }


def of_probabilities(a, b):
    p, q = jax.nn.softmax(a), jax.nn.softmax(b)
    return {
        "surprisal": xentjax.surprisal(p),
        "entropy": xentjax.entropy(p),
        "divergence": xentjax.kl_divergence(p, q),
        "cross-entropy": xentjax.cross_entropy(q, p),
    }


def test_logit_forms_agree_with_probability_forms():
    """Values, and gradients to both arguments, in float64."""
    logits = 3 * np.random.default_rng(13).standard_normal((2, 12, 7))
    weights = np.arange(7.0)  # So that the surprisals' gradient is not that of their sum.

    def of_both(measured):
        def summed(a, b):
            values = measured(a, b)
            return {k: jnp.sum(weights * v if v.ndim == 2 else v) for k, v in values.items()}

        def values_and_gradients(a, b):
            return measured(a, b), jax.jacrev(summed, (0, 1))(a, b)

        return jax.jit(values_and_gradients)

    with jax.enable_x64(True):
        got, want = (of_both(f)(*logits) for f in (of_logits, of_probabilities))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), got, want)


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
