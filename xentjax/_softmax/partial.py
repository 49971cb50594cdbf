"""Blocks of classes: what one block tells of the softmax, and how blocks merge.

A block is all the classes, a chunk of them in a loop, or a shard of them on a device. Of its
logits z and the target mass t on its classes it keeps

    m = max z,   others = Σ_v exp(z_v − shift) − exp(m − shift),
    mass = Σ_v t_v,   mass_below = Σ_{v: z_v < m} t_v,   excess = Σ_v t_v · (m − z_v)

sums of non-negative terms, all of them (one of the largest exponentials is left out of `others`,
not subtracted), and so is what follows once all classes are in one block:

    rest       = others / exp(m − shift) = Σ_v exp(z_v − m) − 1
    lse(z)     = m + log1p(rest)
    loss(z, t) = Σ_v t_v · (lse(z) − z_v) = excess + mass · log1p(rest)
    p_v        = exp(z_v − m) / (1 + rest) = exp(z_v − shift) / (exp(m − shift) + others)
    ∂loss/∂z_v = mass · p_v − t_v
               = mass_below − mass · rest / (1 + rest)   for the one class with p_v > 1/2
    ∂loss/∂t_v = lse(z) − z_v

Leaving the largest exponential out of the sum is what keeps a confident prediction exact:
log1p(rest) and rest / (1 + rest) have full relative precision where lse − z_y and p_y − 1 cancel to
nothing. Where no p_v > 1/2, nothing cancels, and m may be any number near the largest logit.
"""

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xentjax._targets import mass as _masses
from xentjax._targets.mass import SUMS, Sums
from xentjax._targets.types import SparseTargets


class Block(NamedTuple):
    """What a block of classes tells of each example; every field is [...].

    To derivatives m and shift are constants: a loss does not change when all logits and m shift.
    """

    shift: jax.Array
    m: jax.Array
    others: jax.Array
    mass: jax.Array
    mass_below: jax.Array
    excess: jax.Array

    @property
    def top(self) -> jax.Array:
        """exp(m − shift), what is left out of `others`."""
        return jnp.exp(finite(self.m) - self.shift)

    @property
    def rest(self) -> jax.Array:
        """Σ_v exp(z_v − m) − 1."""
        return self.others / self.top

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
        return _surprisal(logits, *self._rows)

    def expected_surprisal(
        self, logits: jax.Array, targets: jax.Array | SparseTargets
    ) -> jax.Array:
        """Returns Σ_v t_v · (lse(z) − z_v), [...]; its derivative to targets is plain autodiff."""
        return _masses.expectation(targets, logits, _surprisal, *self._rows)

    @property
    def _rows(self):
        return finite(self.m)[..., None], jnp.log1p(self.rest)[..., None]

    def softmax(self, logits: jax.Array) -> jax.Array:
        """Returns p, [..., V]."""
        return exponentials(logits, self.shift) * (1 / (self.top + self.others))[..., None]


def _surprisal(z, top, log_sum):
    return (top - wide(z)) + log_sum


def block_of(logits: jax.Array, targets: jax.Array | SparseTargets) -> Block:
    """Returns the Block of logits [..., V] under the target mass on those V classes."""
    m = wide(jnp.max(jax.lax.stop_gradient(logits), axis=-1))
    return block_at(shift_of(m), m, logits, targets)


def block_at(
    shift: jax.Array, m: jax.Array, logits: jax.Array, targets: jax.Array | SparseTargets
) -> Block:
    """Returns the Block of these shift and m, which are constants to its derivative."""
    apart = heavy_classes(targets)
    if apart is not None and apart.shape[-1] > _masses.FEW:  # Each is compared with all classes.
        apart = None
    others = _others(logits, m, shift, apart)
    return Block(shift, m, others, *target_sums(logits, targets, m))


