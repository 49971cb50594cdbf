"""The two ways from inputs and kernel to losses and gradients without [N, V] logits.

    z = transform(inputs @ kernel + bias),   loss(z, t) as in `_blocks`

* Kept: over chunks of tokens, the logits of one chunk are made block by block, kept until its
  log-normalizer is known, and turned into gradients at once, in the forward pass. Three matmuls.
  It needs every loss's cotangent beforehand, which a sum over tokens gives, and a float32
  accumulator of the kernel's gradient.
* Recomputed: over blocks of the vocabulary, once forward for the log-normalizers, and once more
  backward for the gradients. Four matmuls. It gives one loss per token, serves any cotangent, and
  each block of the kernel's gradient is written once.

Either way the classes may be one of several shards, each on a device of its own. What their blocks
tell is then merged over devices before it is used, and the gradients of what the devices share are
summed over them after.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xentjax._jax import mesh as _mesh
from xentjax._jax.custom_vjp import custom_vjp
from xentjax._softmax import choice as _platform
from xentjax._softmax import partial as _blocks
from xentjax._softmax import rows as _rows
from xentjax._softmax.partial import Block, wide_dtype
from xentjax._targets import mass as _masses
from xentjax._targets.types import SparseTargets


@dataclasses.dataclass(frozen=True)
class Head:
    """What is static about a head: its layout, and how much of it is in memory at once."""

    class_axis: int  # The axis of the kernel that counts classes.
    transform: Callable[..., jax.Array]  # (raw logits, *constants) -> logits, elementwise.
    tokens: int  # Tokens in a chunk.
    classes: int  # Classes in a block.
    keeps_logits: bool  # Whether there is memory for the way that keeps them.
    axes: tuple[Hashable, ...] = ()  # Mesh axes that the classes are split over.
    with_stats: bool = False


class Params(NamedTuple):
    """What makes logits of inputs, or the cotangents of these (None where not asked for)."""

    kernel: Any
    bias: Any
    constants: Any  # A list: what the transform closes over.


def make_losses(head: Head) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns (inputs [N, D], Params, targets, mask) -> four arrays [N].

    They are losses and log-normalizers; then, if stats are asked for, predictions (as floats, exact
    below 2²⁴ classes) and surprisals of the heaviest target class, which have no derivative.
    """
    return _rule(head, _losses_fwd, _losses_bwd)


def make_total(head: Head) -> Callable[..., jax.Array]:
    """Returns (inputs, Params, targets, mask, coefficients [N]) -> Σ_n coefficients_n · loss_n."""
    return _rule(head, _total_fwd, _total_bwd)


def _rule(head, fwd, bwd):
    fwd, bwd = functools.partial(fwd, head), functools.partial(bwd, head)
    return custom_vjp(lambda *args: fwd(jax.tree.map(lambda _: False, args), *args)[0], fwd, bwd)


def _merged_over_devices(head, block):
    """Returns the Block of the classes of all shards."""
    return _blocks.merge_over(block, head.axes) if head.axes else block


# Recomputed: one loss per token.


def _losses_fwd(head, live, inputs, params, targets, mask):
    del live
    num_tokens, num_classes = inputs.shape[0], params.kernel.shape[head.class_axis]

    def on_tokens(first, length, out):
        x, t, keep = _masses.rows_of((inputs, targets, mask), first, length)

        def on_classes(start, size, carry):
            block, stats = carry
            p, t_block = _of_classes(head, params, t, keep, start, size)
            logits = head.transform(_raw_logits(head, x, p), *p.constants)
            new = _platform.block_of(logits, t_block)
            if head.with_stats:
                stats = _merge_stats(head, stats, params, logits, t, start)
            return _blocks.merge(block, new), stats

        return _put(
            out,
            _for_each(num_classes, head.classes, on_classes, _no_classes(head, x, params)),
            first,
        )

    block, stats = _for_each(num_tokens, head.tokens, on_tokens, _no_classes(head, inputs, params))
    block = _merged_over_devices(head, block)
    stats = (stats.prediction, stats.label.loss) if head.with_stats else (None, None)
    out = (block.loss, block.log_normalizer, *jax.lax.stop_gradient(stats))
    return out, (inputs, params, targets, mask, block)


class _Stats(NamedTuple):
    """What is known of the classes so far, beside their Block."""

    largest: jax.Array  # The largest logit, and whose it is.
    prediction: jax.Array  # As a float: exact below 2²⁴ classes.
    label: Block  # Under the target that is the heaviest class alone.


