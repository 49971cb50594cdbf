"""Checks of values, which a trace does not know: raised at once, or recorded for checkify.

`checkify.check` inside a function that is compiled, but not by way of `checkify.checkify`, fails in
JAX's words. The primitive here holds that check as a `call_jaxpr`. By JAX's rule for calls
(`default_checkify_rule`, jax 0.10.2) `checkify` binds the primitive again with the check made
functional, and that is called in its place. So the primitive is lowered only where there is no
`checkify`, and says so in our words.
"""

from typing import Any, NoReturn

import jax
from jax.core import Tracer
from jax.experimental import checkify
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

UNDER_JIT = (
    "value_checks of xentjax: expected checkify around the compiled function, got none; write "
    "`error, value = checkify.checkify(jax.jit(f))(...)` and then `error.throw()`, with "
    "`from jax.experimental import checkify`"
)


def check_values(condition: jax.Array, message: str, **values: Any) -> None:
    """Raises or records an error unless `condition` holds, with `values` filled into `message`."""

    def check(condition, values):
        checkify.check(condition, message, **values)

    if not isinstance(condition, Tracer):
        check(condition, values)
        return
    call_jaxpr = jax.make_jaxpr(check)(condition, values)
    _check_p.bind(*jax.tree.leaves((condition, values)), call_jaxpr=call_jaxpr)


class _CheckPrimitive(Primitive):
    """A call of a check that has no outputs."""

    multiple_results = True

    def bind(self, *args: Any, **params: Any) -> Any:
        """Binds the call; from `checkify`, calls the function that it has made of the check."""
        for function in params.get("subfuns", ()):
            return function.call_wrapped(*args)
        return super().bind(*args, **params)


_check_p = _CheckPrimitive("xentjax_check_values")


@_check_p.def_impl
def _evaluate(*args: Any, call_jaxpr: ClosedJaxpr) -> list[Any]:
    return jaxpr_as_fun(call_jaxpr)(*args)


@_check_p.def_effectful_abstract_eval
def _effects(*avals: Any, call_jaxpr: ClosedJaxpr) -> tuple[list[Any], Any]:
    del avals
    return [], call_jaxpr.effects


def _batch(args, axes, *, call_jaxpr):
    function = jax.vmap(jaxpr_as_fun(call_jaxpr), in_axes=tuple(axes))
    _check_p.bind(*args, call_jaxpr=jax.make_jaxpr(function)(*args))
    return [], []


def _differentiate(primals, tangents, *, call_jaxpr):
    del tangents
    _check_p.bind(*primals, call_jaxpr=call_jaxpr)
    return [], []


def _lower(ctx: Any, *operands: Any, call_jaxpr: ClosedJaxpr) -> NoReturn:
    del ctx, operands, call_jaxpr
    raise ValueError(UNDER_JIT)


batching.primitive_batchers[_check_p] = _batch
ad.primitive_jvps[_check_p] = _differentiate
mlir.register_lowering(_check_p, _lower)
