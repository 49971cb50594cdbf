"""Classes split over devices: the loss and every derivative of one device."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import contract, jit, mainly, target_forms
from jax import export
from jax.experimental import checkify
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    AUTO,
    EXPLICIT,
    NEAR,
    collectives,
    make_mesh,
    relative_difference,
    target_specs,
)

import xentjax
from xentjax._targets import mass as _masses
from xentjax._targets import types as _targets

EXAMPLES, FEATURES, CLASSES = 24, 5, 16
LOGITS = P("data", "model")

_loss = functools.partial(xentjax.vocab_parallel_softmax_cross_entropy, axis_name="model")


def _sharded_losses(mesh, targets, loss=_loss):
    """Returns (logits, targets, where) -> losses of whole arrays, through a shard_map."""
    specs = (LOGITS, target_specs(targets), P("data"))
    return jax.shard_map(
        lambda z, t, where: loss(z, t, where=where), mesh=mesh, in_specs=specs, out_specs=P("data")
    )


def _logits(seed=0, dtype=jnp.float32):
    z = np.random.default_rng(seed).normal(size=(EXAMPLES, CLASSES)) * 4
    z[:3, 2] += 40.0  # Confident.
    z[3, 5] = z[3, 12] = z[3].max()  # Two largest logits, on two devices.
    z[4, :8] = -np.inf  # A device, or half of one, without a class that is possible.
    return jnp.asarray(z, dtype)


def _where(seed=1):
    where = np.random.default_rng(seed).random(EXAMPLES) < 0.6
    where[:5] = True
    where[6:12] = False  # All of a device's share where four share the examples out.
    return jnp.asarray(where)


# One device and many.


@pytest.mark.parametrize(
    "case",
    mainly(
        [
            *((shape, AUTO) for shape in [(1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (4, 2)]),
            *(((2, 4), axis_type) for axis_type in (AUTO, EXPLICIT)),
        ],
        *[((1, 1), AUTO), ((4, 2), AUTO), ((2, 4), EXPLICIT)],
    ),
    ids=str,
)
def test_a_train_step_on_any_mesh_is_that_of_one_device(case):
    shape, axis_type = case
    rng = np.random.default_rng(2)
    params = {
        "hidden": jnp.asarray(rng.normal(size=(3, FEATURES)), jnp.float32),
        "kernel": jnp.asarray(rng.normal(size=(FEATURES, CLASSES)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=CLASSES), jnp.float32),
    }
    labels = jnp.asarray(rng.integers(0, CLASSES, EXAMPLES))
    inputs = jnp.asarray(rng.normal(size=(EXAMPLES, 3)), jnp.float32)
    batch = inputs, xentjax.smooth_labels(labels, 0.1), _where()

    def loss_fn(loss, params, batch):
        inputs, targets, where = batch
        logits = jnp.tanh(inputs @ params["hidden"]) @ params["kernel"] + params["bias"]
        return xentjax.weighted_sum(loss(logits, targets, where=where), where=where)

    specs = {"hidden": P(), "kernel": P(None, "model"), "bias": P("model")}
    value_and_grad = xentjax.data_parallel(
        functools.partial(loss_fn, _loss),
        make_mesh(shape, ("data", "model"), axis_type),
        in_specs=(specs, P("data")),
    )
    actual = value_and_grad(params, batch)
    plain = functools.partial(loss_fn, xentjax.softmax_cross_entropy)
    desired = jax.value_and_grad(lambda params: plain(params, batch).mean())(params)
    assert relative_difference(actual, desired) <= NEAR
    assert actual[1]["kernel"].sharding.shard_shape((FEATURES, CLASSES))[1] == CLASSES // shape[1]


@pytest.mark.parametrize(
    "form", mainly(target_forms(1, 2), "labels", "dense", "two backgrounds", "teacher")
)
def test_every_target_form(form):
    targets, where = target_forms(EXAMPLES, CLASSES)[form], _where()
    logits = jnp.maximum(_logits(), -50.0)  # Every class is a target of some of the forms.
    mesh = make_mesh((2, 4), ("data", "model"))

    def value_and_grad(losses):
        return jax.jit(
            jax.value_and_grad(lambda z, t: (w := losses(z, t, where)).sum() + (w**2).sum())
        )

    def plain(z, t, where):
        return xentjax.softmax_cross_entropy(z, t, where=where)

    sharded = value_and_grad(_sharded_losses(mesh, targets)).lower(logits, targets).compile()
    actual, desired = sharded(logits, targets), value_and_grad(plain)(logits, targets)
    assert relative_difference(actual, desired) <= NEAR
    # One maximum and one sum of [N] vectors forward, and nothing backward; the sum over examples at
    # the end is ours, not the loss's.
    examples = EXAMPLES // 2
    crossing = [c for c in collectives(sharded) if str(examples) in c[1]]
    expected = [("all-reduce", f"f32[5,{examples}]"), ("all-reduce", f"f32[{examples}]")]
    assert sorted(crossing) == sorted(expected)


def test_confident_predictions_stay_exact():
    # Every entry, not the largest alone: the loss and the label's gradient are 1e-35 here.
    rng = np.random.default_rng(3)
    margins = np.linspace(-80, 80, EXAMPLES)
    logits, labels = rng.normal(size=(EXAMPLES, CLASSES)), rng.integers(0, CLASSES, EXAMPLES)
    rows = np.arange(EXAMPLES)
    logits[rows, labels] = -np.inf
    logits[rows, labels] = logits.max(-1) + margins
    logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)

    def losses_and_gradient(losses):
        return jax.jit(
            lambda z, t: (losses(z, t, None), jax.grad(lambda z: losses(z, t, None).sum())(z))
        )

    mesh = make_mesh((1, 4), ("data", "model"))
    sharded = jax.shard_map(_loss, mesh=mesh, in_specs=(LOGITS, P("data")), out_specs=P("data"))
    actual = losses_and_gradient(lambda z, t, _: sharded(z, t))(logits, labels)
    desired = losses_and_gradient(lambda z, t, w: xentjax.softmax_cross_entropy(z, t))(
        logits, labels
    )
    rows = np.array([contract(z) for z in logits])
    for a, d, bound in zip(actual, desired, (rows, rows[:, None]), strict=True):
        # Each of the two keeps the contract.
        assert np.all(np.abs(a - d) <= 2 * bound * np.abs(d) + np.finfo(np.float32).tiny)


@pytest.mark.parametrize("dtype", mainly([jnp.bfloat16, jnp.float16], jnp.bfloat16))
def test_low_precision(dtype):
    logits, labels = _logits(dtype=dtype), target_forms(EXAMPLES, CLASSES)["labels"]
    labels = labels.at[4].set(15)
    losses = _sharded_losses(make_mesh((2, 4), ("data", "model")), labels)
    where = jnp.ones(EXAMPLES, bool)
    actual, gradient = jax.jit(
        lambda z: (losses(z, labels, where), jax.grad(lambda z: losses(z, labels, where).sum())(z))
    )(logits)
    assert actual.dtype == jnp.float32
    assert gradient.dtype == dtype
    np.testing.assert_allclose(
        actual, xentjax.softmax_cross_entropy(logits, labels), rtol=NEAR, atol=1e-30
    )
    desired = jax.grad(lambda z: xentjax.softmax_cross_entropy(z, labels).sum())(logits)
    ulp = float(
        jnp.finfo(dtype).eps
    )  # Both are rounded once, from float32 numbers a few ulps apart.
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), desired.astype(jnp.float32), rtol=ulp, atol=1e-7
    )


def test_classes_over_two_mesh_axes():
    mesh = make_mesh((2, 2), ("rows", "columns"))
    logits, targets = jnp.maximum(_logits(), -50.0), target_forms(EXAMPLES, CLASSES)["prior"]
    axes = ("rows", "columns")
    losses = jax.shard_map(
        functools.partial(xentjax.vocab_parallel_softmax_cross_entropy, axis_name=axes),
        mesh=mesh,
        in_specs=(P(None, axes), P()),
        out_specs=P(),
    )
    actual = jit(losses)(logits, targets)
    assert relative_difference(actual, xentjax.softmax_cross_entropy(logits, targets)) <= NEAR


def test_classes_that_do_not_divide_are_padded_and_masked():
    num_classes = CLASSES - 3
    logits = jnp.maximum(_logits(), -50.0)
    short = logits[:, :num_classes]
    labels = target_forms(EXAMPLES, num_classes)["labels"]
    prior = jnp.full(num_classes, 1 / num_classes)
    targets = xentjax.smooth_labels(labels, 0.1)
    padded = xentjax.smooth_labels(labels, 0.1, background=jnp.pad(prior, (0, 3)))
    is_class = jnp.broadcast_to(jnp.arange(CLASSES) < num_classes, logits.shape)
    mesh = make_mesh((2, 4), ("data", "model"))
    losses = jax.shard_map(
        lambda z, t, w: _loss(z, t, where=w),
        mesh=mesh,
        in_specs=(LOGITS, target_specs(padded), LOGITS),
        out_specs=P("data"),
    )
    actual = jit(jax.value_and_grad(lambda z: losses(z, padded, is_class).sum()))(logits)
    desired = jax.value_and_grad(lambda z: xentjax.softmax_cross_entropy(z, targets).sum())(short)
    assert relative_difference((actual[0], actual[1][:, :num_classes]), desired) <= NEAR
    assert not actual[1][:, num_classes:].any()
    with pytest.raises(ValueError, match="evenly divi"):
        losses(short, padded, is_class[:, :num_classes])


def test_invalid_labels_are_nan_in_their_row_alone():
    labels = target_forms(EXAMPLES, CLASSES)["labels"]
    labels = labels.at[:6].set(jnp.array([-1, 15, CLASSES, -CLASSES, 15, 10**6]))
    where = jnp.ones(EXAMPLES, bool).at[5].set(False)
    losses = _sharded_losses(make_mesh((2, 4), ("data", "model")), labels)
    actual = jit(lambda z: losses(z, labels, where))(_logits())
    gradient = jit(jax.grad(lambda z: losses(z, labels, where).sum()))(_logits())
    bad = np.isin(np.arange(EXAMPLES), [0, 2, 3])
    np.testing.assert_array_equal(np.isnan(actual), bad)
    np.testing.assert_array_equal(np.isnan(gradient).all(-1), bad)
    np.testing.assert_array_equal(np.isnan(gradient).any(-1), bad)
    assert actual[5] == 0
    assert not gradient[5].any()


# Without a shard_map.


@pytest.mark.parametrize(
    "case",
    mainly(
        itertools.product(
            (AUTO, EXPLICIT), ("labels", "smoothed", "two backgrounds", "dense", "teacher")
        ),
        *[(AUTO, "labels"), (AUTO, "dense"), (EXPLICIT, "two backgrounds"), (EXPLICIT, "teacher")],
    ),
    ids=str,
)
def test_jit_splits_the_plain_loss_by_itself(case):
    axis_type, form = case
    targets, logits = target_forms(EXAMPLES, CLASSES)[form], jnp.maximum(_logits(), -50.0)
    mesh = make_mesh((2, 4), ("data", "model"), axis_type)
    args = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
        (logits, targets),
        (LOGITS, target_specs(targets)),
    )
    losses = jax.jit(xentjax.softmax_cross_entropy)
    gradient = jax.jit(jax.grad(lambda z, t: xentjax.softmax_cross_entropy(z, t).sum()))
    plain = losses(logits, targets), gradient(logits, targets)
    losses, gradient = (f.lower(*args).compile() for f in (losses, gradient))
    actual = losses(*args), gradient(*args)
    assert relative_difference(actual, plain) <= NEAR
    assert actual[0].sharding.spec == P("data")
    assert actual[1].sharding.spec == LOGITS
    for function in (losses, gradient):
        crossing = collectives(function)
        # Of the few sparse targets' classes, but never of logits: [N, V] or this device's [N, V/4].
        assert not any(f",{CLASSES}]" in s or f",{CLASSES // 4}]" in s for _, s in crossing)
    crossing = collectives(losses)
    assert "all-reduce" in {name for name, _ in crossing}
    # Where an example has many classes, a scatter's indices may cross too.
    assert all(name == "all-reduce" or shape.startswith("s32") for name, shape in crossing)


# Blocks of targets.


@pytest.mark.parametrize(
    "form", mainly(target_forms(1, 2), "labels", "dense", "two backgrounds", "teacher")
)
def test_the_mass_on_blocks_makes_up_the_mass(form):
    targets = target_forms(6, 12)[form]
    dense = xentjax.dense_targets(targets, 12)
    mass = _masses.mass_of(_targets.as_targets(targets), 12, jnp.float32, None)

    @functools.partial(jax.jit, static_argnums=1)
    def entries(start, size):
        """Each class's mass: that which a logit of −1 there, and of 0 elsewhere, makes exceed 0."""
        block, logits = mass.block(start, size), -jnp.eye(size)
        zeros = jnp.zeros(6)

        def of_class(z):
            return block.excess(jnp.broadcast_to(z, (6, size)), zeros)

        return jax.vmap(of_class, out_axes=1)(logits), block.total()

    for start, size in [(0, 12), (0, 4), (4, 4), (8, 4), (5, 7)]:
        here, total = entries(start, size)
        # A uniform background is scaled to the block: an ulp or two.
        np.testing.assert_allclose(here, dense[:, start : start + size], rtol=3e-7, atol=1e-9)
        np.testing.assert_allclose(total, here.sum(-1), rtol=1e-6, atol=1e-9)


