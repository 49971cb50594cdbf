"""A user's setting changes no result: meshes, exports, debug_nans; nothing is compiled twice.

Losses from logits of many classes have such tests of their own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mainly
from compilations import no_compilation
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import AUTO, EXPLICIT, make_mesh

import xentjax as xj

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((2, 16, 8)).astype(np.float32)
WHERE = RNG.random(A.shape) < 0.6
KEEP = WHERE[:, 0]  # Of examples.


def softmax(z):
    return jnp.exp(z) / jnp.exp(z).sum(-1, keepdims=True)


FUNCTIONS = {
    "sigmoid_binary_cross_entropy": lambda a, b, where, keep: xj.sigmoid_binary_cross_entropy(
        a, jax.nn.sigmoid(b), where=where
    ).sum(),
    "multilabel_cross_entropy": lambda a, b, where, keep: xj.multilabel_cross_entropy(
        a, where, where=keep
    ).sum(),
    "binary_cross_entropy": lambda a, b, where, keep: xj.binary_cross_entropy(
        jax.nn.sigmoid(a), jax.nn.sigmoid(b), where=where
    ).sum(),
    "weighted_mean": lambda a, b, where, keep: (
        xj.weighted_mean(a, weights=jnp.exp(b), where=where)
        + xj.weighted_mean(b, weights=where, axis=-1).sum()
    ),
    "weighted_sum": lambda a, b, where, keep: (
        sum([xj.weighted_sum(a, axis=0), xj.weighted_sum(a * b, axis=0)]).mean().sum()
    ),
    "divergences": lambda a, b, where, keep: (
        xj.kl_divergence(softmax(a), softmax(b), base=2) + xj.js_divergence(softmax(a), softmax(b))
    ).sum(),
    "softmax_kl_divergence": lambda a, b, where, keep: (
        xj.softmax_kl_divergence(a, b, where=keep).sum()
        + xj.softmax_kl_divergence(a, b, where=where).sum()
    ),
}
ARGS = (A, B, WHERE, KEEP)


def with_gradients(function):
    return jax.value_and_grad(function, (0, 1))


def assert_same(got, want):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("name", mainly(FUNCTIONS, "weighted_mean", "softmax_kl_divergence"))
def test_arrays_split_over_a_mesh(name):
    function = jax.jit(with_gradients(FUNCTIONS[name]))
    want = function(*ARGS)
    for axis_type in (AUTO, EXPLICIT):
        mesh = make_mesh((4, 2), ("data", "model"), axis_type)
        with jax.set_mesh(mesh), jax.numpy_rank_promotion("raise"):
            specs = (*[P("data", "model")] * 3, P("data"))
            split = [
                jax.device_put(jnp.asarray(x), NamedSharding(mesh, s))
                for x, s in zip(ARGS, specs, strict=True)
            ]
            assert_same(function(*split), want)


@pytest.mark.prove
@pytest.mark.parametrize("name", FUNCTIONS)
def test_export_of_a_batch_of_any_size(name):
    function = jax.jit(with_gradients(FUNCTIONS[name]))
    (batch,) = export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in ARGS]
    exported = export.export(function, platforms=("cpu", "cuda", "tpu"))(*shapes)
    assert_same(exported.call(*ARGS), function(*ARGS))


@pytest.mark.prove
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_call_compiles_nothing(name):
    function = with_gradients(FUNCTIONS[name])
    function(*ARGS)
    with no_compilation():
        jax.block_until_ready(function(*ARGS))


@pytest.mark.parametrize("name", ["sigmoid_binary_cross_entropy", "weighted_mean", "divergences"])
def test_debug_nans_finds_none_behind_a_mask_or_a_zero(name):
    p, q = np.array([0, 0.5, 0.5], np.float32), np.array([0, 0.25, 0.75], np.float32)
    keep, junk = p > 0, np.where(p > 0, p, np.inf)

    def total(x):
        if name == "divergences":
            return xj.kl_divergence(x, q) + xj.js_divergence(x, q) + xj.entropy(x)
        if name == "weighted_mean":
            return xj.weighted_mean(x, where=keep)
        return xj.sigmoid_binary_cross_entropy(x, q, where=keep).sum()

    with jax.debug_nans(True):
        value, gradient = jax.value_and_grad(total)(p if name == "divergences" else junk)
    assert np.isfinite([value, *gradient]).all()


@pytest.mark.parametrize("name", ["sigmoid_binary_cross_entropy", "softmax_kl_divergence"])
def test_a_mask_given_to_the_mean_alone(name):
    """A row that the mean drops has the gradient 0, though its loss is NaN."""
    keep = np.array([True, False])
    a, b = np.where(keep[:, None], A[:2, :3], np.nan), B[:2, :3]

    def mean(a, b):
        losses = getattr(xj, name)(a, b)
        return xj.weighted_mean(losses, where=np.broadcast_to(keep, losses.T.shape).T)

    for mode in (with_gradients(mean), jax.jit(with_gradients(mean))):
        value, gradients = mode(a, b)
        want, wanted = with_gradients(mean_of_first(name))(a, b)
        assert_same((value, [g[0] for g in gradients]), (want, [g[0] for g in wanted]))
        np.testing.assert_array_equal([g[1] for g in gradients], np.zeros((2, 3)))


def mean_of_first(name):
    return lambda a, b: getattr(xj, name)(a[:1], b[:1]).mean()
