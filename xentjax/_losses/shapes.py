"""Shapes of a loss: famous losses that are functions of the cross-entropy itself.

The loss −log p of a hard label tells its probability: p = exp(−loss), and 1 − p = −expm1(−loss) is
exact where p is near 1. So a shape may follow the softmax, the sigmoid, the fused head and split
classes alike, and differentiates as it stands.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._losses import arguments
from xentjax._targets.transforms import as_number


def focal(losses: ArrayLike, gamma: ArrayLike) -> Float[Array, "*shape"]:
    """Focal loss: a loss that counts less the more probable its label is already.

    focal = (1 − p)^γ · loss,   p = exp(−loss)

    Near loss 0 it is loss^(γ + 1). Its first derivative there is 0 for every γ > 0; its second is
    infinite for γ between 0 and 1, and so is a Hessian. For class weights α multiply the result:
    `alpha[labels] * focal(losses, gamma)`.

    Args:
      losses: Cross-entropies of hard labels in nats, ≥ 0, before any weights: float[...].
      gamma: γ ≥ 0, a scalar or one for each loss; 0 changes nothing, 2 is usual.

    Returns:
      Losses, of the shape of losses, float32 (float64 for float64).

    Raises:
      TypeError: losses are not floating-point, or gamma is not a real number.
      ValueError: gamma is negative, or of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> losses = xentjax.softmax_cross_entropy(jnp.array([[2.0, 0.0]] * 2), jnp.array([0, 1]))
      >>> print(losses.round(4), xentjax.focal(losses, 2.0).round(4))
      [0.1269 2.1269] [0.0018 1.6501]

    Source:
      Lin et al., Focal Loss for Dense Object Detection, 2017, equation 4.
    """
    losses = arguments.as_wide("losses", losses)
    gamma = jnp.asarray(as_number("gamma", gamma, 0, math.inf, losses.shape), losses.dtype)
    return _focal(losses, gamma)


def poly1(losses: ArrayLike, epsilon: ArrayLike) -> Float[Array, "*shape"]:
    """Poly-1 loss: cross-entropy with more, or less, of the first term of its series in 1 − p.

    poly1 = loss + ε · (1 − p),   p = exp(−loss) = 1 − (1 − p)

    Args:
      losses: Cross-entropies of hard labels in nats, ≥ 0, before any weights: float[...].
      epsilon: ε ≥ −1, a scalar or one for each loss; 0 changes nothing.

    Returns:
      Losses, of the shape of losses, float32 (float64 for float64).

    Raises:
      TypeError: losses are not floating-point, or epsilon is not a real number.
      ValueError: epsilon is below −1, or of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.poly1(jnp.log(jnp.array([1.0, 2.0, 4.0])), 2.0).round(4))
      [0.     1.6931 2.8863]

    Source:
      Leng et al., PolyLoss, 2022, equation 6.
    """
    losses = arguments.as_wide("losses", losses)
    epsilon = jnp.asarray(as_number("epsilon", epsilon, -1, math.inf, losses.shape), losses.dtype)
    return losses + epsilon * improbability(losses)


def generalized(losses: ArrayLike, q: ArrayLike) -> Float[Array, "*shape"]:
    """Generalised cross-entropy: between cross-entropy and 1 − p, and robust to wrong labels.

    generalized = (1 − p^q) / q,   p = exp(−loss)

    As q goes to 0 it is the loss itself; q = 1 is 1 − p, half the mean absolute error of p.

    Args:
      losses: Cross-entropies of hard labels in nats, ≥ 0, before any weights: float[...].
      q: In [0, 1], a scalar or one for each loss; 0.7 is usual.

    Returns:
      Losses in [0, 1 / q], of the shape of losses, float32 (float64 for float64).

    Raises:
      TypeError: losses are not floating-point, or q is not a real number.
      ValueError: q is not in [0, 1], or of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.generalized(jnp.log(jnp.array([1.0, 2.0, jnp.inf])), 0.5).round(4))
      [0.     0.5858 2.    ]

    Source:
      Zhang and Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy
      Labels, 2018, equation 6.
    """
    losses = arguments.as_wide("losses", losses)
    q = jnp.asarray(as_number("q", q, 0, 1, losses.shape), losses.dtype)
    return _generalized(losses, q)


def keep_nan(shape: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns a shape of losses that takes NaN to NaN with the slope 1.

    A loss that only the mean masks has no gradient then: 0 · NaN would be NaN.
    """

    @functools.wraps(shape)
    def shaped(losses, *numbers):
        is_nan = jnp.isnan(losses)
        return jnp.where(is_nan, losses, shape(jnp.where(is_nan, 1, losses), *numbers))

    return shaped


@jax.jit
@keep_nan
def improbability(losses: jax.Array) -> jax.Array:
    """Returns 1 − exp(−loss), exact where the loss is small, and so are its derivatives."""
    near, small, far = _parts(losses)
    return jnp.where(near, small * _rate(small), 1 - jnp.exp(-far))


@jax.jit
@keep_nan
def _focal(losses, gamma):
    """Returns loss^(γ + 1) · ((1 − p) / loss)^γ, or (1 − p)^γ · loss where the loss is large.

    The former has the derivatives that exist at 0; 0 · ∞ would be made of the latter's.
    """
    changes = (losses < 1e4) & (gamma > 0)  # Beyond, p is 0 as a float64 too.
    near, small, far = _parts(jnp.where(changes, losses, 1))
    gamma = jnp.where(changes, gamma, 1)
    close = small ** (gamma + 1) * _rate(small) ** gamma
    shaped = jnp.where(near, close, (1 - jnp.exp(-far)) ** gamma * far)
    return jnp.where(changes, shaped, losses)


@jax.jit
@keep_nan
def _generalized(losses, q):
    """Returns loss · (1 − p^q) / (q · loss), or (1 − p^q) / q where q · loss is large."""
    is_finite = losses != jnp.inf
    limit = jnp.where(q > 0, 1 / jnp.where(q > 0, q, 1), losses)
    loss = jnp.where(is_finite, losses, 1)
    near, small, far = _parts(q * loss)
    shaped = jnp.where(near, loss * _rate(small), (1 - jnp.exp(-far)) / jnp.where(near, 1, q))
    return jnp.where(is_finite, shaped, limit)


def _parts(x):
    """Returns (where x < 1, x or 0 elsewhere, x or 1 elsewhere)."""
    near = x < 1
    return near, jnp.where(near, x, 0), jnp.where(near, 1, x)


def _rate(x):
    """Returns (1 − exp(−x)) / x for 0 ≤ x < 1: 1 − x/2 · (1 − x/3 · (1 − x/4 · (…)))."""
    series = jnp.ones_like(x)
    for n in range(24 if x.dtype == jnp.float64 else 14, 1, -1):
        series = 1 - x / n * series
    return series
