"""Cross-entropy with the classes split over devices."""

from collections.abc import Hashable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide_dtype
from xentjax._jax.mesh import AxisName
from xentjax._jax.rule import apply
from xentjax._losses import arguments, linear, stats
from xentjax._losses.logit_transform import LogitTransform
from xentjax._losses.softmax import losses_and_stats
from xentjax._losses.stats import SoftmaxStats
from xentjax._softmax.cross_entropy import CrossEntropy
from xentjax._targets.linear import LinearTargets
from xentjax._targets.mass import Mass
from xentjax._targets.types import Targets


def vocab_parallel_softmax_cross_entropy(
    logits: ArrayLike,
    targets: Targets,
    *,
    axis_name: AxisName,
    where: ArrayLike | None = None,
) -> Float[Array, "*batch"]:
    """`softmax_cross_entropy` inside a `jax.shard_map` that splits the classes over devices.

    loss = Σ_v t_v · (lse(z) − z_v),   v over the classes of all devices along `axis_name`

    Forward, one maximum and one sum of vectors [...] cross devices; backward, nothing does for the
    gradient of the logits. Outside `jax.shard_map`, under `jax.jit` alone, `softmax_cross_entropy`
    takes logits that are split over devices as it takes any others.

    Args:
      logits: This device's shard of the classes, float[..., V / devices].
      targets: Labels or SparseTargets whose classes, and background [V], are those of all devices;
        or the shard of dense targets that goes with the logits.
      axis_name: The axis of the mesh, or axes, that the classes are split over.
      where: Examples to keep, in the losses' shape; or classes to keep, in the logits' shape, as in
        `softmax_cross_entropy`. If V does not divide by the devices, pad it and mask the padding.

    Returns:
      The losses of `softmax_cross_entropy`, the same on all devices along `axis_name`.

    Raises:
      TypeError: logits are not floating-point, where is not bool, or targets have a dtype that
        cannot be one.
      ValueError: A shape does not fit; the devices do not have a shard of logits each; or the
        shard_map has `check_vma=False`, and derivatives would lose the terms that cross devices.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> import xentjax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("model",))
      >>> logits = jax.device_put(jnp.zeros((1, 8)), NamedSharding(mesh, P(None, "model")))
      >>> def loss_fn(logits, labels):
      ...     return xentjax.vocab_parallel_softmax_cross_entropy(
      ...         logits, labels, axis_name="model"
      ...     )
      >>> specs = P(None, "model"), P()
      >>> losses = jax.jit(jax.shard_map(loss_fn, mesh=mesh, in_specs=specs, out_specs=P()))
      >>> print(losses(logits, jnp.array([5])).round(4))
      [2.0794]

    Source:
      Shoeybi et al., Megatron-LM, 2019, section 3.
    """
    shard = _shard(logits, targets, axis_name, where)
    rule = CrossEntropy(shard.axes)
    return apply(rule, shard.logits, shard.mass, shard.mask)[0]


def vocab_parallel_softmax_cross_entropy_with_stats(
    logits: ArrayLike,
    targets: Targets,
    *,
    axis_name: AxisName,
    where: ArrayLike | None = None,
) -> tuple[Float[Array, "*batch"], SoftmaxStats]:
    """`vocab_parallel_softmax_cross_entropy`, with statistics from the same pass beside it.

    loss = Σ_v t_v · (lse(z) − z_v);   a z-loss is loss + c · log_normalizer²

    Forward, one maximum, two sums and one minimum of vectors [...] cross devices, and four more of
    them for dense targets; backward, nothing does for the gradient of the logits.

    Args:
      logits: This device's shard of the classes, float[..., V / devices].
      targets: As in `vocab_parallel_softmax_cross_entropy`.
      axis_name: The axis of the mesh, or axes, that the classes are split over.
      where: As in `vocab_parallel_softmax_cross_entropy`.

    Returns:
      (losses, SoftmaxStats), as `softmax_cross_entropy_with_stats`, the same on all devices along
      `axis_name`; predictions are classes of all devices.

    Raises:
      TypeError, ValueError: As in `vocab_parallel_softmax_cross_entropy`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> import xentjax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("model",))
      >>> logits = jnp.arange(8.0)[None]
      >>> logits = jax.device_put(logits, NamedSharding(mesh, P(None, "model")))
      >>> def loss_fn(logits, labels):
      ...     return xentjax.vocab_parallel_softmax_cross_entropy_with_stats(
      ...         logits, labels, axis_name="model"
      ...     )
      >>> specs = P(None, "model"), P()
      >>> both = jax.jit(jax.shard_map(loss_fn, mesh=mesh, in_specs=specs, out_specs=P()))
      >>> losses, stats = both(logits, jnp.array([5]))
      >>> print(losses.round(2), stats.prediction, stats.correct, stats.entropy.round(2))
      [2.46] [7] [False] [1.04]

    Source:
      Shoeybi et al., Megatron-LM, 2019, section 3.
    """
    shard = _shard(logits, targets, axis_name, where)
    label = stats.heaviest(shard.whole_mass, shard.axes)

    def is_correct(prediction):
        return stats.is_heaviest(shard.whole_mass, prediction, shard.axes)

    return losses_and_stats(shard.logits, shard.mass, shard.mask, label, is_correct, shard.axes)


