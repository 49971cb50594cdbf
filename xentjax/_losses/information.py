"""Surprisal, entropy, cross-entropy and the divergences, of probabilities and of logits.

Throughout 0 · log 0 = 0, with finite derivatives; probability 0 for what does happen costs +inf.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import arithmetic, checks
from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide_dtype
from xentjax._jax.rule import Rule, apply
from xentjax._losses import arguments
from xentjax._losses.softmax import entropies
from xentjax._softmax import reference


def surprisal(p: ArrayLike, *, base: float | None = None) -> Float[Array, "*shape"]:
    """Surprisal of an outcome of probability p.

    s = −log p

    Args:
      p: Probabilities, float[...].
      base: The base of the logarithm: 2 gives bits; None is e, for nats.

    Returns:
      Surprisals, of the shape of p, float32 (float64 for float64); +inf where p is 0.

    Raises:
      TypeError: p is not floating-point.
      ValueError: base is not a positive number other than 1.

    Example:
      >>> import xentjax
      >>> print(xentjax.surprisal(0.001), xentjax.surprisal(0.001, base=2))
      6.9078 9.9658

    Source:
      Shannon, A Mathematical Theory of Communication, 1948, section 6.
    """
    return _in_base(0 - jnp.log(_probabilities("p", p)), base)  # Not −0 for p = 1.


def entropy(
    p: ArrayLike, *, axis: int | Sequence[int] = -1, base: float | None = None
) -> Float[Array, "*batch"]:
    """Entropy of a distribution: its mean surprisal.

    H(p) = −Σ_v p_v · log p_v

    Args:
      p: Probabilities, float[..., V].
      axis: The axis of the outcomes, or several.
      base: The base of the logarithm: 2 gives bits; None is e, for nats.

    Returns:
      Entropies, of p's shape without `axis`.

    Raises:
      TypeError: p is not floating-point.
      ValueError: The axis does not fit, or base is not a positive number other than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.entropy(jnp.array([0.2, 0.3, 0.5]), base=2))
      1.4855

    Source:
      Shannon, A Mathematical Theory of Communication, 1948, section 6.
    """
    return cross_entropy(p, p, axis=axis, base=base)


def cross_entropy(
    p: ArrayLike, q: ArrayLike, *, axis: int | Sequence[int] = -1, base: float | None = None
) -> Float[Array, "*batch"]:
    """Mean surprisal of one who predicts q where the truth is p.

    H(p, q) = −Σ_v p_v · log q_v  ≥  H(p)

    Args:
      p: The truth, float[..., V].
      q: The prediction, of the shape of p. From logits, `softmax_cross_entropy` is more exact.
      axis: The axis of the outcomes, or several.
      base: The base of the logarithm: 2 gives bits; None is e, for nats.

    Returns:
      Cross-entropies, of p's shape without `axis`; +inf where q is 0 and p is not.

    Raises:
      TypeError: p or q is not floating-point.
      ValueError: The shapes differ, the axis does not fit, or base is not a positive number
        other than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> heads, tails = jnp.array([0.99, 0.01]), jnp.array([0.01, 0.99])
      >>> print(xentjax.cross_entropy(heads, tails), xentjax.cross_entropy(heads, heads))
      4.5592 0.0560

    Source:
      Good, Rational Decisions, 1952, section 8.
    """
    return _in_base(_cross_entropy(*_distributions(p, q, axis)), base)


def kl_divergence(
    p: ArrayLike, q: ArrayLike, *, axis: int | Sequence[int] = -1, base: float | None = None
) -> Float[Array, "*batch"]:
    """Kullback-Leibler divergence: what predicting q costs above predicting the truth p.

    KL(p ‖ q) = Σ_v p_v · log(p_v / q_v) = H(p, q) − H(p)

    Args:
      p: The truth, float[..., V].
      q: The prediction, of the shape of p.
      axis: The axis of the outcomes, or several.
      base: The base of the logarithm: 2 gives bits; None is e, for nats.

    Returns:
      Divergences, of p's shape without `axis`; +inf where q is 0 and p is not.

    Raises:
      TypeError: p or q is not floating-point.
      ValueError: The shapes differ, the axis does not fit, or base is not a positive number
        other than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> heads, tails = jnp.array([0.99, 0.01]), jnp.array([0.01, 0.99])
      >>> print(xentjax.kl_divergence(heads, tails))
      4.5032

    Source:
      Kullback and Leibler, On Information and Sufficiency, 1951, equation 2.4.
    """
    return _in_base(_kl_divergence(*_distributions(p, q, axis)), base)


def js_divergence(
    p: ArrayLike, q: ArrayLike, *, axis: int | Sequence[int] = -1, base: float | None = None
) -> Float[Array, "*batch"]:
    """Jensen-Shannon divergence: symmetric, finite, between 0 and log 2.

    JS(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m),   m = (p + q) / 2

    Args:
      p: A distribution, float[..., V].
      q: Another, of the shape of p.
      axis: The axis of the outcomes, or several.
      base: The base of the logarithm: 2 gives bits; None is e, for nats.

    Returns:
      Divergences, of p's shape without `axis`.

    Raises:
      TypeError: p or q is not floating-point.
      ValueError: The shapes differ, the axis does not fit, or base is not a positive number
        other than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.js_divergence(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), base=2))
      1.0

    Source:
      Lin, Divergence Measures Based on the Shannon Entropy, 1991, equation 4.1.
    """
    return _in_base(_js_divergence(*_distributions(p, q, axis)), base)


def perplexity(nats: ArrayLike) -> Float[Array, "*shape"]:
    """The number of equally likely outcomes that would surprise as much.

    perplexity = exp(H)

    Args:
      nats: Entropies, cross-entropies or mean losses in nats, float[...].

    Returns:
      Perplexities, of the same shape.

    Raises:
      TypeError: nats is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.perplexity(xentjax.entropy(jnp.full(4, 0.25))))
      4.0

    Source:
      Jelinek et al., Perplexity: a Measure of the Difficulty of Speech Recognition Tasks, 1977.
    """
    return jnp.exp(_probabilities("nats", nats))


def softmax_surprisal(
    logits: ArrayLike, *, axis: int | Sequence[int] = -1, base: float | None = None
) -> Float[Array, "*shape"]:
    """Surprisal of every class under softmax(logits).

    s_v = lse(z) − z_v

    Args:
      logits: z, float[..., V].
      axis: The class axis, or several.
      base: The base of the logarithm: 2 gives bits; None is e, for nats.

    Returns:
      Surprisals, of the shape of logits.

    Raises:
      TypeError: logits are not floating-point.
      ValueError: The axis does not fit, or base is not a positive number other than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.softmax_surprisal(jnp.array([0.0, 0.0]), base=2))
      [1. 1.]

    Source:
      Shannon, A Mathematical Theory of Communication, 1948, section 6.
    """
    logits, axes = arguments.as_logits("logits", logits, axis)
    surprisals = reference.surprisals(arguments.classes_last(logits, axes))
    return _in_base(arguments.classes_back(surprisals, logits.shape, axes), base)


def softmax_entropy(
    logits: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    base: float | None = None,
) -> Float[Array, "*batch"]:
    """Entropy of softmax(logits).

    H = Σ_v p_v · (lse(z) − z_v),   ∂H/∂z_v = p_v · ((lse(z) − z_v) − H)

    Args:
      logits: z, float[..., V].
      axis: The class axis, or several.
      where: A mask of the result's shape keeps examples; the others have entropy and gradient 0. A
        mask of the logits' shape keeps classes.
      base: The base of the logarithm: 2 gives bits; None is e, for nats.

    Returns:
      Entropies, of the logits' shape without `axis`.

    Raises:
      TypeError: logits are not floating-point, or where is not bool.
      ValueError: The axis or where does not fit, or base is not a positive number other than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.softmax_entropy(jnp.zeros(8), base=2))
      3.0

    Source:
      Shannon, A Mathematical Theory of Communication, 1948, section 6.
    """
    logits, axes = arguments.as_logits("logits", logits, axis)
    if where is not None:
        where = checks.as_array("where", where, "a bool array")
    run = functools.partial(_softmax_entropy, axes=axes)
    return _in_base(meshes.on_automatic_axes(run, logits, axes)(logits, where), base)


@arguments.jit_unless_traced("axes")
def _softmax_entropy(logits, where, axes):
    return entropies(*arguments.masked_logits(logits, where, axes))


def softmax_kl_divergence(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    base: float | None = None,
) -> Float[Array, "*batch"]:
    """Kullback-Leibler divergence between softmax(p_logits) and softmax(q_logits).

    KL(p ‖ q) = Σ_v p_v · (log p_v − log q_v),   ∂KL/∂q_logits = q − p

    Exact however near q is to p: no two surprisals are subtracted.

    Args:
      p_logits: Logits of the truth, float[..., V].
      q_logits: Logits of the prediction, of the same shape.
      axis: The class axis, or several.
      where: A mask of the result's shape keeps examples, the others have divergence and gradient 0;
        one of the logits' shape keeps classes, the others have probability 0 in both distributions.
      base: The base of the logarithm: 2 gives bits; None is e, for nats.

    Returns:
      Divergences, of the logits' shape without `axis`; +inf where q is 0 and p is not.

    Raises:
      TypeError: Logits are not floating-point, or where is not bool.
      ValueError: The shapes differ, the axis does not fit, or base is not a positive number
        other than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> a, b = jnp.array([2.0, 0.0]), jnp.array([0.0, 0.0])
      >>> print(xentjax.softmax_kl_divergence(a, b))
      0.3278

    Source:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    p_logits, axes = arguments.as_logits("p_logits", p_logits, axis)
    q_logits, _ = arguments.as_logits("q_logits", q_logits, axis)
    checks.check_shape("q_logits", q_logits, p_logits.shape, "that of p_logits")
    dtype = wide_dtype(p_logits.dtype, q_logits.dtype)
    batch = tuple(n for a, n in enumerate(p_logits.shape) if a not in axes)
    if where is not None:
        where = checks.as_mask(where, batch, p_logits.shape, "classes")
    divergences = _softmax_kl_divergence(p_logits, q_logits, where, axes, dtype)
    return _in_base(divergences, base)


