"""Augmentations that mix examples and their targets alike."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from xentjax._jax import checks
from xentjax._targets import transforms as _retargeting
from xentjax._targets import types as _targets
from xentjax._targets.types import SparseTargets, Targets


def mixup(
    key: Key[Array, ""],
    inputs: PyTree[Float[Array, "batch ..."]],
    targets: Targets,
    alpha: ArrayLike,
    *,
    per_example: bool = False,
) -> tuple[Any, jax.Array | SparseTargets]:
    """Mixes each example with another one of the batch, inputs and targets alike.

    x' = λ · x + (1 − λ) · x[π],   t' = λ · t + (1 − λ) · t[π],   λ ~ Beta(alpha, alpha)

    Args:
      key: A PRNG key; λ and the permutation π draw from different splits of it.
      inputs: A pytree of arrays float[batch, ...].
      targets: Of the same batch: labels, dense or SparseTargets.
      alpha: A positive scalar; 0 is no mixing, λ = 1.
      per_example: Whether each example has its own λ, or the batch shares one.

    Returns:
      (inputs, targets), mixed: inputs keep their dtypes, targets are as from `mix_targets`.

    Raises:
      TypeError: An input is not floating-point, or targets have a dtype that cannot be one.
      ValueError: Batches differ, there is none, or alpha is negative or not a scalar.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> x, t = xentjax.mixup(jax.random.key(0), jnp.eye(4), jnp.arange(4), 0.4)
      >>> print(jnp.allclose(x, xentjax.dense_targets(t, 4)))
      True

    Source:
      Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018, section 2.
    """
    inputs = jax.tree.map(jnp.asarray, inputs)
    targets = _targets.as_targets(targets)
    batch = _check_batch("inputs", inputs, targets)
    lam, order = _draw(key, batch, alpha, per_example)

    def mix(x):
        share = _targets.expand_like(lam, x)
        return (share * x + (1 - share) * x[order]).astype(x.dtype)

    mixed = _retargeting.mix_targets(targets, _permuted(targets, order), _of_batch(lam, targets))
    return jax.tree.map(mix, inputs), mixed


def cutmix(
    key: Key[Array, ""],
    images: Float[Array, "batch height width ..."],
    targets: Targets,
    alpha: ArrayLike,
    *,
    per_example: bool = False,
) -> tuple[jax.Array, jax.Array | SparseTargets]:
    """Pastes a box of another image of the batch into each, and mixes targets by area.

    x' = M · x + (1 − M) · x[π],   t' = λ · t + (1 − λ) · t[π],   λ = the share of M

    The box has sides √(1 − λ₀) of the image's, with λ₀ ~ Beta(alpha, alpha), at a uniform centre.
    It is cut at the border, and λ is the area that is left.

    Args:
      key: A PRNG key; λ₀, the permutation π and the centre draw from different splits of it.
      images: float[batch, height, width, ...].
      targets: Of the same batch: labels, dense or SparseTargets.
      alpha: A positive scalar; 0 is no mixing, λ = 1.
      per_example: Whether each example has its own box, or the batch shares one.

    Returns:
      (images, targets), mixed: images keep their dtype, targets are as from `mix_targets`.

    Raises:
      TypeError: images are not floating-point, or targets have a dtype that cannot be one.
      ValueError: Batches differ, images have fewer than three axes, or alpha is negative or not a
        scalar.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> images = jnp.ones((2, 8, 8, 1)) * jnp.arange(2.0)[:, None, None, None]
      >>> x, t = xentjax.cutmix(jax.random.key(0), images, jnp.arange(2), 1.0)
      >>> print(jnp.allclose(x.mean((1, 2, 3)), xentjax.dense_targets(t, 2)[:, 1]))
      True

    Source:
      Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers, 2019, section 3.1.
    """
    images = checks.as_array("images", images)
    targets = _targets.as_targets(targets)
    batch = _check_batch("images", images, targets)
    checks.check(
        images.ndim >= 3,
        f"images: expected shape [batch, height, width, ...], got {checks.describe(images)}",
    )
    key, centre_key = jax.random.split(key)
    lam, order = _draw(key, batch, alpha, per_example)
    sides = jnp.array(images.shape[1:3])
    half = jnp.sqrt(1 - lam)[..., None] * sides / 2
    centre = jax.random.uniform(centre_key, (*lam.shape, 2)) * sides
    low = jnp.clip(jnp.round(centre - half), 0, sides)
    high = jnp.clip(jnp.round(centre + half), 0, sides)
    rows, columns = jnp.arange(images.shape[1])[:, None], jnp.arange(images.shape[2])
    low, high = low[..., None, None], high[..., None, None]
    inside = (rows >= low[..., 0, :, :]) & (rows < high[..., 0, :, :])
    inside &= (columns >= low[..., 1, :, :]) & (columns < high[..., 1, :, :])
    lam = 1 - inside.mean((-2, -1))
    box = inside.reshape(*inside.shape[:-2] or (1,), *images.shape[1:3], *(1,) * (images.ndim - 3))
    mixed = _retargeting.mix_targets(targets, _permuted(targets, order), _of_batch(lam, targets))
    return jnp.where(box, images[order], images), mixed


def _draw(key, batch, alpha, per_example):
    """Returns λ ~ Beta(alpha, alpha), a scalar or [batch], and a permutation of the batch."""
    checks.check_interval("alpha", alpha, 0, float("inf"))
    alpha = jnp.asarray(alpha, jnp.float32)
    checks.check_shape("alpha", alpha, (), "a scalar")
    lam_key, order_key = jax.random.split(key)
    shape = (batch,) if per_example else ()
    lam = jax.random.beta(lam_key, *(jnp.where(alpha > 0, alpha, 1),) * 2, shape)
    return jnp.where(alpha > 0, lam, 1), jax.random.permutation(order_key, batch)


def _of_batch(lam, targets):
    """Returns λ as `mix_targets` takes it: a scalar, or of the targets' whole batch shape."""
    batch = _targets.batch_of(targets)
    return (
        lam if lam.ndim == 0 else jnp.broadcast_to(lam.reshape(-1, *(1,) * (len(batch) - 1)), batch)
    )


def _permuted(targets, order):
    """Returns targets with the examples of their first axis in `order`."""
    if isinstance(targets, SparseTargets):
        mass = targets.background_mass
        mass = None if mass is None else mass[order]
        return SparseTargets(
            targets.indices[order], targets.weights[order], mass, targets.background
        )
    return targets[order]


def _check_batch(name, inputs, targets):
    """Returns the size of the first axis, that of every input and of the targets."""
    leaves = jax.tree.leaves(inputs)
    checks.check(len(leaves) > 0, f"{name}: expected at least one array, got none")
    for x in leaves:
        checks.check_floating(name, x)
        checks.check(
            x.ndim > 0 and x.shape[0] == leaves[0].shape[0],
            f"{name}: expected one batch size on the first axis of every array, got "
            f"{[leaf.shape for leaf in leaves]}",
        )
    batch = _targets.batch_of(targets)
    checks.check(
        batch[:1] == leaves[0].shape[:1],
        f"targets: expected the batch of {name}, {leaves[0].shape[0]}, got shape {batch}",
    )
    return leaves[0].shape[0]
