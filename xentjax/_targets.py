"""What the truth looks like: labels, dense distributions, and sparse targets.

A target is a non-negative mass t_v over the V classes. Its total T = Σ_v t_v need not be 1.
Smoothing, mixing and re-weighting are functions from targets to targets.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from xentjax import _checks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseTargets:
    """Targets with mass on K classes each, and the rest spread over a background.

    t = Σ_k weights_k · onehot(indices_k) + background_mass · background

    A pytree: it goes through jit, vmap, scan and shard_map as an array does. Classes may repeat
    among the K; their weights add. The shapes are checked where the targets are used.

    Attributes:
      indices: Classes in [0, V), int[..., K].
      weights: Their mass, float[..., K].
      background_mass: Mass of the background, float[...]; None is no background at all.
      background: The distribution of that mass over all classes, float[V]; None is uniform, 1/V.
        Mixing targets that have different backgrounds stacks them: background float[B, V] with
        background_mass float[..., B].

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> t = xentjax.SparseTargets(jnp.array([[2, 0]]), jnp.array([[0.7, 0.3]]))
      >>> print(xentjax.dense_targets(t, 3))
      [[0.3 0.  0.7]]
    """

    indices: Int[Array, "*batch k"]
    weights: Float[Array, "*batch k"]
    background_mass: Float[Array, "*batch"] | None = None
    background: Float[Array, " v"] | None = None


Targets = ArrayLike | SparseTargets
"""Integer labels [...], dense targets float[..., V], or SparseTargets."""


def as_targets(targets: Targets, name: str = "targets") -> jax.Array | SparseTargets:
    """Returns `targets` as dense float[..., V] or SparseTargets; labels become K = 1 of weight 1.

    Raises:
      TypeError: A dtype is neither integer (labels) nor floating (masses).
      ValueError: The parts of SparseTargets do not fit each other.
    """
    if not isinstance(targets, SparseTargets):
        array = _as_classes(name, targets)
        _checks.check(
            jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating),
            f"{name}: expected integer labels, floating dense targets or SparseTargets, "
            f"got {_checks.describe(array)}",
            TypeError,
        )
        if jnp.issubdtype(array.dtype, jnp.floating):
            return array
        return SparseTargets(array[..., None], jnp.ones((*array.shape, 1), float))

    indices = _as_classes("targets.indices", targets.indices)
    weights = _checks.as_array("targets.weights", targets.weights)
    _checks.check(
        jnp.issubdtype(indices.dtype, jnp.integer) and indices.ndim > 0,
        f"targets.indices: expected integers of shape [..., K], got {_checks.describe(indices)}",
        TypeError,
    )
    _checks.check_floating("targets.weights", weights)
    _checks.check_shape("targets.weights", weights, indices.shape, "that of targets.indices")
    mass, background = targets.background_mass, targets.background
    if mass is None:
        _checks.check(
            background is None,
            "targets.background_mass: expected an array beside targets.background, got None",
        )
        return SparseTargets(indices, weights)
    mass = _checks.as_array("targets.background_mass", mass)
    _checks.check_floating("targets.background_mass", mass)
    batch = indices.shape[:-1]
    if background is not None:
        background = _checks.as_array("background", background)
        _checks.check_floating("targets.background", background)
        _checks.check(
            background.ndim in (1, 2),
            "targets.background: expected shape [V], or [B, V] when stacked, "
            f"got {_checks.describe(background)}",
        )
        batch = batch + background.shape[:-1]
    _checks.check_shape("targets.background_mass", mass, batch, "the batch of targets.indices")
    return SparseTargets(indices, weights, mass, background)


def _as_classes(name: str, x: ArrayLike) -> jax.Array:
    """Returns `x` as a jax array; integers too large for int32 stay out of range, not wrapped."""
    if isinstance(x, np.ndarray | np.generic) and np.issubdtype(x.dtype, np.integer):
        x = _as_int32(x)  # At once: where JAX has no int64 it would wrap.
    x = _checks.as_array(name, x, "integer labels, floating dense targets or SparseTargets")
    return _as_int32(x) if jnp.issubdtype(x.dtype, jnp.integer) else x


def _as_int32(x: Any) -> Any:
    """Returns integers, of NumPy or JAX, as the nearest int32."""
    ours, theirs = jnp.iinfo(jnp.int32), jnp.iinfo(x.dtype)
    return x.clip(max(ours.min, theirs.min), min(ours.max, theirs.max)).astype(jnp.int32)


def check_targets(
    targets: jax.Array | SparseTargets, batch: tuple[int, ...], num_classes: int
) -> None:
    """Raises ValueError unless `targets` are for `batch` examples of `num_classes` classes."""
    if not isinstance(targets, SparseTargets):
        fits = f"{batch} labels or {(*batch, num_classes)} masses: batch and classes of the logits"
        _checks.check_shape("targets", targets, (*batch, num_classes), fits)
        return
    _checks.check(
        targets.indices.shape[:-1] == batch,
        f"targets: expected shape {batch} for labels, {(*batch, 'K')} for sparse indices or "
        f"{(*batch, num_classes)} for floating dense targets (the batch of the logits), got "
        f"{targets.indices.shape[:-1]} labels or {targets.indices.shape} indices",
    )
    if targets.background is not None:
        _checks.check(
            targets.background.shape[-1] == num_classes,
            f"targets.background: expected {num_classes} classes, those of the logits, "
            f"got {_checks.describe(targets.background)}",
        )


def invalid_as_nan(targets: SparseTargets, num_classes: int) -> SparseTargets:
    """Gives NaN weight to classes outside [0, V), so that their loss and gradient are NaN."""
    valid = is_valid(targets.indices, num_classes)
    return dataclasses.replace(
        targets,
        indices=jnp.clip(targets.indices, 0, num_classes - 1),
        weights=jnp.where(valid, targets.weights, jnp.nan),
    )


def is_valid(labels: jax.Array, num_classes: int) -> jax.Array:
    """Returns where labels are in [0, V)."""
    return (labels >= 0) & (labels < num_classes)


def map_masses(
    function: Callable[[jax.Array], jax.Array], targets: jax.Array | SparseTargets
) -> jax.Array | SparseTargets:
    """Applies `function` to every array of mass: dense, or weights and background_mass."""
    if not isinstance(targets, SparseTargets):
        return function(targets)
    mass = targets.background_mass
    return dataclasses.replace(
        targets,
        weights=function(targets.weights),
        background_mass=None if mass is None else function(mass),
    )


def backgrounds(
    targets: SparseTargets, num_classes: int
) -> Iterator[tuple[jax.Array, jax.Array | float]]:
    """Yields (mass [...], distribution [V] or the scalar 1/V) for each background."""
    mass, background = targets.background_mass, targets.background
    if mass is None:
        return
    if background is None:
        yield mass, 1.0 / num_classes
    elif background.ndim == 1:
        yield mass, background
    else:
        for b in range(background.shape[0]):
            yield mass[..., b], background[b]


def times_mass(mass: jax.Array | float, cost: jax.Array) -> jax.Array:
    """Returns mass · cost with 0 · inf = 0."""
    return mass * jnp.where((mass == 0) & jnp.isposinf(cost), 0, cost)


def expectation(
    targets: jax.Array | SparseTargets,
    logits: jax.Array,
    cost: Callable[[jax.Array], jax.Array],
    mean: float | None = None,
) -> jax.Array:
    """Returns Σ_v t_v · cost(z)_v, [...], for an elementwise `cost` of logits z, [..., V].

    This one sum is every cross-entropy: only the classes that hold mass are looked at. `mean` is
    that of the cost over all classes, where it is known without looking.
    """
    if not isinstance(targets, SparseTargets):
        return times_mass(targets, cost(logits)).sum(-1)
    picked = cost(jnp.take_along_axis(logits, targets.indices, axis=-1))
    total = times_mass(targets.weights, picked).sum(-1)
    for mass, distribution in backgrounds(targets, logits.shape[-1]):
        if mean is not None and targets.background is None:
            total += mass * mean
        else:
            total += times_mass(mass, times_mass(distribution, cost(logits)).sum(-1))
    return total


def masked(tree: Any, mask: jax.Array | None) -> Any:
    """Returns `tree` with 0 in the examples masked out; its arrays are [...] or [..., K]."""
    if mask is None:
        return tree
    return jax.tree.map(lambda x: jnp.where(expand_like(mask, x), x, jnp.zeros_like(x)), tree)


def kept(
    targets: jax.Array | SparseTargets, mask: jax.Array | None, dtype: jax.typing.DTypeLike
) -> jax.Array | SparseTargets:
    """Returns targets in the dtype of the arithmetic, without mass where masked out."""
    targets = map_masses(lambda mass: masked(mass.astype(dtype), mask), targets)
    if isinstance(targets, SparseTargets) and targets.background is not None:
        return dataclasses.replace(targets, background=targets.background.astype(dtype))
    return targets


def background_over(targets: SparseTargets, num_classes: int) -> jax.Array:
    """Returns the background's mass on every class, [..., V], or [..., 1] where it is uniform."""
    total = jnp.zeros((*targets.indices.shape[:-1], 1), targets.weights.dtype)
    for mass, distribution in backgrounds(targets, num_classes):
        total = total + mass[..., None] * distribution
    return total