class _Shard(NamedTuple):
    """This device's part of a call.

    Attributes:
      logits: [..., V / devices].
      mass: On the classes of the logits.
      mask: The mask of examples, or None.
      whole_mass: The mass of all devices' classes where it is sparse.
      axes: Mesh axes that the classes are split over.
    """

    logits: jax.Array
    mass: Mass
    mask: jax.Array | None
    whole_mass: Mass
    axes: tuple[Hashable, ...]


def _shard(logits, targets, axis_name, where):
    """Checks the arguments, and returns the shard that they make."""
    logits, axes = arguments.as_logits("logits", logits, -1)
    mesh_axes = meshes.mapped_axes(axis_name)
    meshes.check_shards("logits", logits, mesh_axes)
    z, mask = arguments.masked_logits(logits, where, axes, "the shard of classes")
    if mask is not None and where is not None and jnp.shape(where) == logits.shape:
        # A shard may have no class left where another one has some.
        mask = jax.lax.psum(mask.astype(jnp.int32), mesh_axes) > 0
    dtype = wide_dtype(logits.dtype)
    whole_mass = arguments.as_mass(targets, logits.shape, dtype, mask, mesh_axes=mesh_axes)
    mass = arguments.on_shard(whole_mass, logits.shape[-1], mesh_axes)
    over = meshes.varying_axes((z, mass, mask))
    z, mass = meshes.varying((z, mass), over)
    return _Shard(z, mass, meshes.varying(mask, over.difference(mesh_axes)), whole_mass, mesh_axes)


def vocab_parallel_linear_softmax_cross_entropy(
    inputs: ArrayLike,
    kernel: ArrayLike,
    targets: Targets | LinearTargets,
    *,
    axis_name: AxisName,
    bias: ArrayLike | None = None,
    class_axis: int = -1,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    z_loss: ArrayLike | None = None,
    logit_transform: LogitTransform | None = None,
    memory_budget: int | None = None,
) -> Float[Array, "*batch"]:
    """`linear_softmax_cross_entropy` in a `jax.shard_map` that splits the kernel's classes.

    loss = Σ_v t_v · (lse(z) − z_v) + z_loss · lse(z)²
    z = logit_transform(inputs @ kernel + bias),   v over the classes of all devices

    Forward, one maximum and one sum of vectors [...] cross devices (or of each chunk of tokens, if
    memory for logits is short); backward, one sum of the inputs' gradient. Neither logits nor
    kernel do.

    Args:
      inputs: The features of each token, float[..., D], the same on all devices along `axis_name`.
      kernel: This device's shard, float[D, V / devices], or with class_axis=0 its transpose.
      targets: Labels or SparseTargets whose classes, and background [V], are those of all devices;
        or the shard of dense targets, float[..., V / devices], that goes with the kernel; or
        LinearTargets whose kernel and bias are this device's shards.
      axis_name: The axis of the mesh, or axes, that the classes are split over.
      bias: This device's shard, float[V / devices].
      class_axis: The axis of the kernel that counts classes: 0, or 1 or −1.
      class_mask: This device's shard, bool[V / devices], of the classes that there are. If V does
        not divide by the devices, pad the kernel's classes and mask the padding.
      where: Tokens to keep, bool[...]; the others have loss and gradient 0.
      weights: The weight of each token's loss, float[...].
      reduction: As in `linear_softmax_cross_entropy`, over this device's tokens. If tokens are
        split over devices too, the mean of these means is another number than their mean: sum, and
        divide the sum of all by the weight of all, as `data_parallel` does.
      z_loss: A scalar, as in `linear_softmax_cross_entropy`.
      logit_transform: An elementwise function of the logits, such as `soft_cap(30.0)`.
      memory_budget: Bytes for temporaries on each device, as in `linear_softmax_cross_entropy`;
        None shares the half GiB of logits out among the devices along `axis_name`.

    Returns:
      The losses of `linear_softmax_cross_entropy`, the same on all devices along `axis_name`.

    Raises:
      TypeError: As in `linear_softmax_cross_entropy`.
      ValueError: Shapes do not fit; an option is none of those above; the devices do not have a
        shard of the kernel each; or the shard_map has `check_vma=False`, and derivatives would lose
        the terms that cross devices.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> import xentjax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("model",))
      >>> inputs, labels = jnp.ones((2, 4)), jnp.array([5, 63])
      >>> kernel = jax.device_put(jnp.zeros((4, 64)), NamedSharding(mesh, P(None, "model")))
      >>> def loss_fn(inputs, kernel, labels):
      ...     return xentjax.vocab_parallel_linear_softmax_cross_entropy(
      ...         inputs, kernel, labels, axis_name="model"
      ...     )
      >>> specs = P(), P(None, "model"), P()
      >>> loss = jax.jit(jax.shard_map(loss_fn, mesh=mesh, in_specs=specs, out_specs=P()))
      >>> print(loss(inputs, kernel, labels).round(4), jnp.log(64).round(4))
      4.1589 4.1589

    Source:
      Shoeybi et al., Megatron-LM, 2019, section 3.
    """
    arrays = linear.as_arrays(inputs, kernel, targets, bias, class_mask, where, weights, z_loss)
    axes = _checked_axes(axis_name, arrays)
    options = linear.Options(class_axis, logit_transform, memory_budget, axes)
    return linear.losses_of(arrays, options, reduction)


