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
        with one entry per argument: a tree like it, or None where nothing in it is live. What
        stands at a leaf that is not live is ignored.

    Returns:
      A function of the same arguments, differentiable to any order in forward and reverse mode.
      Reverse mode keeps exactly `residuals`, nothing else.
    """

    @jax.custom_jvp
    def function(*args):
        return value(*args)

    def jvp(primals, tangents):
        live = jax.tree.map(_is_live, tangents, is_leaf=_is_zero)
        out, residuals = fwd(live, *primals)

        def pushforward(residuals, live_tangents):
            def pullback(cotangent):
                return _select(live, bwd(live, residuals, cotangent))

            return jax.linear_transpose(pullback, out)(live_tangents)[0]

        # Under `checkpoint` the saved residuals are `residuals` and not what `bwd` makes of them.
        return out, jax.checkpoint(pushforward)(residuals, _select(live, tangents))

    function.defjvp(jvp, symbolic_zeros=True)
    return function


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _is_live(tangent: Any) -> bool:
    return not _is_zero(tangent)


def _select(live: tuple[Any, ...], trees: tuple[Any, ...]) -> list[Any]:
    """Returns the leaves of `trees` at which `live` is true."""
    selected = []
    for wanted, tree in zip(live, trees, strict=True):
        flags, treedef = jax.tree.flatten(wanted)
        if any(flags):
            leaves = treedef.flatten_up_to(tree)
            selected += [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]
    return selected
