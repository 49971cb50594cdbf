"""The statistics of a softmax beside its cross-entropy, whichever way the logits are had."""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xentjax._targets.mass import DenseMass, Mass, at_class
from xentjax._targets.types import is_valid


class SoftmaxStats(NamedTuple):
    """The statistics of a softmax beside its cross-entropy; each of the loss's shape.

    Attributes:
      log_normalizer: lse(z) = log Σ_v exp(z_v), in nats; differentiable.
      prediction: The class of the largest logit (the first of several), int32.
      correct: Whether the prediction is a class of the heaviest target mass.
      entropy: Entropy of softmax(z), in nats; differentiable.
      label_log_probability: log softmax(z) at the heaviest target class, which is the label where
        there is one; in nats; not differentiable (the loss is).
    """

    log_normalizer: Float[Array, "*batch"]
    prediction: Int[Array, "*batch"]
    correct: Bool[Array, "*batch"]
    entropy: Float[Array, "*batch"]
    label_log_probability: Float[Array, "*batch"]


def heaviest(mass: Mass, axes: tuple[Hashable, ...] = ()) -> jax.Array:
    """Returns the class of the largest mass, int32[...], the first of several.

    Along mesh axes, dense mass is a shard of the classes, and sparse mass is on all of them.
    """
    if not (axes and isinstance(mass, DenseMass)):
        return mass.heaviest()
    most = mass.masses.max(-1)
    is_most = most == jax.lax.pmax(most, axes)
    return first(is_most, mass.heaviest(), mass.masses.shape[-1], axes)


def is_heaviest(mass: Mass, classes: jax.Array, axes: tuple[Hashable, ...] = ()) -> jax.Array:
    """Returns whether no class has more mass than the one given for each example."""
    if not (axes and isinstance(mass, DenseMass)):
        return mass.is_heaviest(classes)
    return at_class_of_all(mass.masses, classes, axes) >= jax.lax.pmax(mass.masses.max(-1), axes)


def first(is_there: jax.Array, here: jax.Array, size: int, axes: tuple[Hashable, ...]) -> jax.Array:
    """Returns the first class of all devices that is the one looked for, int32[...].

    Args:
      is_there: Whether this device has it, [...].
      here: Which of this device's classes it is, int32[...].
      size: How many classes each device has.
      axes: Mesh axes that the classes are split over.
    """
    here = jax.lax.axis_index(axes) * size + here
    none = jnp.full_like(here, size * jax.lax.axis_size(axes))
    return jax.lax.pmin(jnp.where(is_there, here, none), axes)


def at_class_of_all(x: jax.Array, classes: jax.Array, axes: tuple[Hashable, ...]) -> jax.Array:
    """Returns x at one class of each example, [...], of x [..., V] split along mesh axes."""
    size = x.shape[-1]
    here = classes - jax.lax.axis_index(axes) * size if axes else classes
    there = at_class(x, jnp.clip(here, 0, size - 1))
    if not axes:
        return there
    return jax.lax.psum(jnp.where(is_valid(here, size), there, jnp.zeros_like(there)), axes)


def known_log_probability(losses: jax.Array, surprisal: jax.Array) -> jax.Array:
    """Returns −surprisal, a constant; NaN where the losses are, since their targets are invalid."""
    losses = jax.lax.stop_gradient(losses)
    return jnp.where(jnp.isnan(losses), losses, -surprisal)
