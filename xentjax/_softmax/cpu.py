"""The CPU backend: the same formulas, in the order in which XLA's CPU compiler is fast.

| summary | when |
|---|---|
| portable | fewer than 2¹⁴ logits: they cost less than another kernel does |
| whole | the exponentials may be an array: of fewer than 2²³, or of the gradient that follows |
| row blocks | all else, and dense mass: a few rows at a time stay in the cache |

| gradient | when |
|---|---|
| portable | fewer than 2¹⁴ logits; 2²³ and more of bfloat16 or float16: no float32 array is made |
| whole | all else |

A whole gradient asks for the exponentials by the formula of the whole summary, so that XLA computes
them once, and the gradient takes their place.

Three habits of the compiler (seen on jaxlib 0.10.2 and 0.12) make the difference. A sum with an
operation in it is not vectorised where rows are long, but those of a chunk of a row, or of an array
that is made before, are. A sum and the operations after it become one kernel, which runs on one
core. A choice between classes inside a sum takes as long as the exponentials; overwriting an entry
before the sum costs little.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xentjax._jax.dtypes import wide
from xentjax._softmax import portable
from xentjax._softmax.partial import (
    LIFT,
    GradientTerms,
    PartialSoftmax,
    exponentials,
    finite,
    scaled,
)
from xentjax._targets.mass import (
    Mass,
    add_at,
    at_class,
    map_examples,
    only_points_are_heavy,
    set_at,
)

MIN_CHUNK = 100
"""Sums over chunks of fewer classes take longer than the sum over all of them."""


def summarise(
    logits: jax.Array, mass: Mass, with_gradient: bool, rows: int | None = None
) -> PartialSoftmax:
    """Returns the PartialSoftmax of logits [..., V], so many rows at a time; None: all at once."""
    if only_points_are_heavy(mass):
        return _with_a_point_for_leader(logits, mass, with_gradient, rows)
    return _with_any_leader(logits, mass, with_gradient, rows)


def _with_a_point_for_leader(logits, mass, with_gradient, rows):
    """The summary where no class but a point may be heavy: a point is left out of the sum."""
    point, has_gaps = mass.leader(logits), mass.background_mass is not None

    def sums_of(logits, point):
        z = wide(logits)
        m = _max(z)
        others = _sum(set_at(exponentials(z, m), point, jnp.zeros_like(m)))
        if not has_gaps:
            return m, others
        # Without a barrier XLA would make an array of m, as large as the logits.
        return m, others, _sum(jax.lax.optimization_barrier(finite(m))[..., None] - z)

    m, others, *gaps = _map_row_blocks(sums_of, logits, point, rows=rows)
    rest = portable.rest_beside(others, wide(at_class(logits, point)), m)
    excess = mass.excess(logits, finite(m), lambda _: gaps[0])
    return PartialSoftmax(
        m, rest, mass.total(), mass.beside(point) if with_gradient else None, excess
    )


def _with_any_leader(logits, mass, with_gradient, rows):
    """The summary where any class may be heavy: the leader is looked for."""

    def of_rows(logits, mass):
        z = wide(logits)
        m = _max(z)
        e = exponentials(z, m)
        below = jnp.where(e >= LIFT, jnp.zeros_like(e), e)
        rest = portable.rest_below(_sum_of_array(below), _sum_of_array(e))
        # A choice of 0 · inf = 0 in a sum is slow: the cost is an array before it is summed.
        excess = mass.excess(z, finite(m), _sum_of_array)
        mass_of_rest = mass.below(z, m) if with_gradient else None
        return PartialSoftmax(m, rest, mass.total(_sum), mass_of_rest, excess)

    return _map_row_blocks(of_rows, logits, mass, rows=rows)


def gradient(
    terms: GradientTerms, whole: PartialSoftmax, logits: jax.Array, mass: Mass
) -> jax.Array:
    """Returns what `portable.gradient` does, in place of the exponentials."""
    z = wide(logits)
    e = _exponentials(z, whole.max_logit, logits, mass)
    entries = portable.less_density(e * terms.per_exponential[..., None], terms, mass)
    if not only_points_are_heavy(mass):
        leads = (z == whole.max_logit[..., None]) & terms.leader_is_heavy[..., None]
        entries = jnp.where(leads, terms.leader_entry[..., None], entries)
        return portable.less_points(entries, terms, whole, logits, mass).astype(logits.dtype)
    indices, weights = mass.points
    c, entry = portable.entry_of_leader(terms, whole, logits, mass)
    if indices.shape[-1] > 1:
        entries = add_at(entries, indices, -scaled(terms.loss_cotangent[..., None], weights))
    return set_at(entries, c, entry).astype(logits.dtype)


def _exponentials(z, max_logit, logits, mass):
    """Returns exp(z − m), [..., V], with 0 at the point that may be the leader."""
    e = exponentials(z, max_logit)
    if not only_points_are_heavy(mass):
        return e
    c = mass.leader(logits)
    return set_at(e, c, jnp.zeros_like(max_logit))


def _chunks(x):
    """Returns x [..., V] as chunks of classes, [..., C, L]."""
    return x.reshape(*x.shape[:-1], -1, _chunk_length(x.shape[-1]))


def _chunk_length(num_classes: int) -> int:
    """Returns the least length of at least MIN_CHUNK that divides the classes; or all of them."""
    lengths = range(max(MIN_CHUNK, num_classes // 128), num_classes // 2 + 1)
    return next((n for n in lengths if num_classes % n == 0), num_classes)


def _max(x):
    """Returns max_v x_v, [...]."""
    return fusion_barrier(fusion_barrier(_chunks(x).max(-1)).max(-1))


def _sum(x: jax.Array) -> jax.Array:
    """Returns Σ_v x_v, [...], in kernels of its own: over chunks of classes, and over chunks."""
    return fusion_barrier(_sum_of_chunks(x).sum(-1))


def _sum_of_chunks(x):
    """Returns the sum over each chunk of classes, [..., C]."""
    return fusion_barrier(_chunks(x).sum(-1))


def _sum_of_array(x: jax.Array) -> jax.Array:
    """Returns Σ_v x_v, [...], of numbers that are an array before they are summed."""
    return _sum(jax.lax.optimization_barrier(x))


def fusion_barrier(x: jax.Array) -> jax.Array:
    """Returns x, in a form that XLA does not know to be x, and so does not fuse with its maker."""
    return jnp.where(jnp.isnan(x), jnp.full_like(x, jnp.nan), x)


def _map_row_blocks(function: Callable[..., Any], *args: Any, rows: int | None) -> Any:
    """Returns function(*args), a tree of arrays [...], so many rows at a time.

    The arguments are masses and trees of arrays, logits among them. None is all rows at once.
    """
    if rows is None:
        return function(*args)
    logits = next(x for x in args if isinstance(x, jax.Array))
    batch = logits.shape[:-1]
    size = math.prod(batch)

    args = map_examples(lambda x: x.reshape(size, *x.shape[len(batch) :]), args)
    # The last block ends where the rows do: it repeats some rows of the one before.
    starts = jnp.minimum(jnp.arange(-(-size // rows)) * rows, size - rows)

    def step(out, start):
        # Without the barrier XLA would convert all bfloat16 logits before the loop.
        here, start = jax.lax.optimization_barrier((args, start))
        parts = function(
            *map_examples(lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows, 0), here)
        )

        def put(x, part):
            return jax.lax.dynamic_update_slice_in_dim(x, part, start, 0)

        return jax.tree.map(put, out, parts), None

    shapes = jax.eval_shape(function, *args)
    like = logits.reshape(size, -1)[:1, :1]  # It varies over the mesh axes that results vary over.
    zero = jnp.zeros_like(like.reshape(()))
    out = jax.tree.map(lambda s: jnp.broadcast_to(zero.astype(s.dtype), s.shape), shapes)
    out, _ = jax.lax.scan(step, out, starts)
    return jax.tree.map(lambda x: x.reshape(batch + x.shape[1:]), out)
