"""Microbatches, on one device and on many: the mean and gradient of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import jit, mainly, target_forms
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    AUTO,
    CLASSES,
    EXAMPLES,
    EXPLICIT,
    FEATURES,
    NEAR,
    collectives,
    logits_of,
    loss_fn,
    losses_and_weights,
    make_batch,
    make_mesh,
    make_params,
    on_one_device,
    plain_loss_fn,
    plain_losses,
    relative_difference,
)

import xentjax
from xentjax import accumulate_gradients


def on_mesh(loss_fn, **kwargs):
    return xentjax.data_parallel(loss_fn, make_mesh((4,), ("data",)), **kwargs)


def on_stacked(loss_fn, **kwargs):
    """`pmap_data_parallel`, of arrays that are not stacked."""
    value_and_grad = xentjax.pmap_data_parallel(loss_fn, devices=jax.devices("cpu"), **kwargs)

    def call(params, batch):
        copies = jax.tree.map(lambda x: jnp.stack([x] * 4), params)
        stacked = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)
        return jax.tree.map(lambda x: x[0], value_and_grad(copies, stacked))

    return call


all_ways = pytest.mark.parametrize("way", [accumulate_gradients, on_mesh, on_stacked])
all_ways_of_microbatches = pytest.mark.parametrize(
    ("way", "microbatches"),
    [
        pytest.param(accumulate_gradients, 1, marks=pytest.mark.prove),
        (accumulate_gradients, 3),
        (on_mesh, 3),
        pytest.param(on_stacked, 3, marks=pytest.mark.prove),
    ],
)


@pytest.mark.parametrize("microbatches", mainly([1, 4, EXAMPLES], 4))
def test_microbatches_are_one_batch(microbatches):
    params, batch = make_params(), make_batch()
    desired = on_one_device(loss_fn, params, batch)
    for loss in (loss_fn, losses_and_weights):
        actual = accumulate_gradients(loss, microbatches=microbatches)(params, batch)
        assert relative_difference(actual, desired) <= NEAR


@pytest.mark.parametrize("form", mainly(["dense", "prior", "two backgrounds", "teacher"], "prior"))
def test_targets_of_every_form_are_split_by_example(form):
    params = make_params()
    batch = make_batch() | {"targets": target_forms(EXAMPLES, CLASSES)[form]}
    actual = jit(accumulate_gradients(loss_fn, microbatches=3))(params, batch)
    assert relative_difference(actual, on_one_device(loss_fn, params, batch)) <= NEAR


def test_any_optimizer_takes_the_step_of_the_whole_batch():
    """`optax.MultiSteps` over `weighted_mean` takes another: that of a mean of means."""
    params, batch, parts = make_params(), make_batch(), 4
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1))

    @functools.partial(jit, static_argnums=0)
    def step(optimizer, gradients):
        state, new = optimizer.init(params), params
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, new)
            new = optax.apply_updates(new, updates)
        return new

    def mean(params, batch):
        return plain_loss_fn(params, batch).mean()

    microbatches = [jax.tree.map(lambda x, i=i: x[i::parts], batch) for i in range(parts)]
    gradient = jit(jax.grad(mean))  # That of `weighted_mean`.
    desired = step(optimizer, [gradient(params, batch)])
    _, accumulated = accumulate_gradients(plain_loss_fn, microbatches=parts)(params, batch)
    # Adam divides by the root of the squared gradient: it amplifies the last ulp a little.
    assert relative_difference(step(optimizer, [accumulated]), desired) <= 1e-5
    of_means = optax.MultiSteps(optimizer, every_k_schedule=parts)
    means = step(of_means, [gradient(params, microbatch) for microbatch in microbatches])
    assert relative_difference(means, desired) > 0.01


def test_it_takes_the_memory_of_one_microbatch():
    def mean(microbatches):
        def loss_fn(kernel, batch):
            x, labels = batch
            return xentjax.weighted_sum(xentjax.softmax_cross_entropy(x @ kernel, labels))

        return jax.jit(accumulate_gradients(loss_fn, microbatches=microbatches))

    def temporaries(microbatches):
        kernel = jax.ShapeDtypeStruct((4, 1024), jnp.float32)
        x = jax.ShapeDtypeStruct((1024, 4), jnp.float32)
        labels = jax.ShapeDtypeStruct((1024,), jnp.int32)
        compiled = mean(microbatches).lower(kernel, (x, labels)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(1) >= 4 * 1024 * 1024  # The logits of the whole batch.
    assert temporaries(16) <= temporaries(1) / 8


@all_ways_of_microbatches
@pytest.mark.parametrize("dtype", mainly(["int32", "bool"], "int32"))
def test_weights_may_be_integers(way, microbatches, dtype):
    params, batch = make_params(), make_batch()
    counts = np.random.default_rng(4).integers(0, 3, EXAMPLES).astype(dtype)
    batch |= {"where": counts > 0, "counts": jnp.asarray(counts)}

    def losses_and_counts(params, batch):
        return losses_and_weights(params, batch)[0], batch["counts"]

    def weighted_sum(params, batch):
        losses, counts = losses_and_counts(params, batch)
        return xentjax.WeightedSum((losses * counts.astype(losses.dtype)).sum(), counts.sum())

    def floats(params, batch):
        losses, counts = losses_and_counts(params, batch)
        return xentjax.weighted_sum(losses, weights=counts.astype(losses.dtype))

    desired = on_one_device(floats, params, batch)
    for loss in (losses_and_counts, weighted_sum):
        actual = jit(way(loss, microbatches=microbatches))(params, batch)
        assert relative_difference(actual, desired) <= NEAR


# Metrics beside the loss.


@all_ways_of_microbatches
def test_metrics_are_summed(way, microbatches):
    def with_metrics(params, batch):
        predicted = logits_of(params, batch).argmax(-1)
        right = (predicted == batch["targets"]) & batch["where"]
        confusion = jnp.zeros((CLASSES, CLASSES), int).at[batch["targets"], predicted].add(1)
        accuracy = xentjax.weighted_sum(right.astype(jnp.float32), where=batch["where"])
        metrics = {
            "accuracy": accuracy,
            "confusion": confusion,
            "any": batch["where"].any(),
            "thirds": jnp.asarray(batch["where"].sum() / 3, jnp.bfloat16),
        }
        return plain_loss_fn(params, batch), metrics

    params, batch = make_params(), make_batch()
    value_and_grad = jit(way(with_metrics, microbatches=microbatches, has_aux=True))
    (mean, metrics), grads = value_and_grad(params, batch)
    assert relative_difference((mean, grads), on_one_device(plain_loss_fn, params, batch)) <= NEAR

    _, desired = with_metrics(params, batch)
    assert relative_difference(metrics["accuracy"].mean(), desired["accuracy"].mean()) <= NEAR
    np.testing.assert_array_equal(metrics["confusion"], desired["confusion"])
    assert metrics["any"].dtype == jnp.int32
    assert 1 <= metrics["any"] <= 12
    assert metrics["thirds"].dtype == jnp.float32
    np.testing.assert_allclose(metrics["thirds"], batch["where"].sum() / 3, rtol=2**-8)


@all_ways
def test_metrics_that_do_not_add_are_an_error(way):
    params, batch = make_params(), make_batch()
    function = way(lambda p, b: (plain_loss_fn(p, b), {"name": "x"}), microbatches=3, has_aux=True)
    with pytest.raises(TypeError, match="loss_fn: expected arrays that add, got 'x'"):
        function(params, batch)
    key = jax.random.key(0)
    function = way(lambda p, b: (plain_loss_fn(p, b), key), microbatches=1, has_aux=True)
    with pytest.raises(TypeError, match=r"loss_fn: expected arrays that add, got key<fry>\[\]"):
        function(params, batch)
    with pytest.raises(TypeError, match=r"loss_fn: expected a pair \(loss, metrics\), got"):
        way(plain_loss_fn, microbatches=1, has_aux=True)(params, batch)


# Every setting of JAX, every mesh, every transformation.


@all_ways_of_microbatches
@pytest.mark.parametrize("dtype", mainly(["float32", "bfloat16", "float16"], "bfloat16"))
def test_under_every_setting_of_jax_dtypes_stay(way, microbatches, dtype):
    params, batch = make_params(), make_batch()
    params, inputs = jax.tree.map(lambda x: x.astype(dtype), (params, batch["inputs"]))
    batch |= {"inputs": inputs, "targets": batch["targets"].astype(jnp.int32)}

    def with_metrics(params, batch):
        parts = plain_loss_fn(params, batch)
        return parts, {"parts": parts, "kept": batch["where"].sum(dtype=jnp.int32)}

    value_and_grad = functools.partial(way, with_metrics, microbatches=microbatches, has_aux=True)
    strict = jax.numpy_dtype_promotion("strict")
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"), strict:
        (mean, metrics), grads = jit(value_and_grad())(params, batch)
    assert {x.dtype for x in jax.tree.leaves((mean, metrics["parts"]))} == {jnp.dtype("float32")}
    assert metrics["kept"].dtype == jnp.int32
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}

    one = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    desired = on_one_device(plain_loss_fn, one, batch)
    # One device in float32, from the same rounded arrays: logits and gradients are rounded here.
    tolerance = {"float32": NEAR, "bfloat16": 2**-6, "float16": 2**-9}[dtype]
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    assert relative_difference((mean, grads), desired) <= tolerance


@all_ways_of_microbatches
def test_an_empty_batch_is_zero(way, microbatches):
    batch = jax.tree.map(lambda x: x[:0].reshape(0, *x.shape[1:]), make_batch())
    if way is on_stacked:
        function = xentjax.pmap_data_parallel(
            plain_loss_fn, microbatches=microbatches, devices=jax.devices("cpu")
        )
        copies = jax.tree.map(lambda x: x[None], make_params())
        actual = function(copies, jax.tree.map(lambda x: x[None], batch))
    else:
        actual = way(plain_loss_fn, microbatches=microbatches)(make_params(), batch)
    assert all(not x.any() for x in jax.tree.leaves(actual))


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
def test_examples_that_devices_share_stay_where_they_are(axis_type):
    """On a mesh, jit itself spreads each microbatch: sums are all that crosses devices."""
    params, batch = {"kernel": make_params()["kernel"]}, make_batch()
    mesh = make_mesh((4,), ("data",), axis_type)

    def loss_fn(params, batch):
        # No bias: on explicit axes, plain JAX 0.10 gathers the logits for its gradient.
        losses = plain_losses(batch["inputs"] @ params["kernel"], batch["targets"])
        return xentjax.weighted_sum(losses, where=batch["where"])

    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, NamedSharding(mesh, P("data")))
        whole = jax.device_put(params, NamedSharding(mesh, P()))
        function = jax.jit(accumulate_gradients(loss_fn, microbatches=3))
        actual = function(whole, placed)
        crossing = collectives(function.lower(whole, placed).compile())
    desired = on_one_device(loss_fn, params, batch)
    assert relative_difference(actual, desired) <= NEAR
    assert {name for name, _ in crossing} == {"all-reduce"}


def test_it_goes_through_scan_and_vmap():
    params, batch = make_params(), make_batch()
    value_and_grad = accumulate_gradients(plain_loss_fn, microbatches=3)
    ensemble = jax.tree.map(lambda *x: jnp.stack(x), params, make_params(5))
    means, grads = jit(jax.vmap(value_and_grad, (0, None)))(ensemble, batch)
    for i, member in enumerate([params, make_params(5)]):
        actual = jax.tree.map(lambda x, i=i: x[i], (means, grads))
        assert relative_difference(actual, on_one_device(plain_loss_fn, member, batch)) <= NEAR

    def step(value_and_grad, params, batch):
        mean, grads = value_and_grad(params, batch)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), mean

    batches = jax.tree.map(lambda *x: jnp.stack(x), batch, make_batch(6))
    plain = functools.partial(on_one_device, plain_loss_fn)
    actual, desired = (
        jit(lambda p, b, f=f: jax.lax.scan(functools.partial(step, f), p, b))(params, batches)
        for f in (value_and_grad, plain)
    )
    assert relative_difference(actual, desired) <= 3 * NEAR


def test_a_second_call_traces_nothing():
    traces = []

    def traced(params, batch):
        traces.append(1)
        return plain_loss_fn(params, batch)

    value_and_grad = accumulate_gradients(traced, microbatches=3)
    value_and_grad(make_params(), make_batch())
    count = len(traces)
    value_and_grad(make_params(1), make_batch(2))
    assert 0 < len(traces) == count


def test_it_exports_for_a_batch_of_any_size():
    (b,) = export.symbolic_shape("b")
    batch = make_batch()
    spec = {k: jax.ShapeDtypeStruct((3 * b, *x.shape[1:]), x.dtype) for k, x in batch.items()}
    function = jax.jit(accumulate_gradients(plain_loss_fn, microbatches=3))
    exported = export.export(function, platforms=("cpu", "cuda", "tpu", "rocm"))(
        make_params(), spec
    )
    actual, desired = exported.call(make_params(), batch), function(make_params(), batch)
    assert relative_difference(actual, desired) <= NEAR


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": jnp.ones((EXAMPLES - 1, FEATURES))}, r"\['inputs'\].*got float32\[47, 5\]"),
        ({"weights": jnp.ones(())}, r"\['weights'\].*got float32\[\]"),
    ],
)
def test_a_batch_that_does_not_divide_is_an_error(change, message):
    wanted = r"batch.*expected a first axis that divides into 3 microbatches"
    with pytest.raises(ValueError, match=wanted) as raised:
        accumulate_gradients(plain_loss_fn, microbatches=3)(make_params(), make_batch() | change)
    assert raised.match(message)


@pytest.mark.parametrize("microbatches", [0, True, 2.0, None])
def test_microbatches_are_a_positive_int(microbatches):
    with pytest.raises(ValueError, match=rf"microbatches: expected .*, got {microbatches}"):
        accumulate_gradients(plain_loss_fn, microbatches=microbatches)


@all_ways
def test_a_loss_is_one_number(way):
    def two_sums(params, batch):
        parts = plain_loss_fn(params, batch)
        return jax.tree.map(lambda x: jnp.stack([x, x]), parts)

    with pytest.raises(ValueError, match=r"expected a WeightedSum of scalars, got float32\[2\]"):
        way(two_sums, microbatches=1)(make_params(), make_batch())
