"""What the tests of many devices share: meshes, a loss to split, and what crosses devices."""

import re

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
    """Returns (name, shape) of what crosses devices in the text of a compiled function."""
    matches, layout = _COLLECTIVE.finditer(compiled.as_text()), re.compile(r"\{[\d,]*\}")
    return sorted((m["name"], layout.sub("", m["shape"])) for m in matches)


def relative_difference(actual, desired) -> float:
    """Returns the largest, over leaves, of max |actual − desired| / max |desired|."""

    def difference(a, d):
        a, d = np.asarray(a, np.float64), np.asarray(d, np.float64)
        assert a.shape == d.shape
        return np.abs(a - d).max() / np.abs(d).max()

    return max(jax.tree.leaves(jax.tree.map(difference, actual, desired)))


def target_specs(targets):
    """Returns the PartitionSpecs of targets: by example, and dense ones by class too."""
    if not isinstance(targets, xentjax.SparseTargets):
        return P("data", "model") if targets.ndim == 2 else P("data")
    return xentjax.SparseTargets(
        indices=P("data"),
        weights=P("data"),
        background_mass=None if targets.background_mass is None else P("data"),
        background=None if targets.background is None else P(),
    )


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
    return batch["inputs"] @ params["kernel"] + params["bias"]


def loss_fn(params, batch):
    losses, weights = losses_and_weights(params, batch)
    return xentjax.weighted_sum(losses, weights=weights)


def losses_and_weights(params, batch):
    where, weights = batch["where"], batch["weights"]
    losses = xentjax.softmax_cross_entropy(logits_of(params, batch), batch["targets"], where=where)
    return losses, jnp.where(where, weights, 0)


def on_one_device(loss_fn, params, batch):
    """Returns the mean of a WeightedSum and its gradient."""
    return jax.value_and_grad(lambda params: loss_fn(params, batch).mean())(params)
