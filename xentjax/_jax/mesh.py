"""The axes of a mesh: their names, and the arrays that vary along them."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from xentjax._jax import checks

AxisName = Hashable | Sequence[Hashable]
"""A mesh axis, or several."""


def axis_names(axis_name: AxisName) -> tuple[Hashable, ...]:
    """Returns one or several axes as a tuple."""
    return tuple(axis_name) if isinstance(axis_name, list | tuple) else (axis_name,)


def mapped_axes(axis_name: AxisName) -> tuple[Hashable, ...]:
    """Returns axes as a tuple; raises ValueError unless a map around the caller has each."""
    axes = axis_names(axis_name)
    try:
        for name in axes:
            jax.lax.axis_index(name)
    except (NameError, TypeError):
        expected = "axis_name: expected axes of a jax.vmap, jax.pmap or jax.shard_map around"
        raise ValueError(f"{expected}, got {axis_name!r}") from None
    return axes


def varying_axes(tree: Any) -> frozenset[Hashable]:
    """Returns the mesh axes along which devices may have different values of some array."""
    return frozenset().union(*map(_varying_axes, jax.tree.leaves(tree)))


def _varying_axes(x: jax.Array) -> frozenset[Hashable]:
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return getattr(aval, "vma", frozenset()) if kind is None else kind.varying


def varying(tree: Any, axes: Iterable[Hashable]) -> Any:
    """Returns arrays as each device's own, not ones that the devices along `axes` share.

    Their gradients are then summed over these devices: that is the transpose.
    """

    def cast(x):
        shared = _ordered(set(axes) - varying_axes(x))
        if not shared:
            return x
        return jax.lax.pcast(x, shared, to="varying")

    return jax.tree.map(cast, tree)


def psum(x: jax.Array, axes: Iterable[Hashable]) -> jax.Array:
    """Returns the sum of x over the devices along `axes`, of which there may be none."""
    names = _ordered(axes)
    return jax.lax.psum(x, names) if names else x


def is_first_largest(x: jax.Array, axes: tuple[Hashable, ...]) -> jax.Array:
    """Returns where this device's x is the largest along `axes`, and the first of several."""
    index = jax.lax.axis_index(axes)
    none = jnp.asarray(jax.lax.axis_size(axes), index.dtype)
    first = jax.lax.pmin(jnp.where(x == jax.lax.pmax(x, axes), index, none), axes)
    return first == index


def _ordered(axes: Iterable[Hashable]) -> tuple[Hashable, ...]:
    """Returns axes in an order that all hosts agree on, as a set's is not."""
    return tuple(sorted(axes, key=str))


def on_automatic_axes(
    function: Callable[..., Any], array: jax.Array, reduced: Sequence[int], *others: Any
) -> Callable[..., Any]:
    """Returns `function`, on automatic mesh axes where an argument is split over explicit ones.

    All it returns is split as `array` is, without the axes `reduced`. `others` are trees of the
    other arguments.
    """
    shardings = [jax.typeof(x).sharding for x in (array, *jax.tree.leaves(others))]
    explicit = [s.mesh for s in shardings if AxisType.Explicit in s.mesh.axis_types]
    if not explicit:
        return function
    spec = shardings[0].spec if AxisType.Explicit in shardings[0].mesh.axis_types else ()
    kept = [names for axis, names in enumerate(spec) if axis not in reduced]
    return jax.sharding.auto_axes(function, out_sharding=NamedSharding(explicit[0], P(*kept)))


def check_shards(name: str, x: jax.Array, axes: tuple[Hashable, ...]) -> None:
    """Raises ValueError unless each device along `axes` has an `x` of its own."""
    checks.check(
        varying_axes(jax.lax.axis_index(axes)).issuperset(axes),
        f"axis_name: expected axes of a jax.shard_map with check_vma=True, got {axes}",
    )
    checks.check(
        varying_axes(x).issuperset(axes),
        f"{name}: expected a shard of the classes for each device along {axes}, got an array that "
        "is the same on all",
    )
