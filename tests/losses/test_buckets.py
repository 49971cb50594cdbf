"""Some classes and all others as one outcome: a divergence that is true, and its digits."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from cases import assert_modes_agree, jit

import xentjax

RNG = np.random.default_rng(0)
N, K, CLASSES = 4, 3, 9
LOGITS = 3 * RNG.standard_normal((N, CLASSES))
INDICES = np.stack([RNG.permutation(CLASSES)[:K] for _ in range(N)])


LOGITS32 = LOGITS[:2, :3].astype(np.float32)


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
    z, every = jnp.asarray(LOGITS32), np.array([[2, 0, 1], [2, 0, 3]])
    buckets = jit(xentjax.bucket_logits)
    np.testing.assert_array_equal(buckets(z, every)[0], [*LOGITS32[0, every[0]], -np.inf])
    assert np.isnan(buckets(z, every)[1]).all()
    assert np.isnan(buckets(z, every - 1)[0]).all()


def test_one_other_class_alone_has_its_own_logit():
    z = np.float32([[1.0, -2.0, 0.5], [3.0, 0.0, -40.0]])
    got = xentjax.bucket_logits(z, np.array([[0, 2], [1, 0]]))
    np.testing.assert_array_equal(got, [[1.0, 0.5, -2.0], [0.0, 3.0, -40.0]])


def test_the_tail_of_a_confident_student_keeps_its_digits():
    """1 − Σ q is 0 in float32, and its logarithm −∞."""
    z, indices = np.array([[50.0, 49.0, 2.0, 1.0, 0.0]], np.float32), np.array([[0, 1]])
    e = [mpmath.exp(x) for x in (50, 49, 2, 1, 0)]
    surprisals = [-mpmath.log(x / mpmath.fsum(e)) for x in (*e[:2], mpmath.fsum(e[2:]))]
    buckets = jnp.stack([xentjax.bucket_logits(z, indices)[0]] * 3)
    got = xentjax.softmax_cross_entropy(buckets, np.arange(3))
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


# From the layer before the logits.

TOKENS, FEATURES, VOCABULARY = 5, 3, 300
HEAD_INDICES = np.stack([RNG.permutation(VOCABULARY)[:K] for _ in range(TOKENS)])
INPUTS, KERNEL, BIAS = (
    RNG.standard_normal(s) for s in ((TOKENS, FEATURES), (FEATURES, VOCABULARY), (VOCABULARY,))
)


@pytest.mark.parametrize("memory_budget", [None, 0])
def test_buckets_of_the_head_are_those_of_its_logits(memory_budget):
    """With a bias, a class mask, a temperature that is differentiated, and a tied embedding."""
    keep = np.arange(VOCABULARY) % 7 > 0
    indices = np.where(keep[HEAD_INDICES], HEAD_INDICES, HEAD_INDICES - 1) % VOCABULARY
    weights = RNG.standard_normal((TOKENS, K + 1))

    def fused(inputs, kernel, bias, tau):
        transform = xentjax.temperature(tau)
        options = {"bias": bias, "class_mask": keep, "memory_budget": memory_budget}
        return xentjax.linear_bucket_logits(
            inputs, kernel, indices, class_axis=0, logit_transform=transform, **options
        )

    def full(inputs, kernel, bias, tau):
        logits = jnp.where(keep, (inputs @ kernel.T + bias) / tau, -jnp.inf)
        return plain(logits, indices)

    with jax.enable_x64(True):
        args = tuple(map(jnp.asarray, (INPUTS, KERNEL.T, BIAS, np.float64(1.5))))
        got, want = (
            jit(jax.value_and_grad(lambda *a, f=f: (weights * f(*a)).sum(), (0, 1, 2, 3)))(*args)
            for f in (fused, full)
        )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13), got, want)


def test_buckets_of_the_head_in_every_mode():
    with jax.enable_x64(True):
        weights = jnp.asarray(RNG.standard_normal((TOKENS, K + 1)))
        kernel = jnp.asarray(KERNEL)

        def fused(inputs):
            buckets = xentjax.linear_bucket_logits(inputs, kernel, HEAD_INDICES, memory_budget=0)
            return (weights * buckets).sum()

        assert_modes_agree(
            ("hessian",),
            fused,
            lambda inputs: (weights * plain(inputs @ kernel, HEAD_INDICES)).sum(),
            (jnp.asarray(INPUTS),),
        )


@pytest.mark.parametrize(("memory_budget", "limit"), [(None, 700), (0, 40)])
def test_buckets_of_a_large_vocabulary_need_no_array_of_all_logits(memory_budget, limit):
    """Logits are 8000 MiB here; with gradients to inputs and kernel."""
    tokens, features, classes, mib = 8192, 2304, 256000, 2**20

    def loss(inputs, kernel, indices):
        return xentjax.linear_bucket_logits(
            inputs, kernel, indices, memory_budget=memory_budget
        ).sum()

    shapes = (tokens, features), (features, classes)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    indices = jax.ShapeDtypeStruct((tokens, 16), jnp.int32)
    compiled = jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays, indices).compile()
    assert compiled.memory_analysis().temp_size_in_bytes / mib <= limit


def test_classes_that_the_head_has_not():
    indices = np.array([[0, 1], [0, VOCABULARY], [-1, 2]])
    buckets = jit(xentjax.linear_bucket_logits)(INPUTS[:3], KERNEL, indices)
    np.testing.assert_array_equal(np.isnan(buckets).all(-1), [False, True, True])
    assert np.isfinite(buckets[0]).all()
