"""Augmentations that mix examples and their targets alike."""

import functools
import math
from collections.abc import Sequence
from typing import TypeVar, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Key, Shaped

from xentjax._jax import checks
from xentjax._jax import mesh as _mesh
from xentjax._targets import transforms as _transforms
from xentjax._targets import types as _targets
from xentjax._targets.transforms import Sparse
from xentjax._targets.types import SparseTargets, Targets

Inputs = TypeVar("Inputs")

MAX_CHANNELS = 4  # Grey, with alpha, RGB, RGBA: so few rows and more columns are no image.


@overload
def mixup(
    key: Key[Array, ""],
    inputs: Inputs,
    targets: Sparse,
    alpha: ArrayLike,
    *,
    per_example: bool = False,
    where: Bool[ArrayLike, "batch ..."] | None = None,
    axis: int = -1,
) -> tuple[Inputs, SparseTargets]: ...
@overload
def mixup(
    key: Key[Array, ""],
    inputs: Inputs,
    targets: Targets,
    alpha: ArrayLike,
    *,
    per_example: bool = False,
    where: Bool[ArrayLike, "batch ..."] | None = None,
    axis: int = -1,
) -> tuple[Inputs, Array | SparseTargets]: ...
def mixup(
    key: Key[Array, ""],
    inputs: Inputs,
    targets: Targets,
    alpha: ArrayLike,
    *,
    per_example: bool = False,
    where: Bool[ArrayLike, "batch ..."] | None = None,
    axis: int = -1,
) -> tuple[Inputs, Array | SparseTargets]:
    """Mixes each example with another one of the batch, inputs and targets alike.

    x' = λ · x + (1 − λ) · x[π],   t' = λ · t + (1 − λ) · t[π],   λ ~ Beta(alpha, alpha)

    A share of 0 takes nothing, of NaN and inf too.

    Args:
      key: A PRNG key; λ and the permutation π draw from different splits of it.
      inputs: A pytree of arrays float[batch, ...].
      targets: Labels, dense or SparseTargets of the same batch.
      alpha: A finite number, not negative; 0 is no mixing: λ = 1, and each example is its own π.
      per_example: Whether each example has its own λ, or the batch shares one.
      where: The mask that the loss gets, bool of the targets' batch. A target that is masked out is
        mixed with none: where π is one, the example keeps its own. So the mask stays as it is.
        Inputs of an example are mixed where some target of it is.
      axis: The class axis of dense targets; labels and SparseTargets have none.

    Returns:
      (inputs, targets), mixed: inputs keep their dtypes, targets are as from `mix_targets`.

    Raises:
      TypeError: key is no key, an input is not floating-point, alpha is not a number, per_example
        or where is not bool, or targets have a dtype that cannot be one.
      ValueError: Batches differ, there is none, or alpha is negative or not a scalar.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> x, t = xentjax.mixup(jax.random.key(0), jnp.eye(4), jnp.arange(4), 0.4)
      >>> print(jnp.allclose(x, xentjax.dense_targets(t, 4)))
      True
      >>> labels = jnp.array([0, 1, -100, 2])  # No label for the third: it is not mixed.
      >>> x, t = xentjax.mixup(jax.random.key(0), jnp.eye(4), labels, 0.4, where=labels >= 0)
      >>> print(x[2], xentjax.softmax_cross_entropy(x, t, where=labels >= 0)[2])
      [0. 0. 1. 0.] 0.0

    Source:
      Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018, section 2.
    """
    _check_key(key)
    checks.check_flag("per_example", per_example)
    leaves, structure = jax.tree.flatten(inputs)
    arrays = [checks.as_array("inputs", x) for x in leaves]
    for x in arrays:
        checks.check_floating("inputs", x)
    masses, last = _transforms.classes_last(_targets.as_targets(targets), axis)
    _check_batch("inputs", arrays, masses)
    alpha = _transforms.as_number("alpha", alpha, 0, math.inf)
    mask = None if where is None else _as_mask_of_targets(where, masses)
    lam, order = _draw(key, alpha, batch=arrays[0].shape[0], per_example=per_example)
    arrays, masses = _mixup(arrays, masses, lam, order, mask)
    return jax.tree.unflatten(structure, arrays), _transforms.classes_at(masses, last)


