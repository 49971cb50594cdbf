"""Blocks of classes: what one block tells of the softmax, and how blocks merge.

A block is all the classes, a chunk of them in a loop, or a shard of them on a device. Of its
logits z and the target mass t on its classes it keeps

    m = max z,   rest = Σ_v exp(z_v − m) − 1,
    mass = Σ_v t_v,   mass_below = Σ_{v: z_v < m} t_v,   excess = Σ_v t_v · (m − z_v)

sums of non-negative terms, all of them, and so is what follows once all classes are in one block:

    lse(z)     = m + log1p(rest)
    loss(z, t) = Σ_v t_v · (lse(z) − z_v) = excess + mass · log1p(rest)
    p_v        = exp(z_v − m) / (1 + rest)
    ∂loss/∂z_v = mass · p_v − t_v
               = mass_below − mass · rest / (1 + rest)   for the one class with p_v > 1/2
    ∂loss/∂t_v = lse(z) − z_v

Leaving the largest exponential, which is 1, out of the sum is what keeps a confident prediction
exact: log1p(rest) and rest / (1 + rest) have full relative precision where lse − z_y and p_y − 1
cancel to nothing.
"""

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xentjax import _masses, _rows
from xentjax._platform import on_one_cpu
from xentjax._targets import SparseTargets

# `rest` is kept times 2⁵⁸: float32 loses exp(x) below x = −87, which beside exp(−80) is not
# nothing. A power of two scales exactly.
_LIFT = 2.0**58


class Block(NamedTuple):
    """What a block of classes tells of each example; every field is [...].

    To derivatives m is a constant: a loss does not change when all logits and m shift.
    """

    m: jax.Array
    lifted_rest: jax.Array
    mass: jax.Array
    mass_below: jax.Array
    excess: jax.Array

    @property
    def rest(self) -> jax.Array:
        """Σ_v exp(z_v − m) − 1."""
        return self.lifted_rest / _LIFT

    @property
    def log_normalizer(self) -> jax.Array:
        """lse(z)."""
        return self.m + jnp.log1p(self.rest)

    @property
    def loss(self) -> jax.Array:
        """Σ_v t_v · (lse(z) − z_v)."""
        return self.excess + self.mass * jnp.log1p(self.rest)

    def surprisal(self, logits: jax.Array) -> jax.Array:
        """Returns lse(z) − z_v, [..., V]."""
        return (_top(self.m) - wide(logits)) + jnp.log1p(self.rest)[..., None]

    def softmax(self, logits: jax.Array) -> jax.Array:
        """Returns p, [..., V]."""
        shift, scale = _shift_and_scale(self.m)
        return (1 / (1 + self.rest))[..., None] * (scale * jnp.exp(wide(logits) - shift))

    def is_top(self, logits: jax.Array) -> jax.Array:
        """Returns whether p_v > 1/2, [..., V]: at most one largest logit has that."""
        return (wide(logits) == _top(self.m)) & (self.rest < 1)[..., None]


def block_of(logits: jax.Array, targets: jax.Array | SparseTargets, shares: bool = False) -> Block:
    """Returns the Block of logits [..., V] under the target mass on those V classes.

    XLA's CPU backend writes exp(z) to memory before it sums it. A few rows at a time that is its
    cache, and the rest of memory is read once.

    Args:
      logits: [..., V].
      targets: The mass on those classes, ready for arithmetic.
      shares: Whether `logits_cotangent` of the same logits follows, and shares the exponentials
        where it can: they become the cotangent in place.
    """
    left_out = _left_out(targets)
    if logits.size < (_rows.CACHED if left_out is None else _rows.LARGE):
        return _plain_block_of(logits, targets)
    if left_out is None or not (shares and _is_wide(logits)):
        return on_one_cpu(_rows.by_rows(_plain_block_of), _plain_block_of)(logits, targets)
    max_and_sums = _max_and_target_sums
    if _masses.has_background(targets):
        max_and_sums = on_one_cpu(_rows.by_rows(max_and_sums), max_and_sums)
    return _with_rest(logits, targets, *max_and_sums(logits, targets))


def _plain_block_of(logits, targets):
    return _with_rest(logits, targets, *_max_and_target_sums(logits, targets))


def _with_rest(logits, targets, m, *sums):
    """Returns the Block of which all but the rest is known."""
    return Block(m, _lifted_rest(logits, m, _left_out(targets)), *sums)


