"""Cross-entropy from the layer before the logits, for vocabularies whose logits are too large."""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from xentjax._jax import checks
from xentjax._jax import mesh as _mesh
from xentjax._losses.logit_transform import LogitTransform, converted
from xentjax._losses.reduction import WeightedSum
from xentjax._softmax import head as _head
from xentjax._softmax.head import Head, Params
from xentjax._softmax.partial import wide_dtype
from xentjax._targets import mass as _masses
from xentjax._targets import types as _targets
from xentjax._targets.types import SparseTargets, Targets


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
      TypeError: An array is not floating-point, or where is not bool.
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
    call = prepare(
        inputs, kernel, targets, bias, class_axis, where, weights, logit_transform, memory_budget
    )
    return reduced(call, reduction)


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
    call = prepare(
        inputs, kernel, targets, bias, class_axis, where, None, logit_transform, memory_budget
    )
    head = dataclasses.replace(call.head, with_stats=True)

    def losses_and_stats(inputs, params, targets, mask):
        num_classes = params.kernel.shape[head.class_axis]
        losses, log_normalizer, prediction, surprisal = _head.make_losses(head)(
            inputs, params, targets, mask
        )
        prediction = prediction.astype(jnp.int32)
        stats = LinearStats(
            log_normalizer,
            prediction,
            _masses.is_heaviest(targets, prediction, num_classes),
            jnp.where(jnp.isnan(losses), losses, -surprisal),
        )
        return losses, _masses.masked(stats, mask)

    of_tokens = _mesh.on_automatic_axes(losses_and_stats, call.args[0], (1,))(*call.args)
    return jax.tree.map(lambda x: x.reshape(call.batch), of_tokens)


class Call(NamedTuple):
    """A head, and what it is called with: one axis of tokens."""

    head: Head
    args: tuple  # inputs [N, D], Params, targets of N, mask [N] or None.
    mask: jax.Array | None
    weights: jax.Array  # [N]
    batch: tuple[int, ...]


def prepare(
    inputs, kernel, targets, bias, class_axis, where, weights, transform, memory_budget, axes=()
) -> Call:
    """Checks the arguments, all at trace time, and returns the Call that they make.

    `axes` are those of the mesh that kernel, bias and dense targets have their classes split over.
    """
    inputs, kernel = checks.as_array("inputs", inputs), checks.as_array("kernel", kernel)
    checks.check_floating("inputs", inputs)
    checks.check_floating("kernel", kernel)
    checks.check(
        inputs.ndim >= 1,
        f"inputs: expected shape [..., D], got {checks.describe(inputs)}",
    )
    checks.check(
        kernel.ndim == 2,
        f"kernel: expected shape [D, V], or [V, D] with class_axis=0, got "
        f"{checks.describe(kernel)}",
    )
    checks.check(
        class_axis in (-2, -1, 0, 1), f"class_axis: expected −2, −1, 0 or 1, got {class_axis!r}"
    )
    class_axis %= 2
    (*batch, features), num_classes = inputs.shape, kernel.shape[class_axis]
    batch = tuple(batch)
    checks.check(
        kernel.shape[1 - class_axis] == features and num_classes > 0,
        f"kernel: expected {features} features (those of inputs) on axis {1 - class_axis} and at "
        f"least one class on axis {class_axis}, got {checks.describe(kernel)}",
    )
    if bias is not None:
        bias = checks.as_array("bias", bias)
        checks.check_floating("bias", bias)
        checks.check_shape("bias", bias, (num_classes,), "the classes of kernel")
    shards = jax.lax.axis_size(axes) if axes else 1
    targets = _targets.as_targets(targets)
    is_sparse = isinstance(targets, SparseTargets)
    _targets.check_targets(targets, batch, num_classes * (shards if is_sparse else 1))
    mask = None
    if where is not None:
        where = checks.as_array("where", where, "a bool array")
        checks.check_bool("where", where)
        checks.check_shape("where", where, batch, "the batch of inputs")
        mask = where.reshape(-1)
    if isinstance(targets, SparseTargets):
        checks.check_labels(targets.indices, shards * num_classes, where)
        targets = _targets.invalid_as_nan(targets, shards * num_classes)
    if axes:
        targets = _masses.targets_of_shard(targets, axes, num_classes)
    num_tokens = math.prod(batch)
    targets = _masses.flattened(targets)
    inputs = _masses.masked(inputs.reshape(num_tokens, features), mask)
    dtype = wide_dtype(inputs.dtype, kernel.dtype)
    w = jnp.ones(batch) if weights is None else checks.as_array("weights", weights)
    checks.check_floating("weights", w)
    checks.check_shape("weights", w, batch, "the batch of inputs")
    w = _masses.masked(w.reshape(-1).astype(dtype), mask)

    # In a shard_map, what meets in a loop must vary over the same devices. Mask and weights stay
    # the same for all shards of the classes, and so do the losses.
    of_logits, of_tokens = (inputs, kernel, bias, targets), (mask, w)
    over = _mesh.varying_axes((of_logits, of_tokens))
    transform, constants, over = converted(transform, dtype, over)
    inputs, kernel, bias, targets = _mesh.varying(of_logits, over)
    mask, w = _mesh.varying(of_tokens, over.difference(axes))
    plan = _plan(num_tokens, features, num_classes, dtype.itemsize, memory_budget, shards)
    head = Head(class_axis, transform, *plan, axes)
    return Call(head, (inputs, Params(kernel, bias, constants), targets, mask), mask, w, batch)


