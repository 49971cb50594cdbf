"""Laws of the cross-entropy on drawn batches: every target form, each backend.

A law takes the `evaluate` of a backend and a draw. `make test` draws a few examples of each, and
`make prove` many.
"""

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from laws import (
    BACKENDS,
    CLASSES,
    FORMS,
    ROWS,
    draws,
    evaluate,
    head,
    information,
    mixed_before_and_after,
    split_by_class,
    split_by_example,
)

from xentjax._softmax.head_plan import HeadPlan

LAWS = {}
ULP = 2.0**-23


def law(function):
    """Registers a law under its name in words."""
    LAWS[function.__name__.replace("_", " ")] = function
    return function


def bound(draw):
    """Returns the relative error that two results may differ by: twice the contract's."""
    gaps = draw.logits.max(-1) - draw.logits.min(-1)
    return 2 * max(1e-6, ULP / 2 * float(gaps.max()))


def assert_near(actual, desired, scale, draw):
    """Asserts that two results of the same truth agree, relative to the size of their terms."""
    error = np.abs(actual - desired)
    np.testing.assert_array_less(error, bound(draw) * np.abs(scale) + 1e-30)


def entry_scale(answer):
    """Returns T · p + t of each entry of the gradient, times its cotangent."""
    total = answer.masses.sum(-1, keepdims=True)
    return total + answer.masses


def assert_same(actual, desired, draw):
    """Asserts that two Answers are of the same truth."""
    np.testing.assert_allclose(actual.masses, desired.masses, rtol=4 * ULP, atol=1e-30)
    assert_near(actual.losses, desired.losses, desired.losses + desired.masses.sum(-1), draw)
    scale = np.abs(draw.cotangents)[:, None] * entry_scale(desired)
    assert_near(actual.gradient, desired.gradient, scale, draw)


# One batch.


@law
def the_value_is_that_of_the_differentiated_path(run, draw):
    for a in run(draw).values():
        assert_near(a.value, a.losses, a.losses + a.masses.sum(-1), draw)


@law
def no_loss_is_negative(run, draw):
    for a in run(draw).values():
        assert (a.losses >= 0).all()


@law
def a_loss_is_at_least_the_entropy_of_its_target(run, draw):
    """Gibbs: Σ t (lse − z) ≥ −Σ t log (t / T)."""
    for a in run(draw).values():
        total = a.masses.sum(-1)
        terms = a.masses * np.log(
            np.where(a.masses > 0, a.masses / np.maximum(total, 1e-30)[:, None], 1)
        )
        assert (a.losses >= -terms.sum(-1) - bound(draw) * (a.losses + total)).all()


@law
def the_entries_of_a_gradient_sum_to_0(run, draw):
    for a in run(draw).values():
        scale = np.abs(draw.cotangents) * a.masses.sum(-1)
        assert_near(a.gradient.sum(-1), 0, 2 * CLASSES * scale, draw)


@law
def an_entry_of_a_gradient_is_between_less_its_mass_and_the_rest(run, draw):
    for a in run(draw._replace(cotangents=np.ones(ROWS, np.float32))).values():
        total, slack = a.masses.sum(-1, keepdims=True), bound(draw) * entry_scale(a) + 1e-30
        assert (a.gradient >= -a.masses - slack).all()
        assert (a.gradient <= total - a.masses + slack).all()


@law
def forward_mode_is_the_transpose_of_reverse_mode(run, draw):
    for a in run(draw).values():
        pulled = (a.gradient * draw.tangents).sum()
        scale = np.abs(draw.cotangents) * (np.abs(draw.tangents) * entry_scale(a)).sum(-1)
        assert_near((a.slopes * draw.cotangents).sum(), pulled, scale.sum(), draw)


@law
def a_log_normalizer_is_between_the_largest_logit_and_log_V_more(run, draw):
    top = draw.logits.max(-1).astype(np.float64)
    slack = ULP * np.maximum(np.abs(top), 1) * 2
    for a in run(draw).values():
        assert (a.log_normalizer >= top - slack).all()
        assert (a.log_normalizer <= top + math.log(CLASSES) + slack).all()


@law
def an_entropy_is_between_0_and_log_V(run, draw):
    for a in run(draw).values():
        assert (a.entropy >= 0).all()
        assert (a.entropy <= math.log(CLASSES) * (1 + bound(draw))).all()


# Two batches that must have the same losses.


@law
def a_shift_of_all_logits_changes_nothing(run, draw):
    shifted = run(draw._replace(logits=draw.logits + np.float32(64)))
    for form, a in run(draw).items():
        assert_same(shifted[form], a, draw)


