"""Every differentiation mode of every loss with a rule of its own, against plain autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    MODES,
    assert_modes_agree,
    floating_leaves,
    jit,
    plain_softmax_cross_entropy,
    target_forms,
)

import xentjax
from xentjax._jax.custom_vjp import custom_vjp

BATCH, CLASSES = 3, 5


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _logits(seed=0):
    z = np.random.default_rng(seed).normal(size=(BATCH, CLASSES)) * 2
    z[0, 1] = 9.0  # One confident row: the branch in which p > 1/2.
    z[1, 0] = z[1, 1] = z[1].max()  # One row with two largest logits.
    return jnp.asarray(z)


def _with_z_loss(logits, targets):
    losses, stats = xentjax.softmax_cross_entropy_with_stats(logits, targets)
    return losses + 0.1 * stats.log_normalizer**2


def _plain_with_z_loss(logits, targets):
    z_loss = jax.nn.logsumexp(logits, axis=-1) ** 2
    return plain_softmax_cross_entropy(logits, targets) + 0.1 * z_loss


def _entropy(logits, targets):
    del targets
    return xentjax.softmax_entropy(logits)


def _plain_entropy(logits, targets):
    del targets
    return -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1)


def _plain_sigmoid(logits, targets):
    return -jnp.sum(
        targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits), axis=-1
    )


LOSSES = {
    "softmax": (xentjax.softmax_cross_entropy, plain_softmax_cross_entropy, "labels"),
    "z-loss": (_with_z_loss, _plain_with_z_loss, "all"),
    "entropy": (_entropy, _plain_entropy, "labels"),
    "sigmoid": (xentjax.multilabel_cross_entropy, _plain_sigmoid, "dense"),
}

FORMS = [
    (loss, form)
    for loss, (_, _, forms) in LOSSES.items()
    for form in target_forms(BATCH, CLASSES)
    if forms in ("all", form)
]


@pytest.mark.parametrize(("loss", "form"), FORMS)
def test_every_mode_to_every_float_argument(loss, form):
    ours, plain, _ = LOSSES[loss]
    floats, rebuild = floating_leaves(target_forms(BATCH, CLASSES)[form])
    args = (_logits(), *floats)

    def scalar(function):
        return lambda z, *floats: jnp.sum(function(z, rebuild(floats)) ** 2)

    assert_modes_agree(MODES, scalar(ours), scalar(plain), args)


@pytest.mark.parametrize("form", ["labels", "dense"])
def test_vmap_of_every_mode_is_the_loop(form):
    targets = target_forms(BATCH, CLASSES)[form]
    logits = jnp.stack([_logits(0), _logits(1)])
    tangents = jnp.ones_like(logits)

    def loss(z):
        return jnp.sum(xentjax.softmax_cross_entropy(z, targets))

    def every_mode(z, tangent):
        return {name: mode(loss, (z,), (tangent,)) for name, mode in MODES.items()}

    mapped = jit(jax.vmap(every_mode))(logits, tangents)
    one_by_one = jit(every_mode)
    for i in range(2):
        one = one_by_one(logits[i], tangents[i])
        jax.tree.map(
            lambda a, d, i=i: np.testing.assert_allclose(a[i], d, rtol=1e-12, atol=1e-12),
            mapped,
            one,
        )


def test_residuals_are_what_fwd_returns():
    def fwd(live, x, y):
        del live
        return jnp.sum(x) * y, (x, y)

    def bwd(live, residuals, cotangent):
        x, y = residuals
        return (
            jnp.broadcast_to(cotangent * y, x.shape) if live[0] else None,
            cotangent * jnp.sum(x) if live[1] else None,
        )

    f = custom_vjp(lambda *args: fwd(None, *args)[0], fwd, bwd)
    x, y = jnp.arange(1000.0), jnp.asarray(2.0)
    pullback = jax.vjp(f, x, y)[1]
    assert sorted(leaf.size for leaf in jax.tree.leaves(pullback)) == [1, 1000]
    np.testing.assert_array_equal(pullback(1.0)[0], jnp.full(1000, 2.0))
    assert pullback(1.0)[1] == x.sum()


def test_live_names_what_is_differentiated():
    seen = []

    def fwd(live, x, tree):
        seen.append(live)
        return x * tree["a"] * tree["b"], (x, tree)

    def bwd(live, residuals, cotangent):
        x, tree = residuals
        a, b = tree["a"], tree["b"]
        return cotangent * a * b, {"a": cotangent * x * b, "b": cotangent * x * a, "n": None}

    f = custom_vjp(lambda *args: fwd(None, *args)[0], fwd, bwd)
    tree = {"a": 2.0, "b": 3.0, "n": jnp.arange(4)}
    assert jax.grad(lambda b: f(5.0, {**tree, "b": b}))(3.0) == 10.0
    assert seen[-1] == (False, {"a": False, "b": True, "n": False})
    assert jax.grad(f)(5.0, tree) == 6.0
    assert seen[-1] == (True, {"a": False, "b": False, "n": False})
