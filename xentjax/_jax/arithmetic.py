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


def log(x: jax.Array) -> jax.Array:
    """Returns log x.

    log x = log c + log1p((x − c) / c): the second derivative of the plain logarithm divides by x².
    """
    regular = (x > 0) & jnp.isfinite(x)
    positive = jnp.where(regular, x, 1)
    near_c = jnp.log(jax.lax.stop_gradient(positive)) + log_growth(positive)
    return jnp.where(regular, near_c, jnp.log(jnp.where(regular, 1, x)))


def log_growth(x: jax.Array) -> jax.Array:
    """Returns log(x / c) = log1p((x − c) / c) at c = x: 0, with the derivatives of log x > 0."""
    c = jax.lax.stop_gradient(x)
    return jnp.log1p(quotient(x - c, c))


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