@law
def classes_in_another_order_have_the_same_losses(run, draw):
    order = np.arange(CLASSES)[::-1]
    back = draw._replace(
        logits=draw.logits[:, order],
        labels=order[draw.labels].astype(np.int32),
        masses=draw.masses[:, order],
        class_weights=draw.class_weights[order],
        indices=order[draw.indices].astype(np.int32),
    )
    got, want = run(back), run(draw)
    for form in set(FORMS) - {"teacher"}:  # Its background mass is the first class's of masses.
        turned = got[form]._replace(
            masses=got[form].masses[:, order], gradient=got[form].gradient[:, order]
        )
        assert_same(turned, want[form], draw)


@law
def examples_in_another_order_have_their_own_losses(run, draw):
    arrays = {
        name: getattr(draw, name)[::-1]
        for name in ("logits", "labels", "masses", "indices", "weights", "cotangents")
    }
    got, want = run(draw._replace(**arrays)), run(draw)
    for form in set(FORMS) - {"mixed"}:  # It mixes each example with the one across.
        np.testing.assert_allclose(got[form].losses[::-1], want[form].losses, rtol=8 * ULP)
        np.testing.assert_allclose(
            got[form].gradient[::-1], want[form].gradient, rtol=8 * ULP, atol=1e-30
        )


@law
def a_row_of_nan_leaves_the_others_alone(run, draw):
    spoiled = draw.logits.copy()
    spoiled[1, 2] = np.nan
    got, want = run(draw._replace(logits=spoiled)), run(draw)
    rest = np.arange(ROWS) != 1
    for form, a in want.items():
        assert np.isnan(got[form].losses[1])
        gradient = got[form].gradient[1]
        assert np.isnan(gradient).all() if draw.cotangents[1] else not gradient.any()
        np.testing.assert_array_equal(got[form].losses[rest], a.losses[rest])
        np.testing.assert_array_equal(got[form].gradient[rest], a.gradient[rest])


@law
def every_form_is_its_masses_written_out(run, draw):
    answers = run(draw)
    for a in answers.values():
        dense = run(draw._replace(masses=a.masses.astype(np.float32)))["dense"]
        assert_same(a, dense, draw)


@law
def a_class_that_comes_twice_has_both_its_weights(run, draw):
    twice, once = draw.indices.copy(), draw.weights.copy()
    twice[:, 1] = twice[:, 0]
    together = np.stack([once[:, 0] + once[:, 1], np.zeros_like(once[:, 0]), once[:, 2]], -1)
    apart = run(draw._replace(indices=twice))["teacher"]
    assert_same(apart, run(draw._replace(indices=twice, weights=together))["teacher"], draw)


# Derivatives.


@law
def a_gradient_is_linear_in_its_cotangent(run, draw):
    want = run(draw)
    for factor in map(np.float32, (2.0**16, 2.0**-16, -1)):
        scaled = run(draw._replace(cotangents=draw.cotangents * factor))
        for form, a in want.items():
            np.testing.assert_allclose(
                scaled[form].gradient, a.gradient * factor, rtol=4 * ULP, atol=1e-36 * abs(factor)
            )
    for factor in map(np.float32, (1e5, 1e-5, 0)):  # Products are rounded.
        scaled = run(draw._replace(cotangents=draw.cotangents * factor))
        for form, a in want.items():
            error = np.abs(scaled[form].gradient - a.gradient * factor)
            scale = np.abs(draw.cotangents * factor)[:, None] * entry_scale(a)
            assert (error <= 2 * ULP * scale + 1e-36).all()


@law
def a_label_outside_the_classes_has_a_nan_loss_and_no_gradient_without_a_cotangent(run, draw):
    rows = draw.keep
    spoiled = np.where(rows, np.int32(CLASSES), draw.labels)
    cotangents = np.where(rows, np.float32(0), draw.cotangents)
    got, want = run(draw._replace(labels=spoiled, cotangents=cotangents)), run(draw)
    for form in ("labels", "smoothed", "prior"):
        assert np.isnan(got[form].losses[rows]).all()
        np.testing.assert_array_equal(got[form].gradient[rows], 0)
        np.testing.assert_array_equal(got[form].losses[~rows], want[form].losses[~rows])
        np.testing.assert_array_equal(got[form].gradient[~rows], want[form].gradient[~rows])


@law
def a_loss_is_convex_along_a_line(run, draw):
    """loss((a + b) / 2) ≤ (loss(a) + loss(b)) / 2."""
    other = draw.logits + 2 * draw.tangents
    ends = run(draw), run(draw._replace(logits=other))
    middle = run(draw._replace(logits=draw.logits + draw.tangents))
    for form, a in middle.items():
        mean = (ends[0][form].losses + ends[1][form].losses) / 2
        assert (a.losses <= mean + 2 * bound(draw) * (mean + a.masses.sum(-1))).all()


