"""Logits of some classes and of all others together: distillation that is a true divergence."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import checks
from xentjax._jax import mesh as meshes
from xentjax._jax.rule import apply
from xentjax._losses import linear
from xentjax._losses.logit_transform import LogitTransform
from xentjax._softmax.head_buckets import HeadBuckets
from xentjax._targets import top_k
from xentjax._targets.types import is_valid


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


def linear_bucket_logits(
    inputs: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    class_axis: int = -1,
    class_mask: ArrayLike | None = None,
    logit_transform: LogitTransform | None = None,
    memory_budget: int | None = None,
) -> Float[Array, "*batch buckets"]:
    """`bucket_logits` of inputs @ kernel + bias, whose logits are never all in memory.

    z'_k = z_{indices_k} for k < K,   z'_K = log Σ_{v not in indices} exp(z_v)
    z = logit_transform(inputs @ kernel + bias)

    One matmul, and four with the gradients, as `linear_softmax_cross_entropy` without reduction.

    Args:
      inputs: The features of each token, float[..., D].
      kernel: float[D, V], or float[V, D] with class_axis=0.
      indices: K distinct classes of each token, int[..., K]. A class outside [0, V) makes the row
        NaN.
      bias: float[V].
      class_axis: The axis of the kernel that counts classes: 0, or 1 or −1.
      class_mask: The classes that there are, bool[V].
      logit_transform: An elementwise function of the logits, such as `temperature(2.0)`.
      memory_budget: Bytes for temporaries beside the gradients; None takes half a GiB.

    Returns:
      float[..., K + 1], float32 (float64 for float64); the last is −∞ where K is V.

    Raises:
      ValueError: Shapes do not fit, or K is 0.
      TypeError: As `linear_softmax_cross_entropy`, or indices are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> inputs, kernel = jnp.eye(2), jnp.array([[2.0, 0, 0], [0, 0, 1]])
      >>> indices = jnp.array([[0], [2]])
      >>> print(xentjax.linear_bucket_logits(inputs, kernel, indices).round(4))
      [[2.     0.6931]
       [1.     0.6931]]

    Source:
      Cover and Thomas, Elements of Information Theory, 2006, section 2.7: the log-sum inequality.
    """
    indices = top_k.as_indices(indices)
    # No token has a target: the rest of the arguments are those of any head.
    labels = jnp.zeros(indices.shape[:-1], jnp.int32)
    arrays = linear.as_arrays(inputs, kernel, labels, bias, class_mask, None)
    shape = (*arrays.inputs.shape[:-1], indices.shape[-1])
    checks.check_shape("indices", indices, shape, "K classes for the batch of inputs")
    options = linear.Options(class_axis, logit_transform, memory_budget)
    run = functools.partial(_linear_buckets, options=options)
    last = arrays.inputs.ndim - 1
    return meshes.on_automatic_axes(run, arrays.inputs, (last,), arrays, indices)(arrays, indices)


def _linear_buckets(arrays, indices, options):
    call = linear.prepare(arrays, options)
    num_classes = arrays.kernel.shape[call.head.class_axis]
    classes = jnp.clip(indices, 0, num_classes - 1).reshape(-1, indices.shape[-1])
    buckets = apply(HeadBuckets(call.head), call.tokens.inputs, call.params, classes)
    buckets = buckets.reshape(*indices.shape[:-1], indices.shape[-1] + 1)
    is_good = is_valid(indices, num_classes).all(-1, keepdims=True)
    return jnp.where(is_good, buckets, jnp.full_like(buckets, jnp.nan))
