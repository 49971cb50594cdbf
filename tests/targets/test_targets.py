"""The algebra of targets: every form under every operation, in any order, against NumPy."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import mainly, target_forms
from hypothesis import given, settings
from hypothesis import strategies as st

import xentjax
from xentjax import SparseTargets
from xentjax._targets import types as _targets

BATCH, CLASSES = 5, 6
RNG = np.random.default_rng(0)
PRIOR = RNG.dirichlet(np.ones(CLASSES)).astype(np.float32)
OTHER_PRIOR = RNG.dirichlet(np.ones(CLASSES)).astype(np.float32)
CLASS_WEIGHTS = RNG.uniform(0.5, 2, CLASSES).astype(np.float32)
LAM = RNG.random(BATCH).astype(np.float32)
LABELS = RNG.integers(0, CLASSES, BATCH)
TEACHER = RNG.dirichlet(np.ones(CLASSES), BATCH).astype(np.float32)
FORMS = list(target_forms(BATCH, CLASSES))

# Masses are O(1), and made by a product and a sum of ten or so.
ATOL = 16 * float(np.finfo(np.float32).eps)
assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=ATOL)


def form(name):
    return target_forms(BATCH, CLASSES)[name]


def written_out(targets, num_classes=CLASSES):
    """Σ_k weights_k · onehot(indices_k) + background_mass · background, loop by loop."""
    if not isinstance(targets, SparseTargets):
        targets = np.asarray(targets)
        return targets.astype(float) if targets.dtype.kind == "f" else np.eye(num_classes)[targets]
    indices, weights = np.asarray(targets.indices), np.asarray(targets.weights, float)
    out = np.zeros((*indices.shape[:-1], num_classes))
    for i in np.ndindex(indices.shape):
        out[(*i[:-1], indices[i])] += weights[i]
    if targets.background_mass is not None:
        mass = np.asarray(targets.background_mass, float)
        if targets.background is None:
            out += mass[..., None] / num_classes
        else:
            assert targets.background.shape[:-2] == (1,) * (indices.ndim - 1)
            out += mass @ np.asarray(targets.background, float).reshape(-1, num_classes)
    return out


# The library's operation, and the same on masses that are written out.
OPERATIONS = {
    "smooth": (
        lambda t: xentjax.smooth_labels(t, 0.1),
        lambda m: 0.9 * m + 0.1 / CLASSES,
    ),
    "smooth to a prior": (
        lambda t: xentjax.smooth_labels(t, 0.3, background=PRIOR),
        lambda m: 0.7 * m + 0.3 * PRIOR,
    ),
    "reweight": (
        lambda t: xentjax.reweight_targets(t, CLASS_WEIGHTS),
        lambda m: CLASS_WEIGHTS * m,
    ),
    "mix with labels": (
        lambda t: xentjax.mix_targets(t, LABELS, 0.25),
        lambda m: 0.25 * m + 0.75 * np.eye(CLASSES)[LABELS],
    ),
    "mix into smoothed labels, each by its own share": (
        lambda t: xentjax.mix_targets(xentjax.smooth_labels(LABELS, 0.2), t, LAM),
        lambda m: (
            LAM[:, None] * (0.8 * np.eye(CLASSES)[LABELS] + 0.2 / CLASSES) + (1 - LAM[:, None]) * m
        ),
    ),
    "mix with smoothed to another prior": (
        lambda t: xentjax.mix_targets(
            t, xentjax.smooth_labels(LABELS, 0.5, background=OTHER_PRIOR), LAM
        ),
        lambda m: (
            LAM[:, None] * m
            + (1 - LAM[:, None]) * (0.5 * np.eye(CLASSES)[LABELS] + 0.5 * OTHER_PRIOR)
        ),
    ),
    "mix with a dense teacher": (
        lambda t: xentjax.mix_targets(t, TEACHER, 0.4),
        lambda m: 0.4 * m + 0.6 * TEACHER,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_dense_targets_writes_every_form_out(name):
    targets = form(name)
    dense = xentjax.dense_targets(targets, CLASSES)
    assert dense.shape == (BATCH, CLASSES)
    assert_close(dense, written_out(targets))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", FORMS)
def test_operation_on_any_form_is_the_operation_on_masses(name, operation):
    ours, on_masses = OPERATIONS[operation]
    targets = form(name)
    got, want = ours(targets), on_masses(written_out(targets))
    assert_close(xentjax.dense_targets(got, CLASSES), want)
    assert_close(written_out(got), want)
    # Dense targets stay dense, and take the same road in the other order.
    of_dense = ours(xentjax.dense_targets(targets, CLASSES))
    assert isinstance(of_dense, jax.Array)
    assert_close(of_dense, want)
    sparse = name != "dense" and operation != "mix with a dense teacher"
    assert isinstance(got, SparseTargets) == sparse


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.sampled_from(FORMS), st.lists(st.sampled_from(list(OPERATIONS)), max_size=4))
def test_operations_nest_in_any_order(name, operations):
    targets = form(name)
    masses = written_out(targets)
    for operation in operations:
        ours, on_masses = OPERATIONS[operation]
        targets, masses = ours(targets), on_masses(masses)
    got = xentjax.dense_targets(targets, CLASSES)
    np.testing.assert_allclose(got, masses, rtol=0, atol=4 * ATOL)


@pytest.mark.parametrize("name", FORMS)
def test_losses_see_the_masses(name):
    """Re-weighted, mixed and smoothed, against −Σ t log softmax(z) in float64."""
    targets, masses = form(name), written_out(form(name))
    for operation in ("smooth to a prior", "mix with labels", "reweight"):
        ours, on_masses = OPERATIONS[operation]
        targets, masses = ours(targets), on_masses(masses)
    logits = 3 * RNG.standard_normal((BATCH, CLASSES)).astype(np.float32)
    exponentials = np.exp(logits.astype(float))
    p = exponentials / exponentials.sum(-1, keepdims=True)
    losses, pullback = jax.vjp(lambda z: xentjax.softmax_cross_entropy(z, targets), logits)
    np.testing.assert_allclose(losses, -(masses * np.log(p)).sum(-1), rtol=2e-6)
    want = masses.sum(-1, keepdims=True) * p - masses
    np.testing.assert_allclose(pullback(jnp.ones_like(losses))[0], want, rtol=0, atol=2e-6)


# Laws.


def same(a, b):
    dense = [xentjax.dense_targets(t, CLASSES) for t in (a, b)]
    assert_close(dense[0], dense[1])


smooth, mix, reweight = xentjax.smooth_labels, xentjax.mix_targets, xentjax.reweight_targets


@pytest.mark.parametrize("lam", [0.3, LAM], ids=["shared", "each"])
@pytest.mark.parametrize("background", [None, PRIOR], ids=["uniform", "prior"])
@pytest.mark.parametrize("name", ["labels", "dense", "teacher"])
def test_mixing_smoothed_is_smoothing_mixed(name, background, lam):
    a, b = form(name), LABELS
    smoothed = functools.partial(smooth, alpha=0.1, background=background)
    same(mix(smoothed(a), smoothed(b), lam), smoothed(mix(a, b, lam)))


@pytest.mark.parametrize("name", FORMS)
def test_laws(name):
    t, other = form(name), smooth(LABELS, 0.2, background=OTHER_PRIOR)
    same(smooth(t, 0.0), t)
    same(smooth(t, 1.0, background=PRIOR), np.tile(PRIOR, (BATCH, 1)))
    same(smooth(smooth(t, 0.2), 0.5), smooth(t, 0.6))
    same(mix(t, other, 1.0), t)
    same(mix(t, other, 0.0), other)
    same(mix(t, t, LAM), t)
    same(mix(t, other, LAM), mix(other, t, 1 - LAM))
    same(mix(mix(t, other, 0.5), LABELS, 0.8), mix(t, mix(other, LABELS, 2 / 3), 0.4))
    same(reweight(t, np.ones(CLASSES, np.float32)), t)
    same(reweight(reweight(t, CLASS_WEIGHTS), PRIOR), reweight(t, CLASS_WEIGHTS * PRIOR))
    weighted = functools.partial(reweight, class_weights=CLASS_WEIGHTS)
    same(weighted(mix(t, other, LAM)), mix(weighted(t), weighted(other), LAM))


def test_agrees_with_optax():
    onehot = jnp.eye(CLASSES)[LABELS]
    for alpha in (0.0, 0.1, 0.7):
        want = optax.smooth_labels(onehot, alpha)
        same(smooth(onehot, alpha), want)
        assert_close(xentjax.dense_targets(smooth(LABELS, alpha), CLASSES), want)


def sparse(targets):
    assert isinstance(targets, SparseTargets)
    return targets


def test_size_grows_no_more_than_it_must():
    """K adds up in a mix; backgrounds are stacked only where they differ."""

    def shapes(targets):
        return [np.shape(x) for x in jax.tree.leaves(sparse(targets))]

    a, b = smooth(LABELS, 0.1), smooth(LABELS, 0.1, background=PRIOR)
    of_one = [(BATCH, 1), (BATCH, 1), (BATCH,)]
    assert shapes(a) == of_one
    assert shapes(smooth(smooth(a, 0.2), 0.3)) == of_one
    assert shapes(b) == [(BATCH, 1), (BATCH, 1), (BATCH, 1), (1, 1, CLASSES)]
    assert shapes(smooth(mix(a, a, 0.5), 0.3)) == [(BATCH, 2), (BATCH, 2), (BATCH,)]
    two = mix(a, b, LAM)
    assert shapes(two) == [(BATCH, 2), (BATCH, 2), (BATCH, 2), (1, 2, CLASSES)]
    three = mix(two, smooth(LABELS, 0.1, background=OTHER_PRIOR), 0.5)
    assert shapes(three) == [(BATCH, 3), (BATCH, 3), (BATCH, 3), (1, 3, CLASSES)]
    assert shapes(mix(b, b[::-1], LAM)) == [(BATCH, 2), (BATCH, 2), (BATCH, 1), (1, 1, CLASSES)]


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_any_batch_shape(batch):
    rng = np.random.default_rng(1)
    labels, others = rng.integers(0, CLASSES, (2, *batch))
    lam = rng.random(batch).astype(np.float32)
    got = smooth(mix(labels, others, lam), 0.1, background=PRIOR)
    eye = np.eye(CLASSES)
    want = lam[..., None] * eye[labels] + (1 - lam[..., None]) * eye[others]
    dense = xentjax.dense_targets(got, CLASSES)
    assert_close(dense, 0.9 * want + 0.1 * PRIOR)
    logits = rng.standard_normal((*batch, CLASSES)).astype(np.float32)
    assert xentjax.softmax_cross_entropy(logits, got).shape == batch


def test_background_alone():
    """K = 0: no class of its own."""
    nothing = np.zeros((BATCH, 0))
    targets = SparseTargets(
        jnp.asarray(nothing, jnp.int32), jnp.asarray(nothing, jnp.float32), jnp.asarray(LAM)
    )
    want = np.repeat(LAM[:, None] / CLASSES, CLASSES, axis=1)
    assert_close(xentjax.dense_targets(targets, CLASSES), want)
    same(mix(targets, LABELS, 0.5), 0.5 * want.astype(np.float32) + 0.5 * np.eye(CLASSES)[LABELS])
    same(reweight(targets, CLASS_WEIGHTS), want.astype(np.float32) * CLASS_WEIGHTS)


# As pytrees.


def masses(targets):
    return np.asarray(xentjax.dense_targets(targets, CLASSES))


@pytest.mark.parametrize("name", FORMS)
def test_through_jit(name):
    def composed(targets, alpha, lam, class_weights):
        targets = smooth(mix(targets, LABELS, lam), alpha, background=PRIOR)
        return reweight(targets, class_weights)

    args = form(name), 0.1, LAM, CLASS_WEIGHTS
    same(jax.jit(composed)(*args), composed(*args))
    leaves, treedef = jax.tree.flatten(args[0])
    same(jax.tree.unflatten(treedef, leaves), args[0])


@pytest.mark.parametrize("name", FORMS)
def test_through_vmap(name):
    """Each example on its own; a background belongs to all of them."""
    targets = form(name)
    axes = jax.tree.map(lambda _: 0, targets)
    if isinstance(axes, SparseTargets):
        axes = dataclasses.replace(axes, background=None)

    def of_one(targets):
        return xentjax.dense_targets(smooth(mix(targets, 2, 0.5), 0.1), CLASSES)

    got = jax.vmap(of_one, in_axes=(axes,))(targets)
    twos = np.full(BATCH, 2)
    assert_close(got, masses(smooth(mix(targets, twos, 0.5), 0.1)))


def test_through_scan():
    """Microbatches of sparse targets are scanned over as arrays are."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, CLASSES, (2, 3, 4))
    targets = smooth(mix(labels[0], labels[1], rng.random((3, 4))), 0.1)
    logits = rng.standard_normal((3, 4, CLASSES)).astype(np.float32)

    def step(carry, microbatch):
        return carry, xentjax.softmax_cross_entropy(*microbatch)

    _, losses = jax.lax.scan(step, None, (logits, targets))
    assert_close(losses, xentjax.softmax_cross_entropy(logits, targets), rtol=1e-6)


