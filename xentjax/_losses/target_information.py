"""Entropy of targets of any form, and the divergence of a prediction from them."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import arithmetic, checks, value_checks
from xentjax._jax import mesh as meshes
from xentjax._jax.rule import Rule, apply
from xentjax._losses import arguments
from xentjax._losses.divergence import kl_parts
from xentjax._losses.softmax import prepared
from xentjax._softmax import reference
from xentjax._softmax.partial import masked
from xentjax._targets import mass as masses
from xentjax._targets import transforms, types
from xentjax._targets.mass import times
from xentjax._targets.types import SparseTargets, Targets


def target_entropy(
    targets: Targets, num_classes: int, *, axis: int = -1, base: float | None = None
) -> Float[Array, "*batch"]:
    """Entropy of targets of any form: the least that their cross-entropy can be.

    H(t) = −Σ_v t_v · log t_v

    Labels have 0. Smoothed labels and other sparse targets are not written out, unless they have a
    background that is not uniform.

    Args:
      targets: Labels int[...], dense float[..., V], or SparseTargets.
      num_classes: V.
      axis: The class axis of dense targets; labels and SparseTargets have none.
      base: The base of the logarithm: 2 gives bits; None is e, for nats.

    Returns:
      Entropies, one for each example: float64 where some mass is float64, and float32 elsewhere
      (labels alone: JAX's default dtype). A label outside [0, V) gives NaN.

    Raises:
      ValueError: num_classes is not positive, targets are not for `num_classes` classes or have no
        such axis, or base is not a positive number other than 1.
      TypeError: num_classes or axis is not an int, or targets have a dtype that cannot be one.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> smoothed = xentjax.smooth_labels(jnp.array([0, 1]), 0.1)
      >>> print(xentjax.target_entropy(smoothed, 1000).round(4))
      [1.0148 1.0148]

    Source:
      Shannon, A Mathematical Theory of Communication, 1948, section 6.
    """
    types.check_num_classes("num_classes", num_classes)
    targets, _ = transforms.classes_last(types.as_targets(targets), axis)
    known = types.num_classes_of(targets)
    checks.check(
        known in (None, num_classes),
        f"targets: expected {num_classes} classes, num_classes, got {known}",
    )
    if isinstance(targets, SparseTargets):
        value_checks.check_labels(targets.indices, num_classes, None)
        array, last = targets.indices, targets.indices.ndim - 1
    else:
        array, last = targets, targets.ndim - 1
    run = functools.partial(_target_entropy, num_classes=int(num_classes))
    run = meshes.on_automatic_axes(run, array, (last,), targets)
    return arguments.in_base(run(targets), base)


@functools.partial(jax.jit, static_argnames="num_classes")
def _target_entropy(targets, num_classes):
    dtype = types.mass_dtype(targets)
    mass = masses.mass_of(targets, num_classes, dtype, None)
    if not masses.only_points_are_heavy(mass):
        shape = (*types.batch_of(targets), num_classes)
        return _information(_written_out(mass, jnp.zeros(shape, dtype))).sum(-1)
    density = mass.density()
    each = jnp.zeros((), dtype) if density is None else density  # For a class that is no point.
    totals, is_class = _totals(*mass.points)
    of_points = jnp.where(is_class, _information(totals + each), 0).sum(-1)
    if density is None:
        return of_points
    others = (num_classes - is_class.sum(-1)).astype(dtype)
    return of_points + others * _information(density[..., 0])


def _totals(indices, weights):
    """Returns the mass on each class among the points, [..., K], and which of the K there are."""
    indices, weights = jax.lax.sort((indices, weights), num_keys=1)
    is_new = jnp.concatenate(
        [jnp.ones_like(indices[..., :1]), indices[..., 1:] != indices[..., :-1]], axis=-1
    )
    place = jnp.cumsum(is_new, axis=-1) - 1
    totals = masses.add_at(jnp.zeros_like(weights), place, weights)
    return totals, jax.lax.broadcasted_iota(place.dtype, place.shape, place.ndim - 1) <= place[
        ..., -1:
    ]


def _information(t):
    """Returns −t · log t, with 0 · log 0 = 0."""
    return 0 - arithmetic.times_log(t, jnp.where(t == 0, 1, t))


def _written_out(mass, zeros):
    """Returns the mass on each class, [..., V]."""
    density = mass.density()
    dense = zeros if density is None else zeros + density
    return dense if mass.points is None else masses.add_at(dense, *mass.points)


def target_kl_divergence(
    logits: ArrayLike,
    targets: Targets,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    base: float | None = None,
) -> Float[Array, "*batch"]:
    """Kullback-Leibler divergence of softmax(logits) from targets of any form.

    KL(t ‖ q) = Σ_v t_v · log(t_v / q_v) = softmax_cross_entropy − target_entropy,   q = softmax(z)

    Exact however near q is to t, where the difference of the two would cancel. Its gradient to the
    logits is that of `softmax_cross_entropy`, which takes less memory: this function writes sparse
    targets out as an array of the logits' size.

    Args:
      logits: z, float[..., V].
      targets: As in `softmax_cross_entropy`.
      axis: The class axis, or several.
      where: As in `softmax_cross_entropy`.
      base: The base of the logarithm: 2 gives bits; None is e, for nats.

    Returns:
      Divergences, of the logits' shape without `axis`; +inf where q is 0 and t is not.

    Raises:
      TypeError, ValueError: As in `softmax_cross_entropy`, or base is not a positive number other
        than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> t = xentjax.smooth_labels(jnp.array([0]), 0.1)
      >>> print(xentjax.target_kl_divergence(jnp.array([[3.0, 0.0, 0.0]]), t).round(4))
      [0.0038]

    Source:
      Kullback and Leibler, On Information and Sufficiency, 1951, equation 2.4.
    """
    logits, axes = arguments.as_logits("logits", logits, axis)
    targets = arguments.as_arrays(targets)
    where = None if where is None else checks.as_array("where", where, "a bool array")
    run = functools.partial(_target_kl_divergence, axes=axes)
    run = meshes.on_automatic_axes(run, logits, axes, targets, where)
    return arguments.in_base(run(logits, targets, where), base)


@arguments.jit_unless_traced("axes")
def _target_kl_divergence(logits, targets, where, axes):
    z, mass, mask = prepared(logits, targets, where, axes)
    z = masked(z, mask)
    t = _written_out(mass, jnp.zeros(z.shape, mass.total().dtype))
    return masked(apply(_TargetKL(), z, t), mask)


@dataclasses.dataclass(frozen=True)
class _TargetKL(Rule):
    """(logits [..., V], masses [..., V]) -> KL(t ‖ softmax(z)), [...].

    With T = Σ_v t_v it is T · KL(t / T ‖ q) + T · log T, and t / T = softmax(log t).
    """

    def reference(self, *args):
        logits, t = args
        surprisals = reference.surprisals(logits.astype(t.dtype))
        return jnp.sum(times(t, surprisals) - _information(t), axis=-1)

    def forward(self, backend, needs_grad, *args):
        del backend, needs_grad
        parts, total, log_total = self._parts(*args)
        return (total * parts.divergence + total * log_total)[..., 0], ()

    def backward(self, backend, needs_grad, args, summary, cotangents):
        """∂KL/∂z = T · q − t, ∂KL/∂t = log(t / q) + 1; where t is 0, −log q."""
        del backend, needs_grad, summary
        _, t = args
        parts, total, log_total = self._parts(*args)
        log_ratio = log_total - (parts.d - parts.finite_divergence) + 1
        to_mass = jnp.where(t > 0, log_ratio, parts.finite_divergence - parts.x)
        slopes = total * parts.q_less_p(), to_mass
        cotangent = cotangents[..., None]
        return tuple(jnp.where(cotangent == 0, 0, cotangent * slope) for slope in slopes)

    def _parts(self, logits, t):
        log_t = jnp.log(jnp.where(t == 0, 1, t))
        log_t = jnp.where(t == 0, -jnp.inf, log_t)
        total = t.sum(-1, keepdims=True)
        log_total = jnp.log(jnp.where(total == 0, 1, total))
        return kl_parts(log_t, logits.astype(t.dtype), (t.ndim - 1,)), total, log_total
