"""The portable backend: plain formulas, which compilers fuse into few passes over the logits.

A backend does two things: it summarises logits under a target mass, and it gives their gradient.
"""

import jax
import jax.numpy as jnp

from xentjax._jax.dtypes import wide
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
    SparseMass,
    add_at,
    at_class,
    at_classes,
    is_class,
    only_points_are_heavy,
    set_at,
)

MAX_COMPARED_POINTS = 4
"""So many points are found by comparing each class with them, in the loop that writes entries."""


def summarise(logits: jax.Array, mass: Mass, with_gradient: bool) -> PartialSoftmax:
    """Returns the PartialSoftmax of logits [..., V] under the mass on these V classes."""
    z = wide(logits)
    m = jnp.max(z, axis=-1)
    e = exponentials(z, m)
    mass_of_rest = None
    if not only_points_are_heavy(mass):
        below = jnp.where(z < m[..., None], e, jnp.zeros_like(e)).sum(-1)
        rest = rest_below(below, e.sum(-1))
        if with_gradient:
            mass_of_rest = mass.below(z, m)
    else:
        c = mass.leader(logits)
        others = jnp.where(is_class(c, z), jnp.zeros_like(e), e).sum(-1)
        rest = rest_beside(others, wide(at_class(logits, c)), m)
        if with_gradient:
            mass_of_rest = mass.beside(c)
    return PartialSoftmax(m, rest, mass.total(), mass_of_rest, mass.excess(z, finite(m)))


def gradient(
    terms: GradientTerms, whole: PartialSoftmax, logits: jax.Array, mass: Mass
) -> jax.Array:
    """Returns the gradient to the logits of some classes, [..., V].

    Args:
      terms: For each example.
      whole: The PartialSoftmax of all classes.
      logits: Those of some classes, [..., V].
      mass: The mass on those classes.
    """
    z = wide(logits)
    per_class = terms.per_exponential[..., None]
    entries = less_density(per_class * exponentials(z, whole.max_logit), terms, mass)
    if not only_points_are_heavy(mass):
        leads = (z == whole.max_logit[..., None]) & terms.leader_is_heavy[..., None]
        entries = jnp.where(leads, terms.leader_entry[..., None], entries)
        return less_points(entries, terms, whole, logits, mass).astype(logits.dtype)
    indices, weights = mass.points
    c, entry = entry_of_leader(terms, whole, logits, mass)
    if indices.shape[-1] > 1:
        entries = _add_points(entries, indices, -scaled(terms.loss_cotangent[..., None], weights))
    if indices.shape[-1] > MAX_COMPARED_POINTS:
        return set_at(entries, c, entry).astype(logits.dtype)
    return jnp.where(is_class(c, z), entry[..., None], entries).astype(logits.dtype)


def _add_points(entries, indices, values):
    """Returns entries [..., V] with values_k added at indices_k, [..., K]."""
    if indices.shape[-1] > MAX_COMPARED_POINTS:
        return add_at(entries, indices, values)
    for k in range(indices.shape[-1]):
        added = entries + values[..., k, None]
        entries = jnp.where(is_class(indices[..., k], entries), added, entries)
    return entries


def rest_below(below: jax.Array, total: jax.Array) -> jax.Array:
    """Returns the lifted rest, from the sum of exponentials below the largest, and of all of them.

    A total of two leaders or more may have several, and then nothing cancels. Its NaN is kept.
    """
    return jnp.where(total < 2 * LIFT, below, total - LIFT)


def rest_beside(others: jax.Array, logit: jax.Array, max_logit: jax.Array) -> jax.Array:
    """Returns the lifted rest, from the sum of exponentials of all classes but one, and its logit.

    If that class does not lead, one of the others is the leader's. No target mass near T is on the
    leader then, and the loss is no small number.
    """
    added = exponentials(logit[..., None], max_logit)[..., 0] - LIFT
    return jnp.where(logit == max_logit, others, others + added)


def less_density(entries: jax.Array, terms: GradientTerms, mass: Mass) -> jax.Array:
    """Returns entries − loss_cotangent · density."""
    density = mass.density()
    if density is None:
        return entries
    return entries - scaled(terms.loss_cotangent[..., None], density)


def less_points(
    entries: jax.Array,
    terms: GradientTerms,
    whole: PartialSoftmax,
    logits: jax.Array,
    mass: Mass,
) -> jax.Array:
    """Returns entries − loss_cotangent · weights at the points beside a prior."""
    if mass.points is None:
        return entries
    indices, weights = mass.points
    leads = wide(at_classes(logits, indices)) == whole.max_logit[..., None]
    leads &= terms.leader_is_heavy[..., None]  # The leader's entry has its weight already.
    added = scaled(terms.loss_cotangent[..., None], weights)
    return _add_points(entries, indices, jnp.where(leads, jnp.zeros_like(added), -added))


def entry_of_leader(
    terms: GradientTerms, whole: PartialSoftmax, logits: jax.Array, mass: SparseMass
) -> tuple[jax.Array, jax.Array]:
    """Returns (c, the entry of c): the point that may be the leader, [...]."""
    c = mass.leader(logits)
    z = wide(at_class(logits, c))
    p = terms.per_exponential * exponentials(z[..., None], whole.max_logit)[..., 0]
    held = mass.at(c)[..., None]
    density = mass.density()
    held = (held if density is None else held + density)[..., 0]
    entry = p - scaled(terms.loss_cotangent, held)
    leads = (z == whole.max_logit) & terms.leader_is_heavy
    return c, jnp.where(leads, terms.leader_entry, entry)
