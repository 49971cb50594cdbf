"""The part of some classes in a softmax, and how parts merge: a leader and the sum of the rest.

The classes are all of them, a block in a loop, or a shard on a device. The leader a is the class of
the largest logit m = z_a among them. A PartialSoftmax keeps, for logits z and target mass t,

    rest   = Σ_{v≠a} exp(z_v − m)                mass         = Σ_v t_v
    excess = Σ_v t_v · (m − z_v)                 mass_of_rest = Σ_{v≠a} t_v

all sums of non-negative terms. Once all classes are in it,

    lse(z)     = m + log1p(rest)
    loss(z, t) = Σ_v t_v · (lse(z) − z_v) = excess + mass · log1p(rest)
    p_v        = exp(z_v − m) / (1 + rest)
    ∂loss/∂z_v = mass · p_v − t_v
               = mass_of_rest − mass · rest / (1 + rest)      for the leader, where p_a > 1/2
    ∂loss/∂t_v = (m − z_v) + log1p(rest)

A confident prediction stays exact: log1p(rest) and rest / (1 + rest) have full relative precision
where lse − z_y and p_y − 1 cancel to nothing. Where no p is above 1/2, nothing cancels. The normal
numbers of float32 end at e⁻⁸⁷: a class that much less likely than the leader has probability 0.

Where no class is possible, because all logits are −inf, m is the lowest finite number and the rest
is −1, so that Σ_v exp(z_v − m) = 1 + rest = 0 there.
"""

import functools
from collections.abc import Hashable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from xentjax._jax.dtypes import wide
from xentjax._targets.mass import times


class PartialSoftmax(NamedTuple):
    """The part of some classes in a softmax; every field is [...].

    `gaps` is Σ_v exp(z_v − m) · (m − z_v). `mass_of_rest` is None where no gradient is asked for,
    and `gaps` where no entropy is. Where any class may be heavy, as of dense mass, the gradient
    needs no mass of the rest, and it is 0.
    """

    max_logit: jax.Array
    rest: jax.Array
    mass: jax.Array
    mass_of_rest: jax.Array | None
    excess: jax.Array
    gaps: jax.Array | None = None

    @property
    def rest_or_zero(self) -> jax.Array:
        """Σ_{v≠a} exp(z_v − m), and 0 where no class is possible; NaN stays NaN."""
        return self.rest + jnp.maximum(-self.rest, 0)

    @property
    def log_normalizer(self) -> jax.Array:
        """lse(z)."""
        return self.max_logit + jnp.log1p(self.rest)

    @property
    def leader_surprisal(self) -> jax.Array:
        """−log p_a = lse(z) − m."""
        return jnp.log1p(self.rest_or_zero)

    @property
    def loss(self) -> jax.Array:
        """Σ_v t_v · (lse(z) − z_v)."""
        return self.excess + self.mass * self.leader_surprisal

    @property
    def mean_gap(self) -> jax.Array:
        """Σ_v p_v · (m − z_v)."""
        return cast(jax.Array, self.gaps) / (1 + self.rest_or_zero)

    @property
    def entropy(self) -> jax.Array:
        """H(z) = Σ_v p_v · (lse(z) − z_v)."""
        return self.leader_surprisal + self.mean_gap


def no_classes(like: jax.Array, with_gradient: bool, with_entropy: bool = False) -> PartialSoftmax:
    """Returns the PartialSoftmax of no classes at all; `like` are zeros [...]."""
    mass_of_rest, gaps = like if with_gradient else None, like if with_entropy else None
    lowest = jnp.finfo(like.dtype).min
    return PartialSoftmax(like + lowest, like - 1, like, mass_of_rest, like, gaps)


def finite(logit: jax.Array) -> jax.Array:
    """Returns a logit, or 0 where it is −inf."""
    return jax.lax.select(logit == -jnp.inf, jnp.zeros_like(logit), logit)


def exponentials(logits: jax.Array, max_logit: jax.Array) -> jax.Array:
    """Returns exp(z_v − m), [..., V]; the leader's is 1."""
    return jnp.exp(logits - max_logit[..., None])


def with_entropy(part: PartialSoftmax, logits: jax.Array) -> PartialSoftmax:
    """Returns a PartialSoftmax of logits [..., V] that knows their entropy too."""
    z = wide(logits)
    gaps = part.max_logit[..., None] - z
    finite_gaps = jnp.minimum(gaps, jnp.asarray(jnp.finfo(z.dtype).max, z.dtype))  # 0 · inf = 0.
    return part._replace(gaps=(exponentials(z, part.max_logit) * finite_gaps).sum(-1))


def merge(a: PartialSoftmax, b: PartialSoftmax) -> PartialSoftmax:
    """Returns the PartialSoftmax of the classes of both: the larger leader leads."""
    a_leads = a.max_logit >= b.max_logit
    m = jnp.maximum(a.max_logit, b.max_logit)
    parts = _seen_from(m, a, a_leads), _seen_from(m, b, ~a_leads)
    return jax.tree.map(jnp.add, *parts)._replace(max_logit=m)


