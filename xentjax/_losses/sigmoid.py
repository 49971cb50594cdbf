"""Cross-entropy for yes or no: binary and multi-label problems.

With softplus(x) = max(x, 0) + log1p(exp(−|x|)):

    loss(z, t) = t · softplus(−z) + (1 − t) · softplus(z)
               = max((1 − t) · z, −t · z) + log1p(exp(−|z|))
    ∂loss/∂z   = (1 − t) · σ(z) − t · σ(−z)                 = σ(z) − t, without its cancellation
    ∂loss/∂t   = −z
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import arithmetic, checks, value_checks
from xentjax._jax.dtypes import wide_dtype
from xentjax._jax.rule import Rule, apply
from xentjax._losses import shapes
from xentjax._targets.mass import times
from xentjax._targets.transforms import as_number
from xentjax._targets.types import SparseTargets


def sigmoid_binary_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    pos_weight: ArrayLike | None = None,
    neg_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Float[Array, "*shape"]:
    """Cross-entropy between targets and sigmoid(logits), element by element.

    loss = w₊ · t · softplus(−z) + w₋ · (1 − t) · softplus(z),   ∂loss/∂z = σ(z) − t for w = 1

    Args:
      logits: z, float[...]; ±inf is certainty, of loss 0 where the target agrees.
      targets: t, the probability of yes in [0, 1]: float, bool or int, of the shape of logits.
        Others count as they are; `value_checks` turns them into an error. `smooth_binary_labels`
        smooths them.
      pos_weight: w₊, how much a yes counts: a number ≥ 0, one for each label of the last axis, or
        one for each element. None is 1.
      neg_weight: w₋, how much a no counts, likewise.
      where: Which elements to keep, bool of the shape of logits; the others have loss and gradient
        0, whatever stands there.

    Returns:
      Losses in nats, of the shape of logits, float32 (float64 for float64 logits).

    Raises:
      TypeError: logits are not floating-point, targets or weights are no real numbers, or where is
        not bool.
      ValueError: The shapes differ, for nothing else broadcasts, or a weight is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> z, t = jnp.array([0.0, 20.0]), jnp.array([1, 1])
      >>> print(xentjax.sigmoid_binary_cross_entropy(z, t))
      [6.9315e-01 2.0612e-09]
      >>> print(xentjax.sigmoid_binary_cross_entropy(z, t, pos_weight=3.0))
      [2.0794e+00 6.1835e-09]

    Source:
      Goodfellow et al., Deep Learning, 2016, section 6.2.2.2; weights: King and Zeng, Logistic
      Regression in Rare Events Data, 2001, section 4.2.
    """
    logits, targets, where = _as_binary("logits", logits, targets, where)
    weights = _as_weights(pos_weight, neg_weight, logits.shape, (logits.ndim - 1,))
    return _two_sided(logits, targets, weights, where)


def multilabel_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    pos_weight: ArrayLike | None = None,
    neg_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Float[Array, "*batch"]:
    """Sum of the binary cross-entropies of an example's labels, each a yes or a no of its own.

    loss = Σ_v [ w₊ · t_v · softplus(−z_v) + w₋ · (1 − t_v) · softplus(z_v) ]

    Args:
      logits: z, float[..., V].
      targets: t, the probability of each label in [0, 1], of the shape of logits.
        `smooth_binary_labels` smooths them.
      axis: The axis of the labels, or several.
      pos_weight: w₊, how much a yes counts: a number ≥ 0, one for each label, float[V], or one for
        each element of logits. None is 1.
      neg_weight: w₋, how much a no counts, likewise.
      where: A mask of the loss's shape keeps examples, the others have loss and gradient 0; one of
        the logits' shape keeps labels, the others add nothing.

    Returns:
      One loss per example in nats, of the logits' shape without `axis`, float32 (float64 for
      float64 logits).

    Raises:
      TypeError: logits are not floating-point, targets or weights are no real numbers, or where is
        not bool.
      ValueError: The shapes differ, the axis does not fit, or a weight is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> logits, targets = jnp.array([[2.0, -1.0, 0.0]]), jnp.array([[1, 0, 1]])
      >>> print(xentjax.multilabel_cross_entropy(logits, targets).round(4))
      [1.1333]

    Source:
      Goodfellow et al., Deep Learning, 2016, section 6.2.2.2.
    """
    logits = checks.as_array("logits", logits)
    checks.check_floating("logits", logits)
    axes = checks.canonical_axes(axis, logits.ndim)
    if where is not None:
        batch = tuple(n for a, n in enumerate(logits.shape) if a not in axes)
        where = checks.as_mask(where, batch, logits.shape, "labels")
        if where.shape != logits.shape:
            where = jnp.broadcast_to(jnp.expand_dims(where, axes), logits.shape)
    logits, targets, where = _as_binary("logits", logits, targets, where)
    weights = _as_weights(pos_weight, neg_weight, logits.shape, axes)
    return _two_sided(logits, targets, weights, where).sum(axes)


def asymmetric_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    gamma_positive: ArrayLike,
    gamma_negative: ArrayLike,
    margin: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> Float[Array, "*shape"]:
    """Asymmetric loss: a focal loss with another γ for yes and no, and an easy no dropped.

    loss = −t · (1 − p)^γ₊ · log p − (1 − t) · p_m^γ₋ · log(1 − p_m),
    p = σ(z),   p_m = max(p − margin, 0)

    Element by element; for a sum over labels, sum the last axis. Where a no has p ≤ margin, loss
    and gradient are 0. `focal` says what γ between 0 and 1 does.

    Args:
      logits: z, float[...].
      targets: t, the probability of yes in [0, 1]: float, bool or int, of the shape of logits.
      gamma_positive: γ₊ ≥ 0, a number; 0 or 1 is usual.
      gamma_negative: γ₋ ≥ 0, a number; 4 is usual.
      margin: In [0, 1], a number; 0.05 is usual.
      where: Which elements to keep, bool of the shape of logits; the others have loss and gradient
        0, whatever stands there.

    Returns:
      Losses in nats, of the shape of logits, float32 (float64 for float64 logits).

    Raises:
      TypeError: logits are not floating-point, targets, a γ or the margin are no real numbers, or
        where is not bool.
      ValueError: The shapes differ, for nothing broadcasts, or a number is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> z, t = jnp.array([2.0, 2.0, -4.0]), jnp.array([1, 0, 0])
      >>> print(xentjax.asymmetric_cross_entropy(z, t, 1.0, 4.0, 0.05).round(4))
      [0.0151 0.8464 0.    ]

    Source:
      Ridnik et al., Asymmetric Loss for Multi-Label Classification, 2021, equations 4 to 7.
    """
    logits, targets, where = _as_binary("logits", logits, targets, where)
    numbers = {
        "gamma_positive": (gamma_positive, math.inf),
        "gamma_negative": (gamma_negative, math.inf),
        "margin": (margin, 1),
    }
    numbers = [
        jnp.asarray(as_number(name, x, 0, high), targets.dtype)
        for name, (x, high) in numbers.items()
    ]

    def loss(logits, targets):
        return _asymmetric(logits, targets, *numbers)

    return _masked_loss(loss, logits, targets, where)


def binary_cross_entropy(
    probabilities: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Float[Array, "*shape"]:
    """Log loss of probabilities, element by element.

    loss = −t · log p − (1 − t) · log(1 − p),   with 0 · log 0 = 0

    There is no epsilon in it: certainty that is wrong costs +inf. Where there are logits,
    `sigmoid_binary_cross_entropy` is more exact.

    Args:
      probabilities: p, of yes, float[...] in [0, 1].
      targets: t, in [0, 1]: float, bool or int, of the shape of probabilities. Others count as they
        are; `value_checks` turns them into an error.
      where: Which elements to keep, bool of the shape of probabilities; the others have loss and
        gradient 0, whatever stands there.

    Returns:
      Losses in nats, of the shape of probabilities, float32 (float64 for float64).

    Raises:
      TypeError: probabilities are not floating-point, targets are complex, or where is not bool.
      ValueError: The shapes differ; nothing broadcasts.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> losses = xentjax.binary_cross_entropy(jnp.array([0.9, 1, 1]), jnp.array([1, 1, 0]))
      >>> print(losses.round(4))
      [0.1054 0.        inf]

    Source:
      Good, Rational Decisions, 1952, section 4.
    """
    p, t, where = _as_binary("probabilities", probabilities, targets, where)
    return _masked_loss(_binary_cross_entropy, p, t, where)


def _as_binary(name, predictions, targets, where):
    """Returns predictions as they are, targets in the dtype of the arithmetic, and where."""
    predictions = checks.as_array(name, predictions)
    checks.check(
        not isinstance(targets, SparseTargets),
        f"targets: expected a float, bool or int array, got {targets!r}; smooth_labels is for one "
        "class out of many, and smooth_binary_labels for yes or no",
        TypeError,
    )
    targets = checks.as_array("targets", targets, "a float, bool or int array")
    checks.check_floating(name, predictions)
    checks.check(
        not jnp.issubdtype(targets.dtype, jnp.complexfloating),
        f"targets: expected float, bool or int, got {checks.describe(targets)}",
        TypeError,
    )
    checks.check_shape("targets", targets, predictions.shape, f"that of {name}")
    if where is not None:
        where = checks.as_array("where", where, "a bool array")
        checks.check_bool("where", where)
        checks.check_shape("where", where, predictions.shape, f"that of {name}")
    targets = targets.astype(wide_dtype(predictions.dtype))
    value_checks.check_probabilities("targets", targets, where)
    if name == "logits":
        value_checks.check_not_nan(name, predictions, where)
    else:
        value_checks.check_probabilities(name, predictions, where)
    return predictions, targets, where


def _as_weights(pos_weight, neg_weight, shape, axes):
    """Returns (w₊, w₋), each None, a scalar or an array of `shape`, from one for each label."""
    labels = tuple(shape[a] for a in axes if shape)

    def as_weight(name, given):
        if given is None:
            return None
        weight = checks.as_array(name, given, "real numbers")
        checks.check(
            any(jnp.issubdtype(weight.dtype, kind) for kind in (jnp.floating, jnp.integer)),
            f"{name}: expected real numbers, got {checks.describe(weight)}",
            TypeError,
        )
        checks.check(
            weight.shape in ((), labels, shape),
            f"{name}: expected a scalar, shape {labels} (one for each label) or {shape} (that of "
            f"logits), got {checks.describe(weight)}",
        )
        # Numbers of the user's are looked at in a trace too; arrays of JAX have no values there.
        checks.check_interval(name, weight if isinstance(given, jax.Array) else given, 0, math.inf)
        if weight.shape in ((), shape):
            return weight
        others = tuple(a for a in range(len(shape)) if a not in axes)
        weight = jnp.expand_dims(weight.transpose(np.argsort(axes)), others)
        return jnp.broadcast_to(weight, shape)

    return as_weight("pos_weight", pos_weight), as_weight("neg_weight", neg_weight)


def _two_sided(logits, targets, weights, where):
    """Returns the losses with the weights of yes and no."""
    if weights == (None, None):
        return _masked_loss(_sigmoid_cross_entropy, logits, targets, where)
    weights = [jnp.asarray(1 if w is None else w, targets.dtype) for w in weights]

    def loss(logits, targets):
        return _weighted_sigmoid_cross_entropy(logits, targets, *weights)

    return _masked_loss(loss, logits, targets, where)


def _masked_loss(loss, predictions, targets, where):
    """Returns the losses that `where` keeps, and 0 elsewhere, whatever stands there."""
    if where is None:
        return loss(predictions, targets)
    predictions = jnp.where(where, predictions, 0.5)
    return jnp.where(where, loss(predictions, jnp.where(where, targets, 0)), 0)


@jax.jit
def _binary_cross_entropy(probabilities, t):
    p = probabilities.astype(t.dtype)
    yes = 0 - arithmetic.times_log(t, jnp.where((t == 0) & (p == 0), 1, p))
    no = 0 - arithmetic.log1p(-jnp.where((t == 1) & (p == 1), 0, p))
    return yes + (1 - t) * no  # 0 less a logarithm is not −0.


@dataclasses.dataclass(frozen=True)
class _SigmoidCrossEntropy(Rule):
    """(logits, targets) -> losses, element by element."""

    def reference(self, *args):
        logits, targets = args
        z = logits.astype(targets.dtype)
        size = jnp.where(z < 0, -z, z)
        wrong = jnp.where(z < 0, targets, 1 - targets)
        return _times(wrong, size) + jnp.log1p(jnp.exp(-size))

    def forward(self, backend, needs_grad, *args):
        del backend, needs_grad
        logits, targets = args
        z = logits.astype(targets.dtype)
        return _linear(z, targets) + jnp.log1p(jnp.exp(-jnp.abs(z))), ()

    def backward(self, backend, needs_grad, args, summary, cotangents):
        """∂loss/∂z = (1 − t) · σ(z) − t · σ(−z), ∂loss/∂t = −z; no cotangent has no gradient."""
        del backend, needs_grad, summary
        logits, t = args
        z = logits.astype(t.dtype)
        small = jnp.exp(-jnp.abs(z))
        up, down = jnp.where(z < 0, small, 1), jnp.where(z < 0, 1, small)
        error = ((1 - t) * up - t * down) / (1 + small)
        none = cotangents == 0
        return tuple(jnp.where(none, 0, cotangents * slope) for slope in (error, -z))


def _times(weight, size):
    """Returns weight · size, whose value, and derivative to weight, has 0 · inf = 0.

    weight · size = c · size + (weight − c) · size, where the constant c is weight.
    """
    c = jax.lax.stop_gradient(weight)
    x, unit = _bounded(size)
    return c * jnp.where((c == 0) & jnp.isinf(size), 0, size) + (weight - c) * x * unit


def _linear(z, t):
    """Returns max((1 − t) · z, −t · z), with 0 · inf = 0; an ulp of 1 more or less is nothing.

    It does so without a choice, for which XLA's CPU backend (jaxlib 0.10.2) keeps arrays beside a
    sum. Two bounds in a row are a choice too, hence the half.
    """
    x, unit = _bounded(z)
    yes = t * unit
    return jnp.maximum((unit - yes) * x, -yes * x)


def _bounded(z):
    """Returns (x, u) with z = x · u, where x is finite though z may not be, and u a number.

    In units of 2¹⁰⁰ (in float32) every logit but ±inf is a small number, which the bounds leave.
    """
    number = jnp.finfo(z.dtype)
    unit = 2.0 ** (number.maxexp - number.nmant - 5)
    half = jnp.maximum(jnp.minimum(z / unit, number.max) / 2, -number.max)
    return half, 2 * unit


@jax.jit
def _sigmoid_cross_entropy(logits, targets):
    return apply(_SigmoidCrossEntropy(), logits, targets)


@jax.jit
def _weighted_sigmoid_cross_entropy(logits, targets, pos_weight, neg_weight):
    yes, no = _sides(logits, targets)
    return times(pos_weight * targets, yes) + times(neg_weight * (1 - targets), no)


@jax.jit
def _asymmetric(logits, targets, gamma_positive, gamma_negative, margin):
    yes, no = _sides(logits, targets)
    yes = shapes.focal(yes, gamma_positive)
    no = shapes.focal(_with_margin(no, margin), gamma_negative)
    return times(targets, yes) + times(1 - targets, no)


def _sides(logits, like):
    """Returns (softplus(−z), softplus(z)): the costs of a yes and of a no."""
    every, none = jnp.ones_like(like), jnp.zeros_like(like)
    return apply(_SigmoidCrossEntropy(), logits, every), softplus(logits, none)


def softplus(x: jax.Array, zeros: jax.Array) -> jax.Array:
    """Returns log(1 + exp(x)), the cost of a no."""
    return apply(_SigmoidCrossEntropy(), x, zeros)


def _with_margin(losses, margin):
    """Returns −log(1 − max(p − margin, 0)) of losses −log(1 − p).

    −log(exp(−loss) + margin) = loss − softplus(loss + log margin), where it is positive.
    """
    log_margin = jnp.log(margin)
    infinite = losses == jnp.inf
    finite = jnp.where(infinite, 0, losses)
    x = finite + log_margin
    zeros = jnp.zeros_like(losses)
    low = finite - softplus(jnp.where(x < 0, x, -1), zeros)
    high = -log_margin - softplus(jnp.where(x < 0, -1, -x), zeros)
    shifted = jnp.where(infinite, -log_margin, jnp.where(x < 0, low, high))
    return jnp.where(shifted > 0, shifted, 0)
