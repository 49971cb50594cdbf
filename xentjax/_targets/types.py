"""What the truth looks like: labels, dense distributions, and sparse targets.

A target is a non-negative mass t_v over the V classes. Its total T = Σ_v t_v need not be 1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from xentjax._jax import checks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseTargets:
    """Targets with mass on K classes each, and the rest spread over a background.

    t = Σ_k weights_k · onehot(indices_k) + background_mass · background

    A pytree: it goes through jit, vmap, scan and shard_map as an array does. Classes may repeat
    among the K; their weights add. The shapes are checked where the targets are used.

    Attributes:
      indices: Classes in [0, V), int[..., K].
      weights: Their mass, float[..., K].
      background_mass: Mass of the background, float[...]; None is no background at all.
      background: The distribution of that mass over all classes, float[V]; None is uniform, 1/V.
        Mixing targets that have different backgrounds stacks them: background float[B, V] with
        background_mass float[..., B].

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> t = xentjax.SparseTargets(jnp.array([[2, 0]]), jnp.array([[0.7, 0.3]]))
      >>> print(xentjax.dense_targets(t, 3))
      [[0.3 0.  0.7]]
    """

    indices: Int[Array, "*batch k"]
    weights: Float[Array, "*batch k"]
    background_mass: Float[Array, "*batch"] | None = None
    background: Float[Array, " v"] | None = None


Targets = ArrayLike | SparseTargets
"""Integer labels [...], dense targets float[..., V], or SparseTargets."""


def as_targets(targets: Targets, name: str = "targets") -> jax.Array | SparseTargets:
    """Returns `targets` as dense float[..., V] or SparseTargets; labels become K = 1 of weight 1.

    Raises:
      TypeError: A dtype is neither integer (labels) nor floating (masses).
      ValueError: The parts of SparseTargets do not fit each other.
    """
    if not isinstance(targets, SparseTargets):
        array = _as_classes(name, targets)
        checks.check(
            jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating),
            f"{name}: expected integer labels, floating dense targets or SparseTargets, "
            f"got {checks.describe(array)}",
            TypeError,
        )
        if jnp.issubdtype(array.dtype, jnp.floating):
            return array
        return SparseTargets(array[..., None], jnp.ones((*array.shape, 1), float))

    indices = _as_classes("targets.indices", targets.indices)
    weights = checks.as_array("targets.weights", targets.weights)
    checks.check(
        jnp.issubdtype(indices.dtype, jnp.integer) and indices.ndim > 0,
        f"targets.indices: expected integers of shape [..., K], got {checks.describe(indices)}",
        TypeError,
    )
    checks.check_floating("targets.weights", weights)
    checks.check_shape("targets.weights", weights, indices.shape, "that of targets.indices")
    mass, background = targets.background_mass, targets.background
    if mass is None:
        checks.check(
            background is None,
            "targets.background_mass: expected an array beside targets.background, got None",
        )
        return SparseTargets(indices, weights)
    mass = checks.as_array("targets.background_mass", mass)
    checks.check_floating("targets.background_mass", mass)
    batch = indices.shape[:-1]
    if background is not None:
        background = checks.as_array("background", background)
        checks.check_floating("targets.background", background)
        checks.check(
            background.ndim in (1, 2),
            "targets.background: expected shape [V], or [B, V] when stacked, "
            f"got {checks.describe(background)}",
        )
        batch = batch + background.shape[:-1]
    checks.check_shape("targets.background_mass", mass, batch, "the batch of targets.indices")
    return SparseTargets(indices, weights, mass, background)


def _as_classes(name: str, x: ArrayLike) -> jax.Array:
    """Returns `x` as a jax array; integers too large for int32 stay out of range, not wrapped."""
    if isinstance(x, np.ndarray | np.generic) and np.issubdtype(x.dtype, np.integer):
        x = _as_int32(x)  # At once: where JAX has no int64 it would wrap.
    x = checks.as_array(name, x, "integer labels, floating dense targets or SparseTargets")
    return _as_int32(x) if jnp.issubdtype(x.dtype, jnp.integer) else x


def _as_int32(x: Any) -> Any:
    """Returns integers, of NumPy or JAX, as the nearest int32."""
    ours, theirs = jnp.iinfo(jnp.int32), jnp.iinfo(x.dtype)
    if ours.min <= theirs.min and theirs.max <= ours.max:
        return x.astype(jnp.int32)
    return x.clip(max(ours.min, theirs.min), min(ours.max, theirs.max)).astype(jnp.int32)


def check_targets(
    targets: jax.Array | SparseTargets, batch: tuple[int, ...], num_classes: int
) -> None:
    """Raises ValueError unless `targets` are for `batch` examples of `num_classes` classes."""
    if not isinstance(targets, SparseTargets):
        fits = f"{batch} labels or {(*batch, num_classes)} masses: batch and classes of the logits"
        checks.check_shape("targets", targets, (*batch, num_classes), fits)
        return
    checks.check(
        targets.indices.shape[:-1] == batch,
        f"targets: expected shape {batch} for labels, {(*batch, 'K')} for sparse indices or "
        f"{(*batch, num_classes)} for floating dense targets (the batch of the logits), got "
        f"{targets.indices.shape[:-1]} labels or {targets.indices.shape} indices",
    )
    if targets.background is not None:
        checks.check(
            targets.background.shape[-1] == num_classes,
            f"targets.background: expected {num_classes} classes, those of the logits, "
            f"got {checks.describe(targets.background)}",
        )


def invalid_as_nan(targets: SparseTargets, num_classes: int) -> SparseTargets:
    """Gives NaN weight to classes outside [0, V), so that their loss and gradient are NaN."""
    valid = is_valid(targets.indices, num_classes)
    return dataclasses.replace(
        targets,
        indices=jnp.clip(targets.indices, 0, num_classes - 1),
        weights=jnp.where(valid, targets.weights, jnp.nan),
    )


def is_valid(labels: jax.Array, num_classes: int) -> jax.Array:
    """Returns where labels are in [0, V)."""
    return (labels >= 0) & (labels < num_classes)


def map_masses(
    function: Callable[[jax.Array], jax.Array], targets: jax.Array | SparseTargets
) -> jax.Array | SparseTargets:
    """Applies `function` to every array of mass: dense, or weights and background_mass."""
    if not isinstance(targets, SparseTargets):
        return function(targets)
    mass = targets.background_mass
    return dataclasses.replace(
        targets,
        weights=function(targets.weights),
        background_mass=None if mass is None else function(mass),
    )


def batch_of(targets: jax.Array | SparseTargets) -> tuple[int, ...]:
    """Returns the shape of one loss per example."""
    array = targets.indices if isinstance(targets, SparseTargets) else targets
    return array.shape[:-1]


def expand_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Returns x with axes of size 1 at its end, to stand against `other`."""
    return x.reshape(x.shape + (1,) * (other.ndim - x.ndim))
