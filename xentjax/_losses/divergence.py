"""The derivative rules of divergences from logits.

With d_v = q_logits − p_logits less its mean under p (over classes that are possible under both),
so that Σ p_v · d_v = 0:

    KL = log Σ_v p_v · exp(d_v) = log1p(Σ_v p_v · g(d_v)),   g(d) = exp(d) − 1 − d ≥ 0
    ∂KL/∂p_logits = −p_v · d_v,   ∂KL/∂q_logits = q_v − p_v = p_v · expm1(d_v − KL) if q is near p

With u_v = log(q_v / p_v) = d_v − KL, and m = β · p + (1 − β) · q:

    JS = Σ_v β · p_v · g(−ρ_v) + (1 − β) · q_v · g(−σ_v)
    ρ_v = log(p_v / m_v) = −log1p((1 − β) · expm1(u_v)),   σ_v = log(q_v / m_v) = u_v + ρ_v
    ∂JS/∂p_logits = β · p_v · (ρ_v − Σ_w p_w · ρ_w),   ∂JS/∂q_logits likewise

No two surprisals are subtracted, and every term of a sum is positive.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xentjax._jax import arithmetic
from xentjax._jax.rule import Rule
from xentjax._losses.information import kl_excess


class _OfTwoLogits(Rule):
    """(p_logits, q_logits) -> divergences: the plain formula is the code of the value too."""

    def forward(self, backend, needs_grad, *args):
        del backend, needs_grad
        return self.reference(*args), ()


@dataclasses.dataclass(frozen=True)
class KLOfLogits(_OfTwoLogits):
    """(p_logits, q_logits) -> divergences over `axes`.

    Attributes:
      axes: The class axes.
    """

    axes: tuple[int, ...]

    def reference(self, *args):
        p_logits, q_logits = args
        return jnp.squeeze(kl_parts(p_logits, q_logits, self.axes).divergence, self.axes)

    def backward(self, backend, needs_grad, args, summary, cotangents):
        del backend, needs_grad, summary
        p_logits, q_logits = args
        parts = kl_parts(p_logits, q_logits, self.axes)
        cotangent = jnp.expand_dims(cotangents, self.axes)
        none = (cotangent == 0) | parts.empty
        slopes = -parts.p * parts.d, parts.q_less_p()
        return tuple(jnp.where(none, 0, cotangent * slope) for slope in slopes)


class KLParts(NamedTuple):
    """Arrays of the logits' shape, or with axes of length 1 where there were classes.

    Attributes:
      p: softmax(p_logits); 0 where no class is possible.
      q: softmax(q_logits), likewise.
      d: q_logits − p_logits less its mean under p; 0 where p is 0.
      x: log(p · exp(d)) = log q + KL.
      finite_divergence: The divergence but for classes that are impossible under q alone.
      divergence: KL; 0 where no class is possible under p.
      empty: Whether no class is possible under p.
    """

    p: jax.Array
    q: jax.Array
    d: jax.Array
    x: jax.Array
    finite_divergence: jax.Array
    divergence: jax.Array
    empty: jax.Array

    def q_less_p(self) -> jax.Array:
        """Returns q − p, to full relative precision where q is near p."""
        growth = self.d - self.finite_divergence
        near = (jnp.abs(growth) < 1) & (self.finite_divergence < 1) & (self.p > 0) & (self.q > 0)
        close = self.p * jnp.expm1(jnp.where(near, growth, 0))
        return jnp.where(near, close, self.q - self.p)


def kl_parts(a, b, axes):
    """Returns the KLParts of p_logits a and q_logits b, whose classes are on `axes`."""
    total = functools.partial(jnp.sum, axis=axes, keepdims=True)
    largest = functools.partial(jnp.max, axis=axes, keepdims=True)

    def softmax(z):
        top = jax.lax.stop_gradient(largest(z))
        empty = top == -jnp.inf
        top = jnp.where(empty, 0, top)
        exponentials = jnp.exp(z - top)
        normalizer = jnp.where(empty, 1, total(exponentials))
        return exponentials / normalizer, top, normalizer, empty

    # Both in units in which p's leading class has logit 0. These are constants, which cancel.
    p, a_top, normalizer, empty = softmax(a)
    q, *_ = softmax(b)
    b_top = largest(jnp.where(a == a_top, jax.lax.stop_gradient(b), -jnp.inf))
    b_top = jnp.where(jnp.isfinite(b_top), b_top, 0)

    # d is exact where q_logits are near p_logits, by whatever constant they differ.
    impossible = p == 0
    counted = ~impossible & (b != -jnp.inf)
    d, error = arithmetic.two_sum(jnp.where(counted, b, 0), -jnp.where(counted, a, 0))
    d_top, error_top = arithmetic.two_sum(b_top, -a_top)
    d = jnp.where(counted, (d - d_top) + (error - error_top), 0)
    is_lost = ~impossible & ~counted  # Possible under p alone: exp(d) is 0 there.
    lost = total(jnp.where(is_lost, p, 0))
    mean = total(p * d) / jnp.where((lost > 0) & (lost < 1), 1 - lost, 1)
    d = jnp.where(counted, d - mean, 0)
    x = (b - b_top) - (jnp.log(normalizer) + mean)

    top = jax.lax.stop_gradient(largest(x))
    is_large = (top > 1) | (lost > 0.5)
    d_if_small, x_if_small = jnp.where(is_large, 0, d), jnp.where(is_large, 0, x)
    excess = p * jnp.where(is_lost, -1, arithmetic.exp_less_line(d_if_small))
    small = total(jnp.where(impossible, jnp.exp(x_if_small), excess))
    x_if_large = jnp.where(is_large, x - top, 0)
    large = jnp.where(is_large, top, 0) + jnp.log(total(jnp.exp(x_if_large)))
    finite = jnp.where(is_large, large, arithmetic.log1p(small))
    finite = jnp.where(empty, 0, finite)
    infinite = jnp.any(~impossible & (b == -jnp.inf), axis=axes, keepdims=True)
    return KLParts(p, q, d, x, finite, jnp.where(infinite, jnp.inf, finite), empty)


@dataclasses.dataclass(frozen=True)
class JSOfLogits(_OfTwoLogits):
    """(p_logits, q_logits) -> Jensen-Shannon divergences over `axes`.

    Attributes:
      axes: The class axes.
      beta: The share of p in the middle.
    """

    axes: tuple[int, ...]
    beta: float

    def reference(self, *args):
        p_logits, q_logits = args
        parts = _js_parts(p_logits, q_logits, self.axes, self.beta)
        of_p = self.beta * kl_excess(parts.p, parts.m, parts.log_p_over_m)
        of_q = (1 - self.beta) * kl_excess(parts.q, parts.m, parts.log_q_over_m)
        return jnp.sum(of_p + of_q, axis=self.axes)

    def backward(self, backend, needs_grad, args, summary, cotangents):
        del backend, needs_grad, summary
        p_logits, q_logits = args
        parts = _js_parts(p_logits, q_logits, self.axes, self.beta)
        cotangent = jnp.expand_dims(cotangents, self.axes)

        def slope(share, p, ratio):
            """Seen from the leading class, nothing cancels though its p is near 1."""
            leads = p == jnp.max(p, axis=self.axes, keepdims=True)
            of_leader = jnp.max(jnp.where(leads, ratio, -jnp.inf), axis=self.axes, keepdims=True)
            ratio = jnp.where(p > 0, ratio - of_leader, 0)
            mean = jnp.sum(p * ratio, axis=self.axes, keepdims=True)
            return jnp.where(cotangent == 0, 0, cotangent * (share * p * (ratio - mean)))

        to_p = slope(self.beta, parts.p, parts.log_p_over_m)
        return to_p, slope(1 - self.beta, parts.q, parts.log_q_over_m)


class _JSParts(NamedTuple):
    """Arrays of the logits' shape; a ratio is 0 where its numerator is."""

    p: jax.Array
    q: jax.Array
    m: jax.Array
    log_p_over_m: jax.Array
    log_q_over_m: jax.Array


