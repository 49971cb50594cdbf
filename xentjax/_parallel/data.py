"""The same loss on one device and on many, with the examples split over devices."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xentjax._jax import checks, trees
from xentjax._jax import mesh as _mesh
from xentjax._jax.mesh import AxisName
from xentjax._parallel.accumulation import (
    BatchT,
    Loss,
    MetricsT,
    ParamsT,
    check_microbatches,
    compiled,
    mean_and_grads,
    microbatch_loss,
    sum_dtype,
)
from xentjax._parallel.examples import like_batch


@overload
def data_parallel(
    loss_fn: Callable[[ParamsT, BatchT], Loss],
    mesh: Mesh,
    *,
    axis_name: AxisName = "data",
    microbatches: int = 1,
    in_specs: tuple[Any, Any] | None = None,
    has_aux: Literal[False] = False,
) -> Callable[[ParamsT, BatchT], tuple[jax.Array, ParamsT]]: ...
@overload
def data_parallel(
    loss_fn: Callable[[ParamsT, BatchT], tuple[Loss, MetricsT]],
    mesh: Mesh,
    *,
    axis_name: AxisName = "data",
    microbatches: int = 1,
    in_specs: tuple[Any, Any] | None = None,
    has_aux: Literal[True],
) -> Callable[[ParamsT, BatchT], tuple[tuple[jax.Array, MetricsT], ParamsT]]: ...
def data_parallel(
    loss_fn: Callable[[Any, Any], Any],
    mesh: Mesh,
    *,
    axis_name: AxisName = "data",
    microbatches: int = 1,
    in_specs: tuple[Any, Any] | None = None,
    has_aux: bool = False,
) -> Callable[[Any, Any], Any]:
    """Makes the value and gradient of a weighted mean over a batch that devices share out.

    mean = Σ_d total_d / Σ_d weight_d,   and its gradient, over all devices d and microbatches

    Whatever the masks and weights on each device, it is the mean that one device finds on the whole
    batch: 0 with gradient 0 where all weights are 0. `loss_fn` runs inside `jax.shard_map`, on each
    device's share. On a mesh of one device it is the plain value and gradient. Gradients of
    microbatches and of devices are summed in float32 at least, those of devices by one reduction.
    On one device without a mesh, `accumulate_gradients` takes microbatches.

    Args:
      loss_fn: (params, batch) -> the WeightedSum of a batch, or (losses, weights) of the same
        shape. Weights may depend on params; with microbatches that costs another forward pass.
      mesh: The devices. Its axes may be automatic or explicit.
      axis_name: The axis of the mesh, or axes, that the loss is summed over.
      microbatches: In how many parts each device takes its share, one after the other, as in
        `accumulate_gradients`.
      in_specs: PartitionSpecs of (params, batch), prefixes of these trees as in `jax.shard_map`.
        None has params whole on each device, and the first axis of every array of the batch split
        over `axis_name`. The background of SparseTargets, which examples share, is never split by
        the spec of the whole. Gradients are split as params are; those split over `axis_name` are
        for `loss_fn` to gather.
      has_aux: Whether `loss_fn` returns (WeightedSum or pair, metrics). Metrics are a tree of
        arrays that add, such as counts and WeightedSums; they are not differentiated.

    Returns:
      A compiled function (params, batch) -> (mean, gradient), to call alone or in a jitted step;
      with has_aux, ((mean, metrics summed over microbatches and devices), gradient). Leaves that
      are no arrays reach `loss_fn` as they are; another value of one compiles anew. The gradient is
      a tree like params, with None for leaves that are not arrays of floats.

    Raises:
      ValueError: The mesh lacks an axis; or, when called, an array does not divide by the devices
        and microbatches it is split over (pad the batch with examples of weight 0), or
        `jax.set_mesh` has set another mesh.
      TypeError: An argument is of another kind; or, when called, loss_fn returns something else,
        no leaf of params is an array of floats, or a leaf is neither an array nor hashable.

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
    checks.check_callable("loss_fn", loss_fn)
    checks.check_flag("has_aux", has_aux)
    axes = _checked_axes(mesh, in_specs, axis_name)
    check_microbatches(microbatches)

    def value_and_grad(params, batch):
        of_params, of_batch = (P(), P(axes)) if in_specs is None else in_specs
        specs = _broadcast_specs(of_params, params), _broadcast_specs(of_batch, batch)
        _check_divides("params", params, specs[0], mesh)
        _check_divides("batch", batch, specs[1], mesh)
        is_batched = jax.tree.map(lambda spec: len(spec) > 0 and spec[0] is not None, specs[1])
        of_floats = _specs_of_floats(params, specs[0])

        def on_device(params, batch):
            # Params that devices share become each device's own, so that their gradient is summed
            # over devices once, at the end, and not wherever they are used.
            floats, others = trees.partition("params", params)
            own = jax.tree.map(lambda p: _mesh.varying(p, axes), floats)
            shared = jax.tree.map(lambda p: set(axes) - _mesh.varying_axes(p), floats)
            loss_of = microbatch_loss(loss_fn, others, batch, is_batched, microbatches, has_aux)
            mean, metrics, grads = mean_and_grads(loss_of, own, microbatches, axes)
            return mean, metrics, jax.tree.map(_sum_over, grads, shared, floats)

        on_mesh = jax.shard_map(
            on_device, mesh=mesh, in_specs=specs, out_specs=(P(), P(), of_floats)
        )
        return on_mesh(*_placed((params, batch), specs, mesh))

    return compiled(value_and_grad, has_aux)


