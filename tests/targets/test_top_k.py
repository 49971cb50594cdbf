"""A teacher's largest probabilities: what they weigh, and what is left for the tail."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from cases import jit, plain_softmax_cross_entropy

import xentjax

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.standard_normal((2, 3, 9))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dense(targets):
    return np.asarray(xentjax.dense_targets(targets, LOGITS.shape[-1]), np.float64)


@jit
def of_logits(z, tau):
    return {
        (k, tail): xentjax.top_k_targets(z, k, temperature=tau, tail=tail)
        for k, tail in [(1, "drop"), (4, "background"), (9, "drop")]
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-14), ("bfloat16", 1e-6)])
def test_masses_of_a_teachers_logits(dtype, tolerance):
    with jax.enable_x64(True):
        z = jnp.asarray(LOGITS, dtype)
        p = softmax(np.asarray(z, np.float64) / 2)
        for (k, tail), targets in of_logits(z, 2.0).items():
            assert targets.weights.dtype == ("float64" if dtype == "float64" else "float32")
            assert targets.num_classes == 9
            best = -np.sort(-p, axis=-1)[..., :k]
            kept = np.where(p >= best[..., -1:], p, 0)
            rest = 1 - kept.sum(-1, keepdims=True)
            want = kept / kept.sum(-1, keepdims=True) if tail == "drop" else kept + rest / 9
            np.testing.assert_allclose(dense(targets), want, rtol=0, atol=tolerance)
            assert (np.diff(targets.weights) <= 0).all()


def test_a_small_tail_keeps_its_digits():
    """1 − Σ p has none of them in float32."""
    z = jnp.array([40.0, 39.0, 3.0, 1.0])
    targets = xentjax.top_k_targets(z, 2, tail="background")
    e = [mpmath.exp(x) for x in (40, 39, 3, 1)]
    want = float((e[2] + e[3]) / mpmath.fsum(e))
    assert want < 1e-16
    np.testing.assert_allclose(targets.background_mass, want, rtol=4e-6)


@jit
def of_stored(indices, logs):
    return [xentjax.teacher_targets(indices, logs, tail=tail) for tail in ("drop", "background")]


def test_masses_that_were_stored():
    indices = np.array([[1, 4, 0], [2, 3, 8], [5, 6, 7], [0, 1, 2]])
    p = np.array([[0.5, 0.25, 0.125], [0.9, 0.05, 0], [0.5, 0.3, 0.2 + 1e-3], [0, 0, 0]])
    with np.errstate(divide="ignore"):
        dropped, spread = of_stored(indices, np.log(p).astype(np.float32))
    total = np.array([0.875, 0.95, 1.001, 1])[:, None]
    np.testing.assert_allclose(dropped.weights, p / total, rtol=1e-6)
    np.testing.assert_allclose(spread.background_mass, [0.125, 0.05, 0, 1], rtol=4e-6)
    np.testing.assert_allclose(np.delete(spread.weights, 2, 0), np.delete(p, 2, 0), rtol=1e-6)
    np.testing.assert_allclose(dense(spread).sum(-1), 1, rtol=1e-6)
    # A row without any probability has no loss.
    losses = xentjax.softmax_cross_entropy(np.zeros((4, 9), np.float32), dropped)
    assert losses[3] == 0


def test_stored_at_a_temperature_is_that_of_the_logits():
    z = LOGITS[0].astype(np.float32)
    largest, indices = jax.lax.top_k(jax.nn.log_softmax(jnp.asarray(z)), 3)
    stored = xentjax.teacher_targets(indices, largest / 2)
    np.testing.assert_allclose(
        stored.weights, xentjax.top_k_targets(z, 3, temperature=2.0).weights, rtol=4e-6
    )


def test_losses_of_logits_and_of_the_head_are_those_of_dense_masses():
    with jax.enable_x64(True):
        student, kernel = jnp.asarray(RNG.standard_normal((3, 4))), RNG.standard_normal((4, 9))
        teacher = jnp.asarray(LOGITS[0])

        def losses(student, teacher):
            targets = xentjax.top_k_targets(teacher, 3, temperature=2.0, tail="background")
            head = xentjax.linear_softmax_cross_entropy(student, kernel, targets, reduction="sum")
            logits = student @ kernel
            both = head, xentjax.softmax_cross_entropy(logits, targets).sum()
            values = jnp.stack([*both, plain_softmax_cross_entropy(logits, targets).sum()])
            return values @ jnp.asarray([1.0, 2.0, -3.0]), values

        # To the student, and to a teacher that is trained too.
        difference = jit(jax.value_and_grad(losses, (0, 1), has_aux=True))
        (_, values), slopes = difference(student, teacher)
        np.testing.assert_allclose(values, values[2], rtol=1e-13)
        for slope in slopes:
            np.testing.assert_allclose(slope, 0, rtol=0, atol=1e-12)
