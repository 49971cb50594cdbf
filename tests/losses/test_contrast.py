"""Contrast: the formulas written out in float64, optax's loss, one device and many, and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_modes_agree, jit
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import EXPLICIT, make_mesh

import xentjax

N, FEATURES, TAU = 12, 5, 0.3
RNG = np.random.default_rng(0)
LABELS = np.array([0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4])  # One has no partner.
KEEP = np.arange(N) != 3
ALL = np.ones(N, bool)


def unit_rows(*shape):
    x = RNG.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


X, KEYS, MORE_KEYS = unit_rows(N, FEATURES), unit_rows(N, FEATURES), unit_rows(7, FEATURES)


# The formulas, with all similarities in memory, for NumPy and JAX alike.


def log_sum_exp(xp, s, keep):
    return xp.log(xp.sum(xp.where(keep, xp.exp(s), 0.0), axis=-1))


def plain_info_nce(xp, queries, keys, tau, keep=ALL):
    s = queries @ keys.T / tau
    columns = np.concatenate([keep, np.ones(len(keys) - len(keep), bool)])
    own = xp.diagonal(s)
    return xp.where(keep, log_sum_exp(xp, s, columns[None]) - own, 0.0)


def pairs_of(labels, keep):
    """Returns (partners, strangers), bool[N, N]."""
    others = keep[:, None] & keep[None] & ~np.eye(len(labels), dtype=bool)
    same = labels[:, None] == labels[None]
    return others & same, others & ~same


def mean_over(xp, partners, terms):
    count = np.maximum(partners.sum(-1), 1)
    return xp.sum(xp.where(partners, terms, 0.0), axis=-1) / count


def plain_nt_xent(xp, x, tau, labels=LABELS, keep=ALL):
    s = x @ x.T / tau
    partners, strangers = pairs_of(labels, keep)
    sums = xp.sum(xp.where(strangers, xp.exp(s), 0.0), axis=-1)
    return mean_over(xp, partners, xp.log(xp.exp(s) + sums[:, None]) - s)


def plain_supervised(xp, x, tau, labels=LABELS, keep=ALL):
    s = x @ x.T / tau
    partners, strangers = pairs_of(labels, keep)
    kept = (partners | strangers) | ~keep[:, None]
    return mean_over(xp, partners, log_sum_exp(xp, s, kept)[:, None] - s)


def info_nce(x, tau, keep=None):
    return xentjax.info_nce(x, jnp.asarray(KEYS, x.dtype), temperature=tau, where=keep)


def symmetric(x, tau, keep=None):
    keys = jnp.asarray(KEYS, x.dtype)
    return xentjax.info_nce(x, keys, temperature=tau, where=keep, symmetric=True)


def more_negatives(x, tau, keep=None):
    keys = jnp.concatenate([jnp.asarray(k, x.dtype) for k in (KEYS, MORE_KEYS)])
    return xentjax.info_nce(x, keys, temperature=tau, where=keep)


def plain_symmetric(xp, x, tau, keep=ALL):
    both = plain_info_nce(xp, x, KEYS, tau, keep), plain_info_nce(xp, KEYS, x, tau, keep)
    return (both[0] + both[1]) / 2


def plain_more_negatives(xp, x, tau, keep=ALL):
    return plain_info_nce(xp, x, np.concatenate([KEYS, MORE_KEYS]), tau, keep)


def of_labels(function):
    return lambda x, tau, keep=None: function(x, LABELS, temperature=tau, where=keep)


CASES = {
    "info_nce": (info_nce, lambda xp, x, tau, keep=ALL: plain_info_nce(xp, x, KEYS, tau, keep)),
    "symmetric": (symmetric, plain_symmetric),
    "more negatives": (more_negatives, plain_more_negatives),
    "nt_xent": (
        of_labels(xentjax.nt_xent),
        lambda xp, x, tau, keep=ALL: plain_nt_xent(xp, x, tau, keep=keep),
    ),
    "supervised": (
        of_labels(xentjax.supervised_contrastive),
        lambda xp, x, tau, keep=ALL: plain_supervised(xp, x, tau, keep=keep),
    ),
}


@functools.cache
def answers(dtype):
    """Returns the losses of every case with all rows and with some, compiled once."""

    @jit
    def losses(x, tau, keep):
        return {name: ours(x, tau, keep) for name, (ours, _) in CASES.items()}

    with jax.enable_x64(True):
        x, tau = (jnp.asarray(a, dtype) for a in (X, TAU))
        return [jax.tree.map(np.asarray, losses(x, tau, keep)) for keep in (ALL, KEEP)]


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_formula(name):
    _, plain = CASES[name]
    for dtype, tolerance in [("float64", 1e-13), ("float32", 2e-6)]:
        for keep, losses in zip((ALL, KEEP), answers(dtype), strict=True):
            assert losses[name].dtype == dtype
            want = plain(np, X, TAU, keep)
            np.testing.assert_allclose(losses[name], want, rtol=tolerance, atol=tolerance)
        assert losses[name][3] == 0


@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "supervised"])
def test_every_mode(name):
    """The head has tests of its own, to second order."""
    ours, plain = CASES[name]
    modes = ("jit(grad)", "jvp") if name == "info_nce" else ("grad", "jvp", "hessian")
    with jax.enable_x64(True):
        weights = jnp.asarray(np.linspace(0.5, 1.5, 6))
        # Six rows of a batch, so that a Hessian is small; the temperature is differentiated too.
        args = jnp.asarray(X[:6, :3]), jnp.asarray(0.7)

        def pad(x):
            return jnp.concatenate([jnp.pad(x, ((0, 0), (0, 2))), jnp.asarray(X[6:])])

        assert_modes_agree(
            modes,
            lambda x, tau: (weights * ours(pad(x), tau)[:6]).sum(),
            lambda x, tau: (weights * plain(jnp, pad(x), tau)[:6]).sum(),
            args,
        )


def test_nt_xent_is_that_of_optax():
    """optax takes the mean over pairs: here each row weighs as many as it has."""
    partners = (LABELS[:, None] == LABELS).sum(-1) - 1
    with jax.enable_x64(True):
        for labels, count in ((LABELS, partners), (np.arange(N) % 6, np.ones(N))):

            def ours(x, labels=labels, count=count):
                losses = xentjax.nt_xent(x, labels, temperature=0.07)
                return xentjax.weighted_mean(losses, weights=jnp.asarray(count, x.dtype))

            def theirs(x, labels=labels):
                return optax.losses.ntxent(x, jnp.asarray(labels), temperature=0.07)

            x = jnp.asarray(X)
            got, want = (jit(jax.value_and_grad(f))(x) for f in (ours, theirs))
            np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
            # optax differentiates its normalisation too: along the sphere the two agree.
            tangent = got[1] - (got[1] * x).sum(-1, keepdims=True) * x
            np.testing.assert_allclose(tangent, want[1], rtol=0, atol=1e-12)


def test_supervised_contrast_of_two_views_is_nt_xent():
    labels = np.arange(N) % 6
    a, b = (plain(np, X, TAU, labels) for plain in (plain_nt_xent, plain_supervised))
    np.testing.assert_allclose(a, b, rtol=1e-12)
    with jax.enable_x64(True):
        ours = xentjax.supervised_contrastive(jnp.asarray(X), labels, temperature=TAU)
    np.testing.assert_allclose(ours, a, rtol=1e-12)


@pytest.mark.parametrize("function", [xentjax.nt_xent, xentjax.supervised_contrastive])
def test_no_partner_gives_0_with_gradient_0(function):
    alone, together = jnp.arange(4), jnp.zeros(4, jnp.int32)
    x = jnp.asarray(X[:4], jnp.float32)

    @jit
    def value_and_gradient(x, labels):
        return jax.value_and_grad(lambda x: function(x, labels, temperature=0.1).sum())(x)

    loss, gradient = value_and_gradient(x, alone)
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)
    loss, gradient = value_and_gradient(x, together)  # Nobody is a negative.
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    assert (loss == 0) == (function is xentjax.nt_xent)
    np.testing.assert_array_equal(function(x[:1], alone[:1], temperature=0.1), [0])


def test_of_no_embeddings_there_are_no_losses():
    nothing, labels = np.zeros((0, 3), np.float32), np.zeros(0, np.int32)
    for loss in (xentjax.nt_xent, xentjax.supervised_contrastive):
        assert loss(nothing, labels, temperature=0.5).shape == (0,)
    assert xentjax.info_nce(nothing, nothing, temperature=0.5).shape == (0,)


def test_confident_pairs_keep_their_digits():
    """Losses of about 1e-14, which log-sum-exp less the own similarity has as 0 in float32."""
    x = np.repeat(np.eye(3, dtype=np.float32), 2, axis=0)
    labels, tau = np.arange(6) // 2, 1 / 32

    @jit
    def losses(x):
        return (
            xentjax.nt_xent(x, labels, temperature=tau),
            xentjax.supervised_contrastive(x, labels, temperature=tau),
            xentjax.info_nce(x[::2], x[1::2], temperature=tau),
        )

    for got, negatives in zip(losses(x), (4, 4, 2), strict=True):
        np.testing.assert_allclose(got, np.log1p(negatives * np.exp(-32.0)), rtol=2e-6)


# Many devices.


def on_devices(x, labels, keep, axis_name=None):
    """Returns the losses of one device's share, [n, 3]."""
    options = {"temperature": 0.5, "where": keep, "axis_name": axis_name}
    return jnp.stack(
        [
            xentjax.nt_xent(x, labels, **options),
            xentjax.supervised_contrastive(x, labels, **options),
            xentjax.info_nce(x, x[:, ::-1], symmetric=True, **options),
        ],
        axis=-1,
    )


