"""The Hessian's product in closed form: against jvp of grad, 50 digits, and in an optimiser."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from cases import jit, target_forms

import xentjax

MP = mpmath.mp.clone()
MP.dps = 50


def hessian_vector_product(z, t, v, **options):
    def total(z):
        return xentjax.softmax_cross_entropy(z, t, **options).sum()

    return jax.jvp(jax.grad(total), (z,), (v,))[1]


def test_it_is_jvp_of_grad_for_targets_of_every_form():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        forms = dict(target_forms(3, 5))
        z, v = jnp.asarray(rng.normal(size=(2, 3, 5)))
        keep = rng.random((3, 5)) < 0.7
        keep[0], keep[1] = False, True

        @jit
        def every(z, v):
            pairs = [
                (xentjax.softmax_hessian_product(z, t, v), hessian_vector_product(z, t, v))
                for t in forms.values()
            ]
            masks = [{"where": keep[:, 1]}, {"where": keep}]
            labels = forms["labels"]
            return pairs + [
                (
                    xentjax.softmax_hessian_product(z, labels, v, **mask),
                    hessian_vector_product(z, labels, v, **mask),
                )
                for mask in masks
            ]

        for got, want in every(z, v):
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)
        labels = forms["labels"]
        moved = xentjax.softmax_hessian_product(z.T, labels, v.T, axis=0).T
        want = xentjax.softmax_hessian_product(z, labels, v)
        np.testing.assert_allclose(moved, want, rtol=1e-12, atol=1e-14)


def test_it_is_exact_however_confident():
    """p − p² is not 0 where p is 1 as a float32."""
    z = np.array([[30, 0, -1], [-2, 60, 1], [1, 2, 2.5]], np.float32)
    v = np.array([[1, 2, 3], [0.3, -1, 0], [1, 1, 1]], np.float32)
    got = xentjax.softmax_hessian_product(z, np.array([0, 0, 1]), v)
    assert got.dtype == jnp.float32
    for row in range(len(z)):
        a, b = ([MP.mpf(float(x)) for x in rows[row]] for rows in (z, v))
        exponentials = [MP.exp(x) for x in a]
        p = [e / MP.fsum(exponentials) for e in exponentials]
        mean = MP.fsum(x * y for x, y in zip(p, b, strict=True))
        want = np.array([float(x * (y - mean)) for x, y in zip(p, b, strict=True)])
        np.testing.assert_allclose(got[row], want, rtol=1e-5, atol=1e-6 * (row == 2))


def test_low_precision_has_the_dtype_of_a_gradient():
    z = jnp.linspace(-3, 3, 8, dtype=jnp.bfloat16).reshape(2, 4)
    got = xentjax.softmax_hessian_product(z, jnp.array([0, 1]), z)
    assert got.dtype == jnp.bfloat16
    wide = z.astype(jnp.float32)
    want = xentjax.softmax_hessian_product(wide, jnp.array([0, 1]), wide)
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8)


def test_gauss_newton_trains_in_a_few_steps():
    """Jᵀ · H · J · v in three lines: four steps reach what 100 steps of the gradient do not."""
    rng = np.random.default_rng(1)
    x, labels = jnp.asarray(rng.normal(size=(60, 5)), jnp.float32), rng.integers(0, 3, 60)

    def model(params):
        return x @ params["kernel"] + params["bias"]

    def loss(params):
        return xentjax.softmax_cross_entropy(model(params), labels).mean()

    def gauss_newton_product(params, v):
        logits, push = jax.linearize(model, params)
        of_logits = xentjax.softmax_hessian_product(logits, labels, push(v)) / len(labels)
        (product,) = jax.linear_transpose(push, params)(of_logits)
        return jax.tree.map(lambda a, b: a + 1e-4 * b, product, v)

    @jit
    def step(params):
        gradient = jax.grad(loss)(params)
        descent, _ = jax.scipy.sparse.linalg.cg(
            lambda v: gauss_newton_product(params, v), gradient, maxiter=18
        )
        return jax.tree.map(jnp.subtract, params, descent)

    @jit
    def plain(params):
        def body(_, params):
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

        return jax.lax.fori_loop(0, 100, body, params)

    start = {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros((1, 3))}
    params = start
    for _ in range(4):
        params = step(params)
    assert loss(params) < loss(plain(start)) < loss(start)