def _merge_stats(head, stats, params, logits, targets, start):
    """Returns the stats of the classes so far and of those of logits."""
    num_classes = params.kernel.shape[head.class_axis]
    heaviest = _masses.heaviest_class(targets, num_classes)[:, None]
    label = SparseTargets(heaviest, jnp.ones(heaviest.shape, logits.dtype))
    label = _masses.targets_of_block(label, start, logits.shape[-1], num_classes)
    largest = logits.max(-1)
    best = (start + jnp.argmax(logits, axis=-1)).astype(largest.dtype)
    prediction = jnp.where(largest > stats.largest, best, stats.prediction)
    largest = jnp.maximum(largest, stats.largest)
    return _Stats(
        largest, prediction, _blocks.merge(stats.label, _platform.block_of(logits, label))
    )


def _losses_bwd(head, live, residuals, cotangent, times=1):
    """Returns the cotangents of the arguments, for `times` the cotangent of the losses."""
    inputs, params, targets, mask, block = residuals
    num_tokens, num_classes = inputs.shape[0], params.kernel.shape[head.class_axis]
    live_inputs, live_params, live_targets, _ = live

    def on_classes(start, size, carry):
        sum_inputs, all_params = carry
        p_block = _params_of_classes(head, params, start, size)

        def on_tokens(first, length, carry):
            sum_inputs, sum_params = carry
            rows = (inputs, targets, mask, block, cotangent[:2])
            x, t, keep, b, ct = _masses.rows_of(rows, first, length)
            p, t_block = _of_classes(head, params, t, keep, start, size)
            dx, dp = _pull_back(head, live, x, p, _raw_logits(head, x, p), b, t_block, ct)
            return _add(sum_inputs, dx, first), jax.tree.map(jnp.add, sum_params, dp)

        zeros = _zeros_of(live_params, p_block)
        carry = _for_each(num_tokens, head.tokens, on_tokens, (sum_inputs, zeros))
        sum_inputs, of_block = carry
        of_block = jax.tree.map(lambda ct: times * ct, of_block)
        return sum_inputs, Params(
            kernel=_put(all_params.kernel, of_block.kernel, start, head.class_axis),
            bias=_put(all_params.bias, of_block.bias, start),
            constants=jax.tree.map(jnp.add, all_params.constants, of_block.constants),
        )

    carry = _zeros_of(live_inputs, inputs), _zeros_of(live_params, params, own=True)
    inputs_cotangent, params_cotangent = carry
    if any(jax.tree.leaves((live_inputs, live_params))):
        sum_inputs, of_params = _for_each(num_classes, head.classes, on_classes, carry)
        of_inputs = jax.tree.map(lambda ct: times * ct, sum_inputs)
        inputs_cotangent, params_cotangent = _cast_like((of_inputs, of_params), (inputs, params))
    targets_cotangent = None
    if any(jax.tree.leaves(live_targets)):
        own = _mesh.varying(times * cotangent[0], head.axes)
        losses = functools.partial(_losses_given_block, head, inputs, params, mask, block)
        (targets_cotangent,) = jax.vjp(losses, targets)[1](own)
    return inputs_cotangent, params_cotangent, targets_cotangent, None


def _losses_given_block(head, inputs, params, mask, block, targets):
    """Returns what this device's classes add to the losses, the Block of all classes being known.

    It is linear in targets, and no rule of ours stands between it and its derivatives.
    """
    num_tokens, num_classes = inputs.shape[0], params.kernel.shape[head.class_axis]

    def on_tokens(first, length, losses):
        x, t, keep, b = _masses.rows_of((inputs, targets, mask, block), first, length)

        def on_classes(start, size, total):
            p, t_block = _of_classes(head, params, t, keep, start, size)
            logits = head.transform(_raw_logits(head, x, p), *p.constants)
            return total + b.expected_surprisal(logits, t_block)

        zeros = _zeros((length,), b.m.dtype, x)
        return _put(losses, _for_each(num_classes, head.classes, on_classes, zeros), first)

    zeros = _zeros((num_tokens,), block.m.dtype, inputs)
    return _for_each(num_tokens, head.tokens, on_tokens, zeros)


# Kept: a sum over tokens.


def _keeps_logits(head, live):
    """Returns whether gradients are made in the forward pass: some of inputs, kernel and bias."""
    live_inputs, live_params, live_targets, _, _ = live
    others = jax.tree.leaves((live_params.constants, live_targets))
    wanted = (live_inputs, live_params.kernel, live_params.bias)
    return head.keeps_logits and not any(others) and any(jax.tree.leaves(wanted))


