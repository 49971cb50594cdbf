"""One switch for all checks of values: labels, masses, probabilities, weights, and no NaN.

Off, none of them leaves an operation in a program. On, each is an error that names the argument,
the value and its position: at once where there are values, and by `checkify` in a trace.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from xentjax._jax.check_primitive import check_values
from xentjax._jax.dtypes import wide, wide_dtype

_are_on = contextvars.ContextVar("value_checks", default=False)


@contextlib.contextmanager
def value_checks() -> Iterator[None]:
    """Makes values that have no meaning an error that names the argument, position and value.

    It checks that labels are in [0, V); that target masses, class weights and weights are ≥ 0; that
    probabilities and binary targets are in [0, 1], and distributions sum to 1; that logits are
    below +inf; and that neither they nor the inputs, kernel and bias of a head are NaN. It does not
    look at values that `where` drops. Without it, such labels give NaN, other values count as they
    are, and nothing is spent: compiled programs are the same.

    In a compiled function (`jax.jit`, `jax.shard_map`, the body of `jax.lax.scan`) a check is one
    of `jax.experimental.checkify`, and an error without it. Write
    `error, value = checkify.checkify(jax.jit(f))(...)`, and then `error.throw()`. In a `shard_map`
    it takes a mesh of automatic axes, and a loop that is differentiated in reverse drops the checks
    in its body, so check the value (both jax 0.10.2). Functions that were compiled before
    the switch was on stay as they were.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> with xentjax.value_checks():
      ...     xentjax.softmax_cross_entropy(jnp.zeros((2, 3)), jnp.array([0, 7]))
      Traceback (most recent call last):
        ...
      jax._src.checkify.JaxRuntimeError: targets: expected labels in [0, 3), got 7 at...
    """
    token = _are_on.set(True)
    try:
        yield
    finally:
        _are_on.reset(token)


def are_on() -> bool:
    """Returns whether the caller is inside `value_checks`."""
    return _are_on.get()


def check_labels(labels: jax.Array, num_classes: int, where: jax.Array | None) -> None:
    """Checks that labels [..., K] are in [0, V), where examples [...] are kept."""
    if are_on():
        bad = (labels < 0) | (labels >= num_classes)
        _check("targets", f"labels in [0, {num_classes})", labels, bad, where, axes=-1)


def check_masses(name: str, x: jax.Array, where: jax.Array | None = None) -> None:
    """Checks that masses or weights are ≥ 0, finite, and no NaN."""
    if are_on():
        bad = ~((x >= 0) & jnp.isfinite(x.astype(wide_dtype(x.dtype))))
        _check(name, "finite values of at least 0", x, bad, where)


def check_probabilities(name: str, x: jax.Array, where: jax.Array | None = None) -> None:
    """Checks that probabilities are in [0, 1], and no NaN."""
    if are_on():
        _check(name, "values in [0, 1]", x, ~((x >= 0) & (x <= 1)), where)


def check_distributions(name: str, x: jax.Array, axes: Sequence[int]) -> None:
    """Checks that probabilities are in [0, 1] and sum to 1 over `axes`.

    A sum may be off by 1e-4, and by two roundings of a number in the dtype of x.
    """
    if not are_on():
        return
    check_probabilities(name, x)
    total = wide(x).sum(tuple(axes))
    tolerance = 1e-4 + 2 * float(jnp.finfo(x.dtype).eps)
    _check(name, "probabilities that sum to 1", total, ~(jnp.abs(total - 1) <= tolerance), None)


def check_one_class(name: str, x: jax.Array) -> None:
    """Checks that masses [..., V] are not those of several labels, each a yes: 0 and 1 alone."""
    if are_on() and x.shape[-1] > 0:
        total = wide(x).sum(-1)
        bad = ((x == 0) | (x == 1)).all(-1) & (total >= 2)
        wanted = "masses of one class out of many (smooth_binary_labels is for yes or no)"
        _check(name, wanted, total, bad, None)


def check_logits(x: jax.Array, where: jax.Array | None, name: str = "logits") -> None:
    """Checks that logits are below +inf, and no NaN; a class of logit −inf is impossible."""
    if are_on():
        _check(name, "numbers below inf", x, ~(x < jnp.inf), where)


def check_not_nan(name: str, x: jax.Array, where: jax.Array | None = None) -> None:
    """Checks that there is no NaN."""
    if are_on():
        _check(name, "numbers", x, jnp.isnan(x), where)


def _check(
    name: str,
    expected: str,
    x: jax.Array,
    bad: jax.Array,
    where: jax.Array | None,
    axes: int | None = None,
) -> None:
    """Raises or records an error at the first bad value that `where` keeps.

    `where` is of the first axes of x. The position leaves out the axes from `axes` on.
    """
    if x.size == 0:
        return
    if where is not None:
        bad &= where.reshape(where.shape + (1,) * (x.ndim - where.ndim))
    position = jnp.zeros(0, jnp.int32)
    if x.ndim:
        position = jnp.stack(jnp.unravel_index(jnp.argmax(bad), x.shape))
    check_values(
        ~bad.any(),
        f"{name}: expected {expected}, got {{value}} at position {{position}}",
        value=x[tuple(position)],
        position=position[:axes],
    )
