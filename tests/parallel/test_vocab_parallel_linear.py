"""The head with its kernel's classes split over devices: one device's numbers, and what crosses."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import floating_leaves, jit, mainly, plain_softmax_cross_entropy, target_forms
from heads import linear_loss
from jax import export
from jax.sharding import PartitionSpec as P
from meshes import (
    NEAR,
    make_mesh,
    target_specs,
)

import xentjax
from xentjax._softmax.head_plan import HeadPlan

_loss = functools.partial(linear_loss, axis_name="model")
_public_loss = functools.partial(
    xentjax.vocab_parallel_linear_softmax_cross_entropy, axis_name="model"
)

# On a mesh of 2 by 4 devices, 4 tokens and 5 classes each: in chunks of 2, the last one shorter.
TOKENS, FEATURES, CLASSES = 8, 3, 20
PLANS = {"kept": HeadPlan(2, 2, True), "recomputed": HeadPlan(2, 2, False)}

# The float64 oracle differs by rounding alone: sums of at most 160 terms, of size 1 to 100.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield


def arguments(dtype=None, classes=CLASSES):
    """Returns inputs, kernel, bias, weights and a cap; one token is all but certain of a class."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(TOKENS, FEATURES))
    kernel = rng.normal(size=(FEATURES, classes))
    inputs[0] = 12 * kernel[:, 7] / np.linalg.norm(kernel[:, 7])
    bias, weights = rng.normal(size=classes), rng.random(TOKENS) + 0.5
    return tuple(jnp.asarray(x, dtype) for x in (inputs, kernel, bias, weights, 5.0))


FORMS = list(target_forms(1, 2))
WHERE = np.array([True, True, False, True, True, False, True, True])


def sharded(mesh, targets, reduction="sum", class_axis=1, where=WHERE, loss=_loss, **kwargs):
    """Returns the loss as a function of `arguments` and of the floats in targets."""
    floats, rebuild = floating_leaves(targets)
    kernel_spec = P("model") if class_axis % 2 == 0 else P(None, "model")

    def on_device(inputs, kernel, bias, weights, cap, targets, where):
        losses = loss(
            inputs,
            kernel,
            targets,
            bias=bias,
            weights=weights,
            where=where,
            class_axis=class_axis,
            reduction=reduction,
            logit_transform=xentjax.soft_cap(cap),
            **kwargs,
        )
        return losses if reduction == "none" else jax.lax.psum(losses, "data")

    on_mesh = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(
            *(P("data"), kernel_spec, P("model"), P("data"), P()),
            *(target_specs(targets), P("data")),
        ),
        out_specs=P("data") if reduction == "none" else P(),
    )

    def function(inputs, kernel, bias, weights, cap, *args):
        t, kernel = rebuild(args or floats), kernel.T if class_axis % 2 == 0 else kernel
        return on_mesh(inputs, kernel, bias, weights, cap, t, jnp.asarray(where))

    return function


def plain(targets, reduction="sum", where=WHERE):
    """Returns the same function of full logits."""
    floats, rebuild = floating_leaves(targets)

    def function(inputs, kernel, bias, weights, cap, *args):
        logits = cap * jnp.tanh((inputs @ kernel + bias) / cap)
        losses = plain_softmax_cross_entropy(logits, rebuild(args or floats))
        weighted = jnp.where(where, weights * losses, 0)
        if reduction == "none":
            return weighted
        return weighted.sum() / (jnp.sum(weights * where) if reduction == "mean" else 1)

    return function


def value_and_gradients(function, args, argnums):
    """Returns Σ function² and its gradients: the cotangents of losses differ from each other."""
    return jit(jax.value_and_grad(lambda *a: jnp.sum(function(*a) ** 2), argnums))(*args)


def assert_close(actual, desired):
    jax.tree.map(lambda a, d: np.testing.assert_allclose(a, d, **CLOSE), actual, desired)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    "case",
    mainly(
        itertools.product(PLANS, FORMS),
        *(("recomputed", form) for form in ("labels", "dense", "two backgrounds", "teacher")),
        *(("kept", form) for form in ("smoothed", "prior")),
    ),
    ids=str,
)
def test_every_gradient_for_every_target_form(case):
    way, form = case
    classes = CLASSES - 4  # Of which no block is shorter: it takes less time to compile.
    targets, mesh = target_forms(TOKENS, classes)[form], make_mesh((2, 4), ("data", "model"))
    args = arguments(classes=classes) + tuple(floating_leaves(targets)[0])
    # What asks for the transform's or the targets' gradient is never made in the forward pass.
    argnums = (0, 1, 2, 3) if way == "kept" else tuple(range(len(args)))
    actual = sharded(mesh, targets, plan=PLANS[way])
    assert_close(
        value_and_gradients(actual, args, argnums),
        value_and_gradients(plain(targets), args, argnums),
    )


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("way", "form", "reduction", "class_axis"),
    [("kept", "labels", "mean", -2), ("recomputed", "dense", "none", 0)],
)
def test_every_reduction_and_layout(way, form, reduction, class_axis):
    targets, mesh = target_forms(TOKENS, CLASSES)[form], make_mesh((1, 4), ("data", "model"))
    options = {"reduction": reduction, "class_axis": class_axis, "plan": PLANS[way]}
    actual, desired = sharded(mesh, targets, **options), plain(targets, reduction)
    argnums = (0, 1, 2, 3)
    assert_close(
        value_and_gradients(actual, arguments(), argnums),
        value_and_gradients(desired, arguments(), argnums),
    )


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("way", mainly(PLANS, "kept"))
def test_an_invalid_label_is_nan_in_its_row_alone(way):
    labels = jnp.array([-1, 15, -3, CLASSES, -CLASSES, 10**6, 4, 19])
    mesh, options = make_mesh((2, 4), ("data", "model")), {"plan": PLANS[way]}
    bad = np.array([True, False, False, True, True, False, False, False])
    losses = jit(sharded(mesh, labels, "none", **options))(*arguments())
    total, gradient = jit(jax.value_and_grad(sharded(mesh, labels, **options)))(*arguments())
    valid = jnp.where((labels < 0) | (labels >= CLASSES), 0, labels)
    np.testing.assert_array_equal(np.isnan(losses), bad)
    assert np.isnan(total)
    np.testing.assert_array_equal(np.isnan(gradient).all(-1), bad)
    assert_close(losses[~bad], plain(valid, "none")(*arguments())[~bad])
    assert_close(gradient[~bad], jax.grad(plain(valid))(*arguments())[~bad])


