"""Cross-entropy from the layer before the logits, for vocabularies whose logits are too large."""

import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from xentjax._jax import checks, value_checks
from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide_dtype
from xentjax._jax.rule import apply
from xentjax._losses import arguments
from xentjax._losses.logit_transform import LogitTransform, converted
from xentjax._softmax.cross_entropy import masked
from xentjax._softmax.head_blocks import Head, HeadPlan, Params
from xentjax._softmax.head_kept import HeadTotal
from xentjax._softmax.head_recomputed import HeadLosses
from xentjax._targets.mass import times
from xentjax._targets.types import Targets


class LinearStats(NamedTuple):
    """What the fused head knows beside the loss; each of the loss's shape.

    Attributes:
      log_normalizer: lse(z) = log Σ_v exp(z_v), in nats; differentiable.
      prediction: The class of the largest logit (the first of several), int32.
      correct: Whether the prediction is a class of the heaviest target mass.
      label_log_probability: log softmax(z) at the heaviest target class, which is the label where
        there is one; in nats; not differentiable (the loss is).
    """

    log_normalizer: Float[Array, "*batch"]
    prediction: Int[Array, "*batch"]
    correct: Bool[Array, "*batch"]
    label_log_probability: Float[Array, "*batch"]


def linear_softmax_cross_entropy(
    inputs: ArrayLike,
    kernel: ArrayLike,
    targets: Targets,
    *,
    bias: ArrayLike | None = None,
    class_axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    logit_transform: LogitTransform | None = None,
    memory_budget: int | None = None,
) -> Float[Array, "*batch"]:
    """Cross-entropy of the logits inputs @ kernel + bias, which are never all in memory.

    loss = Σ_v t_v · (lse(z) − z_v),   z = logit_transform(inputs @ kernel + bias)

    Equal to `softmax_cross_entropy` of those logits, and differentiable as often, with the logits
    made and used block by block. bfloat16 and float16 operands are multiplied as they are and
    summed in float32, forward and backward. For a mean or sum, gradients to inputs, kernel and bias
    are made in the forward pass (three matmuls in all) if the memory budget allows; otherwise
    logits are made again in the backward pass (four).

    Args:
      inputs: The features of each token, float[..., D].
      kernel: float[D, V]; or float[V, D], as of an embedding that is tied, with class_axis=0. It is
        not transposed in memory.
      targets: Labels int[...], dense float[..., V], or SparseTargets, of the batch of inputs.
      bias: float[V].
      class_axis: The axis of the kernel that counts classes: 0, or 1 or −1.
      where: Tokens to keep, bool[...]; the others have loss and gradient 0.
      weights: Of each token's loss, float[...].
      reduction: "mean" is Σ w · loss / Σ w over the tokens kept (0 if there are none), "sum" is
        Σ w · loss, "none" is w · loss for each token.
      logit_transform: An elementwise function of the logits, such as `soft_cap(30.0)`; what it
        closes over is differentiated too.
      memory_budget: Bytes for temporaries beside the gradients, which less may exceed by the
        smallest blocks that make sense. None takes half a GiB of logits, and the float32
        accumulator of the kernel's gradient where there is one.

    Returns:
      A scalar, or losses float[...] without reduction; nats, float32 (float64 for float64).

    Raises:
      TypeError: An array is not floating-point, where is not bool, class_axis or memory_budget is
        not an int, or logit_transform is no function of an array.
      ValueError: Shapes do not fit, or an option is none of those above.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> inputs, labels = jnp.eye(2), jnp.array([0, 1])
      >>> kernel = jnp.array([[2.0, 0, 0], [0, 0, 0]])
      >>> loss = xentjax.linear_softmax_cross_entropy(inputs, kernel, labels)
      >>> print(loss, xentjax.softmax_cross_entropy(inputs @ kernel, labels).mean())
      0.6691 0.6691

    Source:
      Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2025, section 4.
    """
    arrays = as_arrays(inputs, kernel, targets, bias, where, weights)
    options = Options(class_axis, logit_transform, memory_budget)
    last = arrays.inputs.ndim - 1
    reduced = (last,) if reduction == "none" else range(last + 1)
    run = functools.partial(losses_of, options=options, reduction=reduction)
    return meshes.on_automatic_axes(run, arrays.inputs, reduced, arrays)(arrays)


