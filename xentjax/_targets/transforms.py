"""Functions from targets to targets: smoothing, mixing, re-weighting, and writing out.

They compose in any order. Only the one that writes targets out makes an array [..., V] from labels
or sparse targets.
"""

import functools
from collections.abc import Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, ArrayLike

from xentjax._jax import checks, value_checks
from xentjax._jax import mesh as _mesh
from xentjax._targets import types as _targets
from xentjax._targets.types import AnyTargets, SparseTargets, Targets

Floats = ArrayLike | Sequence[float]
Sparse = SparseTargets | int | Sequence[int] | npt.NDArray[np.integer[Any]]
"""All that a type checker can tell from dense targets; it does not see the dtype of a jax array."""


@overload
def smooth_labels(
    targets: Sparse, alpha: ArrayLike, *, background: Floats | None = None, axis: int = -1
) -> SparseTargets: ...
@overload
def smooth_labels(
    targets: Targets, alpha: ArrayLike, *, background: Floats | None = None, axis: int = -1
) -> Array | SparseTargets: ...
def smooth_labels(
    targets: Targets, alpha: ArrayLike, *, background: Floats | None = None, axis: int = -1
) -> Array | SparseTargets:
    """Moves a share alpha of the mass to a background distribution over all classes.

    t' = (1 − alpha) · t + alpha · background

    Smooth first and re-weight second where both are wanted: that is label smoothing under class
    weights as PyTorch has it. Targets of yes or no, one or several for an example, go to
    `smooth_binary_labels`; `value_checks` finds those that come here.

    Args:
      targets: Labels int[...], dense float[..., V], or SparseTargets.
      alpha: The share, a scalar in [0, 1].
      background: A distribution over the classes, float[V]; None is uniform, 1/V.
      axis: The class axis of dense targets; labels and SparseTargets have none.

    Returns:
      Dense targets for dense targets, SparseTargets otherwise; float64 where some mass is float64,
      and float32 elsewhere (labels alone: JAX's default dtype).

    Raises:
      ValueError: alpha is not a scalar in [0, 1], background is not float[V], or targets have no
        such axis.
      TypeError: alpha is not a real number, axis is not an int, or targets or background have a
        dtype that cannot be one.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> t = xentjax.smooth_labels(jnp.array([2, 0]), 0.5)
      >>> print(xentjax.dense_targets(t, 4))
      [[0.125 0.125 0.625 0.125]
       [0.625 0.125 0.125 0.125]]

    Source:
      Szegedy et al., Rethinking the Inception Architecture, 2016, section 7.
    """
    if getattr(targets, "dtype", None) == jnp.bool_:
        raise TypeError(
            "targets: expected integer labels, floating dense targets or SparseTargets, got "
            f"{checks.describe(targets)}; smooth_binary_labels is for yes or no"
        )
    targets, axis = classes_last(_targets.as_targets(targets), axis)
    if not isinstance(targets, SparseTargets):
        value_checks.check_one_class("targets", targets)
    alpha = as_number("alpha", alpha, 0, 1)
    if background is not None:
        background = _as_masses_of_classes("background", background, targets)
        value_checks.check_distributions("background", background, (0,))
    return classes_at(_smooth(targets, alpha, background), axis)


@functools.partial(jax.jit, inline=True)
def _smooth(targets, alpha, background):
    dtype = _targets.mass_dtype(targets, alpha, background)
    targets, alpha = _targets.in_dtype(targets, dtype), jnp.asarray(alpha, dtype)
    if isinstance(targets, SparseTargets):
        return _plus(_times(1 - alpha, targets), _times(alpha, _spread(targets, background)))
    num_classes = targets.shape[-1]
    row = jnp.full(num_classes, 1 / num_classes, dtype) if background is None else background
    return (1 - alpha) * targets + alpha * _as_row(row.astype(dtype), targets)


def _spread(targets, background):
    """Returns mass 1 on a background alone, for the batch of sparse `targets`."""
    # Slices of the targets are split over devices as these are.
    indices, weights = targets.indices[..., :0], targets.weights[..., :0]
    mass = weights.sum(-1) + jnp.ones((), weights.dtype)
    if background is None:
        return SparseTargets(indices, weights, mass)
    return SparseTargets(indices, weights, mass, background.astype(mass.dtype), background.size)


