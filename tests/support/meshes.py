"""Help for tests of many devices: meshes, a loss to split, the collectives of a program."""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import xentjax

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

# A float32 sum taken in another order: a few ulps, 2⁻²³ each.
NEAR = 1e-6

_COLLECTIVE = re.compile(
    r"= (?P<shape>.+?) (?P<name>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute|collective-broadcast)(-start)?\("
)


def make_mesh(shape, names, axis_type=AUTO):
    """Returns a mesh of the first devices of the host."""
    devices = jax.devices("cpu")[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, (axis_type,) * len(names), devices=devices)


def collectives(compiled):
    """Returns (name, shape) of each collective in the text of a compiled function."""
    matches, layout = _COLLECTIVE.finditer(compiled.as_text()), re.compile(r"\{[\d,]*\}")
    return sorted((m["name"], layout.sub("", m["shape"])) for m in matches)


def relative_difference(actual, desired) -> float:
    """Returns the largest, over leaves, of max |actual − desired| / max |desired|."""

    def difference(a, d):
        a, d = np.asarray(a, np.float64), np.asarray(d, np.float64)
        assert a.shape == d.shape
        return np.abs(a - d).max() / np.abs(d).max()

    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    return max(jax.tree.leaves(jax.tree.map(difference, actual, desired)))


def target_specs(targets):
    """Returns the PartitionSpecs of targets: by example, and dense ones by class too."""
    if not isinstance(targets, xentjax.SparseTargets):
        return P("data", "model") if targets.ndim == 2 else P("data")
    specs = jax.tree.map(lambda _: P("data"), targets)
    return specs if targets.background is None else dataclasses.replace(specs, background=P())


# A classifier, whose batch has masks that differ from device to device.

EXAMPLES, FEATURES, CLASSES = 48, 5, 7


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    kernel, bias = rng.normal(size=(FEATURES, CLASSES)), rng.normal(size=CLASSES)
    return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}


def make_batch(seed=1):
    rng = np.random.default_rng(seed)
    where = rng.random(EXAMPLES) < rng.random(EXAMPLES)
    where[12:30] = False  # All of a device's share on 4 and 8 devices, and most of one on 2.
    return {
        "inputs": jnp.asarray(rng.normal(size=(EXAMPLES, FEATURES)), jnp.float32),
        "targets": jnp.asarray(rng.integers(0, CLASSES, EXAMPLES)),
        "where": jnp.asarray(where),
        "weights": jnp.asarray(rng.random(EXAMPLES) + 0.1, jnp.float32),
    }


def logits_of(params, batch):
    logits = batch["inputs"] @ params["kernel"]
    return logits + jnp.broadcast_to(params["bias"], logits.shape)


def loss_fn(params, batch):
    losses, weights = losses_and_weights(params, batch)
    return xentjax.weighted_sum(losses, weights=weights)


def losses_and_weights(params, batch):
    where, weights = batch["where"], batch["weights"]
    losses = xentjax.softmax_cross_entropy(logits_of(params, batch), batch["targets"], where=where)
    return losses, jnp.where(where, weights, 0)


def plain_losses(logits, labels):
    """The formula as it is written, quick to compile, where only the mean is looked at."""
    entries = (logits * jax.nn.one_hot(labels, CLASSES, dtype=logits.dtype)).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - entries


def plain_loss_fn(params, batch):
    logits = logits_of(params, batch).astype(jnp.float32)
    losses = plain_losses(logits, batch["targets"])
    return xentjax.weighted_sum(losses, where=batch["where"], weights=batch["weights"])


def on_one_device(loss_fn, params, batch):
    """Returns the mean of a WeightedSum and its gradient."""
    return jax.value_and_grad(lambda params: loss_fn(params, batch).mean())(params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Module:
    """The classifier as a module: some of its leaves are no arrays of floats."""

    kernel: jax.Array
    bias: jax.Array
    steps: jax.Array
    key: jax.Array
    activation: Callable
    name: str
    use_bias: bool
    cap: float
    extra: None = None


def make_module():
    params, key = make_params(), jax.random.key(3)
    return Module(
        params["kernel"], params["bias"], jnp.array(2), key, jnp.tanh, "classifier", True, 2.0
    )


def params_of(module):
    return {"kernel": module.kernel, "bias": module.bias}


def module_logits(module, batch):
    """Uses every leaf, the switch and the name in ways that only a Python value allows."""
    assert module.name == "classifier"
    assert module.extra is None
    params = params_of(module) if module.use_bias else {"kernel": module.kernel, "bias": 0}
    noise = jax.random.normal(module.key, (CLASSES,), module.kernel.dtype)
    steps = module.steps.astype(module.kernel.dtype)
    logits = logits_of(params, batch)
    return module.activation(logits / module.cap) * steps + jnp.broadcast_to(noise, logits.shape)


def module_loss_fn(module, batch):
    losses = plain_losses(module_logits(module, batch), batch["targets"])
    return xentjax.weighted_sum(losses, where=batch["where"])