# Measures of probabilities.


def _probabilities(name, p):
    """Returns p in the dtype of the arithmetic."""
    p = checks.as_array(name, p)
    checks.check_floating(name, p)
    return p.astype(wide_dtype(p.dtype))


def _distributions(p, q, axis):
    """Returns p, q in the dtype of the arithmetic, and the axes of their outcomes."""
    p, q = _probabilities("p", p), _probabilities("q", q)
    checks.check_shape("q", q, p.shape, "that of p")
    dtype = wide_dtype(p.dtype, q.dtype)
    return p.astype(dtype), q.astype(dtype), checks.canonical_axes(axis, p.ndim)


@functools.partial(jax.jit, static_argnums=2)
def _cross_entropy(p, q, axes):
    return jnp.sum(p * -arithmetic.log(_safe(q, p)), axes)


@functools.partial(jax.jit, static_argnums=2)
def _kl_divergence(p, q, axes):
    return jnp.sum(p * _log_ratio(_safe(p, p), _safe(q, p)), axes)


@functools.partial(jax.jit, static_argnums=2)
def _js_divergence(p, q, axes):
    """Sums ½ p log(p / m) + ½ q log(q / m) with m = (p + q) / 2, in one of two forms.

    With d = (p − q) / (p + q) it is m · (d · atanh d + ½ log(1 − d²)), which cancels far from
    p = q. With r = small / large it is half of (p + q) · (log 2 − log1p r) + small · log r, which
    cancels near it.
    """
    total = p + q
    some = total != 0
    near = (jnp.abs(p - q) < total / 2) & some
    one = jnp.ones_like(p)

    a, b = jnp.where(near, p, one), jnp.where(near, q, one)
    d = arithmetic.quotient(a - b, a + b)
    close = (a + b) / 2 * (d * jnp.arctanh(d) + arithmetic.log1p(-d * d) / 2)

    small, large = jnp.where(p < q, p, q), jnp.where(p < q, q, p)
    far = some & ~near
    small, large = jnp.where(far, small, 0), jnp.where(far, large, one)
    rest = math.log(2) - arithmetic.log1p(arithmetic.quotient(small, large))
    log_ratio = _log_ratio(large, jnp.where(small == 0, one, small))
    apart = ((small + large) * rest - small * log_ratio) / 2

    return jnp.sum(jnp.where(near, close, jnp.where(far, apart, 0)), axes)