@functools.partial(jax.jit, inline=True)
def _mixup(arrays, targets, lam, order, where):
    targets, is_mixed = _mixed_targets(targets, order, lam, where)

    def mix(x):
        share = _targets.expand_like(lam, x).astype(_targets.mass_dtype(x))
        own, other = x.astype(share.dtype), _permuted(x, order).astype(share.dtype)
        mixed = _part(share, own) + _part(1 - share, other)
        return (mixed if is_mixed is None else _chosen(is_mixed, mixed, own)).astype(x.dtype)

    return [mix(x) for x in arrays], targets


@overload
def cutmix(
    key: Key[Array, ""],
    images: Shaped[ArrayLike, "batch ..."],
    targets: Sparse,
    alpha: ArrayLike,
    *,
    per_example: bool = False,
    where: Bool[ArrayLike, "batch ..."] | None = None,
    image_axes: Sequence[int] | None = None,
    axis: int = -1,
) -> tuple[Array, SparseTargets]: ...
@overload
def cutmix(
    key: Key[Array, ""],
    images: Shaped[ArrayLike, "batch ..."],
    targets: Targets,
    alpha: ArrayLike,
    *,
    per_example: bool = False,
    where: Bool[ArrayLike, "batch ..."] | None = None,
    image_axes: Sequence[int] | None = None,
    axis: int = -1,
) -> tuple[Array, Array | SparseTargets]: ...
def cutmix(
    key: Key[Array, ""],
    images: Shaped[ArrayLike, "batch ..."],
    targets: Targets,
    alpha: ArrayLike,
    *,
    per_example: bool = False,
    where: Bool[ArrayLike, "batch ..."] | None = None,
    image_axes: Sequence[int] | None = None,
    axis: int = -1,
) -> tuple[Array, Array | SparseTargets]:
    """Pastes a box of another image of the batch into each, and mixes targets by area.

    x' = M · x + (1 − M) · x[π],   t' = λ · t + (1 − λ) · t[π],   λ = the share of M

    The box has sides √(1 − λ₀) of the image's, with λ₀ ~ Beta(alpha, alpha), at a uniform centre.
    It is cut at the border, and λ is the area that is left. Targets of each pixel, as a label map
    has them, are pasted by the same box: t' = M · t + (1 − M) · t[π].

    Args:
      key: A PRNG key; λ₀, the permutation π and the centre draw from different splits of it.
      images: An array of any dtype, [batch, ...].
      targets: Labels, dense or SparseTargets of the same batch, or of [batch, height, width].
      alpha: A finite number, not negative; 0 is no mixing: λ = 1, and each example is its own π.
      per_example: Whether each example has its own box, or the batch shares one.
      where: The mask that the loss gets, bool of the targets' batch. A target that is masked out is
        mixed with none: where π is one, the example keeps its own. So the mask stays as it is.
        An image is mixed where some target of it is. None beside targets of each pixel: paste
        their mask as `images`, by another call with the same key.
      image_axes: The axes of height and width in `images`: (1, 2) for [batch, height, width,
        channels], (2, 3) for [batch, channels, height, width]. None is (1, 2), and refuses images
        that look like the second.
      axis: The class axis of dense targets; labels and SparseTargets have none.

    Returns:
      (images, targets), mixed: images keep their dtype, targets are as from `mix_targets`, and
      those of each pixel are as they came: labels as SparseTargets of K = 1.

    Raises:
      TypeError: key is no key, alpha is not a number, image_axes are not ints, per_example or
        where is not bool, or targets have a dtype that cannot be one.
      ValueError: Batches differ, image_axes are not two axes behind the batch, they are None for
        images of at most 4 rows and more channels, or alpha is negative or not a scalar.

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
    _check_key(key)
    checks.check_flag("per_example", per_example)
    pixels = checks.as_array("images", images, "an array")
    image_axes = _as_image_axes(image_axes, pixels)
    masses, last = _transforms.classes_last(_targets.as_targets(targets), axis)
    _check_batch("images", [pixels], masses)
    batch, of_pixels = _targets.batch_of(masses), tuple(pixels.shape[a] for a in (0, *image_axes))
    checks.check(
        len(batch) != 3 or batch == of_pixels,
        f"targets: expected a batch of {of_pixels[:1]}, one for each image, or {of_pixels}, one "
        f"for each pixel along image_axes={image_axes}, got {batch}",
    )
    checks.check(
        len(batch) != 3 or where is None,
        "where: expected None beside targets of each pixel, which are pasted as they are, got a "
        "mask: paste it too, as images under the same key",
    )
    alpha = _transforms.as_number("alpha", alpha, 0, math.inf)
    mask = None if where is None else _as_mask_of_targets(where, masses)
    key, centre_key = jax.random.split(key)
    lam, order = _draw(key, alpha, batch=of_pixels[0], per_example=per_example)
    pixels, masses = _cutmix(centre_key, pixels, masses, lam, order, mask, image_axes=image_axes)
    return pixels, _transforms.classes_at(masses, last)


@functools.partial(jax.jit, static_argnames="image_axes", inline=True)
def _cutmix(key, images, targets, lam, order, where, image_axes):
    box, lam = _draw_box(key, lam, *(images.shape[a] for a in image_axes))
    if len(_targets.batch_of(targets)) == 3:
        targets = _chosen(box, _permuted(targets, order), targets)
    else:
        targets, is_mixed = _mixed_targets(targets, order, lam, where)
        box = box if is_mixed is None else box & _targets.expand_like(is_mixed, box)
    shape = [1] * images.ndim
    shape[0], shape[image_axes[0]], shape[image_axes[1]] = box.shape
    box = box if image_axes[0] < image_axes[1] else box.swapaxes(1, 2)
    return _chosen(box.reshape(shape), _permuted(images, order), images), targets


@functools.partial(jax.jit, static_argnames=("batch", "per_example"), inline=True)
def _draw(key, alpha, batch, per_example):
    """Returns λ ~ Beta(alpha, alpha), a scalar or [batch], and a permutation of the batch."""
    lam_key, order_key = jax.random.split(key)
    alpha, one = jnp.asarray(alpha, jnp.float32), jnp.ones((), jnp.float32)
    shape = (batch,) if per_example else ()
    a = jnp.where(alpha > 0, alpha, one)
    lam = jax.random.beta(lam_key, a, a, shape, jnp.float32)
    own = jnp.arange(batch, dtype=jnp.int32)
    # `jax.random.permutation` needs to know the batch, which is a symbol in an exported function.
    first, second = jax.random.bits(order_key, (2, batch), jnp.uint32)
    order = jax.lax.sort((first, second, own), num_keys=2)[-1]
    return jnp.where(alpha > 0, lam, one), jnp.where(alpha > 0, order, own)


def _draw_box(key, lam, height, width):
    """Returns the pixels of a box, bool[batch or 1, height, width], and the share outside it."""
    sides = jnp.array([[height, width]], jnp.float32)
    half = jnp.sqrt(1 - lam.reshape(-1, 1)) * sides / 2
    centre = jax.random.uniform(key, half.shape, jnp.float32) * sides
    low, high = (jnp.clip(jnp.round(x), 0, sides) for x in (centre - half, centre + half))

    def inside(axis, size):
        pixels = jnp.arange(size, dtype=jnp.float32)[None]
        return (pixels >= low[:, axis, None]) & (pixels < high[:, axis, None])

    area = height * width  # Whole numbers, so that the share is in [0, 1].
    pasted = (high - low).prod(-1).reshape(lam.shape)
    return inside(0, height)[:, :, None] & inside(1, width)[:, None, :], (area - pasted) / area


def _mixed_targets(targets, order, lam, where):
    """Returns targets mixed with those in `order`, and which examples are mixed; None is all."""
    partners, is_mixed = _permuted(targets, order), None
    if where is not None:
        both = where & _permuted(where, order)
        partners = _chosen(both, partners, targets)
        is_mixed = both.any(tuple(range(1, both.ndim)))
    return _transforms.mixed(targets, partners, lam, is_shared=True), is_mixed


def _permuted(targets, order):
    """Returns targets, or an array, with the examples of the first axis in `order`."""

    def permuted(x):
        def gather(x, order):
            return x.at[order].get(mode="promise_in_bounds")

        return _mesh.on_automatic_axes(gather, x, ())(x, order)

    return _targets.map_examples(permuted, targets)


def _chosen(choice, a, b):
    """Returns a where `choice` holds and b elsewhere, but for the background that both share."""
    return jax.tree.map(
        lambda x, y: x if x is y else jnp.where(_targets.expand_like(choice, x), x, y), a, b
    )


def _part(share, x):
    """Returns share · x with 0 · inf = 0 · NaN = 0."""
    return jnp.where(share == 0, jnp.zeros_like(x), share * x)


def _check_key(key):
    """Raises TypeError or ValueError unless `key` is one PRNG key, typed or of uint32."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    checks.check(
        is_typed or (dtype == jnp.uint32 and shape is not None and len(shape) > 0),
        f"key: expected a PRNG key, as jax.random.key makes it, got {key!r}",
        TypeError,
    )
    checks.check(
        len(shape or ()) == (0 if is_typed else 1), f"key: expected one PRNG key, got shape {shape}"
    )