def test_an_invalid_label_is_nan_in_one_block():
    mass = _masses.mass_of(_targets.as_targets(jnp.array([-3, 99, 5])), 12, jnp.float32, None)
    weights = jnp.stack([mass.block(start, 4).weights[:, 0] for start in (0, 4, 8)])
    np.testing.assert_array_equal(weights, [[np.nan, 0, 0], [0, 0, 1], [0, np.nan, 0]])


# Errors and export.


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"check_vma": False}, ValueError, "axis_name: .*check_vma=True"),
        ({"logits": P("data")}, ValueError, "logits: expected a shard of the classes for each"),
        ({"dtype": jnp.int32}, TypeError, "logits: expected a floating"),
        ({"targets": jnp.zeros(4, int)}, ValueError, r"targets: expected shape \(12,\)"),
        ({"targets": jnp.zeros((EXAMPLES, 5))}, ValueError, r"targets: expected shape \(12, 4\)"),
        ({"where": jnp.ones(4, bool)}, ValueError, r"where: expected shape \(12,\)"),
        ({"where": jnp.ones(EXAMPLES)}, TypeError, "where: expected a bool"),
    ],
)
def test_errors_name_the_argument(kwargs, error, message):
    logits = jnp.zeros((EXAMPLES, CLASSES), kwargs.pop("dtype", jnp.float32))
    spec = kwargs.pop("logits", LOGITS)
    targets = kwargs.pop("targets", jnp.zeros(EXAMPLES, int))
    where = kwargs.pop("where", jnp.ones(EXAMPLES, bool))
    losses = jax.shard_map(
        lambda z, t, w: _loss(z, t, where=w),
        mesh=make_mesh((2, 4), ("data", "model")),
        in_specs=(spec, P("data"), P("data")),
        out_specs=P("data"),
        **kwargs,
    )
    with pytest.raises(error, match=message):
        jax.jit(losses)(logits, targets, where)


