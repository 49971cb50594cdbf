"""The head with its classes split over any mesh: one device's numbers, what crosses, and memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mainly
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import AUTO, EXPLICIT, NEAR, collectives, make_mesh, relative_difference

import xentjax

_loss = functools.partial(xentjax.vocab_parallel_linear_softmax_cross_entropy, axis_name="model")

SHAPES = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (4, 2), (2, 4)]


def _train_step(mesh, memory_budget):
    """Returns (on a mesh, on one device), functions of (params, batch) for mean and gradient."""
    options = {"reduction": "sum", "memory_budget": memory_budget}

    def loss_fn(loss, params, batch):
        inputs, targets, where = batch
        total = loss(
            jnp.tanh(inputs @ params["hidden"]),
            params["kernel"],
            targets,
            bias=params["bias"],
            where=where,
            **options,
        )
        return xentjax.WeightedSum(total, jnp.sum(where, dtype=total.dtype))

    specs = {"hidden": P(), "kernel": P(None, "model"), "bias": P("model")}
    on_mesh = xentjax.data_parallel(
        functools.partial(loss_fn, _loss), mesh, in_specs=(specs, P("data"))
    )
    plain = functools.partial(loss_fn, xentjax.linear_softmax_cross_entropy)
    return on_mesh, jax.value_and_grad(lambda params, batch: plain(params, batch).mean())


@pytest.mark.parametrize(
    "case",
    mainly(
        [(shape, AUTO, None) for shape in SHAPES] + [((2, 4), EXPLICIT, None), ((4, 2), AUTO, 0)],
        *[((1, 8), AUTO, None), ((2, 4), EXPLICIT, None)],
    ),
    ids=str,
)
def test_a_train_step_on_any_mesh_is_that_of_one_device(case):
    shape, axis_type, memory_budget = case
    tokens, features, classes = 48, 5, 1024
    rng = np.random.default_rng(2)
    params = {
        "hidden": jnp.asarray(rng.normal(size=(3, features)), jnp.float32),
        "kernel": jnp.asarray(rng.normal(size=(features, classes)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=classes), jnp.float32),
    }
    labels = jnp.asarray(rng.integers(0, classes, tokens))
    inputs = jnp.asarray(rng.normal(size=(tokens, 3)), jnp.float32)
    where = jnp.asarray(rng.random(tokens) < 0.7).at[12:30].set(False)  # All of a device's share.
    batch = inputs, xentjax.smooth_labels(labels, 0.1), where
    step, plain = _train_step(make_mesh(shape, ("data", "model"), axis_type), memory_budget)
    step = jax.jit(step).lower(params, batch).compile()
    actual = step(params, batch)
    assert relative_difference(actual, plain(params, batch)) <= NEAR
    shard = actual[1]["kernel"].sharding.shard_shape((features, classes))
    assert shard == (features, classes // shape[1])

    crossing = collectives(step)
    assert {name for name, _ in crossing} <= {"all-reduce"}
    rows = tokens // shape[0]
    of_tokens = [shape for _, shape in crossing if f"[{rows}" in shape or f",{rows}]" in shape]
    # The maximum and the sum forward, the inputs' gradient backward.
    expected = [f"f32[{rows}]", f"f32[5,{rows}]", f"f32[{rows},{features}]"]
    assert shape[1] == 1 or sorted(of_tokens) == sorted(expected)


@pytest.mark.parametrize(("shards", "memory_budget"), [(2, None), (4, 0), (8, None)])
def test_what_crosses_devices(shards, memory_budget):
    tokens, features, classes = 24, 5, 4096
    mesh = make_mesh((shards,), ("model",))
    loss = jax.shard_map(
        functools.partial(_loss, memory_budget=memory_budget),
        mesh=mesh,
        in_specs=(P(), P(None, "model"), P()),
        out_specs=P(),
    )
    args = jnp.ones((tokens, features)), jnp.ones((features, classes)), jnp.zeros(tokens, int)

    def crossing(function):
        return collectives(jax.jit(function).lower(*args).compile())

    def reduced(*shapes):
        return sorted(("all-reduce", f"f32{list(shape)}".replace(" ", "")) for shape in shapes)

    # The maximum, and a stack of sums: the mass beside the leader is one of them for a gradient.
    of_value, of_gradient = [(tokens,), (4, tokens)], [(tokens,), (5, tokens)]
    assert crossing(loss) == reduced(*of_value)
    assert crossing(jax.grad(loss, 1)) == reduced(*of_gradient)
    assert crossing(jax.grad(loss, (0, 1))) == reduced(*of_gradient, (tokens, features))


def test_temporaries_fall_with_the_number_of_devices():
    tokens, features, classes = 1024, 256, 65536

    def temporaries(shards):
        loss = jax.shard_map(
            _loss,
            mesh=make_mesh((shards,), ("model",)),
            in_specs=(P(), P(None, "model"), P()),
            out_specs=P(),
        )
        kernel = jax.ShapeDtypeStruct((features, classes), jnp.float32)
        inputs = jax.ShapeDtypeStruct((tokens, features), jnp.float32)
        labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        compiled = step.lower(inputs, kernel, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one, eight = temporaries(1), temporaries(8)
    # The gradient of the inputs, which does not fall, is a small part of it.
    assert eight <= one / 4


@pytest.mark.parametrize(
    "case",
    mainly(
        itertools.product((AUTO, EXPLICIT), ("mean", "none")), (AUTO, "none"), (EXPLICIT, "mean")
    ),
    ids=str,
)
def test_jit_splits_the_plain_head_by_itself(case):
    axis_type, reduction = case
    tokens, features, classes = 16, 8, 32
    rng = np.random.default_rng(3)
    inputs = jnp.asarray(rng.normal(size=(tokens, features)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(features, classes)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, classes, tokens))

    def loss(inputs, kernel, labels):
        each = xentjax.linear_softmax_cross_entropy(inputs, kernel, labels, reduction=reduction)
        return jnp.sum(each**2)

    mesh = make_mesh((2, 4), ("data", "model"), axis_type)
    specs = P("data"), P(None, "model"), P("data")
    args = (inputs, kernel, labels)
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(args, specs, strict=True)
    ]
    gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))
    actual = gradients(*placed)
    assert relative_difference(actual, gradients(*args)) <= NEAR
    assert actual[1][1].sharding.shard_shape(kernel.shape) == (features, classes // 4)