def merge_over(part: PartialSoftmax, axes: tuple[Hashable, ...]) -> PartialSoftmax:
    """Returns the PartialSoftmax of the classes of all devices along mesh axes.

    One maximum and one sum cross devices. Where several devices have the largest logit, each takes
    its own for the leader, and all but one of these are added to the rest.
    """
    m = jax.lax.pmax(part.max_logit, axes)
    leads = part.max_logit == m
    # The place of the largest logit counts the leaders.
    summands = _seen_from(m, part, leads)._replace(max_logit=leads.astype(m.dtype))
    leaves, treedef = jax.tree.flatten(summands)
    total = jax.tree.unflatten(treedef, list(jax.lax.psum(jnp.stack(leaves), axes)))
    return total._replace(max_logit=m, rest=total.rest + (total.max_logit - 1))


def _seen_from(m, part, leads):
    """Returns the part with its sums as seen from m ≥ part.max_logit.

    The leader of a part that does not lead belongs to the rest.
    """
    gap = m - part.max_logit
    shrink = jnp.exp(-gap)
    rest = jax.lax.select(leads, part.rest, (1 + part.rest) * shrink)
    mass_of_rest = part.mass_of_rest
    if mass_of_rest is not None:
        mass_of_rest = jax.lax.select(leads, mass_of_rest, part.mass)
    gaps = part.gaps
    if gaps is not None:
        seen = gaps * shrink + times((1 + part.rest) * shrink, gap)
        gaps = jax.lax.select(leads, gaps, seen)
    excess = part.excess + times(part.mass, gap)
    return PartialSoftmax(m, rest, part.mass, mass_of_rest, excess, gaps)


def entropy_gradient(whole: PartialSoftmax, logits: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Returns cotangent · ∂H/∂z_v = cotangent · p_v · ((m − z_v) − Σ_w p_w · (m − z_w)), [..., V].

    Args:
      whole: The PartialSoftmax of all classes, with their entropy.
      logits: Those of some classes, [..., V].
      cotangent: [...].
    """
    z = wide(logits)
    gaps = whole.max_logit[..., None] - z
    per_exponential = cotangent / (1 + whole.rest_or_zero)
    p = per_exponential[..., None] * exponentials(z, whole.max_logit)
    entries = times(p, gaps - whole.mean_gap[..., None])
    return masked(entries, is_wanted(cotangent)).astype(logits.dtype)


class GradientTerms(NamedTuple):
    """The numbers of an example that its gradient is made from; every field is [...].

    An entry is per_exponential · exponential − loss_cotangent · t_v. Where `leader_is_heavy`, which
    is p_a > 1/2, that of the leader is loss_cotangent · Σ_{v≠a} t_v + of_leader. `mass` is
    loss_cotangent · Σ_v t_v. Where nothing depends on the example, it is not `wanted`, and all its
    entries are 0.
    """

    loss_cotangent: jax.Array
    mass: jax.Array
    per_exponential: jax.Array
    of_leader: jax.Array
    leader_is_heavy: jax.Array
    wanted: jax.Array


def gradient_terms(
    whole: PartialSoftmax, loss_cotangent: jax.Array, lse_cotangent: jax.Array
) -> GradientTerms:
    """Returns the terms of loss_cotangent · ∂loss/∂z + lse_cotangent · ∂lse/∂z."""
    rest = whole.rest_or_zero
    p_of_leader = 1 / (1 + rest)
    mass = scaled(loss_cotangent, whole.mass)
    return GradientTerms(
        loss_cotangent,
        mass,
        (mass + lse_cotangent) * p_of_leader,
        lse_cotangent * p_of_leader - mass * (rest * p_of_leader),
        (whole.rest >= 0) & (whole.rest < 1),
        is_wanted(loss_cotangent, lse_cotangent),
    )


def is_wanted(*cotangents: jax.Array) -> jax.Array:
    """Returns whether anything depends on an example, [...]: one of its cotangents is not 0.

    Where none does, the gradient is 0, whatever the logits: 0 · NaN = 0.
    """
    wanted = functools.reduce(jnp.logical_or, [cotangent != 0 for cotangent in cotangents])
    # A number of its own: XLA would find it again for each class (jaxlib 0.10.2).
    return jax.lax.optimization_barrier(wanted)


def masked(tree, mask):
    """Returns arrays [...] or [..., V] with 0 in the examples masked out."""
    if mask is None:
        return tree

    def keep(x):
        wide_mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        return jnp.where(wide_mask, x, jnp.zeros_like(x))

    return jax.tree.map(keep, tree)


def scaled(cotangent: jax.Array, mass: jax.Array) -> jax.Array:
    """Returns cotangent · mass with 0 · NaN = 0.

    The gradient of a loss that nothing depends on is 0, whatever its label.
    """
    return jnp.where(cotangent == 0, jnp.zeros_like(mass), cotangent * mass)
