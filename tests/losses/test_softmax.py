"""Softmax cross-entropy: exactness, limits, masks, axes, memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    INF,
    assert_exact,
    contract,
    exact_softmax_cross_entropy,
    jit,
    loss_and_gradient,
    mainly,
    plain_softmax_cross_entropy,
    relative_error,
    rows_with_margins,
    target_forms,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

import xentjax


@pytest.mark.parametrize("num_classes", mainly([2, 10, 300], 2, 300))
def test_exact_from_margin_minus_80_to_80(num_classes):
    assert_exact(*rows_with_margins(num_classes, np.linspace(-80, 80, 65)))


def test_exact_over_a_large_vocabulary():
    # The sum itself must not lose digits: 50257 terms in one float32 accumulator do.
    logits, labels = rows_with_margins(50257, np.array([-10.0, 0.0, 12.0]))
    losses, gradient = loss_and_gradient(logits, labels)
    z = logits.astype(np.float64)
    u = z - z.max(-1, keepdims=True)
    p = np.exp(u) / np.exp(u).sum(-1, keepdims=True)
    rows = np.arange(3)
    desired = -np.log(p[rows, labels])
    np.testing.assert_allclose(losses, desired, rtol=contract(logits))
    entries = p.copy()
    others = np.where(np.arange(50257) == labels[:, None], 0, p)
    entries[rows, labels] = -others.sum(-1)
    np.testing.assert_allclose(gradient, entries, rtol=contract(logits))


@pytest.mark.parametrize("form", target_forms(1, 2))
def test_every_target_form_is_exact(form):
    targets = target_forms(8, 6)[form]
    logits = np.random.default_rng(2).normal(size=(8, 6)).astype(np.float32) * 4
    logits[:4, 2] += 30  # Confident.
    masses = np.asarray(xentjax.dense_targets(targets, 6))
    losses, gradient = loss_and_gradient(logits, targets)
    for row, z in enumerate(logits):
        loss, entries = exact_softmax_cross_entropy(z, masses[row])
        bound = contract(z)
        assert relative_error(losses[row], [loss]) <= bound
        # T · p − t cancels where the two are near, by the problem's own condition.
        scale = masses[row].sum() * np.exp(z - z.max()) / np.exp(z - z.max()).sum() + masses[row]
        error = np.abs(np.asarray(gradient[row]) - np.array(entries, np.float64))
        assert np.all(error <= bound * scale)


@pytest.mark.parametrize("offset", [300.0, -1e5, 2.0**21, -(2.0**22), 2.0**28, 1e30, -3.4e38])
def test_exact_however_far_from_zero_all_logits_are(offset):
    logits, labels = rows_with_margins(10, np.array([-60.0, -5.0, 0.0, 20.0, 60.0]))
    logits = (logits + np.float32(offset)).astype(np.float32)
    logits[:, 7] = -np.finfo(np.float32).max  # As masks are often made.
    assert_exact(logits, labels)


def test_one_hot_is_exact_as_labels_are():
    logits, labels = rows_with_margins(5, np.array([15.0, 30.0, 60.0]))
    one_hot = jax.nn.one_hot(labels, 5)
    sparse = xentjax.mix_targets(labels, labels, 0.25)
    beside_nothing = xentjax.mix_targets((labels + 1) % 5, labels, 0.0)
    desired = loss_and_gradient(logits, labels)
    for targets in (one_hot, sparse, beside_nothing):
        for actual, exact in zip(loss_and_gradient(logits, targets), desired, strict=True):
            np.testing.assert_allclose(actual, exact, rtol=3e-7)


def test_the_naive_formula_cancels_where_ours_does_not():
    logits, label = jnp.array([20.0, 5.0]), jnp.array(0)
    assert jax.nn.logsumexp(logits) - logits[label] == 0
    loss, gradient = loss_and_gradient(logits, label)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-15.0)), rtol=3e-7)
    np.testing.assert_allclose(gradient, np.array([-1, 1]) / (1 + np.exp(15.0)), rtol=3e-7)


def test_a_targets_gradient_is_lse_minus_logit():
    logits = jnp.array([[1.0, 2.0, 4.0]])
    masses = jnp.array([[0.0, 0.5, 0.5]])
    gradient = jax.grad(lambda t: xentjax.softmax_cross_entropy(logits, t).sum())(masses)
    np.testing.assert_allclose(gradient, jax.nn.logsumexp(logits) - logits, rtol=1e-6)


@pytest.mark.parametrize(
    "case",
    mainly(
        itertools.product((jnp.bfloat16, jnp.float16), ("labels", "smoothed", "dense")),
        *[(jnp.bfloat16, "labels"), (jnp.float16, "smoothed"), (jnp.bfloat16, "dense")],
    ),
    ids=str,
)
def test_low_precision_is_as_good_as_its_inputs(case):
    dtype, form = case
    targets = target_forms(16, 50)[form]
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(16, 50)) * 5, dtype)
    losses, gradient = loss_and_gradient(logits, targets)
    assert losses.dtype == jnp.float32
    assert gradient.dtype == dtype
    exact_losses, exact_gradient = loss_and_gradient(logits.astype(jnp.float32), targets)
    np.testing.assert_array_equal(losses, exact_losses)  # Computed in float32 either way.
    np.testing.assert_array_equal(gradient, exact_gradient.astype(dtype))  # Rounded once.
    naive = plain_softmax_cross_entropy(logits, targets)
    assert jnp.max(jnp.abs(naive - exact_losses)) > jnp.max(jnp.abs(losses - exact_losses))


@pytest.mark.parametrize(
    ("logits", "targets", "loss", "gradient"),
    [
        ([-INF, 0, 0], 1, np.log(2), [0, -0.5, 0.5]),
        ([-INF, 0, 0], 0, INF, [-1, 0.5, 0.5]),
        ([-INF, 0, 0], [0.0, 0.5, 0.5], np.log(2), [0, 0, 0]),
        ([-INF, 0, -INF], [0.0, 1.0, 0.0], 0, [0, 0, 0]),
        ([-INF, 0, 0], [0.5, 0.5, 0.0], INF, [-0.5, 0, 0.5]),
        ([-INF, -INF, -INF], 1, INF, [0, -1, 0]),
        ([3.0], 0, 0, [0]),
        ([0, 0, 0], -1, np.nan, [np.nan] * 3),
        ([0, 0, 0], 3, np.nan, [np.nan] * 3),
        ([0, 0, 0], -100, np.nan, [np.nan] * 3),
        ([0, 0, 0], 2**31 - 1, np.nan, [np.nan] * 3),
        ([np.nan, 0, 0], 1, np.nan, [np.nan] * 3),
    ],
)
def test_limits(logits, targets, loss, gradient):
    logits = jnp.asarray([logits, logits], jnp.float32)
    targets = jnp.asarray([targets, targets])
    actual = loss_and_gradient(logits, targets)
    np.testing.assert_allclose(actual[0], [loss] * 2, rtol=1e-6)
    np.testing.assert_allclose(actual[1], [gradient] * 2, rtol=1e-6, atol=1e-7)
    actual = loss_and_gradient(logits, targets, where=jnp.array([False, False]))
    np.testing.assert_array_equal(actual[0], np.zeros(2))
    np.testing.assert_array_equal(actual[1], np.zeros_like(logits))


def test_a_label_out_of_range_spoils_its_own_row_only():
    losses, gradient = loss_and_gradient(np.zeros((3, 4), np.float32), np.array([0, 4, 1]))
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False])
    np.testing.assert_array_equal(np.isnan(gradient).all(-1), [False, True, False])
    np.testing.assert_array_equal(np.isnan(gradient).any(-1), [False, True, False])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint32, np.uint64])
def test_labels_of_every_width(dtype):
    logits = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    labels = np.array([5, 120], dtype)
    desired = xentjax.softmax_cross_entropy(logits, np.array([5, 120], np.int32))
    np.testing.assert_array_equal(xentjax.softmax_cross_entropy(logits, labels), desired)
    largest = np.full(2, np.iinfo(dtype).max)
    in_range = np.iinfo(dtype).max < 300
    assert np.all(np.isfinite(xentjax.softmax_cross_entropy(logits, largest)) == in_range)


def test_int64_labels_do_not_wrap_into_range():
    labels = np.array([2**32, 2**32 + 1])
    assert np.all(np.isnan(xentjax.softmax_cross_entropy(np.zeros((2, 3), np.float32), labels)))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_empty_batch(shape):
    logits = jnp.zeros(shape)
    losses, gradient = loss_and_gradient(logits, jnp.zeros(shape[:-1], jnp.int32))
    assert losses.shape == shape[:-1]
    assert gradient.shape == shape


def test_no_target_mass():
    empty = xentjax.SparseTargets(jnp.zeros((2, 0), jnp.int32), jnp.zeros((2, 0)))
    for array in loss_and_gradient(jnp.ones((2, 3)), empty):
        np.testing.assert_array_equal(array, jnp.zeros_like(array))


def test_class_mask_is_a_smaller_problem():
    rng = np.random.default_rng(4)
    logits, keep = rng.normal(size=(2, 6)).astype(np.float32), np.array([1, 0, 1, 1, 0, 1], bool)
    where = jnp.broadcast_to(jnp.asarray(keep), logits.shape)
    losses, gradient = loss_and_gradient(logits, jnp.array([2, 5]), where=where)
    small_losses, small_gradient = loss_and_gradient(logits[:, keep], jnp.array([1, 3]))
    np.testing.assert_allclose(losses, small_losses, rtol=3e-7)
    np.testing.assert_allclose(gradient[:, keep], small_gradient, rtol=3e-7)
    np.testing.assert_array_equal(gradient[:, ~keep], 0)
    on_masked = xentjax.softmax_cross_entropy(logits, jnp.array([1, 5]), where=where)
    assert np.isposinf(on_masked[0])
    assert np.isfinite(on_masked[1])


@pytest.mark.parametrize("axis", mainly([0, 1, -1, (1, 3), (3, 2), (-1, -2), (0, 1, 3)], 0, (3, 2)))
@pytest.mark.parametrize("kind", ["labels", "dense"])
def test_axes_agree_with_optax(axis, kind):
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    axes = (axis,) if isinstance(axis, int) else axis
    axes = tuple(a % 4 for a in axes)
    batch = [n for a, n in enumerate(logits.shape) if a not in axes]
    where = rng.random(logits.shape) < 0.9
    if kind == "labels":
        targets = rng.integers(0, np.prod([logits.shape[a] for a in axes]), batch)
        desired = optax.softmax_cross_entropy_with_integer_labels(logits, targets, axis)
    else:
        targets = rng.random(logits.shape).astype(np.float32)
        desired = optax.softmax_cross_entropy(logits, targets, axis)
        targets = np.where(where, targets, 0)
        masked = xentjax.softmax_cross_entropy(logits, targets, axis=axis, where=where)
        safe = optax.softmax_cross_entropy(logits, targets, axis, jnp.asarray(where))
        np.testing.assert_allclose(masked, safe, rtol=3e-6)
        targets = rng.random(logits.shape).astype(np.float32)
        desired = optax.softmax_cross_entropy(logits, targets, axis)
    actual, gradient = loss_and_gradient(logits, targets, axis=axis)
    np.testing.assert_allclose(actual, desired, rtol=3e-6)
    assert gradient.shape == logits.shape
    np.testing.assert_allclose(gradient.sum(axes), 0, atol=2e-5)


def test_stats():
    logits = jnp.array([[1.0, 3.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    labels = jnp.array([1, 2, 2])
    losses, stats = xentjax.softmax_cross_entropy_with_stats(logits, labels)
    np.testing.assert_array_equal(losses, xentjax.softmax_cross_entropy(logits, labels))
    np.testing.assert_allclose(stats.log_normalizer, jax.nn.logsumexp(logits, -1), rtol=1e-6)
    np.testing.assert_array_equal(stats.prediction, [1, 0, 2])
    np.testing.assert_array_equal(stats.correct, [True, False, True])
    p = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(stats.entropy, -(p * np.log(p)).sum(-1), rtol=1e-5)
    of_labels = np.log(p[np.arange(3), labels])
    np.testing.assert_allclose(stats.label_log_probability, of_labels, rtol=1e-5)
    _, stats = xentjax.softmax_cross_entropy_with_stats(logits, jnp.array([1, -1, 3]))
    wanted = [of_labels[0], np.nan, np.nan]
    np.testing.assert_allclose(stats.label_log_probability, wanted, rtol=1e-5)


@pytest.mark.parametrize("form", target_forms(1, 2))
def test_correct_is_the_heaviest_target(form):
    targets = target_forms(40, 5)[form]
    logits = jnp.asarray(np.random.default_rng(6).normal(size=(40, 5)), jnp.float32)
    _, stats = jit(xentjax.softmax_cross_entropy_with_stats)(logits, targets)
    masses = np.asarray(xentjax.dense_targets(targets, 5))
    heaviest = masses.argmax(-1)
    np.testing.assert_array_equal(stats.correct, logits.argmax(-1) == heaviest)


def test_stats_of_masked_examples_are_zero():
    where = jnp.array([True, False])
    logits = jnp.array([[2.0, 1.0], [np.nan, 1.0]])
    _, stats = xentjax.softmax_cross_entropy_with_stats(logits, jnp.array([0, 1]), where=where)
    assert stats.log_normalizer[1] == stats.entropy[1] == 0
    np.testing.assert_array_equal(stats.correct, [True, False])


@pytest.mark.parametrize("form", target_forms(1, 2))
def test_residuals_hold_no_more_than_the_logits(form):
    batch, num_classes = 8, 4096
    targets = target_forms(batch, num_classes)[form]
    logits = jnp.ones((batch, num_classes))
    loss = functools.partial(xentjax.softmax_cross_entropy, targets=targets)
    pullback = jax.vjp(loss, logits)[1]
    given = sum(leaf.size for leaf in jax.tree.leaves(targets))
    kept = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    assert kept <= logits.size + given + 16 * batch


# Of N · V numbers: two chunks of rows, or as many more as a stack of backgrounds takes.
TEMPORARIES = {
    "labels": 0.01,
    "smoothed": 0.01,
    "mixed": 0.01,
    "weighted": 0.03,
    "two backgrounds": 0.03,
}


@pytest.mark.parametrize("form", TEMPORARIES)
@pytest.mark.parametrize("dtype", mainly([jnp.float32, jnp.bfloat16], jnp.float32))
def test_no_one_hot_in_compiled_memory(form, dtype):
    batch, num_classes = 2048, 50257
    targets = target_forms(batch, num_classes)[form]

    def loss(z, t):
        return xentjax.weighted_mean(xentjax.softmax_cross_entropy(z, t))

    logits = jax.ShapeDtypeStruct((batch, num_classes), dtype)
    step = jax.jit(jax.value_and_grad(loss)).lower(logits, targets)
    memory = step.compile().memory_analysis()
    assert memory.output_size_in_bytes >= logits.size * dtype.dtype.itemsize  # The gradient.
    assert memory.temp_size_in_bytes <= TEMPORARIES[form] * logits.size * 4  # A one-hot is 1.0.


@pytest.mark.parametrize("with_prior", [False, True])
def test_memory_grows_with_the_classes_of_a_sparse_target_and_not_with_their_square(with_prior):
    batch, num_classes = 512, 20000

    def temporaries(k):
        def loss(z, indices, weights, mass):
            prior = jnp.full(num_classes, 1 / num_classes) if with_prior else None
            targets = xentjax.SparseTargets(indices, weights, mass, prior, classes)
            return xentjax.softmax_cross_entropy(z, targets).mean()

        classes = num_classes if with_prior else None
        shapes = [((batch, num_classes), jnp.float32), ((batch, k), jnp.int32)]
        shapes += [((batch, k), jnp.float32), ((batch,), jnp.float32)]
        args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        compiled = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(64), temporaries(512)
    # A point is an index and a weight, and the two rows and columns of a scatter's indices.
    assert many - few <= (512 - 64) * batch * 4 * 12


# A NaN logit.


NAN_CASES = [(shape, form) for shape in ((600, 1000), (4, 4093)) for form in target_forms(1, 2)]


@pytest.mark.parametrize(
    "case",
    mainly(NAN_CASES, ((600, 1000), "labels"), ((600, 1000), "dense"), ((4, 4093), "teacher")),
    ids=str,
)
def test_a_row_with_a_nan_is_nan_and_others_are_untouched(case):
    (batch, num_classes), form = case
    # XLA's maximum of a fused float32 reduction loses NaN (jaxlib 0.10.2), wherever it stands.
    targets = target_forms(batch, num_classes)[form]
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(batch, num_classes)), jnp.float32)
    bad = logits.at[0, 100].set(jnp.nan).at[batch - 1, num_classes - 1].set(jnp.nan)
    rows = np.isin(np.arange(batch), [0, batch - 1])

    @jax.jit
    def every_number(z):
        losses, stats = xentjax.softmax_cross_entropy_with_stats(z, targets)
        value = xentjax.softmax_cross_entropy(z, targets)
        return (
            (losses, stats.log_normalizer, stats.entropy, value),
            jax.grad(lambda z: xentjax.softmax_cross_entropy(z, targets).sum())(z),
        )

    clean, spoilt = every_number(logits), every_number(bad)
    for before, after in zip(jax.tree.leaves(clean), jax.tree.leaves(spoilt), strict=True):
        assert np.isnan(after[rows]).all()
        np.testing.assert_array_equal(after[~rows], before[~rows])
    alone = jax.jit(lambda z: xentjax.softmax_cross_entropy(z, targets))  # No gradient beside it.
    np.testing.assert_array_equal(np.isnan(alone(bad)), rows)


@pytest.mark.parametrize("dtype", mainly([jnp.bfloat16, jnp.float16], jnp.bfloat16))
@pytest.mark.parametrize("form", mainly(["labels", "dense", "teacher"], "labels", "teacher"))
def test_a_nan_of_low_precision_is_a_nan(dtype, form):
    targets = target_forms(600, 1000)[form]
    logits = jnp.zeros((600, 1000), dtype).at[3, 5].set(jnp.nan)
    rows = np.arange(600) == 3
    losses, gradient = loss_and_gradient(logits, targets)
    np.testing.assert_array_equal(np.isnan(losses), rows)
    np.testing.assert_array_equal(np.isnan(gradient).all(-1), rows)
    np.testing.assert_array_equal(np.isnan(gradient).any(-1), rows)
    alone = jax.jit(lambda z: xentjax.softmax_cross_entropy(z, targets))
    np.testing.assert_array_equal(np.isnan(alone(logits)), rows)


@pytest.mark.parametrize("form", mainly(["labels", "dense", "teacher"], "teacher"))
def test_a_nan_on_eight_devices(form):
    batch, num_classes = 64, 256
    targets = target_forms(batch, num_classes)[form]
    logits = jnp.zeros((batch, num_classes), jnp.float32).at[9, 200].set(jnp.nan)
    rows = np.arange(batch) == 9
    for spec in P("data"), P(None, "data"):
        place = NamedSharding(make_mesh((8,), ("data",)), spec)
        split = jax.device_put(logits, place)
        alone = jax.jit(lambda z: xentjax.softmax_cross_entropy(z, targets))
        np.testing.assert_array_equal(np.isnan(alone(split)), rows)
        losses, gradient = loss_and_gradient(split, targets)
        np.testing.assert_array_equal(np.isnan(losses), rows)
        np.testing.assert_array_equal(np.isnan(gradient).all(-1), rows)
        np.testing.assert_array_equal(np.isnan(gradient).any(-1), rows)


# Derivatives where another path begins.


LARGE = [(n, form) for n in (1, 40) for form in ("labels", "dense", "smoothed", "prior")]


@pytest.mark.parametrize("case", mainly(LARGE, (1, "dense"), (40, "smoothed")), ids=str)
def test_second_derivatives_of_large_arrays(case):
    """Along one direction, at a class that is likelier than all others."""
    shape, form = (case[0], 2**14), case[1]
    with jax.enable_x64(True):
        targets = target_forms(*shape)[form]
        z = jnp.zeros(shape).at[:, 7].set(np.log(4 * (shape[-1] - 1.0)))  # p = 0.8.
        direction = jnp.zeros(shape).at[:, 7].set(1.0).at[:, 8].set(0.5)
        dense = xentjax.dense_targets(targets, shape[-1])

        def loss(x):
            return xentjax.softmax_cross_entropy(z + x * direction, targets).sum()

        def pushed(f):
            return lambda x: jax.jvp(f, (x,), (1.0,))[1]

        def twice(x):
            modes = pushed(pushed(loss)), jax.grad(pushed(loss)), pushed(jax.grad(loss))
            return [mode(x) for mode in (*modes, jax.grad(jax.grad(loss)))]

        actual = jax.jit(twice)(0.0)
    p = np.where(np.arange(shape[-1]) == 7, 0.8, 0.2 / (shape[-1] - 1))
    d = np.where(np.arange(shape[-1]) == 7, 1.0, np.where(np.arange(shape[-1]) == 8, 0.5, 0))
    variance = (p * d**2).sum() - (p * d).sum() ** 2
    np.testing.assert_allclose(actual, [variance * np.asarray(dense).sum()] * 4, rtol=1e-9)


def test_a_masked_nan_row_has_second_derivatives():
    logits = jnp.array([[jnp.nan, 1.0, 2.0], [0.0, 1.0, -1.0]])
    keep = jnp.array([False, True])
    sparse = xentjax.SparseTargets(
        jnp.array([[0], [2]]), jnp.array([[jnp.nan], [1.0]]), jnp.array([jnp.nan, 0.5])
    )

    def loss(z):
        of_labels = xentjax.softmax_cross_entropy(z, jnp.array([0, 2]), where=keep)
        return (of_labels + xentjax.softmax_cross_entropy(z, sparse, where=keep)).sum()

    second = jit(jax.jacrev(jax.jacrev(loss)))(logits)
    assert np.isfinite(second).all()
    p = np.asarray(jax.nn.softmax(logits[1]))
    want = (1 + 1.5) * (np.diag(p) - np.outer(p, p))
    np.testing.assert_allclose(second[1, :, 1], want, rtol=1e-5, atol=1e-7)


# Masks of classes.


@pytest.mark.parametrize("form", mainly(target_forms(1, 2), "labels", "dense", "two backgrounds"))
def test_an_example_without_a_class_is_masked_out(form):
    targets = target_forms(4, 5)[form]
    where = jnp.ones((4, 5), bool).at[1].set(False)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)

    def total(z):
        losses, stats = xentjax.softmax_cross_entropy_with_stats(z, targets, where=where)
        return (losses + stats.log_normalizer + stats.entropy).sum(), (losses, stats)

    (_, (losses, stats)), gradient = jit(jax.value_and_grad(total, has_aux=True))(logits)
    for x in (losses, stats.log_normalizer, stats.entropy, gradient, stats.correct):
        assert not np.asarray(x)[1].any()
        assert np.isfinite(x).all()
    labels = jnp.array([0, 1, 2, 3])
    where = where.at[2, 2].set(False)
    losses = xentjax.softmax_cross_entropy(logits, labels, where=where)
    np.testing.assert_array_equal(np.isposinf(losses), [False, False, True, False])
