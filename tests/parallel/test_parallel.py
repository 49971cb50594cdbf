"""One device and many: the same mean and gradient, whatever the masks."""

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
from xentjax import data_parallel


def with_learned_weights(params, batch):
    logits = logits_of(params, batch)
    losses, weights = plain_losses(logits, batch["targets"]), jax.nn.sigmoid(logits[:, 0])
    return xentjax.weighted_sum(losses, where=batch["where"], weights=weights)


MESHES = [
    (1, AUTO, 1),
    (2, AUTO, 1),
    (4, AUTO, 1),
    (8, AUTO, 1),
    (1, EXPLICIT, 3),
    (2, AUTO, 3),
    (4, EXPLICIT, 1),
    (8, EXPLICIT, 3),
]


@pytest.mark.parametrize("case", mainly(MESHES, (1, AUTO, 1), (8, EXPLICIT, 3)), ids=str)
def test_many_devices_are_one(case):
    devices, axis_type, microbatches = case
    params, batch = make_params(), make_batch()
    mesh = make_mesh((devices,), ("data",), axis_type)
    value_and_grad = data_parallel(loss_fn, mesh, microbatches=microbatches)
    desired = on_one_device(loss_fn, params, batch)
    assert relative_difference(value_and_grad(params, batch), desired) <= NEAR
    placed = jax.device_put(batch, NamedSharding(mesh, P("data")))
    assert relative_difference(value_and_grad(params, placed), desired) <= NEAR


def test_the_mean_of_means_is_another_number():
    # The masks of this batch tell the two apart; with others the tests above could not fail.
    params, batch = make_params(), make_batch()
    shards = [jax.tree.map(lambda x, i=i: x[i * 24 : (i + 1) * 24], batch) for i in range(2)]
    mean_of_means = np.mean([on_one_device(loss_fn, params, shard)[0] for shard in shards])
    assert abs(mean_of_means - on_one_device(loss_fn, params, batch)[0]) > 0.01


@pytest.mark.parametrize("microbatches", mainly([1, 3], 3))
def test_losses_and_weights_are_as_good_as_their_sum(microbatches):
    params, batch = make_params(), make_batch()
    mesh = make_mesh((4,), ("data",))
    actual = data_parallel(losses_and_weights, mesh, microbatches=microbatches)(params, batch)
    assert relative_difference(actual, on_one_device(loss_fn, params, batch)) <= NEAR


@pytest.mark.parametrize("microbatches", mainly([1, 3], 3))
def test_weights_may_be_learned(microbatches):
    params, batch = make_params(), make_batch()
    loss_fn = with_learned_weights
    mesh = make_mesh((4,), ("data",))
    actual = data_parallel(loss_fn, mesh, microbatches=microbatches)(params, batch)
    desired = on_one_device(loss_fn, params, batch)
    assert relative_difference(actual, desired) <= NEAR
    constant = jax.grad(
        lambda p: loss_fn(p, batch).total / jax.lax.stop_gradient(loss_fn(p, batch).weight)
    )(params)
    assert relative_difference(constant, desired[1]) > 0.01


@pytest.mark.parametrize("microbatches", mainly([1, 3], 3))
def test_all_masked_is_zero(microbatches):
    batch = make_batch() | {"where": jnp.zeros(EXAMPLES, bool)}
    mesh = make_mesh((4,), ("data",))
    mean, grads = data_parallel(plain_loss_fn, mesh, microbatches=microbatches)(
        make_params(), batch
    )
    assert mean == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("form", mainly(["dense", "prior", "two backgrounds"], "two backgrounds"))
def test_targets_of_every_shape_are_split_by_example(form):
    params, batch = (
        make_params(),
        make_batch() | {"targets": target_forms(EXAMPLES, CLASSES)[form]},
    )
    mesh = make_mesh((4,), ("data",))
    actual = data_parallel(loss_fn, mesh, microbatches=2)(params, batch)
    assert relative_difference(actual, on_one_device(loss_fn, params, batch)) <= NEAR


def test_a_loss_summed_over_two_axes():
    rng = np.random.default_rng(2)
    inputs = jnp.asarray(rng.normal(size=(8, 6, FEATURES)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, CLASSES, (8, 6)))
    batch = {"inputs": inputs, "targets": labels, "where": jnp.asarray(rng.random((8, 6)) < 0.5)}
    batch["weights"] = jnp.ones((8, 6))
    axes, mesh = ("data", "sequence"), make_mesh((4, 2), ("data", "sequence"))
    value_and_grad = data_parallel(
        plain_loss_fn,
        mesh,
        axis_name=axes,
        microbatches=2,
        in_specs=(P(), P("data", "sequence")),
    )
    desired = on_one_device(plain_loss_fn, make_params(), batch)
    assert relative_difference(value_and_grad(make_params(), batch), desired) <= NEAR