@pytest.mark.usefixtures("_float64")
def test_padded_classes_are_masked():
    num_classes, targets = CLASSES - 2, jnp.array([0, 15, 3, 16, 17, 5, 4, 9])
    inputs, kernel, bias, weights, cap = arguments()
    mesh, class_mask = make_mesh((2, 4), ("data", "model")), jnp.arange(CLASSES) < num_classes

    def on_device(inputs, kernel, bias, class_mask, targets, weights):
        options = {"logit_transform": xentjax.soft_cap(cap), "plan": PLANS["kept"]}
        options |= {"bias": bias, "class_mask": class_mask, "weights": weights}
        losses = _loss(inputs, kernel, targets, reduction="sum", **options)
        return jax.lax.psum(losses, "data")

    padded = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P("data"), P(None, "model"), P("model"), P("model"), P("data"), P("data")),
        out_specs=P(),
    )

    def actual(inputs, kernel, bias):
        kernel, bias = jnp.pad(kernel, ((0, 0), (0, 2))), jnp.pad(bias, (0, 2))
        return padded(inputs, kernel, bias, class_mask, targets, weights)

    def desired(*args):
        return plain(targets, where=np.ones(TOKENS, bool))(*args, weights, cap)

    args = inputs, kernel[:, :num_classes], bias[:num_classes]
    assert_close(*(value_and_gradients(f, args, (0, 1, 2)) for f in (actual, desired)))
    with pytest.raises(ValueError, match="evenly divi"):
        padded(*args, class_mask, targets, weights)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
    inputs, kernel, bias, *_ = arguments(dtype)
    labels = jnp.arange(TOKENS)
    mesh = make_mesh((2, 4), ("data", "model"))
    losses = jax.shard_map(
        lambda x, w, b, t: _public_loss(x, w, t, bias=b, reduction="none"),
        mesh=mesh,
        in_specs=(P("data"), P(None, "model"), P("model"), P("data")),
        out_specs=P("data"),
    )

    def value_and_gradients(losses):
        return jax.jit(
            jax.value_and_grad(lambda x, w, b: losses(x, w, b, labels).sum(), (0, 1, 2))
        )(inputs, kernel, bias)

    def plain(x, w, b, t):
        logits = x.astype(jnp.float32) @ w.astype(jnp.float32) + b.astype(jnp.float32)
        return xentjax.softmax_cross_entropy(logits, t)

    (loss, actual), (exact, desired) = map(value_and_gradients, (losses, plain))
    assert loss.dtype == jnp.float32
    assert [g.dtype for g in actual] == [dtype] * 3
    np.testing.assert_allclose(loss, exact, rtol=NEAR)
    for a, d in zip(actual, desired, strict=True):
        scale = np.abs(d.astype(jnp.float32)).max()
        # Probabilities are rounded before they are multiplied, and each device's part is.
        ulps = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            a.astype(jnp.float32), d.astype(jnp.float32), rtol=0, atol=ulps * scale
        )


# Errors and export.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel": P()}, ValueError, "kernel: expected a shard of the classes for each device"),
        ({"bias": P()}, ValueError, "bias: expected a shard of the classes for each device"),
        ({"check_vma": False}, ValueError, "axis_name: .*check_vma=True"),
        ({"targets": jnp.zeros(6, int)}, ValueError, r"targets: expected shape \(4,\)"),
        ({"targets": jnp.zeros((TOKENS, 4))}, ValueError, r"targets: expected shape \(4, 5\)"),
        ({"reduction": "average"}, ValueError, "reduction: expected"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    inputs, kernel, bias, *_ = arguments(jnp.float32)
    targets = change.get("targets", jnp.zeros(TOKENS, int))
    reduction = change.get("reduction", "none")
    losses = jax.shard_map(
        lambda x, w, b, t: _public_loss(x, w, t, bias=b, reduction=reduction),
        mesh=make_mesh((2, 4), ("data", "model")),
        in_specs=(
            P("data"),
            change.get("kernel", P(None, "model")),
            change.get("bias", P("model")),
            P("data"),
        ),
        out_specs=P("data"),
        check_vma=change.get("check_vma", True),
    )
    if "kernel" in change:
        bias = jnp.zeros(4 * CLASSES)
    with pytest.raises(error, match=message):
        jax.jit(losses)(inputs, kernel, bias, targets)


@pytest.mark.parametrize("memory_budget", [None, 0])
def test_it_exports(memory_budget):
    targets = target_forms(TOKENS, CLASSES)["prior"]
    mesh, options = make_mesh((2, 4), ("data", "model")), {"memory_budget": memory_budget}
    loss = sharded(mesh, targets, loss=_public_loss, **options)
    platforms = ("cpu", "cuda", "tpu", "rocm")
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    exported = export.export(step, platforms=platforms)(*arguments(jnp.float32))
    assert exported.platforms == platforms
    assert exported.nr_devices == 8