@overload
def mix_targets(a: Sparse, b: Sparse, lam: Floats, *, axis: int = -1) -> SparseTargets: ...
@overload
def mix_targets(
    a: Targets, b: Targets, lam: Floats, *, axis: int = -1
) -> Array | SparseTargets: ...
def mix_targets(a: Targets, b: Targets, lam: Floats, *, axis: int = -1) -> Array | SparseTargets:
    """Mixes two targets of any form.

    t = lam · a + (1 − lam) · b

    Mixed targets have one background for each that `a` and `b` do not share. To keep one, mix
    labels before smoothing them: that is the same.

    Args:
      a: Labels int[...], dense float[..., V], or SparseTargets.
      b: Targets of the same batch, in any form.
      lam: The share of `a`, in [0, 1]: a scalar, or one for each example, float[...].
      axis: The class axis of dense targets; labels and SparseTargets have none.

    Returns:
      Dense targets if either is dense, SparseTargets of K = K_a + K_b otherwise; float64 where some
      mass or `lam` is a float64 array, and float32 elsewhere (labels alone: JAX's default dtype).

    Raises:
      ValueError: Batches or classes differ, lam is neither a scalar nor of the batch's shape, or
        not in [0, 1], or targets have no such axis.
      TypeError: lam is not real, axis is not an int, or targets have a dtype that cannot be one.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> t = xentjax.mix_targets(jnp.array([0]), jnp.array([2]), 0.75)
      >>> print(t.indices, t.weights)
      [[0 2]] [[0.75 0.25]]

    Source:
      Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018, equation 1.
    """
    a, last = classes_last(_targets.as_targets(a, "a"), axis)
    b, _ = classes_last(_targets.as_targets(b, "b"), axis)
    batch, batch_b = _targets.batch_of(a), _targets.batch_of(b)
    checks.check(
        batch == batch_b, f"b: expected targets for the batch of a, {batch}, got {batch_b}"
    )
    classes, classes_b = _targets.num_classes_of(a), _targets.num_classes_of(b)
    checks.check(
        classes is None or classes_b in (None, classes),
        f"b: expected targets of {classes} classes, those of a, got {classes_b}",
    )
    lam = as_number("lam", lam, 0, 1, batch)
    is_shared = (
        isinstance(a, SparseTargets)
        and isinstance(b, SparseTargets)
        and a.background is b.background
    )
    return classes_at(mixed(a, b, lam, is_shared), last)


@functools.partial(jax.jit, static_argnames="is_shared", inline=True)
def mixed(a, b, lam, is_shared):
    dtype = _targets.mass_dtype(a, b, lam)
    a, b = _targets.in_dtype(a, dtype), _targets.in_dtype(b, dtype)
    lam = jnp.asarray(lam, dtype)
    if not isinstance(a, SparseTargets) or not isinstance(b, SparseTargets):
        num_classes = _targets.num_classes_of(b if isinstance(a, SparseTargets) else a)
        a, b = _written_out(a, num_classes), _written_out(b, num_classes)
        return _times(lam, a) + _times(1 - lam, b)
    return _plus(_times(lam, a), _times(1 - lam, b), is_shared)


def _times(share, targets):
    """Returns share · targets; the share is a scalar or one for each example."""
    return _targets.map_masses(lambda mass: _targets.expand_like(share, mass) * mass, targets)


def _plus(a, b, is_shared=False):
    """Returns a + b, both sparse; `is_shared` says that they have one background."""
    mass, background = _merged_backgrounds(a, b, is_shared)
    return SparseTargets(
        jnp.concatenate([a.indices, b.indices], axis=-1),
        jnp.concatenate([a.weights, b.weights], axis=-1),
        mass,
        background,
        a.num_classes or b.num_classes,
    )


def _merged_backgrounds(a, b, is_shared):
    """Returns (background_mass, background) of a + b, stacked where the two differ."""
    if a.background_mass is None or b.background_mass is None:
        only = b if a.background_mass is None else a
        return only.background_mass, only.background
    if is_shared or (a.background is None and b.background is None):
        return a.background_mass + b.background_mass, a.background
    (mass_a, priors_a), (mass_b, priors_b) = (
        _as_priors(t, a.num_classes or b.num_classes) for t in (a, b)
    )
    mass = jnp.concatenate([mass_a, mass_b], axis=-1)
    return mass, jnp.concatenate([priors_a, priors_b], axis=-2)


