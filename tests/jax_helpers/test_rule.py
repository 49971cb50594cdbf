"""Derivative rules: each mode of a rule's own, and every mode of every loss that has one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    MODES,
    assert_modes_agree,
    floating_leaves,
    jit,
    mainly,
    plain_softmax_cross_entropy,
    target_forms,
)
from compilations import Counter, no_compilation
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

import xentjax
from xentjax._jax import mesh as meshes
from xentjax._jax.rule import Rule, apply

BATCH, CLASSES = 3, 5

# Each is an own formula in float64, and differs by rounding alone.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

pytestmark = pytest.mark.usefixtures("float64")


def assert_close(actual, desired):
    jax.tree.map(lambda a, d: np.testing.assert_allclose(a, d, **CLOSE), actual, desired)


# A rule whose fast code has no right derivative of its own: only the rule can give it.


@dataclasses.dataclass(frozen=True)
class Waves(Rule):
    """(x [n], {"y": [], "n": int[n]}) -> (Σ_i sin(x_i) · y, scale · n · x³ · y²)."""

    scale: float = 1.0
    seen: list = dataclasses.field(default_factory=list, compare=False)

    def reference(self, x, tree):
        y = tree["y"]
        waves = jnp.sum(jnp.sin(x)) * y
        return waves, self.scale * tree["n"].astype(x.dtype) * x**3 * y**2

    def forward(self, backend, needs_grad, x, tree):
        self.seen.append((backend, needs_grad))
        out = jax.lax.stop_gradient(self.reference(x, tree))
        return out, jax.lax.stop_gradient(jnp.cos(x))

    def backward(self, backend, needs_grad, args, summary, cotangents):
        (x, tree), (of_waves, of_cubes) = jax.lax.stop_gradient(args), cotangents
        y, n = tree["y"], tree["n"].astype(x.dtype)
        cubes = self.scale * n * x**3
        of_x = of_waves * jax.lax.stop_gradient(summary) * y
        of_x += of_cubes * self.scale * n * 3 * x**2 * y**2
        of_y = of_waves * jnp.sum(jnp.sin(x)) + jnp.sum(of_cubes * cubes * 2 * y)
        wanted = needs_grad[1]["y"]
        return (of_x if needs_grad[0] else x), {"y": of_y if wanted else y, "n": tree["n"]}


N = np.array([1, 2, 3])
X, Y = np.array([0.3, -1.2, 2.0]), np.array(0.7)


def total(rule):
    """Returns (Σ of the outputs)² as a function of x and y."""

    def function(x, y, n=N):
        waves, cubes = rule(x, {"y": y, "n": n})
        return (waves + jnp.sum(cubes)) ** 2

    return function


ours, plain = total(functools.partial(apply, Waves())), total(Waves().reference)


def test_the_fast_code_alone_has_no_derivative():
    fast = total(lambda x, tree: Waves().forward("portable", (), x, tree)[0])
    np.testing.assert_array_equal(jax.grad(fast)(X, Y), jnp.zeros(3))
    np.testing.assert_array_equal(jax.hessian(ours)(X, Y) == 0, np.zeros((3, 3), bool))


def test_every_mode_of_a_rule():
    assert_modes_agree(MODES, ours, plain, (X, Y))


OF_VMAP = ("value", "jit(grad)", "jvp", "linearize", "hessian", "jacrev(jacrev)", "grad(scan)")


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)], ids=str)
def test_vmap_of_every_mode_of_a_rule_is_that_of_the_formula(axes):
    x = jnp.stack([X, X - 0.5]) if axes[0] == 0 else X
    y = jnp.array([0.7, -0.4]) if axes[1] == 0 else Y
    tangents = np.ones(3), np.array(2.0)

    def every_mode(function):
        def one(x, y):
            return {name: MODES[name](function, (x, y), tangents) for name in OF_VMAP}

        return jit(jax.vmap(one, axes))(x, y)

    assert_close(every_mode(ours), every_mode(plain))


def test_modes_of_vmap_sum_over_what_is_shared():
    xs = jnp.stack([X, X - 0.5, X + 1])

    def mapped(function):
        def over_rows(x, y):
            inner = jax.vmap(jax.vmap(function, (0, None, 0)), (None, 0, None))
            return jnp.sum(inner(x, jnp.stack([y, y * y]), jnp.stack([N, N + 1, N])))

        return over_rows

    assert_modes_agree(OF_VMAP[:-1], mapped(ours), mapped(plain), (xs, Y))


S = (1.0, 2.0, 0.5)


def _map(f):
    return lambda x, y: jnp.sum(jax.lax.map(lambda s: f(x * s, y), jnp.array(S)))


def _scan(f):
    def looped(x, y):
        def step(total, s):
            return total + f(x * s, y + 0.1 * total), None

        return jax.lax.scan(step, jnp.zeros_like(y), jnp.array(S))[0]

    return looped


def _fori(f):
    def looped(x, y):
        s = jnp.array(S)
        return jax.lax.fori_loop(0, 3, lambda i, total: total + f(x * s[i], y), jnp.zeros_like(y))

    return looped


LOOPS = {
    "map": _map,
    "scan": _scan,
    "fori_loop": _fori,
    "scan of map": lambda f: _scan(_map(f)),
    "map of jit": lambda f: _map(jax.jit(f)),
    "map of checkpoint": lambda f: _map(jax.checkpoint(f)),
    "checkpoint of scan": lambda f: jax.checkpoint(_scan(f)),
    "map of vmap": lambda f: _map(
        lambda x, y: jnp.sum(jax.vmap(f, (None, 0))(x, jnp.stack([y, y + 1])))
    ),
    "vmap of scan": lambda f: (
        lambda x, y: jnp.sum(jax.vmap(_scan(f), (0, None))(jnp.stack([x, x * 0.5]), y))
    ),
    "cond in a map": lambda f: _map(
        lambda x, y: jax.lax.cond(x[0] > 0.4, f, lambda x, y: f(y * x, y), x, y)
    ),
}


def derivatives_along(f, x):
    """Returns second and third derivatives of a function of a scalar, in four orders of modes."""

    def pushed(f):
        return lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]

    second = jax.grad(jax.grad(f))
    modes = {
        "grad³": jax.grad(second),
        "jvp³": pushed(pushed(pushed(f))),
        "grad of jvp": jax.grad(pushed(f)),
        "jvp of grad²": pushed(second),
    }
    return jit(lambda x: jax.tree.map(lambda f: f(x), modes))(x)


@pytest.mark.parametrize("loop", mainly(LOOPS, "map of checkpoint", "vmap of scan"))
def test_loops_are_differentiated_three_times(loop):
    def derivatives(function):
        looped = LOOPS[loop](function)
        return derivatives_along(lambda s: looped(s * X, s * Y), np.array(0.3))

    assert_close(derivatives(ours), derivatives(plain))


def test_in_a_shard_map():
    mesh = make_mesh((2,), ("data",))
    xs, n = jnp.stack([X, X - 0.5]), jnp.stack([N, N])

    def sharded(rule):
        def on_device(x, y, n):
            y = meshes.varying(y, ("data",))
            return jax.lax.psum(total(rule)(x[0], y, n[0]), "data")

        return jax.shard_map(
            on_device, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P()
        )

    def loop(x, y, n):
        return sum(plain(x[i], y, n[i]) for i in range(2))

    actual = sharded(functools.partial(apply, Waves()))
    modes = ["value", "grad", "jvp", "hessian", "jvp(value_and_grad)", "jacrev(jacrev)"]
    assert_modes_agree(modes, lambda x, y: actual(x, y, n), lambda x, y: loop(x, y, n), (xs, Y))


def test_what_is_kept_for_the_backward_pass_is_arguments_and_summary():
    @dataclasses.dataclass(frozen=True)
    class Product(Rule):
        def reference(self, x, y):
            return jnp.sum(x) * y

        def forward(self, backend, needs_grad, x, y):
            return jnp.sum(x) * y, (jnp.sum(x), jnp.zeros(7))

        def backward(self, backend, needs_grad, args, summary, cotangents):
            x, y = args
            return jnp.broadcast_to(cotangents * y, x.shape), cotangents * summary[0]

    x, y = jnp.arange(1000.0), jnp.asarray(2.0)
    pullback = jax.vjp(functools.partial(apply, Product()), x, y)[1]
    assert sorted(leaf.size for leaf in jax.tree.leaves(pullback)) == [1, 1, 7, 1000]
    np.testing.assert_array_equal(pullback(1.0)[0], jnp.full(1000, 2.0))
    assert pullback(1.0)[1] == x.sum()


def test_needs_grad_names_the_arguments_that_are_differentiated():
    def seen_by(derivative):
        rule = Waves(scale=next(scales))
        derivative(total(functools.partial(apply, rule)))
        return rule.seen[-1][1]

    scales = iter((1.5, 2.5, 3.5, 4.5))
    none = (False, {"y": False, "n": False})
    assert seen_by(lambda f: f(X, Y)) == none
    assert seen_by(lambda f: jax.grad(f)(X, Y)) == (True, {"y": False, "n": False})
    assert seen_by(lambda f: jax.grad(f, 1)(X, Y)) == (False, {"y": True, "n": False})
    assert seen_by(lambda f: jax.jvp(lambda y: f(X, y), (Y,), (Y,)))[1] == {"y": True, "n": False}


def test_a_cpu_runs_the_code_for_it_and_other_platforms_the_portable_code():
    rule = Waves(scale=6.5)
    jax.jit(functools.partial(apply, rule))(X, {"y": Y, "n": N})
    assert rule.seen[-1][0] == "cpu"
    exported = jax.export.export(
        jax.jit(functools.partial(apply, Waves(scale=7.5, seen=rule.seen))), platforms=["tpu"]
    )
    rule.seen.clear()
    exported(X, {"y": Y, "n": N})
    assert rule.seen[-1][0] == "portable"  # Types may be those of other code.


def test_whole_arrays_of_a_shard_map_run_the_code_for_one_cpu_and_split_ones_do_not():
    mesh = make_mesh((2,), ("data",))
    rule = Waves(scale=8.5)
    xs, tree = jnp.stack([X, X]), {"y": jnp.stack([Y, Y]), "n": jnp.stack([N, N])}
    each = jax.vmap(functools.partial(apply, rule))
    jax.jit(jax.shard_map(each, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(xs, tree)
    assert rule.seen[-1][0] == "cpu"
    rule.seen.clear()
    rows = jax.sharding.NamedSharding(mesh, P("data"))
    jax.jit(lambda x, t: each(x * 2, t))(*jax.device_put((xs, tree), rows))
    assert rule.seen[-1][0] == "portable"  # Types may be those of other code.


def test_equal_rules_are_compiled_once():
    def call(scale):
        function = total(functools.partial(apply, Waves(scale=scale)))
        return jax.block_until_ready((function(X, Y), jax.grad(function)(X, Y)))

    compiled = Counter()
    call(9.5)
    assert compiled.count > 0
    with no_compilation():
        call(9.5)
    compiled = Counter()
    call(10.5)
    assert compiled.count > 0


# Losses.


def _logits(seed=0):
    z = np.random.default_rng(seed).normal(size=(BATCH, CLASSES)) * 2
    z[0, 1] = 9.0  # One confident row: the branch in which p > 1/2.
    z[1, 0] = z[1, 1] = z[1].max()  # One row with two largest logits.
    return jnp.asarray(z)


def _with_z_loss(logits, targets):
    losses, stats = xentjax.softmax_cross_entropy_with_stats(logits, targets)
    return losses + 0.1 * stats.log_normalizer**2


def _plain_with_z_loss(logits, targets):
    z_loss = jax.nn.logsumexp(logits, axis=-1) ** 2
    return plain_softmax_cross_entropy(logits, targets) + 0.1 * z_loss


def _entropy(logits, targets):
    del targets
    return xentjax.softmax_entropy(logits)


def _plain_entropy(logits, targets):
    del targets
    return -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1)


def _plain_sigmoid(logits, targets):
    return -jnp.sum(
        targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits), axis=-1
    )


KERNEL = np.random.default_rng(3).normal(size=(CLASSES, CLASSES))


def _head(logits, targets):
    """The head that recomputes logits, of a soft cap."""
    return xentjax.linear_softmax_cross_entropy(
        logits,
        KERNEL,
        targets,
        reduction="none",
        logit_transform=xentjax.soft_cap(4.0),
        memory_budget=0,
    )


def _plain_head(logits, targets):
    z = logits @ KERNEL
    return plain_softmax_cross_entropy(4 * jnp.tanh(z / 4), targets)


LOSSES = {
    "softmax": (xentjax.softmax_cross_entropy, plain_softmax_cross_entropy, "labels"),
    "z-loss": (_with_z_loss, _plain_with_z_loss, "all"),
    "entropy": (_entropy, _plain_entropy, "labels"),
    "sigmoid": (xentjax.multilabel_cross_entropy, _plain_sigmoid, "dense"),
    "head": (_head, _plain_head, "smoothed"),
}

FORMS = [
    (loss, form)
    for loss, (_, _, forms) in LOSSES.items()
    for form in target_forms(BATCH, CLASSES)
    if forms in ("all", form)
]


@pytest.mark.parametrize(
    "case",
    mainly(FORMS, ("z-loss", "teacher")),
    ids=str,
)
def test_every_mode_to_every_float_argument(case):
    loss, form = case
    ours, plain, _ = LOSSES[loss]
    floats, rebuild = floating_leaves(target_forms(BATCH, CLASSES)[form])
    args = (_logits(), *floats)

    def scalar(function):
        return lambda z, *floats: jnp.sum(function(z, rebuild(floats)) ** 2)

    assert_modes_agree(MODES, scalar(ours), scalar(plain), args)


@pytest.mark.parametrize("form", mainly(["labels", "dense"], "dense"))
def test_vmap_of_every_mode_is_the_loop(form):
    targets = target_forms(BATCH, CLASSES)[form]
    logits = jnp.stack([_logits(0), _logits(1)])
    tangents = jnp.ones_like(logits)

    def loss(z):
        return jnp.sum(xentjax.softmax_cross_entropy(z, targets))

    def every_mode(z, tangent):
        return {name: mode(loss, (z,), (tangent,)) for name, mode in MODES.items()}

    mapped = jit(jax.vmap(every_mode))(logits, tangents)
    one_by_one = jit(every_mode)
    for i in range(2):
        one = one_by_one(logits[i], tangents[i])
        jax.tree.map(
            lambda a, d, i=i: np.testing.assert_allclose(a[i], d, rtol=1e-12, atol=1e-12),
            mapped,
            one,
        )


# Which loss in which loop: each loss, and the loops that differ most.
IN_LOOPS = [
    ("softmax", "labels", "map"),
    ("softmax", "dense", "scan"),
    ("softmax", "prior", "fori_loop"),
    ("z-loss", "smoothed", "scan of map"),
    ("entropy", "labels", "map of checkpoint"),
    ("sigmoid", "dense", "vmap of scan"),
    ("head", "labels", "map"),
    ("head", "dense", "map of jit"),
]


@pytest.mark.parametrize(
    "case",
    mainly(IN_LOOPS, ("softmax", "labels", "map"), ("entropy", "labels", "map of checkpoint")),
    ids=str,
)
def test_losses_in_loops_are_differentiated_three_times(case):
    loss, form, loop = case
    targets, logits = target_forms(2, CLASSES)[form], _logits()[:2]

    def derivatives(function):
        """Along one direction: third derivatives of a loop take long to compile."""
        looped = LOOPS[loop](lambda x, y: jnp.sum(function(logits * x + y, targets) ** 2) / 100)
        return derivatives_along(lambda x: looped(x, 0.5 * x), jnp.array(0.8))

    actual, desired = (derivatives(f) for f in LOSSES[loss][:2])
    assert_close(actual, desired)
