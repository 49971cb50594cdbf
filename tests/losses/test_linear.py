"""The head without logits, in float64 and small ragged blocks, against the full-logits formula."""

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
    plain_softmax_cross_entropy,
    target_forms,
)

import xentjax
from xentjax._losses import linear as _linear

TOKENS, FEATURES, CLASSES = 5, 4, 11

# The budget and the fewest tokens that lead each way at the sizes above, and the plan they make.
WAYS = {
    "kept": (1232, 8, (5, 2, True)),
    "recomputed": (0, 8, (5, 2, False)),
    "kept, few tokens": (704, 8, (2, 2, True)),
    "recomputed, few tokens": (0, 2, (2, 2, False)),
}

# The float64 oracle differs by rounding alone: sums of at most 55 terms, of size 1 to 100.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}

loss_of = xentjax.linear_softmax_cross_entropy


@pytest.fixture(autouse=True)
def _float64_in_blocks_of_two_classes(monkeypatch):
    monkeypatch.setattr(_linear, "_FEWEST", 2)
    monkeypatch.setattr(_linear, "_ENOUGH", 8)
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["kept", "recomputed"])
def budget(request):
    """A memory budget that cuts classes into 2 + 2 + 2 + 2 + 2 + 1, and leads one of the ways."""
    return WAYS[request.param][0]


@pytest.fixture(params=["kept, few tokens", "recomputed, few tokens"])
def small_budget(request, monkeypatch):
    """One that cuts tokens too, into 2 + 2 + 1."""
    budget, enough, _ = WAYS[request.param]
    monkeypatch.setattr(_linear, "_ENOUGH", enough)
    return budget


def assert_close(actual, desired):
    jax.tree.map(lambda a, d: np.testing.assert_allclose(a, d, **CLOSE), actual, desired)


