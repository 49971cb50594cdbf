"""The front door: arguments of every loss from logits become checked arrays and target masses."""

import functools
import math
import numbers
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike

from xentjax._jax import checks, value_checks
from xentjax._jax.dtypes import wide
from xentjax._targets import mass as masses
from xentjax._targets import types
from xentjax._targets.mass import Mass
from xentjax._targets.types import SparseTargets, Targets


def jit_unless_traced(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator: jit with static arguments, or nothing where jit is no help.

    JAX traces the value of a jitted function before its derivative, though a rule has its own. And
    a check of values inside a jitted function would be one of that function's user.
    """

    def decorator(function):
        jitted = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def either(*args, **options):
            leaves = jax.tree.leaves((args, options))
            direct = value_checks.are_on() or any(isinstance(x, Tracer) for x in leaves)
            return (function if direct else jitted)(*args, **options)

        return either

    return decorator


def as_wide(name: str, x: ArrayLike) -> jax.Array:
    """Returns probabilities, losses or other floats as an array in the dtype of the arithmetic."""
    x = checks.as_array(name, x)
    checks.check_floating(name, x)
    return wide(x)


def in_base(nats: jax.Array, base: float | None) -> jax.Array:
    """Returns nats in units of log(base)."""
    if base is None:
        return nats
    wanted = f"base: expected a positive number other than 1, got {base!r}"
    checks.check(isinstance(base, numbers.Real), wanted, TypeError)
    checks.check(0 < base < math.inf and base != 1, wanted)
    return nats / math.log(base)


def as_logits(
    name: str, logits: ArrayLike, axis: int | Sequence[int]
) -> tuple[jax.Array, tuple[int, ...]]:
    """Returns logits as an array, and `axis` as a tuple of the axes of at least one class."""
    logits = checks.as_array(name, logits)
    checks.check_floating(name, logits)
    axes = checks.canonical_axes(axis, logits.ndim)
    for a in axes:
        checks.check_known(name, logits.shape[a], "classes")
    checks.check(
        all(logits.shape[a] > 0 for a in axes),
        f"{name}: expected at least one class along axis {axis}, got {checks.describe(logits)}",
    )
    return logits, axes


def classes_last(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns x with `axes` moved to the end, in their order, and flattened into one."""
    batch = [a for a in range(x.ndim) if a not in axes]
    num_classes = math.prod(x.shape[a] for a in axes)
    return x.transpose(*batch, *axes).reshape(*(x.shape[a] for a in batch), num_classes)


def classes_back(x: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """Undoes `classes_last` of an array of `shape`."""
    order = [a for a in range(len(shape)) if a not in axes] + list(axes)
    return x.reshape([shape[a] for a in order]).transpose(np.argsort(order))


def masked_logits(
    logits: jax.Array, where: ArrayLike | None, axes: tuple[int, ...], classes: str = "classes"
) -> tuple[jax.Array, jax.Array | None]:
    """Returns (logits [..., V], mask of examples or None).

    A class that is masked has z = −inf. An example with no class left is masked out.
    """
    shape = logits.shape
    logits = classes_last(logits, axes)
    if where is None:
        value_checks.check_logits(logits, None)
        return logits, None
    where = checks.as_mask(where, logits.shape[:-1], shape, classes)
    if where.shape != shape:
        value_checks.check_logits(logits, where)
        return logits, where
    keep = classes_last(where, axes)
    value_checks.check_logits(logits, keep)
    return jnp.where(keep, logits, jnp.full_like(logits, -jnp.inf)), keep.any(-1)


def as_mass(
    targets: Targets,
    logits_shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    mask: jax.Array | None,
    *,
    axes: tuple[int, ...] | None = None,
    mesh_axes: tuple[Hashable, ...] = (),
) -> Mass:
    """Returns the mass of targets for logits [..., V] of a shape, in the dtype of the arithmetic.

    Dense mass is on the classes of the logits, and sparse mass on those of all devices.

    Args:
      targets: As the user gave them.
      logits_shape: The shape of the logits, as the user gave them.
      dtype: That of the arithmetic.
      mask: Examples to keep, [...].
      axes: The class axes of the logits, as the user chose them; None is the last, without a
        choice.
      mesh_axes: Axes of a mesh that the classes, and those of dense targets, are split over.
    """
    # Who cannot choose the class axis gets no hint that another one would fit.
    shape_of_hint = None if axes is None else logits_shape
    axes = (len(logits_shape) - 1,) if axes is None else axes
    batch = tuple(n for a, n in enumerate(logits_shape) if a not in axes)
    size = math.prod(logits_shape[a] for a in axes)
    num_classes = size * (jax.lax.axis_size(mesh_axes) if mesh_axes else 1)
    targets = types.as_targets(targets)
    if not isinstance(targets, SparseTargets):
        fits = "dense targets: that of the logits"
        checks.check_shape("targets", targets, logits_shape, fits)
        dense = classes_last(targets, axes)
        value_checks.check_masses("targets", dense, mask)
        return masses.mass_of(dense, size, dtype, mask)
    types.check_targets(targets, batch, num_classes, shape_of_hint)
    value_checks.check_labels(targets.indices, num_classes, mask)
    _check_sparse_masses(targets, mask)
    return masses.mass_of(targets, num_classes, dtype, mask)


def on_shard(mass: Mass, size: int, mesh_axes: tuple[Hashable, ...]) -> Mass:
    """Returns the mass on the `size` classes of this device; only sparse mass is on others too."""
    if not mesh_axes or not isinstance(mass, masses.SparseMass):
        return mass
    return mass.block(jax.lax.axis_index(mesh_axes) * size, size)


def _check_sparse_masses(targets: SparseTargets, mask: jax.Array | None) -> None:
    """Under `value_checks`, checks that no mass is negative or NaN, but for examples masked out."""
    for name in ("weights", "background_mass"):
        x = getattr(targets, name)
        if x is not None:
            value_checks.check_masses(f"targets.{name}", x, mask)
    if targets.background is not None:
        value_checks.check_masses("targets.background", targets.background)


def as_arrays(targets: Targets) -> Targets:
    """Returns targets of arrays, which can go through `jax.jit`."""
    if isinstance(targets, SparseTargets):
        return types.as_targets(targets)
    return types.as_classes("targets", targets)
