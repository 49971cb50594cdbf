"""Surprisal, entropy, cross-entropy and the divergences of probabilities.

Throughout 0 · log 0 = 0, with finite derivatives; probability 0 costs +inf where it does happen.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import arithmetic, checks, value_checks
from xentjax._jax.dtypes import wide_dtype
from xentjax._losses import arguments


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
    p = arguments.as_wide("p", p)
    value_checks.check_probabilities("p", p)
    return arguments.in_base(0 - jnp.log(p), base)  # Not −0 for p = 1.


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
    return arguments.in_base(_cross_entropy(*_distributions(p, q, axis)), base)


def kl_divergence(
    p: ArrayLike, q: ArrayLike, *, axis: int | Sequence[int] = -1, base: float | None = None
) -> Float[Array, "*batch"]:
    """Kullback-Leibler divergence: the cost of predicting q above that of the truth p.

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
    return arguments.in_base(_kl_divergence(*_distributions(p, q, axis)), base)


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
    return arguments.in_base(_js_divergence(*_distributions(p, q, axis)), base)


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
    return jnp.exp(arguments.as_wide("nats", nats))


# Arguments, and the sums.


def _distributions(p, q, axis):
    """Returns p, q in the dtype of the arithmetic, and the axes of their outcomes."""
    p, q = checks.as_array("p", p), checks.as_array("q", q)
    for name, x in (("p", p), ("q", q)):
        checks.check_floating(name, x)
    checks.check_shape("q", q, p.shape, "that of p")
    axes, dtype = checks.canonical_axes(axis, p.ndim), wide_dtype(p.dtype, q.dtype)
    for name, x in (("p", p), ("q", q)):
        value_checks.check_distributions(name, x, axes)
    return p.astype(dtype), q.astype(dtype), axes


@functools.partial(jax.jit, static_argnums=2)
def _cross_entropy(p, q, axes):
    return jnp.sum(0 - arithmetic.times_log(p, _safe(q, p)), axes)  # Not −0 for q = 1.


@functools.partial(jax.jit, static_argnums=2)
def _kl_divergence(p, q, axes):
    return jnp.sum(_times_log_ratio(p, _safe(p, p), _safe(q, p)), axes)


def _safe(q, p):
    """Returns q, with 1 where p and q are both 0: an outcome that is impossible under both."""
    return jnp.where((p == 0) & (q == 0), 1, q)


def _times_log_ratio(weight, p, q):
    """Returns weight · log(p / q), p > 0; +inf where q is 0.

    weight · log(p / q) = weight · (log(c / k) + log(p / c) − log(q / k)), where the constants c, k
    are p, q.
    """
    possible = q > 0
    c, k = jnp.where(possible, p, 1), jnp.where(possible, q, 1)
    constant = arithmetic.log_ratio(*jax.lax.stop_gradient((c, k)))
    growth = arithmetic.times_log_growth(weight, c) - arithmetic.times_log_growth(weight, k)
    plain = jnp.log(jnp.where(possible, 1, p)) - jnp.log(jnp.where(possible, 1, q))
    return jnp.where(possible, weight * constant + growth, weight * plain)


@functools.partial(jax.jit, static_argnums=2)
def _js_divergence(p, q, axes):
    """Sums ½ p log(p / m) + ½ q log(q / m) with m = (p + q) / 2.

    With constants b, c, k that are p, q, m, and relative growths x = p / b − 1 and y = q / c − 1, a
    term is, for any p and q,

        its value at b, c + ½ (p − b) log(b / k) + ½ (q − c) log(c / k) + ¼ bc / (b + c) · (x − y)²

    and the rest of x log x, from the third order on. So no derivative cancels.
    """
    m = (p + q) / 2
    terms = _js_part(p, m) + _js_part(q, m) + _js_curvature(p, q) - _excess(m)
    return jnp.sum(terms, axes)


def _js_curvature(p, q):
    """Returns ¼ bc / (b + c) · (x − y)², 0 where p or q is."""
    both = (p > 0) & (q > 0)
    p, q = jnp.where(both, p, 1), jnp.where(both, q, 1)
    b, c = jax.lax.stop_gradient((p, q))
    smaller, larger = jnp.minimum(b, c), jnp.maximum(b, c)
    growth = arithmetic.relative_growth(p) - arithmetic.relative_growth(q)
    weight = smaller / (1 + arithmetic.quotient(smaller, larger))
    return jnp.where(both, weight / 4 * growth * growth, 0)


def _js_part(p, m):
    """Returns the half of a term of the Jensen-Shannon divergence that belongs to p."""
    b, k = jax.lax.stop_gradient((p, m))
    some = (b > 0) & (k > 0)  # The half of the smallest normal number is 0 (XLA's CPU code).
    ratio = arithmetic.log_ratio(jnp.where(some, b, 1), jnp.where(some, k, 1))
    return (kl_excess(b, k, ratio) + ratio * (p - b) + _excess(p)) / 2


def kl_excess(p: jax.Array, m: jax.Array, ratio: jax.Array) -> jax.Array:
    """Returns p · log(p / m) − p + m ≥ 0, given ratio = log(p / m); where p is 0, any ratio does.

    It is p · (exp(−ratio) − 1 + ratio), which does not cancel where p is near m.
    """
    near = (ratio > -1) & (p > 0)
    close = p * arithmetic.exp_less_line(-jnp.where(near, ratio, 0))
    return jnp.where(near, close, m - p + p * jnp.where(near | (p == 0), 0, ratio))


def _excess(x):
    return jnp.where(x > 0, arithmetic.times_log_excess(jnp.where(x > 0, x, 1)), 0)