def test_derivatives_to_the_shares():
    """d/dα = background − t and d/dλ = a − b; both pass through to what the loss sees."""
    a, b = form("teacher"), LABELS

    def derivative(jacobian, operation, x):
        return jax.jit(jacobian(lambda x: xentjax.dense_targets(operation(x), CLASSES)))(x)

    masses = written_out(a)
    to_alpha = derivative(jax.jacfwd, lambda alpha: smooth(a, alpha), 0.3)
    assert_close(to_alpha, 1 / CLASSES - masses)
    to_lam = derivative(jax.jacrev, lambda lam: mix(a, b, lam), 0.3)
    assert_close(to_lam, masses - np.eye(CLASSES)[b])
    to_weights = derivative(jax.jacrev, lambda w: reweight(a, w), CLASS_WEIGHTS)
    assert_close(to_weights, masses[..., None] * np.eye(CLASSES))


# Examples, and the background that they share.

CUTS = {
    "vmap": lambda f, t: jax.vmap(f)(t),
    "scan": lambda f, t: jax.lax.scan(lambda _, one: (None, f(one)), None, t)[1],
    "map": jax.lax.map,
    "one": lambda f, t: f(jax.tree.map(lambda a: a[1 % len(a)], t)),
    "slice": lambda f, t: f(jax.tree.map(lambda a: a[:2], t)),
    "later slice": lambda f, t: f(jax.tree.map(lambda a: a[1:], t)),
    "reversed": lambda f, t: f(jax.tree.map(lambda a: a[::-1], t)),
    "indices": lambda f, t: f(jax.tree.map(lambda a: a[jnp.arange(len(t))[::-1]], t)),
    "one index": lambda f, t: f(jax.tree.map(lambda a: a[jnp.array([len(t) - 1])], t)),
    "mask": lambda f, t: f(jax.tree.map(lambda a: a[np.arange(len(t)) == 0], t)),
}
PICKS = {
    "one": lambda m: m[1 % len(m)],
    "slice": lambda m: m[:2],
    "later slice": lambda m: m[1:],
    "reversed": lambda m: m[::-1],
    "indices": lambda m: m[::-1],
    "one index": lambda m: m[-1:],
    "mask": lambda m: m[:1],
}


