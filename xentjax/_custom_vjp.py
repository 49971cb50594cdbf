"""One derivative rule per loss, right in every differentiation mode.

`jax.custom_vjp` takes a forward and a backward rule and gives up forward mode. Here the
backward rule alone is stated, and the tangent is its transpose: if the backward rule is
ct -> Jᵀ·ct, then forward mode is ẋ -> (Jᵀ)ᵀ·ẋ = J·ẋ, and reverse mode, which transposes
that again, is the backward rule itself.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero


def custom_vjp(
    value: Callable[..., Any],
    fwd: Callable[..., tuple[Any, Any]],
    bwd: Callable[[Any, Any, Any], tuple[Any, ...]],
) -> Callable[..., Any]:
    """Gives `value` the derivative that `fwd` and `bwd` define.

    Args:
      value: `value(*args) -> out`, used where nothing is differentiated.
      fwd: `fwd(live, *args) -> (out, residuals)`. `live` is `args` with a bool at each leaf:
        whether that leaf is being differentiated.
      bwd: `bwd(live, residuals, cotangent) -> cotangents`, linear in the cotangent of `out`,
        with one entry per argument; what stands at a leaf that is not live is ignored.

    Returns:
      A function of the same arguments, differentiable to any order in forward and reverse mode.
      Reverse mode keeps exactly `residuals`, nothing else.
    """

    @jax.custom_jvp
    def function(*args):
        return value(*args)

    def jvp(primals, tangents):
        leaves, treedef = jax.tree.flatten(tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
        is_live = [not isinstance(t, SymbolicZero) for t in leaves]
        live = jax.tree.unflatten(treedef, is_live)
        out, residuals = fwd(live, *primals)

        def pushforward(residuals, tangents):
            def pullback(cotangent):
                cotangents = treedef.flatten_up_to(bwd(live, residuals, cotangent))
                return [c for c, wanted in zip(cotangents, is_live, strict=True) if wanted]

            return jax.linear_transpose(pullback, out)(tangents)[0]

        # Under `checkpoint` the saved residuals are `residuals` and not what `bwd` makes of them.
        live_tangents = [t for t, wanted in zip(leaves, is_live, strict=True) if wanted]
        return out, jax.checkpoint(pushforward)(residuals, live_tangents)

    function.defjvp(jvp, symbolic_zeros=True)
    return function
