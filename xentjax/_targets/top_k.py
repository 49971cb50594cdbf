"""A teacher's largest probabilities as sparse targets, and the fate of its tail.

The k largest classes and all others together are k + 1 outcomes, the buckets. Their logits are
those of the k classes, and for the last bucket the log-normalizer of the other classes.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from xentjax._jax import checks
from xentjax._jax import mesh as _mesh
from xentjax._jax.dtypes import wide, wide_dtype
from xentjax._targets import mass
from xentjax._targets import types as _targets
from xentjax._targets.types import SparseTargets

Tail = Literal["drop", "background"]


def top_k_targets(
    logits: ArrayLike, k: int, *, temperature: ArrayLike = 1.0, tail: Tail = "drop"
) -> SparseTargets:
    """A teacher's k largest probabilities, from its logits.

    t = Σ_k p_{i_k} · onehot(i_k) / Σ_k p_{i_k},   p = softmax(logits / temperature)

    With tail="background" nothing is divided, and 1 − Σ_k p_{i_k} is spread over all classes. The
    third way, all other classes as one outcome, is a loss of its own: see `bucket_logits`.

    Args:
      logits: The teacher's, float[..., V].
      k: How many classes to keep, at most V.
      temperature: A positive scalar, which divides the logits; it may be traced.
      tail: The fate of the other classes: "drop" leaves them out, and "background" is a uniform
        background.

    Returns:
      SparseTargets of total mass 1, the largest first, float32 (float64 for float64 logits). They
      are differentiable in the logits: put `jax.lax.stop_gradient` around a teacher that is not
      trained.

    Raises:
      ValueError: k is not in [1, V], temperature is not a positive scalar, or tail is neither.
      TypeError: logits are not floating-point, k is not an int, or temperature is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> teacher = jnp.log(jnp.array([[1.0, 3.0, 1.0, 3.0]]))
      >>> print(xentjax.dense_targets(xentjax.top_k_targets(teacher, 2), 4))
      [[0.  0.5 0.  0.5]]
      >>> t = xentjax.top_k_targets(teacher, 2, tail="background")
      >>> print(t.weights.round(3), t.background_mass.round(3))
      [[0.375 0.375]] [0.25]

    Source:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    logits = as_logits(logits)
    expected = f"k: expected an int in [1, {logits.shape[-1]}], got {k!r}"
    checks.check(checks.is_int(k), expected, TypeError)
    checks.check(1 <= k <= logits.shape[-1], expected)
    tau = checks.as_positive("temperature", temperature)
    _check_tail(tail)
    last = (logits.ndim - 1,)
    run = functools.partial(_top_k, k=int(k), tail=tail)
    return _mesh.on_automatic_axes(run, logits, last)(logits, tau)