def _safe(q, p):
    """Returns q, with 1 where p and q are both 0: an outcome that is impossible under both."""
    return jnp.where((p == 0) & (q == 0), 1, q)


def _log_ratio(p, q):
    """Returns log(p / q), p > 0, to full relative precision where p is near q; +inf where q is 0.

    log(p / q) = log(c / k) + log(p / c) − log(q / k), where the constants c, k are p, q.
    """
    possible = q > 0
    c, k = jnp.where(possible, p, 1), jnp.where(possible, q, 1)
    constant = _log_ratio_value(*jax.lax.stop_gradient((c, k)))
    near_c_and_k = constant + arithmetic.log_growth(c) - arithmetic.log_growth(k)
    plain = jnp.log(jnp.where(possible, 1, p)) - jnp.log(jnp.where(possible, 1, q))
    return jnp.where(possible, near_c_and_k, plain)


def _log_ratio_value(p, q):
    near = jnp.abs(p - q) < q / 2
    change = jnp.where(near, p - q, 0) / jnp.where(near, q, 1)
    # One quotient loses less than two logarithms, if it is in range.
    in_range = (p < 1e30 * q) & (q < 1e30 * p)
    quotient = jnp.where(in_range, p, 1) / jnp.where(in_range, q, 1)
    far = jnp.where(in_range, jnp.log(quotient), jnp.log(p) - jnp.log(q))
    return jnp.where(near, arithmetic.log1p(change), far)


