"""Information measures against mpmath at 50 digits, and against what both articles say."""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from cases import jit, mainly
from hypothesis import given, settings
from hypothesis import strategies as st

import xentjax

MP = mpmath.mp.clone()
MP.dps = 50

ROWS, CLASSES = 12, 7
# A term is a logarithm (1 ulp), a quotient or a product (½ ulp each); a sum of 7 adds 3 ulp.
ULPS = 8

ON_PROBABILITIES = {
    "entropy": xentjax.entropy,
    "cross_entropy": xentjax.cross_entropy,
    "kl_divergence": xentjax.kl_divergence,
    "js_divergence": xentjax.js_divergence,
}


ALL_MEASURES = {
    **ON_PROBABILITIES,
    "softmax_entropy": xentjax.softmax_entropy,
    "softmax_surprisal": xentjax.softmax_surprisal,
    "softmax_kl_divergence": xentjax.softmax_kl_divergence,
}


def of_all_measures(p, q, **options):
    return {
        name: measure(*arguments(name, p, q), **options) for name, measure in ALL_MEASURES.items()
    }


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


def distributions(seed, dtype):
    """Rows from nearly one-hot to nearly uniform; some entries 0, some as small as 1e-30."""
    rng = np.random.default_rng(seed)
    p = np.stack([rng.dirichlet(np.full(CLASSES, a)) for a in np.geomspace(0.1, 30, ROWS)])
    p[rng.random(p.shape) < 0.2] = 0
    p[:, 0] += 1e-3  # No row is all 0.
    p[::3, 1] = 10.0 ** -rng.integers(5, 30, len(p[::3]))
    return (p / p.sum(-1, keepdims=True)).astype(dtype)


def exact(x):
    return MP.mpf(float(x))


def terms_of(name, p, q=None):
    """Returns the terms of which the measure is the sum, for one row, at 50 digits."""

    def weighted_log(weight, numerator, denominator):
        """weight · log(numerator / denominator), with 0 · log 0 = 0."""
        if weight == 0:
            return MP.mpf(0)
        return weight * MP.log(numerator / denominator) if denominator else MP.inf

    p, q = [exact(x) for x in p], [exact(x) for x in (p if q is None else q)]
    if name in ("entropy", "cross_entropy"):
        return [weighted_log(a, 1, b) for a, b in zip(p, q, strict=True)]
    if name == "kl_divergence":
        return [weighted_log(a, a, b) for a, b in zip(p, q, strict=True)]
    halves = [(a, b, (a + b) / 2) for a, b in zip(p, q, strict=True)]
    return [weighted_log(x / 2, x, m) for a, b, m in halves for x in (a, b)]


def arguments(name, p, q):
    return (p,) if name in ("entropy", "softmax_entropy", "softmax_surprisal") else (p, q)


def assert_exact(name, got, *rows, ulps=ULPS):
    """Asserts that each row's error is small beside the sum of its terms' magnitudes."""
    eps = float(np.finfo(got.dtype).eps)
    for i, row in enumerate(zip(*rows, strict=True)):
        terms = terms_of(name, *row)
        want = MP.fsum(terms)
        if want == MP.inf:
            assert got[i] == np.inf
            continue
        size = MP.fsum(map(abs, terms))
        assert abs(exact(got[i]) - want) <= ulps * eps * size, (i, float(got[i]), float(want))


@pytest.mark.parametrize("name", ON_PROBABILITIES)
def test_measure_is_exact(name, dtype):
    p, q = distributions(0, dtype), distributions(1, dtype)
    args = arguments(name, p, q)
    got = ON_PROBABILITIES[name](*args)
    assert got.dtype == dtype
    assert_exact(name, np.asarray(got), *args)
    if name in ("cross_entropy", "kl_divergence"):
        assert np.isinf(got).any()
        assert np.isfinite(got).any()


def test_surprisal_is_exact(dtype):
    p = np.concatenate([np.geomspace(1e-37, 1, 50), 1 - np.geomspace(1e-7, 0.5, 50)]).astype(dtype)
    got = np.asarray(xentjax.surprisal(p))
    want = np.array([float(-MP.log(exact(x))) for x in p])
    np.testing.assert_allclose(got, want, rtol=2 * float(np.finfo(dtype).eps))
    assert got.dtype == dtype
    assert xentjax.surprisal(0.0) == np.inf


# The ratios cross every branch there could be: equal, an ulp apart, close, far, very far.
RATIOS = [1 + 2**-23, 1 - 2**-24, 1 + 1e-5, 1 - 1e-3, 0.9, 0.6, 0.4, 1.4, 1.6, 3.0, 1e4, 1e-12]


