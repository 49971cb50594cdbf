"""Cross-entropy from logits, for one class out of many."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from xentjax._jax import checks
from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide_dtype
from xentjax._jax.rule import apply
from xentjax._losses import arguments
from xentjax._softmax.cross_entropy import CrossEntropy, Entropy, masked
from xentjax._targets.types import Targets


class SoftmaxStats(NamedTuple):
    """What a softmax cross-entropy knows beside the loss; each of the loss's shape.

    Attributes:
      log_normalizer: lse(z) = log Σ_v exp(z_v), in nats; differentiable.
      prediction: The class of the largest logit (the first of several), int32.
      correct: Whether the prediction is a class of the heaviest target mass.
      entropy: Entropy of softmax(z), in nats; differentiable.
    """

    log_normalizer: Float[Array, "*batch"]
    prediction: Int[Array, "*batch"]
    correct: Bool[Array, "*batch"]
    entropy: Float[Array, "*batch"]


def softmax_cross_entropy(
    logits: ArrayLike,
    targets: Targets,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
) -> Float[Array, "*batch"]:
    """Cross-entropy between targets and softmax(logits), one loss per example.

    loss = Σ_v t_v · (lse(z) − z_v),   ∂loss/∂z = T · softmax(z) − t,   ∂loss/∂t = lse(z) − z

    float32 is exact to a few ulp however confident the prediction; bfloat16 and float16 logits are
    read as they are and computed in float32. Nothing of the logits' size is kept for the backward
    pass but the logits.

    Args:
      logits: z, float[..., V].
      targets: Labels int[...], dense float[..., V] (any non-negative mass), or SparseTargets of
        that batch. A label outside [0, V) gives NaN loss and gradient in its row, never another
        class's; `value_checks` turns it into an error.
      axis: The class axis, or several; a label is then a flat index over them, in that order.
        Dense targets have the shape of the logits.
      where: Of the loss's shape: examples to keep, the others have loss and gradient 0. Of the
        logits' shape: classes to keep, the others have probability 0 (mass on them is loss +inf).

    Returns:
      Losses in nats, float32 (float64 for float64 logits), of the logits' shape without `axis`.

    Raises:
      TypeError: logits are not floating-point, where is not bool, or targets have a dtype that
        cannot be one.
      ValueError: A shape or axis does not fit; nothing broadcasts.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> logits = jnp.log(jnp.array([[0.1, 0.2, 0.7]]))
      >>> print(xentjax.softmax_cross_entropy(logits, jnp.array([2])).round(4))
      [0.3567]

    Source:
      Bridle, Probabilistic Interpretation of Feedforward Classification Network Outputs, 1990.
    """
    return _call(_losses, logits, targets, axis, where)


def softmax_cross_entropy_with_stats(
    logits: ArrayLike,
    targets: Targets,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
) -> tuple[Float[Array, "*batch"], SoftmaxStats]:
    """`softmax_cross_entropy`, and what the same pass over the logits can tell beside it.

    loss = Σ_v t_v · (lse(z) − z_v);   a z-loss is loss + c · log_normalizer²

    Args:
      logits: z, float[..., V].
      targets: As in `softmax_cross_entropy`.
      axis: The class axis, or several.
      where: As in `softmax_cross_entropy`; the log-normalizer, entropy and correctness of an
        example that is masked out are 0 too.

    Returns:
      (losses, SoftmaxStats), all of the logits' shape without `axis`.

    Raises:
      TypeError, ValueError: As in `softmax_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> loss, stats = xentjax.softmax_cross_entropy_with_stats(jnp.zeros((1, 4)), jnp.array([0]))
      >>> print((loss + 1e-4 * stats.log_normalizer**2).round(4), stats.prediction, stats.correct)
      [1.3865] [0] [ True]

    Source:
      z-loss: Chowdhery et al., PaLM, 2022, section 5.
    """
    return _call(_losses_and_stats, logits, targets, axis, where)


def _call(function, logits, targets, axis, where):
    """Returns function(logits, targets, where, axes=axes) of arrays."""
    logits, axes = arguments.as_logits("logits", logits, axis)
    targets = arguments.as_arrays(targets)
    where = None if where is None else checks.as_array("where", where, "a bool array")
    function = functools.partial(function, axes=axes)
    return meshes.on_automatic_axes(function, logits, axes, targets, where)(logits, targets, where)


def _cross_entropy(logits, targets, where, axes):
    """Returns (loss, lse), logits [..., V], mass and the mask of examples."""
    z, mask = arguments.masked_logits(logits, where, axes)
    mass = arguments.as_mass(targets, logits.shape, wide_dtype(z.dtype), mask, axes=axes)
    # In a shard_map, all that may be differentiated varies over the same devices.
    z, mass = meshes.varying((z, mass), meshes.varying_axes((z, mass, mask)))
    return apply(CrossEntropy(), z, mass, mask), z, mass, mask


@arguments.jit_unless_traced("axes")
def _losses(logits, targets, where, axes):
    (losses, _), *_ = _cross_entropy(logits, targets, where, axes)
    return losses


@arguments.jit_unless_traced("axes")
def _losses_and_stats(logits, targets, where, axes):
    (losses, log_normalizer), z, mass, mask = _cross_entropy(logits, targets, where, axes)
    prediction = jnp.argmax(z, axis=-1).astype(jnp.int32)
    correct = mass.is_heaviest(prediction)
    entropy = entropies(z, mask)
    prediction, correct = masked((prediction, correct), mask)
    return losses, SoftmaxStats(log_normalizer, prediction, correct, entropy)


def entropies(logits: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns the entropy of softmax(logits [..., V]), and 0 for examples masked out."""
    return masked(apply(Entropy(), masked(logits, mask)), mask)
