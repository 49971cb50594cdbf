"""Guards on arguments, with one voice for errors: which argument, what was expected, what came."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike


def as_array(name: str, x: Any, what: str = "a floating-point array") -> jax.Array:
    """Returns `x` as a jax array, or raises a TypeError that names the argument."""
    if isinstance(x, jax.Array):
        return x
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name}: expected {what}, got {x!r}") from None


def check_floating(name: str, x: jax.Array) -> None:
    """Raises TypeError unless `x` is an array of floats of 16 bits or more."""
    expected = f"{name}: expected a floating-point array"
    _guard(
        chex.assert_type, x, jnp.floating, error=lambda: TypeError(f"{expected}, got {describe(x)}")
    )
    if x.dtype.itemsize < 2:
        raise TypeError(f"{expected} of 16 bits or more, got {describe(x)}")


def check_bool(name: str, x: jax.Array) -> None:
    """Raises TypeError unless `x` is a mask."""
    expected = f"{name}: expected a bool array"
    _guard(chex.assert_type, x, bool, error=lambda: TypeError(f"{expected}, got {describe(x)}"))


def check_shape(name: str, x: jax.Array, shape: Sequence[int], why: str) -> None:
    """Raises ValueError unless `x` has exactly `shape`; nothing broadcasts."""
    shape = tuple(shape)
    expected = f"{name}: expected shape {shape} ({why})"
    _guard(chex.assert_shape, x, shape, error=lambda: ValueError(f"{expected}, got {describe(x)}"))


def _guard(assertion: Callable[..., None], *args: Any, error: Callable[[], Exception]) -> None:
    """Raises `error()`, and nothing of chex's own words, unless an assertion of chex holds."""
    try:
        assertion(*args)
    except AssertionError:
        raise error() from None


def check(condition: bool, message: str, exception_type: type[Exception] = ValueError) -> None:
    """Raises `exception_type(message)` unless a condition known at trace time holds."""
    if not condition:
        raise exception_type(message)


def check_callable(name: str, x: Any) -> None:
    """Raises TypeError unless `x` can be called."""
    check(callable(x), f"{name}: expected a function, got {x!r}", TypeError)


def check_flag(name: str, x: Any) -> None:
    """Raises TypeError unless `x` is True or False, known at trace time."""
    is_flag = isinstance(x, bool | np.bool_)
    check(is_flag, f"{name}: expected True or False, got {x!r}", TypeError)


def canonical_axes(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Returns `axis` as a tuple of distinct non-negative ints; raises TypeError or ValueError."""
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    check(
        all(is_int(a) for a in axes),
        f"axis: expected an int or a tuple of ints, got {axis!r}",
        TypeError,
    )
    check(ndim > 0, f"axis: expected an array that has axes, got a scalar beside axis {axis!r}")
    check(
        len(axes) > 0 and all(-ndim <= a < ndim for a in axes),
        f"axis: expected ints in [{-ndim}, {ndim}) for an array of rank {ndim}, got {axis!r}",
    )
    axes = tuple(int(a) % ndim for a in axes)
    check(len(set(axes)) == len(axes), f"axis: expected distinct axes, got {axis!r}")
    return axes


def check_interval(name: str, x: Any, low: float, high: float) -> None:
    """Raises ValueError where a concrete `x` is not finite or leaves [low, high].

    A traced `x` is not looked at.
    """
    if isinstance(x, float | int):
        inside = low <= x <= high and math.isfinite(x)
    elif isinstance(x, Tracer):
        return
    else:
        values = np.asarray(x, dtype=np.float64)
        inside = bool(np.all(np.isfinite(values) & (values >= low) & (values <= high)))
    check(inside, f"{name}: expected values in [{low:g}, {high:g}], got {x}")


def as_positive(name: str, x: Any) -> jax.Array:
    """Returns a scalar in [1e-30, 1e30] as an array of floats; a traced one is not looked at.

    Quotients by it are then far from overflow, and from numbers that XLA's CPU code flushes to 0.
    """
    kind = "a positive number from 1e-30 to 1e30"
    return _as_scalar(name, x, kind, lambda value: 1e-30 <= value <= 1e30)


def as_nonnegative(name: str, x: Any) -> jax.Array:
    """Returns a finite scalar ≥ 0 as an array of floats; a traced one is not looked at."""
    return _as_scalar(name, x, "a number of at least 0", lambda value: 0 <= value < math.inf)


def _as_scalar(name: str, x: Any, kind: str, is_right: Callable[[float], bool]) -> jax.Array:
    expected = f"{name}: expected {kind}"
    x = float(x) if is_int(x) else x
    scalar = as_array(name, x, kind)
    check(
        jnp.issubdtype(scalar.dtype, jnp.floating) or jnp.issubdtype(scalar.dtype, jnp.integer),
        f"{expected}, got {x!r}",
        TypeError,
    )
    check(scalar.shape == (), f"{expected}, got {describe(scalar)}")
    if not isinstance(x, Tracer):  # In a trace, the array of a number is traced.
        check(is_right(float(np.asarray(x))), f"{expected}, got {x}")
    return scalar if jnp.issubdtype(scalar.dtype, jnp.floating) else scalar.astype(jnp.float32)


def is_int(x: Any) -> TypeGuard[int]:
    """Returns whether `x` is an integer of Python or NumPy, and no bool."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def as_mask(
    where: ArrayLike, batch: tuple[int, ...], shape: tuple[int, ...], classes: str
) -> jax.Array:
    """Returns `where` as an array: bool, of examples (`batch`) or of `classes` (`shape`)."""
    mask = as_array("where", where, "a bool array")
    check_bool("where", mask)
    check(
        mask.shape in (batch, shape),
        f"where: expected shape {batch} (a mask of examples) or {shape} (a mask of {classes}), "
        f"got {mask.shape}",
    )
    return mask


def check_known(name: str, size: Any, counted: str) -> None:
    """Refuses a size that `jax.export` knows by name alone, where sums depend on it."""
    check(isinstance(size, int), f"{name}: expected a known number of {counted}, got {size}")


def describe(x: Any) -> str:
    """Returns the dtype and shape of an array, as errors have them."""
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    return f"{_name_of(dtype)}{list(jnp.shape(x))}"


@functools.cache
def _name_of(dtype):
    """Returns the name of a dtype; NumPy takes microseconds to make it, in every eager call."""
    return str(dtype)