@pytest.mark.parametrize(
    "sizes", mainly(itertools.product((1, 2, 3), (2, 3, 5)), (1, 2), (2, 2), (3, 5)), ids=str
)
def test_cutting_every_array_alike_is_right_or_refused(sizes):
    """Also where there are as many examples as classes or as backgrounds."""
    batch, num_classes = sizes
    targets = target_forms(batch, num_classes)
    priors = 0.25 + np.random.default_rng(3).random((1, 2, num_classes)).astype(np.float32)
    masses = np.arange(1, 2 * batch + 1, dtype=np.float32).reshape(batch, 2)
    labels = sparse(smooth(targets["labels"], 0.5))
    forms = {
        "uniform": labels,
        "prior as given": SparseTargets(labels.indices, labels.weights, masses[:, 0], priors[0, 0]),
        "two": SparseTargets(labels.indices, labels.weights, masses, priors),
        "two as given": SparseTargets(labels.indices, labels.weights, masses, priors[0]),
    }
    right = set()
    for name, t in forms.items():
        want = written_out(t, num_classes)
        for cut, function in CUTS.items():
            try:
                got = function(lambda t: xentjax.dense_targets(t, num_classes), t)
            except (ValueError, IndexError):
                assert name != "uniform", cut
                continue
            assert_close(got, PICKS.get(cut, lambda m: m)(want), rtol=1e-6, err_msg=f"{name} {cut}")
            right.add((name, cut))
    # Those that need not be refused.
    for name in forms:
        assert right >= {(name, "one"), (name, "slice"), (name, "reversed")}
        assert batch > 1 or right >= {(name, "vmap"), (name, "scan")}


