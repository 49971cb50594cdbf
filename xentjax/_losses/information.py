"""Surprisal, entropy, cross-entropy and the divergences, of probabilities and of logits.

Throughout 0 · log 0 = 0, with finite derivatives; probability 0 for what does happen costs +inf.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import checks
from xentjax._losses import softmax as _softmax


def surprisal(p: ArrayLike, *, base: float | None = None) -> Float[Array, "*shape"]:
    """Surprisal of an outcome of probability p.

    s = −log p

    Args:
      p: Probabilities, float[...].
      base: Of the logarithm: 2 gives bits; None is e, for nats.

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
      base: Of the logarithm: 2 gives bits; None is e, for nats.

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
      base: Of the logarithm: 2 gives bits; None is e, for nats.

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
    p, q, axes = _distributions(p, q, axis)
    return _in_base(jnp.sum(p * -jnp.log(_safe(q, p)), axes), base)


def kl_divergence(
    p: ArrayLike, q: ArrayLike, *, axis: int | Sequence[int] = -1, base: float | None = None
) -> Float[Array, "*batch"]:
    """Kullback-Leibler divergence: what predicting q costs above predicting the truth p.

    KL(p ‖ q) = Σ_v p_v · log(p_v / q_v) = H(p, q) − H(p)

    Args:
      p: The truth, float[..., V].
      q: The prediction, of the shape of p.
      axis: The axis of the outcomes, or several.
      base: Of the logarithm: 2 gives bits; None is e, for nats.

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
    p, q, axes = _distributions(p, q, axis)
    return _in_base(jnp.sum(p * _log_ratio(_safe(p, p), _safe(q, p)), axes), base)


def js_divergence(
    p: ArrayLike, q: ArrayLike, *, axis: int | Sequence[int] = -1, base: float | None = None
) -> Float[Array, "*batch"]:
    """Jensen-Shannon divergence: symmetric, finite, between 0 and log 2.

    JS(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m),   m = (p + q) / 2

    Args:
      p: A distribution, float[..., V].
      q: Another, of the shape of p.
      axis: The axis of the outcomes, or several.
      base: Of the logarithm: 2 gives bits; None is e, for nats.

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
    p, q, axes = _distributions(p, q, axis)
    m = (p + q) / 2
    # With d = (p − q) / 2m, ½ p log(p/m) + ½ q log(q/m) = m · (d · atanh d + ½ log(1 − d²)). Near
    # p = q the first form cancels, and far from it the second.
    d = (p - q) / jnp.where(m == 0, 1, 2 * m)
    near = jnp.abs(d) < 0.5
    d = jnp.where(near, d, 0)
    close = m * (d * jnp.arctanh(d) + _log1p(-d * d) / 2)
    far = p * _log_ratio(_safe(p, p), _safe(m, p)) + q * _log_ratio(_safe(q, q), _safe(m, q))
    terms = _with_derivative(jnp.where(near, close, far / 2), far / 2)
    return _in_base(jnp.sum(terms, axes), base)


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
      base: Of the logarithm: 2 gives bits; None is e, for nats.

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
    logits, axes = _softmax.checked_logits("logits", logits, axis)
    return _in_base(_softmax.surprisals(logits, axes), base)


def softmax_entropy(
    logits: ArrayLike, *, axis: int | Sequence[int] = -1, base: float | None = None
) -> Float[Array, "*batch"]:
    """Entropy of softmax(logits).

    H = Σ_v p_v · (lse(z) − z_v),   ∂H/∂z_v = p_v · ((lse(z) − z_v) − H)

    Args:
      logits: z, float[..., V].
      axis: The class axis, or several.
      base: Of the logarithm: 2 gives bits; None is e, for nats.

    Returns:
      Entropies, of the logits' shape without `axis`.

    Raises:
      TypeError: logits are not floating-point.
      ValueError: The axis does not fit, or base is not a positive number other than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.softmax_entropy(jnp.zeros(8), base=2))
      3.0

    Source:
      Shannon, A Mathematical Theory of Communication, 1948, section 6.
    """
    logits, axes = _softmax.checked_logits("logits", logits, axis)
    return _in_base(_softmax.entropy(_softmax.classes_last(logits, axes)), base)


