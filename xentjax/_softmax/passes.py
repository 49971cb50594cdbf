"""The two passes over logits: their summary under a target mass, and their gradient.

They are the formulas of `partial.py`, in a form that compilers fuse into few kernels. XLA's CPU
compiler (jaxlib 0.10.2) hands sums, maxima and the arithmetic inside them to YNNPACK, a library of
fast kernels that take no time to compile; but a comparison or a choice between classes is no
arithmetic, and would become an array of its own. So the classes that a sum leaves out are left out
by a minimum: min(exp(z_v − m), |v − c|) is 0 for the class c, and min(exp(z_v − m), ∞ · (m − z_v))
for the leaders.

Two things depend on the platform, whose choice is `backend`: on one CPU, long sums are cut into
windows, and many sums have a kernel of their own. `XENTJAX_BACKEND=portable` or `=cpu`, read when
xentjax is imported, makes every platform run the one or the other; it is for looking for faults,
and for measuring.
"""

import os
from typing import cast

import jax
import jax.numpy as jnp

from xentjax._jax import checks
from xentjax._jax.dtypes import wide, wide_dtype
from xentjax._jax.rule import Backend
from xentjax._softmax.partial import (
    GradientTerms,
    PartialSoftmax,
    exponentials,
    gradient_terms,
    masked,
    scaled,
)
from xentjax._targets.mass import (
    Mass,
    SparseMass,
    SumOverClasses,
    add_at,
    at_class,
    is_class,
    only_points_are_heavy,
    own_pass,
    set_at,
    sum_over_classes,
    zero_at_0,
    zero_at_class,
)

MAX_SUM = 2**15
"""So many numbers are summed at a time.

Longer sums take the CPU compiler ten times as long, or an array of their terms (jaxlib 0.10.2).
"""

MAX_SUMS = 2**15
"""A kernel of several sums may have so many of each; with more, YNNPACK takes ten times as long."""

MIN_PASS = 2**12
"""The CPU compiler (jaxlib 0.10.2) hands nothing smaller to YNNPACK."""

MAX_KEPT_WIDE = 2**23
"""So many exponentials of narrow logits are kept for the gradient, as 32 MiB of float32."""

MAX_COMPARED_POINTS = 4
"""So many points are found by comparing each class with them, in the loop that writes entries."""

FORCED = cast(Backend | None, os.environ.get("XENTJAX_BACKEND"))
checks.check(
    FORCED in (None, "portable", "cpu"),
    f'XENTJAX_BACKEND: expected "portable" or "cpu", or no such variable, got {FORCED!r}',
)


def summarise(
    logits: jax.Array,
    mass: Mass,
    with_gradient: bool,
    backend: Backend,
    shares_exponentials: bool = True,
) -> PartialSoftmax:
    """Returns the PartialSoftmax of logits [..., V] under the mass on these V classes.

    Args:
      logits: [..., V].
      mass: On these classes.
      with_gradient: Whether the gradient follows.
      backend: The kind of code that the platform runs.
      shares_exponentials: Whether it follows outside of loops, so that XLA computes exponentials
        once for both.
    """
    add = _sum_on(backend)
    m = _largest(logits)
    kept = with_gradient and shares_exponentials and _are_kept(logits)
    if only_points_are_heavy(mass):
        point = mass.leader(logits)
        others = add(_exponentials(logits, m, point, kept, backend))
        rest = _rest_beside(others, wide(at_class(logits, point)), m)
        mass_of_rest = mass.beside(point) if with_gradient else None
    else:
        rest = _rest(logits, m, kept, add)
        mass_of_rest = jnp.zeros_like(m) if with_gradient else None
    own_logits, top, own_mass = mass.own_pass(logits, m)
    excess = own_mass.excess(own_logits, top, add, with_derivative=False)
    return PartialSoftmax(m, rest, mass.total(add), mass_of_rest, excess)


def leader_and_rest(logits: jax.Array, backend: Backend) -> tuple[jax.Array, jax.Array]:
    """Returns (m, rest), [...], of logits [..., V]."""
    m = _largest(logits)
    return m, _rest(logits, m, False, _sum_on(backend))


def _are_kept(logits):
    """Returns whether the gradient uses the exponentials of the summary, which become an array."""
    if not all(isinstance(n, int) for n in logits.shape):
        return True  # Sizes that are not known, of `jax.export`.
    return logits.dtype == wide_dtype(logits.dtype) or logits.size < MAX_KEPT_WIDE


def _are_few(logits):
    """Returns whether one loop over the logits makes what the summary needs, without an array."""
    return all(isinstance(n, int) for n in logits.shape) and logits.size < MIN_PASS


def _exponentials(logits, max_logit, point, kept, backend):
    """Returns exp(z_v − m), [..., V], with 0 at one point of each example.

    In an array that is kept, overwriting a few numbers takes less than a minimum does.
    """
    e = exponentials(wide(logits), max_logit)
    if kept and _is_cpu(backend):
        return set_at(e, point, jnp.zeros_like(max_logit))
    return zero_at_class(point, e)


def _rest(logits, max_logit, kept, add):
    """Returns the rest, [...], where any class may lead, and several may.

    It is the sum below the largest logit, which nothing cancels, and 1 for each leader but one: the
    total is that sum and their number.
    """
    e = exponentials(wide(logits), max_logit)
    are_few = _are_few(logits)
    own_logits, m = (logits, max_logit) if are_few else own_pass(logits, max_logit)
    less = wide(own_logits) - m[..., None]
    below = add(zero_at_0(less, e if kept or are_few else jnp.exp(less)))
    leaders = jnp.round(add(e) - below)
    return below + (leaders - 1)