@pytest.mark.parametrize(
    "name", mainly(["labels", "smoothed", "two backgrounds"], "two backgrounds")
)
def test_index_cuts_examples(name):
    targets, want = sparse(_targets.as_targets(form(name))), written_out(form(name))
    for index in [
        *(2, -1, slice(1, 4), slice(None, None, -1), None),
        *(np.array([3, 3, 0]), [4, 1], want[:, 0] > 0, ..., (slice(2), None), jnp.array(3)),
    ]:
        assert_close(masses(targets[index]), want[index])
    assert len(targets) == BATCH
    assert targets.batch_shape == (BATCH,)
    assert_close(np.stack([masses(t) for t in targets]), want)
    assert_close(jax.jit(lambda i: xentjax.dense_targets(targets[i], CLASSES))(2), want[2])
    for index in (BATCH, -BATCH - 1, (0, 0)):
        with pytest.raises(IndexError, match=r"index: expected .* got"):
            targets[index]
    with pytest.raises(TypeError, match="len: expected a batch, got one example"):
        len(targets[0])


def test_index_cuts_more_axes():
    labels = np.random.default_rng(4).integers(0, CLASSES, (2, 3, 4))
    t = sparse(smooth(labels, 0.5, background=PRIOR))
    for index in [
        *((1, 2), (..., 3), (0, ..., slice(1, 3)), (slice(None), [2, 0])),
        *((1, None, 2), labels > 2, (labels[..., 0] > 2, 1)),
    ]:
        assert_close(masses(t[index]), (np.eye(CLASSES)[labels[index]] + PRIOR) / 2)