def target_sums(
    logits: jax.Array, targets: jax.Array | SparseTargets, m: jax.Array, sums: Sums = SUMS
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns mass, mass_below and excess of a Block."""
    top = finite(m)[..., None]
    return (
        _masses.total_mass(targets, logits.shape[-1], sums),
        # Where several classes have z = m, p > 1/2 holds for none, and this is not used.
        _masses.mass_below(targets, wide(logits), top, sums),
        _masses.expectation(targets, logits, lambda z, top: top - wide(z), top, sums=sums),
    )


def is_light_elsewhere(targets: jax.Array | SparseTargets) -> bool:
    """Returns whether no class has mass near 1 but those of sparse targets' indices."""
    return isinstance(targets, SparseTargets) and targets.background is None


def heavy_classes(targets: jax.Array | SparseTargets) -> jax.Array | None:
    """Returns the classes [..., K] that have all mass that may be near 1; None: not only a few."""
    if not isinstance(targets, SparseTargets) or not is_light_elsewhere(targets):
        return None
    return targets.indices if targets.indices.shape[-1] > 0 else None


def merge(a: Block, b: Block) -> Block:
    """Returns the Block of the classes of both."""
    m = jnp.maximum(a.m, b.m)
    return _from_summands(m, *map(jnp.add, _summands(a, m), _summands(b, m)))


def merge_over(block: Block, axis_name: Hashable) -> Block:
    """Returns the Block of the classes of every shard along `axis_name`: one max and one sum."""
    m = jax.lax.pmax(jax.lax.stop_gradient(block.m), axis_name)
    return _from_summands(m, *jax.lax.psum(jnp.stack(_summands(block, m)), axis_name))


def _summands(block: Block, m: jax.Array) -> tuple[jax.Array, ...]:
    """Returns what adds over blocks, as seen from an m that is no less than block.m."""
    is_max = (block.m == m) & (m > -jnp.inf)
    # The block of the largest logit leaves it out; any other adds all of its exponentials.
    added = block.others + jnp.where(is_max | (block.m == -jnp.inf), 0, block.top)
    return (
        added * jnp.exp(block.shift - shift_of(m)),
        is_max.astype(m.dtype),
        block.mass,
        jnp.where(is_max, block.mass_below, block.mass),
        block.excess + _masses.times_mass(block.mass, finite(m) - block.m),
    )


def _from_summands(m, others, maxima, mass, mass_below, excess):
    block = Block(shift_of(m), m, others, mass, mass_below, excess)
    return block._replace(others=others + jnp.maximum(maxima - 1, 0) * block.top)


def logits_cotangent(
    block: Block,
    logits: jax.Array,
    targets: jax.Array | SparseTargets,
    loss_cotangent: jax.Array,
    lse_cotangent: jax.Array,
) -> jax.Array:
    """Returns loss_cotangent · (mass · p − t) + lse_cotangent · p, [..., V].

    Args:
      block: Of all classes, each field [...].
      logits: Those of some classes, [..., V].
      targets: The mass on those classes.
      loss_cotangent: [...].
      lse_cotangent: [...].
    """
    rows = cotangent_rows(block, loss_cotangent, lse_cotangent)
    e = exponentials(logits, block.shift)
    if not isinstance(targets, SparseTargets):
        return _entries(rows, e, logits, targets).astype(logits.dtype)
    background = _masses.background_over(targets, logits.shape[-1])
    if is_light_elsewhere(targets):
        entries = plain_entries(rows, e, background)
    else:
        entries = _entries(rows, e, logits, background)
    at_indices = entries_at_indices(rows, block, logits, targets)
    return _masses.put_at(entries, targets.indices, at_indices).astype(logits.dtype)


class CotangentRows(NamedTuple):
    """What a cotangent's entries need to know of their example, [..., 1].

    of_p · p − of_loss · t is an entry, p = exp(z − shift) · scale. `top` is the z of which p > 1/2,
    or NaN, and top_entry is its entry.
    """

    of_loss: jax.Array
    of_p: jax.Array
    scale: jax.Array
    top: jax.Array
    top_entry: jax.Array


def cotangent_rows(
    block: Block, loss_cotangent: jax.Array, lse_cotangent: jax.Array
) -> CotangentRows:
    """Returns what `logits_cotangent` needs to know of each example."""
    top = block.top
    scale = 1 / (top + block.others)
    at_top = jax.lax.stop_gradient((block.others * scale, top * scale))
    top_error = block.mass_below - block.mass * at_top[0]
    rows = CotangentRows(
        loss_cotangent,
        loss_cotangent * block.mass + lse_cotangent,
        scale,
        jnp.where(block.others < top, finite(block.m), jnp.nan),
        loss_cotangent * top_error + lse_cotangent * at_top[1],
    )
    return jax.tree.map(lambda x: x[..., None], rows)


def _entries(rows, e, z, t):
    """Returns the cotangent of logits z [..., J] that hold mass t [..., J], be it near 1.

    Args:
      rows: CotangentRows.
      e: exp(z − shift), [..., J].
      z: [..., J].
      t: [..., J] or [..., 1].
    """
    p = e * rows.scale
    # The value is that of top_entry, where it is used; the derivative is that of any other entry.
    of_top = rows.top_entry + rows.of_p * (p - jax.lax.stop_gradient(p))
    return jnp.where(wide(z) == rows.top, of_top, plain_entries(rows, e, t))


def plain_entries(rows: CotangentRows, e: jax.Array, t: jax.Array | None) -> jax.Array:
    """Returns `_entries`, all right but where p and t are near 1; t may be None, for no mass."""
    entries = rows.of_p * (e * rows.scale)
    return entries if t is None else entries - rows.of_loss * t


def entries_at_indices(
    rows: CotangentRows, block: Block, logits: jax.Array, targets: SparseTargets
) -> jax.Array:
    """Returns the cotangent of the logits of sparse targets' indices, [..., K]."""
    z = _masses.at_classes(logits, targets.indices)
    mass = _masses.mass_at(targets, targets.indices, logits.shape[-1])
    return _entries(rows, exponentials(z, block.shift), z, mass)


def targets_cotangent(
    block: Block,
    logits: jax.Array,
    targets: jax.Array | SparseTargets,
    prepare: Callable[[jax.Array | SparseTargets], jax.Array | SparseTargets],
    loss_cotangent: jax.Array,
) -> jax.Array | SparseTargets:
    """Returns loss_cotangent · (lse(z) − z) as a cotangent of targets, before they are prepared."""

    def loss(targets):
        return block.expected_surprisal(logits, prepare(targets))

    return jax.vjp(loss, targets)[1](loss_cotangent)[0]


@jax.custom_jvp
def _others(
    logits: jax.Array, m: jax.Array, shift: jax.Array, apart: jax.Array | None
) -> jax.Array:
    """Returns Σ_v exp(z_v − shift) without one of the largest, [...]; 0 where all z are −inf.

    Args:
      logits: [..., V].
      m: Their maximum, [...]; its derivative is not asked for.
      shift: [...]; nor is that of this.
      apart: Classes [..., K] that are taken out of the sum before it is made: it has full relative
        precision where the largest logit is among them, and that of the sum with the largest
        elsewhere. None: it has it everywhere.
    """
    e = exponentials(logits, shift)
    if apart is not None:
        elsewhere = _masses.put_at(e, apart, jnp.zeros(apart.shape, e.dtype))
        elsewhere = _masses.opaque(elsewhere.sum(-1))
        return others_apart(elsewhere, _masses.at_distinct(wide(logits), apart), m, shift)
    z, top_z = wide(logits), finite(m)[..., None]
    below = _masses.opaque(jnp.where(z < top_z, e, 0).sum(-1))
    return with_ties(below, jnp.where(z == top_z, 1.0, 0.0).sum(-1), m, shift)


@_others.defjvp
def _others_jvp(primals, tangents):
    (logits, m, shift, apart), (tangent, *_) = primals, tangents
    change = jnp.sum(exponentials(logits, shift) * wide(tangent), axis=-1)
    return _others(logits, m, shift, apart), change


def others_apart(elsewhere: jax.Array, z: jax.Array, m: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns `others`, of a sum of exponentials in which those of z [..., K] are not."""
    top_z = finite(m)[..., None]
    below = elsewhere + jnp.where(z < top_z, jnp.exp(z - shift[..., None]), 0).sum(-1)
    return with_ties(below, jnp.where(z == top_z, 1.0, 0.0).sum(-1), m, shift)


def with_ties(below: jax.Array, maxima: jax.Array, m: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns `others`, of the sum below m and the number of z that are m."""
    return jnp.maximum(below + (maxima - 1) * jnp.exp(finite(m) - shift), 0)


def exponentials(logits: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns exp(z − shift), [..., V]."""
    return jnp.exp(wide(logits) - shift[..., None])


def wide_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the dtype of the arithmetic: float32, or float64 where there is one among dtypes."""
    return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def wide(x: jax.Array) -> jax.Array:
    """Returns x in the dtype of the arithmetic."""
    return x.astype(wide_dtype(x.dtype))


def finite(m: jax.Array) -> jax.Array:
    """Returns what is subtracted from the logits: m, or 0 where m is −inf."""
    return jnp.where(m == -jnp.inf, 0, m)


@functools.partial(jax.jit, static_argnames="low", inline=True)  # Traced once for all of its uses.
def shift_of(m: jax.Array, low: int = 7) -> jax.Array:
    """Returns the shift [...]: exponentials are taken of z − shift, where m is the largest z.

    Rounding z − m is an error of half an ulp of |z − m|, and so a relative error of exp: 4e-6 at 80
    in float32. So the shift is 0, and nothing rounded, unless m leaves the range from `low` to
    _HIGH; then it is how far m does, in whole numbers. Where |shift| ≤ |z|, that rounds nothing
    either: z − shift is a multiple of an ulp of z, and no larger. Elsewhere |z − shift| < 16, down
    to the last z that makes a difference, and so half an ulp of it is at most 5e-7.

    Below 7, float32 has room for an exp(−94) beside the largest, to add to an exp(−80).
    """
    level = jnp.round(jax.lax.stop_gradient(finite(m)))
    near = jnp.abs(level) < 2**22  # Farther out level − _HIGH would be rounded.
    return jnp.where(near, level - jnp.clip(level, low, _HIGH), level)


_HIGH = 72  # Above it, float32 has room for the sum of 6 million exponentials.
