"""Margins: the loss as it is when the label's logit is lower.

With d = lse_rest − z_y the loss is log(1 + exp(d)), so that exp(d) = expm1(loss). A label's logit
that is lower by m makes log(1 + exp(d + m)) of it: a function of the loss alone, whatever softmax
the loss is from.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._losses import arguments
from xentjax._losses.shapes import keep_nan
from xentjax._targets.transforms import as_number


def additive_margin(losses: ArrayLike, margin: ArrayLike) -> Float[Array, "*batch"]:
    """The losses of labels whose logits are lower by a margin.

    loss' = log(1 + exp(margin) · expm1(loss)),   expm1(loss) = exp(lse_rest − z_y)

    It needs no logits: losses may come from `softmax_cross_entropy`, from the fused head, or from
    classes that are split over devices. CosFace is a margin of scale · m, where the logits are
    scale · cosine; ArcFace is one of `scale * angular_margin(cosines, m)`. There must be one label
    for each example, of weight 1, and no smoothing.

    Args:
      losses: In nats, float[...].
      margin: m ≥ 0, a scalar or one for each example, float[...].

    Returns:
      Losses in nats, of the shape of losses, float32 (float64 for float64 losses). Where the loss
      is 0 it is 0, with the derivative exp(margin).

    Raises:
      ValueError: margin is not of the shape of losses, or is negative or not finite.
      TypeError: losses are not floating-point, or margin is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> logits, labels = jnp.array([[4.0, 1.0, 0.0]]), jnp.array([0])
      >>> losses = xentjax.softmax_cross_entropy(logits, labels)
      >>> print(xentjax.additive_margin(losses, 2.0).round(4))
      [0.4076]
      >>> print(xentjax.softmax_cross_entropy(jnp.array([[2.0, 1.0, 0.0]]), labels).round(4))
      [0.4076]

    Source:
      Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, 2018, equation 4.
    """
    losses = arguments.as_wide("losses", losses)
    margin = as_number("margin", margin, 0, math.inf, losses.shape)
    return _additive_margin(losses, jnp.asarray(margin, losses.dtype))


def angular_margin(cosines: ArrayLike, margin: ArrayLike) -> Float[Array, "*batch"]:
    """How much lower a cosine is when its angle is larger by a margin.

    cos θ − cos(θ + m)   for θ ≤ π − m,   and m · sin m beyond, so that it is never negative

    The derivative to the cosine is infinite at θ = 0, where it is taken as 0, as it is of a cosine
    outside [−1, 1], which rounding may make.

    Args:
      cosines: cos θ of each label, float[...]; from the fused head of unit vectors they are
        (log_normalizer − loss) / scale.
      margin: m in radians, in [0, π]: a scalar or one for each example, float[...].

    Returns:
      Margins of cosines, of the shape of cosines, float32 (float64 for float64).

    Raises:
      ValueError: margin is not of the shape of cosines, or is not in [0, π].
      TypeError: cosines are not floating-point, or margin is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> cosines = jnp.cos(jnp.array([0.5, 3.0]))
      >>> print(xentjax.angular_margin(cosines, 0.5).round(4))
      [0.3373 0.2397]

    Source:
      Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019, eq. 3.
    """
    cosines = arguments.as_wide("cosines", cosines)
    margin = as_number("margin", margin, 0, math.pi, cosines.shape)
    return _angular_margin(cosines, jnp.asarray(margin, cosines.dtype))


@jax.jit
@keep_nan
def _additive_margin(losses, margin):
    """Returns log(1 + exp(m) · expm1(l)), which is l + m + log(1 − exp(−l) + exp(−l − m)).

    The first form is exact for small losses, and the second does not overflow. A loss of 0 keeps to
    the first, since the second is −∞ where exp(−m) is no float32; a slope of e¹⁶⁰ is none either.
    """
    fits = (losses + margin < 80) | (losses == 0)
    loss, m = jnp.where(fits, losses, 0), jnp.where(fits, jnp.minimum(margin, 160), 0)
    small = jnp.log1p(jnp.exp(m / 2) * jnp.expm1(loss) * jnp.exp(m / 2))
    loss, m = jnp.where(fits, 1, losses), jnp.where(fits, 0, margin)
    large = loss + m + jnp.log(-jnp.expm1(-loss) + jnp.exp(-loss - m))
    return jnp.where(fits, small, large)


@jax.jit
@keep_nan
def _angular_margin(cosines, margin):
    """Returns c · (1 − cos m) + sin θ · sin m, or m · sin m past θ = π − m."""
    is_inside = jnp.abs(cosines) < 1
    squared = (1 - cosines) * (1 + cosines)
    sine = jnp.where(is_inside, jnp.sqrt(jnp.where(is_inside, squared, 1)), 0)
    turned = cosines * (2 * jnp.sin(margin / 2) ** 2) + sine * jnp.sin(margin)
    return jnp.where(cosines > -jnp.cos(margin), turned, margin * jnp.sin(margin))