def test_repr_is_one_line():
    t = smooth(LABELS, 0.1)
    assert repr(t) == "SparseTargets(batch=(5,), K=1, background=uniform, num_classes=None)"
    t = smooth(t, 0.1, background=PRIOR)
    assert repr(t) == "SparseTargets(batch=(5,), K=1, background=float32[1, 2, 6], num_classes=6)"
    axes = jax.tree.map(lambda _: 0, smooth(LABELS, 0.1))
    assert repr(axes) == (
        "SparseTargets(indices=0, weights=0, background_mass=0, background=None, num_classes=None)"
    )


@pytest.mark.parametrize("num_classes", [2, 5])
def test_class_weights_of_another_length_are_refused(num_classes):
    """However targets were composed: logits of 3 classes, class weights of 2 or 5."""
    labels = np.zeros(4, int)
    weights = np.ones(num_classes, np.float32)
    weighted = {
        "labels": lambda t: reweight(t, weights),
        "smoothed": lambda t: reweight(smooth(t, 0.1), weights),
        "smoothed after": lambda t: smooth(reweight(t, weights), 0.1),
        "mixed": lambda t: mix(t, reweight(t, weights), 0.5),
        "indexed": lambda t: sparse(reweight(t, weights))[::-1],
        "through jit": jax.jit(lambda t: reweight(t, weights)),
    }
    head = (jnp.zeros((4, 2)), jnp.zeros((2, 3)))
    for function in weighted.values():
        targets = function(labels)
        for loss in (
            lambda t: xentjax.softmax_cross_entropy(jnp.zeros((4, 3)), t),
            lambda t: xentjax.softmax_cross_entropy_with_stats(jnp.zeros((4, 3)), t),
            lambda t: xentjax.linear_softmax_cross_entropy(*head, t),
            lambda t: xentjax.dense_targets(t, 3),
        ):
            with pytest.raises(
                ValueError, match=rf"targets: expected 3 classes.* got {num_classes}"
            ):
                loss(targets)
        with pytest.raises(ValueError, match=rf"expected {num_classes} classes.*float32\[3\]"):
            reweight(targets, np.ones(3, np.float32))


