"""One derivative rule per loss, right in every differentiation mode and inside every loop.

A `Rule` states a loss as a plain formula, `reference`, and as fast code for its value and its
gradient, `forward` and `backward`. Three primitives of JAX carry it:

    forward    arguments                        -> outputs, summary
    tangent    arguments, summary, tangents     -> J · tangents
    pullback   arguments, summary, cotangents   -> Jᵀ · cotangents

The last two are linear in their last operands, and each is the transpose of the other. Where they
are differentiated in the arguments, the derivatives are those of `reference`, which is plain JAX
code: the fast code is never differentiated. The rules belong to primitives because JAX 0.10 drops
those of `jax.custom_jvp` inside a `lax.scan` that is differentiated twice.

The summary is a function of the arguments that saves `backward` work. Its own tangent is zero by
agreement: `tangent` and `pullback` answer for all that depends on the arguments.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from xentjax._jax import mesh as meshes

Backend = Literal["portable", "cpu"]
"""Whose code runs: that for one CPU, or the plain code that every compiler fuses."""


class Rule:
    """A loss. Rules are hashable, so that equal ones are traced and compiled once.

    Arguments are pytrees of arrays. `needs_grad` is the tuple of arguments with a bool at each
    array: whether its derivative is asked for.

    Attributes:
      reference: (*args) -> the outputs, an array or a tuple of several, by a plain formula, which
        is right to differentiate.
      forward: (backend, needs_grad, *args) -> (outputs, summary for `backward`). The summary of a
        value alone may be anything.
      backward: (backend, needs_grad, args, summary, cotangents) -> the cotangents of args, trees
        like them; only those asked for are looked at.
    """

    reference: Callable[..., Any]
    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[..., tuple[Any, ...]]


def apply(rule: Rule, *args: Any) -> Any:
    """Returns the outputs of a rule.

    In a `shard_map`, arguments that may need a gradient must vary over the same mesh axes.
    """
    leaves, treedef = jax.tree.flatten(args)
    leaves = [jax.lax.convert_element_type(x, x.dtype) for x in leaves]  # No weak types.
    call = _Call(rule, treedef, (False,) * len(leaves))
    out, _ = call.forward(leaves)
    return tuple(out) if len(out) > 1 else out[0]


@dataclasses.dataclass(frozen=True)
class _Map:
    """One `jax.vmap` around a call: the axis of each leaf, and of each leaf's tangent."""

    size: int
    axes: tuple[int | None, ...]
    tangent_axes: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class _Call:
    """A rule, the tree of its arguments, which leaves are differentiated, and the maps around it.

    Its methods take and return lists of leaves.
    """

    rule: Rule
    treedef: Any
    needs_grad: tuple[bool, ...]
    maps: tuple[_Map, ...] = ()  # The outermost first.

    # The equations that a trace sees.

    def forward(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Returns (outputs, summary)."""
        out = _forward_p.bind(*leaves, call=self)
        if not any(self.needs_grad):
            return out, []
        count = self.output_def(leaves).num_leaves
        return out[:count], out[count:]

    def tangent(self, leaves: Sequence[Any], summary: Any, tangents: Any) -> list[Any]:
        """Returns J · tangents."""
        return _tangent_p.bind(*leaves, *summary, *map(ad.instantiate_zeros, tangents), call=self)

    def pullback(self, leaves: Sequence[Any], summary: Any, cotangents: Any) -> list[Any]:
        """Returns Jᵀ · cotangents, one for each leaf that needs a gradient."""
        cotangents = map(ad.instantiate_zeros, cotangents)
        return _pullback_p.bind(*leaves, *summary, *cotangents, call=self)

    # The code behind them.

    def evaluate_forward(self, leaves: Sequence[Any], backend: Backend) -> list[Any]:
        if self.maps:
            function = functools.partial(self._inside().evaluate_forward, backend=backend)
            return self._vmap(function, list(self.maps[0].axes))(list(leaves))
        return _code(self, backend)[0](*leaves)

    def derivative(self, leaves: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        """Returns J · tangents by the plain formula."""
        if self.maps:
            axes = list(self.maps[0].axes), self._needed(self.maps[0].tangent_axes)
            return self._vmap(self._inside().derivative, *axes)(list(leaves), list(tangents))
        return jax.jvp(self._reference(leaves), self._needed(leaves), list(tangents))[1]

    def gradient(self, leaves: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        """Returns Jᵀ · cotangents by the plain formula."""
        if self.maps:
            function = self._vmap(self._inside().gradient, list(self.maps[0].axes), 0)
            return self._sum_shared(function(list(leaves), list(cotangents)))
        pull_back = jax.vjp(self._reference(leaves), *self._needed(leaves))[1]
        return self._cast(pull_back(list(cotangents)), leaves)

    def evaluate_pullback(
        self,
        leaves: Sequence[Any],
        summary: Sequence[Any],
        cotangents: Sequence[Any],
        backend: Backend,
    ) -> list[Any]:
        if self.maps:
            function = functools.partial(self._inside().evaluate_pullback, backend=backend)
            function = self._vmap(function, list(self.maps[0].axes), 0, 0)
            return self._sum_shared(function(list(leaves), list(summary), list(cotangents)))
        output_def, summary_def, _ = self._signature(leaves)
        answer = self.rule.backward(
            backend,
            self._tree(self.needs_grad),
            self._tree(leaves),
            jax.tree.unflatten(summary_def, summary),
            jax.tree.unflatten(output_def, cotangents),
        )
        return self._cast(self._needed(self.treedef.flatten_up_to(answer)), leaves)

    # Trees, leaves and types.

    def output_def(self, leaves: Sequence[Any]) -> Any:
        """Returns the tree of the outputs."""
        return self._signature(leaves)[0]

    def out_avals(self, leaves: Sequence[Any]) -> list[Any]:
        """Returns the types of outputs and summary."""
        return list(self._signature(leaves)[2])

    def pullback_avals(self, leaves: Sequence[Any]) -> list[Any]:
        """Returns the types of the cotangents."""
        if not self.maps:
            return list(self._needed(map(_type_of, leaves)))
        output_def, _, outputs = self._signature(leaves)
        cotangents = list(outputs[: output_def.num_leaves])
        return list(jax.make_jaxpr(self.gradient)(list(leaves), cotangents).out_avals)

    def split(self, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Returns (leaves, summary, linear operands) of a primitive's operands."""
        count = self.treedef.num_leaves
        leaves = list(operands[:count])
        end = count + self._signature(leaves)[1].num_leaves
        return leaves, list(operands[count:end]), list(operands[end:])

    def mapped(self, axes: Sequence[int | None], size: int, linear: bool) -> "_Call":
        """Returns the call under one more map; its tangents are mapped if `linear` ones are."""
        tangent_axes = (0,) * len(axes) if linear else tuple(axes)
        return dataclasses.replace(self, maps=(_Map(size, tuple(axes), tangent_axes), *self.maps))

    def _inside(self):
        return dataclasses.replace(self, maps=self.maps[1:])

    def _vmap(self, function: Callable[..., Any], *axes: Any) -> Callable[..., Any]:
        return jax.vmap(function, in_axes=axes, axis_size=self.maps[0].size)

    def _sum_shared(self, cotangents):
        axes = self._needed(self.maps[0].tangent_axes)
        return [ct.sum(0) if a is None else ct for ct, a in zip(cotangents, axes, strict=True)]

    def _signature(self, leaves):
        """Returns (tree of the outputs, tree of the summary, types of their leaves)."""
        return _signature(self, tuple(map(_type_of, leaves)))

    def _tree(self, leaves):
        return jax.tree.unflatten(self.treedef, list(leaves))

    def _needed(self, leaves):
        return [x for x, needed in zip(leaves, self.needs_grad, strict=True) if needed]

    def _cast(self, cotangents, leaves):
        """Returns cotangents of the types of their leaves, on a mesh too."""
        pairs = zip(cotangents, self._needed(leaves), strict=True)
        return [meshes.varying(ct.astype(x.dtype), meshes.varying_axes(x)) for ct, x in pairs]

    def _reference(self, leaves):
        """Returns the plain formula as a function of the leaves that need a gradient."""

        def function(*needed):
            values = iter(needed)
            every = zip(leaves, self.needs_grad, strict=True)
            filled = [next(values) if needs else x for x, needs in every]
            return jax.tree.leaves(self.rule.reference(*self._tree(filled)))

        return function


def _type_of(x):
    """Returns the type of an array; a type is its own."""
    return x if isinstance(x, ShapedArray) else jax.typeof(x)


@functools.lru_cache(maxsize=1024)
def _code(call: _Call, backend: Backend) -> tuple[Callable[..., list[Any]], list[Any]]:
    """Returns (the fast code of a call without maps, its trees).

    JAX traces the code once, for its types and for its use. Then the trees are that of the outputs
    and that of the summary.
    """

    @functools.partial(jax.jit, inline=True)
    def traced(*leaves):
        args = jax.tree.unflatten(call.treedef, leaves)
        flags = jax.tree.unflatten(call.treedef, call.needs_grad)
        out, summary = call.rule.forward(backend, flags, *args)
        summary = summary if any(call.needs_grad) else ()
        trees[:] = jax.tree.structure(out), jax.tree.structure(summary)
        return jax.tree.leaves((out, summary))

    trees = []
    return traced, trees


@functools.lru_cache(maxsize=1024)
def _signature(call: _Call, avals: tuple[Any, ...]) -> tuple[Any, Any, tuple[Any, ...]]:
    backend = "cpu" if jax.default_backend() == "cpu" else "portable"
    function = functools.partial(call.evaluate_forward, backend=backend)
    out = tuple(jax.make_jaxpr(function)(list(avals)).out_avals)
    return *_code(dataclasses.replace(call, maps=()), backend)[1], out


def _primitive(
    name: str, evaluate: Callable[..., list[Any]], avals: Callable[..., list[Any]]
) -> Primitive:
    """Returns a primitive of (operands, call), compiled once for equal calls.

    `evaluate(backend, call, operands)` is its code, and `avals(call, leaves)` are the types of its
    outputs.
    """
    primitive = Primitive(f"xentjax_{name}")
    primitive.multiple_results = True

    @functools.lru_cache(maxsize=1024)
    def compiled(call):
        return jax.jit(functools.partial(primitive.bind, call=call))

    primitive.def_impl(lambda *operands, call: compiled(call)(*operands))
    primitive.def_abstract_eval(
        lambda *operands, call: avals(call, operands[: call.treedef.num_leaves])
    )

    def lower(backend):
        return mlir.lower_fun(lambda *operands, call: evaluate(backend, call, operands))

    portable, cpu = lower("portable"), lower("cpu")
    mlir.register_lowering(primitive, portable)
    mlir.register_lowering(
        primitive,
        lambda ctx, *operands, **params: (cpu if _is_one_device(ctx) else portable)(
            ctx, *operands, **params
        ),
        platform="cpu",
    )
    return primitive


def _is_one_device(ctx: Any) -> bool:
    """Returns whether arrays are whole: nothing is split over devices but in a `shard_map`."""
    context = ctx.module_context.axis_context
    mesh = getattr(context, "mesh", None)
    if mesh is None:
        return getattr(context, "num_devices", 0) == 1
    split = {name for name, size in mesh.shape.items() if size > 1}
    return split <= set(context.manual_axes)


_forward_p = _primitive(
    "forward",
    lambda backend, call, operands: call.evaluate_forward(operands, backend),
    lambda call, leaves: call.out_avals(leaves),
)
_tangent_p = _primitive(
    "tangent",
    lambda _, call, operands: call.derivative(*call.split(operands)[::2]),
    lambda call, leaves: call.out_avals(leaves)[: call.output_def(leaves).num_leaves],
)
_pullback_p = _primitive(
    "pullback",
    lambda backend, call, operands: call.evaluate_pullback(*call.split(operands), backend),
    lambda call, leaves: call.pullback_avals(leaves),
)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, ad.Zero)


