"""The plain formula of a head, block by block: derivatives of higher order are taken of it."""

import jax
import jax.numpy as jnp

from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide
from xentjax._softmax import head_blocks as blocks
from xentjax._softmax import head_teacher as teacher
from xentjax._softmax import reference as plain
from xentjax._softmax.head_blocks import Head, Params
from xentjax._softmax.head_teacher import HeadMass
from xentjax._targets.mass import is_class


def reference(
    head: Head, inputs: jax.Array, params: Params, mass: HeadMass
) -> tuple[jax.Array, ...]:
    """Returns (loss, lse) of every token, and the entropy if stats are asked for.

    It is `reference.cross_entropy`, block by block. The class of the leader is a constant to
    derivatives. Once it is known, all is made of sums over classes, and these add over blocks.
    """

    def of_tokens(first, length, sums):
        x, t = blocks.tokens_of((inputs, mass), first, length)
        return blocks.put(sums, _sums_of_reference(head, x, params, t), first)

    nothing = blocks.zeros(inputs.shape[:1], blocks.arithmetic_dtype(inputs, params), inputs)
    sums = blocks.for_each(inputs.shape[0], head.plan.tokens, of_tokens, (nothing,) * 5)
    z_a, rest, excess, gaps, total = jax.lax.psum(sums, head.axes) if head.axes else sums
    out = excess + total * jnp.log1p(rest), z_a + jnp.log1p(rest)
    return (*out, jnp.log1p(rest) + gaps / (1 + rest)) if head.with_stats else out


def _sums_of_reference(head, inputs, params, mass):
    """Returns (z_a or 0, rest, excess, gaps, total mass) of each token, by this device's classes.

    The gaps are Σ_v exp(z_v − z_a) · (z_a − z_v) if stats are asked for, and 0 otherwise.
    """
    num_classes, mass = blocks.num_classes_of(head, params), teacher.normalized(head, mass)
    nothing = blocks.zeros(inputs.shape[:1], blocks.arithmetic_dtype(inputs, params), inputs)

    def find_leader(start, size, carry):
        largest, leader = carry
        z = blocks.logits_of(head, inputs, blocks.classes_of(head, params, start, size))
        z = jax.lax.stop_gradient(z)
        best, there = z.max(-1), start + jnp.argmax(z, axis=-1).astype(jnp.int32)
        return jnp.maximum(largest, best), jnp.where(best > largest, there, leader)

    start = nothing - jnp.inf, blocks.zeros(inputs.shape[:1], jnp.int32, inputs)
    largest, leader = blocks.for_each(num_classes, head.plan.classes, find_leader, start)
    largest, leader = jax.lax.stop_gradient((largest, leader))
    own = _logits_at(head, inputs, params, leader)
    own = jnp.where(own == -jnp.inf, jnp.zeros_like(own), own)
    z_a = own
    if head.axes:
        is_mine = meshes.is_first_largest(largest, head.axes)
        leader = jnp.where(is_mine, leader, -num_classes * jnp.ones_like(leader))
        own = jnp.where(is_mine, own, jnp.zeros_like(own))
        z_a = jax.lax.psum(own, head.axes)

    def add_classes(start, size, carry):
        rest, excess, gaps, total = carry
        z = blocks.logits_of(head, inputs, blocks.classes_of(head, params, start, size))
        t = mass.block(start, size)
        here = leader - start  # It is outside of all blocks but one.
        terms = jnp.exp(z - z_a[:, None])
        terms = jnp.where(is_class(here, z), jnp.zeros_like(terms), terms)
        if head.with_stats:
            gaps += plain.sum_of_gaps(terms, z, z_a)
        excess += t.excess(z, z_a, without=here)
        return rest + terms.sum(-1), excess, gaps, total + t.total()

    return own, *blocks.for_each(num_classes, head.plan.classes, add_classes, (nothing,) * 4)


def _logits_at(head, inputs, params, classes):
    """Returns the logit of one class of each token, [N]."""
    columns = jnp.take(params.kernel, classes, axis=head.class_axis, mode="clip")
    columns = columns if head.class_axis == 0 else columns.T
    raw = jnp.sum(wide(inputs) * wide(columns), axis=-1)
    raw = raw.astype(blocks.arithmetic_dtype(inputs, params))

    def at(x):
        return None if x is None else jnp.take(x, classes, mode="clip")

    here = params._replace(bias=at(params.bias), class_mask=at(params.class_mask))
    if here.bias is not None:
        raw = raw + here.bias.astype(raw.dtype)
    # As classes of one token: biases and masks are those of tokens here.
    return blocks.transformed(head, raw[None], here)[0]
