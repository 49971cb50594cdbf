"""The parts that both ways of the fused head share: logits of a block, and their pull-back."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xentjax._jax.dtypes import wide_dtype
from xentjax._jax.rule import Backend
from xentjax._softmax import partial, passes
from xentjax._softmax.head_plan import HeadPlan
from xentjax._softmax.partial import PartialSoftmax
from xentjax._targets.mass import Mass, map_examples


@dataclasses.dataclass(frozen=True)
class Head:
    """The static side of a head.

    Attributes:
      class_axis: The axis of the kernel that counts classes.
      transform: (raw logits, *constants) -> logits, elementwise.
      plan: How much of it is in memory at once, on one CPU.
      accelerator_plan: The same on everything else; None is the plan.
      axes: Mesh axes that the classes are split over.
      with_stats: Whether entropies, predictions and the labels' surprisals are asked for.
    """

    class_axis: int
    transform: Callable[..., jax.Array]
    plan: HeadPlan
    axes: tuple[Hashable, ...] = ()
    with_stats: bool = False
    accelerator_plan: HeadPlan | None = None

    def on(self, backend: Backend) -> "Head":
        """Returns the head with the plan of a platform."""
        if backend == "cpu" or self.accelerator_plan is None:
            return self
        return dataclasses.replace(self, plan=self.accelerator_plan)


class Params(NamedTuple):
    """The arrays of a head, and trees like it.

    Attributes:
      kernel: [D, V], or [V, D].
      bias: [V], or None.
      class_mask: bool[V], or None: the classes that there are.
      constants: Those of the logit transform.
    """

    kernel: Any
    bias: Any
    class_mask: Any
    constants: Any


def num_classes_of(head: Head, params: Params) -> int:
    """Returns how many classes the kernel has, on this device."""
    return params.kernel.shape[head.class_axis]


def raw_logits(head: Head, inputs: jax.Array, params: Params) -> jax.Array:
    """Returns inputs @ kernel + bias, summed in float32 at least."""
    raw = _dot(inputs, params.kernel, 1, 1 - head.class_axis)
    return raw if params.bias is None else raw + params.bias.astype(raw.dtype)[None]


def logits_of(head: Head, inputs: jax.Array, params: Params) -> jax.Array:
    """Returns the logits of some tokens and classes."""
    return transformed(head, raw_logits(head, inputs, params), params)


def transformed(head: Head, raw: jax.Array, params: Params) -> jax.Array:
    """Returns the logits of raw ones: a class that is ruled out has −inf.

    A class is ruled out by the class mask, or by a raw logit of −inf. No derivative is taken there:
    that of z / tau to tau would be infinite.
    """
    is_out = None if head.transform is identity else raw == -jnp.inf
    if params.class_mask is not None:
        is_masked = ~params.class_mask[None]
        is_out = jnp.broadcast_to(is_masked, raw.shape) if is_out is None else is_out | is_masked
    if is_out is None:
        return raw
    logits = head.transform(jnp.where(is_out, jnp.zeros_like(raw), raw), *params.constants)
    return jnp.where(is_out, jnp.full_like(logits, -jnp.inf), logits)


def identity(logits: jax.Array) -> jax.Array:
    """Returns the logits as they are: the transform of a head that has none."""
    return logits


def over_devices(head: Head, part: PartialSoftmax) -> PartialSoftmax:
    """Returns the PartialSoftmax of the classes of all devices."""
    return partial.merge_over(part, head.axes) if head.axes else part


class TokenGradient(NamedTuple):
    """The numbers that the gradient of some tokens is made from.

    Attributes:
      whole: The PartialSoftmax of all classes.
      loss_cotangent: [N].
      lse_cotangent: [N].
      entropy_cotangent: [N], or None.
    """

    whole: PartialSoftmax
    loss_cotangent: jax.Array
    lse_cotangent: jax.Array
    entropy_cotangent: jax.Array | None = None

    def of_logits(self, logits: jax.Array, mass: Mass, backend: Backend) -> jax.Array:
        """Returns the cotangent of the logits of some classes, under the mass on them."""
        cotangents = self.loss_cotangent, self.lse_cotangent
        entries = passes.gradient(self.whole, logits, mass, *cotangents, backend, False)
        if self.entropy_cotangent is None:
            return entries
        return entries + partial.entropy_gradient(self.whole, logits, self.entropy_cotangent)


def pull_back(
    head: Head,
    needs_grad: tuple[Any, ...],
    inputs: jax.Array,
    params: Params,
    raw: jax.Array,
    mass: Mass,
    tokens: TokenGradient,
    backend: Backend,
) -> tuple[jax.Array | None, Params]:
    """Returns the cotangents of (inputs, params) by the classes of one block, in float32.

    `raw` are the block's logits before the transform; `params` and `mass` are those of the block.
    """
    needs_inputs, needs_params = needs_grad[:2]

    def logits_of_raw(raw, constants):
        return transformed(head, raw, params._replace(constants=constants))

    logits, transpose = jax.vjp(logits_of_raw, raw, params.constants)
    raw_cotangent, constants = transpose(tokens.of_logits(logits, mass, backend))
    dtype = jnp.promote_types(inputs.dtype, params.kernel.dtype)
    operand = raw_cotangent.astype(dtype)
    pair = (operand, inputs) if head.class_axis == 0 else (inputs, operand)
    dx = _dot(operand, params.kernel, 1, head.class_axis) if needs_inputs else None
    needed = zip(constants, needs_params.constants, strict=True)
    return dx, Params(
        kernel=_dot(*pair, 0, 0) if needs_params.kernel else None,
        bias=raw_cotangent.sum(0) if needs_params.bias else None,
        class_mask=None,
        constants=[c if needs else None for c, needs in needed],
    )


def _dot(a, b, a_axis, b_axis):
    """Contracts two matrices: operands in their common dtype, the sum in float32 at least."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), axes, preferred_element_type=wide_dtype(dtype)
    )


