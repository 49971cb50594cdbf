"""Blocks of classes: what one block tells of the softmax, and how blocks merge.

A block is all the classes, a chunk of them in a loop, or a shard of them on a device. Of its
logits z and the target mass t on its classes it keeps

    m = max z,   others = Σ_v exp(z_v − shift) − exp(m − shift),
    mass = Σ_v t_v,   mass_below = Σ_{v: z_v < m} t_v,   excess = Σ_v t_v · (m − z_v)

sums of non-negative terms, all of them (one of the largest exponentials is left out of `others`,
not subtracted), and so is what follows once all classes are in one block, shift being a function
of m:

    rest       = others / exp(m − shift) = Σ_v exp(z_v − m) − 1
    lse(z)     = m + log1p(rest)
    loss(z, t) = Σ_v t_v · (lse(z) − z_v) = excess + mass · log1p(rest)
    p_v        = exp(z_v − m) / (1 + rest) = exp(z_v − shift) / (exp(m − shift) + others)
    ∂loss/∂z_v = mass · p_v − t_v
               = mass_below − mass · rest / (1 + rest)   for the one class with p_v > 1/2
    ∂loss/∂t_v = lse(z) − z_v

Leaving the largest exponential out of the sum is what keeps a confident prediction exact:
log1p(rest) and rest / (1 + rest) have full relative precision where lse − z_y and p_y − 1 cancel to
nothing.
"""

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xentjax import _masses, _rows, _sums
from xentjax._platform import on_one_cpu
from xentjax._targets import SparseTargets


class Block(NamedTuple):
    """What a block of classes tells of each example; every field is [...].

    To derivatives m is a constant: a loss does not change when all logits and m shift.
    """

    m: jax.Array
    others: jax.Array
    mass: jax.Array
    mass_below: jax.Array
    excess: jax.Array

    @property
    def rest(self) -> jax.Array:
        """Σ_v exp(z_v − m) − 1."""
        return self.others / _shift_and_top(self.m)[1]

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
        return _finite(self.m)[..., None], jnp.log1p(self.rest)[..., None]

    def softmax(self, logits: jax.Array) -> jax.Array:
        """Returns p, [..., V]."""
        shift, top = _shift_and_top(self.m)
        return jnp.exp(wide(logits) - shift[..., None]) * (1 / (top + self.others))[..., None]


def _surprisal(z, top, log_sum):
    return (top - wide(z)) + log_sum


def block_of(logits: jax.Array, targets: jax.Array | SparseTargets, shares: bool = False) -> Block:
    """Returns the Block of logits [..., V] under the target mass on those V classes.

    Args:
      logits: [..., V].
      targets: The mass on those classes, ready for arithmetic.
      shares: Whether `logits_cotangent` of the same logits follows, and shares the exponentials
        where it can: they become the cotangent in place.
    """
    # Small sums are the same whether the cotangent follows or not, to the last digit.
    small = logits.size <= _rows.CACHED
    left_out = _left_out(logits, targets) if shares or small else None

    def lean(function):
        return function if _is_lean(logits, targets) else on_one_cpu(_by_rows(function), function)

    if left_out is None:
        return lean(_block_at_once)(logits, targets)
    m, *sums = lean(_max_and_target_sums)(logits, targets)
    return Block(m, _others(logits, m, left_out), *sums)


def _block_at_once(logits, targets):
    m, *sums = _max_and_target_sums(logits, targets, before_below=True)
    return Block(m, _others(logits, m, None), *sums)


def _is_lean(logits, targets):
    """Returns whether XLA's CPU backend reduces logits and targets without a copy that matters."""
    if logits.size <= _rows.CACHED:
        return True
    light = _is_light_elsewhere(targets) or logits.size < _rows.LARGE
    return _is_wide(logits) and _sums.is_cut(logits) and light