def _as_priors(targets, num_classes):
    """Returns (mass [..., B], background [1, ..., 1, B, V]) where the background may be uniform."""
    mass, background = targets.background_mass, targets.background
    if background is not None:
        return mass, background
    uniform = jnp.full((*(1,) * mass.ndim, 1, num_classes), 1 / num_classes, mass.dtype)
    return mass[..., None], uniform


@overload
def reweight_targets(
    targets: Sparse, class_weights: Floats, *, axis: int = -1
) -> SparseTargets: ...
@overload
def reweight_targets(
    targets: Targets, class_weights: Floats, *, axis: int = -1
) -> Array | SparseTargets: ...
def reweight_targets(
    targets: Targets, class_weights: Floats, *, axis: int = -1
) -> Array | SparseTargets:
    """Multiplies the mass on each class by that class's weight.

    t'_v = class_weights_v · t_v

    The total mass T is then no longer 1, and the losses still hold. PyTorch divides the sum of such
    losses by the sum of `class_weights[labels]`: give `weighted_mean` neither, and write
    `WeightedSum(losses.sum(), class_weights[labels].sum()).mean()`.

    Args:
      targets: Labels int[...], dense float[..., V], or SparseTargets. A class outside [0, V) keeps
        its weight, and the loss of its example is NaN unless it is masked out there.
      class_weights: float[V].
      axis: The class axis of dense targets; labels and SparseTargets have none.

    Returns:
      Dense targets for dense targets, SparseTargets otherwise; float64 where some mass or weight is
      float64, and float32 elsewhere (labels alone: JAX's default dtype).

    Raises:
      ValueError: class_weights is not of shape [V], or targets are of other classes or have no such
        axis.
      TypeError: class_weights is not floating-point, axis is not an int, or targets have a dtype
        that cannot be one.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> t = xentjax.reweight_targets(jnp.array([1, 0]), jnp.array([1.0, 5.0]))
      >>> print(xentjax.dense_targets(t, 2))
      [[0. 5.]
       [1. 0.]]

    Source:
      King and Zeng, Logistic Regression in Rare Events Data, 2001, section 4.2.
    """
    targets, axis = classes_last(_targets.as_targets(targets), axis)
    class_weights = _as_masses_of_classes("class_weights", class_weights, targets)
    value_checks.check_masses("class_weights", class_weights)
    return classes_at(_reweight(targets, class_weights), axis)


@functools.partial(jax.jit, inline=True)
def _reweight(targets, class_weights):
    dtype = _targets.mass_dtype(targets, class_weights)
    targets, class_weights = _targets.in_dtype(targets, dtype), class_weights.astype(dtype)
    if not isinstance(targets, SparseTargets):
        return targets * _as_row(class_weights, targets)
    num_classes, mass = class_weights.size, targets.background_mass
    background = None
    if mass is not None:
        mass, background = _as_priors(targets, num_classes)
        background = background * _as_row(class_weights, background)
    pick = _mesh.on_automatic_axes(_weights_of_classes, targets.indices, ())
    weights = targets.weights * pick(targets.indices, class_weights)
    return SparseTargets(targets.indices, weights, mass, background, num_classes)


def _weights_of_classes(indices, class_weights):
    """Returns class_weights[indices], and 1 for classes outside [0, V)."""
    picked = class_weights.at[indices].get(mode="clip")
    return jnp.where(_targets.is_valid(indices, class_weights.size), picked, jnp.ones_like(picked))


def dense_targets(targets: Targets, num_classes: int, *, axis: int = -1) -> Array:
    """Writes targets of any form out as one mass per class.

    t_v = Σ_k weights_k · [indices_k = v] + background_mass · background_v

    The losses never need it: it is for looking, and for mixing with dense targets.

    Args:
      targets: Labels int[...], dense float[..., V], or SparseTargets.
      num_classes: V.
      axis: The class axis of the masses returned, and that of dense targets.

    Returns:
      Masses, float[..., V]: float64 where some mass is float64, and float32 elsewhere (labels
      alone: JAX's default dtype). A label outside [0, V) makes its row NaN.

    Raises:
      ValueError: num_classes is not positive, or targets are not for `num_classes` classes or have
        no such axis.
      TypeError: num_classes or axis is not an int, or targets have a dtype that cannot be one.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.dense_targets(jnp.array([2, 0]), 3))
      [[0. 0. 1.]
       [1. 0. 0.]]
    """
    _targets.check_num_classes("num_classes", num_classes)
    masses, axis = classes_last(_targets.as_targets(targets), axis)
    known = _targets.num_classes_of(masses)
    checks.check(
        known in (None, num_classes),
        f"targets: expected {num_classes} classes, num_classes, got {known}",
    )
    dense: Array = _dense(masses, int(num_classes))
    return classes_at(dense, axis)


