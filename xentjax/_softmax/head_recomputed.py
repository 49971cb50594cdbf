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
from xentjax._softmax import head_reference, partial, passes
from xentjax._softmax import head_teacher as teacher
from xentjax._softmax.head_blocks import Head, Params, TokenGradient
from xentjax._softmax.head_teacher import HeadMass, TeacherMass
from xentjax._softmax.partial import PartialSoftmax, masked
from xentjax._targets.mass import at_class
from xentjax._targets.types import is_valid


@dataclasses.dataclass(frozen=True)
class HeadLosses(Rule):
    """(inputs [N, D], Params, mass, mask or None, labels or None) -> arrays [N].

    They are losses and log-normalizers; then, if stats are asked for, entropies, and predictions
    (as floats, exact below 2²⁴ classes) and the labels' surprisals, which have no derivative.
    Labels count from this device's first class; those outside of its classes are another's.
    """

    head: Head

    def reference(self, inputs, params, mass, mask, labels):
        del labels
        out = head_reference.reference(self.head, inputs, params, mass)
        if self.head.with_stats:
            out = (*out, jnp.zeros_like(out[0]), jnp.zeros_like(out[0]))
        return masked(out, mask)

    def forward(self, backend, needs_grad, inputs, params, mass, mask, labels):
        with_gradient = any(jax.tree.leaves(needs_grad))
        args = inputs, params, mass, mask
        summary, stats = summarise(self.head.on(backend), *args, labels, with_gradient, backend)
        whole = summary.whole
        out = whole.loss, whole.log_normalizer
        if stats is not None:
            gap = whole.max_logit - stats.label_logit
            out = (*out, whole.entropy, stats.prediction, gap + whole.leader_surprisal)
        return masked(out, mask), summary

    def backward(self, backend, needs_grad, args, summary, cotangents):
        inputs, params, mass, mask, labels = args
        tokens = TokenGradient(summary.whole, *masked(cotangents[:3], mask))
        known = inputs, params, summary.knowing(mass), mask
        answer = gradients(self.head.on(backend), needs_grad, known, tokens, backend)
        return *answer, mask, labels


class Summary(NamedTuple):
    """The facts of each token that are known once all classes are seen.

    Attributes:
      whole: The PartialSoftmax of all classes.
      teacher_lse: The log-normalizers of a teacher's mass, [N], or None.
    """

    whole: PartialSoftmax
    teacher_lse: jax.Array | None

    def knowing(self, mass: HeadMass) -> HeadMass:
        """Returns the mass with all that is known of it."""
        return teacher.knowing(mass, self.teacher_lse)


class _Stats(NamedTuple):
    """Facts of the classes so far, beside their PartialSoftmax.

    Attributes:
      prediction: The class of the largest logit, as a float.
      label_logit: The logit of the label, or −inf.
    """

    prediction: jax.Array
    label_logit: jax.Array


def summarise(
    head: Head,
    inputs: jax.Array,
    params: Params,
    mass: HeadMass,
    mask: jax.Array | None,
    labels: jax.Array | None,
    with_gradient: bool,
    backend: Backend,
) -> tuple[Summary, _Stats | None]:
    """Returns the Summary of every token, and stats if there are labels."""
    num_classes = blocks.num_classes_of(head, params)

    def no_classes(x):
        like = blocks.zeros(x.shape[:1], blocks.arithmetic_dtype(inputs, params), inputs)
        stats = None if labels is None else _Stats(like, like - jnp.inf)
        whole = partial.no_classes(like, with_gradient, with_entropy=labels is not None)
        return whole, stats, teacher.no_top(mass, like)

    def on_tokens(first, length, out):
        x, t, label = blocks.tokens_of((inputs, mass, labels), first, length)

        def on_classes(start, size, carry):
            whole, stats, top = carry
            logits = blocks.logits_of(head, x, blocks.classes_of(head, params, start, size))
            t_block, top, whole = teacher.block_under(t, start, size, top, whole)
            new = passes.summarise(logits, t_block, with_gradient, backend, False)
            if stats is not None:
                new = partial.with_entropy(new, logits)
                stats = _merge_stats(stats, whole.max_logit, logits, label, start)
            return partial.merge(whole, new), stats, top

        of_tokens = blocks.for_each(num_classes, head.plan.classes, on_classes, no_classes(x))
        return blocks.put(out, of_tokens, first)

    whole, stats, top = blocks.for_each(
        inputs.shape[0], head.plan.tokens, on_tokens, no_classes(inputs), blocks.end_of(mask)
    )
    summary = Summary(*teacher.over_devices(head, whole, top))
    if stats is not None and head.axes:
        largest = whole.max_logit
        leads = (largest == summary.whole.max_logit) | jnp.isnan(largest)
        stats = _stats_over_devices(head, num_classes, stats, leads)
    return summary, stats