def mass_at(targets: SparseTargets, classes: jax.Array, num_classes: int) -> jax.Array:
    """Returns the mass that sparse targets have on classes int[..., J], as float[..., J]."""
    same = classes[..., :, None] == targets.indices[..., None, :]
    total = jnp.where(same, targets.weights[..., None, :], 0).sum(-1)
    for mass, distribution in backgrounds(targets, num_classes):
        total += mass[..., None] * jnp.broadcast_to(distribution, num_classes)[classes]
    return total


def is_heaviest(targets, prediction, num_classes):
    """Returns whether no class holds more target mass than `prediction` does."""
    if not isinstance(targets, SparseTargets):
        held = jnp.take_along_axis(targets, prediction[..., None], axis=-1)[..., 0]
        return held == targets.max(-1)

    heaviest = mass_at(targets, targets.indices, num_classes).max(-1, initial=0)
    background = background_over(targets, num_classes)  # It may be the heaviest alone.
    heaviest = jnp.maximum(heaviest, jnp.max(background, axis=-1))
    return mass_at(targets, prediction[..., None], num_classes)[..., 0] >= heaviest


def put_at(x: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    """Returns x [..., V] with x[..., indices_k] = values_k; equal indices have equal values."""
    num_classes, k = x.shape[-1], indices.shape[-1]
    if k <= _FEW:
        classes = jax.lax.broadcasted_iota(indices.dtype, x.shape, x.ndim - 1)
        for j in range(k):
            x = jnp.where(classes == indices[..., j, None], values[..., j, None], x)
        return x
    # The scatter's transpose needs distinct indices: repeats go out of range and are dropped.
    indices = jnp.where(is_repeated(indices), num_classes + jnp.arange(k), indices)
    return x.at[_rows_and(indices)].set(values, mode="drop", unique_indices=True)


def is_repeated(indices: jax.Array) -> jax.Array:
    """Returns where an index [..., K] is one of those before it too."""
    order = jnp.arange(indices.shape[-1])
    same = indices[..., :, None] == indices[..., None, :]
    return (same & (order[:, None] > order)).any(-1)


# Up to here a comparison in the loop that writes x costs less than a scatter after it.
_FEW = 4


def smooth_labels(
    targets: Targets, alpha: ArrayLike, *, background: ArrayLike | None = None
) -> jax.Array | SparseTargets:
    """Moves a share alpha of the mass to a background distribution over all classes.

    t' = (1 − alpha) · t + alpha · background

    Smooth first and re-weight second where both are wanted: that is label smoothing under class
    weights as PyTorch has it.

    Args:
      targets: Labels int[...], dense float[..., V], or SparseTargets.
      alpha: The share, a scalar in [0, 1].
      background: A distribution over the classes, float[V]; None is uniform, 1/V.

    Returns:
      Dense targets for dense targets, SparseTargets otherwise.

    Raises:
      ValueError: alpha is not a scalar in [0, 1], or background is not float[V].
      TypeError: Targets or background have a dtype that cannot be one.

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
    targets = as_targets(targets)
    _checks.check_shape("alpha", jnp.asarray(alpha), (), "a scalar")
    _checks.check_interval("alpha", alpha, 0.0, 1.0)
    if background is not None:
        background = _checks.as_array("background", background)
        _checks.check_floating("background", background)
        _checks.check(
            background.ndim == 1,
            f"background: expected shape [V], got {_checks.describe(background)}",
        )
        _checks.check(
            _classes_of(targets) in (None, background.shape[-1]),
            f"background: expected {_classes_of(targets)} classes, those of targets, got "
            f"{_checks.describe(background)}",
        )
    batch = targets.indices.shape[:-1] if isinstance(targets, SparseTargets) else targets.shape[:-1]
    spread = SparseTargets(
        jnp.zeros((*batch, 0), jnp.int32),
        jnp.zeros((*batch, 0), float),
        jnp.ones(batch, float),
        background,
    )
    return mix_targets(targets, spread, 1 - jnp.asarray(alpha))


def mix_targets(a: Targets, b: Targets, lam: ArrayLike) -> jax.Array | SparseTargets:
    """Mixes two targets of any form.

    t = lam · a + (1 − lam) · b

    Args:
      a: Labels int[...], dense float[..., V], or SparseTargets.
      b: Targets of the same batch, in any form.
      lam: The share of `a`, in [0, 1]: a scalar, or one for each example, float[...].

    Returns:
      Dense targets if either is dense, SparseTargets of K = K_a + K_b otherwise.

    Raises:
      ValueError: Batches or classes differ, or lam is neither a scalar nor of the batch's shape, or
        not in [0, 1].
      TypeError: Targets have a dtype that cannot be one.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> t = xentjax.mix_targets(jnp.array([0]), jnp.array([2]), 0.75)
      >>> print(t.indices, t.weights)
      [[0 2]] [[0.75 0.25]]

    Source:
      Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018, equation 1.
    """
    a, b = as_targets(a, "a"), as_targets(b, "b")
    _checks.check_interval("lam", lam, 0.0, 1.0)
    lam = _checks.as_array("lam", lam)
    if not jnp.issubdtype(lam.dtype, jnp.floating):
        lam = lam.astype(float)
    batch_a, batch_b = batch_of(a), batch_of(b)
    _checks.check(
        batch_a == batch_b, f"b: expected targets for the batch of a, {batch_a}, got {batch_b}"
    )
    _checks.check(
        lam.shape in ((), batch_a),
        f"lam: expected a scalar or shape {batch_a}, one for each example, got {lam.shape}",
    )
    if not isinstance(a, SparseTargets) or not isinstance(b, SparseTargets):
        num_classes = next(x.shape[-1] for x in (a, b) if not isinstance(x, SparseTargets))
        _checks.check(
            _classes_of(b) in (None, num_classes),
            f"b: expected targets of {num_classes} classes, those of a, got {_classes_of(b)}",
        )
        share = lam[..., None]
        return share * dense_targets(a, num_classes) + (1 - share) * dense_targets(b, num_classes)
    return SparseTargets(
        jnp.concatenate([a.indices, b.indices], axis=-1),
        jnp.concatenate([lam[..., None] * a.weights, (1 - lam)[..., None] * b.weights], axis=-1),
        *_merge_backgrounds(_scaled_background(a, lam), _scaled_background(b, 1 - lam)),
    )


def _classes_of(targets: jax.Array | SparseTargets) -> int | None:
    """Returns V where the targets know it."""
    array = targets.background if isinstance(targets, SparseTargets) else targets
    return None if array is None else array.shape[-1]


def _scaled_background(targets: SparseTargets, share: jax.Array) -> SparseTargets:
    """Returns targets with `share`, a scalar or [...], of their background's mass."""
    mass = targets.background_mass
    mass = None if mass is None else expand_like(share, mass) * mass
    return dataclasses.replace(targets, background_mass=mass)


def _merge_backgrounds(
    a: SparseTargets, b: SparseTargets
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns (background_mass, background) of a + b, stacked only where the two differ."""
    if a.background_mass is None or b.background_mass is None:
        only = b if a.background_mass is None else a
        return only.background_mass, only.background
    if a.background is b.background:
        return a.background_mass + b.background_mass, a.background
    sizes = {x.background.shape[-1] for x in (a, b) if x.background is not None}
    num_classes = sizes.pop()
    _checks.check(
        not sizes,
        f"b: expected a background over {_classes_of(a)} classes, those of a, got {_classes_of(b)}",
    )
    pairs = [*backgrounds(a, num_classes), *backgrounds(b, num_classes)]
    rows = [jnp.broadcast_to(distribution, (num_classes,)) for _, distribution in pairs]
    return jnp.stack([mass for mass, _ in pairs], axis=-1), jnp.stack(rows)


def reweight_targets(targets: Targets, class_weights: ArrayLike) -> jax.Array | SparseTargets:
    """Multiplies the mass on each class by that class's weight.

    t'_v = class_weights_v · t_v

    The total mass T is then no longer 1, and the losses still hold. For the class-weighted mean of
    PyTorch, give `weighted_mean` the totals as well: see the README.

    Args:
      targets: Labels int[...], dense float[..., V], or SparseTargets.
      class_weights: float[V].

    Returns:
      Dense targets for dense targets, SparseTargets otherwise.

    Raises:
      ValueError: class_weights is not of shape [V].
      TypeError: class_weights is not floating-point, or targets have a dtype that cannot be one.

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
    targets = as_targets(targets)
    class_weights = _checks.as_array("class_weights", class_weights)
    _checks.check_floating("class_weights", class_weights)
    _checks.check(
        class_weights.ndim == 1,
        f"class_weights: expected shape [V], got {_checks.describe(class_weights)}",
    )
    (num_classes,) = class_weights.shape
    if not isinstance(targets, SparseTargets):
        _checks.check_shape(
            "class_weights", class_weights, targets.shape[-1:], "the classes of targets"
        )
        return targets * class_weights
    background = targets.background
    if targets.background_mass is not None:
        if background is None:
            background = jnp.full_like(class_weights, 1 / num_classes)
        _checks.check_shape(
            "class_weights", class_weights, background.shape[-1:], "the classes of targets"
        )
        background = background * class_weights
    valid = is_valid(targets.indices, num_classes)
    weights = class_weights[jnp.where(valid, targets.indices, 0)]
    return dataclasses.replace(
        targets,
        weights=targets.weights * jnp.where(valid, weights, jnp.nan),
        background=background,
    )


def dense_targets(targets: Targets, num_classes: int) -> jax.Array:
    """Writes targets of any form out as one mass per class.

    t_v = Σ_k weights_k · [indices_k = v] + background_mass · background_v

    The losses never need it: it is for looking, and for mixing with dense targets.

    Args:
      targets: Labels int[...], dense float[..., V], or SparseTargets.
      num_classes: V.

    Returns:
      Masses, float[..., V]. A label outside [0, V) makes its row NaN.

    Raises:
      ValueError: Targets are not for `num_classes` classes.
      TypeError: Targets have a dtype that cannot be one.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.dense_targets(jnp.array([2, 0]), 3))
      [[0. 0. 1.]
       [1. 0. 0.]]
    """
    targets = as_targets(targets)
    _checks.check(
        isinstance(num_classes, int | np.integer) and num_classes > 0,
        f"num_classes: expected a positive int, got {num_classes!r}",
    )
    check_targets(targets, batch_of(targets), num_classes)
    if not isinstance(targets, SparseTargets):
        return targets
    valid = is_valid(targets.indices, num_classes).all(-1, keepdims=True)
    dense = background_over(targets, num_classes)
    dense = jnp.broadcast_to(jnp.where(valid, dense, jnp.nan), (*batch_of(targets), num_classes))
    return dense.at[_rows_and(targets.indices)].add(targets.weights, mode="drop")


def _rows_and(indices: jax.Array) -> tuple[jax.Array, ...]:
    """Returns what indexes the classes `indices` [..., K] of an array [..., V]."""
    rows = jnp.meshgrid(*map(jnp.arange, indices.shape), indexing="ij", sparse=True)[:-1]
    return (*rows, indices)


def flattened(targets: jax.Array | SparseTargets) -> jax.Array | SparseTargets:
    """Returns targets with one axis of examples."""
    axes = len(batch_of(targets))
    size = math.prod(batch_of(targets))

    def flat(x):
        return x.reshape(size, *x.shape[axes:])

    if not isinstance(targets, SparseTargets):
        return flat(targets)
    mass = targets.background_mass
    mass = None if mass is None else flat(mass)
    return SparseTargets(flat(targets.indices), flat(targets.weights), mass, targets.background)


def rows_of(tree: Any, first: jax.typing.ArrayLike, size: int) -> Any:
    """Returns rows [first, first + size) of the arrays and flat targets of `tree`."""

    def cut(x):
        if isinstance(x, SparseTargets):
            rows = rows_of((x.indices, x.weights, x.background_mass), first, size)
            return SparseTargets(rows[0], rows[1], rows[2], x.background)
        if x.shape[0] == size:
            return x
        return jax.lax.dynamic_slice_in_dim(x, first, size, 0)

    return jax.tree.map(cut, tree, is_leaf=lambda x: isinstance(x, SparseTargets))


def heaviest_class(targets: jax.Array | SparseTargets, num_classes: int) -> jax.Array:
    """Returns the class of the largest mass, int32[...]: for labels, the label itself.

    Of sparse targets it is one of the K, or 0 where there is none.
    """
    if not isinstance(targets, SparseTargets):
        return jnp.argmax(targets, axis=-1).astype(jnp.int32)
    if targets.indices.shape[-1] == 0:
        return jnp.zeros(batch_of(targets), jnp.int32)
    best = jnp.argmax(mass_at(targets, targets.indices, num_classes), axis=-1)
    return jnp.take_along_axis(targets.indices, best[..., None], axis=-1)[..., 0]


def batch_of(targets: jax.Array | SparseTargets) -> tuple[int, ...]:
    """Returns the shape of one loss per example."""
    array = targets.indices if isinstance(targets, SparseTargets) else targets
    return array.shape[:-1]


def expand_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Returns x with axes of size 1 at its end, to stand against `other`."""
    return x.reshape(x.shape + (1,) * (other.ndim - x.ndim))


def targets_of_block(
    targets: jax.Array | SparseTargets,
    start: jax.typing.ArrayLike,
    size: int,
    num_classes: int,
) -> jax.Array | SparseTargets:
    """Returns the mass on the classes [start, start + size) as targets of those classes alone.

    Blocks that cut [0, num_classes) up hold all the mass between them, each part once. Sparse
    indices must be valid, as `invalid_as_nan` leaves them.

    Args:
      targets: Dense [..., V], or SparseTargets.
      start: The block's first class, an int32 scalar that may be traced.
      size: How many classes; start + size ≤ V.
      num_classes: V.
    """
    if not isinstance(targets, SparseTargets):
        return jax.lax.dynamic_slice_in_dim(targets, start, size, axis=-1)
    indices = targets.indices - start
    inside = is_valid(indices, size)
    mass, background = targets.background_mass, targets.background
    if mass is not None and background is None:
        mass = mass * (size / num_classes)
    elif background is not None:
        background = jax.lax.dynamic_slice_in_dim(background, start, size, axis=-1)
    return SparseTargets(
        jnp.clip(indices, 0, size - 1), jnp.where(inside, targets.weights, 0), mass, background
    )
