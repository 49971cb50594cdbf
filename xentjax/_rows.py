"""A few rows of logits at a time: what fits a CPU's cache is read from memory once."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xentjax import _masses

# 2¹⁸ float32 logits are 1 MiB, a core's second-level cache. A loop gains from there on if targets
# are on all classes, which makes several such arrays, and else from where the last cache, some
# 32 MiB, ends.
CACHED, LARGE = 2**18, 2**23


def by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` of (logits, targets) as a loop over a few rows at a time.

    `function` returns arrays [...], each row's from that row alone.
    """

    def over_rows(logits, targets):
        batch, num_classes = logits.shape[:-1], logits.shape[-1]
        size = math.prod(batch)
        rows = max(1, min(size, CACHED // num_classes))
        logits = logits.reshape(size, num_classes)
        flat_targets = _masses.flattened(targets)

        def of_rows(first):
            z = slice_unconverted(logits, first, rows, 0)
            return function(z, _masses.rows_of(flat_targets, first, rows))

        def step(i, out):
            # A last step that would reach past the end starts early, and repeats some rows.
            first = jnp.minimum(i * rows, size - rows)
            return jax.tree.map(
                lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, first, 0),
                out,
                of_rows(first),
            )

        def zeros(part):  # Made of the logits, they vary over the same mesh axes.
            return jnp.zeros_like(logits[:, 0], part.dtype)

        out = jax.tree.map(zeros, jax.eval_shape(of_rows, 0))
        out = jax.lax.fori_loop(0, -(-size // rows), step, out)
        return jax.tree.map(lambda x: x.reshape(batch), out)

    return over_rows


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