def classes_of(head: Head, params: Params, start: Any, size: int) -> Params:
    """Returns the params of the classes [start, start + size)."""
    if size == num_classes_of(head, params):
        return params

    def cut(x):
        return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, 0)

    return params._replace(
        kernel=_slice_unconverted(params.kernel, start, size, head.class_axis),
        bias=cut(params.bias),
        class_mask=cut(params.class_mask),
    )


def _slice_unconverted(x, start, size, axis):
    """Returns [start, start + size) of an axis of x, for a loop that slices nothing else of x.

    Bits are sliced and not numbers where x is narrow: the CPU compiler (jaxlib 0.10.2) computes in
    float32, and would convert all of x before the loop, but it moves no conversion past this.
    """
    if x.dtype == wide_dtype(x.dtype):
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis)
    x, start = jax.lax.optimization_barrier((x, start))
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.dynamic_slice_in_dim(bits, start, size, axis)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def tokens_of(tree: Any, first: Any, length: int) -> Any:
    """Returns tokens [first, first + length) of the arrays and masses of a tree."""

    def cut(x):
        return x if x.shape[0] == length else jax.lax.dynamic_slice_in_dim(x, first, length, 0)

    return map_examples(cut, tree)


def for_each(
    size: int,
    chunk: int,
    body: Callable[[Any, int, Any], Any],
    carry: Any,
    end: jax.Array | None = None,
) -> Any:
    """Returns carry after carry = body(start, length, carry) along [0, size), `chunk` at a time.

    A shorter piece is a body of its own: nothing is padded, so nothing has to be masked. It is the
    first, because XLA would copy the arrays that a loop leaves behind before it changes them again.
    Pieces that start at `end` or after it may be left out, where nothing is differentiated.
    """
    if chunk is size:  # All at once; the size may be known by name alone.
        count, remainder = 1, 0
    elif size == 0:
        return carry
    else:
        count, remainder = divmod(size, chunk)
    if remainder:
        carry = body(0, remainder, carry)
    if end is not None and count > 1:
        rounds = jnp.clip(-((remainder - end) // chunk), 0, count)
        return jax.lax.fori_loop(
            0, rounds, lambda i, carry: body(remainder + i * chunk, chunk, carry), carry
        )
    full = jax.checkpoint(lambda carry, start: (body(start, chunk, carry), None))
    if count == 1:
        carry, _ = full(carry, remainder)
    elif count > 1:
        carry, _ = jax.lax.scan(full, carry, remainder + jnp.arange(count, dtype=jnp.int32) * chunk)
    return carry


def end_of(mask: jax.Array | None) -> jax.Array | None:
    """Returns the place after the last token kept, int32; None where there is no mask."""
    if mask is None:
        return None
    places = jnp.arange(1, mask.shape[0] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(mask, places, jnp.zeros_like(places)), initial=0)


def put(tree: Any, parts: Any, start: Any, axis: int = 0) -> Any:
    """Returns `tree` with `parts`, cast to its dtypes, at `start` of `axis` of every array."""

    def put_one(x, part):
        return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis)

    return jax.tree.map(put_one, tree, parts)


def add(total: Any, part: Any, start: Any, axis: int = 0) -> Any:
    """Returns `total` with `part` added at `start` of `axis`; None stays None."""
    if total is None:
        return None
    here = jax.lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
    return put(total, here + part, start, axis)


def zeros(shape: Sequence[int], dtype: Any, like: jax.Array) -> jax.Array:
    """Returns zeros that vary over the mesh axes `like` varies over, as a loop's carry must."""
    one = like.ravel()[:1].sum()
    return jnp.broadcast_to(jnp.where(False, one, jnp.zeros_like(one)).astype(dtype), shape)


def zeros_of(needs_grad: Any, tree: Any, own: bool = False) -> Any:
    """Returns zeros for the arrays of `tree` that need a gradient, in float32 or as they are."""

    def zeros_like(needs, x):
        return zeros(x.shape, x.dtype if own else wide_dtype(x.dtype), x) if needs else None

    return jax.tree.map(zeros_like, needs_grad, tree)


def arithmetic_dtype(inputs: jax.Array, params: Params) -> jnp.dtype:
    """Returns the dtype of the losses."""
    return wide_dtype(inputs.dtype, params.kernel.dtype)