@pytest.mark.parametrize("name", ["kl_divergence", "js_divergence"])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-20])
def test_divergence_is_exact_however_near_or_far_p_is_from_q(name, size, dtype):
    """One term at a time: nothing can hide the error of a small one."""
    p = np.array([[size * r] for r in RATIOS], dtype)
    q = np.full_like(p, size)
    got = np.asarray(ON_PROBABILITIES[name](p, q))
    assert_exact(name, got, p, q)
    assert_exact(name, np.asarray(ON_PROBABILITIES[name](q, p)), q, p)


def test_js_divergence_of_near_distributions(dtype):
    """JS ≈ Σ (p − q)² / 8m: what is left after the first order of its terms cancels."""
    rng = np.random.default_rng(2)
    q = rng.dirichlet(np.full(CLASSES, 3.0), ROWS)
    p = q * (1 + 1e-3 * rng.standard_normal(q.shape))
    p, q = p.astype(dtype), q.astype(dtype)
    got = np.asarray(xentjax.js_divergence(p, q))
    assert_exact("js_divergence", got, p, q)
    assert (got >= 0).all()


def test_js_divergence_of_neighbours_is_not_negative():
    """Its square root is a metric, and must not be NaN."""
    p = np.array([[0.3, 0.7], [0.1, 0.9], [1.0, 0.0]], np.float32)
    q = np.nextafter(p, np.float32(0.5))
    assert (np.asarray(xentjax.js_divergence(p, q)) >= 0).all()


def test_equal_distributions_have_divergence_0(dtype):
    p = distributions(3, dtype)
    assert (np.asarray(xentjax.kl_divergence(p, p)) == 0).all()
    assert (np.asarray(xentjax.js_divergence(p, p)) == 0).all()


def test_base_changes_the_unit(dtype):
    p, q = distributions(4, dtype), distributions(5, dtype) + dtype.type(1e-3)
    eps = float(np.finfo(dtype).eps)

    def measured(base):
        return jit(lambda p, q: of_all_measures(p, q, base=base))(p, q)

    nats = measured(None)
    for base in (2, 10.0):
        for name, got in measured(base).items():
            want = np.asarray(nats[name]) / math.log(base)
            np.testing.assert_allclose(got, want, rtol=4 * eps, err_msg=name)
    np.testing.assert_allclose(xentjax.surprisal(q, base=2), -np.log2(q), rtol=4 * eps, atol=eps)


# What is true of 0: 0 · log 0 = 0, and possible things that were called impossible cost +inf.


def test_zero_times_log_of_zero_is_0(dtype):
    half, none = np.array([0.5, 0.5, 0.0], dtype), np.array([0.0, 1.0, 0.0], dtype)
    assert xentjax.entropy(none) == 0
    assert xentjax.cross_entropy(none, half) == -np.log(dtype.type(0.5))
    assert xentjax.cross_entropy(half, none) == np.inf
    assert xentjax.kl_divergence(none, half) == -np.log(dtype.type(0.5))
    assert xentjax.kl_divergence(half, none) == np.inf
    assert np.isfinite(xentjax.js_divergence(half, none))
    nothing = np.zeros(3, dtype)
    for name, measure in ON_PROBABILITIES.items():
        assert measure(*arguments(name, nothing, nothing)) == 0


def gradients_of(name, p, q):
    """Returns the true derivatives to p and q of one entry; None where there is none."""
    p, q = exact(p), exact(q)
    m = (p + q) / 2

    def log(a, b):
        return MP.log(a / b) if a and b else None

    if name == "entropy":
        return (-MP.log(p) - 1 if p else None,)
    if name == "cross_entropy":
        return log(1, q), -p / q if q else None
    if name == "kl_divergence":
        ratio = log(p, q)
        return None if ratio is None else ratio + 1, -p / q if q else None
    half = [log(x, m) for x in (p, q)]
    return tuple(None if x is None else x / 2 for x in half)


@pytest.mark.parametrize("name", ON_PROBABILITIES)
def test_gradient_is_right_where_there_is_one_and_finite_elsewhere(name, dtype):
    p, q = distributions(6, dtype), distributions(7, dtype)
    q = np.where((p > 0) & (q == 0), dtype.type(0.01), q)  # Elsewhere the loss is +inf.
    assert ((p == 0) & (q > 0)).any()
    assert ((p == 0) & (q == 0)).any()
    args = arguments(name, p, q)
    measure = ON_PROBABILITIES[name]
    got = jax.grad(lambda *a: measure(*a).sum(), argnums=range(len(args)))(*args)
    eps = float(np.finfo(dtype).eps)
    for i in np.ndindex(p.shape):
        truths = gradients_of(name, p[i], q[i])
        for g, truth in zip(got, truths, strict=True):
            assert np.isfinite(g[i]), (name, p[i], q[i])
            if truth is not None:  # The 1 is the derivative of what stands outside the log.
                error = abs(exact(g[i]) - truth)
                assert error <= ULPS * eps * (1 + abs(truth)), (p[i], q[i], float(g[i]))


