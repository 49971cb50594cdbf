"""Logits of some classes and of all others together: distillation that is a true divergence."""

from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import checks
from xentjax._jax import mesh as meshes
from xentjax._targets import top_k


def bucket_logits(logits: ArrayLike, indices: ArrayLike) -> Float[Array, "*batch buckets"]:
    """Logits of K classes and of all others together.

    z'_k = z_{indices_k} for k < K,   z'_K = log Σ_{v not in indices} exp(z_v)

    softmax(z') are the probabilities of these K + 1 outcomes. A divergence of two such rows is
    that of the teacher and the student as far as the K classes tell them apart: never negative,
    and 0 where they agree. `linear_bucket_logits` makes the student's row from its last layer.

    Args:
      logits: float[..., V].
      indices: K distinct classes of each example, int[..., K]. A class outside [0, V) makes the
        row NaN.

    Returns:
      float[..., K + 1], float32 (float64 for float64 logits); the last is −∞ where K is V.

    Raises:
      ValueError: indices are not [..., K] of the batch of logits, or K is 0.
      TypeError: logits are not floating-point, or indices are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> teacher = jnp.log(jnp.array([0.1, 0.6, 0.2, 0.1]))
      >>> student = jnp.log(jnp.array([0.25, 0.5, 0.15, 0.1]))
      >>> buckets = [xentjax.bucket_logits(z, jnp.array([1, 2])) for z in (teacher, student)]
      >>> print(jnp.exp(buckets[0]).round(3), xentjax.softmax_kl_divergence(*buckets).round(4))
      [0.6 0.2 0.2] 0.055

    Source:
      Cover and Thomas, Elements of Information Theory, 2006, section 2.7: the log-sum inequality.
    """
    logits, indices = top_k.as_logits(logits), top_k.as_indices(indices)
    batch = logits.shape[:-1]
    shape = (*batch, indices.shape[-1])
    checks.check_shape("indices", indices, shape, "K classes for the batch of logits")
    return meshes.on_automatic_axes(top_k.buckets_of, logits, (len(batch),), indices)(
        logits, indices
    )
