"""The fused head of a sum over tokens: gradients are made in the forward pass.

The logits of one chunk of tokens are made block by block, kept until their log-normalizers are
known, and turned into gradients at once: three matmuls. That needs the cotangent of every loss
beforehand, which a weighted sum over tokens gives, and a float32 accumulator of the kernel's
gradient. Where there is no memory for it, and for other derivatives, logits are recomputed.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xentjax._jax.rule import Backend, Rule
from xentjax._softmax import head_blocks as blocks
from xentjax._softmax import head_recomputed as recomputed
from xentjax._softmax import head_reference, partial, passes
from xentjax._softmax import head_teacher as teacher
from xentjax._softmax.head_blocks import Head, Params, TokenGradient
from xentjax._softmax.head_teacher import HeadMass
from xentjax._softmax.partial import masked
from xentjax._targets.mass import times

LARGEST_FLOAT16_COTANGENT = 64
"""float16 ends at 65504: this leaves room for a target mass of a thousand."""


class Coefficients(NamedTuple):
    """The factors of each token in a total.

    Attributes:
      loss: That of its loss, [N].
      squared_lse: That of the square of its log-normalizer, [N], for a z-loss; or None.
    """

    loss: jax.Array
    squared_lse: jax.Array | None = None

    def total(self, losses: jax.Array, log_normalizers: jax.Array) -> jax.Array:
        """Returns Σ_n c_n · loss_n + Σ_n d_n · lse_n²."""
        total = jnp.sum(times(self.loss, losses))
        if self.squared_lse is None:
            return total
        return total + jnp.sum(times(self.squared_lse, log_normalizers**2))

    def cotangents(self, log_normalizers: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the cotangents of the total to losses and log-normalizers, [N]."""
        if self.squared_lse is None:
            return self.loss, jnp.zeros_like(self.loss)
        return self.loss, 2 * times(self.squared_lse, log_normalizers)


@dataclasses.dataclass(frozen=True)
class HeadTotal(Rule):
    """(inputs [N, D], Params, mass, mask or None, Coefficients) -> their total."""

    head: Head

    def reference(self, inputs, params, mass, mask, coefficients):
        out = head_reference.reference(self.head, inputs, params, mass)
        return coefficients.total(*masked(out, mask))

    def forward(self, backend, needs_grad, inputs, params, mass, mask, coefficients):
        args, head = (inputs, params, mass, mask), self.head.on(backend)
        if self._makes_gradients(needs_grad):
            scale = _scale_of(coefficients)
            scaled = jax.tree.map(lambda c: c / scale, coefficients)
            out, cotangents = _forward_with_gradients(head, needs_grad, args, scaled, backend)
            summary = (*cotangents, scale)
        else:
            with_gradient = any(jax.tree.leaves(needs_grad))
            summary, _ = recomputed.summarise(head, *args, None, with_gradient, backend)
            out = summary.whole.loss, summary.whole.log_normalizer
        out = masked(out, mask)
        return coefficients.total(*out), (*out, summary)

    def backward(self, backend, needs_grad, args, summary, cotangent):
        inputs, params, mass, mask, coefficients = args
        losses, log_normalizers, of_losses = summary
        of_coefficients = Coefficients(cotangent * losses, cotangent * log_normalizers**2)
        if coefficients.squared_lse is None:
            of_coefficients = of_coefficients._replace(squared_lse=None)
        if self._makes_gradients(needs_grad):
            of_inputs, of_params, scale = of_losses
            answer = jax.tree.map(lambda ct: (cotangent * scale) * ct, (of_inputs, of_params))
            return *answer, mass, mask, of_coefficients
        factor, scale = cotangent, None
        dtype = jnp.promote_types(inputs.dtype, params.kernel.dtype)
        # A transform's constants have their gradient summed over devices in the loop: unscaled.
        if dtype == jnp.float16 and not any(needs_grad[1].constants):
            largest = _scale_of(coefficients)
            factor, scale = 1 / largest, cotangent * largest
        each = jax.tree.map(lambda c: factor * c, coefficients).cotangents(log_normalizers)
        tokens = TokenGradient(of_losses.whole, *masked(each, mask))
        known = inputs, params, of_losses.knowing(mass), mask
        answer = recomputed.gradients(
            self.head.on(backend), needs_grad, known, tokens, backend, scale
        )
        return *answer, mask, of_coefficients

    def _makes_gradients(self, needs_grad):
        """Returns whether gradients are made forward: of inputs, kernel or bias, and no others."""
        needs_inputs, needs_params, needs_mass, *_ = needs_grad
        others = jax.tree.leaves((needs_params.constants, needs_mass))
        wanted = (needs_inputs, needs_params.kernel, needs_params.bias)
        return self.head.plan.keeps_logits and not any(others) and any(jax.tree.leaves(wanted))


