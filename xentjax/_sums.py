"""Sums and maxima over classes, in the order in which they are fast.

XLA's CPU backend reduces rows of a few thousand numbers up to six times as fast as longer ones: it
keeps what it sums in registers, an exponential too, and shares the rows out among its threads. So
there a long row is reduced in chunks first.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from xentjax import _rows
from xentjax._platform import on_one_cpu

# A chunk has so many classes at least and at most, and a row has so many chunks at most, if it can.
_LEAST, _MOST, _COUNT = 100, 2**13, 128
# Rows of more classes are slow to reduce.
_LONG = 2**14
# What has fewer numbers is soon compared, and sooner compiled as it is.
_SMALL = 2**14


def over_classes(
    function: Callable[..., jax.Array], *arrays: jax.Array, before_below: bool = False
) -> jax.Array:
    """Returns Σ_v function(*arrays)_v, [...].

    Args:
      function: Elementwise; it closes over no arrays.
      arrays: [..., V] or [..., 1], as they broadcast.
      before_below: Whether `below` follows, which makes the same chunks' sums.
    """
    return _apart(_reduced(jnp.sum, jnp.add, function, *arrays, always=before_below))


def largest(x: jax.Array, before_below: bool = False) -> jax.Array:
    """Returns max_v x_v of x [..., V]; `below` makes the same chunks' maxima, if it follows."""
    return _reduced(jnp.max, jnp.maximum, _itself, x, always=before_below)


def total(x: jax.Array, before_below: bool = False) -> jax.Array:
    """Returns Σ_v x_v of x [..., V], as `over_classes` does."""
    return over_classes(_itself, x, before_below=before_below)


def _itself(x):
    return x


def _reduced(reduce, merge, function, *arrays, always=False):
    """Reduces in chunks if rows are long, and `always` if they are cut at all."""
    of_all_classes = max(arrays, key=jnp.size)

    def whole(*arrays):
        return reduce(function(*arrays), axis=-1)

    def by_chunks(*arrays):
        chunks, rests = zip(*map(_chunks_of, arrays), strict=True)
        of_chunks = reduce(_apart(whole(*chunks)), axis=-1)
        return merge(of_chunks, whole(*rests)) if _has_rest(of_all_classes) else of_chunks

    chunked = is_cut(of_all_classes) and (always or of_all_classes.shape[-1] > _LONG)
    return (on_one_cpu(by_chunks, whole) if chunked else whole)(*arrays)


def below(
    function: Callable[..., jax.Array], z: jax.Array, top: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns Σ_{v: z_v < top} function(*arrays)_v and the number of v with z_v = top, both [...].

    The number is that of those the sum leaves out: some that are equal may be in it.

    Args:
      function: Elementwise; it closes over no arrays.
      z: [..., V].
      top: The largest z, [..., 1].
      arrays: [..., V] or [..., 1].
    """

    def whole(z, top, *arrays):
        addends = jnp.where(z < top, function(*arrays), 0)
        return _apart(addends.sum(-1)), jnp.where(z == top, 1.0, 0.0).sum(-1)

    def by_chunks(z, top, *arrays):
        """Compares only in the first of the chunks with the largest z, and in the rest."""
        arrays = z, top, *arrays
        chunks, rests = zip(*map(_chunks_of, arrays), strict=True)
        first = jnp.argmax(chunks[0].max(-1), axis=-1)
        sums = function(*chunks[2:]).sum(-1)
        is_first = jnp.arange(sums.shape[-1]) == first[..., None]
        others, equal = _at_chunk(whole, first, chunks)
        others += jnp.where(is_first, 0, sums).sum(-1)
        if not _has_rest(z):
            return others, equal
        return jax.tree.map(jnp.add, (others, equal), whole(*rests))

    return (on_one_cpu(by_chunks, whole) if is_cut(z) else whole)(z, top, *arrays)


def argmax(z: jax.Array) -> jax.Array:
    """Returns the first v with the largest z_v of z [..., V], int[...]."""

    def whole(z):
        return jnp.argmax(z, axis=-1)

    def by_chunks(z):
        chunks, rest = _chunks_of(z)
        maxima = chunks.max(-1)
        first = whole(maxima)
        v = chunks.shape[-1] * first + _at_chunk(whole, first, (chunks,))
        if not _has_rest(z):
            return v
        in_rest = z.shape[-1] - rest.shape[-1] + whole(rest)
        return jnp.where(rest.max(-1) > maxima.max(-1), in_rest, v)

    return (on_one_cpu(by_chunks, whole) if is_cut(z) else whole)(z)


def _at_chunk(function, which, chunks):
    """Returns function(*(x[..., which, :] for x in chunks)), a few rows at a time."""
    batch, size = which.shape, which.size
    flat = [x.reshape(size, *x.shape[len(batch) :]) for x in chunks]
    which = which.reshape(size)

    def of_rows(first, count):
        rows = first + jnp.arange(count)
        c = jax.lax.dynamic_slice_in_dim(which, first, count)

        def picked(x):
            return x.at[rows, jnp.minimum(c, x.shape[1] - 1)].get(mode="promise_in_bounds")

        return function(*map(picked, flat))

    width = sum(x.shape[-1] for x in flat)
    out = _rows.in_pieces(of_rows, size, width, which)
    return jax.tree.map(lambda x: x.reshape(batch), out)


def _apart(x):
    """Returns x, of which the compiler does not know that it is x.

    XLA's CPU backend makes one kernel of a sum and those after it, be it the sum over chunks or the
    mean of the losses, and that is slow, or runs on one core. A choice between a number and itself
    keeps them apart.
    """
    return jnp.where(jnp.isnan(x), jnp.nan, x)


def is_cut(x: jax.Array) -> bool:
    """Returns whether x [..., V] gains if it is cut into chunks of classes."""
    fits = x.size <= 2 * _rows.CACHED and x.shape[-1] >= 2 * _LEAST
    return x.size >= _SMALL and (_even(x.shape[-1]) is not None or fits)


def _chunks_of(x):
    """Returns x [..., V] as chunks [..., C, L] of classes, and the rest of it [..., V − C · L].

    Of x [..., 1], which broadcasts over classes, it is x itself as [..., 1, 1] and [..., 1].
    """
    num_classes = x.shape[-1]
    if num_classes == 1:
        return x[..., None], x
    length = _length(num_classes)
    count = num_classes // length
    end = count * length
    return x[..., :end].reshape(*x.shape[:-1], count, length), x[..., end:]


def _has_rest(x):
    return x.shape[-1] % _length(x.shape[-1]) != 0


def _length(num_classes):
    """Returns how many classes are in a chunk."""
    return _even(num_classes) or min(2**10, max(_LEAST, num_classes // 8))


@functools.cache
def _even(num_classes):
    """Returns the least length of chunks that leaves no rest, or None where there is none."""
    least = max(_LEAST, min(num_classes // _COUNT, _MOST))
    lengths = range(least, min(_MOST, num_classes // 2) + 1)
    return next((length for length in lengths if num_classes % length == 0), None)
