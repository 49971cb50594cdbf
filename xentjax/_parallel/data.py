"""The same loss on one device and on many, with the examples split over devices.

Sums cross devices, never means: the whole divides once.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import ArrayLike

from xentjax._jax import checks
from xentjax._jax import mesh as _mesh
from xentjax._jax.mesh import AxisName
from xentjax._losses.reduction import WeightedSum, weighted_sum
from xentjax._softmax.partial import wide_dtype
from xentjax._targets.types import SparseTargets

LossFn = Callable[[Any, Any], WeightedSum | tuple[ArrayLike, ArrayLike]]
"""(params, batch) -> a WeightedSum, or one (losses, weights) for each example."""

ValueAndGrad = Callable[[Any, Any], tuple[jax.Array, Any]]
"""(params, batch) -> (mean, its gradient, a tree like params)."""


def per_example(
    loss_fn: Callable[[Any, Any], jax.Array], *, gradients: bool = False
) -> Callable[[Any, Any], Any]:
    """Maps the loss of one example over a batch.

    losses_i = loss_fn(params, batch_i),   gradients_i = ∂losses_i / ∂params

    Args:
      loss_fn: (params, example) -> a scalar loss.
      gradients: Whether to return the gradient of each example too.

    Returns:
      A function (params, batch) -> losses [N], or (losses [N], gradients), a tree like params whose
      arrays have a leading axis N. The first axis of every array of the batch is N; only the
      background of SparseTargets, which examples share, is not mapped over.

    Raises:
      ValueError: When called, the first axes of the batch differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> def loss_fn(kernel, example):
      ...     x, label = example
      ...     return xentjax.softmax_cross_entropy(x @ kernel, label)
      >>> batch = jnp.eye(2), jnp.array([0, 2])
      >>> losses, grads = xentjax.per_example(loss_fn, gradients=True)(jnp.zeros((2, 3)), batch)
      >>> print(losses.round(4), grads.shape)
      [1.0986 1.0986] (2, 2, 3)
    """

    def scalar_loss(params, example):
        loss = loss_fn(params, example)
        checks.check(
            jnp.shape(loss) == (),
            f"loss_fn: expected the scalar loss of one example, got {checks.describe(loss)}",
        )
        return loss

    function = jax.value_and_grad(scalar_loss) if gradients else scalar_loss

    def over_batch(params, batch):
        return jax.vmap(function, in_axes=(None, _like_batch(batch, 0, None)))(params, batch)

    return over_batch


def data_parallel(
    loss_fn: LossFn,
    mesh: Mesh,
    *,
    axis_name: AxisName = "data",
    microbatches: int = 1,
    in_specs: tuple[Any, Any] | None = None,
) -> ValueAndGrad:
    """Makes the value and gradient of a weighted mean over a batch that devices share out.

    mean = Σ_d total_d / Σ_d weight_d,   and its gradient, over all devices d and microbatches

    Whatever the masks and weights on each device, it is what one device finds on the whole batch: 0
    with gradient 0 where all weights are 0. `loss_fn` runs inside `jax.shard_map`, on each device's
    share. On a mesh of one device it is the plain value and gradient. Gradients of microbatches and
    of devices are summed in float32 at least, those of devices by one reduction.

    Args:
      loss_fn: (params, batch) -> the WeightedSum of a batch, or (losses, weights) of the same
        shape. Weights may depend on params; with microbatches that costs another forward pass.
      mesh: The devices. Its axes may be automatic or explicit.
      axis_name: The axis of the mesh, or axes, that the loss is summed over.
      microbatches: In how many parts each device takes its share, one after the other.
      in_specs: PartitionSpecs of (params, batch), prefixes of these trees as in `jax.shard_map`.
        None has params whole on each device, and the first axis of every array of the batch split
        over `axis_name`. The background of SparseTargets, which examples share, is never split by
        the spec of the whole. Gradients are split as params are; those split over `axis_name` are
        for `loss_fn` to gather.

    Returns:
      A jitted function (params, batch) -> (mean, gradient), to call alone or in a jitted step.

    Raises:
      ValueError: The mesh lacks an axis; or, when called, an array does not divide by the devices
        and microbatches it is split over (pad the batch with examples of weight 0).
      TypeError: When called, loss_fn returns something else.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> def loss_fn(kernel, batch):
      ...     x, labels, where = batch
      ...     losses = xentjax.softmax_cross_entropy(x @ kernel, labels, where=where)
      ...     return xentjax.weighted_sum(losses, where=where)
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> batch = jnp.ones((8, 2)), jnp.arange(8) % 3, jnp.arange(8) < 5
      >>> loss, grads = xentjax.data_parallel(loss_fn, mesh)(jnp.zeros((2, 3)), batch)
      >>> print(loss.round(4), grads.shape)
      1.0986 (2, 3)

    Source:
      Goyal et al., Accurate, Large Minibatch SGD, 2017, section 3: normalize by the total.
    """
    axes = _mesh.axis_names(axis_name)
    checks.check(
        all(axis in mesh.axis_names for axis in axes),
        f"axis_name: expected axes of the mesh, {mesh.axis_names}, got {axis_name!r}",
    )
    _check_microbatches(microbatches)

    @jax.jit
    def value_and_grad(params, batch):
        of_params, of_batch = (P(), P(axes)) if in_specs is None else in_specs
        specs = _broadcast_specs(of_params, params), _broadcast_specs(of_batch, batch)
        _check_divides("params", params, specs[0], mesh)
        _check_divides("batch", batch, specs[1], mesh)
        is_batched = jax.tree.map(lambda spec: len(spec) > 0 and spec[0] is not None, specs[1])

        def on_device(params, batch):
            # Params that devices share become each device's own, so that their gradient is summed
            # over devices once, at the end, and not wherever they are used.
            own = jax.tree.map(lambda p: _mesh.varying(p, axes), params)
            shared = jax.tree.map(lambda p: set(axes) - _mesh.varying_axes(p), params)
            parts_of = _parts_of_microbatch(loss_fn, batch, is_batched, microbatches)
            mean, grads = _mean_and_grads(parts_of, own, microbatches, axes)
            return mean, jax.tree.map(_sum_over, grads, shared, params)

        on_mesh = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=(P(), specs[0]))
        return on_mesh(*_placed((params, batch), specs, mesh))

    return value_and_grad


def pmap_data_parallel(
    loss_fn: LossFn,
    *,
    axis_name: Hashable = "batch",
    microbatches: int = 1,
    devices: Sequence[Any] | None = None,
) -> ValueAndGrad:
    """`data_parallel` for arrays that are stacked, a slice for each device, as in `jax.pmap`.

    mean = Σ_d total_d / Σ_d weight_d,   and its gradient, the same on every device d

    It takes the place of a `jax.pmap` that averages gradients with `jax.lax.pmean`, which is right
    only where all devices have the same weight. It is built on `jax.shard_map`.

    Args:
      loss_fn: As in `data_parallel`.
      axis_name: What `loss_fn` may call the axis of devices.
      microbatches: In how many parts each device takes its share, one after the other.
      devices: Those of the slices, in order; None takes `jax.devices()`.

    Returns:
      A jitted function from params [devices, ...], the same in every slice, and a batch
      [devices, per_device, ...] to means [devices] and gradients [devices, ...], the same in every
      slice. All arrays are stacked, the background of SparseTargets too.

    Raises:
      ValueError: When called, leading axes differ or exceed the devices, or per_device does not
        divide by the microbatches.
      TypeError: When called, loss_fn returns something else.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> def loss_fn(kernel, batch):
      ...     x, labels = batch
      ...     return xentjax.weighted_sum(xentjax.softmax_cross_entropy(x @ kernel, labels))
      >>> n = jax.device_count()
      >>> batch = jnp.ones((n, 4, 2)), jnp.zeros((n, 4), int)
      >>> loss, grads = xentjax.pmap_data_parallel(loss_fn)(jnp.zeros((n, 2, 3)), batch)
      >>> print(loss[0].round(4), grads.shape == (n, 2, 3))
      1.0986 True
    """
    _check_microbatches(microbatches)
    devices = list(jax.devices() if devices is None else devices)

    @jax.jit
    def value_and_grad(params, batch):
        leading = {jnp.shape(x)[:1] for x in jax.tree.leaves((params, batch))}
        checks.check(
            len(leading) == 1 and leading <= {(n + 1,) for n in range(len(devices))},
            "params, batch: expected arrays stacked for the same number of devices, at most "
            f"{len(devices)}, got leading axes {sorted(leading)}",
        )
        mesh = Mesh(np.array(devices[: math.prod(*leading)]), (axis_name,))
        is_batched = _like_batch(batch, True, False)

        def on_device(params, batch):
            params, batch = jax.tree.map(lambda x: x[0], (params, batch))
            parts_of = _parts_of_microbatch(loss_fn, batch, is_batched, microbatches)
            mean, grads = _mean_and_grads(parts_of, params, microbatches, (axis_name,))
            grads = jax.tree.map(lambda g, p: _sum_over(g, [axis_name], p), grads, params)
            return jax.tree.map(lambda x: x[None], (mean, grads))

        spec = P(axis_name)
        return jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec)(params, batch)

    return value_and_grad


def _mean_and_grads(parts_of, params, microbatches, axes):
    """Returns the mean over `axes`, and the part of its gradient to params that is this device's.

    `parts_of(params, i)` is the WeightedSum of microbatch i. The mean's derivative to total and
    weight, once these are known, turns each microbatch's gradient into its part of the mean's.
    """

    def sum_of(parts):
        # One by one: of several at once, JAX 0.7 cannot transpose a sum in which some are constant.
        return jax.tree.map(lambda x: jax.lax.psum(jnp.sum(x), axes), parts)

    if microbatches == 1:
        return jax.value_and_grad(lambda p: sum_of(parts_of(p, 0)).mean())(params)

    # Only what the weights depend on is compiled of this pass, and totals if that includes params.
    indices = jnp.arange(microbatches)
    parts = jax.lax.map(lambda i: parts_of(params, i), indices)
    share = jax.grad(WeightedSum.mean)(sum_of(parts))

    def step(total, i):
        def share_of(params):
            part = parts_of(params, i)
            return share.total * part.total + share.weight * part.weight, part

        grads, part = jax.grad(share_of, has_aux=True)(params)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), part

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p.dtype)), params)
    grads, parts = jax.lax.scan(step, zeros, indices)
    return sum_of(parts).mean(), grads


def _parts_of_microbatch(loss_fn, batch, is_batched, microbatches):
    """Returns (params, i) -> the WeightedSum of the i-th of the microbatches."""

    def cut(x, is_batched, i):
        if not is_batched or microbatches == 1:
            return x
        checks.check(
            x.shape[0] % microbatches == 0,
            f"microbatches: expected a divisor of the {x.shape[0]} examples of each device, "
            f"got {microbatches}",
        )
        size = x.shape[0] // microbatches
        return jax.lax.dynamic_slice_in_dim(x, i * size, size)

    def parts_of(params, i):
        parts = loss_fn(params, jax.tree.map(lambda x, b: cut(x, b, i), batch, is_batched))
        if isinstance(parts, WeightedSum):
            return parts
        checks.check(
            isinstance(parts, tuple) and len(parts) == 2,
            f"loss_fn: expected a WeightedSum or a pair (losses, weights), got {parts}",
            TypeError,
        )
        losses, weights = parts
        return weighted_sum(losses, weights=weights)

    return parts_of


def _like_batch(batch: Any, of_examples: Any, of_all: Any) -> Any:
    """Returns a tree like `batch`: `of_all` at what its examples share, `of_examples` elsewhere."""

    def label(x):
        labels = jax.tree.map(lambda _: of_examples, x)
        if isinstance(x, SparseTargets) and x.background is not None:
            return dataclasses.replace(labels, background=of_all)
        return labels

    return jax.tree.map(label, batch, is_leaf=lambda x: isinstance(x, SparseTargets))


def _broadcast_specs(specs: Any, tree: Any) -> Any:
    """Returns `specs`, a prefix of `tree`, as a tree with a PartitionSpec for each array."""

    def broadcast(spec, subtree):
        return _like_batch(subtree, spec, P())

    return jax.tree.map(broadcast, specs, tree, is_leaf=lambda x: isinstance(x, P))


def _check_microbatches(microbatches: int) -> None:
    checks.check(
        isinstance(microbatches, int) and microbatches > 0,
        f"microbatches: expected a positive int, got {microbatches!r}",
    )


def _check_divides(name: str, tree: Any, specs: Any, mesh: Mesh) -> None:
    """Raises ValueError unless every array divides by the devices that its spec splits it over."""

    def check(path, x, spec):
        for axis, names in enumerate(spec):
            split = () if names is None else _mesh.axis_names(names)
            devices = math.prod(mesh.shape[n] for n in split)
            checks.check(
                axis < jnp.ndim(x) and jnp.shape(x)[axis] % devices == 0,
                f"{name}{jax.tree_util.keystr(path)}: expected axis {axis} to divide by the "
                f"{devices} devices of mesh axis {names!r}, got {checks.describe(x)}",
            )

    jax.tree_util.tree_map_with_path(check, tree, specs)


def _placed(trees: Any, specs: Any, mesh: Mesh) -> Any:
    """Returns `trees` split as `specs` say, which shard_map leaves to us on explicit axes."""
    if AxisType.Explicit not in mesh.axis_types:
        return trees

    def place(x, spec):
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, trees, specs)


def _sum_over(x: jax.Array, axes: Iterable[Hashable], like: jax.Array) -> jax.Array:
    """Returns the sum of x over devices, rounded once to the dtype of `like`."""
    return _mesh.psum(x.astype(wide_dtype(like.dtype)), axes).astype(like.dtype)
