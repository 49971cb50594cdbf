"""The passes over logits on each platform, called as they are, against float64."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    INF,
    contract,
    exact_softmax_cross_entropy,
    mainly,
    rows_with_margins,
    target_forms,
)

import xentjax
from xentjax._jax.dtypes import wide_dtype
from xentjax._softmax import passes, reference
from xentjax._targets.mass import mass_of, only_points_are_heavy, zero_at_class
from xentjax._targets.types import as_targets

ROWS = 23  # In blocks of 5 the last one repeats two rows.
TINY = float(np.finfo(np.float32).tiny)


def logits_of(num_classes, dtype, seed=0):
    """Returns logits [23, V]: confident rows, ties, impossible classes, NaN, and others."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(ROWS, num_classes)) * 4
    z[1:5, 0] += np.array([10, 25, 40, 60])  # Confident.
    z[5] = 1.5  # All classes lead.
    z[6, [0, -1]] = z[6].max()  # Two do, in the first and the last chunk.
    z[7, ::2] = -INF
    z[8] = -INF
    z[9, num_classes // 2] = np.nan
    z[10] += 1e4
    z[11] *= 50
    return jnp.asarray(z, dtype)


def mass_of_form(form, num_classes, dtype):
    targets = target_forms(ROWS, num_classes)[form]
    if form == "dense":  # Rows that are all but certain of the confident class.
        sure = jnp.zeros_like(targets).at[:, 0].set(1)
        targets = jnp.where((jnp.arange(ROWS) < 4)[:, None], sure, targets)
    mass = mass_of(as_targets(targets), num_classes, wide_dtype(dtype), None)
    return mass, xentjax.dense_targets(targets, num_classes)


@jax.jit
def by_both(logits, mass, cotangents):
    """Returns (loss, lse, gradient, loss without a gradient) on each of the PLATFORMS."""

    def on(platform):
        whole = passes.summarise(logits, mass, True, platform)
        gradient = passes.gradient(whole, logits, mass, *cotangents, backend=platform)
        value = passes.summarise(logits, mass, False, platform)
        assert value.mass_of_rest is None
        return whole.loss, whole.log_normalizer, gradient, value.loss

    return [on(platform) for platform in PLATFORMS]


PLATFORMS = ("portable", "cpu")
LONG = 2 * passes.MAX_SUM - 1  # The last window is not full.


def exact(logits, masses, of_loss, of_lse):
    """Returns (loss, lse, gradient, size): float64 by one class against the rest.

    The size of an entry is that of the numbers that make it: nothing else may cancel.
    """
    z, t = np.asarray(logits, np.float64), np.asarray(masses, np.float64)
    c, d = (np.asarray(x, np.float64)[:, None] for x in (of_loss, of_lse))
    m = z.max(-1, keepdims=True)
    shift = np.where(m == -INF, 0, m)
    leader = np.arange(z.shape[-1]) == z.argmax(-1)[:, None]
    e = np.exp(z - shift)
    rest = np.where(leader, 0, e).sum(-1, keepdims=True)
    total = t.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        gaps = np.where((t == 0) & ~np.isnan(z), 0, shift - z)
        loss = (t * gaps).sum(-1) + (total * np.log1p(rest))[:, 0]
        lse = (m + np.log1p(rest))[:, 0]
        p = e / (1 + rest)
        others = np.where(leader, 0, t).sum(-1, keepdims=True)
        spread = total * rest / (1 + rest)
        sure = leader & (rest < 1) & (m > -INF)
        entries = np.where(sure, others - spread, total * p - t)
        size = np.where(sure, others + spread, total * p + t)
        return loss, lse, c * entries + d * p, np.abs(c) * size + np.abs(d) * p


FORMS = tuple(target_forms(1, 2))
CASES = [
    *((form, 303, jnp.float32) for form in FORMS),
    *((form, 12, jnp.float32) for form in ("labels", "dense", "teacher")),
    *((form, LONG, jnp.float32) for form in ("labels", "dense", "smoothed")),
    ("labels", 211, jnp.bfloat16),
    ("dense", 303, jnp.float16),
    ("two backgrounds", 211, jnp.bfloat16),
    ("labels", 12, jnp.float64),
    ("prior", 211, jnp.float64),
]


SOME = [case for case in CASES if case[0] not in ("mixed", "weighted", "smoothed")]


@pytest.mark.parametrize("case", mainly(CASES, *SOME), ids=str)
def test_each_keeps_the_contract(case):
    form, num_classes, dtype = case
    with jax.enable_x64(dtype == jnp.float64):
        logits = logits_of(num_classes, dtype)
        mass, masses = mass_of_form(form, num_classes, dtype)
        rng = np.random.default_rng(1)
        cotangents = tuple(
            jnp.asarray(x, wide_dtype(dtype))
            for x in (rng.normal(size=ROWS), np.where(np.arange(ROWS) % 2, 0, rng.random(ROWS)))
        )
        answers = by_both(logits, mass, cotangents)
        loss, lse, gradient, size = exact(logits, masses, *cotangents)
    finite = np.asarray(logits, np.float64)
    bounds = np.array([contract(row[row > -INF]) if row.max() > -INF else 1 for row in finite])
    bounds[9] = 1e-6
    if dtype == jnp.float64:
        bounds = 1e-13 + 0 * bounds
    if num_classes == LONG:  # So many gaps come close to the bound, which has no room for exp.
        bounds = bounds + 2.0**-22
    # float16 and bfloat16 gradients are rounded once more; below 2⁻¹⁴ float16 has fewer digits.
    rounding = 0 if wide_dtype(dtype) == dtype else float(jnp.finfo(dtype).eps) / 2
    least = max(TINY, float(jnp.finfo(dtype).smallest_normal)) if rounding else TINY
    # A dense target knows its own total to half an ulp of it for each addition.
    of_total = 0 if only_points_are_heavy(mass) or dtype == jnp.float64 else 2.0**-22
    totals = np.asarray(masses, np.float64).sum(-1)
    for name, (a_loss, a_lse, a_gradient, a_value) in zip(PLATFORMS, answers, strict=True):
        assert a_loss.dtype == a_lse.dtype == wide_dtype(dtype)
        assert a_gradient.dtype == dtype
        for row in range(ROWS):
            at = f"{name}, row {row}"
            close = functools.partial(np.testing.assert_allclose, err_msg=at)
            close(a_loss[row], loss[row], rtol=bounds[row], atol=num_classes * TINY)
            close(a_value[row], loss[row], rtol=bounds[row], atol=num_classes * TINY)
            close(a_lse[row], lse[row], rtol=max(bounds[row], 1e-6 * rounding), atol=1e-6)
            entries = np.asarray(a_gradient[row], np.float64)
            bad = ~np.isfinite(gradient[row])
            np.testing.assert_array_equal(np.isnan(entries), bad, err_msg=at)
            allowed = bounds[row] * size[row] + rounding * np.abs(gradient[row]) + least
            allowed += of_total * totals[row] * (abs(float(cotangents[0][row])))
            wrong = np.abs(entries - gradient[row]) > allowed
            assert not wrong[~bad].any(), (at, entries[wrong], gradient[row][wrong])


@pytest.mark.parametrize("form", mainly(["labels", "dense", "teacher", "prior"], "dense", "prior"))
def test_the_oracle_and_the_reference_are_right_to_50_digits(form):
    """The oracle above, and the plain formulas whose derivatives the engine uses."""
    with jax.enable_x64(True):
        rows = [0, 1, 2, 3, 4, 5, 6, 11]
        logits = logits_of(12, jnp.float64)
        mass, masses = mass_of_form(form, 12, jnp.float64)
        masses = np.asarray(masses, np.float64)
        ones, zeros = np.ones(ROWS), np.zeros(ROWS)
        loss, lse, gradient, size = exact(logits, masses, ones, zeros)
        plain_loss, plain_lse = reference.cross_entropy(logits, mass)
        plain = jax.grad(lambda z: reference.cross_entropy(z, mass)[0].sum())(logits)
    logits, plain, plain_loss = map(np.asarray, (logits, plain, plain_loss))
    for row in rows:
        exact_loss, entries = exact_softmax_cross_entropy(logits[row], masses[row])
        for answer in loss, plain_loss:
            np.testing.assert_allclose(answer[row], float(exact_loss), rtol=1e-13)
        np.testing.assert_allclose(plain_lse[row], lse[row], rtol=1e-14)
        entries = np.array([float(e) for e in entries])
        assert np.all(np.abs(gradient[row] - entries) <= 2e-14 * size[row])
        # A leader's entry is a sum of its parts there, in any order.
        rounding = 4e-16 * masses[row].sum()
        assert np.all(np.abs(plain[row] - entries) <= 2e-14 * size[row] + rounding)


@pytest.mark.parametrize("num_classes", [2, 11, 300])
@pytest.mark.parametrize("form", ["labels", "one-hot"])
def test_exact_from_margin_minus_80_to_80(form, num_classes):
    logits, labels = rows_with_margins(num_classes, np.linspace(-80, 80, 65))
    one_hot = np.eye(num_classes, dtype=np.float32)[labels]
    targets = labels if form == "labels" else one_hot
    mass = mass_of(as_targets(targets), num_classes, jnp.float32, None)
    cotangents = jnp.ones(65), jnp.zeros(65)
    loss, _, gradient, _ = exact(logits, one_hot, *cotangents)
    bounds = np.array([contract(z) for z in logits])
    normal = np.abs(gradient) >= TINY
    for answer in by_both(jnp.asarray(logits), mass, cotangents):
        losses, _, entries, _ = (np.asarray(x, np.float64) for x in answer)
        # Exponentials below the least normal number count as 0.
        assert np.all(np.abs(losses - loss) <= bounds * loss + num_classes * TINY)
        error = np.abs(entries - gradient)
        allowed = bounds[:, None] * np.abs(gradient) + num_classes * TINY
        assert np.all(error[normal] <= allowed[normal])
        assert np.all(np.abs(entries)[~normal] <= TINY)


@pytest.mark.parametrize("form", ["labels", "dense", "teacher"])
def test_one_class_has_no_loss(form):
    mass, masses = mass_of_form(form, 1, jnp.float32)
    logits = jnp.linspace(-100, 100, ROWS)[:, None]
    cotangents = jnp.ones(ROWS), jnp.full(ROWS, 2.0)
    for loss, lse, gradient, value in by_both(logits, mass, cotangents):
        for x in loss, value:
            np.testing.assert_array_equal(x, 0)
        np.testing.assert_array_equal(lse, logits[:, 0])
        total = np.asarray(masses).sum(-1, keepdims=True)
        np.testing.assert_allclose(gradient, np.full((ROWS, 1), 2.0), atol=1e-6 * total.max())


@pytest.mark.parametrize("form", ["labels", "dense"])
@pytest.mark.parametrize("num_classes", [11, 303])
def test_two_leaders_in_any_chunks(num_classes, form):
    first, second = (x[:: len(x) // 50] for x in np.triu_indices(num_classes, 1))
    rows = np.arange(len(first))
    logits = np.full((len(first), num_classes), -INF, np.float32)
    logits[:, ::2] = 1  # And some that are impossible.
    logits[rows, first] = logits[rows, second] = 3
    masses = np.eye(num_classes, dtype=np.float32)[first]
    mass = mass_of(
        as_targets(first if form == "labels" else masses), num_classes, jnp.float32, None
    )
    cotangents = jnp.ones(len(first)), jnp.zeros(len(first))
    loss, lse, gradient, size = exact(logits, masses, *cotangents)
    for answer in by_both(jnp.asarray(logits), mass, cotangents):
        np.testing.assert_allclose(answer[0], loss, rtol=1e-6)
        np.testing.assert_allclose(answer[1], lse, rtol=1e-6)
        assert np.all(np.abs(answer[2] - gradient) <= 1e-6 * size)


@pytest.mark.parametrize("form", mainly(FORMS, "labels", "dense", "smoothed", "teacher"))
def test_a_NaN_is_in_all_of_its_row_and_no_other(form):
    # XLA's maximum of a fused float32 reduction loses NaN (jaxlib 0.10.2), wherever it stands.
    mass, _ = mass_of_form(form, 1000, jnp.float32)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 1000)), jnp.float32)
    bad = logits
    for row, column in ((0, 0), (7, 100), (22, 999)):
        bad = bad.at[row, column].set(jnp.nan)
    cotangents = jnp.ones(ROWS), jnp.ones(ROWS)
    clean = by_both(logits, mass, cotangents)
    spoilt = np.isin(np.arange(ROWS), [0, 7, 22])
    for before, after in zip(clean, by_both(bad, mass, cotangents), strict=True):
        for x, y in zip(before, after, strict=True):
            assert np.isnan(y[spoilt]).all()
            np.testing.assert_array_equal(y[~spoilt], x[~spoilt])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_one_class_is_left_out_though_floats_do_not_count_that_far(dtype):
    x = np.random.default_rng(0).uniform(0.1, 1, (4, 5000)).astype(dtype)
    classes = np.array([0, 2049, 4097, 4999], np.int32)
    got = jax.jit(zero_at_class)(classes, x)
    np.testing.assert_array_equal(got, np.where(np.arange(5000) == classes[:, None], 0, x))


