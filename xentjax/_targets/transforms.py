"""Functions from targets to targets: smoothing, mixing, re-weighting, and writing out.

They compose in any order, and none makes an array [..., V] from labels or sparse targets but the
one that writes them out.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from xentjax._jax import checks
from xentjax._targets import mass as _masses
from xentjax._targets import types as _targets
from xentjax._targets.types import SparseTargets, Targets


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
    targets = _targets.as_targets(targets)
    checks.check_shape("alpha", jnp.asarray(alpha), (), "a scalar")
    checks.check_interval("alpha", alpha, 0.0, 1.0)
    if background is not None:
        background = checks.as_array("background", background)
        checks.check_floating("background", background)
        checks.check(
            background.ndim == 1,
            f"background: expected shape [V], got {checks.describe(background)}",
        )
        checks.check(
            _classes_of(targets) in (None, background.shape[-1]),
            f"background: expected {_classes_of(targets)} classes, those of targets, got "
            f"{checks.describe(background)}",
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
    a, b = _targets.as_targets(a, "a"), _targets.as_targets(b, "b")
    checks.check_interval("lam", lam, 0.0, 1.0)
    lam = checks.as_array("lam", lam)
    if not jnp.issubdtype(lam.dtype, jnp.floating):
        lam = lam.astype(float)
    batch_a, batch_b = _targets.batch_of(a), _targets.batch_of(b)
    checks.check(
        batch_a == batch_b, f"b: expected targets for the batch of a, {batch_a}, got {batch_b}"
    )
    checks.check(
        lam.shape in ((), batch_a),
        f"lam: expected a scalar or shape {batch_a}, one for each example, got {lam.shape}",
    )
    if not isinstance(a, SparseTargets) or not isinstance(b, SparseTargets):
        num_classes = next(x.shape[-1] for x in (a, b) if not isinstance(x, SparseTargets))
        checks.check(
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
    mass = None if mass is None else _targets.expand_like(share, mass) * mass
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
    checks.check(
        not sizes,
        f"b: expected a background over {_classes_of(a)} classes, those of a, got {_classes_of(b)}",
    )
    pairs = [*_masses.backgrounds(a, num_classes), *_masses.backgrounds(b, num_classes)]
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
    targets = _targets.as_targets(targets)
    class_weights = checks.as_array("class_weights", class_weights)
    checks.check_floating("class_weights", class_weights)
    checks.check(
        class_weights.ndim == 1,
        f"class_weights: expected shape [V], got {checks.describe(class_weights)}",
    )
    (num_classes,) = class_weights.shape
    if not isinstance(targets, SparseTargets):
        checks.check_shape(
            "class_weights", class_weights, targets.shape[-1:], "the classes of targets"
        )
        return targets * class_weights
    background = targets.background
    if targets.background_mass is not None:
        if background is None:
            background = jnp.full_like(class_weights, 1 / num_classes)
        checks.check_shape(
            "class_weights", class_weights, background.shape[-1:], "the classes of targets"
        )
        background = background * class_weights
    valid = _targets.is_valid(targets.indices, num_classes)
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
    targets = _targets.as_targets(targets)
    checks.check(
        isinstance(num_classes, int | np.integer) and num_classes > 0,
        f"num_classes: expected a positive int, got {num_classes!r}",
    )
    _targets.check_targets(targets, _targets.batch_of(targets), num_classes)
    if not isinstance(targets, SparseTargets):
        return targets
    valid = _targets.is_valid(targets.indices, num_classes).all(-1, keepdims=True)
    background = _masses.background_over(targets, num_classes)
    if background is None:
        background = jnp.zeros((), targets.weights.dtype)
    dense = jnp.broadcast_to(
        jnp.where(valid, background, jnp.nan), (*_targets.batch_of(targets), num_classes)
    )
    return dense.at[_masses.rows_and(targets.indices)].add(targets.weights, mode="drop")
