"""The softmax of many logits on one CPU, in the order in which XLA's CPU backend is fast.

It is the formula of `_blocks` and has the same derivative; what differs is how sums are made.

* Rows of a few thousand numbers are reduced up to six times as fast as longer ones, exponentials in
  them too, which stay in registers then. So a row is reduced in chunks of classes first.
* The largest logit is left out of its own chunk alone, which is looked at once more. That is the
  chunk of the largest sum, unless no p is above 1/2, and then no digits are at stake.
* The shift is guessed from a few of the logits, and the exponentials are made once more in the rare
  case that it does not fit. To find the largest logit first would be a pass of its own.
* The exponentials that are summed for the loss become the gradient in place, as XLA sees that both
  ask for the same array.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xentjax._softmax import partial as _blocks
from xentjax._softmax import rows as _rows
from xentjax._softmax.partial import Block, finite, shift_of, wide, wide_dtype
from xentjax._targets import mass as _masses
from xentjax._targets.mass import Sums, opaque
from xentjax._targets.types import SparseTargets


def gains(logits: jax.Array, targets: jax.Array | SparseTargets) -> bool:
    """Returns whether what is here may be faster than the formula as it stands."""
    converted = not _is_wide(logits) and isinstance(targets, SparseTargets)
    return converted or logits.size >= _SMALL


def block_of(logits: jax.Array, targets: jax.Array | SparseTargets, shares: bool = False) -> Block:
    """Returns the Block of logits [..., V] under the target mass on those V classes.

    Args:
      logits: [..., V].
      targets: The mass on those classes, ready for arithmetic.
      shares: Whether `logits_cotangent` of the same arguments follows.
    """
    apart = _apart_of(logits, targets, shares)
    if _is_guessed(logits, targets, apart):
        if apart is None:
            return _block_by_guess(logits, targets, shares)
        return _block_by_guess_apart(logits, targets, apart)
    if apart is not None:
        shift = _shift(logits)
        return _block_apart(shift, _sum_elsewhere(shift, logits, apart), logits, targets, apart)
    if _is_simple(logits, targets):
        return _blocks.block_of(logits, targets)
    by_rows = _by_rows(_block_by_largest if _has_chunks(logits) else _blocks.block_of)
    return by_rows(logits, targets)


def logits_cotangent(
    block: Block,
    logits: jax.Array,
    targets: jax.Array | SparseTargets,
    loss_cotangent: jax.Array,
    lse_cotangent: jax.Array,
    shares: bool = False,
) -> jax.Array:
    """Returns what `_blocks.logits_cotangent` does.

    Args:
      block: Of all classes.
      logits: Those of some classes, [..., V].
      targets: The mass on those classes.
      loss_cotangent: [...].
      lse_cotangent: [...].
      shares: Whether `block_of` of the same logits and targets made the block.
    """
    rows = _blocks.cotangent_rows(block, loss_cotangent, lse_cotangent)
    apart = _apart_of(logits, targets, shares)
    if shares and _is_guessed(logits, targets, apart):
        e = _shared(block.shift, logits, apart)
    else:
        e = _own(block.shift, logits, apart)
    if not isinstance(targets, SparseTargets):
        return _entries(rows, e, logits, targets).astype(logits.dtype)
    background = _masses.background_over(targets, logits.shape[-1])
    if _blocks.is_light_elsewhere(targets):
        entries = _blocks.plain_entries(rows, e, background)
    else:
        entries = _entries(rows, e, logits, background)
    at_indices = _blocks.entries_at_indices(rows, block, logits, targets)
    # In place if it need not be converted after that; and small arrays are soon scattered into.
    choose = not _is_wide(logits) and logits.size >= _SMALL
    put = _masses.put_at if choose else _masses.scattered
    return put(entries, targets.indices, at_indices).astype(logits.dtype)


def _entries(rows, e, z, t):
    """Returns entries, be p and t near 1; not made to be differentiated, of which p is an array."""
    return jnp.where(wide(z) == rows.top, rows.top_entry, _blocks.plain_entries(rows, e, t))


def _apart_of(logits, targets, shares):
    """Returns the classes [..., K] taken out of the sum before it is made; None: the largest is.

    To take the heavy classes out costs less, if the exponentials are an array.
    """
    makes_array = shares or logits.size <= _rows.CACHED
    fits = logits.size >= _SMALL and (_is_wide(logits) or logits.size < _rows.LARGE)
    return _blocks.heavy_classes(targets) if makes_array and fits else None


def _is_simple(logits, targets):
    """Returns whether the formula as it stands is as good: it makes an array, but no large one."""
    if not isinstance(targets, SparseTargets) or targets.background is not None:
        return False
    once = not _has_chunks(logits) if _is_wide(logits) else targets.background_mass is None
    return logits.size < _SMALL or (once and logits.size < _rows.LARGE)


def _is_guessed(logits, targets, apart):
    """Returns whether the shift is guessed, of all logits at once."""
    if not _is_wide(logits) or logits.size <= _rows.CACHED:
        return False
    # Several backgrounds together would be an array.
    light = not isinstance(targets, SparseTargets) or targets.background is None
    return apart is not None or (light and _has_chunks(logits))


def _guess(logits):
    """Returns a shift that fits most logits, from a few of them: mostly 0."""
    return shift_of(wide(logits[..., :_FEW]).max(-1), low=-8)


_FEW = 16


def _is_missed(shift, m, others, num_classes):
    """Returns whether a guessed shift lost digits: NaN did too."""
    # Of exponentials that underflow, no digit is seen in `others`.
    fits = (others >= num_classes * 2.0**-106) & (others + jnp.exp(finite(m) - shift) <= 2.0**120)
    # Beyond 16, z − shift is rounded if z is below.
    return ~(fits & ((m - shift <= 16) | (shift >= 0)))


def _block_by_guess(logits, targets, shares):
    """Returns the Block, whose shift is a guess, or that of the largest logit if it was missed."""
    guess = _guess(logits)

    def is_missed(block):
        return _is_missed(block.shift, block.m, block.others, logits.shape[-1])

    def goes_on(state):
        block, turn = state
        return (turn == 0) | ((turn == 1) & is_missed(block).any())

    def make(state):
        block, turn = state
        shift = jax.lax.cond(
            turn == 0,
            lambda: guess,
            lambda: jnp.where(is_missed(block), _shift_beyond(logits, block.shift), block.shift),
        )
        return _block(shift, logits, targets), turn + 1

    # What is to be shared is made before the loop. Else one block is less to compile than two.
    nothing = Block(*[jnp.zeros_like(guess)] * len(Block._fields))
    start = (_block(guess, logits, targets), 1) if shares else (nothing, 0)
    return jax.lax.while_loop(goes_on, make, start)[0]


def _block_by_guess_apart(logits, targets, apart):
    """Returns `_block_by_guess`, with classes taken out of the sum."""

    def is_missed(shift, elsewhere):
        m, others = _around(apart, logits, shift, elsewhere)
        return _is_missed(shift, m, others, logits.shape[-1])

    def goes_on(state):
        *sum_of_guess, is_second = state
        return ~is_second & is_missed(*sum_of_guess).any()

    def of_rows(logits, apart, start):
        shift = _shift_beyond(logits, start[..., 0])
        return shift, _sum_elsewhere(shift, logits, apart)

    def once_more(state):
        *sum_of_guess, _ = state
        again = _by_rows(of_rows)(logits, apart, sum_of_guess[0][..., None])
        keep = functools.partial(jnp.where, is_missed(*sum_of_guess))
        return *map(keep, again, sum_of_guess), True

    guess = _guess(logits)
    state = guess, _sum_elsewhere(guess, logits, apart), False
    shift, elsewhere, _ = jax.lax.while_loop(goes_on, once_more, state)
    return _block_apart(shift, elsewhere, logits, targets, apart)


def _shift_beyond(logits, start):
    """Returns the shift of the largest logit, found as the largest z − start.

    In a loop where `start` varies, XLA cannot find it before the loop, as it would the largest z.
    """
    return shift_of(start + _largest(wide(logits) - start[..., None]))


def _shift(logits):
    """Returns the shift of the largest logit."""
    return shift_of(wide(_largest(logits)))


def _block_by_largest(logits, targets):
    return _block(_shift(logits), logits, targets)


def _own(shift, logits, apart):
    """Returns exp(z − shift), [..., V], with 0 in the classes `apart`."""
    e = jnp.exp(_chunks_of(wide(logits)) - shift[..., None, None]).reshape(logits.shape)
    if apart is None:
        return e
    return _masses.scattered(e, apart, jnp.zeros(apart.shape, e.dtype))


def _shared(shift, logits, apart):
    """Returns `_own`, as `_block_by_guess` made it unless the guess did not fit."""
    guess = _guess(logits)

    def goes_on(state):
        _, is_second = state
        return ~is_second & (guess != shift).any()

    def once_more(state):
        _, is_second = state
        return _own(jnp.where(is_second, guess, shift), logits, apart), True

    return jax.lax.while_loop(goes_on, once_more, (_own(guess, logits, apart), False))[0]


def _block(shift, logits, targets):
    """Returns the Block of that shift: the largest logit is left out of its own chunk."""
    of_chunks = opaque(jnp.exp(_chunks_of(wide(logits)) - shift[..., None, None]).sum(-1))
    heaviest = jnp.argmax(of_chunks, axis=-1)
    m, below, maxima = _at_chunk(_below_largest, heaviest, wide(logits), shift[..., None])
    others = _blocks.with_ties(below + _elsewhere(of_chunks, heaviest), maxima, m, shift)
    sums = _InChunks(heaviest)
    return Block(shift, m, others, *_blocks.target_sums(logits, targets, m, sums))


def _below_largest(z, shift):
    """Returns m, Σ_{v: z_v < m} exp(z_v − shift) and the number of z that are m."""
    m = z.max(-1)
    top = finite(m)[..., None]
    below = jnp.where(z < top, jnp.exp(z - shift), 0).sum(-1)
    return m, opaque(below), jnp.where(z == top, 1.0, 0.0).sum(-1)


def _block_apart(shift, elsewhere, logits, targets, apart):
    """Returns the Block of that shift, of the sum of the exponentials that are not `apart`."""
    m, others = _around(apart, logits, shift, elsewhere)
    # Narrow logits that are looked at twice would be converted to an array.
    of_targets = _target_sums if _is_wide(logits) else _by_rows(_target_sums)
    return Block(shift, m, others, *of_targets(logits, targets, m[..., None]))


def _around(apart, logits, shift, elsewhere):
    """Returns m and `others`."""
    z = wide(_masses.at_distinct(logits, apart))
    # At most 16 below log Σ exp z: near enough, if it is none of the z.
    m = jnp.maximum(z.max(-1), shift + jnp.log(elsewhere) - 16)
    return m, _blocks.others_apart(elsewhere, z, m, shift)


def _sum_elsewhere(shift, logits, apart):
    return _SUMS.over_classes(_itself, _own(shift, logits, apart))


def _target_sums(logits, targets, m):
    return _blocks.target_sums(logits, targets, m[..., 0], _SUMS)


class _InChunks(Sums):
    """Sums over classes in chunks of them; of logits of which `heaviest` is the heaviest chunk."""

    def __init__(self, heaviest=None):
        self._heaviest = heaviest

    def over_classes(self, function, *arrays):
        """Returns Σ_v function(*arrays)_v."""
        return opaque(self._over_chunks(function, *arrays).sum(-1))

    def expectation(self, t, cost, z, *rows):
        """Returns Σ_v t_v · cost(z, *rows)_v, with 0 · inf = 0."""
        # XLA sums in half the time without a choice; NaN tells that it needs one.
        total = self.over_classes(lambda t, *arrays: t * cost(*arrays), t, z, *rows)
        each = t.ndim == z.ndim

        def of_rows(z, *rows):
            mass, rows = (rows[0], rows[1:]) if each else (t, rows)
            return _masses.SUMS.expectation(mass, cost, z, *rows)

        def with_choice(z, *rows):
            return _by_rows(of_rows)(z, *((t, *rows) if each else rows))

        return jax.lax.cond(jnp.isnan(total).any(), with_choice, lambda *_: total, z, *rows)

    def below(self, t, z, top):
        """Returns Σ_{v: z_v < top} t_v."""
        t = jnp.broadcast_to(t, z.shape)
        elsewhere = _elsewhere(self._over_chunks(_itself, t), self._heaviest)
        return elsewhere + _at_chunk(super().below, self._heaviest, t, z, top)

    def _over_chunks(self, function, *arrays):
        return opaque(function(*map(_chunks_of, arrays)).sum(-1))


_SUMS = _InChunks()


def _itself(x):
    return x


def _largest(x):
    """Returns max_v x_v of x [..., V]."""
    return opaque(_chunks_of(x).max(-1)).max(-1)


def _elsewhere(of_chunks, which):
    """Returns the sum of of_chunks [..., C] without that of chunk `which`."""
    is_here = jnp.arange(of_chunks.shape[-1]) == which[..., None]
    return opaque(jnp.where(is_here, 0, of_chunks).sum(-1))


def _at_chunk(function, which, *arrays):
    """Returns function(*arrays) of chunk `which` [...] alone, a few rows at a time.

    Arrays are [..., V], or [..., 1] and given as they are.
    """
    size = which.size
    which = which.reshape(size)
    flat = [_chunks_of(x) for x in arrays]
    flat = [x.reshape(size, *x.shape[-2:]) for x in flat]

    def of_rows(first, count):
        rows = first + jnp.arange(count)
        c = jax.lax.dynamic_slice_in_dim(which, first, count)

        def picked(x):
            return x.at[rows, jnp.minimum(c, x.shape[1] - 1)].get(mode="promise_in_bounds")

        return function(*map(picked, flat))

    width = 2 * sum(x.shape[-1] for x in flat)  # And as many numbers made of them.
    out = _rows.in_pieces(of_rows, size, width, which)
    batch = arrays[0].shape[:-1]
    return jax.tree.map(lambda x: x.reshape(batch), out)


def _by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` of logits [..., V] and what is of their rows, a few rows at a time.

    What is of their rows are targets, and arrays [..., n]. It returns a tree of arrays [...], each
    row's from that row alone.
    """

    def over_rows(logits, *others):
        batch, num_classes = logits.shape[:-1], logits.shape[-1]
        size = math.prod(batch)
        flat = logits.reshape(size, num_classes)
        flat_others = tuple(map(_masses.flattened, others))

        def of_rows(first, count):
            if count == size:
                return function(flat, *flat_others)
            z = _rows.slice_unconverted(flat, first, count, 0)
            return function(z, *_masses.rows_of(flat_others, first, count))

        width = num_classes * logits.dtype.itemsize // 2  # And as many numbers made of them.
        out = _rows.in_pieces(of_rows, size, width, flat[:, 0])
        return jax.tree.map(lambda x: x.reshape(batch), out)

    return over_rows


def _is_wide(x):
    return x.dtype == wide_dtype(x.dtype)


def _has_chunks(logits):
    return _length(logits.shape[-1]) < logits.shape[-1]


def _chunks_of(x):
    """Returns x [..., V] as chunks of classes, [..., C, L]; [..., 1] as [..., 1, 1]."""
    return x.reshape(*x.shape[:-1], -1, _length(x.shape[-1]))


@functools.cache
def _length(num_classes):
    """Returns the least length of chunks that leaves no rest, or num_classes: one chunk."""
    least = max(_LEAST, min(num_classes // _COUNT, _MOST))
    lengths = range(least, min(_MOST, num_classes // 2) + 1)
    return next((length for length in lengths if num_classes % length == 0), num_classes)


# Fewer logits are soon summed, and sooner compiled as they are.
_SMALL = 2**14
# A chunk has so many classes at least and at most, and a row has so many chunks at most, if it can.
_LEAST, _MOST, _COUNT = 100, 2**13, 128
