"""The road from surprisal to the loss, as two articles walk it: every number on it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax

NUMBERS = {
    "surprisal of a panda": (lambda base: xentjax.surprisal(0.001, base=base), 6.907755, 9.965784),
    "entropy of the three animals": (
        lambda base: xentjax.entropy(jnp.array([0.2, 0.3, 0.5]), base=base),
        1.029653,
        1.485475,
    ),
    "loss of the prediction of a dog": (
        lambda base: xentjax.cross_entropy(
            jnp.array([0.0, 0.0, 1.0]), jnp.array([0.1, 0.2, 0.7]), base=base
        ),
        0.356675,
        0.514573,
    ),
    "loaded coin, thought to be loaded the other way": (
        lambda base: xentjax.cross_entropy(
            jnp.array([0.99, 0.01]), jnp.array([0.01, 0.99]), base=base
        ),
        4.559220,
        6.577563,
    ),
    "entropy of the loaded coin": (
        lambda base: xentjax.entropy(jnp.array([0.99, 0.01]), base=base),
        0.056002,
        0.080793,
    ),
    "the quiz": (
        lambda base: xentjax.cross_entropy(
            jnp.array([1.0, 0.0, 0.0]), jnp.array([0.7, 0.2, 0.1]), base=base
        ),
        0.356675,
        0.514573,
    ),
    "a true label thought to have probability 0.01": (
        lambda base: xentjax.surprisal(0.01, base=base),
        4.605170,
        6.643856,
    ),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_numbers_of_the_articles(what):
    measure, nats, bits = NUMBERS[what]
    np.testing.assert_allclose(measure(None), nats, rtol=0, atol=1e-6)
    np.testing.assert_allclose(measure(2), bits, rtol=0, atol=1e-6)


def test_articles_chain_by_hand():
    """surprisal → entropy → cross-entropy → loss, each from the one before, in plain Python."""
    truth, guess = [0.2, 0.3, 0.5], [0.1, 0.2, 0.7]
    own, others = ([-math.log(x) for x in xs] for xs in (truth, guess))
    entropy = sum(p * s for p, s in zip(truth, own, strict=True))
    cross_entropy = sum(p * s for p, s in zip(truth, others, strict=True))
    p, q = jnp.array(truth), jnp.array(guess)
    np.testing.assert_allclose(xentjax.surprisal(q), others, rtol=2e-7)
    np.testing.assert_allclose(xentjax.entropy(p), entropy, rtol=2e-7)
    np.testing.assert_allclose(xentjax.cross_entropy(p, q), cross_entropy, rtol=2e-7)
    np.testing.assert_allclose(xentjax.kl_divergence(p, q), cross_entropy - entropy, rtol=2e-6)
    loss = xentjax.softmax_cross_entropy(jnp.log(q), jnp.array(2))
    np.testing.assert_allclose(loss, others[2], rtol=4e-7)
    np.testing.assert_allclose(xentjax.cross_entropy(jnp.eye(3)[2], q), others[2], rtol=4e-7)
    gradient = jax.grad(xentjax.softmax_cross_entropy)(jnp.log(q), jnp.array(2))
    np.testing.assert_allclose(gradient, [0.1, 0.2, 0.7 - 1], rtol=1e-6)  # softmax(a) − b


def test_formula_and_derivative_of_the_article():
    """CE = −(1/m) Σ y log p + (1 − y) log(1 − p), p = 1 / (1 + e^−z), and dCE/dz = (p − y) / m."""
    y, z = [1, 0, 1, 1, 0], [2.0, -1.0, 0.3, -0.7, 1.5]
    p = [1 / (1 + math.exp(-x)) for x in z]
    pairs = list(zip(y, p, strict=True))
    want = -sum(a * math.log(q) + (1 - a) * math.log(1 - q) for a, q in pairs) / len(y)

    def mean_loss(loss):
        return lambda x: xentjax.weighted_mean(loss(x, jnp.array(y)))

    of_p = mean_loss(xentjax.binary_cross_entropy)(jnp.array(p))
    of_z, gradient = jax.value_and_grad(mean_loss(xentjax.sigmoid_binary_cross_entropy))(
        jnp.array(z)
    )
    np.testing.assert_allclose([of_p, of_z], want, rtol=1e-6)
    np.testing.assert_allclose(gradient, [(q - a) / len(y) for a, q in pairs], rtol=1e-6)


def test_articles_binary_losses():
    """Two classes, cat or not: the loss of p₀ = 1 predicted as q₀, and log(0.01) as its example."""
    losses = xentjax.binary_cross_entropy(jnp.array([0.01, 0.99, 1.0]), jnp.array([1, 1, 1]))
    np.testing.assert_allclose(losses, [4.605170, 0.010050, 0], atol=1e-6)
    # Multi-label: the binary losses of its categories, added.
    z = jnp.array([math.log(9), -math.log(4), 0.0])  # p = 0.9, 0.2 and 0.5
    total = xentjax.multilabel_cross_entropy(z, jnp.array([1, 0, 1]))
    np.testing.assert_allclose(total, -math.log(0.9) - math.log(0.8) - math.log(0.5), rtol=1e-6)
