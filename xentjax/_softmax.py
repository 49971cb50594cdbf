"""Cross-entropy from logits, for one class out of many.

With u_v = z_v − m, m = max z, and rest = Σ_{v: u_v < 0} exp(u_v) + (number of maxima − 1):

    lse(z)         = m + log1p(rest)
    loss(z, t)     = Σ_v t_v · ((m − z_v) + log1p(rest))            a sum of non-negative terms
    ∂loss/∂z_v     = T · p_v − t_v,            p_v = exp(u_v) / (1 + rest)
                   = (T − t_v) − T · (1 − p_v) where p_v > 1/2,     1 − p_v = rest / (1 + rest)
    ∂loss/∂t_v     = lse(z) − z_v

Leaving the largest exponential, which is 1, out of the sum is what keeps a confident prediction
exact: log1p(rest) and rest / (1 + rest) have full relative precision where lse − z_y and p_y − 1
cancel to nothing.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from xentjax import _checks, _targets
from xentjax._custom_vjp import custom_vjp
from xentjax._targets import SparseTargets, Targets


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
      >>> print(xentjax.softmax_cross_entropy(logits, jnp.array([2])))
      [0.35667497]

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
      >>> print(loss + 1e-4 * stats.log_normalizer**2, stats.prediction, stats.correct)
      [1.3864865] [0] [ True]

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
        _checks.check_shape("targets", targets, logits.shape, "dense targets: that of the logits")
    if where is not None:
        where = jnp.asarray(where)
        _checks.check_bool("where", where)
        _checks.check(
            where.shape in (batch, logits.shape),
            f"where: expected shape {batch} (a mask of examples) or {logits.shape} (a mask of "
            f"classes), got {where.shape}",
        )
    if isinstance(targets, SparseTargets):
        examples = where if where is not None and where.shape == batch else None
        _checks.check_labels(targets.indices, num_classes, examples)
    return function(logits, targets, where, axes)


def checked_logits(
    name: str, logits: ArrayLike, axis: int | Sequence[int]
) -> tuple[jax.Array, tuple[int, ...]]:
    """Returns logits as an array, and `axis` as a tuple of the axes of at least one class."""
    logits = jnp.asarray(logits)
    _checks.check_floating(name, logits)
    axes = _checks.canonical_axes(axis, logits.ndim)
    _checks.check(
        all(logits.shape[a] > 0 for a in axes),
        f"{name}: expected at least one class along axis {axis}, got {_checks.describe(logits)}",
    )
    return logits, axes


def classes_last(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns x with `axes` moved to the end, in their order, and flattened into one."""
    batch = [a for a in range(x.ndim) if a not in axes]
    return x.transpose(*batch, *axes).reshape(*(x.shape[a] for a in batch), -1)


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


@functools.partial(jax.jit, static_argnums=3)
def _losses(logits, targets, where, axes):
    losses, _ = _cross_entropy(*_canonical(logits, targets, where, axes))
    return losses


@functools.partial(jax.jit, static_argnums=3)
def _losses_and_stats(logits, targets, where, axes):
    logits, targets, mask = _canonical(logits, targets, where, axes)
    losses, log_normalizer = _cross_entropy(logits, targets, mask)
    prediction = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    correct = _is_heaviest(targets, prediction, logits.shape[-1])
    prediction_entropy = entropy(logits)
    if mask is not None:
        correct = correct & mask
        prediction_entropy = jnp.where(mask, prediction_entropy, 0)
    return losses, SoftmaxStats(log_normalizer, prediction, correct, prediction_entropy)


def _is_heaviest(targets, prediction, num_classes):
    """Returns whether no class holds more target mass than `prediction` does."""
    if not isinstance(targets, SparseTargets):
        held = jnp.take_along_axis(targets, prediction[..., None], axis=-1)[..., 0]
        return held == targets.max(-1)

    heaviest = _targets.mass_at(targets, targets.indices, num_classes).max(-1, initial=0)
    background = _targets.background_over(targets, num_classes)  # It may be the heaviest alone.
    heaviest = jnp.maximum(heaviest, jnp.max(background, axis=-1))
    return _targets.mass_at(targets, prediction[..., None], num_classes)[..., 0] >= heaviest


@jax.custom_jvp
def _max_and_rest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns m = max z and rest = Σ_v exp(z_v − m) − 1, without forming that difference.

    Where all z are −inf, m is −inf and rest is 0. To derivatives m is a constant: what is built
    from (m, rest) must not change when both z and m shift.
    """
    z = _wide(logits)
    m = jnp.max(z, axis=-1)
    shift = _shift(m)
    others = jnp.where(z < shift, _exp_difference(z, shift), 0).sum(-1)
    ties = jnp.sum(z == shift, axis=-1, dtype=z.dtype)
    return m, others + jnp.maximum(ties - 1, 0)


@_max_and_rest.defjvp
def _max_and_rest_jvp(primals, tangents):
    (logits,), (tangent,) = primals, tangents
    m, rest = _max_and_rest(logits)
    exponentials = _exp_difference(_wide(logits), _shift(m))
    return (m, rest), (jnp.zeros_like(m), jnp.sum(exponentials * _wide(tangent), axis=-1))


def _wide(x: jax.Array) -> jax.Array:
    """Returns x in the dtype of the arithmetic: float32, or float64 for float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _shift(m: jax.Array) -> jax.Array:
    """Returns what is subtracted from the logits, [..., 1]: m, or 0 where m is −inf."""
    return jnp.where(m == -jnp.inf, 0, m)[..., None]


