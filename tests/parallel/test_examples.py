"""One example at a time: its loss, its gradient and whatever the loss brings beside it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mainly, target_forms
from meshes import CLASSES, NEAR, logits_of, make_batch, make_params, relative_difference

import xentjax
from xentjax import per_example


def _loss_of_one(params, example):
    return xentjax.softmax_cross_entropy(logits_of(params, example), example["targets"])


@pytest.mark.parametrize("form", mainly(["labels", "dense", "prior", "two backgrounds"], "prior"))
def test_per_example_is_the_loop(form):
    targets = target_forms(4, CLASSES)[form]
    batch = {"inputs": make_batch()["inputs"][:4], "targets": targets}
    losses, grads = jax.jit(per_example(_loss_of_one, gradients=True))(make_params(), batch)
    np.testing.assert_array_equal(losses, per_example(_loss_of_one)(make_params(), batch))

    dense = xentjax.dense_targets(targets, CLASSES)
    for i in range(4):
        example = {"inputs": batch["inputs"][i], "targets": dense[i]}
        desired = jax.value_and_grad(_loss_of_one)(make_params(), example)
        actual = losses[i], jax.tree.map(lambda g, i=i: g[i], grads)
        # The dense masses themselves are rounded.
        assert relative_difference(actual, desired) <= 3 * NEAR


def test_it_exports():
    batch = {k: make_batch()[k][:4] for k in ("inputs", "targets")}
    function = jax.jit(per_example(_loss_of_one, gradients=True))
    platforms = ("cpu", "cuda", "tpu", "rocm")
    exported = jax.export.export(function, platforms=platforms)(make_params(), batch)
    assert exported.platforms == platforms
    got, want = exported.call(make_params(), batch), function(make_params(), batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), got, want)


def test_per_example_gradients_add_up():
    params, batch = (
        make_params(),
        {k: make_batch()[k] for k in ("inputs", "targets")},
    )
    _, grads = per_example(_loss_of_one, gradients=True)(params, batch)
    losses = functools.partial(per_example(_loss_of_one), batch=batch)
    desired = jax.grad(lambda p: losses(p).sum())(params)
    assert relative_difference(jax.tree.map(lambda g: g.sum(0), grads), desired) <= NEAR


def test_a_batch_of_two_sizes_is_an_error():
    batch = make_batch() | {"targets": jnp.zeros(4, int)}
    with pytest.raises(ValueError, match="inconsistent sizes"):
        per_example(_loss_of_one)(make_params(), batch)


@pytest.mark.parametrize("gradients", [False, True])
def test_per_example_takes_a_scalar_loss(gradients):
    function = per_example(lambda params, x: params * x, gradients=gradients)
    wanted = r"loss_fn: expected the scalar loss of one example, got float32\[3\]"
    with pytest.raises(ValueError, match=wanted):
        function(jnp.ones(()), jnp.ones((2, 3)))


@pytest.mark.parametrize("gradients", [False, True])
def test_the_loss_brings_arrays_with_it(gradients):
    def with_probabilities(params, example):
        return _loss_of_one(params, example), {"p": jax.nn.softmax(logits_of(params, example))}

    params, batch = make_params(), {k: make_batch()[k] for k in ("inputs", "targets")}
    outputs = per_example(with_probabilities, gradients=gradients, has_aux=True)(params, batch)
    (losses, aux), *grads = outputs if gradients else (outputs,)
    desired = per_example(_loss_of_one, gradients=gradients)(params, batch)
    assert relative_difference((losses, *grads) if gradients else losses, desired) <= NEAR
    assert relative_difference(aux["p"], jax.nn.softmax(logits_of(params, batch))) <= NEAR


def test_a_loss_without_the_arrays_it_should_bring_is_an_error():
    with pytest.raises(TypeError, match=r"loss_fn: expected a pair \(loss, aux\), got"):
        per_example(lambda params, x: params * x, has_aux=True)(jnp.ones(()), jnp.ones(3))
