"""Cross-entropy from the layer before the logits, for vocabularies whose logits are too large."""

import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import checks, value_checks
from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide_dtype
from xentjax._jax.rule import apply
from xentjax._losses import arguments, linear_targets, stats
from xentjax._losses.logit_transform import LogitTransform, converted
from xentjax._losses.stats import SoftmaxStats
from xentjax._softmax.head_blocks import Head, Params, num_classes_of
from xentjax._softmax.head_kept import Coefficients, HeadTotal
from xentjax._softmax.head_plan import ACCELERATOR, HeadPlan, Sizes, make_plan
from xentjax._softmax.head_recomputed import HeadLosses
from xentjax._softmax.head_teacher import HeadMass, TeacherMass
from xentjax._softmax.partial import masked
from xentjax._targets.linear import LinearTargets
from xentjax._targets.mass import DenseMass, map_examples, times
from xentjax._targets.types import Targets


def linear_softmax_cross_entropy(
    inputs: ArrayLike,
    kernel: ArrayLike,
    targets: Targets | LinearTargets,
    *,
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
    """Cross-entropy of the logits inputs @ kernel + bias, which are never all in memory.

    loss = Σ_v t_v · (lse(z) − z_v) + z_loss · lse(z)²
    z = logit_transform(inputs @ kernel + bias)

    Equal to `softmax_cross_entropy` of those logits, and differentiable as often, with the logits
    made and used block by block. bfloat16 and float16 operands are multiplied as they are and
    summed in float32, forward and backward. For a mean or sum, gradients to inputs, kernel and bias
    are made in the forward pass (three matmuls in all) if the memory budget allows; otherwise
    logits are made again in the backward pass (four). Tokens masked by `where` take no time, but
    for those that fill the last chunk, unless targets are dense.

    Args:
      inputs: The features of each token, float[..., D].
      kernel: float[D, V]; or float[V, D], as of an embedding that is tied, with class_axis=0. It is
        not transposed in memory.
      targets: Labels int[...], dense float[..., V], SparseTargets, or the LinearTargets of a
        teacher's head, of the batch of inputs.
      bias: float[V].
      class_axis: The axis of the kernel that counts classes: 0, or 1 or −1.
      class_mask: The classes that there are, bool[V], such as those before the padding of a
        vocabulary. The others have probability 0 whatever the logit transform is; mass on them is
        loss +inf, and `reweight_targets(targets, class_mask.astype(float))` takes it away. With no
        class left, loss and gradient are 0.
      where: Tokens to keep, bool[...]; the others have loss and gradient 0.
      weights: The weight of each token's loss, float[...].
      reduction: "mean" is Σ w · loss / Σ w over the tokens kept (0 if there are none), "sum" is
        Σ w · loss, "none" is w · loss for each token.
      z_loss: A scalar, 1e-4 for one; it may be traced and differentiated. None is 0.
      logit_transform: An elementwise function of the logits, such as `soft_cap(30.0)`; arrays
        that it closes over are differentiated too.
      memory_budget: Bytes for temporaries beside the gradients, which less may exceed by the
        smallest blocks that make sense. None takes half a GiB of logits, and the float32
        accumulator of the kernel's gradient where there is one.

    Returns:
      A scalar, or losses float[...] without reduction; nats, float32 (float64 for float64).

    Raises:
      TypeError: An array is not floating-point, where or class_mask is not bool, class_axis or
        memory_budget is not an int, or logit_transform is no function of an array.
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
      Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2025, section 4; z-loss:
      Chowdhery et al., PaLM, 2022, section 5.
    """
    arrays = as_arrays(inputs, kernel, targets, bias, class_mask, where, weights, z_loss)
    options = Options(class_axis, logit_transform, memory_budget)
    last = arrays.inputs.ndim - 1
    reduced = (last,) if reduction == "none" else range(last + 1)
    run = functools.partial(losses_of, options=options, reduction=reduction)
    return meshes.on_automatic_axes(run, arrays.inputs, reduced, arrays)(arrays)


def linear_softmax_cross_entropy_with_stats(
    inputs: ArrayLike,
    kernel: ArrayLike,
    targets: Targets | LinearTargets,
    *,
    bias: ArrayLike | None = None,
    class_axis: int = -1,
    class_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
    logit_transform: LogitTransform | None = None,
    memory_budget: int | None = None,
) -> tuple[Float[Array, "*batch"], SoftmaxStats]:
    """`linear_softmax_cross_entropy`, one loss per token, with statistics of the logits beside it.

    loss = Σ_v t_v · (lse(z) − z_v);   a z-loss is loss + c · log_normalizer²

    Args:
      inputs: The features of each token, float[..., D].
      kernel: float[D, V], or float[V, D] with class_axis=0.
      targets: Labels int[...], dense float[..., V], SparseTargets, or the LinearTargets of a
        teacher's head, of the batch of inputs.
      bias: float[V].
      class_axis: The axis of the kernel that counts classes: 0, or 1 or −1.
      class_mask: The classes that there are, bool[V].
      where: Tokens to keep, bool[...]; of the others everything is 0.
      logit_transform: An elementwise function of the logits.
      memory_budget: Bytes for temporaries beside the gradients; None takes half a GiB.

    Returns:
      (losses, SoftmaxStats), each of the batch's shape.

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
    arrays = as_arrays(inputs, kernel, targets, bias, class_mask, where)
    options = Options(class_axis, logit_transform, memory_budget, with_stats=True)
    run = functools.partial(losses_and_stats, options=options)
    last = arrays.inputs.ndim - 1
    return meshes.on_automatic_axes(run, arrays.inputs, (last,), arrays)(arrays)


class Call(NamedTuple):
    """A head, and the arrays that it is called with, of one axis of tokens.

    Attributes:
      head: The static side.
      tokens: The arrays [N, ...], in the order in which they are read.
      params: The arrays that tokens share.
      order: The place that each token read has in the batch, int32[N]; None: its own.
      whole_mass: The mass [...], of all devices' classes where it is sparse.
    """

    head: Head
    tokens: "Tokens"
    params: Params
    order: jax.Array | None
    whole_mass: HeadMass

    def with_labels(self) -> "Call":
        """Returns the call with the heaviest class of each token."""
        if isinstance(self.whole_mass, TeacherMass):
            labels = linear_targets.heaviest(self.head, cast(TeacherMass, self.tokens.mass))
        else:
            labels = stats.heaviest(self.whole_mass, self.head.axes)
        tokens = self.tokens._replace(labels=labels.reshape(self.tokens.weights.shape))
        return self._replace(tokens=tokens)

    def with_kept_tokens_first(self) -> "Call":
        """Returns the call with masked tokens last, so that chunks of them are left out.

        Tokens stay where they are if one chunk has all of them, and where dense mass would be
        copied.
        """
        num_tokens, chunk = self.tokens.inputs.shape[0], self.head.plan.tokens
        is_one_chunk = chunk is num_tokens or chunk >= num_tokens
        if is_one_chunk or isinstance(self.tokens.mass, DenseMass):
            return self
        is_masked = ~cast(jax.Array, self.tokens.mask)
        order = jnp.argsort(is_masked, stable=True).astype(jnp.int32)
        tokens = map_examples(lambda x: x.at[order].get(unique_indices=True), self.tokens)
        return self._replace(tokens=tokens, order=order)

    def losses(self) -> tuple[jax.Array, ...]:
        """Returns the arrays of `HeadLosses`, in the order of the batch."""
        inputs, mass, mask, _, labels = self.tokens
        if labels is not None and self.head.axes:
            first = jax.lax.axis_index(self.head.axes) * num_classes_of(self.head, self.params)
            labels = labels - first.astype(jnp.int32)
        out = apply(HeadLosses(self.head), inputs, self.params, mass, mask, labels)
        return tuple(map(self.in_batch, out))

    def in_batch(self, x: jax.Array) -> jax.Array:
        """Returns an array of tokens read, [N], in the order of the batch."""
        return x if self.order is None else x.at[self.order].set(x, unique_indices=True)

    def is_correct(self, predictions: jax.Array) -> jax.Array:
        """Returns whether no class has more mass than the prediction of each token, [...]."""
        if isinstance(self.whole_mass, TeacherMass):
            labels = self.in_batch(cast(jax.Array, self.tokens.labels))
            return labels.reshape(predictions.shape) == predictions
        return stats.is_heaviest(self.whole_mass, predictions, self.head.axes)

    def total(self, coefficients: Coefficients) -> jax.Array:
        """Returns the total of losses and of squared log-normalizers."""
        inputs, mass, mask, *_ = self.tokens
        return apply(HeadTotal(self.head), inputs, self.params, mass, mask, coefficients)


class Tokens(NamedTuple):
    """The arrays that tokens have of their own.

    Attributes:
      inputs: [N, D].
      mass: On this device's classes.
      mask: The tokens kept, bool[N], or None.
      weights: Those of their losses, [N].
      labels: The heaviest class of each, of all devices' classes, or None.
    """

    inputs: jax.Array
    mass: HeadMass
    mask: jax.Array | None
    weights: jax.Array
    labels: jax.Array | None


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
    class_mask: Any
    where: Any
    weights: Any
    z_loss: Any


def as_arrays(
    inputs: Any,
    kernel: Any,
    targets: Any,
    bias: Any,
    class_mask: Any,
    where: Any,
    weights: Any = None,
    z_loss: Any = None,
) -> Arrays:
    """Returns the arguments as arrays, of the right dtypes."""

    def floating(name, x):
        x = checks.as_array(name, x)
        checks.check_floating(name, x)
        return x

    def boolean(name, x):
        x = checks.as_array(name, x, "a bool array")
        checks.check_bool(name, x)
        return x

    def optional(convert, name, x):
        return None if x is None else convert(name, x)

    return Arrays(
        floating("inputs", inputs),
        floating("kernel", kernel),
        linear_targets.as_arrays(targets)
        if isinstance(targets, LinearTargets)
        else arguments.as_arrays(targets),
        optional(floating, "bias", bias),
        optional(boolean, "class_mask", class_mask),
        optional(boolean, "where", where),
        optional(floating, "weights", weights),
        optional(checks.as_nonnegative, "z_loss", z_loss),
    )


def prepare(arrays: Arrays, options: Options) -> Call:
    """Checks shapes and options, all at trace time, and returns the Call that they make."""
    inputs, kernel, targets, bias, class_mask, where, weights, _ = arrays
    class_axis, (batch, num_classes) = linear_targets.checked_shapes(
        "", inputs, kernel, options.class_axis
    )
    for name, x in (("bias", bias), ("class_mask", class_mask)):
        if x is not None:
            checks.check_shape(name, x, (num_classes,), "the classes of kernel")
    for name, x in (("where", where), ("weights", weights)):
        if x is not None:
            checks.check_shape(name, x, batch, "the batch of inputs")
    dtype = wide_dtype(inputs.dtype, kernel.dtype)
    _check_values(inputs, kernel, bias, where, weights)
    mask = _mask_of_tokens(where, class_mask, batch, options.axes)
    shape = (*batch, num_classes)
    if isinstance(targets, LinearTargets):
        mass = whole_mass = linear_targets.as_mass(targets, shape, dtype, mask, class_mask)
    else:
        whole_mass = arguments.as_mass(targets, shape, dtype, mask, mesh_axes=options.axes)
        mass = arguments.on_shard(whole_mass, num_classes, options.axes)
    w = jnp.ones(batch, dtype) if weights is None else weights.astype(dtype)
    tokens = Tokens(masked(inputs, where), mass, mask, masked(w, mask), None)
    num_tokens, features = math.prod(batch), inputs.shape[-1]
    tokens = map_examples(lambda x: x.reshape(num_tokens, *x.shape[len(batch) :]), tokens)

    # In a shard_map, arrays that meet in a loop must vary over the same devices.
    over = meshes.varying_axes((tokens, kernel, bias, class_mask))
    transform, constants, over = converted(options.logit_transform, dtype, over)
    kernel, bias, class_mask = meshes.varying((kernel, bias, class_mask), over)
    params = Params(kernel, bias, class_mask, constants)
    inputs, mass = meshes.varying((tokens.inputs, tokens.mass), over)
    mask, w = meshes.varying((tokens.mask, tokens.weights), over.difference(options.axes))
    tokens = Tokens(inputs, mass, mask, w, None)
    sizes = Sizes(num_tokens, features, num_classes, dtype.itemsize)
    if isinstance(targets, LinearTargets):
        sizes = sizes._replace(teacher_features=targets.inputs.shape[-1])
    plans = _plans(sizes._replace(may_skip=where is not None), options)
    head = Head(class_axis, transform, plans[0], options.axes, options.with_stats, plans[1])
    call = Call(head, tokens, params, None, whole_mass)
    if options.with_stats:
        call = call.with_labels()
    return call if where is None else call.with_kept_tokens_first()


def _plans(sizes, options):
    """Returns the plans of a head: on one CPU, and on everything else where it differs."""
    if options.plan is not None:
        return options.plan, None
    budget = options.memory_budget
    expected = f"memory_budget: expected an integer number of bytes or None, got {budget!r}"
    checks.check(budget is None or checks.is_int(budget), expected, TypeError)
    checks.check(budget is None or budget >= 0, expected)
    shards = jax.lax.axis_size(options.axes) if options.axes else 1
    plan = make_plan(sizes, budget, shards)
    if budget is not None or not plan.keeps_logits:
        return plan, None
    return plan, make_plan(sizes, None, shards, ACCELERATOR)


def _mask_of_tokens(where, class_mask, batch, axes):
    """Returns the tokens kept, bool[...], or None: none is where no class is left."""
    if class_mask is None:
        return where
    is_left = class_mask.any()
    if axes:
        is_left = jax.lax.pmax(is_left.astype(jnp.int32), axes) > 0
    is_left = jnp.broadcast_to(is_left, batch)
    return is_left if where is None else where & is_left


def _check_values(inputs, kernel, bias, where, weights):
    """Under `value_checks`, checks that logits can be made without NaN, and weights are ≥ 0."""
    value_checks.check_not_nan("inputs", inputs, where)
    value_checks.check_not_nan("kernel", kernel)
    if bias is not None:
        value_checks.check_not_nan("bias", bias)
    if weights is not None:
        value_checks.check_masses("weights", weights, where)


def losses_of(arrays: Arrays, options: Options, reduction: str) -> Float[Array, "*batch"]:
    """Returns the losses of a head, weighted and reduced."""
    checks.check(
        reduction in ("mean", "sum", "none"),
        f'reduction: expected "mean", "sum" or "none", got {reduction!r}',
    )
    call = prepare(arrays, options)
    weights, z_loss = call.tokens.weights, arrays.z_loss
    z_loss = None if z_loss is None else z_loss.astype(weights.dtype)
    if reduction == "none":
        losses, log_normalizers = call.losses()
        if z_loss is not None:
            losses = losses + z_loss * log_normalizers**2
        return times(call.in_batch(weights), losses).reshape(arrays.inputs.shape[:-1])
    if reduction == "mean":
        weight = weights.sum()
        weights = weights * jnp.where(weight == 0, 0, 1 / jnp.where(weight == 0, 1, weight))
    return call.total(Coefficients(weights, None if z_loss is None else z_loss * weights))


def losses_and_stats(
    arrays: Arrays, options: Options
) -> tuple[Float[Array, "*batch"], SoftmaxStats]:
    """Returns (losses, SoftmaxStats) of a head."""
    call = prepare(arrays, options)
    batch = arrays.inputs.shape[:-1]
    losses, log_normalizer, entropy, prediction, surprisal = (
        x.reshape(batch) for x in call.losses()
    )
    prediction = prediction.astype(jnp.int32)
    told = SoftmaxStats(
        log_normalizer,
        prediction,
        call.is_correct(prediction),
        entropy,
        stats.known_log_probability(losses, surprisal),
    )
    mask = _mask_of_tokens(arrays.where, arrays.class_mask, batch, options.axes)
    return losses, masked(told, mask)