@functools.partial(jax.jit, static_argnames="num_classes", inline=True)
def _dense(targets, num_classes):
    targets = _targets.in_dtype(targets, _targets.mass_dtype(targets))
    return _written_out(targets, num_classes)


def _written_out(targets, num_classes):
    """Returns the mass on each class, [..., V]."""
    if not isinstance(targets, SparseTargets):
        return targets

    def write(targets):
        indices, weights = targets.indices, targets.weights
        valid = _targets.is_valid(indices, num_classes).all(-1, keepdims=True)
        rows = _background_rows(targets, num_classes)
        rows = jnp.where(valid, rows, jnp.full_like(rows, jnp.nan))
        rows = jnp.broadcast_to(rows, (*targets.batch_shape, num_classes))
        if indices.shape[-1] == 0:
            return rows
        batch = tuple(range(rows.ndim - 1))
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(),
            inserted_window_dims=(rows.ndim - 1,),
            scatter_dims_to_operand_dims=(rows.ndim - 1,),
            operand_batching_dims=batch,
            scatter_indices_batching_dims=batch,
        )
        return jax.lax.scatter_add(rows, indices[..., None], weights, numbers, mode="drop")

    last = targets.indices.ndim - 1
    return _mesh.on_automatic_axes(write, targets.indices, (last,))(targets)


def _background_rows(targets, num_classes):
    """Returns the background's mass on each class, [..., V], or [..., 1] where it is the same."""
    mass, background = targets.background_mass, targets.background
    if mass is None:
        return jnp.zeros((*targets.batch_shape, 1), targets.weights.dtype)
    if background is None:
        return mass[..., None] / jnp.asarray(num_classes, mass.dtype)
    return (mass[..., None] * background).sum(-2)


def classes_last(targets: AnyTargets, axis: int) -> tuple[AnyTargets, int]:
    """Returns (targets with their classes last, the class axis): checked, whatever the form."""
    ndim = len(_targets.batch_of(targets)) + 1
    checks.check(not isinstance(axis, Sequence), f"axis: expected an int, got {axis!r}", TypeError)
    (axis,) = checks.canonical_axes(axis, ndim)
    if not isinstance(targets, SparseTargets) and axis != ndim - 1:
        targets = jnp.moveaxis(targets, axis, -1)
    return targets, axis


def classes_at(targets: AnyTargets, axis: int) -> AnyTargets:
    """Undoes `classes_last`."""
    if isinstance(targets, SparseTargets) or axis == targets.ndim - 1:
        return targets
    return jnp.moveaxis(targets, -1, axis)


def _as_row(x, other):
    """Returns x, [V], with axes of size 1 in front, to stand against `other`."""
    return x.reshape((1,) * (other.ndim - 1) + x.shape)


def as_number(
    name: str, x: ArrayLike | Sequence[float], low: float, high: float, batch: tuple[int, ...] = ()
) -> ArrayLike:
    """Returns a finite number in [low, high] as it is, or such an array of the batch's shape."""
    if checks.is_int(x):
        x = float(x)  # JAX takes no int beyond its own.
    if not isinstance(x, float):
        x = checks.as_array(name, x, "a real number")
        checks.check(
            jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer),
            f"{name}: expected a real number, got {checks.describe(x)}",
            TypeError,
        )
        example = f" or shape {batch}, one for each example" if batch else ""
        checks.check(
            x.shape in ((), batch), f"{name}: expected a scalar{example}, got {checks.describe(x)}"
        )
    checks.check_interval(name, x, low, high)
    return x


def _as_masses_of_classes(name, x, targets):
    """Returns an array float[V] of the classes of `targets`."""
    x = checks.as_array(name, x)
    checks.check_floating(name, x)
    checks.check(
        x.ndim == 1 and x.size > 0, f"{name}: expected shape [V], got {checks.describe(x)}"
    )
    known = _targets.num_classes_of(targets)
    checks.check(
        known in (None, x.size),
        f"{name}: expected {known} classes, those of targets, got {checks.describe(x)}",
    )
    return x