def linear_softmax_cross_entropy_with_stats(
    inputs: ArrayLike,
    kernel: ArrayLike,
    targets: Targets,
    *,
    bias: ArrayLike | None = None,
    class_axis: int = -1,
    where: ArrayLike | None = None,
    logit_transform: LogitTransform | None = None,
    memory_budget: int | None = None,
) -> tuple[Float[Array, "*batch"], LinearStats]:
    """`linear_softmax_cross_entropy`, one loss per token, and what the logits told on the way.

    loss = Σ_v t_v · (lse(z) − z_v);   a z-loss is loss + c · log_normalizer²

    Args:
      inputs: The features of each token, float[..., D].
      kernel: float[D, V], or float[V, D] with class_axis=0.
      targets: Labels int[...], dense float[..., V], or SparseTargets, of the batch of inputs.
      bias: float[V].
      class_axis: The axis of the kernel that counts classes: 0, or 1 or −1.
      where: Tokens to keep, bool[...]; of the others everything is 0.
      logit_transform: An elementwise function of the logits.
      memory_budget: Bytes for temporaries beside the gradients; None takes half a GiB.

    Returns:
      (losses, LinearStats), each of the batch's shape.

    Raises:
      TypeError, ValueError: As `linear_softmax_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> inputs, labels = jnp.eye(2), jnp.array([0, 1])
      >>> kernel = jnp.array([[2.0, 0, 0], [0, 0, 1]])
      >>> loss, stats = xentjax.linear_softmax_cross_entropy_with_stats(inputs, kernel, labels)
      >>> print(stats.prediction, stats.correct, stats.label_log_probability.round(4))
      [0 2] [ True False] [-0.2395 -1.5514]

    Source:
      Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2025, section 4.
    """
    arrays = as_arrays(inputs, kernel, targets, bias, where, None)
    options = Options(class_axis, logit_transform, memory_budget, with_stats=True)
    run = functools.partial(_losses_and_stats, options=options)
    last = arrays.inputs.ndim - 1
    return meshes.on_automatic_axes(run, arrays.inputs, (last,), arrays)(arrays)


