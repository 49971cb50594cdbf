"""Elementwise functions of logits: a soft cap, a temperature, or one's own."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxpr_as_fun
from jaxtyping import ArrayLike

from xentjax._jax import checks
from xentjax._jax import mesh as meshes
from xentjax._softmax.head_blocks import identity

LogitTransform = Callable[[jax.Array], jax.Array]
"""An elementwise function of logits."""


def soft_cap(cap: ArrayLike) -> LogitTransform:
    """Returns the logit transform that keeps logits within (−cap, cap).

    z -> cap · tanh(z / cap)

    Args:
      cap: A positive scalar; it may be traced and differentiated.

    Returns:
      An elementwise function of logits.

    Raises:
      TypeError: cap is not a real number.
      ValueError: cap is not positive, or not a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.soft_cap(30.0)(jnp.array([0.0, 30.0, 1000.0])).round(2))
      [ 0.   22.85 30.  ]

    Source:
      Gemma Team, Gemma 2, 2024, section 2.
    """
    return _with_scale("cap", cap, lambda logits, cap: cap * jnp.tanh(logits / cap))


def temperature(tau: ArrayLike) -> LogitTransform:
    """Returns the logit transform that divides by a temperature.

    z -> z / tau

    Args:
      tau: A positive scalar; it may be traced and differentiated.

    Returns:
      An elementwise function of logits.

    Raises:
      TypeError: tau is not a real number.
      ValueError: tau is not positive, or not a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.temperature(2.0)(jnp.array([1.0, 4.0])))
      [0.5 2. ]

    Source:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    return _with_scale("tau", tau, lambda logits, tau: logits / tau)


def _with_scale(name, scale, function):
    """Returns the logit transform function(logits, scale), in the dtype of the logits."""
    scale = checks.as_positive(name, scale)

    def transform(logits: ArrayLike) -> jax.Array:
        logits = checks.as_array("logits", logits)
        checks.check_floating("logits", logits)
        return function(logits, scale.astype(logits.dtype))

    return transform


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """A logit transform as a function (logits [N, V], *constants) -> logits.

    Two of the same operations are equal, so that a lambda made anew for each call is not compiled
    anew.

    Attributes:
      operations: The operations as text.
      function: (logit, *constants) -> [logit].
    """

    operations: str
    function: Callable[..., Any] = dataclasses.field(compare=False)

    def __call__(self, logits: jax.Array, *constants: jax.Array) -> jax.Array:
        """Returns the transform of every logit."""

        def of_logit(z, *constants):
            return self.function(*constants, z)[0]

        function = of_logit
        for _ in range(logits.ndim):
            function = jax.vmap(function, in_axes=(0, *(None for _ in constants)))
        return function(logits, *constants)


def converted(
    transform: LogitTransform | None, dtype: jnp.dtype, over: frozenset[Hashable]
) -> tuple[Callable[..., jax.Array], list[jax.Array], frozenset[Hashable]]:
    """Returns (function(logits [N, V], *constants), constants): closed-over arrays as arguments.

    The third is the mesh axes that logits vary along: `over`, and those of the constants.
    """
    if transform is None:
        return identity, [], over
    checks.check_callable("logit_transform", transform)
    _check_elementwise(transform, dtype)
    # The operations on one logit; `Elementwise` maps them over blocks of any shape.
    logit = jnp.zeros((), dtype)
    over = over | meshes.varying_axes(jax.make_jaxpr(transform)(logit).consts)
    closed = jax.make_jaxpr(transform)(meshes.varying(logit, over))
    constants = [jnp.asarray(c) for c in closed.consts]
    # The text begins with the types of the constants, whose values are arguments.
    types = ", ".join(str(jax.typeof(c)) for c in constants)
    jaxpr = closed.jaxpr

    def function(*args):
        consts, logit = args[:-1], args[-1]
        return jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(logit)

    return Elementwise(f"[{types}] {jaxpr}", function), constants, over