@law
def a_loss_is_above_its_tangents(run, draw):
    """loss(b) ≥ loss(a) + gradient(a) · (b − a)."""
    far = run(draw._replace(logits=draw.logits + draw.tangents))
    for form, a in run(draw).items():
        line = a.losses + a.slopes
        size = a.losses + (np.abs(draw.tangents) * entry_scale(a)).sum(-1) + far[form].losses
        assert (far[form].losses >= line - 2 * bound(draw) * size).all()


@law
def a_gradient_is_monotone(run, draw):
    """(gradient(b) − gradient(a)) · (b − a) ≥ 0."""
    draw = draw._replace(cotangents=np.ones(ROWS, np.float32))
    far = run(draw._replace(logits=draw.logits + draw.tangents))
    for form, a in run(draw).items():
        rise = ((far[form].gradient - a.gradient) * draw.tangents).sum(-1)
        size = (np.abs(draw.tangents) * entry_scale(a)).sum(-1)
        assert (rise >= -4 * bound(draw) * size).all()


@law
def a_higher_logit_of_the_label_has_a_lower_loss(run, draw):
    higher = draw.logits.copy()
    higher[np.arange(ROWS), draw.labels] += 1
    assert (run(draw._replace(logits=higher))["labels"].losses < run(draw)["labels"].losses).all()


# Functions of targets.


@law
def log_of_the_target_is_the_best_prediction(run, draw):
    """At z = log t a loss is the entropy of t, and its gradient is 0."""
    masses = (draw.masses + np.float32(0.0625)).astype(np.float32)
    p = (masses / masses.sum(-1, keepdims=True)).astype(np.float32)
    z = np.log(p.astype(np.float64))
    a = run(draw._replace(masses=p, logits=z.astype(np.float32)))["dense"]
    np.testing.assert_allclose(a.losses, -(p * z).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(a.gradient, 0, atol=1e-6)
    np.testing.assert_allclose(a.entropy, a.losses, rtol=2e-6)


@law
def a_loss_is_linear_in_the_share_of_smoothing(run, draw):
    none, half, full = (
        run(draw._replace(share=np.float32(share))) for share in (0.0, draw.share, 1.0)
    )
    for form in ("smoothed", "prior"):
        mixed = (1 - draw.share) * none[form].losses + draw.share * full[form].losses
        assert_near(half[form].losses, mixed, mixed + 1, draw)
        assert_same(none[form], none["labels"], draw)


@law
def a_loss_is_linear_in_the_share_of_mixing(run, draw):
    one, other, both = (
        run(draw._replace(share=np.float32(share)))["mixed"] for share in (1.0, 0.0, draw.share)
    )
    mixed = draw.share * one.losses + (1 - draw.share) * other.losses
    assert_near(both.losses, mixed, mixed + 1, draw)


@law
def a_loss_is_linear_in_class_weights(run, draw):
    single, twice = run(draw), run(draw._replace(class_weights=2 * draw.class_weights))
    np.testing.assert_array_equal(twice["weighted"].losses, 2 * single["weighted"].losses)


@law
def class_weights_of_1_change_nothing(run, draw):
    answers = run(draw._replace(class_weights=np.ones(CLASSES, np.float32)))
    assert_same(answers["weighted"], answers["smoothed"], draw)


@law
def a_prior_that_is_uniform_is_the_uniform_background(run, draw):
    answers = run(draw._replace(class_weights=np.ones(CLASSES, np.float32)))
    assert_same(answers["prior"], answers["smoothed"], draw)
    assert_same(answers["two backgrounds"], answers["smoothed"], draw)


def on_draws(holds, examples=5):
    """Calls `holds` with so many draws."""

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    @given(draws)
    def each(draw):
        holds(draw)

    each()


@pytest.mark.parametrize("backend", ["portable", "cpu in windows"])
@pytest.mark.parametrize("name", LAWS)
def test_law(name, backend):
    on_draws(functools.partial(LAWS[name], evaluate(backend)))


@pytest.mark.prove
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAWS)
def test_law_at_length(name, backend):
    on_draws(functools.partial(LAWS[name], evaluate(backend)), examples=300)


@pytest.mark.parametrize("backend", ["portable", "cpu in windows"])
def test_masked_examples_are_as_good_as_removed(backend):
    """Of an example that is masked out everything is 0; the others have what they have alone."""

    def holds(draw):
        want = evaluate(backend)(draw)
        for form, a in evaluate(backend, masked=True)(draw).items():
            scale = np.abs(draw.logits).max() + (1 + np.abs(draw.tangents).max()) * a.masses.max()
            for name in ("losses", "gradient", "slopes", "log_normalizer", "entropy"):
                got, alone = getattr(a, name), getattr(want[form], name)
                np.testing.assert_array_equal(got[~draw.keep], 0)
                # The compiler may sum in another order.
                assert_near(got[draw.keep], alone[draw.keep], 2 * scale + alone[draw.keep], draw)

    on_draws(holds)


