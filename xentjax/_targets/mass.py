"""The arithmetic of target mass: what losses need to know of targets of any form.

Only the classes that hold mass are looked at, and no function makes an array [..., V] of its own.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from xentjax._targets import types as _targets
from xentjax._targets.types import SparseTargets


def backgrounds(
    targets: SparseTargets, num_classes: int
) -> Iterator[tuple[jax.Array, jax.Array | float]]:
    """Yields (mass [...], distribution [V] or the scalar 1/V) for each background."""
    mass, stacked = targets.background_mass, _targets.stacked_background(targets)
    if mass is None:
        return
    if stacked is None:
        yield mass, 1.0 / num_classes
    else:
        for b in range(stacked.shape[0]):
            yield mass[..., b], stacked[b]


def times_mass(mass: jax.Array | float, cost: jax.Array) -> jax.Array:
    """Returns mass · cost with 0 · inf = 0."""
    return mass * jnp.where((mass == 0) & jnp.isposinf(cost), 0, cost)


class Sums:
    """Sums over classes, as they are written; `_one_cpu` has others, in another order.

    Functions given are elementwise and close over no arrays; arrays are [..., V], or [..., 1] and
    what else broadcasts; sums are [...].
    """

    def over_classes(self, function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
        """Returns Σ_v function(*arrays)_v."""
        return opaque(function(*arrays).sum(-1))

    def expectation(
        self, t: jax.Array, cost: Callable[..., jax.Array], z: jax.Array, *rows: jax.Array
    ) -> jax.Array:
        """Returns Σ_v t_v · cost(z, *rows)_v, with 0 · inf = 0."""
        return opaque(times_mass(t, cost(z, *rows)).sum(-1))

    def below(self, t: jax.Array, z: jax.Array, top: jax.Array) -> jax.Array:
        """Returns Σ_{v: z_v < top} t_v, where one z alone is the largest: top, [..., 1]."""
        return opaque(jnp.where(z < top, t, 0).sum(-1))


SUMS = Sums()


def opaque(x: jax.Array) -> jax.Array:
    """Returns x, of which the compiler does not know that it is x.

    XLA's CPU backend makes one kernel of a sum and those after it, be it the sum over chunks or the
    mean of the losses, and that is slow, or runs on one core. A choice between a number and itself
    keeps them apart.
    """
    return jnp.where(jnp.isnan(x), jnp.nan, x)


def expectation(
    targets: jax.Array | SparseTargets,
    logits: jax.Array,
    cost: Callable[..., jax.Array],
    *rows: jax.Array,
    sums: Sums = SUMS,
) -> jax.Array:
    """Returns Σ_v t_v · cost(z, *rows)_v, [...]: every cross-entropy is this one sum.

    Only the classes that hold mass are looked at.

    Args:
      targets: The mass, ready for arithmetic.
      logits: z, [..., V].
      cost: Elementwise; it closes over no arrays.
      rows: What the cost needs to know of each example, [..., 1].
      sums: How sums over all classes are made.
    """
    if not isinstance(targets, SparseTargets):
        return sums.expectation(targets, cost, logits, *rows)
    picked = at_classes(logits, targets.indices)
    total = times_mass(targets.weights, cost(picked, *rows)).sum(-1)
    for mass, distribution in backgrounds(targets, logits.shape[-1]):
        if isinstance(distribution, jax.Array):
            total += times_mass(mass, sums.expectation(distribution, cost, logits, *rows))
        else:
            total += times_mass(mass * distribution, sums.over_classes(cost, logits, *rows))
    return total


def mass_below(
    targets: jax.Array | SparseTargets, logits: jax.Array, top: jax.Array, sums: Sums = SUMS
) -> jax.Array:
    """Returns Σ_{v: z_v < m} t_v, [...], where one class alone has the largest logit m = top."""
    if not isinstance(targets, SparseTargets):
        return sums.below(targets, logits, top)
    picked = at_classes(logits, targets.indices)
    total = jnp.where(picked < top, targets.weights, 0).sum(-1)
    for mass, distribution in backgrounds(targets, logits.shape[-1]):
        if isinstance(distribution, jax.Array):
            total += mass * sums.below(distribution, logits, top)
        else:
            total += mass * (1 - distribution)
    return total


def total_mass(
    targets: jax.Array | SparseTargets, num_classes: int, sums: Sums = SUMS
) -> jax.Array:
    """Returns T = Σ_v t_v, [...]."""
    if not isinstance(targets, SparseTargets):
        return sums.over_classes(lambda t: t, targets)
    total = targets.weights.sum(-1)
    for mass, distribution in backgrounds(targets, num_classes):
        total += mass if targets.background is None else mass * jnp.sum(distribution)
    return total


def at_classes(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns x[..., indices_k], [..., K], of x [..., V]; the indices must be valid."""
    batch = tuple(range(x.ndim - 1))
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(x.ndim - 1,),
        start_index_map=(x.ndim - 1,),
        operand_batching_dims=batch,
        start_indices_batching_dims=batch,
    )
    sizes = (1,) * x.ndim
    return jax.lax.gather(x, indices[..., None], numbers, sizes, mode="promise_in_bounds")


