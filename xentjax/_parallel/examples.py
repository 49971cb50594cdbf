"""A batch as its examples: the loss and gradient of each, and the parts that examples share."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from xentjax._jax import checks, trees
from xentjax._targets.types import SparseTargets

ParamsT = TypeVar("ParamsT")
BatchT = TypeVar("BatchT")
AuxT = TypeVar("AuxT")


@overload
def per_example(
    loss_fn: Callable[[ParamsT, BatchT], ArrayLike],
    *,
    gradients: Literal[False] = False,
    has_aux: Literal[False] = False,
) -> Callable[[ParamsT, BatchT], jax.Array]: ...
@overload
def per_example(
    loss_fn: Callable[[ParamsT, BatchT], ArrayLike],
    *,
    gradients: Literal[True],
    has_aux: Literal[False] = False,
) -> Callable[[ParamsT, BatchT], tuple[jax.Array, ParamsT]]: ...
@overload
def per_example(
    loss_fn: Callable[[ParamsT, BatchT], tuple[ArrayLike, AuxT]],
    *,
    gradients: Literal[False] = False,
    has_aux: Literal[True],
) -> Callable[[ParamsT, BatchT], tuple[jax.Array, AuxT]]: ...
@overload
def per_example(
    loss_fn: Callable[[ParamsT, BatchT], tuple[ArrayLike, AuxT]],
    *,
    gradients: Literal[True],
    has_aux: Literal[True],
) -> Callable[[ParamsT, BatchT], tuple[tuple[jax.Array, AuxT], ParamsT]]: ...
def per_example(
    loss_fn: Callable[[Any, Any], Any], *, gradients: bool = False, has_aux: bool = False
) -> Callable[[Any, Any], Any]:
    """Maps the loss of one example over a batch.

    losses_i = loss_fn(params, batch_i),   gradients_i = ∂losses_i / ∂params

    Args:
      loss_fn: (params, example) -> a scalar loss.
      gradients: Whether to return the gradient of each example too.
      has_aux: Whether `loss_fn` returns (loss, aux), where aux is a tree of arrays.

    Returns:
      A function (params, batch) -> losses [N], or (losses [N], gradients); with has_aux,
      (losses [N], aux) stands in place of the losses. Arrays of gradients and aux have a leading
      axis N. The first axis of every array of the batch is N; only the background of SparseTargets,
      which examples share, is not mapped over. Leaves that are no arrays reach `loss_fn` as they
      are. Gradients are a tree like params, with None for leaves that are not arrays of floats.

    Raises:
      ValueError: When called, the first axes of the batch differ.
      TypeError: loss_fn is no function, or gradients or has_aux no bool; or, when called for
        gradients, no leaf of params is an array of floats.

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
    checks.check_callable("loss_fn", loss_fn)
    checks.check_flag("gradients", gradients)
    checks.check_flag("has_aux", has_aux)

    def scalar_loss(params, example):
        outputs = loss_fn(trees.show_constants(params), trees.show_constants(example))
        loss = _loss_beside_aux(outputs) if has_aux else outputs
        checks.check(
            jnp.shape(loss) == (),
            f"loss_fn: expected the scalar loss of one example, got {checks.describe(loss)}",
        )
        return outputs

    def loss_of_floats(floats, others, example):
        return scalar_loss(trees.combine(floats, others), example)

    def over_batch(params, batch):
        params = trees.hide_constants("params", params)
        batch = trees.hide_constants("batch", batch)
        axes = like_batch(batch, 0, None)
        if not gradients:
            return jax.vmap(scalar_loss, (None, axes))(params, batch)
        floats, others = trees.partition("params", params)
        value_and_grad = jax.value_and_grad(loss_of_floats, has_aux=has_aux)
        return jax.vmap(value_and_grad, (None, None, axes))(floats, others, batch)

    return over_batch


def _loss_beside_aux(outputs: Any) -> Any:
    checks.check(
        isinstance(outputs, tuple) and len(outputs) == 2,
        f"loss_fn: expected a pair (loss, aux), got {outputs}",
        TypeError,
    )
    return outputs[0]


def like_batch(batch: Any, of_examples: Any, of_all: Any) -> Any:
    """Returns a tree like `batch`: `of_all` for parts all examples share, `of_examples` elsewhere.

    Examples share the background of SparseTargets.
    """

    def label(x):
        labels = jax.tree.map(lambda _: of_examples, x)
        if isinstance(x, SparseTargets) and x.background is not None:
            return dataclasses.replace(labels, background=of_all)
        return labels

    return jax.tree.map(label, batch, is_leaf=lambda x: isinstance(x, SparseTargets))