# The divergence of logits.
#
# With d_v = q_logits − p_logits less its mean under p, so that Σ p_v · d_v = 0:
#
#     KL = log Σ_v p_v · exp(d_v) = log1p(Σ_v p_v · g(d_v)),   g(d) = exp(d) − 1 − d ≥ 0
#     ∂KL/∂p_logits = −p_v · d_v,   ∂KL/∂q_logits = q_v − p_v = p_v · expm1(d_v − KL)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _softmax_kl_divergence(p_logits, q_logits, where, axes, dtype):
    a, b = p_logits.astype(dtype), q_logits.astype(dtype)
    rule = _KLOfLogits(axes)
    if where is None:
        return apply(rule, a, b)
    if where.shape == a.shape:
        return apply(rule, *(jnp.where(where, z, -jnp.inf) for z in (a, b)))
    examples = jnp.expand_dims(where, axes)
    divergences = apply(rule, *(jnp.where(examples, z, 0) for z in (a, b)))
    return jnp.where(where, divergences, 0)


@dataclasses.dataclass(frozen=True)
class _KLOfLogits(Rule):
    """(p_logits, q_logits) -> divergences over `axes`.

    Attributes:
      axes: The class axes.
    """

    axes: tuple[int, ...]

    def reference(self, *args):
        p_logits, q_logits = args
        return jnp.squeeze(_kl_parts(p_logits, q_logits, self.axes).divergence, self.axes)

    def forward(self, backend, needs_grad, *args):
        del backend, needs_grad
        return self.reference(*args), ()

    def backward(self, backend, needs_grad, args, summary, cotangents):
        del backend, needs_grad, summary
        p_logits, q_logits = args
        parts = _kl_parts(p_logits, q_logits, self.axes)
        cotangent = jnp.expand_dims(cotangents, self.axes)
        none = (cotangent == 0) | parts.empty
        slopes = -parts.p * parts.d, parts.q_less_p()
        return tuple(jnp.where(none, 0, cotangent * slope) for slope in slopes)


