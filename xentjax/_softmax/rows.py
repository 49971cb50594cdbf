"""A few rows of logits at a time: what fits a CPU's cache is read from memory once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# So many logits, 2 MiB of float32, are at home in a core's second-level cache. Of fewer than LARGE,
# 32 MiB, a copy does no harm.
CACHED, LARGE = 2**19, 2**23


def in_pieces(function: Callable[[Any, int], Any], size: int, width: int, like: jax.Array) -> Any:
    """Returns function(0, size), of which as few rows are made at a time as fit the cache.

    Args:
      function: function(first, count) returns arrays [count], of rows [first, first + count).
      size: How many rows there are.
      width: How many numbers are needed of each.
      like: An array [size] that varies over the same mesh axes as the result.
    """
    rows = max(1, CACHED // width)
    if rows >= size:
        return function(0, size)

    def step(i, out):
        # A last step that would reach past the end starts early, and repeats some rows.
        first = jnp.minimum(i * rows, size - rows)
        return jax.tree.map(
            lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, first, 0),
            out,
            function(first, rows),
        )

    shapes = jax.eval_shape(lambda: function(0, rows))
    out = jax.tree.map(lambda part: jnp.zeros_like(like, part.dtype), shapes)
    return jax.lax.fori_loop(0, -(-size // rows), step, out)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def slice_unconverted(x: jax.Array, start: jax.typing.ArrayLike, size: int, axis: int) -> jax.Array:
    """Returns [start, start + size) of an axis of x, for a loop that slices nothing else of x.

    It slices bits, not numbers: XLA's CPU backend computes in float32, and would convert all of a
    bfloat16 x before the loop, but a conversion of numbers cannot be moved past this.
    """
    x, start = jax.lax.optimization_barrier((x, start))
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.dynamic_slice_in_dim(bits, start, size, axis)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@slice_unconverted.defjvp
def _slice_jvp(size, axis, primals, tangents):
    (x, start), (tangent, _) = primals, tangents
    change = jax.lax.dynamic_slice_in_dim(tangent, start, size, axis)
    return slice_unconverted(x, start, size, axis), change