def softmax_kl_divergence(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    base: float | None = None,
) -> Float[Array, "*batch"]:
    """Kullback-Leibler divergence between softmax(p_logits) and softmax(q_logits).

    KL(p ‖ q) = Σ_v p_v · (log p_v − log q_v)

    Args:
      p_logits: Logits of the truth, float[..., V].
      q_logits: Logits of the prediction, of the same shape.
      axis: The class axis, or several.
      base: Of the logarithm: 2 gives bits; None is e, for nats.

    Returns:
      Divergences, of the logits' shape without `axis`.

    Raises:
      TypeError: Logits are not floating-point.
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
    p_logits, axes = _softmax.checked_logits("p_logits", p_logits, axis)
    q_logits, _ = _softmax.checked_logits("q_logits", q_logits, axis)
    checks.check_shape("q_logits", q_logits, p_logits.shape, "that of p_logits")
    p_surprisal = _softmax.surprisals(p_logits, axes)
    q_surprisal = _softmax.surprisals(q_logits, axes)
    p = jnp.exp(-p_surprisal)
    impossible = (p == 0) & ~jnp.isfinite(q_surprisal - p_surprisal)
    excess = jnp.where(impossible, 0, q_surprisal) - jnp.where(impossible, 0, p_surprisal)
    return _in_base(jnp.sum(p * excess, axes), base)


def _probabilities(name, p):
    """Returns p in the dtype of the arithmetic."""
    p = checks.as_array(name, p)
    checks.check_floating(name, p)
    return p.astype(jnp.promote_types(p.dtype, jnp.float32))


def _distributions(p, q, axis):
    """Returns p, q in the dtype of the arithmetic, and the axes of their outcomes."""
    p, q = _probabilities("p", p), _probabilities("q", q)
    checks.check_shape("q", q, p.shape, "that of p")
    return p, q, checks.canonical_axes(axis, p.ndim)


def _safe(q, p):
    """Returns q, with 1 where p and q are both 0: what never happens and never was expected."""
    return jnp.where((p == 0) & (q == 0), 1, q)


def _log_ratio(p, q):
    """Returns log(p / q), to full relative precision where p is near q."""
    near = jnp.abs(p - q) < q / 2
    change = jnp.where(near, p - q, 0) / jnp.where(near, q, 1)
    # One quotient loses less than two logarithms, if it is in range.
    in_range = (p < 1e30 * q) & (q < 1e30 * p)
    quotient = jnp.where(in_range, p, 1) / jnp.where(in_range, q, 1)
    difference = jnp.log(p) - jnp.log(q)
    gained = jnp.where(in_range, jnp.log(quotient) - difference, 0)
    far = difference + jax.lax.stop_gradient(gained)
    return jnp.where(near, _log1p(change), far)


def _log1p(x):
    """Returns log(1 + x), which XLA's CPU backend computes to 9 digits only in float64.

    The rounding of 1 + x is undone by the quotient (Kahan).
    """
    y = 1 + jax.lax.stop_gradient(x)
    small = y == 1
    slope = jnp.where(small, 1, jnp.log(y) / jnp.where(small, 1, y - 1))
    return _with_derivative(slope * jax.lax.stop_gradient(x), jnp.log1p(x))


def _with_derivative(value, function):
    """Returns `value`, with the derivative that `function`, nearly equal to it, has."""
    return jax.lax.stop_gradient(value) + (function - jax.lax.stop_gradient(function))


def _in_base(nats, base):
    """Returns nats in units of log(base)."""
    if base is None:
        return nats
    checks.check(
        0 < base < math.inf and base != 1,
        f"base: expected a positive number other than 1, got {base}",
    )
    return nats / jnp.log(jnp.asarray(base, nats.dtype))