def reduced(call: Call, reduction: str) -> Float[Array, "*batch"]:
    """Returns the losses of a Call, weighted and reduced."""
    checks.check(
        reduction in ("mean", "sum", "none"),
        f'reduction: expected "mean", "sum" or "none", got {reduction!r}',
    )

    def losses(args, weights):
        return _masses.times_mass(weights, _head.make_losses(call.head)(*args)[0])

    def total(args, weights):
        if reduction == "mean":
            one = jnp.ones((), weights.dtype)
            weights = weights * WeightedSum(one, weights.sum()).mean()
        return _head.make_total(call.head)(*args, weights)

    function, axes = (losses, (1,)) if reduction == "none" else (total, (0, 1))
    out = _mesh.on_automatic_axes(function, call.args[0], axes)(call.args, call.weights)
    return out.reshape(call.batch) if reduction == "none" else out


def _plan(num_tokens, features, num_classes, itemsize, memory_budget, shards=1):
    """Returns (tokens in a chunk, classes in a block, whether logits can be kept)."""
    checks.check(
        memory_budget is None or (isinstance(memory_budget, int) and memory_budget >= 0),
        f"memory_budget: expected a number of bytes or None, got {memory_budget!r}",
    )
    default = _DEFAULT_BUDGET // shards
    accumulator = itemsize * features * num_classes
    budget = default if memory_budget is None else max(memory_budget - accumulator, 0)
    row = itemsize * num_classes
    tokens = budget // 2 // row  # Half is for the logits that are kept.
    keeps_logits = tokens >= min(num_tokens, _FEWEST)
    if not keeps_logits:
        budget = default if memory_budget is None else memory_budget
        tokens = _ENOUGH
    tokens = _even(num_tokens, tokens)
    # A block has a few arrays of [tokens, classes], and of [features, classes].
    classes = budget // 4 // (itemsize * (2 * tokens + features))
    return tokens, _even(num_classes, classes), keeps_logits


# Half a GiB of logits is where a larger matmul is no longer a faster one; 128 tokens or classes
# are few enough for the smallest memory, and 1024 enough that reading the kernel costs little.
_DEFAULT_BUDGET, _FEWEST, _ENOUGH = 2**29, 128, 1024


def _even(size: int, chunk: int) -> int:
    """Returns a chunk of about `chunk`, not below 128, that cuts `size` into even pieces."""
    count = max(1, math.ceil(size / max(chunk, _FEWEST)))
    return max(1, min(size, math.ceil(size / count / _FEWEST) * _FEWEST))
