"""The head without logits, in float64 and small ragged blocks, against the full-logits formula."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    assert_modes_agree,
    floating_leaves,
    jit,
    mainly,
    plain_softmax_cross_entropy,
    target_forms,
)
from heads import linear_loss, linear_loss_and_stats

import xentjax
from xentjax._softmax.head_plan import HeadPlan, Sizes, make_plan

TOKENS, FEATURES, CLASSES = 5, 4, 11

# Classes are cut into 2 + 2 + 2 + 2 + 2 + 1, and few tokens into 2 + 2 + 1.
KEPT, RECOMPUTED = HeadPlan(5, 2, True), HeadPlan(5, 2, False)
KEPT_FEW, RECOMPUTED_FEW = HeadPlan(2, 2, True), HeadPlan(2, 2, False)

# The float64 oracle differs by rounding alone: sums of at most 55 terms, of size 1 to 100.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(params=[KEPT, RECOMPUTED], ids=["kept", "recomputed"])
def plan(request):
    """A plan that cuts the classes."""
    return request.param


@pytest.fixture(params=[KEPT_FEW, RECOMPUTED_FEW], ids=["kept", "recomputed"])
def small_plan(request):
    """A plan that cuts the tokens too."""
    return request.param


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
        return linear_loss(
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


# The plan.

FULL = 4 * 1000 * 16  # Bytes of the float32 kernel, and so of its gradient's accumulator.


@pytest.mark.parametrize(
    ("sizes", "memory_budget", "shards", "made"),
    [
        # tokens, features, classes
        ((5, 4, 11), None, 1, (5, 11, True)),
        ((5, 4, 11), 0, 1, (5, 11, False)),
        ((0, 4, 11), None, 1, (1, 11, True)),
        ((0, 4, 11), 0, 1, (1, 11, True)),
        ((300, 16, 1000), None, 1, (300, 1000, True)),
        ((300, 16, 1000), 0, 1, (300, 128, False)),
        ((300, 16, 1000), FULL + 2 * 4 * 1000 * 128 - 1, 1, (300, 128, False)),
        ((300, 16, 1000), FULL + 2 * 4 * 1000 * 128, 1, (128, 256, True)),
        ((300, 16, 1000), FULL + 2 * 4 * 1000 * 300, 1, (300, 256, True)),
        ((8192, 2304, 256000), None, 1, (256, 11648, True)),
        ((8192, 2304, 256000), 0, 1, (1024, 128, False)),
        ((8192, 2304, 32000), None, 8, (256, 1536, True)),
    ],
)
def test_plans(sizes, memory_budget, shards, made):
    assert make_plan(Sizes(*sizes), memory_budget, shards) == made


def test_plans_are_of_one_token_and_class_at_least_and_of_no_more_than_there_are():
    sizes = (0, 1, 127, 129, 5000), (0, 1, 4096), (1, 2, 129, 300000)
    for of_head in itertools.product(*sizes):
        for budget, shards in ((None, 1), (None, 8), (0, 1), (10**6, 1), (10**12, 2)):
            tokens, classes, _ = make_plan(Sizes(*of_head), budget, shards)
            assert 1 <= tokens <= max(1, of_head[0])
            assert 1 <= classes <= of_head[2]


# Values and gradients.


FORMS = list(target_forms(TOKENS, CLASSES))


@pytest.mark.parametrize(
    "case",
    mainly(
        itertools.product((RECOMPUTED, KEPT), FORMS),
        *((RECOMPUTED, form) for form in FORMS),
        # Both ways read the same blocks of mass.
        *((KEPT, form) for form in ("labels", "two backgrounds")),
    ),
    ids=str,
)
def test_every_gradient_for_every_target_form(case):
    plan, form = case
    targets = target_forms(TOKENS, CLASSES)[form]
    args = arguments() + tuple(floating_leaves(targets)[0])
    # What asks for the transform's or the targets' gradient is never made in the forward pass.
    argnums = (0, 1, 2, 3) if plan.keeps_logits else tuple(range(len(args)))
    actual = value_and_gradients(fused(targets, plan=plan), args, argnums)
    assert_close(actual, value_and_gradients(plain(targets), args, argnums))


@pytest.mark.parametrize(
    ("plan", "form", "reduction", "class_axis"),
    [
        (RECOMPUTED_FEW, "two backgrounds", "mean", 1),
        (RECOMPUTED_FEW, "dense", "none", 0),
        (KEPT_FEW, "labels", "sum", -2),
    ],
    ids=str,
)
def test_every_reduction_and_layout_in_chunks_of_tokens(plan, form, reduction, class_axis):
    targets, args = target_forms(TOKENS, CLASSES)[form], arguments()
    options = {"reduction": reduction, "class_axis": class_axis, "plan": plan}
    actual = value_and_gradients(fused(targets, **options), args, (0, 1, 2, 3))
    assert_close(actual, value_and_gradients(plain(targets, reduction), args, (0, 1, 2, 3)))


def test_a_choice_of_arguments_gives_the_same_gradients():
    targets = target_forms(TOKENS, CLASSES)["smoothed"]
    args = arguments() + tuple(floating_leaves(targets)[0])

    @functools.partial(jit, static_argnums=0)
    def each(function, args):
        return [jax.grad(function, choice)(*args) for choice in [(0,), (1,), (2, 3), (4,), (5,)]]

    # The first three are made in the forward pass, the others never are.
    assert_close(each(fused(targets, plan=KEPT), args), each(plain(targets), args))


KEEP = np.array([True, False, True, True, False])


@pytest.mark.parametrize(
    ("plan", "form"), [(KEPT, "labels"), (RECOMPUTED, "dense"), (RECOMPUTED, "prior")], ids=str
)
def test_masked_tokens_may_hold_anything(plan, form):
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
    function = fused(targets, where=jnp.asarray(KEEP), plan=plan)
    assert_close(value_and_gradients(function, args, (0, 1, 2, 3)), desired)


@pytest.mark.parametrize(("plan", "reduction"), [(KEPT, "mean"), (RECOMPUTED_FEW, "none")], ids=str)
def test_all_masked_is_zero_with_zero_gradients(plan, reduction):
    inputs, *others = arguments()
    args = (jnp.full_like(inputs, jnp.nan), *others)
    where = jnp.zeros(TOKENS, bool)
    options = {"where": where, "reduction": reduction, "plan": plan}
    function = fused(jnp.full(TOKENS, -1), **options)
    jax.tree.map(
        lambda x: np.testing.assert_array_equal(x, np.zeros(x.shape)),
        value_and_gradients(function, args, (0, 1, 2, 3)),
    )


def test_an_invalid_label_is_nan_in_its_row_alone(plan):
    labels = jnp.array([0, -1, 3, CLASSES, 10])
    bad = np.array([False, True, False, True, False])
    args = arguments()
    losses = jit(fused(labels, reduction="none", plan=plan))(*args)
    of_sum = fused(labels, reduction="sum", plan=plan)
    total, gradient = jit(jax.value_and_grad(of_sum))(*args)
    valid = jnp.where(bad, 0, labels)
    np.testing.assert_array_equal(np.isnan(losses), bad)
    assert np.isnan(total)
    assert_close(losses[~bad], plain(valid, "none", ~bad)(*args))
    assert np.isnan(gradient[bad]).all()
    assert_close(gradient[~bad], jax.grad(plain(valid, "sum", ~bad))(*args)[~bad])


@pytest.mark.parametrize(
    ("plan", "form"), [(RECOMPUTED, "dense"), (KEPT, "two backgrounds")], ids=str
)
def test_batches_of_several_axes_are_batches_of_one(plan, form):
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
    function = fused(of_batch, reduction="none", plan=plan)
    assert_close(jit(function)(*args), flat(*args))
    gradients = value_and_gradients(fused(of_batch, plan=plan), args, (0, 1, 3))

    def mean(*args):
        return flat(*args).sum() / args[3].sum()

    assert_close(gradients, value_and_gradients(mean, args, (0, 1, 3)))


@pytest.mark.parametrize(
    ("plan", "tokens", "features", "classes"),
    [
        *[(KEPT, *sizes) for sizes in ((0, 4, 11), (3, 4, 1))],
        *[(RECOMPUTED, *sizes) for sizes in ((0, 4, 1), (1, 1, 2), (3, 0, 5))],
    ],
    ids=str,
)
def test_small_and_empty_sizes(plan, tokens, features, classes):
    rng = np.random.default_rng(0)
    shapes = [(tokens, features), (features, classes), (classes,), (tokens,), ()]
    args = tuple(jnp.asarray(rng.random(shape) + 1) for shape in shapes)
    labels = jnp.asarray(rng.integers(0, classes, tokens))
    reduction, wanted = ("mean" if plan.keeps_logits else "none"), (0, 1, 2, 3)
    actual = value_and_gradients(fused(labels, plan=plan, reduction=reduction), args, wanted)
    reduction = "sum" if tokens == 0 else reduction
    assert_close(actual, value_and_gradients(plain(labels, reduction), args, wanted))


def test_temperature_and_its_derivative(plan):
    targets, (inputs, kernel, *_) = target_forms(TOKENS, CLASSES)["mixed"], arguments()

    def ours(inputs, kernel, tau):
        transform = xentjax.temperature(tau)
        return linear_loss(inputs, kernel, targets, logit_transform=transform, plan=plan)

    def of_logits(inputs, kernel, tau):
        return plain_softmax_cross_entropy(inputs @ kernel / tau, targets).mean()

    args = (inputs, kernel, jnp.asarray(0.7))
    wanted = (0, 1) if plan.keeps_logits else (0, 1, 2)
    assert_close(*(value_and_gradients(f, args, wanted) for f in (ours, of_logits)))


@pytest.mark.parametrize(
    ("plan", "modes"), [(KEPT, ("hessian",)), (RECOMPUTED, ("jacrev(jacrev)",))], ids=str
)
def test_whole_hessians(plan, modes):
    """Other modes, along a line, are in test_linear_options.py."""
    # Sizes as small as ragged blocks allow: second derivatives take long to compile.
    rng = np.random.default_rng(0)
    tokens, features, classes = 2, 2, 5
    args = tuple(jnp.asarray(rng.normal(size=s)) for s in ((tokens, features), (features, classes)))
    targets = target_forms(tokens, classes)["smoothed"]
    plan = HeadPlan(2, 2, plan.keeps_logits)

    def ours(inputs, kernel):
        return linear_loss(inputs, kernel, targets, plan=plan) ** 2

    def of_logits(inputs, kernel):
        return plain_softmax_cross_entropy(inputs @ kernel, targets).mean() ** 2

    assert_modes_agree(modes, ours, of_logits, args)


@pytest.mark.parametrize("form", ["smoothed", "dense"])
def test_a_gradient_to_targets_moves_with_the_inputs(form):
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

    assert_close(moved(fused(targets, plan=RECOMPUTED)), moved(plain(targets)))


@pytest.mark.parametrize(
    ("plan", "argnums"), [(KEPT, (0, 1, 2, 3)), (RECOMPUTED, (0, 1, 2, 3, 4))], ids=str
)
def test_vmap_of_grad_is_the_loop(plan, argnums):
    labels = jnp.stack([target_forms(TOKENS, CLASSES, seed)["labels"] for seed in range(2)])
    (x0, kernel, bias, w0, _), (x1, _, _, w1, _) = arguments(0), arguments(1)
    args = (jnp.stack([x0, x1]), kernel, bias, jnp.stack([w0, w1]), jnp.array([3.0, 6.0]))

    def gradients(function):
        def one(labels, *args):
            return jax.value_and_grad(function(labels), argnums)(*args)

        return jit(jax.vmap(one, in_axes=(0, 0, None, None, 0, 0)))(labels, *args)

    ours = functools.partial(fused, plan=plan)
    assert_close(gradients(ours), gradients(plain))


def test_microbatches_in_a_scan_with_checkpoints_add_to_the_whole():
    labels = target_forms(2 * TOKENS, CLASSES)["labels"]
    inputs, kernel, bias, weights, cap = arguments(batch=(2 * TOKENS,))

    def of_microbatches(inputs, kernel, bias, weights, cap):
        @jax.checkpoint
        def one(x, y, w):
            function = fused(y, reduction="sum", plan=KEPT)
            return function(x, kernel, bias, w, cap)

        def step(total, rows):
            return total + one(*rows), None

        rows = jax.tree.map(lambda a: a.reshape(2, TOKENS, *a.shape[1:]), (inputs, labels, weights))
        return jax.lax.scan(step, jnp.zeros(()), rows)[0]

    args, wanted = (inputs, kernel, bias, weights, cap), (0, 1, 2, 3)
    desired = value_and_gradients(plain(labels, "sum"), args, wanted)
    assert_close(value_and_gradients(of_microbatches, args, wanted), desired)


def plain_stats(logits, targets):
    """Returns (losses, SoftmaxStats) of full logits."""
    dense = xentjax.dense_targets(targets, CLASSES)
    prediction = jnp.argmax(logits, -1)
    held = jnp.take_along_axis(dense, prediction[:, None], -1)[:, 0]
    log_softmax = jax.nn.log_softmax(logits)
    label = jnp.argmax(dense, -1)[:, None]
    return plain_softmax_cross_entropy(logits, targets), xentjax.SoftmaxStats(
        jax.nn.logsumexp(logits, -1),
        prediction,
        held == dense.max(-1),
        -jnp.sum(jnp.exp(log_softmax) * log_softmax, -1),
        jnp.take_along_axis(log_softmax, label, -1)[:, 0],
    )


@pytest.mark.parametrize("form", ["labels", "dense", "prior"])
def test_stats_are_those_of_full_logits(form):
    targets, (inputs, kernel, bias, *_) = target_forms(TOKENS, CLASSES)[form], arguments()
    kernel, bias = kernel.at[:, 7].set(kernel[:, 2]), bias.at[7].set(bias[2])  # Ties.
    inputs = inputs.at[1].set(0)

    def ours(inputs, kernel, bias):
        return linear_loss_and_stats(
            inputs, kernel, targets, bias=bias, where=jnp.asarray(KEEP), plan=RECOMPUTED_FEW
        )

    def of_logits(inputs, kernel, bias):
        stats = plain_stats(inputs @ kernel + bias, targets)
        return jax.tree.map(lambda x: jnp.where(KEEP, x, 0), stats)

    def with_z_loss(function):
        def total(*args):
            losses, stats = function(*args)
            return jnp.sum(losses + 0.1 * stats.log_normalizer**2 + stats.entropy**2), (
                losses,
                stats,
            )

        return jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(inputs, kernel, bias)

    actual = with_z_loss(ours)
    assert actual[0][1][1].prediction.dtype == jnp.int32
    assert actual[0][1][1].correct.dtype == bool
    assert_close(actual, with_z_loss(of_logits))


# Limits.


@pytest.mark.parametrize(
    ("small_plan", "form"), [(KEPT_FEW, "labels"), (RECOMPUTED_FEW, "prior")], ids=str
)
def test_a_nan_in_the_kernel_is_in_every_number(small_plan, form):
    targets, (inputs, kernel, bias, *_) = target_forms(TOKENS, CLASSES)[form], arguments()
    mean = functools.partial(linear_loss, targets=targets, bias=bias, plan=small_plan)

    @jit
    def every_number(kernel):
        losses, stats = linear_loss_and_stats(inputs, kernel, targets, bias=bias, plan=small_plan)
        numbers = losses, stats.log_normalizer, stats.label_log_probability
        return *numbers, mean(inputs, kernel), *jax.grad(mean, (0, 1))(inputs, kernel)

    for at in 0, 7, CLASSES - 1:
        for x in every_number(kernel.at[1, at].set(jnp.nan)):
            assert np.isnan(x).all()


def test_a_nan_in_one_token_leaves_the_others_as_they_are(small_plan):
    labels, (inputs, kernel, *_) = target_forms(TOKENS, CLASSES)["labels"], arguments()

    @jit
    def losses_and_gradient(x):
        losses = linear_loss(x, kernel, labels, reduction="none", plan=small_plan)
        total = functools.partial(
            linear_loss, kernel=kernel, targets=labels, reduction="sum", plan=small_plan
        )
        return losses, jax.grad(total)(x)

    clean = losses_and_gradient(inputs)
    for before, after in zip(clean, losses_and_gradient(inputs.at[3].set(jnp.nan)), strict=True):
        assert np.isnan(after[3]).all()
        assert_close(np.delete(after, 3, 0), np.delete(before, 3, 0))


def test_a_padded_class_has_no_part_in_the_derivative_of_a_temperature():
    # 0 · inf: its logit is −inf, whatever the temperature.
    labels, (inputs, kernel, bias, *_) = target_forms(TOKENS, 9)["labels"], arguments()
    padded = bias.at[9:].set(-jnp.inf)

    def ours(tau, kernel, bias):
        transform = xentjax.temperature(tau)
        return linear_loss(
            inputs, kernel, labels, bias=bias, logit_transform=transform, plan=RECOMPUTED
        )

    def of_fewer(tau, kernel, bias):
        return plain_softmax_cross_entropy((inputs @ kernel + bias) / tau, labels).mean()

    actual = jit(jax.value_and_grad(ours))(0.7, kernel, padded)
    assert_close(actual, jit(jax.value_and_grad(of_fewer))(0.7, kernel[:, :9], bias[:9]))


def test_third_derivatives_without_kept_logits():
    rng = np.random.default_rng(0)
    inputs, kernel = jnp.asarray(rng.normal(size=(3, 2))), jnp.asarray(rng.normal(size=(2, 300)))
    labels = jnp.array([0, 299, 7])

    def ours(x):
        return xentjax.linear_softmax_cross_entropy(
            x * inputs, kernel * x, labels, reduction="sum", memory_budget=0
        )

    def of_logits(x):
        return plain_softmax_cross_entropy((x * inputs) @ (kernel * x), labels).sum()

    def third(f):
        return jit(jax.grad(jax.grad(jax.grad(f))))(0.6)

    assert_close(third(ours), third(of_logits))


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (lambda z: z - z.mean(), ValueError, "mixes logits"),
        (lambda z: z / jnp.linalg.norm(z, axis=-1, keepdims=True), ValueError, "mixes logits"),
        (lambda z: jnp.cumsum(z, -1), ValueError, "mixes logits"),
        (jax.jit(lambda z: z + z.sum(-1, keepdims=True)), ValueError, "mixes logits"),
        (lambda z: z[:, ::-1], ValueError, "mixes logits"),
        (lambda z: z[:1], ValueError, "elementwise"),
        (xentjax.soft_cap, TypeError, r"call soft_cap\(30.0\)"),
        (lambda z: (z, z), TypeError, "returns"),
        (lambda z: None, TypeError, "returns"),
        (2.0, TypeError, "expected a function"),
    ],
)
def test_transforms_that_are_refused(transform, error, message):
    inputs, kernel, *_ = arguments()
    with pytest.raises(error, match="logit_transform: .*" + message):
        xentjax.linear_softmax_cross_entropy(
            inputs, kernel, jnp.zeros(TOKENS, int), logit_transform=transform
        )


@pytest.mark.parametrize(
    ("plan", "transform"),
    [
        (KEPT, jnp.tanh),
        (RECOMPUTED, jax.jit(lambda z: jnp.where(z > 0, z, 0.5 * z))),
        (RECOMPUTED, lambda z: jnp.clip(z, -2.0, 2.0)),
        (KEPT, jax.nn.softplus),
        (KEPT, lambda z: jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x) + z, z)),
        (RECOMPUTED, jax.checkpoint(lambda z: z * jnp.exp(-(z**2)))),
    ],
)
def test_elementwise_transforms_of_any_kind(plan, transform):
    labels, (inputs, kernel, *_) = target_forms(TOKENS, CLASSES)["labels"], arguments()

    def ours(inputs, kernel):
        return linear_loss(inputs, kernel, labels, logit_transform=transform, plan=plan)

    def of_logits(inputs, kernel):
        return plain_softmax_cross_entropy(transform(inputs @ kernel), labels).mean()

    args = inputs, kernel
    assert_close(value_and_gradients(ours, args), value_and_gradients(of_logits, args))
