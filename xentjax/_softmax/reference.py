"""The mathematics of the exact softmax in plain formulas: one class against the rest.

With a the class of the largest logit and r = Σ_{v≠a} exp(z_v − z_a),

    lse(z)     = z_a + log1p(r)
    loss(z, t) = Σ_v t_v · (lse(z) − z_v) = Σ_v t_v · (z_a − z_v) + T · log1p(r),   T = Σ_v t_v
    H(z)       = Σ_v p_v · (lse(z) − z_v)
               = log1p(r) + Σ_{v≠a} exp(z_v − z_a) · (z_a − z_v) / (1 + r)

No term is a difference of two nearly equal numbers, and so it is with their derivatives, which JAX
takes of these lines as they stand, to any order. The engine computes the same in less time and
memory; its rules are differentiated a second time here, and tests hold it against this page.
"""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide
from xentjax._targets.mass import Mass, at_class, is_class


def leader_and_rest(
    logits: jax.Array, axes: tuple[Hashable, ...] = ()
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (a, z_a, terms [..., V]): exp(z_v − z_a), and 0 at a; Σ_v of the terms is r.

    The classes are all those of the devices along mesh `axes`.
    """
    largest = jax.lax.stop_gradient(logits)
    a = jnp.argmax(largest, axis=-1).astype(jnp.int32)
    z_a = at_class(logits, a)
    if axes:  # The leader of all devices; the first device's where several have one.
        is_first = meshes.is_first_largest(at_class(largest, a), axes)
        a = jnp.where(is_first, a, -jnp.ones_like(a))
        z_a = jax.lax.psum(jnp.where(is_first, z_a, jnp.zeros_like(z_a)), axes)
    z_a = jnp.where(z_a == -jnp.inf, jnp.zeros_like(z_a), z_a)  # No class is possible.
    exponentials = jnp.exp(logits - z_a[..., None])
    return a, z_a, jnp.where(is_class(a, logits), jnp.zeros_like(exponentials), exponentials)


def cross_entropy(
    logits: jax.Array, mass: Mass, axes: tuple[Hashable, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Returns (loss, lse), [...]."""
    z = wide(logits)
    a, z_a, terms = leader_and_rest(z, axes)
    r, excess, total = terms.sum(-1), mass.excess(z, z_a, without=a), mass.total()
    if axes:
        r, excess, total = jax.lax.psum((r, excess, total), axes)
    return excess + total * jnp.log1p(r), z_a + jnp.log1p(r)


def surprisals(logits: jax.Array) -> jax.Array:
    """Returns lse(z) − z_v, [..., V]."""
    z = wide(logits)
    _, z_a, terms = leader_and_rest(z)
    return (z_a[..., None] - z) + jnp.log1p(terms.sum(-1))[..., None]


def entropy(logits: jax.Array, axes: tuple[Hashable, ...] = ()) -> jax.Array:
    """Returns H(z), [...]."""
    z = wide(logits)
    _, z_a, terms = leader_and_rest(z, axes)
    r, cost = terms.sum(-1), sum_of_gaps(terms, z, z_a)
    if axes:
        r, cost = jax.lax.psum((r, cost), axes)
    return jnp.log1p(r) + cost / (1 + r)


def sum_of_gaps(terms: jax.Array, logits: jax.Array, top: jax.Array) -> jax.Array:
    """Returns Σ_v terms_v · (top − z_v), [...], with 0 · inf = 0."""
    gaps = top[..., None] - logits
    return (terms * jnp.where(gaps == jnp.inf, jnp.zeros_like(gaps), gaps)).sum(-1)
