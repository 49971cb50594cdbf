"""Class weights from counts."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import checks
from xentjax._jax.dtypes import wide_dtype
from xentjax._targets.transforms import as_number


def class_balanced_weights(counts: ArrayLike, beta: ArrayLike) -> Float[Array, " v"]:
    """Class weights from counts: the inverse of the effective number of examples of each class.

    w_v ∝ (1 − β) / (1 − β^n_v),   Σ_v w_v = V

    β = 0 weights all classes alike, and β = 1 is the limit 1 / n_v. For `reweight_targets`, or for
    `weights=class_weights[labels]` in `weighted_mean`.

    Args:
      counts: n, how many examples each class has, int or float[V]. A class without examples has
        the weight 0, and does not count among the V.
      beta: β in [0, 1], a number; 0.999 is usual.

    Returns:
      Weights, float[V]: float64 for float64 counts, float32 for other floats, and JAX's default
      dtype for ints.

    Raises:
      TypeError: counts are no real numbers, or beta is not one.
      ValueError: counts are not [V] or negative, or beta is not in [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.class_balanced_weights(jnp.array([900, 100, 10]), 0.99).round(3))
      [0.23  0.363 2.407]

    Source:
      Cui et al., Class-Balanced Loss Based on Effective Number of Samples, 2019, equation 3.
    """
    counts = checks.as_array("counts", counts, "int or float[V]")
    is_floating = jnp.issubdtype(counts.dtype, jnp.floating)
    checks.check(
        is_floating or jnp.issubdtype(counts.dtype, jnp.integer),
        f"counts: expected int or float[V], got {checks.describe(counts)}",
        TypeError,
    )
    if is_floating:
        checks.check_floating("counts", counts)
    checks.check(
        counts.ndim == 1 and counts.size > 0,
        f"counts: expected shape [V], got {checks.describe(counts)}",
    )
    checks.check_interval("counts", counts, 0, math.inf)
    beta = as_number("beta", beta, 0, 1)
    dtype = wide_dtype(counts.dtype if is_floating else jnp.result_type(float))
    if isinstance(beta, float):  # 1 − 0.9999 has three digits left as a float32.
        log_beta = math.log(beta) if beta > 0 else -math.inf
    else:
        log_beta = jnp.log(beta)
    return _weights(counts.astype(dtype), jnp.asarray(log_beta, dtype))


@jax.jit
def _weights(counts, log_beta):
    some = counts > 0
    n = jnp.where(some, counts, 1)
    effective = jnp.where(log_beta == 0, n, -jnp.expm1(n * log_beta))
    weights = jnp.where(some, 1 / effective, 0)
    total = weights.sum()
    num_classes = some.sum().astype(weights.dtype)
    return weights * (num_classes / jnp.where(total == 0, 1, total))
