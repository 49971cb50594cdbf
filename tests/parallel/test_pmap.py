"""Arrays stacked as in jax.pmap, a slice for each device: the same mean and gradient."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import pytest
from cases import mainly, target_forms
from jax import export
from meshes import (
    CLASSES,
    EXAMPLES,
    NEAR,
    loss_fn,
    losses_and_weights,
    make_batch,
    make_params,
    on_one_device,
    relative_difference,
)

import xentjax
from xentjax import pmap_data_parallel


def _stacked(tree, devices):
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), tree)


@pytest.mark.parametrize("microbatches", mainly([1, 3], 3))
@pytest.mark.parametrize("devices", mainly([1, 4, 8], 4))
def test_stacked_arrays(devices, microbatches):
    params, batch = make_params(), make_batch()
    copies = jax.tree.map(lambda x: jnp.stack([x] * devices), params)
    value_and_grad = pmap_data_parallel(
        loss_fn, microbatches=microbatches, devices=jax.devices("cpu")
    )
    actual = value_and_grad(copies, _stacked(batch, devices))
    desired = on_one_device(loss_fn, params, batch)
    for device in range(devices):
        own = jax.tree.map(lambda x, d=device: x[d], actual)
        assert relative_difference(own, desired) <= NEAR


def test_stacked_targets_with_a_background_for_each_device():
    targets = target_forms(EXAMPLES, CLASSES)["prior"]
    params, batch = make_params(), make_batch() | {"targets": targets}
    stacked = _stacked(batch | {"targets": dataclasses.replace(targets, background=None)}, 4)
    stacked["targets"] = dataclasses.replace(
        stacked["targets"], background=jnp.stack([targets.background] * 4)
    )
    copies = jax.tree.map(lambda x: jnp.stack([x] * 4), params)
    mean, grads = pmap_data_parallel(loss_fn, microbatches=2)(copies, stacked)
    actual = mean[0], jax.tree.map(lambda x: x[0], grads)
    assert relative_difference(actual, on_one_device(loss_fn, params, batch)) <= NEAR


def test_a_loss_fn_may_use_the_axis_of_devices():
    def centred(params, batch):
        mean = jax.lax.pmean(batch["inputs"].mean(0), "batch")
        return loss_fn(params, batch | {"inputs": batch["inputs"] - mean})

    params, batch = make_params(), make_batch()
    copies = jax.tree.map(lambda x: jnp.stack([x] * 4), params)
    mean, grads = pmap_data_parallel(centred, axis_name="batch")(copies, _stacked(batch, 4))
    batch["inputs"] -= batch["inputs"].mean(0)
    actual = mean[0], jax.tree.map(lambda x: x[0], grads)
    assert relative_difference(actual, on_one_device(loss_fn, params, batch)) <= NEAR


def test_stacked_for_different_numbers_of_devices_is_an_error():
    value_and_grad = pmap_data_parallel(loss_fn, devices=jax.devices("cpu"))
    copies = jax.tree.map(lambda x: jnp.stack([x] * 4), make_params())
    with pytest.raises(ValueError, match=r"stacked for the same number.*\(4,\), \(8,\)"):
        value_and_grad(copies, _stacked(make_batch(), 8))
    with pytest.raises(ValueError, match=r"at most 8.*\(16,\)"):
        value_and_grad(
            jax.tree.map(lambda x: jnp.stack([x] * 16), make_params()),
            _stacked(make_batch(), 16),
        )


def test_weighted_mean_inside_the_users_own_pmap():
    params, batch = make_params(), make_batch()

    def loss(params, batch):
        losses, weights = losses_and_weights(params, batch)
        return xentjax.weighted_mean(losses, weights=weights, axis_name="batch")

    def evaluate(params, batch):
        grads = jax.lax.pmean(jax.grad(loss)(params, batch), "batch")
        return loss(params, batch), grads, loss_fn(params, batch).psum("batch")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # JAX warns of jax.pmap itself.
        mapped = jax.pmap(evaluate, "batch", in_axes=(None, 0), devices=jax.devices("cpu")[:4])
        *actual, parts = jax.tree.map(lambda x: x[3], mapped(params, _stacked(batch, 4)))
    desired = on_one_device(loss_fn, params, batch)
    assert relative_difference(tuple(actual), desired) <= NEAR
    assert relative_difference(parts.mean(), desired[0]) <= NEAR


def test_it_exports():
    copies = jax.tree.map(lambda x: jnp.stack([x] * 4), make_params())
    platforms = ("cpu", "cuda", "tpu", "rocm")
    value_and_grad = pmap_data_parallel(loss_fn, devices=jax.devices("cpu"))
    exported = export.export(jax.jit(value_and_grad), platforms=platforms)(
        copies, _stacked(make_batch(), 4)
    )
    assert exported.platforms == platforms
    assert exported.nr_devices == 4
