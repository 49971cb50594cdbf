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
      ValueError: cap is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.soft_cap(30.0)(jnp.array([0.0, 30.0, 1000.0])).round(2))
      [ 0.   22.85 30.  ]

    Source:
      Gemma Team, Gemma 2, 2024, section 2.
    """
    checks.check_interval("cap", cap, np.finfo(np.float64).tiny, np.inf)
    scale = jnp.asarray(cap)
    return lambda logits: scale * jnp.tanh(logits / scale)


def temperature(tau: ArrayLike) -> LogitTransform:
    """Returns the logit transform that divides by a temperature.

    z -> z / tau

    Args:
      tau: A positive scalar; it may be traced and differentiated.

    Returns:
      An elementwise function of logits.

    Raises:
      ValueError: tau is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> print(xentjax.temperature(2.0)(jnp.array([1.0, 4.0])))
      [0.5 2. ]

    Source:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    checks.check_interval("tau", tau, np.finfo(np.float64).tiny, np.inf)
    scale = jnp.asarray(tau)
    return lambda logits: logits / scale


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
    """Returns (function(logits [N, V], *constants), constants): what it closes over as arguments.

    The third is the mesh axes that logits vary along: `over`, and those of the constants.
    """
    if transform is None:
        return identity, [], over
    checks.check(
        callable(transform), f"logit_transform: expected a function, got {transform!r}", TypeError
    )
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
    example = jax.ShapeDtypeStruct(_EXAMPLE, dtype)
    closed, out = jax.make_jaxpr(transform, return_shape=True)(example)
    checks.check(
        isinstance(out, jax.ShapeDtypeStruct),
        "logit_transform: expected an elementwise function of logits, got one that returns "
        f"{out!r}; call soft_cap(30.0) or temperature(0.7) first",
        TypeError,
    )
    checks.check(
        out.shape == example.shape and out.dtype == dtype,
        f"logit_transform: expected an elementwise function, {checks.describe(example)} to the "
        f"same, got {checks.describe(out)}",
    )
    mixing = _mixing_operation(closed.jaxpr, closed.jaxpr.invars)
    checks.check(
        mixing is None,
        "logit_transform: expected an elementwise function, for it is applied to blocks of the "
        f"logits, got one in which {mixing} mixes logits",
    )


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
    )
)


def _mixing_operation(jaxpr, logits):
    """Returns the name of the first operation that mixes the entries of `logits`, or None."""
    dependent = set(logits)
    for equation in jaxpr.eqns:
        used = [isinstance(x, Var) and x in dependent for x in equation.invars]
        if not any(used):
            continue
        parameters = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        inner = [p for p in parameters if _is_jaxpr(p)]
        for body in (getattr(p, "jaxpr", p) for p in inner):
            # A call has its operands at the end: the predicate of a branch comes first.
            flags = used[len(used) - len(body.invars) :]
            pairs = zip(body.invars, flags, strict=True)
            found = _mixing_operation(body, [v for v, is_used in pairs if is_used])
            if found is not None:
                return found
        name = equation.primitive.name
        shapes = {v.aval.shape for v in equation.outvars}
        if name in _SHAPE_KEEPING or not shapes <= {_EXAMPLE}:
            return name
        dependent |= set(equation.outvars)
    return None


def _is_jaxpr(x):
    return isinstance(x, Jaxpr | ClosedJaxpr)