def test_gradient_at_the_impossible():
    """d cross_entropy / dp at p = 0 is −log q, not 0: the class costs nothing yet, but would."""
    p, q = jnp.array([0.0, 1.0]), jnp.array([0.25, 0.75])
    to_p, to_q = jax.grad(xentjax.cross_entropy, argnums=(0, 1))(p, q)
    np.testing.assert_allclose(to_p, [math.log(4), -math.log(0.75)], rtol=2e-7)
    np.testing.assert_allclose(to_q, [0, -1 / 0.75], rtol=2e-7)


# Small probabilities, whose squares are no float32.

SMALL = np.array([1e-37, 1e-30, 1e-20, 1e-20, 1e-10, 1.0, 0.5], np.float32)
RATIO = np.array([1.25, 3.0, 0.8, 1e-3, 1.0 + 1e-6, 0.6, 1e-19], np.float32)


def slopes_of(name, p, q):
    """Returns the true first derivatives to (p, q), and the second to (pp, pq, qq), of a term."""
    log, m = MP.log, p + q
    if name == "cross_entropy":
        return (-log(q), -p / q), (0, -1 / q, p / q**2)
    if name == "kl_divergence":
        return (log(p / q) + 1, -p / q), (1 / p, -1 / q, p / q**2)
    first = log(2 * p / m) / 2, log(2 * q / m) / 2
    return first, (q / (2 * p * m), -1 / (2 * m), p / (2 * q * m))


@pytest.mark.parametrize(
    "name",
    mainly(["cross_entropy", "kl_divergence", "js_divergence"], "kl_divergence", "js_divergence"),
)
def test_derivatives_at_small_probabilities(name):
    """The derivative of a quotient a / b divides by b², which underflows here; in a loop too."""
    p, q = SMALL, SMALL * RATIO
    measure = ON_PROBABILITIES[name]

    def total(p, q):
        return jax.lax.map(lambda x: measure(*x), (p[:, None], q[:, None])).sum()

    @jit
    def every(p, q):
        forward_over_forward = jax.jacfwd(jax.jacfwd(total, (0, 1)), (0, 1))
        reverse_over_reverse = jax.jacrev(jax.jacrev(total, (0, 1)), (0, 1))
        modes = jax.grad(total, (0, 1)), forward_over_forward, reverse_over_reverse
        return [mode(p, q) for mode in modes]

    first, *seconds = every(p, q)
    sum_of_terms = float(name == "kl_divergence")  # Its derivative to p is log(p / q) + 1.
    for i in range(len(p)):
        slopes, curvatures = slopes_of(name, exact(p[i]), exact(q[i]))
        for got, want in zip(first, slopes, strict=True):
            assert abs(exact(got[i]) - want) <= 8e-7 * (abs(want) + sum_of_terms), (p[i], got[i])
        for (pp, pq), (_, qq) in seconds:
            for got, want in zip((pp, pq, qq), map(float, curvatures), strict=True):
                if abs(want) < 1e38:  # A larger one has a step beyond float32 on its way.
                    np.testing.assert_allclose(got[i, i], want, rtol=2e-6, err_msg=f"{p[i]}")


