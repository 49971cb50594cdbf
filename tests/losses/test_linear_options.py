"""Class masks, z-loss, masked tokens and teachers of the head, against the full-logits formula."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import jit, mainly
from heads import linear_loss, linear_loss_and_stats

import xentjax
from xentjax._softmax import head_blocks
from xentjax._softmax.head_plan import HeadPlan

TOKENS, FEATURES, CLASSES = 7, 3, 11

# Classes are cut into 4 + 4 + 3 and tokens into 2 + 2 + 2 + 1.
PLANS = {"kept": HeadPlan(2, 4, True), "recomputed": HeadPlan(2, 4, False)}

RNG = np.random.default_rng(0)
INPUTS, KERNEL, BIAS, WEIGHTS = (
    RNG.normal(size=s) for s in ((TOKENS, FEATURES), (FEATURES, CLASSES), CLASSES, TOKENS)
)
TEACHER = RNG.normal(size=(TOKENS, 2)), RNG.normal(size=(2, CLASSES)), RNG.normal(size=CLASSES)
LABELS = np.array([0, 3, 8, 1, 2, 5, 0], np.int32)
MASK = np.arange(CLASSES) < 9  # All of the last block is out, and one class of the block before.
KEEP = np.array([False, True, False, False, True, True, False])  # Two chunks hold them.

# The float64 oracle differs by rounding alone: sums of at most 77 terms, of size 1 to 100.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}

pytestmark = pytest.mark.usefixtures("float64")


def assert_close(actual, desired):
    jax.tree.map(lambda a, d: np.testing.assert_allclose(a, d, **CLOSE), actual, desired)


def value_and_gradients(function, args, argnums):
    """Returns Σ function² and its gradients: the cotangents of losses differ from each other."""
    return jit(jax.value_and_grad(lambda *a: jnp.sum(function(*a) ** 2), argnums))(*args)


def plain(inputs, kernel, bias, weights, z_loss, targets, reduction="mean"):
    """The loss of full logits of the classes and tokens that there are; targets float[N, V]."""
    z = xentjax.soft_cap(5.0)(inputs @ kernel + bias)[:, MASK][KEEP]
    lse, w = jax.nn.logsumexp(z, axis=-1), weights[KEEP]
    losses = w * (jnp.sum(targets[KEEP][:, MASK] * (lse[:, None] - z), -1) + z_loss * lse**2)
    if reduction == "none":
        return jnp.zeros(TOKENS).at[np.flatnonzero(KEEP)].set(losses)
    return losses.sum() / w.sum()


def fused(inputs, kernel, bias, weights, z_loss, targets, reduction="mean", **options):
    """The same of the head; what is masked may be anything, and the order is the batch's."""
    options = {"class_mask": jnp.asarray(MASK), "where": jnp.asarray(KEEP)} | options
    return linear_loss(
        jnp.where(KEEP[:, None], inputs, jnp.nan),
        kernel,
        targets,
        bias=bias,
        weights=jnp.where(KEEP, weights, jnp.nan),
        z_loss=z_loss,
        reduction=reduction,
        logit_transform=xentjax.soft_cap(5.0),
        **options,
    )


ARGS = INPUTS, KERNEL, BIAS, WEIGHTS, np.asarray(0.3)  # Of NumPy, since they are float64.


@pytest.mark.parametrize("way", PLANS)
def test_a_class_mask_a_z_loss_and_masked_tokens(way):
    reduction = "mean" if way == "kept" else "none"
    options = {"reduction": reduction, "plan": PLANS[way]}
    labels = jnp.where(KEEP, LABELS, CLASSES)
    actual = functools.partial(fused, targets=labels, **options)
    desired = functools.partial(plain, targets=jnp.eye(CLASSES)[LABELS], reduction=reduction)
    wanted = tuple(range(len(ARGS)))
    assert_close(*(value_and_gradients(f, ARGS, wanted) for f in (actual, desired)))


def teacher_probabilities(inputs, kernel, bias, tau):
    return (
        jnp.zeros((TOKENS, CLASSES))
        .at[:, MASK]
        .set(jax.nn.softmax(((inputs @ kernel + bias) / tau)[:, MASK], axis=-1))
    )


def of_teacher(function, reduction="mean", class_axis=1, **options):
    """Returns a loss as a function of ARGS and of the teacher's inputs, kernel, bias and tau."""

    def loss(*args):
        inputs, kernel, bias, tau = args[len(ARGS) :]
        if function is plain:
            targets = teacher_probabilities(inputs, kernel, bias, tau)
        else:
            inputs = jnp.where(KEEP[:, None], inputs, jnp.nan)
            kernel = kernel.T if class_axis == 0 else kernel
            targets = xentjax.LinearTargets(
                inputs, kernel, bias=bias, temperature=tau, class_axis=class_axis
            )
        return function(*args[: len(ARGS)], targets, reduction, **options)

    return loss


WITH_TEACHER = (*ARGS, *TEACHER, np.asarray(1.7))


