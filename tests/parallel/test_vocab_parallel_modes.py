"""Classes split over devices: every derivative, taken outside the shard_map and inside it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    assert_modes_agree,
    floating_leaves,
    jit,
    mainly,
    plain_softmax_cross_entropy,
    target_forms,
)
from heads import linear_loss
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, target_specs

import xentjax
from xentjax._jax.mesh import varying_axes
from xentjax._softmax.head_plan import HeadPlan

# As small as shards of several blocks allow: third derivatives take long to compile.
TOKENS, FEATURES, CLASSES = 4, 2, 8

# The float64 oracle differs by rounding alone.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}

WHERE = jnp.array([True, True, True, False])

pytestmark = pytest.mark.usefixtures("float64")


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss: what it takes before targets, how that is split, and the logits it is the loss of."""

    args: tuple
    specs: tuple
    losses: object  # (args, targets, where) -> losses of tokens
    logits: object  # args -> logits


def of_logits():
    logits = np.random.default_rng(0).normal(size=(TOKENS, CLASSES)) * 2
    logits[0, 1] = 9.0  # Confident: the branch in which p > 1/2.
    logits[1, 0] = logits[1, 5] = logits[1].max()  # Two largest, on two devices.
    loss = functools.partial(xentjax.vocab_parallel_softmax_cross_entropy, axis_name="model")
    return Case(
        (jnp.asarray(logits),),
        (P("data", "model"),),
        lambda args, targets, where: loss(*args, targets, where=where),
        lambda args: args[0],
    )


def of_inputs(plan):
    """The head; it keeps logits only where no gradient of the soft cap is asked for."""
    rng = np.random.default_rng(0)
    shapes = [(TOKENS, FEATURES), (FEATURES, CLASSES), (CLASSES,)]
    args = tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    specs = P("data"), P(None, "model"), P("model")
    if not plan.keeps_logits:
        args, specs = (*args, jnp.asarray(3.0)), (*specs, P())

    def losses(args, targets, where):
        inputs, kernel, bias, *cap = args
        loss = linear_loss(
            inputs,
            kernel,
            targets,
            axis_name="model",
            bias=bias,
            where=where,
            reduction="sum" if plan.keeps_logits else "none",
            logit_transform=xentjax.soft_cap(*cap) if cap else None,
            plan=plan,
        )
        return loss[None] if loss.ndim == 0 else loss

    def logits(args):
        inputs, kernel, bias, *cap = args
        z = inputs @ kernel + bias
        return xentjax.soft_cap(*cap)(z) if cap else z

    return Case(args, specs, losses, logits)


CASES = {
    "logits": of_logits,
    "kept": functools.partial(of_inputs, HeadPlan(2, 2, True)),
    "recomputed": functools.partial(of_inputs, HeadPlan(2, 2, False)),
}


def _functions(case, targets):
    """Returns (sharded, plain, targets' floats): (Σ losses)², functions of args and floats."""
    floats, rebuild = floating_leaves(targets)

    def sharded(*args):
        own, floats = args[: len(case.args)], args[len(case.args) :]
        losses = jax.shard_map(
            lambda own, targets, where: _total(case.losses(own, targets, where)) ** 2,
            mesh=make_mesh((2, 2), ("data", "model")),
            in_specs=(case.specs, target_specs(targets), P("data")),
            out_specs=P(),
        )
        return losses(own, rebuild(floats) if floats else targets, WHERE)

    def plain(*args):
        own, floats = args[: len(case.args)], args[len(case.args) :]
        losses = plain_softmax_cross_entropy(
            case.logits(own), rebuild(floats) if floats else targets
        )
        return jnp.sum(jnp.where(WHERE, losses, 0)) ** 2

    return sharded, plain, floats


def _total(x):
    """Returns the sum of x over all devices that have a part of it."""
    axes = tuple(sorted(varying_axes(x)))
    return jax.lax.psum(jnp.sum(x), axes) if axes else jnp.sum(x)