def _largest(logits):
    """Returns m, [...], in the dtype of the arithmetic: the lowest number where all are −inf."""
    lowest = jnp.asarray(jnp.finfo(logits.dtype).min, logits.dtype)
    m = wide(jax.lax.reduce(logits, lowest, jax.lax.max, (logits.ndim - 1,)))
    if logits.shape[-1] > 1:
        return m
    # XLA makes of one class the class itself, and forgets the lowest number (jaxlib 0.10.2).
    return jnp.where(m == -jnp.inf, jnp.asarray(lowest, m.dtype), m)


def _rest_beside(others, logit, max_logit):
    """Returns the rest, from the sum of exponentials of all classes but one, and its logit.

    If that class does not lead, one of the others is the leader's. No target mass near T is on the
    leader then, and the loss is no small number.
    """
    added = jnp.exp(logit - max_logit) - 1
    return jax.lax.select(logit == max_logit, others, others + added)


def _sum_on(backend: Backend) -> SumOverClasses:
    """Returns the function Σ_v x_v of x [..., V] for a platform."""
    return _sum_of_windows if _is_cpu(backend) else sum_over_classes


def _is_cpu(backend):
    return (FORCED or backend) == "cpu"


def _sum_of_windows(x):
    num_classes = x.shape[-1]
    if num_classes > MAX_SUM:
        window = (1,) * (x.ndim - 1) + (MAX_SUM,)
        padding = (((0, 0),) * (x.ndim - 1)) + ((0, -num_classes % MAX_SUM),)
        zero = jnp.zeros((), x.dtype)
        x = _apart(jax.lax.reduce_window(x, zero, jax.lax.add, window, window, padding))
    return _apart(x.sum(-1))


def _apart(sums):
    """Returns sums; many go through a choice, which ends the kernel that makes them."""
    are_many = all(isinstance(n, int) for n in sums.shape) and sums.size > MAX_SUMS
    return jnp.where(sums == 0, jnp.zeros_like(sums), sums) if are_many else sums


def gradient(
    whole: PartialSoftmax,
    logits: jax.Array,
    mass: Mass,
    loss_cotangent: jax.Array,
    lse_cotangent: jax.Array,
    backend: Backend,
    shares_exponentials: bool = True,
) -> jax.Array:
    """Returns loss_cotangent · ∂loss/∂z + lse_cotangent · ∂lse/∂z, [..., V].

    Args:
      whole: The PartialSoftmax of all classes.
      logits: Those of some classes, [..., V].
      mass: The mass on those classes.
      loss_cotangent: [...].
      lse_cotangent: [...].
      backend: The kind of code that the platform runs.
      shares_exponentials: As in `summarise`.
    """
    terms = gradient_terms(whole, loss_cotangent, lse_cotangent)
    kept, m = shares_exponentials and _are_kept(logits), whole.max_logit
    own_logits, own_m = (logits, m) if kept else own_pass(logits, m, terms.per_exponential)[:2]
    z = wide(own_logits)
    if not only_points_are_heavy(mass):
        e = exponentials(z, own_m)
        leads = (z == own_m[..., None]) & terms.leader_is_heavy[..., None]
        density = scaled(loss_cotangent[..., None], cast(jax.Array, mass.density()))
        # A float knows T to half an ulp, and so T − t_v: the target says no more of the rest.
        of_leader = (terms.mass[..., None] - density) + terms.of_leader[..., None]
        entries = jnp.where(leads, of_leader, terms.per_exponential[..., None] * e - density)
        entries = _less_points(masked(entries, terms.wanted), terms, mass)
        return entries.astype(logits.dtype)
    indices, weights = mass.points
    c, entry = _entry_of_leader(terms, whole, logits, mass)
    e = _exponentials(own_logits, own_m, c, kept, backend) if kept else exponentials(z, own_m)
    entries, density = terms.per_exponential[..., None] * e, mass.density()
    if density is not None:
        entries = entries - scaled(terms.loss_cotangent[..., None], density)
    entries = masked(entries, terms.wanted)
    if indices.shape[-1] > 1:
        entries = _add_points(entries, indices, -scaled(terms.loss_cotangent[..., None], weights))
    if indices.shape[-1] > MAX_COMPARED_POINTS:
        return set_at(entries, c, entry).astype(logits.dtype)
    return jnp.where(is_class(c, z), entry[..., None], entries).astype(logits.dtype)


def _add_points(entries, indices, values):
    """Returns entries [..., V] with values_k added at indices_k, [..., K]."""
    if indices.shape[-1] > MAX_COMPARED_POINTS:
        return add_at(entries, indices, values)
    for k in range(indices.shape[-1]):
        added = entries + values[..., k, None]
        entries = jnp.where(is_class(indices[..., k], entries), added, entries)
    return entries


def _less_points(entries, terms: GradientTerms, mass: Mass):
    """Returns entries − loss_cotangent · weights at the points beside a prior."""
    if mass.points is None:
        return entries
    indices, weights = mass.points
    return _add_points(entries, indices, -scaled(terms.loss_cotangent[..., None], weights))


def _entry_of_leader(terms: GradientTerms, whole: PartialSoftmax, logits, mass: SparseMass):
    """Returns (c, the entry of c): the point that may be the leader, [...]."""
    c = mass.leader(logits)
    z = wide(at_class(logits, c))
    p = terms.per_exponential * jnp.exp(z - whole.max_logit)
    held = mass.at(c)
    density = mass.density()
    held = held if density is None else held + density[..., 0]
    entry = p - scaled(terms.loss_cotangent, held)
    leads = (z == whole.max_logit) & terms.leader_is_heavy
    of_rest = scaled(terms.loss_cotangent, cast(jax.Array, whole.mass_of_rest))
    entry = jax.lax.select(leads, of_rest + terms.of_leader, entry)
    return c, masked(entry, terms.wanted)
