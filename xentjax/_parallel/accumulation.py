"""The gradient of a weighted mean over a batch, taken in microbatches one after the other.

Sums cross microbatches and devices, never means: the whole divides once.
"""

import functools
import operator
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from xentjax._jax import checks, trees
from xentjax._jax import mesh as _mesh
from xentjax._jax.dtypes import wide_dtype
from xentjax._losses.reduction import WeightedSum, weighted_sum
from xentjax._parallel.examples import like_batch

ParamsT = TypeVar("ParamsT")
BatchT = TypeVar("BatchT")
MetricsT = TypeVar("MetricsT")

Loss = WeightedSum | tuple[ArrayLike, ArrayLike]
"""The WeightedSum of a batch, or one (losses, weights) for each example."""


@overload
def accumulate_gradients(
    loss_fn: Callable[[ParamsT, BatchT], Loss],
    *,
    microbatches: int,
    has_aux: Literal[False] = False,
) -> Callable[[ParamsT, BatchT], tuple[jax.Array, ParamsT]]: ...
@overload
def accumulate_gradients(
    loss_fn: Callable[[ParamsT, BatchT], tuple[Loss, MetricsT]],
    *,
    microbatches: int,
    has_aux: Literal[True],
) -> Callable[[ParamsT, BatchT], tuple[tuple[jax.Array, MetricsT], ParamsT]]: ...
def accumulate_gradients(
    loss_fn: Callable[[Any, Any], Any], *, microbatches: int, has_aux: bool = False
) -> Callable[[Any, Any], Any]:
    """Makes the value and gradient of a weighted mean over a batch taken in microbatches.

    mean = Σ_i total_i / Σ_i weight_i,   and its gradient, over microbatches i

    Whatever the masks and weights in each microbatch, it is the mean of the whole batch, in the
    memory of one microbatch: 0 with gradient 0 where all weights are 0. Gradients are summed in
    float32 at least. Give the gradient to any optimizer once for the whole batch:
    `updates, state = optimizer.update(gradient, state, params)`. The other way to accumulate,
    `optax.MultiSteps` around the gradients of `weighted_mean`, takes the mean of the microbatches'
    means: another number whenever their weights differ, since an example counts for more in a
    microbatch that keeps few.

    Args:
      loss_fn: (params, batch) -> the WeightedSum of a batch, or (losses, weights) of the same
        shape. Weights may depend on params; that costs another forward pass.
      microbatches: In how many parts to take the batch. One part has every so many-th example.
      has_aux: Whether `loss_fn` returns (WeightedSum or pair, metrics). Metrics are a tree of
        arrays that add, such as counts and WeightedSums; they are not differentiated.

    Returns:
      A compiled function (params, batch) -> (mean, gradient), to call alone or in a jitted step;
      with has_aux, ((mean, metrics summed over microbatches), gradient). The first axis of every
      array of the batch is split; the background of SparseTargets, which examples share, is not.
      Leaves that are no arrays reach `loss_fn` as they are; another value of one compiles anew.
      The gradient is a tree like params, with None for leaves that are not arrays of floats.

    Raises:
      ValueError: microbatches is not positive; or, when called, an array of the batch does not
        divide into them (pad the batch with examples of weight 0).
      TypeError: loss_fn is no function, or has_aux no bool; or, when called, loss_fn returns
        something else, no leaf of params is an array of floats, or a leaf is neither an array nor
        hashable.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> def loss_fn(kernel, batch):
      ...     x, labels, where = batch
      ...     losses = xentjax.softmax_cross_entropy(x @ kernel, labels, where=where)
      ...     return xentjax.weighted_sum(losses, where=where), {"tokens": where.sum()}
      >>> batch = jnp.ones((8, 2)), jnp.arange(8) % 3, jnp.arange(8) < 5
      >>> value_and_grad = xentjax.accumulate_gradients(loss_fn, microbatches=4, has_aux=True)
      >>> (loss, metrics), grads = value_and_grad(jnp.zeros((2, 3)), batch)
      >>> print(loss.round(4), metrics["tokens"], grads.shape)
      1.0986 5 (2, 3)

    Source:
      Goyal et al., Accurate, Large Minibatch SGD, 2017, section 3: normalize by the total.
    """
    checks.check_callable("loss_fn", loss_fn)
    checks.check_flag("has_aux", has_aux)
    check_microbatches(microbatches)

    def value_and_grad(params, batch):
        floats, others = trees.partition("params", params)
        loss_of = microbatch_loss(
            loss_fn, others, batch, like_batch(batch, True, False), microbatches, has_aux
        )
        mean, metrics, grads = mean_and_grads(loss_of, floats, microbatches, ())
        return mean, metrics, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, floats)

    return compiled(value_and_grad, has_aux)


def check_microbatches(microbatches: int) -> None:
    """Raises ValueError unless `microbatches` is a positive int."""
    checks.check(
        isinstance(microbatches, int) and microbatches > 0 and microbatches is not True,
        f"microbatches: expected a positive int, got {microbatches!r}",
    )


def compiled(
    value_and_grad: Callable[[Any, Any], tuple[Any, Any, Any]], has_aux: bool
) -> Callable[[Any, Any], Any]:
    """Jits (params, batch) -> (mean, metrics, gradient), and gives it the form that users know."""
    jitted = jax.jit(value_and_grad)

    @functools.wraps(value_and_grad)
    def call(params, batch):
        params = trees.hide_constants("params", params)
        batch = trees.hide_constants("batch", batch)
        mean, metrics, grads = jitted(params, batch)
        return ((mean, metrics) if has_aux else mean), grads

    return call


