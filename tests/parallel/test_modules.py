"""Models with leaves that are no arrays of floats: these pass untouched and have no gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import jit, mainly
from jax.sharding import PartitionSpec as P
from meshes import (
    EXAMPLES,
    EXPLICIT,
    NEAR,
    make_batch,
    make_mesh,
    make_module,
    make_params,
    module_logits,
    module_loss_fn,
    params_of,
    plain_losses,
    relative_difference,
)

import xentjax

NOT_FLOATS = {"steps", "key", "activation", "name", "use_bias", "cap", "extra"}


def desired_of(batch):
    """Returns the mean and the gradient of the two arrays of floats, by plain JAX."""
    module = make_module()

    def mean(params):
        return module_loss_fn(dataclasses.replace(module, **params), batch).mean()

    return jax.value_and_grad(mean)(params_of(module))


def assert_is_as_desired(mean, grads, batch):
    assert {name for name, x in vars(grads).items() if x is None} == NOT_FLOATS
    assert relative_difference((mean, params_of(grads)), desired_of(batch)) <= NEAR


def test_one_device():
    value_and_grad = xentjax.accumulate_gradients(module_loss_fn, microbatches=3)
    assert_is_as_desired(*value_and_grad(make_module(), make_batch()), make_batch())


@pytest.mark.parametrize("specs", mainly(["none", "each leaf", "each array"], "each leaf"))
def test_a_mesh(specs):
    module, batch = make_module(), make_batch()
    leaves = jax.tree.map(lambda _: P(), module)
    in_specs = {
        "none": None,
        "each leaf": (leaves, P("data")),
        "each array": (
            dataclasses.replace(leaves, activation=None, name=None, use_bias=None, cap=None),
            P("data"),
        ),
    }[specs]
    mesh = make_mesh((4,), ("data",), EXPLICIT)
    value_and_grad = xentjax.data_parallel(
        module_loss_fn, mesh, microbatches=3 if specs == "none" else 1, in_specs=in_specs
    )
    assert_is_as_desired(*value_and_grad(module, batch), batch)


def test_stacked_arrays():
    module, batch = make_module(), make_batch()
    arrays = {name: x for name, x in vars(module).items() if isinstance(x, jax.Array)}
    copies = {name: jnp.stack([x] * 4) for name, x in arrays.items()}
    stacked = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)
    value_and_grad = xentjax.pmap_data_parallel(module_loss_fn, devices=jax.devices("cpu"))
    mean, grads = value_and_grad(dataclasses.replace(module, **copies), stacked)
    assert_is_as_desired(*jax.tree.map(lambda x: x[0], (mean, grads)), batch)


def _module_loss_of_one(module, example):
    return plain_losses(module_logits(module, example), example["targets"])


def test_one_example_at_a_time():
    batch = {"inputs": make_batch()["inputs"], "targets": make_batch()["targets"]}
    function = xentjax.per_example(_module_loss_of_one, gradients=True)
    losses, grads = function(make_module(), batch)
    np.testing.assert_array_equal(
        losses, xentjax.per_example(_module_loss_of_one)(make_module(), batch)
    )
    mean, grads = losses.mean(), jax.tree.map(lambda g: g.mean(0), grads)
    assert grads.kernel.shape == make_module().kernel.shape
    assert_is_as_desired(mean, grads, batch | {"where": jnp.ones(EXAMPLES, bool)})


def test_inside_a_jitted_step_and_after_it():
    module, batch = make_module(), make_batch()
    value_and_grad = xentjax.accumulate_gradients(module_loss_fn, microbatches=3)

    @jit
    def step(params, batch):
        model = dataclasses.replace(module, **params)
        mean, grads = value_and_grad(model, batch)
        # The rule of a model's step: leaves without a gradient stay as they are.
        new = jax.tree.map(
            lambda g, p: p if g is None else p - 0.5 * g, grads, model, is_leaf=lambda x: x is None
        )
        return params_of(new), mean

    params, losses = params_of(module), []
    for _ in range(5):
        params, loss = step(params, batch)
        losses.append(loss)
    assert losses[-1] < losses[0]


def test_the_batch_may_have_constants_and_keys():
    params = {"kernel": make_params()["kernel"]}
    batch = make_batch() | {
        "keys": jax.random.split(jax.random.key(0), EXAMPLES),
        "scale": 0.5,
        "activation": jnp.tanh,
        "mode": "train",
    }

    def losses_of(params, batch):
        assert batch["mode"] == "train"
        noise = jax.vmap(jax.random.normal)(batch["keys"])
        logits = batch["activation"](batch["inputs"] @ params["kernel"]) * batch["scale"]
        return plain_losses(logits, batch["targets"]) + noise

    def loss_fn(params, batch):
        return xentjax.weighted_sum(losses_of(params, batch), where=batch["where"])

    def loss_of_one(params, example):
        assert example["scale"] == 0.5
        logits = example["activation"](example["inputs"] @ params["kernel"]) * example["scale"]
        noise = jax.random.normal(example["keys"])
        return plain_losses(logits, example["targets"]) + noise

    desired = jax.value_and_grad(lambda p: loss_fn(p, batch).mean())(params)
    mesh = make_mesh((4,), ("data",), EXPLICIT)
    for value_and_grad in (
        xentjax.accumulate_gradients(loss_fn, microbatches=3),
        xentjax.data_parallel(loss_fn, mesh, microbatches=3),
    ):
        assert relative_difference(value_and_grad(params, batch), desired) <= NEAR
    losses = xentjax.per_example(loss_of_one)(params, batch)
    assert relative_difference(losses, losses_of(params, batch)) <= NEAR


def test_constants_that_are_equal_are_not_the_same():
    """1, 1.0 and True have one hash; each is a model of its own."""
    seen = []

    def loss_fn(params, batch):
        seen.append(type(params["constant"]))
        return xentjax.weighted_sum(params["scale"] * batch)

    value_and_grad = xentjax.accumulate_gradients(loss_fn, microbatches=1)
    for constant in (1, 1.0, True, 1):
        value_and_grad({"scale": jnp.ones(()), "constant": constant}, jnp.ones(2))
    assert seen == [int, float, bool]


def test_params_without_floats_are_an_error():
    loss_fn = module_loss_fn
    mesh = make_mesh((1,), ("data",))
    for function in (
        xentjax.accumulate_gradients(loss_fn, microbatches=2),
        xentjax.data_parallel(loss_fn, mesh),
        xentjax.pmap_data_parallel(loss_fn),
        xentjax.per_example(lambda p, x: x, gradients=True),
    ):
        with pytest.raises(TypeError, match=r"params: expected an array of floats .*got none"):
            function({"scale": 1.0, "steps": jnp.zeros(1, int)}, jnp.ones((1, 2)))


def test_constants_need_a_hash():
    params = {"scale": jnp.ones(()), "names": {1, 2}}
    with pytest.raises(TypeError, match=r"params\['names'\]: expected an array.*got \{1, 2\}"):
        xentjax.accumulate_gradients(module_loss_fn, microbatches=1)(params, jnp.ones(2))
