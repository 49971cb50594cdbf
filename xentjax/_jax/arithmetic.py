"""Arithmetic that rounds once, and whose derivatives are right to every order as they stand.

A constant c stands for the value of x at which something is differentiated. Each formula below is
the same function of x whatever c is, so that its plain derivatives are right, in a loop too; and at
c = x no derivative squares a small number on its way.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a / b, for b ≠ 0.

    a / b = (a · s) / (b · s), where s is a power of two near 1 / b: the derivative of the plain
    quotient divides by b², which underflows where b is small. Nor may s be a quotient: XLA makes
    a / (b · c) of a / b / c (jaxlib 0.10.2).
    """
    s = inverse_scale(b)
    return (a * s) / (b * s)


def inverse_scale(x: jax.Array) -> jax.Array:
    """Returns the power of two, a constant, that takes x into [1, 2), or to [2, 4) if x is huge."""
    info = jnp.finfo(x.dtype)
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    exponent = jax.lax.bitcast_convert_type(jnp.abs(x), integer) >> info.nmant
    inverse = jnp.clip(2 * (info.maxexp - 1) - exponent, 1, 2 * (info.maxexp - 1))
    return jax.lax.bitcast_convert_type(inverse << info.nmant, x.dtype)


def times_log(p: jax.Array, x: jax.Array) -> jax.Array:
    """Returns p · log x.

    p · log x = p · log c + p · log(x / c)
    """
    regular = (x > 0) & jnp.isfinite(x)
    positive = jnp.where(regular, x, 1)
    near_c = p * jnp.log(jax.lax.stop_gradient(positive)) + times_log_growth(p, positive)
    return jnp.where(regular, near_c, p * jnp.log(jnp.where(regular, 1, x)))


def times_log_growth(p: jax.Array, x: jax.Array) -> jax.Array:
    """Returns p · log(x / c) at c = x: 0, with the derivatives of p · log x > 0.

    With e = (x − c) / c it is Σ_n (−1)ⁿ⁺¹ / n · p · eⁿ. The second derivative of the plain
    logarithm is 1 / x², which is no float32 for x = 1e-20; here each power has p in it. Four terms
    give four derivatives.
    """
    return _power_series(p, relative_growth(x), [1, -1 / 2, -2 / 3, -3 / 4])


def times_log_excess(x: jax.Array) -> jax.Array:
    """Returns x · log(x / c) − (x − c) − (x − c)² / 2c at c = x: 0, from the third derivative on.

    With e = (x − c) / c it is Σ_n (−1)ⁿ⁺¹ / (n (n + 1)) · (x − c) · eⁿ from n = 2.
    """
    growth = relative_growth(x)
    change = x - jax.lax.stop_gradient(x)
    return _power_series(change * growth, growth, [-1 / 6, -2 / 4])


def relative_growth(x: jax.Array) -> jax.Array:
    """Returns (x − c) / c at c = x: 0, with the derivative 1 / x, beside small factors too."""
    c = jax.lax.stop_gradient(x)
    normal = jnp.abs(c) >= jnp.finfo(c.dtype).tiny  # XLA's CPU code makes 0 of others (0.10.2).
    scale = inverse_scale(c)
    return jnp.where(normal, (x - c) / jnp.where(normal, c * scale, 1) * scale, 0)


def _power_series(first, e, ratios):
    """Returns Σ_n first · (ratios_1 · e) · … · (ratios_n · e): each power is of the one before."""
    power, total = first, jnp.zeros_like(first)
    for ratio in ratios:
        power = power * (ratio * e)
        total = total + power
    return total


def exp_less_line(d: jax.Array) -> jax.Array:
    """Returns exp(d) − 1 − d = d²/2 · (1 + d/3 · (1 + d/4 · (…))), without cancelling."""
    near = jnp.abs(d) < 1
    small = jnp.where(near, d, 0)
    terms = 20 if d.dtype == jnp.float64 else 12
    series = jnp.ones_like(d)
    for n in range(terms, 2, -1):
        series = 1 + small / n * series
    return jnp.where(near, small * small / 2 * series, jnp.exp(jnp.where(near, 0, d)) - 1 - d)


def log_ratio(p: jax.Array, q: jax.Array) -> jax.Array:
    """Returns log(p / q) of positive numbers, to full relative precision where p is near q.

    It is not made to be differentiated.
    """
    scale = inverse_scale(jnp.maximum(p, q))
    p, q = p * scale, q * scale
    near = jnp.abs(p - q) < q / 2
    change = jnp.where(near, p - q, 0) / jnp.where(near, q, 1)
    # One quotient loses less than two logarithms, if it is in range.
    in_range = (p < 1e30 * q) & (q < 1e30 * p)
    ratio = jnp.where(in_range, p, 1) / jnp.where(in_range, q, 1)
    far = jnp.where(in_range, jnp.log(ratio), jnp.log(p) - jnp.log(q))
    return jnp.where(near, log1p(change), far)


def log1p(x: jax.Array) -> jax.Array:
    """Returns log(1 + x), which XLA's CPU backend (jaxlib 0.10.2) has to 9 digits in float64.

    log(1 + x) = log y + log1p((x − (y − 1)) / y), where y is 1 + x as it is rounded (Kahan).
    """
    y = jax.lax.stop_gradient(1 + x)
    regular = (y > 0) & jnp.isfinite(y)
    y = jnp.where(regular, y, 1)
    change = (jnp.where(regular, x, 0) - (y - 1)) / y
    return jnp.where(regular, jnp.log(y) + jnp.log1p(change), jnp.log1p(jnp.where(regular, 0, x)))


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a + b as it is rounded, and the error of that, which is a constant (Knuth).

    The error is 0 where the sum is not finite.
    """
    total = a + b
    share_of_b = total - a
    error = (a - (total - share_of_b)) + (b - share_of_b)
    return total, jax.lax.stop_gradient(jnp.where(jnp.isfinite(total), error, 0))


def add_expansions(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Adds two expansions: numbers as sums of parts, each below the rounding of the one before it.

    Three parts of float32 hold 72 bits. Each part of b goes up through the parts of a (Shewchuk,
    1997, grow-expansion); the two smallest errors become one.
    """
    parts = list(a)
    for x in reversed(b):
        total, errors = x, []
        for part in reversed(parts):
            total, error = two_sum(total, part)
            errors.append(error)
        parts = [total, *reversed(errors)]
        parts = [*parts[:-2], parts[-2] + parts[-1]]
    return tuple(parts)