def microbatch_loss(
    loss_fn: Callable[[Any, Any], Any],
    others: Any,
    batch: Any,
    is_batched: Any,
    microbatches: int,
    has_aux: bool,
) -> Callable[[Any, Any], tuple[WeightedSum, Any]]:
    """Returns (floats of params, i) -> the WeightedSum and metrics of the i-th microbatch.

    `others` are the other leaves of params; `is_batched` tells which arrays of the batch are split.
    """

    def cut(path, x, is_batched, i):
        if not is_batched or microbatches == 1:
            return x
        checks.check(
            x.ndim > 0 and x.shape[0] % microbatches == 0,
            f"batch{jax.tree_util.keystr(path)}: expected a first axis that divides into "
            f"{microbatches} microbatches, got {checks.describe(x)}",
        )
        # Every so many-th example, not a block of examples: where devices share the first axis,
        # each then has its part of every microbatch, and none moves.
        x = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)

    def loss_of(floats, i):
        params = trees.show_constants(trees.combine(floats, others))
        microbatch = jax.tree_util.tree_map_with_path(
            lambda path, x, b: cut(path, x, b, i), batch, is_batched
        )
        outputs = loss_fn(params, trees.show_constants(microbatch))
        if not has_aux:
            return _as_weighted_sum(outputs), ()
        checks.check(
            isinstance(outputs, tuple) and len(outputs) == 2,
            f"loss_fn: expected a pair (loss, metrics), got {outputs}",
            TypeError,
        )
        loss, metrics = outputs
        return _as_weighted_sum(loss), jax.tree.map(_as_summand, metrics)

    return loss_of


def _as_weighted_sum(loss: Any) -> WeightedSum:
    if not isinstance(loss, WeightedSum):
        checks.check(
            isinstance(loss, tuple) and len(loss) == 2,
            f"loss_fn: expected a WeightedSum or a pair (losses, weights), got {loss}",
            TypeError,
        )
        losses, weights = loss
        return weighted_sum(losses, weights=weights)
    checks.check(
        jnp.shape(loss.total) == (),
        f"loss_fn: expected a WeightedSum of scalars, got {checks.describe(loss.total)}",
    )
    return loss


def _as_summand(x: Any) -> jax.Array:
    """Returns x in the dtype in which sums are taken: float32 for less, int32 for bool."""
    x = checks.as_array("loss_fn", x, "arrays that add")
    if x.dtype == bool:
        return x.astype(jnp.int32)
    checks.check(
        jnp.issubdtype(x.dtype, jnp.number),
        f"loss_fn: expected arrays that add, got {checks.describe(x)}",
        TypeError,
    )
    return x.astype(sum_dtype(x.dtype))


def sum_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the dtype in which numbers of `dtype` are summed: float32 for narrower floats."""
    floating = jnp.issubdtype(dtype, jnp.floating)
    return wide_dtype(dtype) if floating else jnp.dtype(dtype)


def mean_and_grads(
    loss_of: Callable[[Any, Any], tuple[WeightedSum, Any]],
    params: Any,
    microbatches: int,
    axes: tuple[Hashable, ...],
) -> tuple[jax.Array, Any, Any]:
    """Returns the mean and the metrics over `axes`, and this device's part of the mean's gradient.

    `loss_of(params, i)` is (WeightedSum, metrics) of microbatch i. The mean's derivative to the
    parts of the WeightedSum, once their sums are known, turns the gradient of each microbatch into
    its part of the mean's.
    """
    if microbatches == 1:

        def mean_of(params):
            parts, metrics = loss_of(params, 0)
            return _sum_over_devices(parts, axes).mean(), metrics

        (mean, metrics), grads = jax.value_and_grad(mean_of, has_aux=True)(params)
        return mean, _sum_over_devices(metrics, axes), grads

    # Only the weights, and the total if they depend on params, are compiled of this pass.
    indices = jnp.arange(microbatches)
    stacked = jax.lax.map(lambda i: loss_of(params, i), indices)
    parts = jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), stacked[0])
    mean, pullback = jax.vjp(WeightedSum.mean, _sum_over_devices(parts, axes))
    (share,) = pullback(jnp.ones_like(mean))

    def step(sums, i):
        def share_of(params):
            parts, metrics = loss_of(params, i)
            return _dot(share, parts), (parts, metrics)

        grads, outputs = jax.grad(share_of, has_aux=True)(params)
        grads = jax.tree.map(lambda g, p: g.astype(sum_dtype(p.dtype)), grads, params)
        return _add(sums, (grads, *outputs)), None

    zero_grads = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=sum_dtype(p.dtype)), params)
    zero_outputs = jax.tree.map(lambda x: jnp.zeros_like(x[0]), stacked)
    (grads, parts, metrics), _ = jax.lax.scan(step, (zero_grads, *zero_outputs), indices)
    return _sum_over_devices(parts, axes).mean(), _sum_over_devices(metrics, axes), grads


def _dot(share: WeightedSum, parts: WeightedSum) -> jax.Array:
    """Returns the sum of the products of their numbers."""
    return jax.tree.reduce(operator.add, jax.tree.map(jnp.multiply, share, parts))


def _add(sums: Any, summands: Any) -> Any:
    """Returns the sum of two trees, in which WeightedSums add as they do."""
    return jax.tree.map(operator.add, sums, summands, is_leaf=_is_weighted_sum)


def _sum_over_devices(tree: Any, axes: Iterable[Hashable]) -> Any:
    """Returns the sum of a tree over the devices along `axes`, of which there may be none."""
    axes = tuple(axes)

    def psum(x):
        return x.psum(axes) if _is_weighted_sum(x) else _mesh.psum(x, axes)

    return jax.tree.map(psum, tree, is_leaf=_is_weighted_sum) if axes else tree


def _is_weighted_sum(x: Any) -> bool:
    return isinstance(x, WeightedSum)