def test_it_exports():
    targets = target_forms(EXAMPLES, CLASSES)["prior"]
    losses = _sharded_losses(make_mesh((2, 4), ("data", "model")), targets)
    step = jax.jit(jax.value_and_grad(lambda z, t, where: losses(z, t, where).sum()))
    platforms = ("cpu", "cuda", "tpu", "rocm")
    exported = export.export(step, platforms=platforms)(_logits(), targets, _where())
    assert exported.platforms == platforms
    assert exported.nr_devices == 8


@pytest.mark.parametrize("head", [False, True])
def test_value_checks_name_the_label(head):
    labels = target_forms(EXAMPLES, CLASSES)["labels"].at[5].set(CLASSES)
    mesh = make_mesh((4,), ("model",))

    def losses(z, t):
        if not head:
            return _loss(z, t)
        kernel = jax.lax.pcast(jnp.ones((FEATURES, CLASSES // 4)), ("model",), to="varying")
        return xentjax.vocab_parallel_linear_softmax_cross_entropy(
            z, kernel, t, axis_name="model", reduction="none"
        )

    specs = (P() if head else P(None, "model"), P())
    z = jnp.ones((EXAMPLES, FEATURES if head else CLASSES))

    def call(labels):
        with xentjax.value_checks():
            sharded = jax.shard_map(losses, mesh=mesh, in_specs=specs, out_specs=P())
            checked = jax.jit(checkify.checkify(sharded))
            error, _ = checked(z, labels)
            error.throw()

    call(labels.at[5].set(0))
    with pytest.raises(checkify.JaxRuntimeError, match=rf"{CLASSES}"):
        call(labels)
