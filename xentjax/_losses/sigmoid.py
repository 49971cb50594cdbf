"""Cross-entropy for yes or no: binary and multi-label problems.

With softplus(x) = max(x, 0) + log1p(exp(−|x|)):

    loss(z, t) = t · softplus(−z) + (1 − t) · softplus(z)
               = max((1 − t) · z, −t · z) + log1p(exp(−|z|))
    ∂loss/∂z   = (1 − t) · σ(z) − t · σ(−z)                 = σ(z) − t, without its cancellation
    ∂loss/∂t   = −z
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import checks
from xentjax._jax.custom_vjp import custom_vjp


def sigmoid_binary_cross_entropy(logits: ArrayLike, targets: ArrayLike) -> Float[Array, "*shape"]:
    """Cross-entropy between targets and sigmoid(logits), element by element.

    loss = t · softplus(−z) + (1 − t) · softplus(z),   ∂loss/∂z = σ(z) − t

    Args:
      logits: z, float[...]; ±inf is certainty, of loss 0 where the target agrees.
      targets: t, the probability of yes in [0, 1]: float, bool or int, of the shape of logits.

    Returns:
      Losses in nats, of the shape of logits, float32 (float64 for float64 logits).

    Raises:
      TypeError: logits are not floating-point, or targets are complex.
      ValueError: The shapes differ; nothing broadcasts.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.sigmoid_binary_cross_entropy(jnp.array([0.0, 20.0]), jnp.array([1, 1])))
      [6.9315e-01 2.0612e-09]

    Source:
      Goodfellow et al., Deep Learning, 2016, section 6.2.2.2.
    """
    logits, targets = _as_binary("logits", logits, targets)
    return _sigmoid_cross_entropy(logits, targets)


def multilabel_cross_entropy(
    logits: ArrayLike, targets: ArrayLike, *, axis: int | Sequence[int] = -1
) -> Float[Array, "*batch"]:
    """Sum of the binary cross-entropies of an example's labels, each a yes or a no of its own.

    loss = Σ_v [ t_v · softplus(−z_v) + (1 − t_v) · softplus(z_v) ]

    Args:
      logits: z, float[..., V].
      targets: t, the probability of each label in [0, 1], of the shape of logits.
      axis: The axis of the labels, or several.

    Returns:
      One loss per example in nats, of the logits' shape without `axis`.

    Raises:
      TypeError: logits are not floating-point, or targets are complex.
      ValueError: The shapes differ, or the axis does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> logits, targets = jnp.array([[2.0, -1.0, 0.0]]), jnp.array([[1, 0, 1]])
      >>> print(xentjax.multilabel_cross_entropy(logits, targets).round(4))
      [1.1333]

    Source:
      Goodfellow et al., Deep Learning, 2016, section 6.2.2.2.
    """
    losses = sigmoid_binary_cross_entropy(logits, targets)
    return losses.sum(checks.canonical_axes(axis, losses.ndim))


def binary_cross_entropy(probabilities: ArrayLike, targets: ArrayLike) -> Float[Array, "*shape"]:
    """Log loss of probabilities, element by element.

    loss = −t · log p − (1 − t) · log(1 − p),   with 0 · log 0 = 0

    There is no epsilon in it: certainty that is wrong costs +inf. Where there are logits,
    `sigmoid_binary_cross_entropy` is more exact.

    Args:
      probabilities: p, of yes, float[...] in [0, 1].
      targets: t, in [0, 1]: float, bool or int, of the shape of probabilities.

    Returns:
      Losses in nats, of the shape of probabilities, float32 (float64 for float64).

    Raises:
      TypeError: probabilities are not floating-point, or targets are complex.
      ValueError: The shapes differ; nothing broadcasts.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> losses = xentjax.binary_cross_entropy(jnp.array([0.9, 1, 1]), jnp.array([1, 1, 0]))
      >>> print(losses.round(4))
      [0.1054 0.        inf]

    Source:
      Good, Rational Decisions, 1952, section 4.
    """
    p, t = _as_binary("probabilities", probabilities, targets)
    p = p.astype(t.dtype)
    yes = -jnp.log(jnp.where((t == 0) & (p == 0), 1, p))
    no = -jnp.log1p(-jnp.where((t == 1) & (p == 1), 0, p))
    return t * yes + (1 - t) * no


def _as_binary(name, predictions, targets):
    """Returns predictions as they are, and targets in the dtype of the arithmetic."""
    predictions = checks.as_array(name, predictions)
    targets = checks.as_array("targets", targets)
    checks.check_floating(name, predictions)
    checks.check(
        not jnp.issubdtype(targets.dtype, jnp.complexfloating),
        f"targets: expected float, bool or int, got {checks.describe(targets)}",
        TypeError,
    )
    checks.check_shape("targets", targets, predictions.shape, f"that of {name}")
    return predictions, targets.astype(jnp.promote_types(predictions.dtype, jnp.float32))


@jax.custom_jvp
def _sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


@_sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return _sigmoid(x), _sigmoid(x) * _sigmoid(-x) * tangent


def _fwd(live, logits, targets):
    del live
    z = logits.astype(targets.dtype)
    return _linear(z, targets) + jnp.log1p(jnp.exp(-jnp.abs(z))), (logits, targets)


def _linear(z, t):
    """Returns max((1 − t) · z, −t · z), with 0 · inf = 0; an ulp of 1 more or less is nothing.

    It does so without a choice, at which XLA's CPU backend gives up its fast sums: in units of
    2¹⁰⁰ (in float32) every logit but ±inf is a small number, and the bounds leave them all alone.
    (Two bounds in a row would be a clip, at which it gives them up too; hence the half.)
    """
    number = jnp.finfo(z.dtype)
    unit = 2.0 ** (number.maxexp - number.nmant - 5)
    half = jnp.maximum(jnp.minimum(z / unit, number.max) / 2, -number.max)
    yes = t * (2 * unit)
    return jnp.maximum((2 * unit - yes) * half, -yes * half)


def _bwd(live, residuals, cotangent):
    del live
    logits, targets = residuals
    z = logits.astype(targets.dtype)
    error = (1 - targets) * _sigmoid(z) - targets * _sigmoid(-z)
    return (cotangent * error).astype(logits.dtype), cotangent * -z


_sigmoid_cross_entropy = jax.jit(custom_vjp(lambda *args: _fwd(None, *args)[0], _fwd, _bwd))