def _left_out(targets):
    """Returns the K classes whose exponentials are kept apart, or None for those of largest z.

    Only where target mass may be near 1 does rest have to be exact if it is small, and K classes
    are known beforehand.
    """
    if not isinstance(targets, SparseTargets) or targets.background is not None:
        return None
    return targets.indices if targets.indices.shape[-1] else None


def _max_and_target_sums(logits, targets):
    """Returns m, mass, mass_below and excess."""
    m = jnp.max(wide(jax.lax.stop_gradient(logits)), axis=-1)
    top = _top(m)
    # The mean of [z < m] is this for one maximum; for several, p > 1/2 holds for no class, and
    # mass_below is not used.
    all_but_one = 1 - 1 / logits.shape[-1]
    below_and_excess = _masses.expectations(
        targets,
        logits,
        lambda z: (wide(z) < top).astype(m.dtype),
        lambda z: top - wide(z),
        means=(all_but_one, None),
    )
    return m, _masses.total_mass(targets, logits.shape[-1]), *below_and_excess


def merge(a: Block, b: Block) -> Block:
    """Returns the Block of the classes of both."""
    m = jnp.maximum(a.m, b.m)
    return _from_summands(m, *map(jnp.add, _summands(a, m), _summands(b, m)))


def merge_over(block: Block, axis_name: Hashable) -> Block:
    """Returns the Block of the classes of every shard along `axis_name`: one max and one sum."""
    m = jax.lax.pmax(jax.lax.stop_gradient(block.m), axis_name)
    return _from_summands(m, *jax.lax.psum(jnp.stack(_summands(block, m)), axis_name))


def _summands(block: Block, m: jax.Array) -> tuple[jax.Array, ...]:
    """Returns what adds over blocks, as seen from a maximum m that is no less than block.m."""
    is_max = (block.m == m) & (m > -jnp.inf)
    shift, scale = _shift_and_scale(m)
    fallen = (1 + block.rest) * (_LIFT * scale * jnp.exp(block.m[..., None] - shift))[..., 0]
    return (
        jnp.where(is_max, block.lifted_rest, fallen),
        is_max.astype(m.dtype),
        block.mass,
        jnp.where(is_max, block.mass_below, block.mass),
        block.excess + _masses.times_mass(block.mass, _top(m)[..., 0] - block.m),
    )


def _from_summands(m, lifted_rest, maxima, mass, mass_below, excess):
    return Block(m, lifted_rest + _LIFT * jnp.maximum(maxima - 1, 0), mass, mass_below, excess)


def logits_cotangent(
    block: Block,
    logits: jax.Array,
    targets: jax.Array | SparseTargets,
    loss_cotangent: jax.Array,
    lse_cotangent: jax.Array,
    shares: bool = False,
) -> jax.Array:
    """Returns loss_cotangent · (mass · p − t) + lse_cotangent · p, [..., V].

    Args:
      block: Of all classes, each field [...].
      logits: Those of some classes, [..., V].
      targets: The mass on those classes.
      loss_cotangent: [...].
      lse_cotangent: [...].
      shares: Whether `block_of` of the same logits and targets made the block.
    """

    def entries(z, t):
        """The formula for the classes of logits z and mass t, both [..., J]."""
        p = block.softmax(z)
        # Where it is used: the value of rest / (1 + rest), and the derivative of 1 − p.
        constant = jax.lax.stop_gradient
        one_minus_p = constant(block.rest / (1 + block.rest))[..., None] - (p - constant(p))
        error = jnp.where(
            block.is_top(z),
            block.mass_below[..., None] - block.mass[..., None] * one_minus_p,
            block.mass[..., None] * p - t,
        )
        cotangent = loss_cotangent[..., None] * error + lse_cotangent[..., None] * p
        return cotangent.astype(logits.dtype)

    if not isinstance(targets, SparseTargets):
        return entries(logits, targets)
    num_classes = logits.shape[-1]
    background = _masses.background_over(targets, num_classes)
    picked = _masses.at_classes(logits, targets.indices)
    at_indices = entries(picked, _masses.mass_at(targets, targets.indices, num_classes))
    left_out = _left_out(targets)
    if left_out is None:
        elsewhere = entries(logits, background)
    else:  # No mass is near 1 there.
        shift, scale = _shift_and_scale(block.m)
        of_p = (loss_cotangent * block.mass + lse_cotangent) / (1 + block.rest)
        exponentials = jnp.exp(wide(logits) - shift)
        if shares and _is_wide(logits):
            exponentials = _masses.without(exponentials, left_out)
        elsewhere = (
            of_p[..., None] * (scale * exponentials) - loss_cotangent[..., None] * background
        )
        elsewhere = elsewhere.astype(logits.dtype)
    return _masses.put_at(elsewhere, targets.indices, at_indices)


