"""Elementwise functions of logits: a soft cap, a temperature, or one's own."""

from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from xentjax._jax import checks
from xentjax._jax import mesh as _mesh

LogitTransform = Callable[[jax.Array], jax.Array]
"""An elementwise function of logits."""


def soft_cap(cap: ArrayLike) -> LogitTransform:
    """Returns the logit transform that keeps logits within (−cap, cap).

    z -> cap · tanh(z / cap)

    Args:
      cap: A positive scalar; it may be traced and differentiated.

    Returns:
      An elementwise function of logits.

    Raises:
      ValueError: cap is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.soft_cap(30.0)(jnp.array([0.0, 30.0, 1000.0])).round(2))
      [ 0.   22.85 30.  ]

    Source:
      Gemma Team, Gemma 2, 2024, section 2.
    """
    checks.check_interval("cap", cap, np.finfo(np.float64).tiny, np.inf)
    scale = jnp.asarray(cap)
    return lambda logits: scale * jnp.tanh(logits / scale)


def temperature(tau: ArrayLike) -> LogitTransform:
    """Returns the logit transform that divides by a temperature.

    z -> z / tau

    Args:
      tau: A positive scalar; it may be traced and differentiated.

    Returns:
      An elementwise function of logits.

    Raises:
      ValueError: tau is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.temperature(2.0)(jnp.array([1.0, 4.0])))
      [0.5 2. ]

    Source:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    checks.check_interval("tau", tau, np.finfo(np.float64).tiny, np.inf)
    scale = jnp.asarray(tau)
    return lambda logits: logits / scale


def converted(
    transform: LogitTransform | None, dtype: jnp.dtype, over: frozenset[Hashable]
) -> tuple[Callable[..., jax.Array], list[jax.Array], frozenset[Hashable]]:
    """Returns (function(logits [N, V], *constants), constants): what it closes over as arguments.

    The third is the mesh axes that logits vary along: `over`, and those of the constants.
    """
    if transform is None:
        return lambda logits: logits, [], over
    checks.check(
        callable(transform), f"logit_transform: expected a function, got {transform!r}", TypeError
    )
    example = jax.ShapeDtypeStruct((1, 1), dtype)
    out = jax.eval_shape(transform, example)
    checks.check(
        out.shape == example.shape and out.dtype == dtype,
        f"logit_transform: expected an elementwise function, {checks.describe(example)} to the "
        f"same, got {checks.describe(out)}",
    )
    # Of one logit, then mapped over blocks of any shape.
    logit = jnp.zeros((), dtype)
    over = over | _mesh.varying_axes(jax.closure_convert(transform, logit)[1])
    function, constants = jax.closure_convert(transform, _mesh.varying(logit, over))
    for _ in range(2):
        function = jax.vmap(function, in_axes=(0, *(None for _ in constants)))
    return function, constants, over
