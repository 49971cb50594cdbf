"""Entropy of targets of every form, and the divergence of a prediction from them."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from cases import jit, target_forms

import xentjax

MP = mpmath.mp.clone()
MP.dps = 50
BATCH, CLASSES = 4, 6


def entropies(dense):
    logs = np.log(np.where(dense == 0, 1, dense))
    return -(dense * logs).sum(-1)


def test_entropy_and_divergence_of_targets_of_every_form():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, CLASSES)))
    with jax.enable_x64(True):
        forms = dict(target_forms(BATCH, CLASSES))
        z = z.astype(jnp.float64)

        @jit
        def every(z):
            def of(t):
                def divergence(z):
                    losses = xentjax.target_kl_divergence(z, t)
                    return losses.sum(), losses

                gradient, losses = jax.grad(divergence, has_aux=True)(z)
                plain = jax.value_and_grad(lambda z: xentjax.softmax_cross_entropy(z, t).sum())
                return xentjax.target_entropy(t, CLASSES), losses, gradient, plain(z)

            return {name: of(t) for name, t in forms.items()}

        for name, (entropy, losses, gradient, (total, wanted)) in every(z).items():
            want = entropies(np.asarray(xentjax.dense_targets(forms[name], CLASSES)))
            np.testing.assert_allclose(entropy, want, rtol=1e-12, atol=1e-14, err_msg=name)
            np.testing.assert_allclose(losses.sum(), total - want.sum(), rtol=1e-12, err_msg=name)
            np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-13, err_msg=name)


def test_entropy_of_labels_repeated_classes_and_other_axes():
    labels = jnp.array([0, 5, 2])
    np.testing.assert_array_equal(xentjax.target_entropy(labels, CLASSES), np.zeros(3))
    assert np.isnan(xentjax.target_entropy(jnp.array([7]), CLASSES)).all()
    repeated = xentjax.SparseTargets(
        jnp.array([[2, 0, 2, 2]]), jnp.array([[0.25, 0.5, 0.125, 0.125]])
    )
    np.testing.assert_allclose(xentjax.target_entropy(repeated, 3, base=2), [1.0], rtol=1e-6)
    dense = jax.nn.softmax(jnp.arange(12.0).reshape(3, 4) % 5, axis=0)
    got = xentjax.target_entropy(dense, 3, axis=0)
    np.testing.assert_allclose(got, entropies(np.asarray(dense).T), rtol=1e-6)


def test_entropy_of_smoothed_labels_makes_no_array_of_all_classes():
    def entropy(labels):
        return xentjax.target_entropy(xentjax.smooth_labels(labels, 0.1), 100_000)

    labels = jax.ShapeDtypeStruct((512,), jnp.int32)
    memory = jax.jit(entropy).lower(labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 512 * 100_000 / 100


@pytest.mark.parametrize("difference", [0.0, 1e-6, 1e-3, 1.0, 30.0])
def test_divergence_is_exact_however_near_the_prediction_is(difference):
    """Relative to its value beside the error of T = 1, which float32 targets have as they are."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        t = rng.dirichlet(np.full(7, 0.5), 5)
        t[0, :3] = 0
        t /= t.sum(-1, keepdims=True)
        z = np.log(np.where(t == 0, 1e-9, t)) + difference * rng.normal(size=t.shape)
        got = xentjax.target_kl_divergence(z, t)
    for i in range(len(t)):
        z_i, t_i = ([MP.mpf(float(x)) for x in row[i]] for row in (z, t))
        lse = MP.log(MP.fsum(map(MP.exp, z_i)))
        terms = [a * (MP.log(a) + lse - b) for a, b in zip(t_i, z_i, strict=True) if a]
        want = MP.fsum(terms)
        tolerance = MP.mpf(2e-14) * abs(want) + MP.mpf(4e-16)
        assert abs(MP.mpf(float(got[i])) - want) <= tolerance
    if difference == 0.0:
        assert (np.abs(got) < 2e-8).all()


def test_impossible_classes():
    z = jnp.array([[0.0, -jnp.inf, 1.0]] * 2)
    t = jnp.array([[0.5, 0.0, 0.5], [0.5, 0.25, 0.25]])
    losses, gradient = jax.vmap(jax.value_and_grad(xentjax.target_kl_divergence))(z, t)
    want = xentjax.softmax_cross_entropy(z[:1], t[:1]) - xentjax.target_entropy(t[:1], 3)
    np.testing.assert_allclose(losses, [want[0], np.inf], rtol=1e-5)
    np.testing.assert_allclose(gradient[0], jax.nn.softmax(z[0]) - t[0], atol=1e-6)


def test_slope_to_a_mass_of_0_is_its_surprisal():
    z, t = (
        np.array([[0.3, -1.0, 2.0], [1.0, 0.5, 0.0]]),
        np.array([[0.0, 0.4, 0.6], [0.5, 0.0, 0.0]]),
    )
    with jax.enable_x64(True):
        slopes = jax.grad(lambda t: xentjax.target_kl_divergence(z, t).sum())(jnp.asarray(t))
    surprisals = -np.log(np.exp(z) / np.exp(z).sum(-1, keepdims=True))
    want = surprisals + np.where(t > 0, np.log(np.where(t > 0, t, 1)) + 1, 0)
    np.testing.assert_allclose(slopes, want, rtol=1e-12)


def test_derivatives_to_logits_and_targets_in_a_loop():
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        z, t = jnp.asarray(rng.normal(size=(3, 4))), jnp.asarray(rng.dirichlet(np.ones(4), 3))

        def plain(z, t):
            return (t * (jnp.log(t) - jax.nn.log_softmax(z))).sum()

        def looped(z, t):
            return jax.lax.map(lambda x: xentjax.target_kl_divergence(*x), (z, t)).sum()

        @jit
        def every(z, t):
            modes = jax.jacrev, jax.hessian, lambda f, n: jax.jacfwd(jax.jacfwd(f, n), n)
            return [[mode(f, (0, 1))(z, t) for mode in modes] for f in (looped, plain)]

        got, want = every(z, t)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, want)