def _scale_of(coefficients):
    """Returns a divisor of coefficients, and a factor of gradients at the end.

    In float16 the logits' gradients underflow if they are divided by the number of tokens.
    """
    largest = jnp.max(jnp.abs(coefficients.loss), initial=0)
    return jnp.where(largest == 0, jnp.ones_like(largest), largest) / LARGEST_FLOAT16_COTANGENT


def _forward_with_gradients(
    head: Head,
    needs_grad: tuple[Any, ...],
    args: tuple[jax.Array, Params, HeadMass, jax.Array | None],
    coefficients: Coefficients,
    backend: Backend,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, Params]]:
    """Returns ((losses, log-normalizers) [N], cotangents of (inputs, params) of their total)."""
    inputs, params, mass, mask = args
    needs_inputs, needs_params = needs_grad[:2]
    num_tokens, num_classes = inputs.shape[0], blocks.num_classes_of(head, params)

    def on_tokens(first, length, carry):
        out, all_inputs, sum_params = carry
        x, t, c = blocks.tokens_of((inputs, mass, coefficients), first, length)
        t = teacher.normalized(head, t, keeps_logits=True)
        kept, whole = _kept_logits(head, x, params, t, backend)
        of_tokens = TokenGradient(whole, *c.cotangents(whole.log_normalizer))

        def use_logits(start, size, carry):
            sum_inputs, sum_params = carry
            p, t_block = blocks.classes_of(head, params, start, size), t.block(start, size)
            raw = jax.lax.dynamic_slice_in_dim(kept, start, size, 1)
            dx, dp = blocks.pull_back(head, needs_grad, x, p, raw, t_block, of_tokens, backend)
            return jax.tree.map(jnp.add, sum_inputs, dx), sum_params._replace(
                kernel=blocks.add(sum_params.kernel, dp.kernel, start, head.class_axis),
                bias=blocks.add(sum_params.bias, dp.bias, start),
            )

        carry = blocks.zeros_of(needs_inputs, x), sum_params
        dx, sum_params = blocks.for_each(num_classes, head.plan.classes, use_logits, carry)
        out = blocks.put(out, (whole.loss, whole.log_normalizer), first)
        return out, blocks.put(all_inputs, dx, first), sum_params

    dtype = blocks.arithmetic_dtype(inputs, params)
    nothing = blocks.zeros((num_tokens,), dtype, coefficients.loss)
    all_inputs = blocks.zeros_of(needs_inputs, inputs, own=True)
    carry = (nothing, nothing), all_inputs, blocks.zeros_of(needs_params, params)
    end = blocks.end_of(mask)
    out, *cotangents = blocks.for_each(num_tokens, head.plan.tokens, on_tokens, carry, end)
    return out, tuple(cotangents)


def _kept_logits(head, inputs, params, mass, backend):
    """Returns (raw logits [N, V], the PartialSoftmax of all classes) of one chunk of tokens."""
    num_tokens, num_classes = inputs.shape[0], blocks.num_classes_of(head, params)
    dtype = blocks.arithmetic_dtype(inputs, params)

    def on_classes(start, size, carry):
        kept, whole = carry
        p = blocks.classes_of(head, params, start, size)
        raw, t_block = blocks.raw_logits(head, inputs, p), mass.block(start, size)
        logits = blocks.transformed(head, raw, p)
        new = passes.summarise(logits, t_block, True, backend, False)
        return blocks.put(kept, raw, start, 1), partial.merge(whole, new)

    nothing = partial.no_classes(blocks.zeros((num_tokens,), dtype, inputs), with_gradient=True)
    carry = blocks.zeros((num_tokens, num_classes), dtype, inputs), nothing
    kept, whole = blocks.for_each(num_classes, head.plan.classes, on_classes, carry)
    return kept, blocks.over_devices(head, whole)