def _as_image_axes(image_axes, images):
    """Returns the axes of height and width as non-negative ints."""
    if image_axes is None:
        rows, columns = (*images.shape, 0, 0, 0, 0)[1:4:2]
        are_ints = isinstance(rows, int) and isinstance(columns, int)  # Not so in some exports.
        checks.check(
            not (images.ndim == 4 and are_ints and rows <= MAX_CHANNELS < columns),
            f"image_axes: expected (2, 3) if images {checks.describe(images)} have channels before "
            "height and width, or (1, 2) if they have not, got None",
        )
        image_axes = 1, 2
    is_pair = isinstance(image_axes, Sequence) and len(image_axes) == 2
    checks.check(
        is_pair and all(isinstance(a, int) and not isinstance(a, bool) for a in image_axes),
        f"image_axes: expected two ints, the axes of height and width, got {image_axes!r}",
        TypeError,
    )
    ndim = images.ndim
    axes = tuple(a % ndim for a in image_axes if -ndim <= a < ndim)
    checks.check(
        len(set(axes) - {0}) == 2,
        f"image_axes: expected two axes of images, not the first, got {tuple(image_axes)} for "
        f"images {checks.describe(images)}",
    )
    return axes


def _as_mask_of_targets(where, targets):
    """Returns `where` as a bool array of the targets' batch."""
    where, batch = checks.as_array("where", where, "a bool array"), _targets.batch_of(targets)
    checks.check_bool("where", where)
    checks.check_shape("where", where, batch, "the batch of targets")
    return where


def _check_batch(name, arrays, targets):
    """Raises ValueError unless the first axis of all arrays and of the targets is one batch."""
    checks.check(len(arrays) > 0, f"{name}: expected at least one array, got none")
    shapes, batch = [x.shape for x in arrays], _targets.batch_of(targets)
    checks.check(
        all(shape and shape[0] == arrays[0].shape[0] for shape in shapes),
        f"{name}: expected one batch size on the first axis of every array, got {shapes}",
    )
    checks.check(
        batch[:1] == arrays[0].shape[:1],
        f"targets: expected the batch of {name}, {arrays[0].shape[0]}, got shape {batch}",
    )