def masked(tree: Any, mask: jax.Array | None) -> Any:
    """Returns `tree` with 0 in the examples masked out; its arrays are [...] or [..., K]."""
    if mask is None:
        return tree
    return jax.tree.map(
        lambda x: jnp.where(_targets.expand_like(mask, x), x, jnp.zeros_like(x)), tree
    )


def kept(
    targets: jax.Array | SparseTargets, mask: jax.Array | None, dtype: jax.typing.DTypeLike
) -> jax.Array | SparseTargets:
    """Returns targets in the dtype of the arithmetic, without mass where masked out."""
    targets = _targets.map_masses(lambda mass: masked(mass.astype(dtype), mask), targets)
    if isinstance(targets, SparseTargets) and targets.background is not None:
        return dataclasses.replace(targets, background=targets.background.astype(dtype))
    return targets


def background_over(targets: SparseTargets, num_classes: int) -> jax.Array | None:
    """Returns the background's mass on every class: [..., V], [..., 1] if uniform, None if none."""
    total = None
    for mass, distribution in backgrounds(targets, num_classes):
        added = mass[..., None] * distribution
        total = added if total is None else total + added
    return total


def mass_at(targets: SparseTargets, classes: jax.Array, num_classes: int) -> jax.Array:
    """Returns the mass that sparse targets have on classes int[..., J], as float[..., J]."""
    same = classes[..., :, None] == targets.indices[..., None, :]
    total = jnp.where(same, targets.weights[..., None, :], 0).sum(-1)
    for mass, distribution in backgrounds(targets, num_classes):
        share = distribution[classes] if isinstance(distribution, jax.Array) else distribution
        total += mass[..., None] * share
    return total


def is_heaviest(targets, prediction, num_classes):
    """Returns whether no class holds more target mass than `prediction` does."""
    if not isinstance(targets, SparseTargets):
        held = at_classes(targets, prediction[..., None])[..., 0]
        return held == targets.max(-1)

    heaviest = mass_at(targets, targets.indices, num_classes).max(-1, initial=0)
    background = background_over(targets, num_classes)
    if background is not None:  # It may be the heaviest alone.
        heaviest = jnp.maximum(heaviest, background.max(-1))
    return mass_at(targets, prediction[..., None], num_classes)[..., 0] >= heaviest


