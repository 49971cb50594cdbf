"""Means that stay right: over masks, weights, microbatches, evaluation sets and devices."""

import dataclasses
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import checks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedSum:
    """A weighted mean before its division: parts add, the whole divides once.

    mean = total / weight = Σ w · loss / Σ w

    A pytree. Add the parts of microbatches, `psum` those of devices, then take `mean`. The mean of
    the parts' means is another number whenever their weights differ.

    Attributes:
      total: Σ w · loss, a float scalar in nats.
      weight: Σ w, a float scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> a = xentjax.weighted_sum(jnp.array([3.0, 9.0]))
      >>> b = xentjax.weighted_sum(jnp.array([12.0, 0.0]), where=jnp.array([True, False]))
      >>> print((a + b).mean(), (a.mean() + b.mean()) / 2)
      8.0 9.0
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @classmethod
    def zero(cls, dtype: jax.typing.DTypeLike = jnp.float32) -> "WeightedSum":
        """Returns the sum of nothing, to start an accumulation from."""
        return cls(jnp.zeros((), dtype), jnp.zeros((), dtype))

    def __add__(self, other: "WeightedSum") -> "WeightedSum":
        if not isinstance(other, WeightedSum):
            return NotImplemented
        return WeightedSum(self.total + other.total, self.weight + other.weight)

    def psum(self, axis_name: Hashable | Sequence[Hashable]) -> "WeightedSum":
        """Returns the sum over the devices (or vmap lanes) of `axis_name`."""
        return jax.tree.map(lambda x: jax.lax.psum(x, axis_name), self)

    def mean(self) -> Float[Array, ""]:
        """Returns total / weight; 0, with zero gradient, where the weight is 0."""
        empty = self.weight == 0
        return jnp.where(empty, 0, self.total / jnp.where(empty, 1, self.weight))


def weighted_sum(
    losses: ArrayLike, *, where: ArrayLike | None = None, weights: ArrayLike | None = None
) -> WeightedSum:
    """Sums losses and their weights.

    (total, weight) = (Σ w · loss, Σ w)   over the losses that `where` keeps

    Args:
      losses: Nats, float[...].
      where: Which to keep, bool of the shape of losses; None keeps all.
      weights: w, float of the shape of losses; None is 1 each.

    Returns:
      A WeightedSum of scalars, float32 (float64 for float64 losses).

    Raises:
      ValueError: A shape differs from that of losses.
      TypeError: losses or weights are not floating-point, or where is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> s = xentjax.weighted_sum(jnp.array([1.0, 2.0]), weights=jnp.array([3.0, 1.0]))
      >>> print(s.total, s.weight)
      5.0 4.0
    """
    losses = checks.as_array("losses", losses)
    checks.check_floating("losses", losses)
    losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
    if weights is None:
        weights = jnp.ones_like(losses)
    weights = checks.as_array("weights", weights)
    checks.check_floating("weights", weights)
    checks.check_shape("weights", weights, losses.shape, "that of losses")
    if where is not None:
        where = checks.as_array("where", where, "a bool array")
        checks.check_bool("where", where)
        checks.check_shape("where", where, losses.shape, "that of losses")
        losses, weights = jnp.where(where, losses, 0), jnp.where(where, weights, 0)
    return WeightedSum(jnp.sum(weights * losses), jnp.sum(weights, dtype=losses.dtype))


def weighted_mean(
    losses: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: Hashable | Sequence[Hashable] | None = None,
) -> Float[Array, ""]:
    """Weighted mean of losses, over every device where axes are named.

    mean = Σ w · loss / Σ w   over the losses that `where` keeps; 0 if it keeps none

    Give the same `where` to the loss as well: a row that is NaN there (an ignored label outside
    [0, V), say) has a NaN derivative, which no mask after it can undo.

    Args:
      losses: Nats, float[...].
      where: Which to keep, bool of the shape of losses; None keeps all.
      weights: w, float of the shape of losses; None is 1 each.
      axis_name: Mapped axes to sum over too, inside vmap, pmap or shard_map.

    Returns:
      The mean in nats, a scalar, float32 (float64 for float64 losses).

    Raises:
      ValueError: A shape differs from that of losses.
      TypeError: losses or weights are not floating-point, or where is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> where = jnp.array([True, True, False])
      >>> print(xentjax.weighted_mean(jnp.array([1.0, 2.0, 9.0]), where=where))
      1.5
    """
    parts = weighted_sum(losses, where=where, weights=weights)
    return (parts if axis_name is None else parts.psum(axis_name)).mean()