def _merge_stats(stats, max_logit, logits, labels, start):
    """Returns the stats of the classes so far, whose largest logit is given, and of others."""
    best = (start + jnp.argmax(logits, axis=-1)).astype(logits.dtype)
    leads = logits.max(-1) > max_logit
    size = logits.shape[-1]
    here = labels - start
    of_label = at_class(logits, jnp.clip(here, 0, size - 1))
    return _Stats(
        jnp.where(leads, best, stats.prediction),
        jnp.where(is_valid(here, size), of_label, stats.label_logit),
    )


def _stats_over_devices(head, num_classes, stats, leads):
    """Returns the stats of the classes of all devices: the first device's of several leaders."""
    size = jax.lax.axis_size(head.axes) * num_classes
    start = (jax.lax.axis_index(head.axes) * num_classes).astype(stats.prediction.dtype)
    here = jnp.where(leads, start + stats.prediction, jnp.full_like(stats.prediction, size))
    return _Stats(jax.lax.pmin(here, head.axes), jax.lax.pmax(stats.label_logit, head.axes))


def gradients(
    head: Head,
    needs_grad: tuple[Any, ...],
    args: tuple[jax.Array, Params, HeadMass, jax.Array | None],
    tokens: TokenGradient,
    backend: Backend,
    scale: jax.Array | None = None,
) -> tuple[Any, Params, Any]:
    """Returns the cotangents of (inputs, params, mass), `scale` times as large if it is given."""
    inputs, params, mass, mask = args
    needs_inputs, needs_params, needs_mass = needs_grad[:3]
    num_tokens, num_classes = inputs.shape[0], blocks.num_classes_of(head, params)
    end = blocks.end_of(mask)

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
        carry = blocks.for_each(num_tokens, head.plan.tokens, on_tokens, carry, end)
        sum_inputs, of_block = carry[0], scaled(carry[1])
        return sum_inputs, all_params._replace(
            kernel=blocks.put(all_params.kernel, of_block.kernel, start, head.class_axis),
            bias=blocks.put(all_params.bias, of_block.bias, start),
            constants=jax.tree.map(jnp.add, all_params.constants, of_block.constants),
        )

    carry = blocks.zeros_of(needs_inputs, inputs), blocks.zeros_of(needs_params, params, own=True)
    if any(jax.tree.leaves((needs_inputs, needs_params))):
        carry = blocks.for_each(num_classes, head.plan.classes, on_classes, carry)
    of_inputs, of_params = scaled(carry[0]), carry[1]
    of_mass = teacher.knowing(mass, None)
    if any(jax.tree.leaves(needs_mass)):
        of_mass = _mass_cotangent(head, args[:3], tokens)
    return of_inputs, of_params, of_mass


def _mass_cotangent(head, args, tokens):
    """Returns loss_cotangent · (lse(z) − z), in the form of a mass.

    For a teacher's mass t_v = exp(y_v − lse(y)) the cotangent of its logits y is
    loss_cotangent · t_v · (lse(z) − z_v − loss): that of Σ_v t_v · (lse(z) − loss − z_v) where
    lse(y) and loss are constants.
    """
    inputs, params, mass = args
    num_classes, is_teacher = blocks.num_classes_of(head, params), isinstance(mass, TeacherMass)
    log_normalizer = mass.log_normalizer if is_teacher else None

    def losses(mass):
        def on_tokens(first, length, losses):
            x, t, whole = blocks.tokens_of((inputs, mass, tokens.whole), first, length)
            top = whole.max_logit
            top = top + whole.leader_surprisal - whole.loss if is_teacher else top

            def on_classes(start, size, total):
                z = blocks.logits_of(head, x, blocks.classes_of(head, params, start, size))
                return total + t.block(start, size).excess(z, top)

            excess = blocks.for_each(num_classes, head.plan.classes, on_classes, nothing[:length])
            if not is_teacher:
                excess = excess + t.total() * whole.leader_surprisal
            return blocks.put(losses, excess, first)

        mass = teacher.knowing(mass, log_normalizer)

        return blocks.for_each(inputs.shape[0], head.plan.tokens, on_tokens, nothing)

    nothing = blocks.zeros(inputs.shape[:1], blocks.arithmetic_dtype(inputs, params), inputs)
    own = meshes.varying(tokens.loss_cotangent, meshes.varying_axes(inputs))
    return jax.vjp(losses, teacher.knowing(mass, None))[1](own)[0]