def put_at(x: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    """Returns x [..., V] with x[..., indices_k] = values_k; equal indices have equal values.

    A choice in the loop that writes x is what compilers fuse best, if there are few of them.
    """
    if indices.shape[-1] > FEW:
        return scattered(x, indices, values)
    classes = jax.lax.broadcasted_iota(indices.dtype, x.shape, x.ndim - 1)
    for k in range(indices.shape[-1]):
        x = jnp.where(classes == indices[..., k, None], values[..., k, None], x)
    return x


FEW = 4


def scattered(x: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    """Returns what `put_at` does, in place of x if it can be."""
    # The scatter's transpose needs distinct indices: repeats go out of range and are dropped.
    out_of_range = x.shape[-1] + jnp.arange(indices.shape[-1])
    indices = jnp.where(is_repeated(indices), out_of_range, indices)
    return x.at[rows_and(indices)].set(values, mode="drop", unique_indices=True)


def at_distinct(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns x[..., indices_k], with −inf in the place of an index that was there before."""
    return jnp.where(is_repeated(indices), -jnp.inf, at_classes(x, indices))


def is_repeated(indices: jax.Array) -> jax.Array:
    """Returns where an index [..., K] is one of those before it too."""
    if indices.shape[-1] < 2:
        return jnp.zeros(indices.shape, bool)
    order = jnp.arange(indices.shape[-1])
    same = indices[..., :, None] == indices[..., None, :]
    return (same & (order[:, None] > order)).any(-1)


def rows_and(indices: jax.Array) -> tuple[jax.Array, ...]:
    """Returns what indexes the classes `indices` [..., K] of an array [..., V]."""
    rows = jnp.meshgrid(*map(jnp.arange, indices.shape), indexing="ij", sparse=True)[:-1]
    return (*rows, indices)


def flattened(targets: jax.Array | SparseTargets) -> jax.Array | SparseTargets:
    """Returns targets with one axis of examples."""
    axes = len(_targets.batch_of(targets))
    size = math.prod(_targets.batch_of(targets))

    return _targets.map_examples(lambda x: x.reshape(size, *x.shape[axes:]), targets)


def rows_of(tree: Any, first: jax.typing.ArrayLike, size: int) -> Any:
    """Returns rows [first, first + size) of the arrays and flat targets of `tree`."""

    def cut(x):
        if isinstance(x, SparseTargets):
            return _targets.map_examples(cut, x)
        if x.shape[0] == size:
            return x
        return jax.lax.dynamic_slice_in_dim(x, first, size, 0)

    return jax.tree.map(cut, tree, is_leaf=lambda x: isinstance(x, SparseTargets))


def heaviest_class(targets: jax.Array | SparseTargets, num_classes: int) -> jax.Array:
    """Returns the class of the largest mass, int32[...]: for labels, the label itself.

    Of sparse targets it is one of the K, or 0 where there is none.
    """
    if not isinstance(targets, SparseTargets):
        return jnp.argmax(targets, axis=-1).astype(jnp.int32)
    if targets.indices.shape[-1] == 0:
        return jnp.zeros(_targets.batch_of(targets), jnp.int32)
    best = jnp.argmax(mass_at(targets, targets.indices, num_classes), axis=-1)
    return at_classes(targets.indices, best[..., None])[..., 0]


def targets_of_block(
    targets: jax.Array | SparseTargets,
    start: jax.typing.ArrayLike,
    size: int,
    num_classes: int,
) -> jax.Array | SparseTargets:
    """Returns the mass on the classes [start, start + size) as targets of those classes alone.

    Blocks that cut [0, num_classes) up hold all the mass between them, each part once. Sparse
    indices must be valid, as `invalid_as_nan` leaves them.

    Args:
      targets: Dense [..., V], or SparseTargets.
      start: The block's first class, an int32 scalar that may be traced.
      size: How many classes; start + size ≤ V.
      num_classes: V.
    """
    if not isinstance(targets, SparseTargets):
        return jax.lax.dynamic_slice_in_dim(targets, start, size, axis=-1)
    indices = targets.indices - start
    inside = _targets.is_valid(indices, size)
    mass, background = targets.background_mass, targets.background
    if mass is not None and background is None:
        mass = mass * (size / num_classes)
    elif background is not None:
        background = jax.lax.dynamic_slice_in_dim(background, start, size, axis=-1)
    weights = jnp.where(inside, targets.weights, 0)
    return SparseTargets(jnp.clip(indices, 0, size - 1), weights, mass, background, size)


def targets_of_shard(
    targets: jax.Array | SparseTargets, axes: tuple[Hashable, ...], size: int
) -> jax.Array | SparseTargets:
    """Returns the mass on this device's `size` classes as targets of those classes alone.

    Sparse targets are of all classes, their indices valid; dense ones are this device's already.
    """
    if not isinstance(targets, SparseTargets):
        return targets
    start, shards = jax.lax.axis_index(axes) * size, jax.lax.axis_size(axes)
    return targets_of_block(targets, start, size, shards * size)