def targets_cotangent(
    block: Block,
    logits: jax.Array,
    targets: jax.Array | SparseTargets,
    prepare: Callable[[jax.Array | SparseTargets], jax.Array | SparseTargets],
    loss_cotangent: jax.Array,
) -> jax.Array | SparseTargets:
    """Returns loss_cotangent · (lse(z) − z) as a cotangent of targets, before they are prepared."""

    def loss(targets):
        return _masses.expectations(prepare(targets), logits, block.surprisal)[0]

    return jax.vjp(loss, targets)[1](loss_cotangent)[0]


@jax.custom_jvp
def _lifted_rest(logits: jax.Array, m: jax.Array, left_out: jax.Array | None) -> jax.Array:
    """Returns 2⁵⁸ · rest, [...]; where all z are −inf, rest is 0.

    Args:
      logits: [..., V].
      m: Their maximum, [...]; its derivative is not asked for.
      left_out: Classes [..., K]: rest has full relative precision where the largest logit is among
        them, and the precision of 1 + rest elsewhere. None is all classes.
    """
    z = wide(logits)
    top, (shift, scale) = _top(m), _shift_and_scale(m)
    if left_out is None:
        others = _masses.over_classes(jnp.where(z < top, jnp.exp(z - shift), 0))
        maxima = jnp.sum(z == top, axis=-1, dtype=z.dtype)
    else:
        apart, counts = _masses.at_classes(z, left_out), ~_masses.is_repeated(left_out)
        others = jnp.where(counts & (apart < top), jnp.exp(apart - shift), 0).sum(-1)
        others += _masses.over_classes(_masses.without(jnp.exp(z - shift), left_out))
        maxima = jnp.sum(counts & (apart == top), axis=-1, dtype=z.dtype)
    return jnp.maximum((_LIFT * scale[..., 0]) * others + _LIFT * (maxima - 1), 0)


@_lifted_rest.defjvp
def _lifted_rest_jvp(primals, tangents):
    (logits, m, left_out), (tangent, *_) = primals, tangents
    shift, scale = _shift_and_scale(m)
    exponentials = scale * jnp.exp(wide(logits) - shift)
    change = _LIFT * jnp.sum(exponentials * wide(tangent), axis=-1)
    return _lifted_rest(logits, m, left_out), change


def wide_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the dtype of the arithmetic: float32, or float64 where there is one among dtypes."""
    return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def wide(x: jax.Array) -> jax.Array:
    """Returns x in the dtype of the arithmetic."""
    return x.astype(wide_dtype(x.dtype))


def _is_wide(x: jax.Array) -> bool:
    return x.dtype == wide_dtype(x.dtype)


def _top(m: jax.Array) -> jax.Array:
    """Returns what is subtracted from the logits, [..., 1]: m, or 0 where m is −inf."""
    return jnp.where(m == -jnp.inf, 0, m)[..., None]


def _shift_and_scale(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (shift, scale), both [..., 1]: exp(z − m) = scale · exp(z − shift).

    Rounding z − m is an error of half an ulp of |z − m|, and so a relative error of exp: 4e-6 at 80
    in float32. So the shift is 0, and nothing rounded, unless m leaves the range from _LOW to
    _HIGH; then it is how far m does, in whole numbers. Where |shift| ≤ |z|, that rounds nothing
    either: z − shift is a multiple of an ulp of z, and no larger. Elsewhere |z − shift| < 16, down
    to the last z that makes a difference, and so half an ulp of it is at most 5e-7.
    """
    top = jax.lax.stop_gradient(_top(m))
    level = jnp.round(top)
    near = jnp.abs(level) < 2**22  # Farther out level − _HIGH would be rounded.
    shift = jnp.where(near, level - jnp.clip(level, _LOW, _HIGH), level)
    d = top - shift
    # The rounding of d, exactly: exp(−d − e) = exp(−d) · (1 − e). (Of a second exponential in its
    # place XLA would make one of the sum, and round that.)
    e = top - (d + shift)
    return shift, jnp.exp(-d) * (1 - e)


# Above _HIGH, float32 has room for the sum of 6 million exponentials. Below _LOW, it has room for
# an exp(−94) beside the largest, to add to an exp(−80).
_LOW, _HIGH = 7, 72