def test_params_split_over_the_data_axis_are_gathered_by_the_loss():
    def gathering(params, batch):
        kernel = jax.lax.all_gather(params["kernel"], "data", axis=1, tiled=True)
        return plain_loss_fn(params | {"kernel": kernel[:, :CLASSES]}, batch)

    params, batch = make_params(), make_batch()
    params["kernel"] = jnp.pad(params["kernel"], ((0, 0), (0, 1)))
    desired = on_one_device(
        lambda p, b: plain_loss_fn(p | {"kernel": p["kernel"][:, :CLASSES]}, b), params, batch
    )
    specs = ({"kernel": P(None, "data"), "bias": P()}, P("data"))
    for microbatches in (1, 3):
        value_and_grad = data_parallel(
            gathering, make_mesh((4,), ("data",)), microbatches=microbatches, in_specs=specs
        )
        actual = value_and_grad(params, batch)
        assert actual[1]["kernel"].sharding.spec == P(None, "data")
        assert relative_difference(actual, desired) <= NEAR


def test_low_precision_gradients_are_summed_in_float32():
    # Each summand is 2⁻¹²: added one by one in bfloat16, they would stop at 2⁻⁴.
    params = {"scale": jnp.ones((), jnp.bfloat16)}
    mesh = make_mesh((8,), ("data",))
    value_and_grad = data_parallel(
        lambda p, x: xentjax.weighted_sum(p["scale"] * x), mesh, microbatches=512
    )
    _, grads = value_and_grad(params, jnp.ones(4096))
    assert grads["scale"].dtype == jnp.bfloat16
    assert grads["scale"] == 1


@pytest.mark.parametrize("microbatches", mainly([1, 3], 3))
def test_a_train_step_is_one_jitted_function(microbatches):
    optimizer = optax.adam(0.1)

    def train(value_and_grad):
        @jit
        def step(state, batch):
            params, opt_state = state
            loss, grads = value_and_grad(params, batch)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), loss

        state, losses = (make_params(), optimizer.init(make_params())), []
        for _ in range(5):
            state, loss = step(state, make_batch())
            losses.append(loss)
        return jnp.stack(losses), state[0]

    many = train(
        data_parallel(plain_loss_fn, make_mesh((8,), ("data",)), microbatches=microbatches)
    )
    one = train(lambda params, batch: on_one_device(plain_loss_fn, params, batch))
    # Adam divides by the root of the squared gradient: it amplifies the last ulp a little.
    assert relative_difference(many, one) <= 1e-5
    assert one[0][-1] < 0.7 * one[0][0]


@pytest.mark.parametrize("microbatches", mainly([1, 3], 3))
def test_only_sums_cross_devices(microbatches):
    value_and_grad = data_parallel(loss_fn, make_mesh((4,), ("data",)), microbatches=microbatches)
    crossing = collectives(jax.jit(value_and_grad).lower(make_params(), make_batch()).compile())
    # The two scalars, in one reduction or two, and the gradient in one.
    assert {name for name, _ in crossing} == {"all-reduce"}
    assert 2 <= len(crossing) <= 3
    assert len([shape for _, shape in crossing if f"{FEATURES},{CLASSES}" in shape]) == 1


def test_microbatches_cost_no_second_forward_pass():
    def exponentials(loss_fn, microbatches):
        value_and_grad = data_parallel(
            loss_fn, make_mesh((1,), ("data",)), microbatches=microbatches
        )
        compiled = jax.jit(value_and_grad).lower(make_params(), make_batch()).compile()
        return compiled.cost_analysis()["transcendentals"]

    # The compiler counts the body of a loop once.
    assert exponentials(plain_loss_fn, 3) <= exponentials(plain_loss_fn, 1) / 3
    learned = with_learned_weights
    assert exponentials(learned, 3) > exponentials(learned, 1) / 3


def test_it_exports():
    exported = export.export(
        jax.jit(data_parallel(loss_fn, make_mesh((4,), ("data",)), microbatches=2)),
        platforms=["cpu", "cuda", "tpu", "rocm"],
    )(make_params(), make_batch())
    assert exported.platforms == ("cpu", "cuda", "tpu", "rocm")
    assert exported.nr_devices == 4


@pytest.mark.parametrize(
    ("kwargs", "batch", "error", "message"),
    [
        ({}, {"inputs": jnp.ones((6, 5))}, ValueError, r"batch\['inputs'\].*4 devices.*6, 5"),
        (
            {"microbatches": 5},
            {},
            ValueError,
            r"batch\['inputs'\]: expected .* 5 microbatches, got float32\[12, 5\]",
        ),
        ({"microbatches": 0}, {}, ValueError, "microbatches: expected a positive int, got 0"),
        ({"axis_name": "model"}, {}, ValueError, r"axis_name.*\('data',\), got 'model'"),
        (
            {"in_specs": (P(None, "data"), P("data"))},
            {},
            ValueError,
            r"params\['bias'\]: expected axis 1",
        ),
    ],
)
def test_errors_name_the_argument(kwargs, batch, error, message):
    with pytest.raises(error, match=message):
        data_parallel(loss_fn, make_mesh((4,), ("data",)), **kwargs)(
            make_params(), make_batch() | batch
        )


def test_a_loss_fn_of_another_kind_is_an_error():
    mesh = make_mesh((4,), ("data",))
    with pytest.raises(TypeError, match="loss_fn: expected a WeightedSum or a pair"):
        data_parallel(lambda p, b: loss_fn(p, b).mean(), mesh)(make_params(), make_batch())
