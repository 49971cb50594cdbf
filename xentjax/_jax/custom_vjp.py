"""One derivative rule per loss, right in every differentiation mode.

`jax.custom_vjp` takes a forward and a backward rule and gives up forward mode. Here too the
backward rule ct -> Jᵀ·ct is all that is stated. The tangent is its transpose, ẋ -> (Jᵀ)ᵀ·ẋ = J·ẋ,
wrapped in a primitive whose own transpose is the backward rule as it was written: forward mode
evaluates the one, reverse mode the other, and what is differentiated again is either's own code.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


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
      Reverse mode keeps exactly `residuals`, nothing else. No argument may be closed over.
    """

    @jax.custom_jvp
    def function(*args):
        return value(*args)

    def jvp(primals, tangents):
        live = jax.tree.map(_is_live, tangents, is_leaf=_is_zero)
        out, residuals = fwd(live, *primals)
        residuals, residuals_def = jax.tree.flatten(residuals)
        out_leaves, out_def = jax.tree.flatten(out)
        out_avals = tuple(map(jax.typeof, out_leaves))

        def pullback(residuals, cotangents):
            residuals = jax.tree.unflatten(residuals_def, residuals)
            return _select(live, bwd(live, residuals, jax.tree.unflatten(out_def, cotangents)))

        def pushforward(residuals, tangents):
            def linear(cotangents):
                return pullback(residuals, cotangents)

            return jax.linear_transpose(linear, list(out_avals))(tangents)[0]

        tangent = _bind(pushforward, pullback, out_avals, residuals, _select(live, tangents))
        return out, jax.tree.unflatten(out_def, tangent)

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


# (residuals, tangents) -> J·tangents, which `pushforward` computes, traced only if it is asked for.
# `pullback(residuals, cotangents)` is its transpose in the tangents.
_pushforward_p = Primitive("xentjax_pushforward")
_pushforward_p.multiple_results = True


def _bind(pushforward, pullback, out_avals, residuals, tangents):
    """Returns pushforward(residuals, tangents) as one equation, whose transpose is `pullback`."""
    return _pushforward_p.bind(
        *residuals,
        *tangents,
        pushforward=pushforward,
        pullback=pullback,
        out_avals=out_avals,
        num_residuals=len(residuals),
    )


def _evaluate(*args, pushforward, num_residuals, **_):
    return pushforward(list(args[:num_residuals]), list(args[num_residuals:]))


def _jvp(primals, tangents, *, num_residuals, **functions):
    params = {"num_residuals": num_residuals, **functions}
    moved = [i for i in range(num_residuals) if not isinstance(tangents[i], ad.Zero)]

    def of_moved(values):
        args = list(primals)
        for i, v in zip(moved, values, strict=True):
            args[i] = v
        return _evaluate(*args, **params)

    out = _pushforward_p.bind(*primals, **params)
    linear = [ad.instantiate_zeros(t) for t in tangents[num_residuals:]]
    out_tangents = _pushforward_p.bind(*primals[:num_residuals], *linear, **params)
    if moved:
        values = [primals[i] for i in moved]
        changes = jax.jvp(of_moved, (values,), ([tangents[i] for i in moved],))[1]
        out_tangents = [a + b for a, b in zip(out_tangents, changes, strict=True)]
    return out, out_tangents


def _transpose(cotangents, *args, pullback, num_residuals, **_):
    residuals, tangents = list(args[:num_residuals]), args[num_residuals:]
    cotangents = pullback(residuals, [ad.instantiate_zeros(ct) for ct in cotangents])
    wanted = [ad.is_undefined_primal(t) for t in tangents]
    selected = [ct if w else None for ct, w in zip(cotangents, wanted, strict=True)]
    return [None] * num_residuals + selected


def _batch(args, axes, *, pushforward, pullback, num_residuals, **_):
    (size,) = {x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None}

    def at_front(x, axis, must):
        if axis is None and must:
            return jax.numpy.broadcast_to(x, (size, *x.shape)), 0
        return (x, None) if axis is None else (jax.numpy.moveaxis(x, axis, 0), 0)

    def split(values):
        return list(values[:num_residuals]), list(values[num_residuals:])

    # Tangents are all mapped, so that the transpose has one for each of the batch.
    pairs = [
        at_front(x, a, i >= num_residuals) for i, (x, a) in enumerate(zip(args, axes, strict=True))
    ]
    residuals, tangents = split([x for x, _ in pairs])
    in_axes, _ = split([a for _, a in pairs])

    axes = (in_axes, 0)
    pushforward = jax.vmap(pushforward, in_axes=axes, axis_size=size)
    pullback = jax.vmap(pullback, in_axes=axes, axis_size=size)
    out_avals = tuple(jax.make_jaxpr(pushforward)(residuals, tangents).out_avals)
    out = _bind(pushforward, pullback, out_avals, residuals, tangents)
    return out, [0] * len(out)


_pushforward_p.def_impl(_evaluate)
_pushforward_p.def_abstract_eval(lambda *_, out_avals, **__: list(out_avals))
ad.primitive_jvps[_pushforward_p] = _jvp
ad.primitive_transposes[_pushforward_p] = _transpose
batching.primitive_batchers[_pushforward_p] = _batch
mlir.register_lowering(_pushforward_p, mlir.lower_fun(_evaluate, multiple_results=True))
