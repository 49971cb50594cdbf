"""One of several hosts that train one model; test_multihost.py starts them all.

python multihost_worker.py PROCESS PROCESSES PORT OUT [--die]
"""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import xentjax

TOKENS, FEATURES, CLASSES, STEPS = 16, 4, 24, 3

PARAM_SPECS = {"hidden": P(), "kernel": P(None, "model"), "bias": P("model")}


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"hidden": (3, FEATURES), "kernel": (FEATURES, CLASSES), "bias": (CLASSES,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_batches():
    """Yields (inputs, labels, where), of which the first host has fewer tokens than the second."""
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        where = rng.random(TOKENS) < np.linspace(0.2, 1, TOKENS)
        inputs = rng.normal(size=(TOKENS, 3)).astype(np.float32)
        yield inputs, rng.integers(0, CLASSES, TOKENS).astype(np.int32), where


def loss_fn(linear_loss, params, batch):
    inputs, labels, where = batch
    features = jnp.tanh(inputs @ params["hidden"])
    targets = xentjax.smooth_labels(labels, 0.1)
    total = linear_loss(
        features,
        params["kernel"],
        targets,
        bias=params["bias"],
        where=where,
        reduction="sum",
        logit_transform=xentjax.soft_cap(10.0),
    )
    return xentjax.WeightedSum(total, jnp.sum(where, dtype=total.dtype))


def train(value_and_grad, params, batches):
    """Returns (losses of the steps, params after them)."""
    optimizer = optax.sgd(0.3, momentum=0.9)

    @jax.jit
    def step(state, batch):
        params, opt_state = state
        loss, gradients = value_and_grad(params, batch)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return (optax.apply_updates(params, updates), opt_state), loss

    state, losses = (params, optimizer.init(params)), []
    for batch in batches:
        state, loss = step(state, batch)
        losses.append(float(loss))
    return np.array(losses), state[0]


def train_on_one_device():
    plain = functools.partial(loss_fn, xentjax.linear_softmax_cross_entropy)
    value_and_grad = jax.value_and_grad(lambda params, batch: plain(params, batch).mean())
    return train(value_and_grad, jax.tree.map(jnp.asarray, make_params()), make_batches())


def train_on_mesh(mesh):
    loss = functools.partial(xentjax.vocab_parallel_linear_softmax_cross_entropy, axis_name="model")
    value_and_grad = xentjax.data_parallel(
        functools.partial(loss_fn, loss), mesh, in_specs=(PARAM_SPECS, P("data"))
    )

    def place(x, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    params = jax.tree.map(place, make_params(), PARAM_SPECS)
    batches = (tuple(place(x, P("data")) for x in batch) for batch in make_batches())
    losses, params = train(value_and_grad, params, batches)
    return losses, multihost_utils.process_allgather(params, tiled=True)


def main(process, processes, port, out, *options):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    if options == ("--die",):
        os._exit(7)
    devices = np.array(jax.devices()).reshape(int(processes), 2)
    results = {}
    # Examples are split over hosts and classes over each one's devices; then the other way round.
    for name, grid in {"examples": devices, "classes": devices.T}.items():
        losses, params = train_on_mesh(Mesh(grid, ("data", "model")))
        results |= {f"{name} {k}": v for k, v in params.items()} | {f"{name} losses": losses}
    np.savez(out, **results)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
