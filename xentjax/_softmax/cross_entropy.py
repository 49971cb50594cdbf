"""The derivative rules of the softmax cross-entropy and of the entropy, from logits."""

import dataclasses
from collections.abc import Hashable

import jax
import jax.numpy as jnp

from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide
from xentjax._jax.rule import Rule
from xentjax._softmax import partial, plan, reference
from xentjax._targets.mass import Mass, times


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
        whole = plan.summarise(logits, mass, with_gradient, backend)
        if self.with_stats:
            whole = partial.with_entropy(whole, logits)
        if self.axes:
            whole = partial.merge_over(whole, self.axes)
        out = whole.loss, whole.log_normalizer
        if self.with_stats:
            out = *out, whole.entropy, partial.finite(whole.max_logit), jnp.log1p(whole.rest)
        return masked(out, mask), whole

    def backward(self, backend, needs_grad, args, summary, cotangents):
        (logits, mass, mask), whole = args, summary
        of_loss, of_lse, *of_stats = masked(cotangents, mask)
        of_logits, of_mass = logits, mass
        if needs_grad[0]:
            of_logits = plan.gradient(whole, logits, mass, of_loss, of_lse, backend)
            if self.with_stats:
                of_logits = of_logits + partial.entropy_gradient(whole, logits, of_stats[0])
            of_logits = masked(of_logits, mask)
        if any(jax.tree.leaves(needs_grad[1])):
            of_mass = mass_cotangent(whole, logits, mass, of_loss)
        return of_logits, of_mass, mask


def masked(tree, mask):
    """Returns arrays [...] or [..., V] with 0 in the examples masked out."""
    if mask is None:
        return tree

    def keep(x):
        wide_mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        return jnp.where(wide_mask, x, jnp.zeros_like(x))

    return jax.tree.map(keep, tree)


def mass_cotangent(
    whole: partial.PartialSoftmax, logits: jax.Array, mass: Mass, loss_cotangent: jax.Array
) -> Mass:
    """Returns loss_cotangent · ∂loss/∂t = loss_cotangent · (lse(z) − z), in the form of a mass."""
    z = wide(logits)

    def loss(mass):
        return mass.excess(z, partial.finite(whole.max_logit)) + mass.total() * jnp.log1p(
            whole.rest
        )

    own = meshes.varying(loss_cotangent, meshes.varying_axes((logits, mass)))
    return jax.vjp(loss, mass)[1](own)[0]


@dataclasses.dataclass(frozen=True)
class Entropy(Rule):
    """(logits [..., V],) -> the entropy of softmax(logits), [...]."""

    def reference(self, logits):
        return reference.entropy(logits)

    def forward(self, backend, needs_grad, logits):
        del backend, needs_grad
        z = wide(logits)
        m = jnp.max(z, axis=-1)
        gaps = _gaps(z, m)
        e = jnp.exp(-gaps)
        below = jnp.where(gaps > 0, e, jnp.zeros_like(e)).sum(-1)
        total = e.sum(-1)
        rest = jnp.where(total < 2, below, total - 1)
        mean_gap = times(e, gaps).sum(-1) / (1 + rest)
        return jnp.log1p(rest) + mean_gap, (m, rest, mean_gap)

    def backward(self, backend, needs_grad, args, summary, cotangents):
        """∂H/∂z_v = p_v · ((lse(z) − z_v) − H) = p_v · ((m − z_v) − Σ_w p_w · (m − z_w))."""
        del backend, needs_grad
        (logits,), (m, rest, mean_gap) = args, summary
        gaps = _gaps(wide(logits), m)
        p = jnp.exp(-gaps) / (1 + rest)[..., None]
        return (cotangents[..., None] * times(p, gaps - mean_gap[..., None]),)


def _gaps(z, m):
    """Returns m − z_v, [..., V]."""
    return partial.finite(m)[..., None] - z
