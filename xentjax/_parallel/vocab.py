"""Cross-entropy with the classes split over devices."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide_dtype
from xentjax._jax.mesh import AxisName
from xentjax._jax.rule import apply
from xentjax._losses import arguments, linear
from xentjax._losses.logit_transform import LogitTransform
from xentjax._softmax.cross_entropy import CrossEntropy
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
      where: Of the losses' shape: examples to keep. Of the logits' shape: classes to keep, as in
        `softmax_cross_entropy`. If V does not divide by the devices, pad it and mask the padding.

    Returns:
      The losses of `softmax_cross_entropy`, the same on all devices along `axis_name`.

    Raises:
      TypeError: logits are not floating-point, where is not bool, or targets have a dtype that
        cannot be one.
      ValueError: A shape does not fit; the devices do not have a shard of logits each; or the
        shard_map has `check_vma=False`, and derivatives would lose what crosses devices.

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
    logits, axes = arguments.as_logits("logits", logits, -1)
    mesh_axes = meshes.axis_names(axis_name)
    meshes.check_shards("logits", logits, mesh_axes)
    z, mask = arguments.masked_logits(logits, where, axes, "the shard of classes")
    if mask is not None and where is not None and jnp.shape(where) == logits.shape:
        # A shard may have no class left where another one has some.
        mask = jax.lax.psum(mask.astype(jnp.int32), mesh_axes) > 0
    dtype = wide_dtype(logits.dtype)
    mass = arguments.as_mass(targets, logits.shape, dtype, mask, mesh_axes=mesh_axes)
    over = meshes.varying_axes((z, mass, mask))
    z, mass = meshes.varying((z, mass), over)
    mask = meshes.varying(mask, over.difference(mesh_axes))
    losses, _ = apply(CrossEntropy(mesh_axes), z, mass, mask)
    return losses


def vocab_parallel_linear_softmax_cross_entropy(
    inputs: ArrayLike,
    kernel: ArrayLike,
    targets: Targets,
    *,
    axis_name: AxisName,
    bias: ArrayLike | None = None,
    class_axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    logit_transform: LogitTransform | None = None,
    memory_budget: int | None = None,
) -> Float[Array, "*batch"]:
    """`linear_softmax_cross_entropy` in a `jax.shard_map` that splits the kernel's classes.

    loss = Σ_v t_v · (lse(z) − z_v),   z = logit_transform(inputs @ kernel + bias) on all devices

    Forward, one maximum and one sum of vectors [...] cross devices (or of each chunk of tokens, if
    memory for logits is short); backward, one sum of the inputs' gradient. Neither logits nor
    kernel do.

    Args:
      inputs: The features of each token, float[..., D], the same on all devices along `axis_name`.
      kernel: This device's shard, float[D, V / devices], or with class_axis=0 its transpose.
      targets: Labels or SparseTargets whose classes, and background [V], are those of all devices;
        or the shard of dense targets, float[..., V / devices], that goes with the kernel.
      axis_name: The axis of the mesh, or axes, that the classes are split over.
      bias: This device's shard, float[V / devices]. If V does not divide by the devices, pad the
        classes: with a bias of −inf, and a logit transform that leaves −inf as it is, a class has
        probability 0.
      class_axis: The axis of the kernel that counts classes: 0, or 1 or −1.
      where: Tokens to keep, bool[...]; the others have loss and gradient 0.
      weights: Of each token's loss, float[...].
      reduction: As in `linear_softmax_cross_entropy`, over this device's tokens. If tokens are
        split over devices too, the mean of these means is another number than their mean: sum, and
        divide the sum of all by the weight of all, as `data_parallel` does.
      logit_transform: An elementwise function of the logits, such as `soft_cap(30.0)`.
      memory_budget: Bytes for temporaries on each device, as in `linear_softmax_cross_entropy`;
        None shares the half GiB of logits out among the devices along `axis_name`.

    Returns:
      What `linear_softmax_cross_entropy` returns, the same on all devices along `axis_name`.

    Raises:
      TypeError: As in `linear_softmax_cross_entropy`.
      ValueError: Shapes do not fit; an option is none of those above; the devices do not have a
        shard of the kernel each; or the shard_map has `check_vma=False`, and derivatives would lose
        what crosses devices.

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
    arrays = linear.as_arrays(inputs, kernel, targets, bias, where, weights)
    axes = meshes.axis_names(axis_name)
    meshes.check_shards("kernel", arrays.kernel, axes)
    if arrays.bias is not None:
        meshes.check_shards("bias", arrays.bias, axes)
    options = linear.Options(class_axis, logit_transform, memory_budget, axes)
    return linear.losses_of(arrays, options, reduction)