def _forward_jvp(primals, tangents, *, call):
    live = dataclasses.replace(call, needs_grad=tuple(not _is_zero(t) for t in tangents))
    out, summary = live.forward(primals)
    out_tangents = live.tangent(primals, summary, [t for t in tangents if not _is_zero(t)])
    if any(call.needs_grad):  # Its summary was for another derivative.
        out = _forward_p.bind(*primals, call=call)
    no_tangents = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out[len(out_tangents) :]]
    return out, out_tangents + no_tangents


def _linear_jvp(bind, plain, primals, tangents, call):
    """The derivative of a primitive that is linear in its last operands."""
    (leaves, summary, linear), (moves, _, changes) = (
        call.split(primals),
        _split_like(call, primals, tangents),
    )
    out = bind(call, leaves, summary, linear)
    total = None
    if not all(map(_is_zero, changes)):
        total = bind(call, leaves, summary, changes)
    moved = [i for i, t in enumerate(moves) if not _is_zero(t)]
    if moved:

        def of_moved(*values):
            filled = list(leaves)
            for i, value in zip(moved, values, strict=True):
                filled[i] = value
            return plain(call, filled, linear)

        values, steps = [leaves[i] for i in moved], [moves[i] for i in moved]
        added = jax.jvp(of_moved, values, steps)[1]
        total = added if total is None else [a + b for a, b in zip(total, added, strict=True)]
    if total is None:
        total = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    return out, total


