"""The choice of a backend and of every size in it: one pure function of shape, dtype and targets.

`XENTJAX_BACKEND=portable` or `=cpu`, read when xentjax is imported, makes every platform run the
one or the other code; it is for looking for faults, and for measuring.
"""

import dataclasses
import math
import os
from typing import Any, cast

import jax
import jax.numpy as jnp

from xentjax._jax import checks
from xentjax._jax.dtypes import wide_dtype
from xentjax._jax.rule import Backend
from xentjax._softmax import cpu, portable
from xentjax._softmax.partial import PartialSoftmax, gradient_terms
from xentjax._targets.mass import Mass, only_points_are_heavy

MIN_CPU_LOGITS = 2**14
"""Fewer logits cost less than the kernels that the CPU backend has more."""

ROW_BLOCK_BYTES = 2**21
"""Arrays of so many bytes in all, made for a block of rows, are soon read again from the cache."""

MAX_WHOLE_LOGITS = 2**23
"""Fewer logits may have an array of float32 exponentials, 32 MiB, that is not their gradient."""

FORCED = cast(Backend | None, os.environ.get("XENTJAX_BACKEND"))
checks.check(
    FORCED in (None, "portable", "cpu"),
    f'XENTJAX_BACKEND: expected "portable" or "cpu", or no such variable, got {FORCED!r}',
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How logits are summarised, and how their gradient is made.

    Attributes:
      backend: Whose code runs.
      rows: How many rows of logits the CPU backend summarises at a time; None is all.
      gradient: Whose code makes the gradient.
    """

    backend: Backend
    rows: int | None = None
    gradient: Backend = "portable"


def make_plan(
    shape: tuple[Any, ...],
    dtype: jax.typing.DTypeLike,
    *,
    only_points: bool,
    with_gradient: bool,
    backend: Backend,
) -> Plan:
    """Returns the plan for logits of a shape [..., V] and dtype.

    Args:
      shape: That of the logits; sizes that are not known (of `jax.export`) take portable code.
      dtype: That of the logits.
      only_points: Whether no class but a point can hold most of the target mass.
      with_gradient: Whether the gradient to the logits follows.
      backend: What the platform has.
    """
    backend = FORCED or backend
    if not all(isinstance(n, int) for n in shape):
        return Plan("portable")
    size = math.prod(shape)
    if backend == "portable" or size < MIN_CPU_LOGITS:
        return Plan("portable")
    # A prior or dense mass has another array beside the exponentials: its costs.
    row_bytes = shape[-1] * wide_dtype(dtype).itemsize * (1 if only_points else 2)
    rows = max(1, ROW_BLOCK_BYTES // row_bytes)
    fits, is_wide = size < MAX_WHOLE_LOGITS, jnp.dtype(dtype) == wide_dtype(dtype)
    one_block = rows * shape[-1] >= size
    summary_whole = only_points and (fits or (with_gradient and is_wide))
    # The plain gradient makes no float32 array of narrow logits, but a choice for each entry.
    gradient = "cpu" if one_block or fits or is_wide else "portable"
    return Plan("cpu", None if one_block or summary_whole else rows, gradient)


def summarise(
    logits: jax.Array, mass: Mass, with_gradient: bool, backend: Backend
) -> PartialSoftmax:
    """Returns the PartialSoftmax of logits [..., V] under the mass on these V classes."""
    plan = make_plan(
        logits.shape,
        logits.dtype,
        only_points=only_points_are_heavy(mass),
        with_gradient=with_gradient,
        backend=backend,
    )
    if plan.backend == "portable":
        return portable.summarise(logits, mass, with_gradient)
    return cpu.summarise(logits, mass, with_gradient, plan.rows)


def gradient(
    whole: PartialSoftmax,
    logits: jax.Array,
    mass: Mass,
    loss_cotangent: jax.Array,
    lse_cotangent: jax.Array,
    backend: Backend,
) -> jax.Array:
    """Returns loss_cotangent · ∂loss/∂z + lse_cotangent · ∂lse/∂z, [..., V].

    Args:
      whole: The PartialSoftmax of all classes.
      logits: Those of some classes, [..., V].
      mass: The mass on those classes.
      loss_cotangent: [...].
      lse_cotangent: [...].
      backend: What the platform has.
    """
    terms = gradient_terms(whole, loss_cotangent, lse_cotangent)
    plan = make_plan(
        logits.shape,
        logits.dtype,
        only_points=only_points_are_heavy(mass),
        with_gradient=True,
        backend=backend,
    )
    code = portable if plan.gradient == "portable" else cpu
    return code.gradient(terms, whole, logits, mass)
