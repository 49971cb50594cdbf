"""A NaN is carried at the sizes at which paths change, for every form, in the head, on devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import loss_and_gradient, target_forms
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

import xentjax

pytestmark = [pytest.mark.prove, pytest.mark.timeout(900)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(600, 1000), (4, 2**18 + 3), (2**15, 17)], ids=str)
@pytest.mark.parametrize("form", target_forms(1, 2))
def test_one_nan_among_half_a_million_logits(form, shape, dtype):
    targets = jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        target_forms(*shape)[form],
    )
    z = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    z[1, shape[1] // 3] = np.nan
    logits = jnp.asarray(z, dtype)
    wanted = np.arange(shape[0]) == 1
    value = jax.jit(lambda z: xentjax.softmax_cross_entropy(z, targets))(logits)
    losses, gradient = loss_and_gradient(logits, targets)
    for answer in (value, losses):
        np.testing.assert_array_equal(np.isnan(answer), wanted)
    np.testing.assert_array_equal(jnp.isnan(gradient).all(-1), wanted)
    np.testing.assert_array_equal(jnp.isnan(gradient).any(-1), wanted)


@pytest.mark.parametrize("options", [{}, {"memory_budget": 0}, {"reduction": "sum"}], ids=str)
@pytest.mark.parametrize("where", ["inputs", "kernel", "bias"])
def test_a_nan_in_a_large_head(where, options):
    rng = np.random.default_rng(0)
    arrays = {
        "inputs": rng.normal(size=(700, 8)).astype(np.float32),
        "kernel": rng.normal(size=(8, 1003)).astype(np.float32),
        "bias": rng.normal(size=1003).astype(np.float32),
    }
    labels = rng.integers(0, 1003, 700)
    arrays[where][..., 5] = np.nan

    def loss(arrays):
        return xentjax.linear_softmax_cross_entropy(
            arrays["inputs"], arrays["kernel"], labels, bias=arrays["bias"], **options
        )

    value = jax.jit(loss)(arrays)
    differentiated, gradient = jax.jit(jax.value_and_grad(loss))(arrays)
    assert np.isnan(value)
    assert np.isnan(differentiated)
    assert all(np.isnan(x).any() for x in gradient.values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_nan_column_of_a_kernel_on_eight_devices(reduction):
    """Every token's loss is NaN, and every device knows it, though one shard has the column."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4)).astype(np.float32)
    kernel = rng.normal(size=(4, 64)).astype(np.float32)
    kernel[2, 37] = np.nan
    labels = rng.integers(0, 64, 6)
    mesh = make_mesh((8,), ("model",))
    head = functools.partial(
        xentjax.vocab_parallel_linear_softmax_cross_entropy, axis_name="model", reduction=reduction
    )
    losses = jax.shard_map(head, mesh=mesh, in_specs=(P(), P(None, "model"), P()), out_specs=P())
    assert np.isnan(jax.jit(losses)(x, kernel, labels)).all()
    value, (of_x, of_kernel) = jax.jit(
        jax.value_and_grad(lambda x, k: losses(x, k, labels).sum(), (0, 1))
    )(x, kernel)
    assert np.isnan(value)
    assert np.isnan(of_x).all()
    assert np.isnan(of_kernel).all()
