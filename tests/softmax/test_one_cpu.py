"""What is done on one CPU alone: a guess, loops over rows, chunks of classes, scattered values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    INF,
    assert_exact,
    assert_modes_agree,
    floating_leaves,
    jit,
    loss_and_gradient,
    plain_softmax_cross_entropy,
    rows_with_margins,
    target_forms,
)

import xentjax
from xentjax._softmax import cpu as _one_cpu
from xentjax._softmax import rows as _rows
from xentjax._softmax.choice import on_one_cpu


@pytest.fixture
def one_cpu(monkeypatch):
    """One device, on which arrays of these tests are large."""
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    monkeypatch.setattr(_rows, "CACHED", 64)  # A few rows at a time, and fewer in the end.
    monkeypatch.setattr(_rows, "LARGE", 128)
    monkeypatch.setattr(_one_cpu, "_SMALL", 16)
    monkeypatch.setattr(_one_cpu, "_FEW", 2)  # Whose largest is far from that of all.
    monkeypatch.setattr(_one_cpu, "_LEAST", 3)  # So 12 classes are 4 chunks, and 11 are one.

    def clear_caches():  # Of what was traced for other devices and sizes.
        _one_cpu._length.cache_clear()
        jax.clear_caches()

    clear_caches()
    yield
    monkeypatch.undo()
    clear_caches()


@pytest.mark.usefixtures("one_cpu")
@pytest.mark.parametrize("num_classes", [2, 10, 11, 300])
def test_exact_from_margin_minus_80_to_80(num_classes):
    assert_exact(*rows_with_margins(num_classes, np.linspace(-80, 80, 65)))


@pytest.mark.parametrize("form", ["labels", "smoothed"])
def test_a_long_sum_loses_no_digits(form, monkeypatch):
    # Each addend rounded the same way is the worst that can happen to a sum: 50257 · exp(0.1).
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    targets = target_forms(200, 50257)[form]
    losses, gradient = loss_and_gradient(np.full((200, 50257), 0.1, np.float32), targets)
    np.testing.assert_allclose(losses, np.log(50257), rtol=3e-7)
    desired = 1 / 50257 - np.asarray(xentjax.dense_targets(targets, 50257), np.float64)
    np.testing.assert_allclose(gradient, desired, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize(("num_classes", "dtype"), [(12, jnp.float32), (11, jnp.bfloat16)])
@pytest.mark.parametrize("form", target_forms(1, 2))
def test_it_answers_what_any_device_does(form, num_classes, dtype, request):
    targets = target_forms(21, num_classes)[form]
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(21, num_classes)) * 8, dtype)
    losses, gradient = jit(loss_and_gradient)(logits, targets)
    request.getfixturevalue("one_cpu")
    alone = jit(loss_and_gradient)(logits, targets)
    # Sums in another order; an entry T · p − t may cancel, and is then small beside T.
    np.testing.assert_allclose(alone[0], losses, rtol=1e-6)
    rounding = 1e-6 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(alone[1], np.float32), np.asarray(gradient, np.float32), rtol=rounding, atol=1e-6
    )


FEW_MODES = ("value", "jit(grad)", "linearize", "hessian", "jvp(value_and_grad)", "grad(scan)")


@pytest.mark.usefixtures("one_cpu")
@pytest.mark.parametrize("form", ["labels", "mixed", "two backgrounds"])
def test_every_mode_to_every_float_argument(form):
    with jax.enable_x64(True):
        floats, rebuild = floating_leaves(target_forms(9, 8)[form])
        logits = jnp.asarray(np.random.default_rng(1).normal(size=(9, 8)) * 3)

        def scalar(function):
            return lambda z, *floats: jnp.sum(function(z, rebuild(floats)) ** 2)

        ours, plain = xentjax.softmax_cross_entropy, plain_softmax_cross_entropy
        assert_modes_agree(FEW_MODES, scalar(ours), scalar(plain), (logits, *floats))


@pytest.mark.usefixtures("one_cpu")
@pytest.mark.parametrize("num_classes", [11, 12])
def test_confident_dense_targets_are_as_exact_as_labels(num_classes):
    logits, labels = rows_with_margins(num_classes, np.linspace(-80, 80, 65))
    dense = xentjax.dense_targets(labels, num_classes)
    for actual, desired in zip(
        loss_and_gradient(logits, dense), loss_and_gradient(logits, labels), strict=True
    ):
        np.testing.assert_allclose(actual, desired, rtol=1e-6)


# What is added to the first two logits, of which the shift is guessed, to the third, and to others.
MOVES = [
    (300, 300, 300),
    (-200, -200, -200),
    (-1e9, 0, 0),
    (-3e38, 0, 0),
    (-60, 0, 0),
    (0, 75, 0),
    (75, 0, 0),
    (-30, 40, -30),
    (-30, 0, -30),
    (-75, 0, -75),
    (-100, -25, -100),
]


@pytest.mark.usefixtures("one_cpu")
@pytest.mark.parametrize("num_classes", [11, 12])
def test_a_shift_that_is_not_guessed(num_classes):
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(len(MOVES), num_classes)) * 2
    logits += np.repeat(MOVES, [2, 1, num_classes - 3], axis=1)
    logits = logits.astype(np.float32)
    for labels in logits.argmax(-1), np.full(len(logits), num_classes - 1):
        assert_exact(logits, labels)
        desired = loss_and_gradient(logits, labels)
        impossible = np.where(logits < -1e38, -INF, logits)
        dense = xentjax.dense_targets(labels, num_classes)
        for actual in loss_and_gradient(impossible, labels), loss_and_gradient(logits, dense):
            jax.tree.map(lambda a, d: np.testing.assert_allclose(a, d, rtol=1e-6), actual, desired)


@pytest.mark.usefixtures("one_cpu")
@pytest.mark.parametrize("num_classes", [11, 12])
def test_two_largest_logits_in_any_chunks(num_classes):
    first, second = np.triu_indices(num_classes, 1)
    rows = np.arange(len(first))
    logits = np.full((len(first), num_classes), -INF, np.float32)
    logits[:, ::2] = 1  # And some that are impossible.
    logits[rows, first] = logits[rows, second] = 3
    exponentials = np.exp(logits.astype(np.float64))
    p = exponentials / exponentials.sum(-1, keepdims=True)
    for targets in first, xentjax.dense_targets(first, num_classes):
        losses, gradient = loss_and_gradient(logits, targets)
        np.testing.assert_allclose(losses, -np.log(p[rows, first]), rtol=1e-6)
        np.testing.assert_allclose(gradient, p - np.eye(num_classes)[first], rtol=0, atol=5e-7)


@pytest.mark.usefixtures("one_cpu")
def test_dense_mass_on_an_impossible_class_is_an_infinite_loss():
    logits = np.zeros((6, 12), np.float32)
    logits[:, 7] = -INF
    targets = np.full((6, 12), 1 / 11, np.float32)
    targets[:, 7] = 0
    targets[4, 7] = 1e-30
    losses = xentjax.softmax_cross_entropy(logits, targets)
    np.testing.assert_allclose(losses, np.where(np.arange(6) == 4, INF, np.log(11)), rtol=1e-6)


@pytest.mark.usefixtures("one_cpu")
def test_vmap_is_the_loop():
    labels = jnp.asarray(np.random.default_rng(2).integers(0, 20, (3, 11)))
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(3, 11, 20)), jnp.float32)
    mapped = jax.vmap(loss_and_gradient)(logits, labels)
    for i in range(3):
        for many, one in zip(mapped, loss_and_gradient(logits[i], labels[i]), strict=True):
            np.testing.assert_allclose(many[i], one, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("one_cpu")
def test_it_exports_to_every_platform():
    platforms = ("cpu", "cuda", "tpu", "rocm")
    args = jnp.ones((21, 12)), xentjax.smooth_labels(jnp.arange(21) % 12, 0.1)
    step = jax.jit(loss_and_gradient)
    exported = jax.export.export(step, platforms=platforms)(*args)
    assert exported.platforms == platforms
    jax.tree.map(np.testing.assert_array_equal, exported.call(*args), step(*args))


def test_elsewhere_it_is_the_default(monkeypatch):
    def add(x):
        return x + 1

    def call():
        return on_one_cpu(jnp.negative, add, lambda _, x: add(x))(1)

    assert call() == 2  # Of eight devices.
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    assert call() == -1

    def no_cpu(*_):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "device_count", no_cpu)
    assert call() == 2