def _check_elementwise(transform, dtype):
    """Raises TypeError or ValueError unless `transform` treats every logit alike and alone."""
    expected = "logit_transform: expected an elementwise function of logits"
    name = getattr(transform, "__name__", "")
    checks.check(
        transform not in (soft_cap, temperature),
        f"{expected}, got {name} itself; call {name}(30.0) first",
        TypeError,
    )

    def checked(logits):
        given = checks.describe(logits)
        try:
            out = transform(logits)
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{expected} of any shape, got one that fails for {given}: {error}"
            ) from error
        is_array = isinstance(out, jax.Array | np.ndarray)
        checks.check(is_array, f"{expected}, got one that returns {out!r}", TypeError)
        checks.check(
            out.shape == logits.shape and out.dtype == dtype,
            f"{expected}, {given} to the same, got one that returns {checks.describe(out)}",
        )
        return out

    jaxpr = jax.make_jaxpr(checked)(jax.ShapeDtypeStruct(_EXAMPLE, dtype)).jaxpr
    mixing, _ = _mixing_operation(jaxpr, dict.fromkeys(jaxpr.invars, _LOGIT))
    checks.check(
        mixing is None,
        f"{expected}, for it is applied to blocks of them, got one in which {mixing} mixes logits "
        "or treats them by their place",
    )
    jax.make_jaxpr(checked)(jax.ShapeDtypeStruct((), dtype))


_EXAMPLE = (2, 3)
_SHAPE_KEEPING = frozenset(
    (
        "cumsum",
        "cumprod",
        "cummax",
        "cummin",
        "cumlogsumexp",
        "dot_general",
        "rev",
        "sort",
        "gather",
        "iota",
    )
)

# The kinds of arrays in a transform of logits [2, 3].
_LOGIT = "one value for each logit, of that logit"
_UNIFORM = "the same value everywhere"
_OTHER = "values of their place"


def _mixing_operation(jaxpr, kinds):
    """Returns (the first operation that mixes logits, or None; the kinds of jaxpr's outputs).

    `kinds` are those of the jaxpr's inputs; a number, and an input that is not there, is uniform.
    """

    def kind(x):
        if isinstance(x, Var) and x in kinds:
            return kinds[x]
        return _UNIFORM if x.aval.shape == () else _OTHER

    for equation in jaxpr.eqns:
        used = [kind(x) for x in equation.invars]
        bodies = [
            b for p in equation.params.values() for b in jax.tree.leaves(p, is_leaf=_is_jaxpr)
        ]
        bodies = [getattr(b, "jaxpr", b) for b in bodies if _is_jaxpr(b)]
        found, made = _kinds_of_bodies(equation, bodies, used) if bodies else (None, None)
        if found is not None:
            return found, []
        name = equation.primitive.name
        if made is None:
            made = [_kind_made(equation, used)] * len(equation.outvars)
            if _LOGIT in used and (_OTHER in used or name in _SHAPE_KEEPING):
                return name, []
        shapes = {v.aval.shape for v, k in zip(equation.outvars, made, strict=True) if k == _LOGIT}
        if not shapes <= {_EXAMPLE}:
            return name, []
        kinds = kinds | dict(zip(equation.outvars, made, strict=True))
    return None, [kind(x) for x in jaxpr.outvars]


def _kind_made(equation, used):
    """Returns the kind of the outputs of an operation that has no body."""
    if _LOGIT in used:
        return _LOGIT
    shape, name = equation.outvars[0].aval.shape, equation.primitive.name
    spreads = name == "broadcast_in_dim" or shape in {x.aval.shape for x in equation.invars}
    kept = set(used) == {_UNIFORM} and spreads and name not in _SHAPE_KEEPING
    return _UNIFORM if shape == () or kept else _OTHER


def _kinds_of_bodies(equation, bodies, used):
    """Returns as `_mixing_operation` for the bodies of a call, a branch or a loop."""
    # A loop's state is of the kind that any of its rounds makes.
    first = equation.params.get("num_consts", equation.params.get("body_nconsts"))
    is_while = equation.primitive.name == "while"
    made = [_UNIFORM] * len(equation.outvars)
    for _ in range(len(equation.outvars) + 1):
        before = made
        for body in bodies:
            # A call has its operands at the end: the predicate of a branch comes first.
            operands = used[len(used) - len(body.invars) :]
            if is_while:
                is_condition = body is bodies[0]
                consts = equation.params["cond_nconsts"]
                operands = used[:consts] if is_condition else used[consts : consts + first]
                operands = operands + used[consts + first :]
            found, out = _mixing_operation(body, dict(zip(body.invars, operands, strict=True)))
            if found is not None:
                return found, None
            if len(out) == len(made):
                made = [_stronger(a, b) for a, b in zip(made, out, strict=True)]
        if first is None or made == before:
            break
        start = first + (equation.params["cond_nconsts"] if is_while else 0)
        for i, k in enumerate(made[: len(used) - start]):
            used[start + i] = _stronger(used[start + i], k)
    return None, made


def _stronger(a, b):
    """Returns the kind of an array that is now of the one kind and now of the other."""
    return next(k for k in (_OTHER, _LOGIT, _UNIFORM) if k in (a, b))


def _is_jaxpr(x):
    return isinstance(x, Jaxpr | ClosedJaxpr)
