"""Statistics, class masks, z-loss and teachers with the classes split over devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import jit, target_forms
from heads import linear_loss, linear_loss_and_stats
from jax.sharding import PartitionSpec as P
from meshes import collectives, make_mesh, target_specs

import xentjax
from xentjax._softmax.head_plan import HeadPlan

TOKENS, FEATURES, CLASSES = 4, 3, 16

RNG = np.random.default_rng(0)
INPUTS, KERNEL, BIAS = (
    RNG.normal(size=s) for s in ((TOKENS, FEATURES), (FEATURES, CLASSES), CLASSES)
)
# On four devices: one has no class left, and another one has half of its classes.
MASK = np.arange(CLASSES) < 10
WHERE = np.array([True, False, True, True])
KERNEL[:, 6], BIAS[6] = KERNEL[:, 1], BIAS[1]  # A tie, on two devices.

# The float64 oracle differs by rounding alone: sums of at most 16 terms, of size 1 to 100.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
SPECS = {"kernel": P(None, "model"), "bias": P("model"), "class_mask": P("model")}
HEAD = {"kernel": KERNEL, "bias": BIAS, "class_mask": MASK}


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield


def assert_close(actual, desired):
    jax.tree.map(lambda a, d: np.testing.assert_allclose(a, d, **CLOSE), actual, desired)


def with_gradient(both):
    """Returns (losses, stats, the gradient of all that is differentiable in them)."""

    def total(x):
        losses, stats = both(x)
        told = losses * stats.entropy + stats.log_normalizer**2
        return jnp.sum(told), (losses, stats)

    gradient, out = jit(jax.grad(total, has_aux=True))(jnp.asarray(INPUTS))
    return gradient, out


def plain(targets):
    def both(x):
        logits = jnp.where(MASK, x @ KERNEL + BIAS, -jnp.inf)
        return xentjax.softmax_cross_entropy_with_stats(logits, targets, where=WHERE)

    return both


def of_mask(form):
    """Returns targets of a form that have no mass on a masked class."""
    targets = target_forms(TOKENS, CLASSES)[form]
    if form == "labels":
        return targets % 10
    return xentjax.reweight_targets(targets, jnp.asarray(MASK, float))


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("form", "is_head"), [("labels", True), ("dense", False), ("prior", False), ("dense", True)]
)
def test_statistics_are_those_of_one_device(form, is_head):
    targets, mesh = of_mask(form), make_mesh((2, 4), ("data", "model"))

    def on_device(x, head, targets, where):
        if is_head:
            options = head | {"where": where, "plan": HeadPlan(2, 3, False)}
            kernel = options.pop("kernel")
            return linear_loss_and_stats(x, kernel, targets, axis_name="model", **options)
        logits = jnp.where(head["class_mask"], x @ head["kernel"] + head["bias"], -jnp.inf)
        return xentjax.vocab_parallel_softmax_cross_entropy_with_stats(
            logits, targets, axis_name="model", where=where
        )

    sharded = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P("data"), SPECS, target_specs(targets), P("data")),
        out_specs=P("data"),
    )
    head = jax.tree.map(jnp.asarray, HEAD)
    actual = with_gradient(lambda x: sharded(x, head, targets, jnp.asarray(WHERE)))
    assert_close(actual, with_gradient(plain(targets)))


@pytest.mark.usefixtures("_float64")
def test_second_derivatives_of_the_entropy_are_those_of_one_device():
    logits, labels = jnp.asarray(INPUTS @ KERNEL + BIAS), np.array([0, 5, 9, 15])
    sharded = jax.shard_map(
        functools.partial(
            xentjax.vocab_parallel_softmax_cross_entropy_with_stats, axis_name="model"
        ),
        mesh=make_mesh((4,), ("model",)),
        in_specs=(P(None, "model"), P()),
        out_specs=P(),
    )

    def product(loss_and_stats):
        gradient = jax.grad(lambda z: (loss_and_stats(z, labels)[1].entropy ** 2).sum())
        return jit(lambda z: jax.jvp(gradient, (z,), (z[::-1],))[1])(logits)

    assert_close(product(sharded), product(xentjax.softmax_cross_entropy_with_stats))


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_teacher_a_class_mask_and_a_z_loss(reduction):
    mesh, teacher = make_mesh((2, 4), ("data", "model")), RNG.normal(size=(2, CLASSES))
    teacher_inputs = RNG.normal(size=(TOKENS, 2))
    keeps_logits = reduction == "sum"

    def on_device(x, head, teacher_inputs, teacher, where):
        targets = xentjax.LinearTargets(teacher_inputs, teacher, temperature=1.5)
        options = head | {"where": where, "plan": HeadPlan(1, 3, keeps_logits), "z_loss": 0.2}
        kernel = options.pop("kernel")
        options |= {"axis_name": "model", "reduction": reduction}
        losses = linear_loss(x, kernel, targets, **options)
        return losses if reduction == "none" else jax.lax.psum(losses, "data")

    sharded = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P("data"), SPECS, P("data"), P(None, "model"), P("data")),
        out_specs=P("data") if reduction == "none" else P(),
    )

    def full(x, head, teacher_inputs, teacher, where):
        z = jnp.where(MASK, x @ head["kernel"] + head["bias"], -jnp.inf)
        y = jnp.where(MASK, teacher_inputs @ teacher / 1.5, -jnp.inf)
        log_p, lse = jax.nn.log_softmax(z), jax.nn.logsumexp(z, axis=-1)
        cost = jnp.where(MASK, jax.nn.softmax(y) * jnp.where(MASK, -log_p, 0), 0).sum(-1)
        losses = jnp.where(where, cost + 0.2 * lse**2, 0)
        return losses if reduction == "none" else losses.sum()

    def gradients(loss):
        def total(x, kernel, teacher_inputs, teacher):
            head = HEAD | {"kernel": kernel}
            return jnp.sum(loss(x, head, teacher_inputs, teacher, WHERE) ** 2)

        # The teacher's gradient is asked for where logits are not kept.
        wanted = (0, 1) if keeps_logits else (0, 1, 2, 3)
        args = tuple(map(jnp.asarray, (INPUTS, KERNEL, teacher_inputs, teacher)))
        return jit(jax.value_and_grad(total, wanted))(*args)

    assert_close(gradients(sharded), gradients(full))


@pytest.mark.parametrize("is_head", [False, True])
def test_what_crosses_devices_for_statistics(is_head):
    tokens, features, classes = 24, 5, 512
    mesh = make_mesh((4,), ("model",))
    if is_head:
        loss = xentjax.vocab_parallel_linear_softmax_cross_entropy_with_stats
        specs, args = (P(), P(None, "model"), P()), (jnp.ones((tokens, features)),)
        args = *args, jnp.ones((features, classes)), jnp.zeros(tokens, int)
    else:
        loss = xentjax.vocab_parallel_softmax_cross_entropy_with_stats
        specs, args = (P(None, "model"), P()), (jnp.ones((tokens, classes)), jnp.zeros(tokens, int))
    sharded = jax.shard_map(
        functools.partial(loss, axis_name="model"), mesh=mesh, in_specs=specs, out_specs=P()
    )

    def total(*args):
        losses, stats = sharded(*args)
        return jnp.sum(losses + stats.entropy), stats

    compiled = jax.jit(jax.grad(total, has_aux=True)).lower(*args).compile()
    crossing = collectives(compiled)
    # The largest logit, a stack of sums, the first class that leads, and the label's logit;
    # backward, the inputs' gradient. XLA may send two of a kind at once (jaxlib 0.10.2).
    expected = [f"[{tokens}]"] * 3 + [f"[6,{tokens}]"] + [f"[{tokens},{features}]"] * is_head
    assert {name for name, _ in crossing} == {"all-reduce"}
    found = re.findall(r"\[[\d,]+\]", " ".join(shape for _, shape in crossing))
    assert sorted(found) == sorted(expected)
