"""The dtype of the arithmetic: float32 at least."""

import jax
import jax.numpy as jnp


def wide_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns float64 where there is one among dtypes, and float32 elsewhere."""
    double = jnp.dtype(jnp.float64)
    return double if any(jnp.dtype(d) == double for d in dtypes) else jnp.dtype(jnp.float32)


def wide(x: jax.Array) -> jax.Array:
    """Returns x in the dtype of the arithmetic."""
    return x.astype(wide_dtype(x.dtype))