def arguments(seed=0, batch=(TOKENS,)):
    """Returns inputs, kernel, bias, weights and a cap; one token is all but certain of a class."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(*batch, FEATURES))
    kernel = rng.normal(size=(FEATURES, CLASSES))
    inputs[..., 0, :] = 4 * kernel[:, 2] / np.linalg.norm(kernel[:, 2])
    bias, weights = rng.normal(size=CLASSES), rng.random(batch) + 0.5
    return tuple(map(jnp.asarray, (inputs, kernel, bias, weights, 5.0)))


def fused(targets, **kwargs):
    """Returns the loss as a function of `arguments` and of the floats in targets."""
    _, rebuild = floating_leaves(targets)
    class_axis = kwargs.get("class_axis", 1)

    def function(inputs, kernel, bias, weights, cap, *floats):
        return loss_of(
            inputs,
            kernel.T if class_axis % 2 == 0 else kernel,
            rebuild(floats) if floats else targets,
            bias=bias,
            weights=weights,
            logit_transform=xentjax.soft_cap(cap),
            **kwargs,
        )

    return function


def plain(targets, reduction="mean", keep=None):
    """Returns the same function, of full logits, for the tokens `keep` names."""
    _, rebuild = floating_leaves(targets)

    def function(inputs, kernel, bias, weights, cap, *floats):
        logits = cap * jnp.tanh((inputs @ kernel + bias) / cap)
        t = xentjax.dense_targets(rebuild(floats) if floats else targets, kernel.shape[1])
        rows = slice(None) if keep is None else keep
        losses = plain_softmax_cross_entropy(logits[rows], t[rows])
        weighted = weights[rows] * losses
        if reduction == "none":
            return weighted
        return weighted.sum() / (weights[rows].sum() if reduction == "mean" else 1)

    return function


def value_and_gradients(function, args, argnums=None):
    """Returns Σ function² and its gradients: the cotangents of losses differ from each other."""
    argnums = tuple(range(len(args))) if argnums is None else argnums
    return jit(jax.value_and_grad(lambda *a: jnp.sum(function(*a) ** 2), argnums))(*args)


@pytest.mark.parametrize("way", WAYS)
def test_blocks_here_are_ragged(way, monkeypatch):
    budget, enough, plan = WAYS[way]
    monkeypatch.setattr(_linear, "_ENOUGH", enough)
    assert _linear._plan(TOKENS, FEATURES, CLASSES, 8, budget) == plan


@pytest.mark.parametrize("form", target_forms(TOKENS, CLASSES))
def test_every_gradient_for_every_target_form(budget, form):
    targets = target_forms(TOKENS, CLASSES)[form]
    args = arguments() + tuple(floating_leaves(targets)[0])
    # What asks for the transform's or the targets' gradient is never made in the forward pass.
    argnums = tuple(range(len(args))) if budget == 0 else (0, 1, 2, 3)
    actual = value_and_gradients(fused(targets, memory_budget=budget), args, argnums)
    assert_close(actual, value_and_gradients(plain(targets), args, argnums))


@pytest.mark.parametrize(
    ("form", "reduction", "class_axis"),
    [("two backgrounds", "mean", 1), ("dense", "none", 0), ("labels", "sum", -2)],
)
def test_every_reduction_and_layout_in_chunks_of_tokens(small_budget, form, reduction, class_axis):
    targets, args = target_forms(TOKENS, CLASSES)[form], arguments()
    options = {"reduction": reduction, "class_axis": class_axis, "memory_budget": small_budget}
    actual = value_and_gradients(fused(targets, **options), args, (0, 1, 2, 3))
    assert_close(actual, value_and_gradients(plain(targets, reduction), args, (0, 1, 2, 3)))


def test_a_choice_of_arguments_gives_the_same_gradients(budget):
    targets = target_forms(TOKENS, CLASSES)["smoothed"]
    args = arguments() + tuple(floating_leaves(targets)[0])

    @functools.partial(jit, static_argnums=0)
    def each(function, args):
        return [jax.grad(function, choice)(*args) for choice in [(0,), (1,), (2, 3), (4,), (5,)]]

    assert_close(each(fused(targets, memory_budget=budget), args), each(plain(targets), args))


KEEP = np.array([True, False, True, True, False])


@pytest.mark.parametrize("form", ["labels", "dense", "prior"])
def test_masked_tokens_may_hold_anything(budget, form):
    targets = target_forms(TOKENS, CLASSES)[form]
    inputs, kernel, bias, weights, cap = arguments()
    desired = value_and_gradients(plain(targets, keep=KEEP), arguments(), (0, 1, 2, 3))

    def spoilt(x, bad):
        return jnp.where(KEEP.reshape((-1,) + (1,) * (x.ndim - 1)), x, bad)

    if form == "labels":
        targets = spoilt(targets, jnp.array([0, CLASSES, 0, 0, -1]))
    elif form == "dense":
        targets = spoilt(targets, jnp.nan)
    args = (spoilt(inputs, jnp.nan), kernel, bias, spoilt(weights, jnp.nan), cap)
    function = fused(targets, where=jnp.asarray(KEEP), memory_budget=budget)
    assert_close(value_and_gradients(function, args, (0, 1, 2, 3)), desired)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_masked_is_zero_with_zero_gradients(budget, reduction):
    inputs, *others = arguments()
    args = (jnp.full_like(inputs, jnp.nan), *others)
    where = jnp.zeros(TOKENS, bool)
    options = {"where": where, "reduction": reduction, "memory_budget": budget}
    function = fused(jnp.full(TOKENS, -1), **options)
    jax.tree.map(
        lambda x: np.testing.assert_array_equal(x, np.zeros(x.shape)),
        value_and_gradients(function, args, (0, 1, 2, 3)),
    )


def test_an_invalid_label_is_nan_in_its_row_alone(budget):
    labels = jnp.array([0, -1, 3, CLASSES, 10])
    bad = np.array([False, True, False, True, False])
    args = arguments()
    losses = jit(fused(labels, reduction="none", memory_budget=budget))(*args)
    of_sum = fused(labels, reduction="sum", memory_budget=budget)
    total, gradient = jit(jax.value_and_grad(of_sum))(*args)
    valid = jnp.where(bad, 0, labels)
    np.testing.assert_array_equal(np.isnan(losses), bad)
    assert np.isnan(total)
    assert_close(losses[~bad], plain(valid, "none", ~bad)(*args))
    assert np.isnan(gradient[bad]).all()
    assert_close(gradient[~bad], jax.grad(plain(valid, "sum", ~bad))(*args)[~bad])


@pytest.mark.parametrize("form", ["dense", "two backgrounds"])
def test_batches_of_several_axes_are_batches_of_one(budget, form):
    batch, size = (2, 3), 6
    targets = target_forms(size, CLASSES)[form]
    args = arguments(batch=batch)

    def folded(x):
        return x.reshape(*batch, *x.shape[1:]) if x.shape[:1] == (size,) else x

    def flat(inputs, kernel, bias, weights, cap):
        losses = plain(targets, "none")(
            inputs.reshape(size, FEATURES), kernel, bias, weights.reshape(size), cap
        )
        return losses.reshape(batch)

    of_batch = jax.tree.map(folded, targets)
    function = fused(of_batch, reduction="none", memory_budget=budget)
    assert_close(jit(function)(*args), flat(*args))
    gradients = value_and_gradients(fused(of_batch, memory_budget=budget), args, (0, 1, 3))

    def mean(*args):
        return flat(*args).sum() / args[3].sum()

    assert_close(gradients, value_and_gradients(mean, args, (0, 1, 3)))


@pytest.mark.parametrize(
    ("tokens", "features", "classes"), [(0, 4, 11), (0, 4, 1), (3, 4, 1), (1, 1, 2), (3, 0, 5)]
)
def test_small_and_empty_sizes(budget, tokens, features, classes):
    rng = np.random.default_rng(0)
    shapes = [(tokens, features), (features, classes), (classes,), (tokens,), ()]
    args = tuple(jnp.asarray(rng.random(shape) + 1) for shape in shapes)
    labels = jnp.asarray(rng.integers(0, classes, tokens))
    reduction = "sum" if tokens == 0 else "mean"
    actual = value_and_gradients(fused(labels, memory_budget=budget), args, (0, 1, 2, 3))
    assert_close(actual, value_and_gradients(plain(labels, reduction), args, (0, 1, 2, 3)))
    none = fused(labels, memory_budget=budget, reduction="none")
    actual = value_and_gradients(none, args)
    assert_close(actual, value_and_gradients(plain(labels, "none"), args))


def test_temperature_and_its_derivative(budget):
    targets, (inputs, kernel, *_) = target_forms(TOKENS, CLASSES)["mixed"], arguments()

    def ours(inputs, kernel, tau):
        transform = xentjax.temperature(tau)
        return loss_of(inputs, kernel, targets, logit_transform=transform, memory_budget=budget)

    def of_logits(inputs, kernel, tau):
        return plain_softmax_cross_entropy(inputs @ kernel / tau, targets).mean()

    args = (inputs, kernel, jnp.asarray(0.7))
    assert_close(value_and_gradients(ours, args), value_and_gradients(of_logits, args))
    frozen = value_and_gradients(ours, args, (0, 1))
    assert_close(frozen, value_and_gradients(of_logits, args, (0, 1)))


def test_every_mode(budget):
    # Sizes as small as ragged blocks allow: third derivatives take long to compile.
    rng = np.random.default_rng(0)
    tokens, features, classes = 2, 2, 5
    args = tuple(jnp.asarray(rng.normal(size=s)) for s in ((tokens, features), (features, classes)))
    targets = target_forms(tokens, classes)["smoothed"]
    budget = min(budget, 8 * (features + 2 * tokens) * classes)
    assert _linear._plan(tokens, features, classes, 8, budget) == (2, 2, budget > 0)

    def ours(inputs, kernel):
        return loss_of(inputs, kernel, targets, memory_budget=budget) ** 2

    def of_logits(inputs, kernel):
        return plain_softmax_cross_entropy(inputs @ kernel, targets).mean() ** 2

    assert_modes_agree(MODES, ours, of_logits, args)


@pytest.mark.parametrize("form", ["smoothed", "dense"])
def test_a_gradient_to_targets_moves_with_the_inputs(budget, form):
    targets = target_forms(TOKENS, CLASSES)[form]
    inputs, *others = arguments()
    floats = floating_leaves(targets)[0]

    def moved(function):
        def gradients(inputs, *floats):
            argnums = tuple(range(5, 5 + len(floats)))
            return jax.grad(function, argnums)(inputs, *others, *floats)

        def along(x):
            return jax.jvp(lambda x: gradients(x, *floats), (x,), (jnp.cos(x),))

        return jit(along)(inputs)

    assert_close(moved(fused(targets, memory_budget=budget)), moved(plain(targets)))


@pytest.mark.parametrize("argnums", [(0, 1, 2, 3), (0, 1, 2, 3, 4)], ids=["no cap", "cap"])
def test_vmap_of_grad_is_the_loop(budget, argnums):
    labels = jnp.stack([target_forms(TOKENS, CLASSES, seed)["labels"] for seed in range(2)])
    (x0, kernel, bias, w0, _), (x1, _, _, w1, _) = arguments(0), arguments(1)
    args = (jnp.stack([x0, x1]), kernel, bias, jnp.stack([w0, w1]), jnp.array([3.0, 6.0]))

    def gradients(function):
        def one(labels, *args):
            return jax.value_and_grad(function(labels), argnums)(*args)

        return jit(jax.vmap(one, in_axes=(0, 0, None, None, 0, 0)))(labels, *args)

    ours = functools.partial(fused, memory_budget=budget)
    assert_close(gradients(ours), gradients(plain))


def test_microbatches_in_a_scan_with_checkpoints_add_to_the_whole(budget):
    labels = target_forms(2 * TOKENS, CLASSES)["labels"]
    inputs, kernel, bias, weights, cap = arguments(batch=(2 * TOKENS,))

    def of_microbatches(inputs, kernel, bias, weights, cap):
        @jax.checkpoint
        def one(x, y, w):
            function = fused(y, reduction="sum", memory_budget=budget)
            return function(x, kernel, bias, w, cap)

        def step(total, rows):
            return total + one(*rows), None

        rows = jax.tree.map(lambda a: a.reshape(2, TOKENS, *a.shape[1:]), (inputs, labels, weights))
        return jax.lax.scan(step, jnp.zeros(()), rows)[0]

    args = (inputs, kernel, bias, weights, cap)
    desired = value_and_gradients(plain(labels, "sum"), args)
    assert_close(value_and_gradients(of_microbatches, args), desired)


def plain_stats(logits, targets):
    """Returns (losses, LinearStats) of full logits."""
    dense = xentjax.dense_targets(targets, CLASSES)
    prediction = jnp.argmax(logits, -1)
    held = jnp.take_along_axis(dense, prediction[:, None], -1)[:, 0]
    log_softmax = jax.nn.log_softmax(logits)
    label = jnp.argmax(dense, -1)[:, None]
    return plain_softmax_cross_entropy(logits, targets), xentjax.LinearStats(
        jax.nn.logsumexp(logits, -1),
        prediction,
        held == dense.max(-1),
        jnp.take_along_axis(log_softmax, label, -1)[:, 0],
    )


@pytest.mark.parametrize("form", ["labels", "dense", "prior"])
def test_stats_are_those_of_full_logits(small_budget, form):
    targets, (inputs, kernel, bias, *_) = target_forms(TOKENS, CLASSES)[form], arguments()
    kernel, bias = kernel.at[:, 7].set(kernel[:, 2]), bias.at[7].set(bias[2])  # Ties.
    inputs = inputs.at[1].set(0)

    def ours(inputs, kernel, bias):
        return xentjax.linear_softmax_cross_entropy_with_stats(
            inputs, kernel, targets, bias=bias, where=jnp.asarray(KEEP), memory_budget=small_budget
        )

    def of_logits(inputs, kernel, bias):
        stats = plain_stats(inputs @ kernel + bias, targets)
        return jax.tree.map(lambda x: jnp.where(KEEP, x, 0), stats)

    def with_z_loss(function):
        def total(*args):
            losses, stats = function(*args)
            return jnp.sum(losses + 0.1 * stats.log_normalizer**2), (losses, stats)

        return jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(inputs, kernel, bias)

    actual = with_z_loss(ours)
    assert actual[0][1][1].prediction.dtype == jnp.int32
    assert actual[0][1][1].correct.dtype == bool
    assert_close(actual, with_z_loss(of_logits))
