"""What some classes tell of the softmax, and how that merges: a leader and the sum of the rest.

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
where lse − z_y and p_y − 1 cancel to nothing. Where no p is above 1/2, nothing cancels.
"""

from collections.abc import Hashable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from xentjax._jax.dtypes import wide
from xentjax._targets.mass import times

LIFT = 2.0**30
"""Sums of exponentials are kept so many times as large: float32 ends at e⁻⁸⁷, and a loss of e⁻⁸⁰ is
made of terms as small as e⁻⁹⁴."""


class PartialSoftmax(NamedTuple):
    """What some classes tell of the softmax; every field is [...].

    `lifted_rest` is LIFT · rest, and `lifted_gaps` is LIFT · Σ_v exp(z_v − m) · (m − z_v).
    `mass_of_rest` is None where no gradient is asked for, `lifted_gaps` where no entropy is.
    """

    max_logit: jax.Array
    lifted_rest: jax.Array
    mass: jax.Array
    mass_of_rest: jax.Array | None
    excess: jax.Array
    lifted_gaps: jax.Array | None = None

    @property
    def rest(self) -> jax.Array:
        """Σ_{v≠a} exp(z_v − m)."""
        return self.lifted_rest * (1 / LIFT)

    @property
    def log_normalizer(self) -> jax.Array:
        """lse(z)."""
        return self.max_logit + jnp.log1p(self.rest)

    @property
    def loss(self) -> jax.Array:
        """Σ_v t_v · (lse(z) − z_v)."""
        return self.excess + self.mass * jnp.log1p(self.rest)

    @property
    def mean_gap(self) -> jax.Array:
        """Σ_v p_v · (m − z_v)."""
        return cast(jax.Array, self.lifted_gaps) / (LIFT + self.lifted_rest)

    @property
    def entropy(self) -> jax.Array:
        """H(z) = Σ_v p_v · (lse(z) − z_v)."""
        return jnp.log1p(self.rest) + self.mean_gap


def no_classes(
    like: jax.Array, with_gradient: bool, with_entropy: bool = False
) -> PartialSoftmax:
    """Returns the PartialSoftmax of no classes at all; `like` are zeros [...]."""
    mass_of_rest, gaps = like if with_gradient else None, like if with_entropy else None
    return PartialSoftmax(like - jnp.inf, like, like, mass_of_rest, like, gaps)


def finite(max_logit: jax.Array) -> jax.Array:
    """Returns m, or 0 where m is −inf."""
    return jnp.where(max_logit == -jnp.inf, jnp.zeros_like(max_logit), max_logit)


def exponentials(logits: jax.Array, max_logit: jax.Array) -> jax.Array:
    """Returns LIFT · exp(z_v − m), [..., V]; the leader's is LIFT itself.

    It is a square, since exp(z_v − m) would underflow before it is lifted.
    """
    root = jnp.exp((logits - finite(max_logit)[..., None]) / 2) * LIFT**0.5
    return root * root


def with_entropy(part: PartialSoftmax, logits: jax.Array) -> PartialSoftmax:
    """Returns a PartialSoftmax of logits [..., V] that knows their entropy too."""
    z = wide(logits)
    gaps = finite(part.max_logit)[..., None] - z
    return part._replace(lifted_gaps=times(exponentials(z, part.max_logit), gaps).sum(-1))


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
    leads = (part.max_logit == m) & (m > -jnp.inf)
    # The place of the largest logit counts the leaders.
    summands = _seen_from(m, part, leads)._replace(max_logit=leads.astype(m.dtype))
    leaves, treedef = jax.tree.flatten(summands)
    total = jax.tree.unflatten(treedef, list(jax.lax.psum(jnp.stack(leaves), axes)))
    rest = total.lifted_rest + LIFT * jnp.maximum(total.max_logit - 1, 0)
    return total._replace(max_logit=m, lifted_rest=rest)


def _seen_from(m, part, leads):
    """Returns the part with its sums as seen from m ≥ part.max_logit.

    The leader of a part that does not lead belongs to the rest.
    """
    gap = finite(m) - part.max_logit
    rest = jnp.where(leads, part.lifted_rest, (LIFT + part.lifted_rest) * jnp.exp(-gap))
    mass_of_rest = part.mass_of_rest
    if mass_of_rest is not None:
        mass_of_rest = jnp.where(leads, mass_of_rest, part.mass)
    gaps = part.lifted_gaps
    if gaps is not None:
        here = jnp.where(gap == jnp.inf, jnp.zeros_like(gap), gap)
        seen = gaps + (LIFT + part.lifted_rest) * here
        gaps = jnp.where(leads, gaps, seen * jnp.exp(-gap))
    excess = part.excess + times(part.mass, gap)
    return PartialSoftmax(m, rest, part.mass, mass_of_rest, excess, gaps)


def entropy_gradient(
    whole: PartialSoftmax, logits: jax.Array, cotangent: jax.Array
) -> jax.Array:
    """Returns cotangent · ∂H/∂z_v = cotangent · p_v · ((m − z_v) − Σ_w p_w · (m − z_w)), [..., V].

    Args:
      whole: The PartialSoftmax of all classes, with their entropy.
      logits: Those of some classes, [..., V].
      cotangent: [...].
    """
    z = wide(logits)
    gaps = finite(whole.max_logit)[..., None] - z
    per_exponential = cotangent / (LIFT + whole.lifted_rest)
    p = per_exponential[..., None] * exponentials(z, whole.max_logit)
    return times(p, gaps - whole.mean_gap[..., None]).astype(logits.dtype)


class GradientTerms(NamedTuple):
    """What an entry of the gradient needs to know of its example; every field is [...].

    An entry is per_exponential · exponential − loss_cotangent · t_v. That of the leader is
    `leader_entry` where `leader_is_heavy`, p_a > 1/2.
    """

    loss_cotangent: jax.Array
    per_exponential: jax.Array
    leader_entry: jax.Array
    leader_is_heavy: jax.Array


def gradient_terms(
    whole: PartialSoftmax, loss_cotangent: jax.Array, lse_cotangent: jax.Array
) -> GradientTerms:
    """Returns the terms of loss_cotangent · ∂loss/∂z + lse_cotangent · ∂lse/∂z."""
    p_of_leader = 1 / (1 + whole.rest)
    of_mass = scaled(loss_cotangent, whole.mass)
    of_rest = scaled(loss_cotangent, cast(jax.Array, whole.mass_of_rest))
    return GradientTerms(
        loss_cotangent,
        (of_mass + lse_cotangent) * (p_of_leader * (1 / LIFT)),
        of_rest - of_mass * (whole.rest * p_of_leader) + lse_cotangent * p_of_leader,
        (whole.rest < 1) & (whole.max_logit > -jnp.inf),
    )


def scaled(cotangent: jax.Array, mass: jax.Array) -> jax.Array:
    """Returns cotangent · mass with 0 · NaN = 0.

    The gradient of a loss that nothing depends on is 0, whatever its label.
    """
    return jnp.where(cotangent == 0, jnp.zeros_like(mass), cotangent * mass)