@pytest.mark.parametrize(
    ("way", "reduction", "count"),
    # Where the teacher's gradient is asked for too, logits are never kept.
    [("kept", "mean", 5), ("recomputed", "mean", 9), ("recomputed", "none", 5)],
)
def test_a_teacher(way, reduction, count):
    wanted = tuple(range(count))
    actual = of_teacher(fused, reduction, class_axis=0 if way == "kept" else 1, plan=PLANS[way])
    desired = of_teacher(plain, reduction)
    assert_close(*(value_and_gradients(f, WITH_TEACHER, wanted) for f in (actual, desired)))


def test_a_confident_teacher_and_student_keep_their_digits():
    # Losses of 1e-8 and less: in float32, 1 − p is 0.
    inputs, kernel = np.array([[18.0], [19.0], [24.0]], np.float32), np.array([[1, 0, 0.25]])
    kernel, teacher = kernel.astype(np.float32), inputs + np.float32(0.5)
    targets = xentjax.LinearTargets(teacher, kernel)
    losses = [
        linear_loss(inputs, kernel, targets, reduction="none", plan=HeadPlan(3, 2, False)),
        *(
            linear_loss(inputs[i : i + 1], kernel, targets_of_token, plan=HeadPlan(1, 2, True))
            for i in range(3)
            for targets_of_token in [xentjax.LinearTargets(teacher[i : i + 1], kernel)]
        ),
    ]
    z, y = ((x.astype(np.longdouble) @ kernel.astype(np.longdouble)) for x in (inputs, teacher))
    others = np.exp(z - z[:, :1])[:, 1:].sum(-1)
    t = np.exp(y - y[:, :1]) / (1 + np.exp(y - y[:, :1])[:, 1:].sum(-1, keepdims=True))
    desired = (t * (z[:, :1] - z)).sum(-1) + np.log1p(others)
    # Half an ulp of the largest gap that is subtracted, 24.
    np.testing.assert_allclose(losses[0], desired.astype(float), rtol=24.5 * 2**-24)
    np.testing.assert_allclose(losses[1:], desired.astype(float), rtol=24.5 * 2**-24)


@pytest.mark.parametrize("way", PLANS)
def test_a_teacher_whose_logits_are_far_apart(way):
    """In each block of classes too, by more than the exponent of a float64 can hold."""
    teacher = np.linspace(-1, 1, TOKENS)[:, None]
    kernel = 4000 * np.linspace(-1, 1, CLASSES)[None]
    targets = xentjax.LinearTargets(jnp.asarray(teacher), jnp.asarray(kernel))
    got = linear_loss(INPUTS, KERNEL, targets, plan=PLANS[way])
    want = xentjax.softmax_cross_entropy(INPUTS @ KERNEL, jax.nn.softmax(teacher @ kernel))
    assert_close(got, want.mean())


@pytest.mark.parametrize("way", PLANS)
def test_a_teacher_whose_first_block_has_no_class(way):
    targets = xentjax.LinearTargets(*map(jnp.asarray, TEACHER[:2]))
    is_left = jnp.arange(CLASSES) >= 4
    got = linear_loss(INPUTS, KERNEL, targets, class_mask=is_left, plan=PLANS[way])
    masses = jax.nn.softmax((TEACHER[0] @ TEACHER[1])[:, 4:])
    assert_close(got, xentjax.softmax_cross_entropy((INPUTS @ KERNEL)[:, 4:], masses).mean())


def forward(f):
    """Returns the derivative of a function of a number, by forward mode."""
    return lambda s: jax.jvp(f, (s,), (jnp.ones_like(s),))[1]


MODES = {"reverse": jax.grad, "forward": forward}


@pytest.mark.parametrize(
    "case",
    mainly(
        itertools.product(("total", "statistics"), MODES, MODES),
        ("total", "forward", "reverse"),
    ),
    ids=str,
)
def test_second_derivatives_along_a_line(case):
    """Of a mean with a teacher and a z-loss, and of one loss per token with the statistics."""
    of, outer, inner = case
    rng = np.random.default_rng(1)
    steps = [rng.normal(size=a.shape) for a in WITH_TEACHER]

    def curvature(loss):
        def f(s):
            return loss(*(a + s * step for a, step in zip(WITH_TEACHER, steps, strict=True)))

        return jit(MODES[outer](MODES[inner](f)))(np.zeros(()))

    ours = of_teacher(fused, plan=PLANS["kept"]) if of == "total" else with_stats
    full = of_teacher(plain) if of == "total" else plain_with_stats
    np.testing.assert_allclose(curvature(ours), curvature(full), rtol=1e-9)


def test_second_derivatives_where_logits_are_far_apart():
    """By more than the exponent of a float64 can hold; the last two classes are near."""
    kernel = jnp.asarray(np.append(np.linspace(-3000, 2000, CLASSES - 1), 2000.5)[None])

    def both(x):
        plan = PLANS["recomputed"]
        losses, stats = linear_loss_and_stats(x[None], kernel, jnp.array([1]), plan=plan)
        return jnp.stack([losses[0], stats.entropy[0]])

    p = 1 / (1 + np.exp(-0.5))  # Of the last class: the others are e⁻⁵⁰⁰ at most.
    slope = p * (1 - p)
    want = slope / 4, -(slope + 0.5 * slope * (1 - 2 * p)) / 4
    got = jit(jax.hessian(both))(jnp.ones(1))
    np.testing.assert_allclose(got.ravel(), want, rtol=1e-9)


