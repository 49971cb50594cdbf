"""The derivative rules of the softmax cross-entropy and of the entropy, from logits."""

import dataclasses
from collections.abc import Hashable

import jax
import jax.numpy as jnp

from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide
from xentjax._jax.rule import Rule
from xentjax._softmax import partial, passes, reference
from xentjax._softmax.partial import masked
from xentjax._targets.mass import Mass


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Rule):
    """(logits [..., V], mass, mask or None) -> arrays [...].

    They are losses and log-normalizers; then, if stats are asked for, entropies, and the largest
    logits and their surprisals, which have no derivative.

    Attributes:
      axes: Mesh axes that the classes are split over.
      with_stats: Whether stats are asked for.
    """

    axes: tuple[Hashable, ...] = ()
    with_stats: bool = False

    def reference(self, logits, mass, mask):
        if mask is not None:
            logits = jnp.where(mask[..., None], logits, jnp.zeros_like(logits))
        out = reference.cross_entropy(logits, mass, self.axes)
        if self.with_stats:
            nothing = jnp.zeros_like(out[0])
            out = *out, reference.entropy(logits, self.axes), nothing, nothing
        return masked(out, mask)

    def forward(self, backend, needs_grad, logits, mass, mask):
        with_gradient = any(jax.tree.leaves(needs_grad))
        whole = passes.summarise(logits, mass, with_gradient, backend)
        if self.with_stats:
            whole = partial.with_entropy(whole, logits)
        if self.axes:
            whole = partial.merge_over(whole, self.axes)
        out = whole.loss, whole.log_normalizer
        if self.with_stats:
            out = *out, whole.entropy, whole.max_logit, whole.leader_surprisal
        return masked(out, mask), whole

    def backward(self, backend, needs_grad, args, summary, cotangents):
        (logits, mass, mask), whole = args, summary
        of_loss, of_lse, *of_stats = masked(cotangents, mask)
        of_logits, of_mass = logits, mass
        if needs_grad[0]:
            of_logits = passes.gradient(whole, logits, mass, of_loss, of_lse, backend)
            if self.with_stats:
                of_logits = of_logits + partial.entropy_gradient(whole, logits, of_stats[0])
        if any(jax.tree.leaves(needs_grad[1])):
            of_mass = mass_cotangent(whole, logits, mass, of_loss)
        return of_logits, of_mass, mask


def mass_cotangent(
    whole: partial.PartialSoftmax, logits: jax.Array, mass: Mass, loss_cotangent: jax.Array
) -> Mass:
    """Returns loss_cotangent · ∂loss/∂t = loss_cotangent · (lse(z) − z), in the form of a mass."""
    known = wide(logits), whole.max_logit, whole.leader_surprisal
    z, m, leader_surprisal = masked(known, partial.is_wanted(loss_cotangent))

    def loss(mass):
        return mass.excess(z, m) + mass.total() * leader_surprisal

    own = meshes.varying(loss_cotangent, meshes.varying_axes((logits, mass)))
    return jax.vjp(loss, mass)[1](own)[0]


@dataclasses.dataclass(frozen=True)
class Entropy(Rule):
    """(logits [..., V],) -> the entropy of softmax(logits), [...]."""

    def reference(self, logits):
        return reference.entropy(logits)

    def forward(self, backend, needs_grad, logits):
        del needs_grad
        m, rest = passes.leader_and_rest(logits, backend)
        no_mass = jnp.zeros_like(m)
        whole = partial.PartialSoftmax(m, rest, no_mass, None, no_mass)
        whole = partial.with_entropy(whole, logits)
        return whole.entropy, whole

    def backward(self, backend, needs_grad, args, summary, cotangents):
        del backend, needs_grad
        (logits,) = args
        return (partial.entropy_gradient(summary, logits, cotangents),)