# The others are made of these; what takes longest to compile, once each.
MODES_OF = {
    "logits": ("value", "grad", "jvp", "linearize", "jacfwd", "hessian", "jacrev(jacrev)"),
    "kept": ("grad(checkpoint)", "hessian"),
    "recomputed": ("hessian", "grad(scan)"),
}


@pytest.mark.parametrize("name", mainly(CASES, "logits", "recomputed"))
def test_every_mode_from_outside(name):
    case = CASES[name]()
    sharded, plain, _ = _functions(case, target_forms(TOKENS, CLASSES)["smoothed"])
    assert_modes_agree(MODES_OF[name], sharded, plain, case.args)


OF_TARGETS = [
    ("logits", "dense", ("grad", "jvp", "hessian")),
    ("logits", "two backgrounds", ("grad", "jvp", "jvp(value_and_grad)")),
    ("recomputed", "dense", ("grad", "jvp")),
    ("recomputed", "two backgrounds", ("jvp(value_and_grad)",)),
]


@pytest.mark.parametrize("case", mainly(OF_TARGETS, OF_TARGETS[1], OF_TARGETS[2]), ids=str)
def test_derivatives_of_targets(case):
    name, form, modes = case
    case = CASES[name]()
    sharded, plain, floats = _functions(case, target_forms(TOKENS, CLASSES)[form])
    assert_modes_agree(modes, sharded, plain, (*case.args, *floats))


@pytest.mark.parametrize("name", mainly(CASES, "logits", "recomputed"))
def test_vmap_of_grad_is_the_loop(name):
    case = CASES[name]()
    sharded, plain, _ = _functions(case, target_forms(TOKENS, CLASSES)["labels"])
    batch = tuple(jnp.stack([a, 0.5 * a]) for a in case.args)
    wanted = tuple(range(len(batch)))
    actual = jit(jax.vmap(jax.grad(sharded, wanted)))(*batch)
    for i in range(2):
        desired = jax.grad(plain, wanted)(*(a[i] for a in batch))
        own = tuple(a[i] for a in actual)
        jax.tree.map(lambda a, d: np.testing.assert_allclose(a, d, **CLOSE), own, desired)


# Inside the shard_map.


def _every_mode_inside(f, args, tangents):
    """Returns derivatives of all orders along the tangents, none of which is a whole Jacobian."""
    wanted = tuple(range(len(args)))
    gradient = jax.grad(f, wanted)

    def slope(*args):
        return sum(_total(g * t) for g, t in zip(gradient(*args), tangents, strict=True))

    return {
        "arrays": (
            gradient(*args),
            jax.jvp(gradient, args, tangents)[1],
            jax.grad(slope, wanted)(*args),
            jax.grad(jax.checkpoint(f), wanted)(*args),
        ),
        "scalars": (
            jax.jvp(f, args, tangents),
            jax.linearize(f, *args)[1](*tangents),
            jax.jvp(slope, args, tangents)[1],
        ),
    }


@pytest.mark.parametrize("name", mainly(CASES, "logits", "kept"))
def test_every_mode_from_inside(name):
    case, targets = CASES[name](), target_forms(TOKENS, CLASSES)["prior"]
    tangents = tuple(jnp.asarray(np.random.default_rng(1).normal(size=a.shape)) for a in case.args)

    def on_device(targets, where, args, tangents):
        def f(*args):
            return _total(case.losses(args, targets, where)) ** 2

        return _every_mode_inside(f, args, tangents)

    def plain(*args):
        losses = plain_softmax_cross_entropy(case.logits(args), targets)
        return jnp.sum(jnp.where(WHERE, losses, 0)) ** 2

    sharded = jax.shard_map(
        on_device,
        mesh=make_mesh((2, 2), ("data", "model")),
        in_specs=(target_specs(targets), P("data"), case.specs, case.specs),
        out_specs={"arrays": (case.specs,) * 4, "scalars": P()},
    )
    actual = jit(sharded)(targets, WHERE, case.args, tangents)
    desired = jit(functools.partial(_every_mode_inside, plain))(case.args, tangents)
    jax.tree.map(lambda a, d: np.testing.assert_allclose(a, d, **CLOSE), actual, desired)