class Call(NamedTuple):
    """A head, and the arrays that it is called with, of one axis of tokens.

    Attributes:
      head: The static side.
      args: inputs [N, D], Params, mass, and the mask of tokens [N] or None.
      weights: Of each token's loss, [N].
    """

    head: Head
    args: tuple[Any, ...]
    weights: jax.Array


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a head that are no arrays.

    Attributes:
      class_axis: The axis of the kernel that counts classes.
      logit_transform: As the user gave it.
      memory_budget: Bytes, or None.
      axes: Mesh axes that kernel, bias and dense targets have their classes split over.
      with_stats: Whether stats are asked for.
      plan: The plan; None makes one.
    """

    class_axis: int = -1
    logit_transform: LogitTransform | None = None
    memory_budget: int | None = None
    axes: tuple[Hashable, ...] = ()
    with_stats: bool = False
    plan: HeadPlan | None = None


class Arrays(NamedTuple):
    """The arrays of a head, as the user gave them; those from bias on may be None."""

    inputs: Any
    kernel: Any
    targets: Any
    bias: Any
    where: Any
    weights: Any


def as_arrays(*given: Any) -> Arrays:
    """Returns the arguments as arrays, of the right dtypes."""
    inputs, kernel, targets, bias, where, weights = given

    def floating(name, x):
        x = checks.as_array(name, x)
        checks.check_floating(name, x)
        return x

    inputs, kernel = floating("inputs", inputs), floating("kernel", kernel)
    targets = arguments.as_arrays(targets)
    bias = None if bias is None else floating("bias", bias)
    if where is not None:
        where = checks.as_array("where", where, "a bool array")
        checks.check_bool("where", where)
    weights = None if weights is None else floating("weights", weights)
    return Arrays(inputs, kernel, targets, bias, where, weights)


def prepare(arrays: Arrays, options: Options) -> Call:
    """Checks shapes and options, all at trace time, and returns the Call that they make."""
    inputs, kernel, targets, bias, where, weights = arrays
    class_axis, (batch, num_classes) = _checked_shapes(inputs, kernel, options.class_axis)
    if bias is not None:
        checks.check_shape("bias", bias, (num_classes,), "the classes of kernel")
    for name, x in (("where", where), ("weights", weights)):
        if x is not None:
            checks.check_shape(name, x, batch, "the batch of inputs")
    dtype = wide_dtype(inputs.dtype, kernel.dtype)
    _check_values(inputs, kernel, bias, where, weights)
    mass = arguments.as_mass(targets, (*batch, num_classes), dtype, where, mesh_axes=options.axes)
    num_tokens, features = math.prod(batch), inputs.shape[-1]
    mass = mass.map_examples(lambda x: x.reshape(num_tokens, *x.shape[len(batch) :]))
    mask = None if where is None else where.reshape(num_tokens)
    inputs = masked(inputs.reshape(num_tokens, features), mask)
    w = jnp.ones(batch, dtype) if weights is None else weights.astype(dtype)
    w = masked(w.reshape(num_tokens), mask)

    # In a shard_map, arrays that meet in a loop must vary over the same devices.
    of_logits = inputs, kernel, bias, mass
    over = meshes.varying_axes((of_logits, mask, w))
    transform, constants, over = converted(options.logit_transform, dtype, over)
    inputs, kernel, bias, mass = meshes.varying(of_logits, over)
    w = meshes.varying(w, over.difference(options.axes))
    shards = jax.lax.axis_size(options.axes) if options.axes else 1
    sizes = (num_tokens, features, num_classes)
    plan = options.plan or make_plan(sizes, dtype.itemsize, options.memory_budget, shards)
    head = Head(class_axis, transform, plan, options.axes, options.with_stats)
    return Call(head, (inputs, Params(kernel, bias, constants), mass, mask), w)


def _check_values(inputs, kernel, bias, where, weights):
    """Under `value_checks`, checks that logits can be made without NaN, and weights are ≥ 0."""
    value_checks.check_not_nan("inputs", inputs, where)
    value_checks.check_not_nan("kernel", kernel)
    if bias is not None:
        value_checks.check_not_nan("bias", bias)
    if weights is not None:
        value_checks.check_masses("weights", weights, where)


def _checked_shapes(inputs, kernel, class_axis):
    """Returns (class_axis as 0 or 1, (batch, number of classes))."""
    checks.check(
        inputs.ndim >= 1, f"inputs: expected shape [..., D], got {checks.describe(inputs)}"
    )
    checks.check(
        kernel.ndim == 2,
        f"kernel: expected shape [D, V], or [V, D] with class_axis=0, got "
        f"{checks.describe(kernel)}",
    )
    expected = f"class_axis: expected −2, −1, 0 or 1, got {class_axis!r}"
    checks.check(checks.is_int(class_axis), expected, TypeError)
    checks.check(class_axis in (-2, -1, 0, 1), expected)
    class_axis %= 2
    (*batch, features), num_classes = inputs.shape, kernel.shape[class_axis]
    checks.check(
        kernel.shape[1 - class_axis] == features and num_classes > 0,
        f"kernel: expected {features} features (those of inputs) on axis {1 - class_axis} and at "
        f"least one class on axis {class_axis}, got {checks.describe(kernel)}",
    )
    return class_axis, (tuple(batch), num_classes)


def losses_of(arrays: Arrays, options: Options, reduction: str) -> Float[Array, "*batch"]:
    """Returns the losses of a head, weighted and reduced."""
    checks.check(
        reduction in ("mean", "sum", "none"),
        f'reduction: expected "mean", "sum" or "none", got {reduction!r}',
    )
    call = prepare(arrays, options)
    if reduction == "none":
        losses, _ = apply(HeadLosses(call.head), *call.args)
        return times(call.weights, losses).reshape(arrays.inputs.shape[:-1])
    weights = call.weights
    if reduction == "mean":
        weight = weights.sum()
        weights = weights * jnp.where(weight == 0, 0, 1 / jnp.where(weight == 0, 1, weight))
    return apply(HeadTotal(call.head), *call.args, weights)


def _losses_and_stats(arrays, options):
    call = prepare(arrays, options)
    mass, mask = call.args[2:]
    losses, log_normalizer, prediction, surprisal = apply(HeadLosses(call.head), *call.args)
    prediction = prediction.astype(jnp.int32)
    stats = LinearStats(
        log_normalizer,
        prediction,
        mass.is_heaviest(prediction),
        jnp.where(jnp.isnan(losses), losses, -surprisal),
    )
    batch = arrays.inputs.shape[:-1]
    return jax.tree.map(lambda x: x.reshape(batch), (losses, masked(stats, mask)))


def make_plan(
    sizes: tuple[Any, Any, int], itemsize: int, memory_budget: int | None, shards: int = 1
) -> HeadPlan:
    """Returns how much of a head is in memory at once.

    Args:
      sizes: Tokens, features, and classes on this device.
      itemsize: Bytes of a number in the arithmetic.
      memory_budget: Bytes, or None.
      shards: How many devices share the classes.
    """
    num_tokens, features, num_classes = sizes
    is_known = isinstance(num_tokens, int)  # `jax.export` knows some sizes by name alone.
    expected = f"memory_budget: expected an integer number of bytes or None, got {memory_budget!r}"
    checks.check(memory_budget is None or checks.is_int(memory_budget), expected, TypeError)
    checks.check(memory_budget is None or memory_budget >= 0, expected)
    default = DEFAULT_BUDGET_BYTES // shards
    accumulator = itemsize * features * num_classes
    budget = default if memory_budget is None else max(memory_budget - accumulator, 0)
    row = itemsize * num_classes
    tokens = budget // 2 // row  # Half is for the logits that are kept.
    keeps_logits = is_known and tokens >= min(num_tokens, MIN_BLOCK)
    if not keeps_logits:
        budget = default if memory_budget is None else memory_budget
        tokens = RECOMPUTED_TOKENS
    tokens = _even(num_tokens, tokens) if is_known else RECOMPUTED_TOKENS
    # A block has a few arrays of [tokens, classes], and of [features, classes].
    classes = budget // 4 // (itemsize * (2 * tokens + features))
    blocks = _even(num_classes, classes)
    return HeadPlan(tokens if is_known else num_tokens, blocks, keeps_logits)


DEFAULT_BUDGET_BYTES = 2**29
"""Half a GiB of logits: a larger matmul is no longer a faster one."""

MIN_BLOCK = 128
"""So few tokens or classes make the smallest memory."""

RECOMPUTED_TOKENS = 1024
"""So many tokens of a chunk make the reading of the kernel cost little."""


def _even(size: int, chunk: int) -> int:
    """Returns a chunk of about `chunk`, not below 128, that cuts `size` into even pieces."""
    count = max(1, math.ceil(size / max(chunk, MIN_BLOCK)))
    return max(1, min(size, math.ceil(size / count / MIN_BLOCK) * MIN_BLOCK))
