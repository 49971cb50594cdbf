"""The arithmetic against mpmath: values, and derivatives to the order that its losses need."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from cases import jit

from xentjax._jax import arithmetic

MP = mpmath.mp.clone()
MP.dps = 50
SIZES = [1e-36, 3e-20, 1e-9, 0.03, 0.7, 1.0, 1.9, 40.0, 6e8, 2e20, 3e37]
NEAR = [-0.4, -1e-3, -1e-6, 0.0, 1e-6, 1e-3, 0.4, 0.6, 3.0]


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


def assert_exact(actual, exact, dtype, ulps=4):
    """Asserts a relative error of at most so many ulps, against numbers of mpmath."""
    for got, want in zip(np.ravel(actual), exact, strict=True):
        bound = ulps * MP.mpf(float(np.finfo(dtype).eps)) * abs(want)
        assert abs(MP.mpf(float(got)) - want) <= bound, (got, want)


def numbers(x):
    return [MP.mpf(float(each)) for each in np.ravel(x)]


def test_log_ratio(dtype):
    p = np.repeat(SIZES, len(NEAR) + 4).astype(dtype)
    near = [1 + d for d in NEAR] + [1e-35, 1e-12, 1e12, 1e35]
    q = np.clip(p * np.tile(near, len(SIZES)), 1e-37, 3e38).astype(dtype)
    exact = [MP.log(a / b) for a, b in zip(numbers(p), numbers(q), strict=True)]
    assert_exact(jit(arithmetic.log_ratio)(p, q), exact, dtype, ulps=2)


def test_log1p(dtype):
    x = np.array([-0.99, -0.5, -1e-4, -1e-12, 1e-30, 1e-10, 3e-5, 0.5, 7, 1e9, 1e30], dtype)
    derivative = jax.grad(arithmetic.log1p)
    every = jit(jax.vmap(lambda x: (arithmetic.log1p(x), derivative(x), jax.grad(derivative)(x))))
    value, slope, bend = every(x)
    exact = [MP.log1p(v) for v in numbers(x)]
    assert_exact(value, exact, dtype)
    assert_exact(slope, [1 / (1 + v) for v in numbers(x)], dtype)
    assert_exact(bend[:-1], [-1 / (1 + v) ** 2 for v in numbers(x[:-1])], dtype)
    ends = arithmetic.log1p(jnp.array([-1, 0, np.inf, -2, np.nan], dtype))
    np.testing.assert_array_equal(ends, [-np.inf, 0, np.inf, np.nan, np.nan])


def test_exp_less_line(dtype):
    """Its alternating series loses what is lost at d = −1: a few ulps."""
    d = np.array([-60, -1.5, -1, -0.999, -0.3, -1e-5, 1e-12, 1e-3, 0.5, 0.999, 1, 2, 60], dtype)
    exact = [MP.expm1(v) - v for v in numbers(d)]
    assert_exact(jit(arithmetic.exp_less_line)(d), exact, dtype, ulps=8)
    assert arithmetic.exp_less_line(jnp.zeros((), dtype)) == 0
    slopes = jit(jax.vmap(jax.grad(arithmetic.exp_less_line)))
    assert_exact(slopes(d), [MP.expm1(v) for v in numbers(d)], dtype, ulps=8)
    np.testing.assert_array_equal(slopes(np.array([-1e4, -1e30], dtype)), [-1, -1])


def test_quotient_and_its_derivatives(dtype):
    a, b = np.array([1e-30, 3, 2e8, 5], dtype), np.array([1e-30, 1e-25, -7e15, 3], dtype)
    slopes = jit(jax.vmap(jax.value_and_grad(arithmetic.quotient, (0, 1))))
    value, (by_a, by_b) = slopes(a, b)
    pairs = list(zip(numbers(a), numbers(b), strict=True))
    assert_exact(value, [x / y for x, y in pairs], dtype)
    assert_exact(by_a, [1 / y for _, y in pairs], dtype)
    pick = [0, 2, 3]  # 3e50 is no float32.
    assert_exact(by_b[np.array(pick)], [-pairs[i][0] / pairs[i][1] ** 2 for i in pick], dtype)


def test_inverse_scale_is_a_power_of_two_that_makes_1_to_2_of_a_number(dtype):
    x = np.array([*SIZES, -3e-20, np.finfo(dtype).tiny, np.finfo(dtype).max], dtype)
    scale = np.asarray(arithmetic.inverse_scale(x))
    assert (np.frexp(scale)[0] == 0.5).all()
    scaled = np.abs(x.astype(np.longdouble) * scale)
    assert ((scaled[:-1] >= 1) & (scaled[:-1] < 2)).all()
    assert 2 <= scaled[-1] < 4


def derivatives(function, order, x):
    """Returns [function(x), …, its derivative of an order] at each x."""
    functions = [function]
    for _ in range(order):
        functions.append(jax.grad(functions[-1]))
    return jit(lambda x: [jax.vmap(f)(x) for f in functions])(x)


def test_p_log_x_has_four_derivatives_at_small_x(dtype):
    """Where p = 1e-18 · x, whose plain derivatives square 1 / x on their way."""
    x = np.array([2e-18, 1e-9, 0.3, 1.0, 5e3], dtype)
    for p in (1e-18, 0.7):
        got = derivatives(lambda x, p=p: arithmetic.times_log(jnp.asarray(p, dtype), x), 4, x)
        share = MP.mpf(float(dtype.type(p)))
        for order, factor in [(1, 1), (2, -1), (3, 2), (4, -6)]:
            want = [share * factor / v**order for v in numbers(x)]
            pick = [i for i, w in enumerate(want) if 1e-30 < abs(w) < 1e37]
            assert_exact(np.asarray(got[order])[pick], [want[i] for i in pick], dtype, ulps=8)
        assert_exact(got[0], [share * MP.log(v) for v in numbers(x)], dtype)
    by_p = jax.grad(arithmetic.times_log)(jnp.asarray(0.7, dtype), jnp.asarray(0.3, dtype))
    assert_exact(by_p, [MP.log(MP.mpf(float(dtype.type(0.3))))], dtype)


def test_p_log_x_at_the_ends(dtype):
    p, x = (jnp.array(v, dtype) for v in ([0.5, 0.5, 0.5, 0.0], [0.0, np.inf, np.nan, 1.0]))
    np.testing.assert_array_equal(arithmetic.times_log(p, x), [-np.inf, np.inf, np.nan, 0])


def test_what_x_log_x_has_from_the_third_order_on(dtype):
    x = np.array([1e-12, 1e-4, 0.3, 1.0, 70.0], dtype)
    got = derivatives(arithmetic.times_log_excess, 4, x)
    np.testing.assert_array_equal(got[:3], np.zeros((3, len(x))))
    assert_exact(got[3], [-1 / v**2 for v in numbers(x)], dtype, ulps=8)
    pick = slice(1, None)  # 2e36 loses nothing, but 1 / x³ is near the end of float32.
    assert_exact(got[4][pick], [2 / v**3 for v in numbers(x[pick])], dtype, ulps=8)


def test_relative_growth_is_0_with_the_slope_1_over_x(dtype):
    x = np.array([*SIZES, -1e-20], dtype)
    value, slope = derivatives(arithmetic.relative_growth, 1, x)
    np.testing.assert_array_equal(value, np.zeros(len(x)))
    assert_exact(slope, [1 / v for v in numbers(x)], dtype)
    assert jax.grad(arithmetic.relative_growth)(jnp.zeros((), dtype)) == 0


def test_an_addition_loses_48_bits_of_what_is_added_or_72_of_the_sum():
    rng = np.random.default_rng(0)
    terms = (rng.random(200) * 10.0 ** rng.integers(-6, 2, 200)).astype(np.float32)
    add, zero = jit(arithmetic.add_expansions), jnp.zeros((), jnp.float32)
    for start in (0.0, 2.0**40):
        parts, exact, allowed = (jnp.float32(start), zero, zero), Fraction(start), Fraction(0)
        for x in terms:
            parts = add(parts, (jnp.asarray(x), zero, zero))
            exact += Fraction(float(x))
            allowed += Fraction(float(x)) / 2**47 + exact / 2**71
            assert abs(parts[1]) <= 2.0**-24 * abs(parts[0])
        assert abs(sum(Fraction(float(part)) for part in parts) - exact) <= allowed


def test_the_error_of_a_sum_that_is_not_finite_is_0(dtype):
    total, error = arithmetic.two_sum(jnp.asarray(np.inf, dtype), jnp.ones((), dtype))
    assert (total, error) == (np.inf, 0)
