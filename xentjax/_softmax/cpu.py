"""The CPU backend: the same formulas, in the order in which XLA's CPU compiler is fast.

| summary | when |
|---|---|
| portable | fewer than 2¹⁴ logits: they cost less than another kernel does |
| whole | the gradient follows, and its array may hold the exponentials until then |
| row blocks | all else: exponentials of a few rows at a time stay in the cache |

| gradient | when |
|---|---|
| portable | fewer than 2¹⁴ logits |
| whole | float32 and float64, and small arrays |
| row blocks | bfloat16 and float16: no float32 array of all logits is made |

A whole gradient asks for the exponentials by the formula of the whole summary, so that XLA computes
them once, and the gradient takes their place.

Three habits of the compiler (seen on jaxlib 0.10.2 and 0.12) make the difference. A sum with an
exponential in it is not vectorised where rows are long, but an array of exponentials and its sum
are. A sum and what follows it become one kernel, which runs on one core. A choice between classes
inside a sum takes as long as the exponentials; overwriting an entry before the sum costs nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xentjax._jax.dtypes import wide
from xentjax._softmax import portable
from xentjax._softmax.partial import GradientTerms, PartialSoftmax, exponentials, finite
from xentjax._targets.mass import DenseMass, Mass, SparseMass, add_at, at_class, set_at


def summarise(
    logits: jax.Array, mass: Mass, with_gradient: bool, rows: int | None = None
) -> PartialSoftmax:
    """Returns the PartialSoftmax of logits [..., V], so many rows at a time; None: all at once."""

    def of_rows(logits: jax.Array, mass: Mass) -> PartialSoftmax:
        return _summarise(logits, mass, with_gradient)

    return (
        of_rows(logits, mass) if rows is None else _map_row_blocks(of_rows, logits, mass, rows=rows)
    )


def _summarise(logits, mass, with_gradient):
    z = wide(logits)
    m = fusion_barrier(z.max(-1))
    e = _exponentials(z, m, logits, mass)
    mass_of_rest = None
    # A choice of 0 · inf = 0 in a sum is slow: such a cost is an array before it is summed.
    add = _sum_of_array if mass.has_prior else _sum
    excess = mass.excess(z, finite(m), add)
    if mass.has_prior:
        rest, held = _rest_and_held(e, z, m, mass)
        if with_gradient:
            mass_of_rest = jnp.maximum(mass.total(_sum) - held, 0)
    else:
        c = mass.leader(logits)
        rest = portable.rest_beside(_sum(e), wide(at_class(logits, c)), m)
        if with_gradient:
            mass_of_rest = mass.beside(c)
    return PartialSoftmax(m, rest, mass.total(_sum), mass_of_rest, excess)


def gradient(
    terms: GradientTerms,
    whole: PartialSoftmax,
    logits: jax.Array,
    mass: Mass,
    rows: int | None = None,
) -> jax.Array:
    """Returns what `portable.gradient` does, so many rows at a time; None: all at once."""
    if rows is None:
        return _gradient(terms, whole, logits, mass)
    args = terms, whole, logits, mass
    return _map_row_blocks(_gradient, *args, rows=rows)


def _gradient(terms, whole, logits, mass):
    z = wide(logits)
    e = _exponentials(z, whole.max_logit, logits, mass)
    entries = portable.less_density(e * terms.per_exponential[..., None], terms, mass)
    if mass.has_prior:
        leads = (z == whole.max_logit[..., None]) & terms.leader_is_heavy[..., None]
        entries = jnp.where(leads, terms.leader_entry[..., None], entries)
        return portable.less_points(entries, terms, whole, logits, mass).astype(logits.dtype)
    indices, weights = mass.points
    c, entry = portable.entry_of_leader(terms, whole, logits, mass)
    if indices.shape[-1] > 1:
        entries = add_at(entries, indices, -terms.loss_cotangent[..., None] * weights)
    return set_at(entries, c, entry).astype(logits.dtype)


def _exponentials(z, max_logit, logits, mass):
    """Returns exp(z − m), [..., V], with 0 at the point that may be the leader."""
    e = exponentials(z, max_logit)
    if mass.has_prior:
        return e
    c = mass.leader(logits)
    return set_at(e, c, jnp.zeros_like(max_logit))


def _rest_and_held(e, z, max_logit, mass):
    """Returns (rest, the mass on the leader), where any class may be the heavy one.

    Where the total is below 2, the chunk of classes with the largest sum has the leader, and it
    alone is looked at once more.
    """
    density = jnp.broadcast_to(mass.density(), z.shape)
    sums = _sum_of_array(_chunks(e))
    heaviest = jnp.argmax(sums, axis=-1)
    e_there, z_there, t_there = (_chunk(x, heaviest) for x in (e, z, density))
    leads = z_there == max_logit[..., None]
    below = _sum(jnp.where(leads, jnp.zeros_like(e_there), e_there))
    held = _sum(jnp.where(leads, t_there, jnp.zeros_like(t_there)))
    elsewhere = jnp.where(portable.is_class(heaviest, sums), jnp.zeros_like(sums), sums).sum(-1)
    if mass.points is not None:
        held = held + mass.at(_class_of(leads, heaviest, e_there.shape[-1]))
    total = fusion_barrier(sums.sum(-1))
    return portable.rest_below(elsewhere + below, total), held


def _class_of(leads, chunk, length):
    return chunk * length + jnp.argmax(leads, axis=-1)


def _chunks(x):
    """Returns x [..., V] as chunks of classes, [..., C, L]."""
    return x.reshape(*x.shape[:-1], -1, _chunk_length(x.shape[-1]))


def _chunk(x, which):
    """Returns one chunk of classes of each example, [..., L]."""
    return jnp.take_along_axis(_chunks(x), which[..., None, None], axis=-2, mode="clip")[..., 0, :]


def _chunk_length(num_classes: int) -> int:
    """Returns the least length from 100 on that divides the classes; or all of them."""
    lengths = range(max(100, num_classes // 128), num_classes // 2 + 1)
    return next((n for n in lengths if num_classes % n == 0), num_classes)


def _sum(x: jax.Array) -> jax.Array:
    """Returns Σ_v x_v, [...], in a kernel of its own."""
    return fusion_barrier(x.sum(-1))


def _sum_of_array(x: jax.Array) -> jax.Array:
    """Returns Σ_v x_v, [...], of numbers that are an array before they are summed."""
    return _sum(jax.lax.optimization_barrier(x))


def fusion_barrier(x: jax.Array) -> jax.Array:
    """Returns x, in a form that XLA does not know to be x, and so does not fuse with its maker."""
    return jnp.where(jnp.isnan(x), jnp.full_like(x, jnp.nan), x)


def _map_row_blocks(function: Callable[..., Any], *args: Any, rows: int) -> Any:
    """Returns function(*args), a tree of arrays [...] or [..., V], so many rows at a time.

    The arguments are masses and trees of arrays, logits among them.
    """
    logits = next(x for x in args if isinstance(x, jax.Array))
    batch = logits.shape[:-1]
    size = math.prod(batch)

    def map_rows(change, tree):
        def one(x):
            return x.map_examples(change) if _is_mass(x) else change(x)

        return jax.tree.map(one, tree, is_leaf=_is_mass)

    args = map_rows(lambda x: x.reshape(size, *x.shape[len(batch) :]), args)
    # The last block ends where the rows do: it repeats some rows of the one before.
    starts = jnp.minimum(jnp.arange(-(-size // rows)) * rows, size - rows)

    def step(out, start):
        # Without the barrier XLA would convert all bfloat16 logits before the loop.
        here, start = jax.lax.optimization_barrier((args, start))
        parts = function(*map_rows(lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows, 0), here))

        def put(x, part):
            return jax.lax.dynamic_update_slice_in_dim(x, part, start, 0)

        return jax.tree.map(put, out, parts), None

    shapes = jax.eval_shape(function, *args)
    like = logits.reshape(size, -1)[:1, :1]  # It varies over the mesh axes that results vary over.
    zero = jnp.zeros_like(like.reshape(()))
    out = jax.tree.map(lambda s: jnp.broadcast_to(zero.astype(s.dtype), s.shape), shapes)
    out, _ = jax.lax.scan(step, out, starts)
    return jax.tree.map(lambda x: x.reshape(batch + x.shape[1:]), out)


def _is_mass(x):
    return isinstance(x, DenseMass | SparseMass)