def _js_parts(a, b, axes, beta):
    """Returns the _JSParts of p_logits a and q_logits b, whose classes are on `axes`."""
    parts = kl_parts(a, b, axes)
    # A NaN among the logits of either is NaN in both.
    is_nan = jnp.isnan(parts.finite_divergence)
    p = jnp.where(is_nan, jnp.nan, parts.p)
    q = jnp.where(is_nan, jnp.nan, jnp.where(parts.empty, 0, parts.q))
    both = (p > 0) & (q > 0)
    u = jnp.where(both, parts.d - parts.finite_divergence, 0)
    log_p_over_m = -_log_mean_exp(1 - beta, u)
    log_q_over_m = -_log_mean_exp(beta, -u)
    return _JSParts(
        p,
        q,
        beta * p + (1 - beta) * q,
        jnp.where(both, log_p_over_m, jnp.where(p > 0, -math.log(beta), 0)),
        jnp.where(both, log_q_over_m, jnp.where(q > 0, -math.log(1 - beta), 0)),
    )


def _log_mean_exp(share, u):
    """Returns log(1 − share + share · exp(u)) = log1p(share · expm1(u)), for any u."""
    large = u > 1
    small = arithmetic.log1p(share * jnp.expm1(jnp.where(large, 0, u)))
    # log(share · exp(u) · (1 + (1 − share) / share · exp(−u)))
    rest = jnp.log1p((1 - share) / share * jnp.exp(-jnp.where(large, u, 1)))
    return jnp.where(large, u + math.log(share) + rest, small)