@overload
def pmap_data_parallel(
    loss_fn: Callable[[ParamsT, BatchT], Loss],
    *,
    axis_name: Hashable = "batch",
    microbatches: int = 1,
    devices: Sequence[Any] | None = None,
    has_aux: Literal[False] = False,
) -> Callable[[ParamsT, BatchT], tuple[jax.Array, ParamsT]]: ...
@overload
def pmap_data_parallel(
    loss_fn: Callable[[ParamsT, BatchT], tuple[Loss, MetricsT]],
    *,
    axis_name: Hashable = "batch",
    microbatches: int = 1,
    devices: Sequence[Any] | None = None,
    has_aux: Literal[True],
) -> Callable[[ParamsT, BatchT], tuple[tuple[jax.Array, MetricsT], ParamsT]]: ...
def pmap_data_parallel(
    loss_fn: Callable[[Any, Any], Any],
    *,
    axis_name: Hashable = "batch",
    microbatches: int = 1,
    devices: Sequence[Any] | None = None,
    has_aux: bool = False,
) -> Callable[[Any, Any], Any]:
    """`data_parallel` for arrays that are stacked, a slice for each device, as in `jax.pmap`.

    mean = Σ_d total_d / Σ_d weight_d,   and its gradient, the same on every device d

    It takes the place of a `jax.pmap` that averages gradients with `jax.lax.pmean`, which is right
    only where all devices have the same weight. It is built on `jax.shard_map`.

    Args:
      loss_fn: As in `data_parallel`.
      axis_name: The name by which `loss_fn` may call the axis of devices.
      microbatches: In how many parts each device takes its share, one after the other.
      devices: Those of the slices, in order; None takes `jax.devices()`.
      has_aux: As in `data_parallel`.

    Returns:
      A compiled function from params [devices, ...], the same in every slice, and a batch
      [devices, per_device, ...] to means [devices] and gradients [devices, ...], the same in every
      slice; with has_aux, to (means, metrics [devices, ...]) and gradients. All arrays are stacked,
      the background of SparseTargets too. Leaves that are no arrays, or not of floats, are treated
      as in `data_parallel`.

    Raises:
      ValueError: When called, leading axes differ or exceed the devices, per_device does not divide
        by the microbatches, or `jax.set_mesh` has set another mesh.
      TypeError: As in `data_parallel`.

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
    checks.check_callable("loss_fn", loss_fn)
    checks.check_flag("has_aux", has_aux)
    checks.check(
        devices is None
        or (isinstance(devices, Sequence) and all(isinstance(d, jax.Device) for d in devices)),
        f"devices: expected None or a sequence of devices, got {devices!r}",
        TypeError,
    )
    checks.check(
        isinstance(axis_name, Hashable), f"axis_name: expected a name, got {axis_name!r}", TypeError
    )
    check_microbatches(microbatches)
    devices = list(jax.devices() if devices is None else devices)

    def value_and_grad(params, batch):
        leading = {jnp.shape(x)[:1] for x in jax.tree.leaves((params, batch))}
        checks.check(
            len(leading) == 1 and leading <= {(n + 1,) for n in range(len(devices))},
            "params, batch: expected arrays stacked for the same number of devices, at most "
            f"{len(devices)}, got leading axes {sorted(leading)}",
        )
        mesh = Mesh(np.array(devices[: math.prod(*leading)]), (axis_name,))
        is_batched = like_batch(batch, True, False)

        def on_device(params, batch):
            params, batch = jax.tree.map(lambda x: x[0], (params, batch))
            floats, others = trees.partition("params", params)
            loss_of = microbatch_loss(loss_fn, others, batch, is_batched, microbatches, has_aux)
            mean, metrics, grads = mean_and_grads(loss_of, floats, microbatches, (axis_name,))
            grads = jax.tree.map(lambda g, p: _sum_over(g, [axis_name], p), grads, floats)
            return jax.tree.map(lambda x: x[None], (mean, metrics, grads))

        spec = P(axis_name)
        return jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec)(params, batch)

    return compiled(value_and_grad, has_aux)


def _checked_axes(mesh: Any, in_specs: Any, axis_name: AxisName) -> tuple[Hashable, ...]:
    """Returns the axes that examples are split over, of a mesh and specs that can be ones."""
    checks.check(
        isinstance(mesh, Mesh | AbstractMesh),
        f"mesh: expected a jax.sharding.Mesh, got {mesh!r}",
        TypeError,
    )
    is_pair = isinstance(in_specs, tuple | list) and len(in_specs) == 2
    checks.check(
        in_specs is None or (is_pair and all(map(_is_spec, _leaves_of_specs(in_specs)))),
        f"in_specs: expected None or a pair of PartitionSpecs or trees of them, got {in_specs!r}",
        TypeError,
    )
    axes = _mesh.axis_names(axis_name)
    checks.check(
        all(axis in mesh.axis_names for axis in axes),
        f"axis_name: expected axes of the mesh, {mesh.axis_names}, got {axis_name!r}",
    )
    return axes


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, P)


def _leaves_of_specs(specs: Any) -> list[Any]:
    return jax.tree.leaves(specs, is_leaf=_is_spec)


def _broadcast_specs(specs: Any, tree: Any) -> Any:
    """Returns `specs`, a prefix of `tree`, as a tree with a PartitionSpec for each array."""

    def broadcast(spec, subtree):
        return like_batch(subtree, P() if spec is None else spec, P())

    return jax.tree.map(broadcast, specs, tree, is_leaf=_is_spec)


def _specs_of_floats(params: Any, specs: Any) -> Any:
    """Returns the PartitionSpecs of the gradient: None for leaves that have none."""
    floats, _ = trees.partition("params", params)
    return jax.tree.map(
        lambda x, spec: None if x is None else spec, floats, specs, is_leaf=lambda x: x is None
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
    return _mesh.psum(x.astype(sum_dtype(like.dtype)), axes).astype(like.dtype)
