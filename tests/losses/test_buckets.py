"""Some classes and all others as one outcome: a divergence that is true, and its digits."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from cases import assert_modes_agree, jit

import xentjax

RNG = np.random.default_rng(0)
N, K, CLASSES = 4, 3, 9
LOGITS = 3 * RNG.standard_normal((N, CLASSES))
INDICES = np.stack([RNG.permutation(CLASSES)[:K] for _ in range(N)])


def plain(logits, indices=INDICES):
    picked = jnp.take_along_axis(logits, indices, axis=-1)
    is_other = (indices[..., None] != np.arange(logits.shape[-1])).all(-2)
    return jnp.concatenate(
        [picked, jax.nn.logsumexp(jnp.where(is_other, logits, -jnp.inf), axis=-1, keepdims=True)],
        axis=-1,
    )


def test_buckets_of_logits_in_every_mode():
    with jax.enable_x64(True):
        weights = jnp.asarray(RNG.standard_normal((N, K + 1)))
        assert_modes_agree(
            ("value", "grad", "jvp", "hessian"),
            lambda z: (weights * xentjax.bucket_logits(z, INDICES)).sum(),
            lambda z: (weights * plain(z)).sum(),
            (jnp.asarray(LOGITS),),
        )


def test_all_classes_and_classes_that_are_none():
    z, every = jnp.asarray(LOGITS[:2, :3]), np.array([[2, 0, 1], [2, 0, 3]])
    buckets = np.asarray(xentjax.bucket_logits(z, every))
    np.testing.assert_array_equal(buckets[0], [*z[0, every[0]], -np.inf])
    assert np.isnan(buckets[1]).all()
    assert np.isnan(xentjax.bucket_logits(z, np.array([[-1], [0]]))[0]).all()


def test_the_tail_of_a_confident_student_keeps_its_digits():
    """1 − Σ q is 0 in float32, and its logarithm −∞."""
    z, indices = np.array([[50.0, 49.0, 2.0, 1.0, 0.0]], np.float32), np.array([[0, 1]])
    e = [mpmath.exp(x) for x in (50, 49, 2, 1, 0)]
    surprisals = [-mpmath.log(x / mpmath.fsum(e)) for x in (*e[:2], mpmath.fsum(e[2:]))]
    buckets = xentjax.bucket_logits(z, indices)
    got = [xentjax.softmax_cross_entropy(buckets, np.array([j]))[0] for j in range(3)]
    np.testing.assert_allclose(got, np.array(surprisals, float), rtol=1e-6)


def test_the_divergence_is_never_negative_and_0_at_equality():
    """It is at most that of all classes; a sum over the K classes alone is often negative."""
    teacher = 3 * RNG.standard_normal((500, CLASSES)).astype(np.float32)
    student = teacher + RNG.standard_normal((500, CLASSES)).astype(np.float32)
    student[250:] = teacher[250:] * np.float32(1 + 2**-20)
    indices = np.argsort(-teacher, axis=-1)[:, :K]

    @jit
    def divergences(p_logits, q_logits):
        buckets = (xentjax.bucket_logits(z, indices) for z in (p_logits, q_logits))
        logs = [
            jnp.take_along_axis(jax.nn.log_softmax(z), indices, axis=-1)
            for z in (p_logits, q_logits)
        ]
        dropped = (jnp.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
        return (
            xentjax.softmax_kl_divergence(*buckets),
            xentjax.softmax_kl_divergence(p_logits, q_logits),
            dropped,
        )

    of_buckets, whole, dropped = divergences(teacher, student)
    assert (of_buckets >= 0).all()
    assert (of_buckets <= whole * (1 + 1e-5) + 1e-12).all()
    assert (dropped < 0).sum() > 50
    np.testing.assert_array_equal(divergences(teacher, teacher)[0], 0)