class _KLParts(NamedTuple):
    """Arrays of the logits' shape, or with axes of length 1 where there were classes.

    Attributes:
      p: softmax(p_logits).
      d: q_logits − p_logits less its mean under p; 0 where p is 0.
      x: log(p · exp(d)) = log q + KL.
      finite_divergence: The divergence but for classes that are impossible under q alone.
      divergence: KL; 0 where no class is possible under p.
      empty: Whether no class is possible under p.
    """

    p: jax.Array
    d: jax.Array
    x: jax.Array
    finite_divergence: jax.Array
    divergence: jax.Array
    empty: jax.Array

    def q_less_p(self) -> jax.Array:
        """Returns q − p, to full relative precision where q is near p."""
        growth = self.d - self.finite_divergence
        near = (jnp.abs(growth) < 1) & (self.p > 0)
        close = self.p * jnp.expm1(jnp.where(near, growth, 0))
        return jnp.where(near, close, jnp.exp(self.x - self.finite_divergence) - self.p)


def _kl_parts(a, b, axes):
    """Returns the _KLParts of p_logits a and q_logits b, whose classes are on `axes`."""
    total = functools.partial(jnp.sum, axis=axes, keepdims=True)
    largest = functools.partial(jnp.max, axis=axes, keepdims=True)

    # Both in units in which p's leading class has logit 0. These are constants, which cancel.
    a_top = jax.lax.stop_gradient(largest(a))
    empty = a_top == -jnp.inf
    a_top = jnp.where(empty, 0, a_top)
    b_top = largest(jnp.where(a == a_top, jax.lax.stop_gradient(b), -jnp.inf))
    b_top = jnp.where(jnp.isfinite(b_top), b_top, 0)
    exponentials = jnp.exp(a - a_top)
    normalizer = jnp.where(empty, 1, total(exponentials))
    p = exponentials / normalizer

    # d is exact where q_logits are near p_logits, by whatever constant they differ.
    impossible = p == 0
    counted = ~impossible & (b != -jnp.inf)
    d, error = arithmetic.two_sum(jnp.where(counted, b, 0), -jnp.where(counted, a, 0))
    d_top, error_top = arithmetic.two_sum(b_top, -a_top)
    d = jnp.where(counted, (d - d_top) + (error - error_top), 0)
    mean = total(p * d)
    d = jnp.where(counted, d - mean, 0)
    x = (b - b_top) - (jnp.log(normalizer) + mean)

    top = jax.lax.stop_gradient(largest(x))
    is_large = top > 1
    d_if_small, x_if_small = jnp.where(is_large, 0, d), jnp.where(is_large, 0, x)
    small = total(jnp.where(impossible, jnp.exp(x_if_small), p * _exp_less_line(d_if_small)))
    x_if_large = jnp.where(is_large, x - top, 0)
    large = jnp.where(is_large, top, 0) + jnp.log(total(jnp.exp(x_if_large)))
    finite = jnp.where(is_large, large, arithmetic.log1p(small))
    finite = jnp.where(empty, 0, finite)
    infinite = jnp.any(~impossible & (b == -jnp.inf), axis=axes, keepdims=True)
    return _KLParts(p, d, x, finite, jnp.where(infinite, jnp.inf, finite), empty)


def _exp_less_line(d):
    """Returns g(d) = exp(d) − 1 − d = d²/2 · (1 + d/3 · (1 + d/4 · (…))), without cancelling."""
    near = jnp.abs(d) < 1
    small = jnp.where(near, d, 0)
    terms = 20 if d.dtype == jnp.float64 else 12
    series = jnp.ones_like(d)
    for n in range(terms, 2, -1):
        series = 1 + small / n * series
    return jnp.where(near, small * small / 2 * series, jnp.exp(jnp.where(near, 0, d)) - 1 - d)


def _in_base(nats, base):
    """Returns nats in units of log(base)."""
    if base is None:
        return nats
    wanted = f"base: expected a positive number other than 1, got {base!r}"
    checks.check(isinstance(base, numbers.Real), wanted, TypeError)
    checks.check(0 < base < math.inf and base != 1, wanted)
    return nats / math.log(base)