def test_a_long_sum_loses_no_digits():
    # Each addend rounded the same way is the worst that can happen to a sum: 50257 · exp(0.1).
    logits = jnp.full((20, 50257), 0.1, jnp.float32)
    for form in "labels", "smoothed", "dense":
        targets = target_forms(20, 50257)[form]
        mass = mass_of(as_targets(targets), 50257, jnp.float32, None)
        whole = jax.jit(passes.summarise, static_argnums=(2, 3))(logits, mass, False, "cpu")
        np.testing.assert_allclose(whole.loss / whole.mass, np.log(50257), rtol=3e-7)


def test_mass_however_small_on_an_impossible_class_costs_infinity():
    logits = jnp.array([[0.0, -INF, 3e38, -3e38], [0.0, -INF, 1.0, 2.0]])
    masses = jnp.array([[1.0, 0.0, 0.0, 0.0], [1.0, 2e-38, 0.0, 0.0]])
    mass = mass_of(masses, 4, jnp.float32, None)
    excess = passes.summarise(logits, mass, False, "portable").excess
    np.testing.assert_array_equal(excess, np.array([3e38, INF], np.float32))


FORCED = """
import jax, jax.numpy as jnp
import xentjax
jaxpr = jax.make_jaxpr(xentjax._softmax.passes.summarise, static_argnums=(2, 3))
labels = xentjax.SparseTargets(jnp.zeros((2, 1), int), jnp.ones((2, 1)))
mass = xentjax._targets.mass.mass_of(labels, 40000, jnp.float32, None)
print("reduce_window" in str(jaxpr(jnp.zeros((2, 40000)), mass, False, "cpu")))
"""


def test_an_environment_variable_forces_a_platform():
    for platform, has_windows in ("portable", False), ("cpu", True):
        env = os.environ | {"XENTJAX_BACKEND": platform}
        command = [sys.executable, "-c", FORCED]
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert run.stdout.split() == [str(has_windows)]


@pytest.mark.parametrize("form", ["prior", "weighted", "smoothed", "two backgrounds"])
def test_targets_may_be_constants_of_a_compiled_function(form):
    """YNNPACK ends the process over some constants (jaxlib 0.10.2): a share in every example."""
    targets = target_forms(16, 1000)[form]
    z = logits_of(1000, jnp.float32)[11:12] / 50 + jnp.arange(16, dtype=jnp.float32)[:, None]
    constant = jax.jit(
        jax.value_and_grad(lambda z: xentjax.softmax_cross_entropy(z, targets).sum())
    )
    as_value = jax.jit(lambda z: xentjax.softmax_cross_entropy(z, targets).sum())
    given = jax.jit(lambda z, t: xentjax.softmax_cross_entropy(z, t).sum())
    np.testing.assert_allclose(as_value(z), given(z, targets), rtol=1e-6)
    np.testing.assert_allclose(constant(z)[0], given(z, targets), rtol=1e-6)
