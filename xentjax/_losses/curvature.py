"""Curvature of the softmax cross-entropy in its logits, in closed form."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import checks
from xentjax._jax import mesh as meshes
from xentjax._losses import arguments
from xentjax._losses.softmax import prepared
from xentjax._softmax import reference
from xentjax._softmax.partial import masked
from xentjax._targets.mass import at_class, is_class
from xentjax._targets.types import Targets


def softmax_hessian_product(
    logits: ArrayLike,
    targets: Targets,
    vectors: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
) -> Float[Array, "*shape"]:
    """The Hessian of `softmax_cross_entropy` in the logits, times a vector for each example.

    H · v = T · (diag(p) − p · pᵀ) · v = T · p ∘ (v − Σ_w p_w · v_w),   p = softmax(z)

    H is positive semi-definite, and depends on targets by their mass T alone: it is the matrix of a
    Gauss-Newton product Jᵀ · H · J · v, where J is that of a model's logits.

    Args:
      logits: z, float[..., V].
      targets: As in `softmax_cross_entropy`.
      vectors: v, float, of the shape of logits.
      axis: The class axis, or several.
      where: As in `softmax_cross_entropy`; the product is 0 where the gradient is.

    Returns:
      Products, of the shape and dtype of logits, as a gradient is.

    Raises:
      TypeError, ValueError: As in `softmax_cross_entropy`, or vectors are not floating-point or
        have another shape than logits.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> z, v = jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]])
      >>> print(xentjax.softmax_hessian_product(z, jnp.array([0]), v))
      [[ 0.25 -0.25]]

    Source:
      Schraudolph, Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent, 2002.
    """
    logits, axes = arguments.as_logits("logits", logits, axis)
    vectors = checks.as_array("vectors", vectors)
    checks.check_floating("vectors", vectors)
    checks.check_shape("vectors", vectors, logits.shape, "that of logits")
    targets = arguments.as_arrays(targets)
    where = None if where is None else checks.as_array("where", where, "a bool array")
    run = functools.partial(_product, axes=axes)
    run = meshes.on_automatic_axes(run, logits, (), targets, vectors, where)
    return run(logits, targets, vectors, where)


@arguments.jit_unless_traced("axes")
def _product(logits, targets, vectors, where, axes):
    z, mass, mask = prepared(logits, targets, where, axes)
    total = mass.total()
    z = masked(z, mask).astype(total.dtype)
    v = masked(arguments.classes_last(vectors, axes).astype(total.dtype), mask)
    product = masked(_hessian_product(z, total, v), mask)
    return arguments.classes_back(product, logits.shape, axes).astype(logits.dtype)


def _hessian_product(z, total, v):
    """Seen from the leading class, whose v is then 0, nothing cancels though its p is near 1."""
    a, _, terms = reference.leader_and_rest(z)
    normalizer = 1 + terms.sum(-1)[..., None]
    p = jnp.where(is_class(a, z), jnp.ones_like(terms), terms) / normalizer
    v = v - at_class(v, a)[..., None]
    mean = (terms * v).sum(-1)[..., None] / normalizer
    return total[..., None] * p * (v - mean)
