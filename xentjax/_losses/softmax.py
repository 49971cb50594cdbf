"""Cross-entropy from logits, for one class out of many."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from xentjax._jax import checks
from xentjax._jax import mesh as _mesh
from xentjax._jax.custom_vjp import custom_vjp
from xentjax._softmax import choice as _platform
from xentjax._softmax import partial as _blocks
from xentjax._targets import mass as _masses
from xentjax._targets import types as _targets
from xentjax._targets.types import SparseTargets, Targets


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
        class's; `label_checks` turns it into an error.
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
    return _checked_call(_losses, logits, targets, axis, where)


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
    return _checked_call(_losses_and_stats, logits, targets, axis, where)


def _checked_call(function, logits, targets, axis, where):
    """Checks the arguments, all of it at trace time, and calls the jitted `function` on them."""
    logits, axes = checked_logits("logits", logits, axis)
    targets = _targets.as_targets(targets)
    batch = tuple(n for a, n in enumerate(logits.shape) if a not in axes)
    num_classes = math.prod(logits.shape[a] for a in axes)
    if isinstance(targets, SparseTargets):
        _targets.check_targets(targets, batch, num_classes)
    else:
        checks.check_shape("targets", targets, logits.shape, "dense targets: that of the logits")
    if where is not None:
        where = checks.as_mask(where, batch, logits.shape, "classes")
    if isinstance(targets, SparseTargets):
        examples = where if where is not None and where.shape == batch else None
        checks.check_labels(targets.indices, num_classes, examples)
    function = functools.partial(function, axes=axes)
    return _mesh.on_automatic_axes(function, logits, axes)(logits, targets, where)


def checked_logits(
    name: str, logits: ArrayLike, axis: int | Sequence[int]
) -> tuple[jax.Array, tuple[int, ...]]:
    """Returns logits as an array, and `axis` as a tuple of the axes of at least one class."""
    logits = checks.as_array(name, logits)
    checks.check_floating(name, logits)
    axes = checks.canonical_axes(axis, logits.ndim)
    checks.check(
        all(logits.shape[a] > 0 for a in axes),
        f"{name}: expected at least one class along axis {axis}, got {checks.describe(logits)}",
    )
    return logits, axes


def classes_last(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns x with `axes` moved to the end, in their order, and flattened into one."""
    batch = [a for a in range(x.ndim) if a not in axes]
    num_classes = math.prod(x.shape[a] for a in axes)
    return x.transpose(*batch, *axes).reshape(*(x.shape[a] for a in batch), num_classes)


def classes_back(x: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """Undoes `classes_last` of an array of `shape`."""
    order = [a for a in range(len(shape)) if a not in axes] + list(axes)
    return x.reshape([shape[a] for a in order]).transpose(np.argsort(order))


def _canonical(logits, targets, where, axes):
    """Returns (logits [..., V], targets with NaN for invalid labels, mask of examples or None)."""
    shape = logits.shape
    logits = classes_last(logits, axes)
    if isinstance(targets, SparseTargets):
        targets = _targets.invalid_as_nan(targets, logits.shape[-1])
    else:
        targets = classes_last(targets, axes)
    if where is not None and where.shape == shape:  # A class that is masked has z = −inf: p = 0.
        return jnp.where(classes_last(where, axes), logits, -jnp.inf), targets, None
    return logits, targets, where


def _jit_unless_traced(function):
    """Returns jitted `function`, which is itself where its caller is being traced.

    Of a jitted function JAX traces the value before the derivative, though that has its own rule.
    """
    jitted = jax.jit(function, static_argnames="axes")

    @functools.wraps(function)
    def either(*args, axes):
        traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(args))
        return (function if traced else jitted)(*args, axes=axes)

    return either


@_jit_unless_traced
def _losses(logits, targets, where, axes):
    losses, _ = _cross_entropy(*_canonical(logits, targets, where, axes))
    return losses


@_jit_unless_traced
def _losses_and_stats(logits, targets, where, axes):
    logits, targets, mask = _canonical(logits, targets, where, axes)
    losses, log_normalizer = _cross_entropy(logits, targets, mask)
    prediction = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    correct = _masses.is_heaviest(targets, prediction, logits.shape[-1])
    prediction_entropy = entropy(logits)
    if mask is not None:
        correct = correct & mask
        prediction_entropy = jnp.where(mask, prediction_entropy, 0)
    return losses, SoftmaxStats(log_normalizer, prediction, correct, prediction_entropy)


def _cross_entropy_fwd(live, logits, targets, mask):
    out, block = _forward(logits, targets, mask, shares=live[0])
    return out, (logits, targets, mask, block)


@functools.partial(jax.jit, static_argnames="shares", inline=True)
def _forward(logits, targets, mask, shares):
    kept = _masses.kept(targets, mask, _blocks.wide_dtype(logits.dtype))
    block = _platform.block_of(logits, kept, shares)
    return _masses.masked((block.loss, block.log_normalizer), mask), block


def cross_entropy_bwd(live, residuals, cotangent, axes=()):
    """The backward rule, of (loss, log-normalizer) of classes that are split along mesh `axes`."""
    live_logits, live_targets = live[0], any(jax.tree.leaves(live[1]))
    return *_backward(residuals, cotangent, live_logits, live_targets, axes), None


@functools.partial(jax.jit, static_argnames=("live_logits", "live_targets", "axes"), inline=True)
def _backward(residuals, cotangent, live_logits, live_targets, axes):
    logits, targets, mask, block = residuals
    prepare = functools.partial(_masses.kept, mask=mask, dtype=block.m.dtype)
    cotangent = _masses.masked(cotangent, mask)
    logits_cotangent = targets_cotangent = None
    if live_logits:
        logits_cotangent = _platform.logits_cotangent(
            block, logits, prepare(targets), *cotangent, shares=not axes
        )
        logits_cotangent = _masses.masked(logits_cotangent, mask)
    if live_targets:
        own = _mesh.varying(cotangent[0], axes)
        targets_cotangent = _blocks.targets_cotangent(block, logits, targets, prepare, own)
    return logits_cotangent, targets_cotangent


def _cross_entropy_value(logits, targets, mask):
    return _forward(logits, targets, mask, shares=False)[0]


_cross_entropy = custom_vjp(_cross_entropy_value, _cross_entropy_fwd, cross_entropy_bwd)


def _block_without_targets(logits):
    """Returns the Block of logits that no target is set for."""
    none = jnp.zeros((*logits.shape[:-1], 0))
    return _platform.block_of(logits, SparseTargets(none.astype(jnp.int32), none))


def surprisals(logits: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns lse(z) − z_v for every class, in the shape of the logits."""
    z = classes_last(logits, axes)
    return classes_back(_block_without_targets(z).surprisal(z), logits.shape, axes)


def _entropy_fwd(live, logits):
    del live
    block = _block_without_targets(logits)
    p = block.softmax(logits)
    entropy = _masses.times_mass(p, block.surprisal(logits)).sum(-1)
    return entropy, (logits, block, entropy)


def _entropy_bwd(live, residuals, cotangent):
    del live
    logits, block, entropy = residuals
    excess = block.surprisal(logits) - entropy[..., None]
    gradient = _masses.times_mass(block.softmax(logits), excess)
    return ((cotangent[..., None] * gradient).astype(logits.dtype),)


entropy = custom_vjp(lambda logits: _entropy_fwd(None, logits)[0], _entropy_fwd, _entropy_bwd)