def teacher_targets(
    indices: ArrayLike, log_probabilities: ArrayLike, *, tail: Tail = "drop"
) -> SparseTargets:
    """A teacher's largest probabilities, as they were stored.

    t = Σ_k p_k · onehot(indices_k) / Σ_k p_k,   p = exp(log_probabilities)

    With tail="background" nothing is divided, and 1 − Σ_k p_k (0 where rounding made it negative)
    is spread over all classes. `jnp.log` makes log-probabilities of probabilities. A temperature
    divides them, `log_probabilities / temperature`, if the tail is dropped; the mass of a tail at
    another temperature is not in them.

    Args:
      indices: The classes, int[..., K].
      log_probabilities: Those of these classes, in nats, float[..., K]; −∞ fills up shorter rows.
      tail: The fate of the other classes: "drop" leaves them out, and "background" is a uniform
        background.

    Returns:
      SparseTargets, float32 (float64 for float64), of total mass 1, or 0 where every
      log-probability is −∞ and the tail is dropped.

    Raises:
      ValueError: Shapes differ, K is 0, or tail is neither.
      TypeError: indices are not integers, or log_probabilities are not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> stored = jnp.array([[1, 3]]), jnp.log(jnp.array([[0.375, 0.375]]))
      >>> print(xentjax.teacher_targets(*stored).weights)
      [[0.5 0.5]]
      >>> print(xentjax.teacher_targets(*stored, tail="background").background_mass.round(3))
      [0.25]

    Source:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    indices = as_indices(indices)
    logs = checks.as_array("log_probabilities", log_probabilities)
    checks.check_floating("log_probabilities", logs)
    checks.check_shape("log_probabilities", logs, indices.shape, "that of indices")
    _check_tail(tail)
    run = functools.partial(_stored, tail=tail)
    return _mesh.on_automatic_axes(run, indices, (indices.ndim - 1,), logs)(indices, logs)


def as_logits(logits: ArrayLike) -> jax.Array:
    """Returns logits of at least one class as an array."""
    logits = checks.as_array("logits", logits)
    checks.check_floating("logits", logits)
    checks.check(
        logits.ndim > 0 and logits.shape[-1] > 0,
        f"logits: expected shape [..., V], of at least one class, got {checks.describe(logits)}",
    )
    checks.check_known("logits", logits.shape[-1], "classes")
    return logits


def as_indices(indices: ArrayLike) -> jax.Array:
    """Returns classes int32[..., K], K > 0, as an array."""
    indices = _targets.as_classes("indices", indices)
    expected = f"indices: expected integers of shape [..., K], got {checks.describe(indices)}"
    checks.check(jnp.issubdtype(indices.dtype, jnp.integer), expected, TypeError)
    checks.check(indices.ndim > 0 and indices.shape[-1] > 0, expected)
    return indices


def _check_tail(tail):
    checks.check(
        isinstance(tail, str) and tail in ("drop", "background"),
        f'tail: expected "drop" or "background", got {tail!r}',
    )


@functools.partial(jax.jit, static_argnames=("k", "tail"), inline=True)
def _top_k(logits, tau, k, tail):
    z = wide(logits)
    z = z / tau.astype(z.dtype)
    largest, indices = jax.lax.top_k(z, k)
    buckets = largest if tail == "drop" else buckets_of(z, indices)
    return _targets_of(indices, buckets, logits.shape[-1])


@functools.partial(jax.jit, static_argnames="tail", inline=True)
def _stored(indices, log_probabilities, tail):
    buckets = wide(log_probabilities)
    if tail == "background":
        of_tail = 1 - jnp.exp(buckets).sum(-1, keepdims=True)
        is_some = of_tail > 0
        log_of_tail = jnp.log(jnp.where(is_some, of_tail, jnp.ones_like(of_tail)))
        log_of_tail = jnp.where(is_some, log_of_tail, jnp.full_like(of_tail, -jnp.inf))
        buckets = jnp.concatenate([buckets, log_of_tail], axis=-1)
    return _targets_of(indices, buckets, None)


def _targets_of(indices, buckets, num_classes):
    """Returns the masses softmax(buckets) on K classes, and on a background if there are K + 1."""
    masses, k = _softmax(buckets), indices.shape[-1]
    tail = None if buckets.shape[-1] == k else masses[..., k]
    return SparseTargets(indices, masses[..., :k], tail, num_classes=num_classes)


def _softmax(logits):
    """Returns softmax(logits), and 0 where every logit is −∞."""
    top = _top(logits)
    exponentials = jnp.exp(logits - top)
    total = exponentials.sum(-1, keepdims=True)
    return exponentials / jnp.where(total == 0, jnp.ones_like(total), total)


def _top(logits):
    """Returns the largest logit, [..., 1], as a constant; 0 where every one is −∞."""
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    return jnp.where(top == -jnp.inf, jnp.zeros_like(top), top)


@functools.partial(jax.jit, inline=True)
def buckets_of(logits: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns the logits of K classes and of all others together, [..., K + 1]."""
    z = logits.astype(wide_dtype(logits.dtype))
    valid = _targets.is_valid(indices, z.shape[-1])
    classes = jnp.clip(indices, 0, z.shape[-1] - 1)
    picked = jnp.where(valid, mass.at_classes(z, classes), jnp.asarray(jnp.nan, z.dtype))
    where = mass.rows_and(classes)
    others = z.at[where].set(jnp.asarray(-jnp.inf, z.dtype), mode="promise_in_bounds")
    top = _top(others)
    total = jnp.exp(others - top).sum(-1, keepdims=True)
    some = total > 0
    rest = top + jnp.log(jnp.where(some, total, jnp.ones_like(total)))
    rest = jnp.where(some, rest, jnp.full_like(rest, -jnp.inf))
    is_bad = ~valid.all(-1, keepdims=True)
    return jnp.where(is_bad, jnp.asarray(jnp.nan, z.dtype), jnp.concatenate([picked, rest], -1))
