"""Targets of yes or no: smoothing, and weights from counts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import checks, value_checks
from xentjax._jax.dtypes import wide_dtype
from xentjax._targets.transforms import as_number
from xentjax._targets.types import SparseTargets


def smooth_binary_labels(targets: ArrayLike, alpha: ArrayLike) -> Float[Array, "*shape"]:
    """Moves yes and no a little towards each other: label smoothing of binary targets.

    t' = (1 − alpha) · t + alpha / 2

    Each element is a yes or a no of its own, whatever the shape: for the binary and multi-label
    losses. `smooth_labels` is for one class out of many, and spreads alpha over all of them.

    Args:
      targets: t, the probability of yes in [0, 1]: float, bool or int, of any shape. Others count
        as they are; `value_checks` turns them into an error.
      alpha: The share of the fair coin, a scalar in [0, 1].

    Returns:
      Targets of the same shape: float64 for float64, float32 for other floats, and JAX's default
      dtype for bool and int.

    Raises:
      ValueError: alpha is not a scalar in [0, 1].
      TypeError: alpha is not a real number, or targets are no such array.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.smooth_binary_labels(jnp.array([[1, 0, 1]]), 0.2))
      [[0.9 0.1 0.9]]

    Source:
      Müller et al., When Does Label Smoothing Help?, 2019, section 1, for two classes.
    """
    expected = "targets: expected a float, bool or int array of yes or no"
    checks.check(not isinstance(targets, SparseTargets), f"{expected}, got {targets!r}", TypeError)
    targets = checks.as_array("targets", targets, "a float, bool or int array of yes or no")
    kind = targets.dtype
    if jnp.issubdtype(kind, jnp.floating):
        checks.check_floating("targets", targets)
    else:
        is_real = kind == jnp.bool_ or jnp.issubdtype(kind, jnp.integer)
        checks.check(is_real, f"{expected}, got {checks.describe(targets)}", TypeError)
    value_checks.check_probabilities("targets", targets, None)
    alpha = as_number("alpha", alpha, 0, 1)
    dtype = wide_dtype(kind if jnp.issubdtype(kind, jnp.floating) else jnp.result_type(float))
    return _smooth(targets.astype(dtype), jnp.asarray(alpha, dtype))


@jax.jit
def _smooth(targets, alpha):
    return (1 - alpha) * targets + alpha / 2