def _total_fwd(head, live, inputs, params, targets, mask, coefficients):
    args = (inputs, params, targets, mask)
    if not _keeps_logits(head, live):
        (losses, *_), residuals = _losses_fwd(head, live[:4], *args)
        return jnp.sum(_masses.times_mass(coefficients, losses)), (residuals, losses, coefficients)
    scale = _scale_of(coefficients)
    losses, cotangents = _losses_and_cotangents(head, live, *args, coefficients / scale)
    total = jnp.sum(_masses.times_mass(coefficients, losses))
    return total, ((cotangents, scale, params), losses, coefficients)


def _total_bwd(head, live, residuals, cotangent):
    residuals, losses, coefficients = residuals
    if _keeps_logits(head, live):
        unscaled, scale, params = residuals
        of_args = jax.tree.map(lambda ct: (cotangent * scale) * ct, unscaled)
        of_args = _cast_like(of_args, (unscaled[0], params))
        return (*of_args, None, None, cotangent * losses)
    inputs, params, *_ = residuals
    dtype = jnp.promote_types(inputs.dtype, params.kernel.dtype)
    each, times = cotangent * coefficients, 1
    # What the transform closes over has its gradient summed over devices in the loop: as it is.
    if dtype == jnp.float16 and not any(live[1].constants):
        scale = _scale_of(coefficients)
        each, times = coefficients / scale, cotangent * scale
    of_args = _losses_bwd(head, live[:4], residuals, (each, jnp.zeros_like(each)), times)
    return (*of_args, cotangent * losses)


def _scale_of(coefficients):
    """Returns what to divide coefficients by, and to multiply gradients with at the end.

    In float16, the logits' gradients underflow if they are divided by the number of tokens.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(coefficients), initial=0))
    return jnp.where(largest == 0, 1, largest) / _LARGEST


_LARGEST = 64  # Of the coefficients then: below that of float16, 65504, by a mass of a thousand.


def _losses_and_cotangents(head, live, inputs, params, targets, mask, coefficients):
    """Returns (losses [N], cotangents of (inputs, params) of Σ_n coefficients_n · loss_n)."""
    num_tokens, num_classes = inputs.shape[0], params.kernel.shape[head.class_axis]
    live_inputs, live_params = live[:2]

    def on_tokens(first, length, carry):
        losses, all_inputs, sum_params = carry
        x, t, keep, c = _masses.rows_of((inputs, targets, mask, coefficients), first, length)

        def make_logits(start, size, carry):
            kept, block = carry
            p, t_block = _of_classes(head, params, t, keep, start, size)
            raw = _raw_logits(head, x, p)
            new = _platform.block_of(head.transform(raw, *p.constants), t_block)
            return _put(kept, raw, start, 1), _blocks.merge(block, new)

        dtype = wide_dtype(params.kernel.dtype, inputs.dtype)
        kept = _zeros((length, num_classes), dtype, x)
        carry = (kept, _no_classes(head, x, params)[0])
        kept, block = _for_each(num_classes, head.classes, make_logits, carry)
        block = _merged_over_devices(head, block)

        def use_logits(start, size, carry):
            sum_inputs, sum_params = carry
            p, t_block = _of_classes(head, params, t, keep, start, size)
            raw = jax.lax.dynamic_slice_in_dim(kept, start, size, 1)
            ct = (c, jnp.zeros_like(c))
            dx, dp = _pull_back(head, live, x, p, raw, block, t_block, ct)
            return jax.tree.map(jnp.add, sum_inputs, dx), Params(
                kernel=_add(sum_params.kernel, dp.kernel, start, head.class_axis),
                bias=_add(sum_params.bias, dp.bias, start),
                constants=sum_params.constants,  # None, each: else the logits are not kept.
            )

        carry = (_zeros_of(live_inputs, x), sum_params)
        dx, sum_params = _for_each(num_classes, head.classes, use_logits, carry)
        return _put(losses, block.loss, first), _put(all_inputs, dx, first), sum_params

    dtype = wide_dtype(params.kernel.dtype, inputs.dtype)
    losses = _zeros(inputs.shape[:1], dtype, coefficients)
    sum_params = _zeros_of(live_params, params)
    carry = (losses, _zeros_of(live_inputs, inputs, own=True), sum_params)
    losses, *cotangents = _for_each(num_tokens, head.tokens, on_tokens, carry)
    return losses, tuple(cotangents)


# What both are made of.


def _raw_logits(head, inputs, params):
    """Returns inputs @ kernel + bias, summed in float32."""
    raw = _dot(inputs, params.kernel, 1, 1 - head.class_axis)
    return raw if params.bias is None else raw + params.bias.astype(raw.dtype)


def _pull_back(head, live, inputs, params, raw, block, targets, cotangent):
    """Returns the cotangents of (inputs, params) by the classes of one block, in float32.

    `raw` are the block's logits before the transform, `block` is of all classes, and `cotangent`
    that of (losses, log-normalizers).
    """
    live_inputs, live_params = live[:2]
    logits, transpose = jax.vjp(head.transform, raw, *params.constants)
    raw_cotangent, *constants = transpose(
        _platform.logits_cotangent(block, logits, targets, *cotangent)
    )
    dtype = jnp.promote_types(inputs.dtype, params.kernel.dtype)
    operand = raw_cotangent.astype(dtype)
    pair = (operand, inputs) if head.class_axis == 0 else (inputs, operand)
    dx = _dot(operand, params.kernel, 1, head.class_axis) if live_inputs else None
    return dx, Params(
        kernel=_dot(*pair, 0, 0) if live_params.kernel else None,
        bias=raw_cotangent.sum(0) if live_params.bias else None,
        constants=[
            c if wanted else None
            for c, wanted in zip(constants, live_params.constants, strict=True)
        ],
    )


def _dot(a, b, a_axis, b_axis):
    """Contracts two matrices: operands in their common dtype, the sum in float32 at least."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), axes, preferred_element_type=wide_dtype(dtype)
    )