def with_gradient(losses):
    def both(x, *rest):
        def total(x):
            each = losses(x, *rest)
            return (each * jnp.asarray([1.0, 2.0, 3.0])).sum(), each

        return jax.grad(total, has_aux=True)(x)

    return jit(both)


def test_one_device_and_many():
    batch = jnp.asarray(RNG.standard_normal((16, 4)), jnp.float32), jnp.arange(16) % 5, KEEP16
    on_one = with_gradient(on_devices)
    want = on_one(*batch)
    # A row that is masked out may hold anything.
    x, *others = batch
    for a, b in zip(on_one(x.at[3].set(jnp.nan), *others), want, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(want[0][3], 0)
    names = ("data", "model")
    mesh = make_mesh((2, 2), names, EXPLICIT)
    split = jax.shard_map(
        functools.partial(on_devices, axis_name=names),
        mesh=mesh,
        in_specs=(P(names),) * 3,
        out_specs=P(names),
    )

    placed = [jax.device_put(a, NamedSharding(mesh, P(names))) for a in batch]
    for a, b in zip(with_gradient(split)(*placed), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6)


KEEP16 = jnp.arange(16) != 3


# Memory.


@pytest.mark.parametrize("name", ["nt_xent", "supervised_contrastive", "info_nce"])
def test_no_array_of_all_similarities(name):
    """Temporaries of 32768 embeddings, whose similarities are 4096 MiB, with the gradient."""
    many, features, mib = 2**15, 64, 2**20

    def loss(x, labels):
        if name == "info_nce":
            return xentjax.info_nce(x, x, temperature=0.1).mean()
        return getattr(xentjax, name)(x, labels, temperature=0.1).mean()

    shapes = ((many, features), jnp.float32), ((many,), jnp.int32)
    lowered = jit(jax.value_and_grad(loss)).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    assert lowered.compile().memory_analysis().temp_size_in_bytes / mib <= 300