# A batch in pieces is the batch.


def few_and_many(cases, *chosen):
    """Returns (case, number of draws): few of the chosen for `make test`, many of all to prove."""
    few = [(case, 5) for case in chosen]
    return few + [pytest.param(case, 100, marks=pytest.mark.prove) for case in cases]


PLANS = [
    HeadPlan(tokens, classes, keeps)
    for (tokens, classes), keeps in itertools.product([(4, 6), (1, 1), (3, 4)], [True, False])
]


@pytest.mark.parametrize(
    ("case", "examples"),
    few_and_many(
        itertools.product(["dense", "two backgrounds"], PLANS),
        ("two backgrounds", HeadPlan(3, 4, True)),
        ("dense", HeadPlan(3, 4, False)),
    ),
    ids=str,
)
def test_a_head_in_blocks_of_any_size_is_the_loss_of_its_logits(case, examples):
    def holds(draw):
        inputs, kernel = draw.masses[:, :ROWS], draw.logits
        whole = draw._replace(logits=inputs @ kernel)  # Exact: no number has more than 24 bits.
        want = evaluate("portable")(whole)[case[0]]
        losses, of_inputs, of_kernel = head(*case)(draw, inputs, kernel)
        scale = np.abs(draw.cotangents)[:, None] * entry_scale(want)
        assert_near(losses, want.losses, want.losses + want.masses.sum(-1), whole)
        assert_near(of_inputs, want.gradient @ kernel.T, scale @ np.abs(kernel.T), whole)
        assert_near(of_kernel, inputs.T @ want.gradient, inputs.T @ scale, whole)

    on_draws(holds, examples)


@pytest.mark.parametrize(
    ("case", "examples"),
    few_and_many(
        itertools.product(["labels", "dense", "prior"], [1, 2, 4, 8]), ("dense", 2), ("prior", 8)
    ),
    ids=str,
)
def test_classes_on_any_number_of_devices_have_the_losses_of_one(case, examples):
    def holds(draw):
        want = evaluate("portable")(draw)[case[0]]
        losses, gradient = split_by_class(*case)(draw)
        assert_same(want._replace(losses=losses, gradient=gradient[:, :CLASSES]), want, draw)
        np.testing.assert_array_equal(gradient[:, CLASSES:], 0)

    on_draws(holds, examples)


@pytest.mark.parametrize(
    ("case", "examples"),
    few_and_many(
        [
            *itertools.product(["labels", "teacher"], [1], [1, 2, 4]),
            *itertools.product(["labels", "teacher"], [2, 4], [1]),
            ("teacher", 2, 2),
        ],
        ("teacher", 1, 4),
        ("labels", 2, 2),
    ),
    ids=str,
)
def test_microbatches_and_devices_have_the_mean_of_the_whole_batch(case, examples):
    def holds(draw):
        weights = np.abs(draw.cotangents)
        total = (weights * draw.keep).sum()
        share = np.where(draw.keep & (weights > 0), weights / np.maximum(total, 1e-30), 0)
        share = share.astype(np.float32)
        want = evaluate("portable")(draw._replace(cotangents=share))[case[0]]
        mean, gradient = split_by_example(*case)(draw, weights)
        scale = want.losses + want.masses.sum(-1)
        assert_near(mean, share @ want.losses, share @ scale, draw)
        assert_near(gradient, want.gradient.sum(0), share @ entry_scale(want), draw)

    on_draws(holds, examples)


# Information and mixtures.


@pytest.mark.parametrize("examples", [5, pytest.param(300, marks=pytest.mark.prove)])
def test_bits_are_nats_over_log_2(examples):
    def holds(draw):
        p, q = (np.abs(x) + np.float32(0.0625) for x in (draw.masses, draw.tangents))
        p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
        for name, (nats, bits) in information()(p, q).items():
            np.testing.assert_allclose(bits * math.log(2), nats, rtol=2 * ULP, err_msg=name)

    on_draws(holds, examples)


@pytest.mark.parametrize("examples", [5, pytest.param(300, marks=pytest.mark.prove)])
def test_targets_are_mixed_before_or_after_they_are_smoothed_or_weighted(examples):
    def holds(draw):
        for name, (before, after) in mixed_before_and_after()(draw).items():
            np.testing.assert_allclose(before, after, rtol=8 * ULP, err_msg=name)

    on_draws(holds, examples)