def _by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` of (logits, targets) as a loop over a few rows at a time.

    `function` returns arrays [...], each row's from that row alone.
    """

    def over_rows(logits, targets):
        batch, num_classes = logits.shape[:-1], logits.shape[-1]
        size = math.prod(batch)
        flat_logits = logits.reshape(size, num_classes)
        flat_targets = _masses.flattened(targets)

        def of_rows(first, count):
            if count == size:
                return function(flat_logits, flat_targets)
            z = _rows.slice_unconverted(flat_logits, first, count, 0)
            return function(z, _masses.rows_of(flat_targets, first, count))

        out = _rows.in_pieces(of_rows, size, num_classes, flat_logits[:, 0])
        return jax.tree.map(lambda x: x.reshape(batch), out)

    return over_rows


def _max_and_target_sums(logits, targets, before_below=False):
    """Returns m, mass, mass_below and excess."""
    m = wide(_sums.largest(jax.lax.stop_gradient(logits), before_below))
    top = _finite(m)[..., None]
    return (
        m,
        _masses.total_mass(targets, logits.shape[-1]),
        # Where several classes have z = m, p > 1/2 holds for none, and this is not used.
        _masses.mass_below(targets, wide(logits), top),
        _masses.expectation(targets, logits, lambda z, top: top - wide(z), top),
    )


def _left_out(logits, targets):
    """Returns the classes left out of the sum of the exponentials that the cotangent shares.

    They are the few that hold mass: where it may be near 1, rest has to be exact if it is small.
    None: nothing is shared, and the largest logit is what is left out.
    """
    # Of narrow logits they are an array more, and dear if it is large.
    shared = _is_wide(logits) or logits.size < _rows.LARGE
    if not (shared and _is_light_elsewhere(targets) and targets.indices.shape[-1]):
        return None
    return targets.indices


def _is_light_elsewhere(targets):
    """Returns whether no class has mass near 1 but those of sparse targets' indices."""
    return isinstance(targets, SparseTargets) and targets.background is None


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
    shift, _ = _shift_and_top(m)
    fallen = (1 + block.rest) * jnp.exp(block.m - shift)
    return (
        jnp.where(is_max, block.others, fallen),
        is_max.astype(m.dtype),
        block.mass,
        jnp.where(is_max, block.mass_below, block.mass),
        block.excess + _masses.times_mass(block.mass, _finite(m) - block.m),
    )


def _from_summands(m, others, maxima, mass, mass_below, excess):
    ties = jnp.maximum(maxima - 1, 0) * _shift_and_top(m)[1]
    return Block(m, others + ties, mass, mass_below, excess)


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
    rows = _of_rows(block, loss_cotangent, lse_cotangent)
    num_classes = logits.shape[-1]
    if not isinstance(targets, SparseTargets):
        return _all_entries(rows, logits, targets).astype(logits.dtype)
    background = None
    if targets.background_mass is not None:
        background = _masses.background_over(targets, num_classes)
    if not _is_light_elsewhere(targets):
        elsewhere = _all_entries(rows, logits, background)
    else:
        shared = shares and logits.size > _rows.CACHED  # Fewer are soon computed again.
        left_out = _left_out(logits, targets) if shared else None
        elsewhere = _plain_entries(rows, logits, background, left_out)
    picked = _masses.at_classes(logits, targets.indices)
    mass = _masses.mass_at(targets, targets.indices, num_classes)
    at_indices = _entries(rows, picked, mass)
    return _masses.put_at(elsewhere, targets.indices, at_indices, logits.dtype)


class _OfRows(NamedTuple):
    """What a cotangent's entries need to know of their example, [..., 1].

    p = exp(z − shift) · scale; `top` is the z of which p > 1/2, or NaN, and top_error is its
    mass · p − t.
    """

    of_loss: jax.Array
    of_lse: jax.Array
    mass: jax.Array
    shift: jax.Array
    scale: jax.Array
    top: jax.Array
    top_error: jax.Array


def _of_rows(block, loss_cotangent, lse_cotangent):
    shift, top = _shift_and_top(block.m)
    scale = 1 / (top + block.others)
    rows = _OfRows(
        loss_cotangent,
        lse_cotangent,
        block.mass,
        shift,
        scale,
        jnp.where(block.others < top, _finite(block.m), jnp.nan),
        block.mass_below - block.mass * jax.lax.stop_gradient(block.others * scale),
    )
    return jax.tree.map(lambda x: x[..., None], rows)


def _entries(rows, z, t):
    """Returns the cotangent of logits z [..., J] that hold mass t [..., J], be it near 1."""
    p = jnp.exp(wide(z) - rows.shift) * rows.scale
    # The value is that of top_error, where it is used; the derivative is that of mass · p − t.
    of_top = rows.top_error + rows.mass * (p - jax.lax.stop_gradient(p))
    error = jnp.where(wide(z) == rows.top, of_top, rows.mass * p - t)
    return rows.of_loss * error + rows.of_lse * p


def _all_entries(rows, logits, t):
    """Returns `_entries` of logits [..., V] that hold mass t [..., V], be it near 1."""

    def one_replaced(rows, logits, t):
        top = _sums.argmax(logits)[..., None]
        of_top = _entries(rows, _masses.at_classes(logits, top), _masses.at_classes(t, top))
        plain = _plain_entries(rows, logits, t)
        return _masses.put_at(plain, top, of_top, plain.dtype)

    # Elsewhere a comparison costs less than to find the top. XLA's CPU backend would make an array
    # of p, which is used twice.
    gains = _is_wide(logits) and _sums.is_cut(logits)
    return (on_one_cpu(one_replaced, _entries) if gains else _entries)(rows, logits, t)


def _plain_entries(rows, z, t, left_out=None):
    """Returns the cotangent of logits z [..., J], all right but where p and t are near 1.

    Args:
      rows: What they need to know of their example.
      z: [..., J].
      t: The mass that they hold, [..., J] or [..., 1]; None if they hold none.
      left_out: Classes whose exponentials are taken to be 0; None: none.
    """
    exponentials = jnp.exp(wide(z) - rows.shift)
    if left_out is not None:
        exponentials = _masses.without(exponentials, left_out)
    of_p = rows.of_loss * rows.mass + rows.of_lse
    entries = of_p * (exponentials * rows.scale)
    return entries if t is None else entries - rows.of_loss * t


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
def _others(logits: jax.Array, m: jax.Array, left_out: jax.Array | None) -> jax.Array:
    """Returns Σ_v exp(z_v − shift) without one of the largest, [...]; 0 where all z are −inf.

    Args:
      logits: [..., V].
      m: Their maximum, [...]; its derivative is not asked for.
      left_out: Classes [..., K]: the sum has full relative precision where the largest logit is
        among them, and that of the sum with the largest elsewhere. None: it has it everywhere.
    """
    z, top_z = wide(logits), _finite(m)[..., None]
    shift, top = _shift_and_top(m)
    shift = shift[..., None]
    if left_out is None:
        others, maxima = _sums.below(lambda z, shift: jnp.exp(z - shift), z, top_z, z, shift)
    else:
        apart = _masses.at_classes(z, left_out)
        apart = jnp.where(_masses.is_repeated(left_out), -jnp.inf, apart)
        others = jnp.where(apart < top_z, jnp.exp(apart - shift), 0).sum(-1)
        others += _sums.total(_masses.without(jnp.exp(z - shift), left_out))
        maxima = jnp.where(apart == top_z, 1.0, 0.0).sum(-1)
    return jnp.maximum(others + (maxima - 1) * top, 0)


@_others.defjvp
def _others_jvp(primals, tangents):
    (logits, m, left_out), (tangent, *_) = primals, tangents
    shift, _ = _shift_and_top(m)
    exponentials = jnp.exp(wide(logits) - shift[..., None])
    return _others(logits, m, left_out), jnp.sum(exponentials * wide(tangent), axis=-1)


def wide_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the dtype of the arithmetic: float32, or float64 where there is one among dtypes."""
    return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def wide(x: jax.Array) -> jax.Array:
    """Returns x in the dtype of the arithmetic."""
    return x.astype(wide_dtype(x.dtype))


def _is_wide(x: jax.Array) -> bool:
    return x.dtype == wide_dtype(x.dtype)


def _finite(m: jax.Array) -> jax.Array:
    """Returns what is subtracted from the logits: m, or 0 where m is −inf."""
    return jnp.where(m == -jnp.inf, 0, m)


@functools.partial(jax.jit, inline=True)  # Traced once for all of its uses.
def _shift_and_top(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (shift, exp(m − shift)), both [...]; exponentials are taken of z − shift.

    Rounding z − m is an error of half an ulp of |z − m|, and so a relative error of exp: 4e-6 at 80
    in float32. So the shift is 0, and nothing rounded, unless m leaves the range from _LOW to
    _HIGH; then it is how far m does, in whole numbers. Where |shift| ≤ |z|, that rounds nothing
    either: z − shift is a multiple of an ulp of z, and no larger. Elsewhere |z − shift| < 16, down
    to the last z that makes a difference, and so half an ulp of it is at most 5e-7.
    """
    top = jax.lax.stop_gradient(_finite(m))
    level = jnp.round(top)
    near = jnp.abs(level) < 2**22  # Farther out level − _HIGH would be rounded.
    shift = jnp.where(near, level - jnp.clip(level, _LOW, _HIGH), level)
    return shift, jnp.exp(top - shift)


# Above _HIGH, float32 has room for the sum of 6 million exponentials. Below _LOW, it has room for
# an exp(−94) beside the largest, to add to an exp(−80).
_LOW, _HIGH = 7, 72