def with_stats(*args):
    """A total of all that is differentiable in the statistics of a head."""
    inputs, kernel, bias, *_ = args
    losses, stats = linear_loss_and_stats(
        inputs, kernel, LABELS, bias=bias, class_mask=MASK, where=KEEP, plan=PLANS["recomputed"]
    )
    return jnp.sum(losses * stats.entropy + stats.log_normalizer**2)


def plain_with_stats(inputs, kernel, bias, *_):
    z = (inputs @ kernel + bias)[KEEP][:, MASK]
    log_p, lse = jax.nn.log_softmax(z), jax.nn.logsumexp(z, axis=-1)
    losses = -log_p[np.arange(KEEP.sum()), LABELS[KEEP]]
    return jnp.sum(losses * -jnp.sum(jnp.exp(log_p) * log_p, -1) + lse**2)


def test_statistics_of_a_teacher():
    targets = xentjax.LinearTargets(*TEACHER[:2], bias=TEACHER[2])
    actual = jit(
        lambda x: linear_loss_and_stats(
            x, KERNEL, targets, class_mask=MASK, where=KEEP, plan=HeadPlan(2, 4, False)
        )
    )(INPUTS)
    logits = jnp.where(MASK, INPUTS @ KERNEL, -jnp.inf)
    dense = teacher_probabilities(*TEACHER, 1.0)
    assert_close(actual, xentjax.softmax_cross_entropy_with_stats(logits, dense, where=KEEP))


def test_the_first_of_equal_classes_is_a_teachers_label():
    """Though others are as likely, in blocks after it."""
    targets = xentjax.LinearTargets(INPUTS[:, :1], jnp.zeros((1, CLASSES)))
    plan, nothing = PLANS["recomputed"], jnp.zeros_like(KERNEL)
    _, stats = linear_loss_and_stats(INPUTS, nothing, targets, plan=plan)
    np.testing.assert_array_equal(stats.prediction, 0)
    assert stats.correct.all()


def test_with_no_class_left_everything_is_0():
    none = jnp.zeros(CLASSES, bool)

    def everything(inputs, kernel):
        options = {"class_mask": none, "plan": PLANS["kept"]}
        out = linear_loss_and_stats(inputs, kernel, LABELS, **options)
        mean = functools.partial(linear_loss, targets=LABELS, z_loss=1.0, **options)
        return out, jax.value_and_grad(mean, (0, 1))(inputs, kernel)

    rows = jnp.stack([none, jnp.asarray(MASK)])
    logits = jnp.zeros((2, CLASSES))
    dense, stats = xentjax.softmax_cross_entropy_with_stats(logits, LABELS[:2], where=rows)
    found = jit(everything)(INPUTS, KERNEL), jax.tree.map(lambda x: x[0], (dense, stats))
    for x in jax.tree.leaves(found):
        np.testing.assert_array_equal(x, np.zeros_like(x))


def test_mass_on_a_masked_class_costs_infinity_unless_reweighting_takes_it_away():
    masked = jnp.arange(CLASSES) < 5  # The labels 8 and 5 are out.
    smoothed = xentjax.smooth_labels(LABELS, 0.1)
    removed = xentjax.reweight_targets(smoothed, masked.astype(float))

    @jit
    def losses(targets):
        options = {"class_mask": masked, "reduction": "none", "plan": PLANS["kept"]}
        return linear_loss(INPUTS, KERNEL, targets, **options)

    np.testing.assert_array_equal(np.isinf(losses(LABELS)), LABELS >= 5)
    assert np.isposinf(losses(smoothed)).all()
    left = jnp.where(masked, xentjax.dense_targets(smoothed, CLASSES), 0)[:, :5]
    assert_close(losses(removed), xentjax.softmax_cross_entropy((INPUTS @ KERNEL)[:, :5], left))


@pytest.mark.parametrize(("size", "chunk"), [(10, 3), (9, 3), (3, 3), (2, 5), (0, 1)])
def test_chunks_after_the_end_are_left_out(size, chunk):
    @jax.jit
    def visited(end):
        def body(start, length, seen):
            here = jax.lax.dynamic_slice_in_dim(seen, start, length, 0)
            return jax.lax.dynamic_update_slice_in_dim(seen, here + 1, start, 0)

        return head_blocks.for_each(size, min(chunk, max(size, 1)), body, jnp.zeros(size), end)

    for end in range(size + 1):
        seen = visited(jnp.int32(end))
        np.testing.assert_array_equal(seen[:end], 1)
        # Of those after it, only such as share a chunk with one before it, or come first.
        assert seen[end:].sum() < chunk or (size <= chunk) or end <= size % chunk
        assert set(np.unique(seen)) <= {0.0, 1.0}
