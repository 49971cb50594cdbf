"""The fused head that recomputes logits: one loss per token, in the least memory.

Blocks of the vocabulary are made once forward, for the log-normalizers, and once more backward, for
the gradients: four matmuls. It serves any cotangent, and writes each block of the kernel's gradient
once.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xentjax._jax import mesh as meshes
from xentjax._jax.rule import Backend, Rule
from xentjax._softmax import head_blocks as blocks
from xentjax._softmax import partial, plan
from xentjax._softmax.cross_entropy import masked
from xentjax._softmax.head_blocks import Head, Params, TokenGradient
from xentjax._softmax.partial import PartialSoftmax
from xentjax._targets.mass import Mass, label_mass


@dataclasses.dataclass(frozen=True)
class HeadLosses(Rule):
    """(inputs [N, D], Params, mass, mask or None) -> arrays [N].

    They are losses and log-normalizers; then, if stats are asked for, predictions (as floats, exact
    below 2²⁴ classes) and the surprisals of the heaviest target class, which have no derivative.
    """

    head: Head

    def reference(self, inputs, params, mass, mask):
        out = blocks.reference(self.head, inputs, params, mass)
        if self.head.with_stats:
            out = (*out, jnp.zeros_like(out[0]), jnp.zeros_like(out[0]))
        return masked(out, mask)

    def forward(self, backend, needs_grad, inputs, params, mass, mask):
        with_gradient = any(jax.tree.leaves(needs_grad))
        whole, stats = summarise(self.head, inputs, params, mass, with_gradient, backend)
        out = whole.loss, whole.log_normalizer
        if stats is not None:
            out = (*out, stats.prediction, stats.label.loss)
        return masked(out, mask), whole

    def backward(self, backend, needs_grad, args, summary, cotangents):
        inputs, params, mass, mask = args
        tokens = TokenGradient(summary, *masked(cotangents[:2], mask))
        answer = gradients(self.head, needs_grad, (inputs, params, mass), tokens, backend)
        return *answer, mask


class _Stats(NamedTuple):
    """Facts of the classes so far, beside their PartialSoftmax.

    Attributes:
      largest: The largest logit.
      prediction: Its class, as a float.
      label: The PartialSoftmax under the target that is the heaviest class alone.
    """

    largest: jax.Array
    prediction: jax.Array
    label: PartialSoftmax


def summarise(
    head: Head,
    inputs: jax.Array,
    params: Params,
    mass: Mass,
    with_gradient: bool,
    backend: Backend,
) -> tuple[PartialSoftmax, _Stats | None]:
    """Returns the PartialSoftmax of every token over all classes, and stats if asked for."""
    num_classes = blocks.num_classes_of(head, params)

    def on_tokens(first, length, out):
        x, t = blocks.tokens_of((inputs, mass), first, length)

        def on_classes(start, size, carry):
            whole, stats = carry
            p = blocks.classes_of(head, params, start, size)
            raw, t_block = blocks.raw_logits(head, x, p), t.block(start, size)
            new = blocks.summary_of_block(head, raw, p, t_block, with_gradient, backend)
            if stats is not None:
                logits = blocks.transformed(head, raw, p.constants)
                stats = _merge_stats(stats, logits, t, start, num_classes, backend)
            return partial.merge(whole, new), stats

        nothing = _no_classes(head, x, params, with_gradient)
        return blocks.put(
            out, blocks.for_each(num_classes, head.plan.classes, on_classes, nothing), first
        )

    nothing = _no_classes(head, inputs, params, with_gradient)
    whole, stats = blocks.for_each(inputs.shape[0], head.plan.tokens, on_tokens, nothing)
    return blocks.over_devices(head, whole), stats


def _no_classes(head, inputs, params, with_gradient):
    dtype = blocks.arithmetic_dtype(inputs, params)
    like = blocks.zeros(inputs.shape[:1], dtype, inputs)
    if not head.with_stats:
        return partial.no_classes(like, with_gradient), None
    stats = _Stats(like - jnp.inf, like, partial.no_classes(like, with_gradient=False))
    return partial.no_classes(like, with_gradient), stats


def _merge_stats(stats, logits, mass, start, num_classes, backend):
    """Returns the stats of the classes so far and of those of logits."""
    label = label_mass(mass.heaviest(), num_classes, logits.dtype).block(start, logits.shape[-1])
    largest = logits.max(-1)
    best = (start + jnp.argmax(logits, axis=-1)).astype(largest.dtype)
    new = plan.summarise(logits, label, False, backend)
    return _Stats(
        jnp.maximum(largest, stats.largest),
        jnp.where(largest > stats.largest, best, stats.prediction),
        partial.merge(stats.label, new),
    )


def gradients(
    head: Head,
    needs_grad: tuple[Any, ...],
    args: tuple[jax.Array, Params, Mass],
    tokens: TokenGradient,
    backend: Backend,
    scale: jax.Array | None = None,
) -> tuple[Any, Params, Any]:
    """Returns the cotangents of (inputs, params, mass), `scale` times as large if it is given."""
    inputs, params, mass = args
    needs_inputs, needs_params, needs_mass = needs_grad[:3]
    num_tokens, num_classes = inputs.shape[0], blocks.num_classes_of(head, params)

    def scaled(tree):
        return tree if scale is None else jax.tree.map(lambda ct: scale * ct, tree)

    def on_classes(start, size, carry):
        sum_inputs, all_params = carry
        p_block = blocks.classes_of(head, params, start, size)

        def on_tokens(first, length, carry):
            sum_inputs, sum_params = carry
            x, t, of_tokens = blocks.tokens_of((inputs, mass, tokens), first, length)
            raw, t_block = blocks.raw_logits(head, x, p_block), t.block(start, size)
            dx, dp = blocks.pull_back(
                head, needs_grad, x, p_block, raw, t_block, of_tokens, backend
            )
            return blocks.add(sum_inputs, dx, first), jax.tree.map(jnp.add, sum_params, dp)

        carry = sum_inputs, blocks.zeros_of(needs_params, p_block)
        carry = blocks.for_each(num_tokens, head.plan.tokens, on_tokens, carry)
        sum_inputs, of_block = carry[0], scaled(carry[1])
        return sum_inputs, Params(
            kernel=blocks.put(all_params.kernel, of_block.kernel, start, head.class_axis),
            bias=blocks.put(all_params.bias, of_block.bias, start),
            constants=jax.tree.map(jnp.add, all_params.constants, of_block.constants),
        )

    carry = blocks.zeros_of(needs_inputs, inputs), blocks.zeros_of(needs_params, params, own=True)
    if any(jax.tree.leaves((needs_inputs, needs_params))):
        carry = blocks.for_each(num_classes, head.plan.classes, on_classes, carry)
    of_inputs, of_params = scaled(carry[0]), carry[1]
    of_mass = mass
    if any(jax.tree.leaves(needs_mass)):
        of_mass = _mass_cotangent(head, args, tokens)
    return of_inputs, of_params, of_mass


def _mass_cotangent(head, args, tokens):
    """Returns loss_cotangent · (lse(z) − z), in the form of a mass."""
    inputs, params, mass = args
    num_classes = blocks.num_classes_of(head, params)

    def losses(mass):
        def on_tokens(first, length, losses):
            x, t, whole = blocks.tokens_of((inputs, mass, tokens.whole), first, length)

            def on_classes(start, size, total):
                z = blocks.logits_of(head, x, blocks.classes_of(head, params, start, size))
                return total + t.block(start, size).excess(z, partial.finite(whole.max_logit))

            excess = blocks.for_each(num_classes, head.plan.classes, on_classes, nothing[:length])
            return blocks.put(losses, excess + t.total() * jnp.log1p(whole.rest), first)

        return blocks.for_each(inputs.shape[0], head.plan.tokens, on_tokens, nothing)

    nothing = blocks.zeros(inputs.shape[:1], blocks.arithmetic_dtype(inputs, params), inputs)
    own = meshes.varying(tokens.loss_cotangent, meshes.varying_axes(inputs))
    return jax.vjp(losses, mass)[1](own)[0]