# Another class axis.


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_dense_targets_with_another_class_axis(axis):
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 5, (2, 3))
    other = jnp.asarray(rng.integers(0, 5, (2, 3)))
    weights, prior = rng.random((2, 5)).astype(np.float32)
    lam = rng.random((2, 3)).astype(np.float32)
    dense = jax.nn.one_hot(labels, 5, axis=axis)
    for ours in (
        lambda t, **axis: smooth(t, 0.1, **axis),
        lambda t, **axis: smooth(t, 0.1, background=prior, **axis),
        lambda t, **axis: reweight(t, weights, **axis),
        lambda t, **axis: mix(t, other, lam, **axis),
        lambda t, **axis: mix(smooth(other, 0.1), t, lam, **axis),
    ):
        want = np.moveaxis(np.asarray(xentjax.dense_targets(ours(labels), 5)), -1, axis)
        got = ours(dense, axis=axis)
        assert got.shape == want.shape
        assert_close(got, want)
        assert_close(xentjax.dense_targets(ours(labels), 5, axis=axis), want)
        assert_close(xentjax.dense_targets(got, 5, axis=axis), want)
    z = rng.standard_normal((2, 5, 3)).astype(np.float32)
    losses = xentjax.softmax_cross_entropy(
        z, smooth(jax.nn.one_hot(labels, 5, axis=1), 0.1, axis=1), axis=1
    )
    assert_close(losses, xentjax.softmax_cross_entropy(z, smooth(labels, 0.1), axis=1), rtol=2e-6)


# Labels that are none.


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int64, np.uint64])
def test_labels_of_any_integer_dtype(dtype):
    np.testing.assert_array_equal(
        xentjax.dense_targets(LABELS.astype(dtype), CLASSES), np.eye(CLASSES)[LABELS]
    )


BAD = [np.int32(-1), np.int32(CLASSES), np.int32(2**31 - 1), np.int32(-(2**31))]
# As int32 these would be other labels: 1, 0 and 1.
WRAPPING = [np.int64(2**32 + 1), np.int64(-(2**32)), np.uint64(2**63 + 2**32 + 1)]


@pytest.mark.parametrize("bad", [*BAD, *WRAPPING, np.uint32(2**32 - 1)])
def test_label_outside_the_classes_makes_its_row_nan(bad):
    labels = np.array([2, bad, 0], bad.dtype)
    with jax.enable_x64(bad.dtype.itemsize == 8):  # So that a jax array holds it as it is.
        for targets in (labels, jnp.asarray(labels)):
            mixed = mix(targets, np.ones(3, int), 0.5)
            for form in (targets, smooth(targets, 0.1), reweight(targets, CLASS_WEIGHTS), mixed):
                dense = np.isnan(xentjax.dense_targets(form, CLASSES))
                np.testing.assert_array_equal(dense.all(-1), [False, True, False])
                np.testing.assert_array_equal(dense.any(-1), [False, True, False])
            np.testing.assert_array_equal(reweight(targets, CLASS_WEIGHTS).weights[1], [1])
            losses = xentjax.softmax_cross_entropy(np.zeros((3, CLASSES), np.float32), mixed)
            np.testing.assert_array_equal(np.isnan(losses), [False, True, False])


@pytest.mark.parametrize("bad", WRAPPING)
def test_wide_label_does_not_wrap_where_jax_has_no_int64(bad):
    for label in (bad, np.asarray(bad)):
        assert np.isnan(xentjax.dense_targets(label, CLASSES)).all()
    dense = xentjax.dense_targets(np.array([2, bad], bad.dtype), CLASSES)
    np.testing.assert_array_equal(np.isnan(dense).any(-1), [False, True])


def test_errors_say_what_would_fit():
    z = np.zeros((2, 5, 3), np.float32)
    with pytest.raises(ValueError, match=r"got \(2, 3\) labels .* along axis=1"):
        xentjax.softmax_cross_entropy(z, np.zeros((2, 3), int))
    with pytest.raises(ValueError, match=r"make masses float: targets.astype\(jnp.float32\)"):
        xentjax.softmax_cross_entropy(z, np.zeros((2, 5, 3), int))
    with pytest.raises(TypeError, match=r"targets: expected integer labels.* got \[1099511627776"):
        smooth([2**40, 0], 0.1)
