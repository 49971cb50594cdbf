"""Surprisal, entropy and the divergences of softmaxes, from logits."""

import functools
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import checks, value_checks
from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide_dtype
from xentjax._jax.rule import apply
from xentjax._losses import arguments
from xentjax._losses.divergence import JSOfLogits, KLOfLogits
from xentjax._losses.softmax import entropies
from xentjax._softmax import reference


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
    value_checks.check_logits(logits, None)
    run = functools.partial(_surprisals, axes=axes)
    return arguments.in_base(meshes.on_automatic_axes(run, logits, ())(logits), base)


def _surprisals(logits, axes):
    surprisals = reference.surprisals(arguments.classes_last(logits, axes))
    return arguments.classes_back(surprisals, logits.shape, axes)


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
    return arguments.in_base(meshes.on_automatic_axes(run, logits, axes)(logits, where), base)


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
    return _divergence(KLOfLogits, p_logits, q_logits, axis, where, base)


def softmax_js_divergence(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    beta: float = 0.5,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    base: float | None = None,
) -> Float[Array, "*batch"]:
    """Jensen-Shannon divergence between softmax(p_logits) and softmax(q_logits).

    JS(p, q) = β · KL(p ‖ m) + (1 − β) · KL(q ‖ m),   m = β · p + (1 − β) · q

    Finite whatever the logits, and exact however near q is to p. With β = ½ it is symmetric;
    divided by β it goes to KL(p ‖ q) as β goes to 0.

    Args:
      p_logits: Logits of one distribution, float[..., V].
      q_logits: Logits of another, of the same shape.
      beta: The share of p in the middle, a Python number between 0 and 1.
      axis: The class axis, or several.
      where: A mask of the result's shape keeps examples, the others have divergence and gradient 0;
        one of the logits' shape keeps classes, the others have probability 0 in both distributions.
      base: The base of the logarithm: 2 gives bits; None is e, for nats.

    Returns:
      Divergences, of the logits' shape without `axis`, float32 (float64 if some logits are).

    Raises:
      TypeError: Logits are not floating-point, beta is not a number, or where is not bool.
      ValueError: The shapes differ, the axis does not fit, beta is not between 0 and 1, or base is
        not a positive number other than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> a, b = jnp.array([100.0, 0.0]), jnp.array([0.0, 100.0])
      >>> print(xentjax.softmax_js_divergence(a, b, base=2))
      1.0

    Source:
      Lin, Divergence Measures Based on the Shannon Entropy, 1991, equation 5.1; of teacher and
      student: Agarwal et al., On-Policy Distillation of Language Models, 2024, section 2.
    """
    wanted = f"beta: expected a number between 0 and 1, got {beta!r}"
    checks.check(isinstance(beta, numbers.Real) and not isinstance(beta, bool), wanted, TypeError)
    checks.check(0 < beta < 1, wanted)
    rule = functools.partial(JSOfLogits, beta=float(beta))
    return _divergence(rule, p_logits, q_logits, axis, where, base)


def _divergence(rule, p_logits, q_logits, axis, where, base):
    """Returns the divergences of a rule, in units of `base`."""
    p_logits, axes = arguments.as_logits("p_logits", p_logits, axis)
    q_logits, _ = arguments.as_logits("q_logits", q_logits, axis)
    checks.check_shape("q_logits", q_logits, p_logits.shape, "that of p_logits")
    dtype = wide_dtype(p_logits.dtype, q_logits.dtype)
    batch = tuple(n for a, n in enumerate(p_logits.shape) if a not in axes)
    if where is not None:
        where = checks.as_mask(where, batch, p_logits.shape, "classes")
    if value_checks.are_on():
        for name, z in (("p_logits", p_logits), ("q_logits", q_logits)):
            kept = where
            if where is not None and where.shape == z.shape:
                kept = arguments.classes_last(where, axes)
            value_checks.check_logits(arguments.classes_last(z, axes), kept, name)
    return arguments.in_base(_divergences(p_logits, q_logits, where, rule(axes), dtype), base)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _divergences(p_logits, q_logits, where, rule, dtype):
    a, b = p_logits.astype(dtype), q_logits.astype(dtype)
    if where is None:
        return apply(rule, a, b)
    if where.shape == a.shape:
        return apply(rule, *(jnp.where(where, z, -jnp.inf) for z in (a, b)))
    examples = jnp.expand_dims(where, rule.axes)
    divergences = apply(rule, *(jnp.where(examples, z, 0) for z in (a, b)))
    return jnp.where(where, divergences, 0)