def vocab_parallel_linear_softmax_cross_entropy_with_stats(
    inputs: ArrayLike,
    kernel: ArrayLike,
    targets: Targets | LinearTargets,
    *,
    axis_name: AxisName,
    bias: ArrayLike | None = None,
    class_axis: int = -1,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
    logit_transform: LogitTransform | None = None,
    memory_budget: int | None = None,
) -> tuple[Float[Array, "*batch"], SoftmaxStats]:
    """`linear_softmax_cross_entropy_with_stats` with the kernel's classes split over devices.

    loss = Σ_v t_v · (lse(z) − z_v);   a z-loss is loss + c · log_normalizer²

    Forward, two maxima, one sum and one minimum of vectors [...] cross devices, and more of them
    for dense targets and teachers; backward, one sum of the inputs' gradient.

    Args:
      inputs: The features of each token, float[..., D], the same on all devices along `axis_name`.
      kernel: This device's shard, float[D, V / devices], or with class_axis=0 its transpose.
      targets: As in `vocab_parallel_linear_softmax_cross_entropy`.
      axis_name: The axis of the mesh, or axes, that the classes are split over.
      bias: This device's shard, float[V / devices].
      class_axis: The axis of the kernel that counts classes: 0, or 1 or −1.
      class_mask: This device's shard, bool[V / devices], of the classes that there are.
      where: Tokens to keep, bool[...]; of the others everything is 0.
      logit_transform: An elementwise function of the logits.
      memory_budget: Bytes for temporaries on each device.

    Returns:
      (losses, SoftmaxStats), each of the batch's shape and the same on all devices along
      `axis_name`; predictions are classes of all devices.

    Raises:
      TypeError, ValueError: As in `vocab_parallel_linear_softmax_cross_entropy`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> import xentjax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("model",))
      >>> inputs, labels = jnp.ones((1, 1)), jnp.array([5])
      >>> kernel = jax.device_put(jnp.arange(8.0)[None], NamedSharding(mesh, P(None, "model")))
      >>> def loss_fn(inputs, kernel, labels):
      ...     return xentjax.vocab_parallel_linear_softmax_cross_entropy_with_stats(
      ...         inputs, kernel, labels, axis_name="model"
      ...     )
      >>> specs = P(), P(None, "model"), P()
      >>> both = jax.jit(jax.shard_map(loss_fn, mesh=mesh, in_specs=specs, out_specs=P()))
      >>> losses, stats = both(inputs, kernel, labels)
      >>> print(losses.round(2), stats.prediction, stats.correct, stats.entropy.round(2))
      [2.46] [7] [False] [1.04]

    Source:
      Shoeybi et al., Megatron-LM, 2019, section 3.
    """
    arrays = linear.as_arrays(inputs, kernel, targets, bias, class_mask, where)
    axes = _checked_axes(axis_name, arrays)
    options = linear.Options(class_axis, logit_transform, memory_budget, axes, with_stats=True)
    return linear.losses_and_stats(arrays, options)


def _checked_axes(axis_name, arrays):
    """Returns the mesh axes that the classes are split over, each device having its shard."""
    axes = meshes.mapped_axes(axis_name)
    shards = {name: getattr(arrays, name) for name in ("kernel", "bias", "class_mask")}
    if isinstance(arrays.targets, LinearTargets):
        shards |= {f"targets.{name}": getattr(arrays.targets, name) for name in ("kernel", "bias")}
    for name, x in shards.items():
        if x is not None:
            meshes.check_shards(name, x, axes)
    return axes