def _of_classes(head, params, targets, mask, start, size):
    """Returns (params, targets) of classes [start, start + size), targets ready for arithmetic."""
    num_classes = params.kernel.shape[head.class_axis]
    targets = _masses.targets_of_block(targets, start, size, num_classes)
    dtype = wide_dtype(params.kernel.dtype)
    return _params_of_classes(head, params, start, size), _masses.kept(targets, mask, dtype)


def _params_of_classes(head, params, start, size):
    """Returns the params of classes [start, start + size)."""
    kernel, bias = params.kernel, params.bias
    if size < kernel.shape[head.class_axis]:
        kernel = _rows.slice_unconverted(kernel, start, size, head.class_axis)
        bias = bias if bias is None else jax.lax.dynamic_slice_in_dim(bias, start, size, 0)
    return Params(kernel, bias, params.constants)


def _for_each(size: int, chunk: int, body: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """Returns carry after carry = body(start, length, carry) along [0, size), `chunk` at a time.

    A shorter piece is a body of its own: nothing is padded, so nothing has to be masked. It is the
    first, because what a loop leaves behind XLA would copy before changing it further.
    """
    count, remainder = divmod(size, chunk)
    if remainder:
        carry = body(0, remainder, carry)
    full = jax.checkpoint(lambda carry, start: (body(start, chunk, carry), None))
    if count == 1:
        carry, _ = full(carry, remainder)
    elif count > 1:
        carry, _ = jax.lax.scan(full, carry, remainder + jnp.arange(count) * chunk)
    return carry


def _put(tree: Any, parts: Any, start: Any, axis: int = 0) -> Any:
    """Returns `tree` with `parts`, cast to its dtypes, at `start` of `axis` of every array."""

    def put(x, part):
        return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis)

    return jax.tree.map(put, tree, parts)


def _add(total: Any, part: Any, start: Any, axis: int = 0) -> Any:
    """Returns `total` with `part` added at `start` of `axis`; None stays None."""
    if total is None:
        return None
    here = jax.lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
    return _put(total, here + part, start, axis)


def _zeros(shape: Sequence[int], dtype: Any, like: jax.Array) -> jax.Array:
    """Returns zeros that vary over the mesh axes `like` varies over, as a loop's carry must."""
    zero = jnp.where(False, like.ravel()[:1].sum(), 0).astype(dtype)
    return jnp.broadcast_to(zero, shape)


def _zeros_of(live: Any, tree: Any, own: bool = False) -> Any:
    """Returns zeros for the live arrays of `tree`, in float32 or in their own dtype; else None."""

    def zeros(wanted, x):
        return _zeros(x.shape, x.dtype if own else wide_dtype(x.dtype), x) if wanted else None

    return jax.tree.map(zeros, live, tree)


def _no_classes(head: Head, inputs: jax.Array, params: Params) -> tuple[Block, _Stats | None]:
    """Returns the Block of no classes at all, for each of the inputs, and the stats if wanted."""
    dtype = wide_dtype(inputs.dtype, params.kernel.dtype)
    zeros = _zeros(inputs.shape[:1], dtype, inputs)
    nothing = zeros - jnp.inf
    block = Block(zeros, nothing, zeros, zeros, zeros, zeros)
    return block, _Stats(nothing, zeros, block) if head.with_stats else None


def _cast_like(tree: Any, like: Any) -> Any:
    """Returns the arrays of `tree` in the dtypes of those of `like`; None stays None."""

    def cast(x, y):
        return None if x is None else x.astype(y.dtype)

    return jax.tree.map(cast, tree, like, is_leaf=lambda x: x is None)
