"""Cross-entropy from logits, for one class out of many."""

import functools
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import checks
from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide, wide_dtype
from xentjax._jax.rule import apply
from xentjax._losses import arguments, stats
from xentjax._losses.stats import SoftmaxStats
from xentjax._softmax.cross_entropy import CrossEntropy, Entropy
from xentjax._softmax.partial import masked
from xentjax._targets.mass import Mass
from xentjax._targets.types import Targets


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
      where: Examples to keep, in the loss's shape: the others have loss and gradient 0. Or classes
        to keep, in the logits' shape: the others have probability 0 (mass on them is loss +inf).

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
    """`softmax_cross_entropy`, with statistics from the same pass over the logits beside it.

    loss = Σ_v t_v · (lse(z) − z_v);   a z-loss is loss + c · log_normalizer²

    Args:
      logits: z, float[..., V].
      targets: As in `softmax_cross_entropy`.
      axis: The class axis, or several.
      where: As in `softmax_cross_entropy`; of an example that is masked out, or that has no class
        left, every statistic is 0 too.

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


def prepared(logits, targets, where, axes):
    """Returns logits [..., V], mass and the mask of examples."""
    z, mask = arguments.masked_logits(logits, where, axes)
    mass = arguments.as_mass(targets, logits.shape, wide_dtype(z.dtype), mask, axes=axes)
    # In a shard_map, all that may be differentiated varies over the same devices.
    z, mass = meshes.varying((z, mass), meshes.varying_axes((z, mass, mask)))
    return z, mass, mask


@arguments.jit_unless_traced("axes")
def _losses(logits, targets, where, axes):
    return apply(CrossEntropy(), *prepared(logits, targets, where, axes))[0]


@arguments.jit_unless_traced("axes")
def _losses_and_stats(logits, targets, where, axes):
    z, mass, mask = prepared(logits, targets, where, axes)
    return losses_and_stats(z, mass, mask, mass.heaviest(), mass.is_heaviest)


def losses_and_stats(
    logits: jax.Array,
    mass: Mass,
    mask: jax.Array | None,
    label: jax.Array,
    is_correct: Callable[[jax.Array], jax.Array],
    mesh_axes: tuple[Hashable, ...] = (),
) -> tuple[jax.Array, SoftmaxStats]:
    """Returns (losses, SoftmaxStats) of logits [..., V], of a shard's classes along mesh axes.

    Args:
      logits: z, [..., V].
      mass: On the classes of the logits.
      mask: The mask of examples, or None.
      label: The heaviest class of all, int32[...].
      is_correct: Whether no class is heavier than the one given for each example.
      mesh_axes: Axes that the classes are split over.
    """
    rule = CrossEntropy(mesh_axes, with_stats=True)
    losses, log_normalizer, entropy, largest, of_leader = apply(rule, logits, mass, mask)
    z = wide(jax.lax.stop_gradient(logits))
    prediction = jnp.argmax(z, axis=-1).astype(jnp.int32)
    if mesh_axes:
        own = z.max(-1)
        leads = (own == largest) | jnp.isnan(own)
        prediction = stats.first(leads, prediction, z.shape[-1], mesh_axes)
    surprisal = (largest - stats.at_class_of_all(z, label, mesh_axes)) + of_leader
    return losses, masked(
        SoftmaxStats(
            log_normalizer,
            prediction,
            is_correct(prediction),
            entropy,
            stats.known_log_probability(losses, surprisal),
        ),
        mask,
    )


def entropies(logits: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns the entropy of softmax(logits [..., V]), and 0 for examples masked out."""
    return masked(apply(Entropy(), masked(logits, mask)), mask)
