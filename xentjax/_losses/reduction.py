"""Means that stay right: over masks, weights, microbatches, evaluation sets and devices."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import arithmetic, checks, value_checks
from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide_dtype
from xentjax._losses import arguments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedSum:
    """A weighted mean before its division: parts add, the whole divides once.

    mean = total / weight = Σ w · loss / Σ w

    A pytree. Add the parts of microbatches, `psum` those of devices, then take `mean`. The mean of
    the parts' means is another number whenever their weights differ. Each sum keeps its rounding
    errors beside it, so that float32 does not stop growing: 10¹⁰ losses added one by one have their
    mean to 1e-6.

    Attributes:
      total: Σ w · loss, in nats, float[...].
      weight: Σ w, of the shape and dtype of total.
      total_errors: Parts of the total that rounding left out, each smaller than the one before it.
      weight_errors: The same for the weight.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> a = xentjax.weighted_sum(jnp.array([3.0, 9.0]))
      >>> b = xentjax.weighted_sum(jnp.array([12.0, 0.0]), where=jnp.array([True, False]))
      >>> print((a + b).mean(), (a.mean() + b.mean()) / 2)
      8.0 9.0
    """

    total: Float[Array, "*batch"]
    weight: Float[Array, "*batch"]
    # 72 bits in float32: with 48, one loss added 10¹⁰ times may be off by 1e-5.
    total_errors: tuple[Float[Array, "*batch"], ...] = dataclasses.field(default=(), repr=False)
    weight_errors: tuple[Float[Array, "*batch"], ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Makes arrays of the sums, and errors of 0, where a caller gave the sums alone."""
        if self.total_errors or self.weight_errors:
            return
        total = arguments.as_wide("total", self.total)
        weight = checks.as_array("weight", self.weight)
        _check_weights("weight", weight, total.shape, "that of total")
        none = (jnp.zeros_like(total), jnp.zeros_like(total))
        object.__setattr__(self, "total", total)
        object.__setattr__(self, "weight", weight.astype(total.dtype))
        object.__setattr__(self, "total_errors", none)
        object.__setattr__(self, "weight_errors", none)

    @classmethod
    def zero(cls, dtype: jax.typing.DTypeLike = jnp.float32) -> "WeightedSum":
        """Returns the sum of nothing, to start an accumulation from."""
        return cls(jnp.zeros((), dtype), jnp.zeros((), dtype))

    def __add__(self, other: Any) -> "WeightedSum":
        if not isinstance(other, WeightedSum):
            return NotImplemented
        return _add(self, other)

    def __radd__(self, other: Any) -> "WeightedSum":
        """Adds the 0 from which the built-in `sum` starts."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def psum(self, axis_name: Hashable | Sequence[Hashable]) -> "WeightedSum":
        """Returns the sum over the devices (or vmap lanes) of `axis_name`."""
        axes = meshes.mapped_axes(axis_name)
        summed = jax.tree.map(lambda x: jax.lax.psum(x, axes), self)
        return summed + jax.tree.map(jnp.zeros_like, summed)  # Parts in their order again.

    def mean(self) -> Float[Array, "*batch"]:
        """Returns total / weight; 0, with zero gradient, where the weight is 0."""
        empty = self.weight == 0
        mean = arithmetic.quotient(
            jnp.where(empty, 0, self.total), jnp.where(empty, 1, self.weight)
        )
        return jnp.where(empty, 0, mean)


@jax.jit
def _add(a: WeightedSum, b: WeightedSum) -> WeightedSum:
    dtype = wide_dtype(a.total.dtype, b.total.dtype)
    a, b = jax.tree.map(lambda x: x.astype(dtype), (a, b))
    total, *total_errors = arithmetic.add_expansions(
        (a.total, *a.total_errors), (b.total, *b.total_errors)
    )
    weight, *weight_errors = arithmetic.add_expansions(
        (a.weight, *a.weight_errors), (b.weight, *b.weight_errors)
    )
    return WeightedSum(total, weight, tuple(total_errors), tuple(weight_errors))


def weighted_sum(
    losses: ArrayLike,
    *,
    axis: int | Sequence[int] | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> WeightedSum:
    """Sums losses and their weights.

    (total, weight) = (Σ w · loss, Σ w)   over the losses that `where` keeps, with 0 · ∞ = 0

    Args:
      losses: Nats, float[...].
      axis: The axes to sum over; None is all of them.
      where: Which to keep, bool of the shape of losses; None keeps all.
      weights: w, float, int (counts) or bool of the shape of losses; None is 1 each.

    Returns:
      A WeightedSum of the losses' shape without `axis`, float32 (float64 for float64 losses). A
      NaN loss stays NaN whatever its weight, unless `where` drops it.

    Raises:
      ValueError: A shape differs from that of losses, or the axis does not fit.
      TypeError: losses are not floating-point, weights are complex, or where is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> s = xentjax.weighted_sum(jnp.array([1.0, 2.0]), weights=jnp.array([3, 1]))
      >>> print(s.total, s.weight)
      5.0 4.0
    """
    losses = arguments.as_wide("losses", losses)
    axes = tuple(range(losses.ndim)) if axis is None else checks.canonical_axes(axis, losses.ndim)
    weights = jnp.ones_like(losses) if weights is None else checks.as_array("weights", weights)
    _check_weights("weights", weights, losses.shape, "that of losses")
    if where is not None:
        where = checks.as_array("where", where, "a bool array")
        checks.check_bool("where", where)
        checks.check_shape("where", where, losses.shape, "that of losses")
    value_checks.check_masses("weights", weights, where)
    return _weighted_sum(losses, weights.astype(losses.dtype), where, axes)


@functools.partial(jax.jit, static_argnames="axes")
def _weighted_sum(losses, weights, where, axes):
    if where is not None:
        losses, weights = jnp.where(where, losses, 0), jnp.where(where, weights, 0)
    losses = jnp.where((weights == 0) & jnp.isinf(losses), 0, losses)  # 0 · ∞ = 0.
    return WeightedSum(jnp.sum(weights * losses, axes), jnp.sum(weights, axes))


def weighted_mean(
    losses: ArrayLike,
    *,
    axis: int | Sequence[int] | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: Hashable | Sequence[Hashable] | None = None,
) -> Float[Array, "*batch"]:
    """Weighted mean of losses, over every device where axes are named.

    mean = Σ w · loss / Σ w   over the losses that `where` keeps; 0 if it keeps none

    Args:
      losses: Nats, float[...].
      axis: The axes to take the mean over, such as a sequence's or an image's; None is all.
      where: Which to keep, bool of the shape of losses; None keeps all. A dropped loss gets the
        cotangent 0. Losses from logits turn that into the gradient 0 even where the loss is NaN
        (an ignored label outside [0, V), say); any other function makes 0 · NaN = NaN of it, and
        needs the same `where` itself.
      weights: w, float, int (counts) or bool of the shape of losses; None is 1 each.
      axis_name: Mapped axes to sum over too, inside vmap, pmap or shard_map.

    Returns:
      Means in nats, of the losses' shape without `axis`, float32 (float64 for float64 losses).

    Raises:
      ValueError: A shape differs from that of losses, the axis does not fit, or no map around the
        call has `axis_name`.
      TypeError: losses are not floating-point, weights are complex, or where is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> losses, where = jnp.array([[1.0, 2.0], [4.0, 9.0]]), jnp.array([[1, 1], [1, 0]]) == 1
      >>> print(xentjax.weighted_mean(losses, where=where).round(4))
      2.3333
      >>> print(xentjax.weighted_mean(losses, where=where, axis=-1))
      [1.5 4. ]
    """
    parts = weighted_sum(losses, axis=axis, where=where, weights=weights)
    return (parts if axis_name is None else parts.psum(axis_name)).mean()


def _check_weights(name: str, weights: jax.Array, shape: tuple[int, ...], why: str) -> None:
    """Raises unless `weights` are real numbers of `shape`."""
    checks.check(
        not jnp.issubdtype(weights.dtype, jnp.complexfloating),
        f"{name}: expected float, int or bool weights, got {checks.describe(weights)}",
        TypeError,
    )
    checks.check_shape(name, weights, shape, why)