def _split_like(call, primals, tangents):
    leaves, summary, _ = call.split(primals)
    first, second = len(leaves), len(leaves) + len(summary)
    return tangents[:first], tangents[first:second], tangents[second:]


def _linear_transpose(bind, cotangents, operands, call):
    leaves, summary, linear = call.split(operands)
    answer = bind(call, leaves, summary, cotangents)
    wanted = [
        ct if ad.is_undefined_primal(x) else None for ct, x in zip(answer, linear, strict=True)
    ]
    return [None] * (len(leaves) + len(summary)) + wanted


def _to_front(x, axis, size=None):
    """Returns x with a mapped axis at the front; one that is not mapped only if size is given."""
    if axis is not None:
        return jax.numpy.moveaxis(x, axis, 0), 0
    if size is None:
        return x, None
    return jax.numpy.broadcast_to(x, (size, *jax.numpy.shape(x))), 0


def _batch(primitive, is_linear, operands, axes, *, call):
    (size,) = {x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None}
    count = call.treedef.num_leaves
    pairs = list(zip(operands, axes, strict=True))
    leaves = [_to_front(x, a) for x, a in pairs[:count]]
    others = [_to_front(x, a, size)[0] for x, a in pairs[count:]]
    mapped = call.mapped([a for _, a in leaves], size, is_linear)
    out = primitive.bind(*(x for x, _ in leaves), *others, call=mapped)
    return out, [0] * len(out)


_tangent, _pullback = _Call.tangent, _Call.pullback
ad.primitive_jvps[_forward_p] = _forward_jvp
ad.primitive_jvps[_tangent_p] = lambda p, t, call: _linear_jvp(
    _tangent, _Call.derivative, p, t, call
)
ad.primitive_jvps[_pullback_p] = lambda p, t, call: _linear_jvp(
    _pullback, _Call.gradient, p, t, call
)
ad.primitive_transposes[_tangent_p] = lambda ct, *x, call: _linear_transpose(_pullback, ct, x, call)
ad.primitive_transposes[_pullback_p] = lambda ct, *x, call: _linear_transpose(_tangent, ct, x, call)
for _p, _is_linear in ((_forward_p, False), (_tangent_p, True), (_pullback_p, True)):
    batching.primitive_batchers[_p] = functools.partial(_batch, _p, _is_linear)
