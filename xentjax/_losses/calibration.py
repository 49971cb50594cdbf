"""Calibration: whether predictions of probability p come true as often as p says."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import checks
from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide
from xentjax._losses import arguments
from xentjax._losses.reduction import weighted_mean
from xentjax._losses.softmax import prepared, softmax_cross_entropy
from xentjax._softmax import reference
from xentjax._softmax.partial import masked
from xentjax._targets.types import Targets


class ReliabilityBins(NamedTuple):
    """A reliability diagram as sums, which add over batches: `jax.tree.map(jnp.add, a, b)`.

    Bin b has the confidences in (b / B, (b + 1) / B]. Its bar is correct / count, its place on the
    diagonal confidence / count.

    Attributes:
      count: Examples in each bin, float[B].
      confidence: Sum of their confidences, float[B]; differentiable.
      correct: How many of their predictions are right, float[B].
    """

    count: Float[Array, " b"]  # pyright: ignore[reportIncompatibleMethodOverride]
    confidence: Float[Array, " b"]
    correct: Float[Array, " b"]

    def expected_calibration_error(self) -> Float[Array, ""]:
        """Returns Σ_b |confidence_b − correct_b| / Σ_b count_b; 0 for no examples."""
        total = self.count.sum()
        gaps = jnp.abs(self.confidence - self.correct).sum()
        return gaps / jnp.where(total == 0, 1, total)


def reliability_bins(
    logits: ArrayLike,
    targets: Targets,
    *,
    num_bins: int = 15,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
) -> ReliabilityBins:
    """Counts, confidences and correct predictions in bins of equal width: a reliability diagram.

    confidence = max_v p_v,   p = softmax(logits)

    Args:
      logits: z, float[..., V].
      targets: Labels int[...]; of targets of other forms, the heaviest classes are right.
      num_bins: B.
      axis: The class axis, or several.
      where: As in `softmax_cross_entropy`; examples that are masked out are in no bin.

    Returns:
      ReliabilityBins, float32 (float64 for float64 logits). A label outside [0, V) makes the
      number of right predictions of its bin NaN.

    Raises:
      TypeError, ValueError: As in `softmax_cross_entropy`, or num_bins is not a positive int.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]))
      >>> bins = xentjax.reliability_bins(logits, jnp.array([0, 1, 1]), num_bins=4)
      >>> print(bins.count, (10 * bins.confidence).round(), bins.correct)
      [0. 0. 1. 2.] [ 0.  0.  6. 18.] [0. 0. 1. 1.]

    Source:
      Guo et al., On Calibration of Modern Neural Networks, 2017, section 2.
    """
    logits, axes = arguments.as_logits("logits", logits, axis)
    wanted = f"num_bins: expected a positive int, got {num_bins!r}"
    checks.check(checks.is_int(num_bins), wanted, TypeError)
    checks.check(0 < num_bins < 2**24, wanted)
    targets = arguments.as_arrays(targets)
    where = None if where is None else checks.as_array("where", where, "a bool array")
    run = functools.partial(_reliability_bins, num_bins=int(num_bins), axes=axes)
    every = tuple(range(logits.ndim))
    run = meshes.on_automatic_axes(run, logits, every, targets, where)
    return run(logits, targets, where)


@arguments.jit_unless_traced("num_bins", "axes")
def _reliability_bins(logits, targets, where, num_bins, axes):
    z, mass, mask = prepared(logits, targets, where, axes)
    z = wide(masked(z, mask))
    leader, _, terms = reference.leader_and_rest(z)
    confidence = 1 / (1 + terms.sum(-1))
    correct = mass.is_heaviest(leader.astype(jnp.int32)).astype(z.dtype)
    correct = jnp.where(jnp.isnan(mass.total()), jnp.nan, correct)
    count = jnp.ones_like(confidence)
    count, confidence, correct = masked((count, confidence, correct), mask)
    edge = jnp.ceil(jax.lax.stop_gradient(confidence) * num_bins).astype(jnp.int32)
    bins = jnp.clip(edge - 1, 0, num_bins - 1)

    def sums(x):
        return jnp.zeros(num_bins, z.dtype).at[bins].add(x)

    return ReliabilityBins(sums(count), sums(confidence), sums(correct))


def expected_calibration_error(
    logits: ArrayLike,
    targets: Targets,
    *,
    num_bins: int = 15,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
) -> Float[Array, ""]:
    """Expected calibration error: how far confidence is from accuracy, on average over bins.

    ECE = Σ_b |confidence_b − correct_b| / Σ_b count_b,   of the sums of `reliability_bins`

    Over an evaluation set in pieces, add the bins first: the error is no mean of errors.

    Args:
      logits: z, float[..., V].
      targets: As in `reliability_bins`.
      num_bins: How many bins of equal width.
      axis: The class axis, or several.
      where: As in `softmax_cross_entropy`.

    Returns:
      A scalar in [0, 1], float32 (float64 for float64 logits); 0 for no examples.

    Raises:
      TypeError, ValueError: As in `reliability_bins`.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]))
      >>> print(xentjax.expected_calibration_error(logits, jnp.array([0, 1, 1])).round(4))
      0.4

    Source:
      Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning, 2015.
    """
    bins = reliability_bins(logits, targets, num_bins=num_bins, axis=axis, where=where)
    return bins.expected_calibration_error()


def brier_score(
    logits: ArrayLike,
    targets: Targets,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
) -> Float[Array, "*batch"]:
    """Brier score: the squared error of the probabilities, one for each example.

    score = Σ_v (p_v − t_v)²,   p = softmax(logits)

    p − t is the gradient of the cross-entropy, and as exact. Targets of a mass T other than 1 are
    held against T · p.

    Args:
      logits: z, float[..., V].
      targets: As in `softmax_cross_entropy`.
      axis: The class axis, or several.
      where: As in `softmax_cross_entropy`; examples that are masked out have the score 0.

    Returns:
      Scores in [0, 2], of the logits' shape without `axis`, float32 (float64 for float64 logits).

    Raises:
      TypeError, ValueError: As in `softmax_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> logits = jnp.log(jnp.array([[0.1, 0.2, 0.7]]))
      >>> print(xentjax.brier_score(logits, jnp.array([2])).round(4))
      [0.14]

    Source:
      Brier, Verification of Forecasts Expressed in Terms of Probability, 1950.
    """
    logits, axes = arguments.as_logits("logits", logits, axis)

    def losses(z):
        return softmax_cross_entropy(z, targets, axis=axes, where=where)

    values, pull_back = jax.vjp(losses, wide(logits))
    (error,) = pull_back(jnp.ones_like(values))
    return jnp.sum(error * error, axis=axes)


MAX_NEWTON_STEPS = 64
"""Newton's method takes a handful; a bracket halves where it would leave it."""


def fit_temperature(
    logits: ArrayLike,
    targets: Targets,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
) -> Float[Array, ""]:
    """The temperature that makes logits fit targets best: temperature scaling.

    τ = argmin_τ mean of softmax_cross_entropy(logits / τ, targets)

    The loss is convex in 1 / τ. Newton's method finds its minimum with exact derivatives, and τ has
    its own, to the logits and to the masses of targets.

    Args:
      logits: z, float[..., V], of held-out examples.
      targets: As in `softmax_cross_entropy`.
      axis: The class axis, or several.
      where: As in `softmax_cross_entropy`.

    Returns:
      τ, a scalar, float32 (float64 for float64 logits): 0 where every target has all its mass on
      classes of the largest logit, ∞ where equal logits would fit better than these, and 1 where
      all logits of each example are equal.

    Raises:
      TypeError, ValueError: As in `softmax_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> logits, labels = jnp.array([[4.0, 0.0]] * 4), jnp.array([0, 0, 0, 1])
      >>> print(xentjax.fit_temperature(logits, labels).round(3))  # 4 / log 3
      3.641

    Source:
      Guo et al., On Calibration of Modern Neural Networks, 2017, section 4.2.
    """
    logits, axes = arguments.as_logits("logits", logits, axis)
    targets = arguments.as_arrays(targets)
    where = None if where is None else checks.as_array("where", where, "a bool array")
    run = functools.partial(_fit_temperature, axes=axes)
    every = tuple(range(logits.ndim))
    run = meshes.on_automatic_axes(run, logits, every, targets, where)
    return run(logits, targets, where)


def _fit_temperature(logits, targets, where, axes):
    return _best_temperature(*prepared(logits, targets, where, axes))


@jax.jit
def _best_temperature(logits, mass, mask):
    z = wide(masked(logits, mask))
    possible = z > -jnp.inf
    finite = jnp.where(possible, z, 0)

    def mean_loss(inverse):
        scaled = jnp.where(possible, inverse * finite, -jnp.inf)
        losses = reference.cross_entropy(scaled, mass)[0]
        return weighted_mean(losses, where=mask)

    slope = jax.grad(mean_loss)
    curvature = jax.grad(slope)
    zero = jnp.zeros((), z.dtype)
    excess = masked(mass.excess(z, z.max(-1)), mask).sum()
    is_flat = curvature(zero) == 0
    is_zero, is_infinite = excess == 0, slope(zero) >= 0
    regular = ~(is_flat | is_zero | is_infinite)
    start = -slope(zero) / jnp.where(regular, curvature(zero), 1)
    start = jnp.where(regular, start, 1)
    inverse = jax.lax.stop_gradient(_root(slope, curvature, start, regular))
    for _ in range(2):  # Each doubles the order to which derivatives are right.
        inverse = inverse - slope(inverse) / jnp.where(regular, curvature(inverse), 1)
    limit = jnp.where(is_zero, 0, jnp.inf)
    return jnp.where(
        is_flat, 1, jnp.where(regular, 1 / jnp.where(regular, inverse, 1), limit)
    ).astype(z.dtype)


def _root(slope, curvature, start, regular):
    """Returns where a convex function of x > 0 has the slope 0, or `start` if it is not regular."""

    def step(state):
        count, x, low, high, _ = state
        s = slope(x)
        low, high = jnp.where(s < 0, x, low), jnp.where(s > 0, x, high)
        newton = x - s / curvature(x)
        middle = jnp.where(high < jnp.inf, (low + high) / 2, 2 * x)
        new = jnp.where((newton > low) & (newton < high), newton, middle)
        new = jnp.where(s == 0, x, new)
        return count + 1, new, low, high, jnp.abs(new - x) <= 4 * jnp.finfo(x.dtype).eps * x

    def goes_on(state):
        count, *_, done = state
        return ~done & (count < MAX_NEWTON_STEPS)

    zero = jnp.zeros_like(start)
    state = jnp.zeros((), jnp.int32), start, zero, zero + jnp.inf, ~regular
    return jax.lax.while_loop(goes_on, step, state)[1]