def _exp_difference(z: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns exp(z − shift) without the error of rounding z − shift.

    That error, half an ulp of |z − shift|, is a relative error of exp: 4e-6 at 80 in float32.
    Knuth's two-sum finds it exactly, and exp(d + e) = exp(d) · (1 + e).
    """
    d = z - shift
    minus_shift = d - z
    e = (z - (d - minus_shift)) - (shift + minus_shift)
    e = jax.lax.stop_gradient(jnp.where(jnp.isfinite(d), e, 0))
    return jnp.exp(d) * (1 + e)


def _cost(m: jax.Array, rest: jax.Array):
    """Returns the function z_v -> lse(z) − z_v, a sum of non-negative terms."""

    def cost(logits):
        return (_shift(m) - _wide(logits)) + jnp.log1p(rest)[..., None]

    return cost


def _is_top(m: jax.Array, rest: jax.Array):
    """Returns the function z_v -> whether p_v > 1/2; only one largest logit can have that."""

    def is_top(logits):
        return (_wide(logits) == _shift(m)) & (rest < 1)[..., None]

    return is_top


def _masked(mask, tree):
    """Returns `tree` with 0 in the examples that are masked out; its leaves are [...] or [..., V]."""
    if mask is None:
        return tree
    return jax.tree.map(lambda x: jnp.where(_targets.expand_like(mask, x), x, 0), tree)


def _masked_targets(mask, targets):
    """An example that is masked out is one whose target has no mass."""
    return _targets.map_masses(lambda mass: _masked(mask, mass), targets)


def _cross_entropy_fwd(live, logits, targets, mask):
    del live
    m, rest = _max_and_rest(logits)
    losses = _targets.expectation(_masked_targets(mask, targets), logits, _cost(m, rest))
    out = _masked(mask, (losses, m + jnp.log1p(rest)))
    return out, (logits, targets, mask, m, rest)


def _cross_entropy_bwd(live, residuals, cotangent):
    live_logits, live_targets, _ = live
    logits, targets, mask, m, rest = residuals
    cotangent = _masked(mask, cotangent)
    logits_cotangent = targets_cotangent = None
    if live_logits:
        kept = _masked_targets(mask, targets)
        logits_cotangent = _masked(mask, _logits_cotangent(logits, kept, m, rest, *cotangent))
    if any(jax.tree.leaves(live_targets)):
        _, pullback = jax.vjp(
            lambda t: _targets.expectation(_masked_targets(mask, t), logits, _cost(m, rest)), targets
        )
        (targets_cotangent,) = pullback(cotangent[0])
    return logits_cotangent, targets_cotangent, None


def _logits_cotangent(logits, targets, m, rest, loss_cotangent, lse_cotangent):
    """Returns loss_cotangent · (T · p − t) + lse_cotangent · p, [..., V]."""
    is_top = _is_top(m, rest)
    ones = functools.partial(jnp.ones_like, dtype=rest.dtype)
    total = _targets.expectation(targets, logits, ones)
    total_but_top = _targets.expectation(targets, logits, lambda z: ones(z) * ~is_top(z))

    def entries(z, t):
        """The formula for the classes z of target mass t, both [..., J]."""
        exponentials = _exp_difference(_wide(z), _shift(m))
        p = exponentials / (1 + rest)[..., None]
        one_minus_p = (rest[..., None] + (1 - exponentials)) / (1 + rest)[..., None]
        error = jnp.where(
            is_top(z),
            total_but_top[..., None] - total[..., None] * one_minus_p,
            total[..., None] * p - t,
        )
        cotangent = loss_cotangent[..., None] * error + lse_cotangent[..., None] * p
        return cotangent.astype(logits.dtype)

    if not isinstance(targets, SparseTargets):
        return entries(logits, targets)
    background = _targets.background_over(targets, logits.shape[-1])
    picked = jnp.take_along_axis(logits, targets.indices, axis=-1)
    at_indices = entries(picked, _targets.mass_at(targets, targets.indices, logits.shape[-1]))
    return _targets.put_at(entries(logits, background), targets.indices, at_indices)


def _cross_entropy_value(logits, targets, mask):
    return _cross_entropy_fwd(None, logits, targets, mask)[0]


_cross_entropy = custom_vjp(_cross_entropy_value, _cross_entropy_fwd, _cross_entropy_bwd)


def surprisals(logits: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns lse(z) − z_v for every class, in the shape of the logits."""
    z = classes_last(logits, axes)
    return classes_back(_cost(*_max_and_rest(z))(z), logits.shape, axes)


def _entropy_fwd(live, logits):
    del live
    m, rest = _max_and_rest(logits)
    p = _exp_difference(_wide(logits), _shift(m)) / (1 + rest)[..., None]
    entropy = _targets.times_mass(p, _cost(m, rest)(logits)).sum(-1)
    return entropy, (logits, m, rest, entropy)


def _entropy_bwd(live, residuals, cotangent):
    del live
    logits, m, rest, entropy = residuals
    p = _exp_difference(_wide(logits), _shift(m)) / (1 + rest)[..., None]
    excess = _targets.times_mass(p, _cost(m, rest)(logits) - entropy[..., None])
    return ((cotangent[..., None] * excess).astype(logits.dtype),)


def _entropy_value(logits):
    return _entropy_fwd(None, logits)[0]


entropy = custom_vjp(_entropy_value, _entropy_fwd, _entropy_bwd)