def test_third_derivative_of_js_divergence_along_a_line():
    p, q, to_p, to_q = np.array([[0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [1, 2, 0.5], [-0.7, 1, 0.1]])

    def along(measure):
        return lambda s: measure(p + s * to_p, q + s * to_q)

    def truth(p, q):
        pairs = [(a, b, (a + b) / 2) for a, b in zip(p, q, strict=True)]
        return MP.fsum(a * MP.log(a / m) + b * MP.log(b / m) for a, b, m in pairs) / 2

    third = along(xentjax.js_divergence)
    for _ in range(3):
        third = jax.jacfwd(third)
    with jax.enable_x64(True):
        got = jit(third)(0.0)
    np.testing.assert_allclose(got, float(MP.diff(along(truth), 0, 3)), rtol=1e-9)


def test_js_divergence_of_confident_softmaxes():
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            p, q = jax.nn.softmax(np.array([[0.0, 46.0], [0.3, 46.0]], dtype))
            for mode in (lambda f: f, jit):
                value, gradients = mode(jax.value_and_grad(xentjax.js_divergence, (0, 1)))(p, q)
                want = sum(terms_of("js_divergence", p, q))
                # The large outcomes are equal as floats, so the small ones make the value.
                np.testing.assert_allclose(float(value), float(want), rtol=4e-6)
                for i, (x, y) in enumerate(zip(p, q, strict=True)):
                    truths = gradients_of("js_divergence", x, y)
                    for g, truth in zip(gradients, truths, strict=True):
                        np.testing.assert_allclose(float(g[i]), float(truth), rtol=1e-6)


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_strict_settings(dtype, x64):
    """The same dtypes whatever the switches, an empty batch among the shapes."""
    with (
        jax.enable_x64(x64),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        for shape in [(2, 3), (0, 3)]:
            p, q = jnp.full(shape, 0.25, dtype), jnp.full(shape, 0.5, dtype)

            def total(p, q):
                measured = of_all_measures(p, q, base=2.0)
                assert {x.dtype for x in measured.values()} == {jnp.dtype(jnp.float32)}
                return sum(x.sum() for x in measured.values())

            gradients = jax.eval_shape(jax.grad(total, (0, 1)), p, q)
            assert {g.dtype for g in gradients} == {jnp.dtype(dtype)}


# Laws.

weights = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-12, 1.0)), min_size=CLASSES, max_size=CLASSES
).filter(lambda x: sum(x) > 0)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(weights, weights)
def test_inequalities(p, q):
    with jax.enable_x64(True):
        p, q = (np.array(x) / np.sum(x) for x in (p, q))
        # Masses that sum to 1 but for rounding leave that much of Gibbs' inequality.
        slack = 4 * CLASSES * float(np.finfo(np.float64).eps)
        entropy, js = float(xentjax.entropy(p)), float(xentjax.js_divergence(p, q))
        assert 0 <= entropy <= math.log(CLASSES) + slack
        assert xentjax.cross_entropy(p, q) >= entropy * (1 - slack) - slack
        assert xentjax.kl_divergence(p, q) >= -slack
        assert 0 <= js <= math.log(2) * (1 + slack)
        assert js == xentjax.js_divergence(q, p)


def test_divergence_is_cross_entropy_less_entropy(dtype):
    p, q = distributions(8, dtype), distributions(9, dtype) + dtype.type(1e-3)
    got = xentjax.kl_divergence(p, q)
    want = xentjax.cross_entropy(p, q) - xentjax.entropy(p)
    np.testing.assert_allclose(got, want, rtol=0, atol=32 * float(np.finfo(dtype).eps))


def test_perplexity_counts_equally_likely_outcomes(dtype):
    for n in (1, 2, 6, 60):
        p = np.where(np.arange(60) < n, 1 / n, 0).astype(dtype)
        # n terms near log(n) / n are added, and exp makes the error a relative one.
        got = xentjax.perplexity(xentjax.entropy(p))
        np.testing.assert_allclose(got, n, rtol=(n + 4) * float(np.finfo(dtype).eps))
    assert xentjax.perplexity(dtype.type(np.inf)) == np.inf


@pytest.mark.parametrize("axis", mainly([0, (2, 0), (1, -1), "all"], (2, 0), "all"))
def test_axis_may_be_several(axis):
    rng = np.random.default_rng(10)
    p, q = rng.random((2, 2, 3, 4)).astype(np.float32)
    axis = [0, 1, 2] if axis == "all" else axis  # A list too.
    axes = (axis,) if isinstance(axis, int) else tuple(axis)

    def rows(x):
        """The same outcomes on one last axis."""
        x = np.moveaxis(x, axes, range(-len(axes), 0))
        return x.reshape(*x.shape[: x.ndim - len(axes)], -1)

    got = jit(lambda p, q: of_all_measures(p, q, axis=axis))(p, q)
    want = jit(of_all_measures)(rows(p), rows(q))
    assert got["softmax_surprisal"].shape == p.shape
    got["softmax_surprisal"] = rows(got["softmax_surprisal"])
    for name, measured in got.items():  # The order of a sum differs, its terms are O(1).
        np.testing.assert_allclose(measured, want[name], rtol=1e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("low", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_read_as_it_is_and_computed_in_float32(low):
    p, q = (jnp.asarray(distributions(s, np.float32) + 0.01, low) for s in (11, 12))
    for name, measure in ON_PROBABILITIES.items():
        args = arguments(name, p, q)
        got = measure(*args)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, measure(*(x.astype(jnp.float32) for x in args)))
    assert xentjax.surprisal(p).dtype == jnp.float32
    assert xentjax.perplexity(p).dtype == jnp.float32
