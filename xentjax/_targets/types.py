"""The forms that the truth has: labels, dense distributions, and sparse targets.

A target is a non-negative mass t_v over the V classes. Its total T = Σ_v t_v need not be 1.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from xentjax._jax import checks
from xentjax._jax.dtypes import wide_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SparseTargets:
    """Targets with mass on K classes each, and the rest spread over backgrounds.

    t = Σ_k weights_k · onehot(indices_k) + Σ_b background_mass_b · background_b

    A pytree: it goes through jit, vmap, scan and shard_map as an array does. Classes may repeat
    among the K; their weights add. The shapes are checked where the targets are used.

    Examples share the backgrounds. These have an axis of size 1 for each axis of the batch, so that
    `jax.vmap`, `jax.lax.scan` and `jax.tree.map(lambda a: a[:4], t)`, which cut all arrays alike,
    either keep them whole or fail. `t[4:8]` always keeps them whole.

    Attributes:
      indices: Classes in [0, V), int[..., K].
      weights: Their mass, float[..., K].
      background_mass: Mass of the background, float[...]; float[..., B] where there are several;
        None where there is none.
      background: The distribution of that mass over all classes, float[V]; None is uniform, 1/V.
        It is kept as one of several, float[1, ..., 1, B, V] with B = 1, beside a background_mass
        float[..., B]. Mixing targets that have different backgrounds stacks them.
      num_classes: V where it is known, a static int; logits of other classes are then refused.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> t = xentjax.SparseTargets(jnp.array([[2, 0]]), jnp.array([[0.7, 0.3]]))
      >>> t
      SparseTargets(batch=(1,), K=2, background=none, num_classes=None)
      >>> print(xentjax.dense_targets(t, 3))
      [[0.3 0.  0.7]]
    """

    indices: Int[Array, "*batch k"]
    weights: Float[Array, "*batch k"]
    background_mass: Float[Array, "*batch"] | Float[Array, "*batch b"] | None = None
    background: Float[Array, " v"] | Float[Array, "*ones b v"] | None = None
    num_classes: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self):
        """Gives the background the axes of size 1 that keep it whole."""
        parts: Any = (self.background, self.background_mass, self.indices)
        if all(isinstance(x, jax.Array | np.ndarray) for x in parts):
            mass, background = _for_all_examples(*reversed(parts))
            object.__setattr__(self, "background_mass", mass)
            object.__setattr__(self, "background", background)

    def __getitem__(self, index: Any) -> "SparseTargets":
        """Returns the targets of some examples; `index` is one of the batch's axes."""
        index = _index_of_examples(index, self.batch_shape)
        return map_examples(lambda x: x[index], self)

    def __len__(self) -> int:
        """Returns how many examples there are along the first axis."""
        checks.check(len(self.batch_shape) > 0, "len: expected a batch, got one example", TypeError)
        return self.batch_shape[0]

    def __iter__(self) -> Iterator["SparseTargets"]:
        """Yields the targets of each example along the first axis."""
        return (self[i] for i in range(len(self)))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of one loss per example."""
        return self.indices.shape[:-1]

    def __repr__(self) -> str:
        """Returns the shapes in one line, or all fields where they are not arrays."""
        indices, mass, background = self.indices, self.background_mass, self.background
        if not all(hasattr(x, "shape") for x in (indices, *jax.tree.leaves((mass, background)))):
            fields = (f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
            return f"SparseTargets({', '.join(fields)})"
        if background is not None:
            kind = f"{checks.describe(background)}"
        else:
            kind = "none" if mass is None else "uniform"
        return (
            f"SparseTargets(batch={indices.shape[:-1]}, K={indices.shape[-1]}, "
            f"background={kind}, num_classes={self.num_classes})"
        )


Targets = ArrayLike | Sequence[Any] | SparseTargets
"""Integer labels [...], dense targets float[..., V], or SparseTargets; arrays may be lists."""

AnyTargets = TypeVar("AnyTargets", bound=jax.Array | SparseTargets)
"""Dense targets, or SparseTargets: the same kind as came in."""


def _for_all_examples(
    indices: jax.Array, mass: jax.Array, background: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (mass [..., B], background [1, ..., 1, B, V]), or parts that do not fit as given."""
    if background.ndim == 1 and mass.shape == indices.shape[:-1]:
        mass, background = mass[..., None], background[None]
    if background.ndim < 2 or not set(background.shape[:-2]) <= {1}:
        return mass, background
    shape = (*(1,) * (indices.ndim - 1), *background.shape[-2:])
    return mass, background if background.shape == shape else background.reshape(shape)


def _index_of_examples(index: Any, batch: tuple[int, ...]) -> tuple[Any, ...]:
    """Returns `index` as a tuple that stands for every axis of the batch and no other."""
    index = index if isinstance(index, tuple) else (index,)
    index = tuple(np.asarray(i) if isinstance(i, list) else i for i in index)
    axes = sum(_axes_indexed(i) for i in index)
    checks.check(
        axes <= len(batch),
        f"index: expected at most {len(batch)} axes, those of the batch, got {axes}",
        IndexError,
    )
    rest = (slice(None),) * (len(batch) - axes)
    dots = [position for position, i in enumerate(index) if i is Ellipsis] or [len(index)]
    index = (*index[: dots[0]], *rest, *index[dots[0] + 1 :])
    axis = 0
    for i in index:  # JAX clips an index out of range.
        if isinstance(i, int | np.integer) and not isinstance(i, bool):
            checks.check(
                -batch[axis] <= int(i) < batch[axis],
                f"index: expected one of {batch[axis]} examples along axis {axis}, got {i}",
                IndexError,
            )
        axis += _axes_indexed(i)
    return index


def _axes_indexed(i: Any) -> int:
    """Returns how many axes of an array one part of an index stands for."""
    if i is None or i is Ellipsis:
        return 0
    if isinstance(i, slice):
        return 1
    return np.ndim(i) if jnp.issubdtype(jnp.result_type(i), jnp.bool_) else 1


def as_targets(targets: Targets, name: str = "targets") -> jax.Array | SparseTargets:
    """Returns `targets` as dense float[..., V] or SparseTargets; labels become K = 1 of weight 1.

    Raises:
      TypeError: A dtype is neither integer (labels) nor floating (masses).
      ValueError: The parts of SparseTargets do not fit each other.
    """
    if not isinstance(targets, SparseTargets):
        array = as_classes(name, targets)
        checks.check(
            jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating),
            f"{name}: expected integer labels, floating dense targets or SparseTargets, "
            f"got {checks.describe(array)}",
            TypeError,
        )
        if jnp.issubdtype(array.dtype, jnp.integer):
            return _of_labels(array)
        checks.check_floating(name, array)
        checks.check(
            array.ndim > 0,
            f"{name}: expected one mass per class, [..., V], got {checks.describe(array)}",
        )
        return array

    indices = as_classes(f"{name}.indices", targets.indices)
    weights = checks.as_array(f"{name}.weights", targets.weights)
    checks.check(
        jnp.issubdtype(indices.dtype, jnp.integer) and indices.ndim > 0,
        f"{name}.indices: expected integers of shape [..., K], got {checks.describe(indices)}",
        TypeError,
    )
    checks.check_floating(f"{name}.weights", weights)
    checks.check_shape(f"{name}.weights", weights, indices.shape, f"that of {name}.indices")
    mass, background = targets.background_mass, targets.background
    num_classes = targets.num_classes
    if num_classes is not None:
        check_num_classes(f"{name}.num_classes", num_classes)
    if mass is None:
        checks.check(
            background is None,
            f"{name}.background_mass: expected an array beside {name}.background, got None",
        )
        return SparseTargets(indices, weights, num_classes=num_classes)
    mass = checks.as_array(f"{name}.background_mass", mass)
    checks.check_floating(f"{name}.background_mass", mass)
    batch = indices.shape[:-1]
    if background is not None:
        background = checks.as_array(f"{name}.background", background)
        checks.check_floating(f"{name}.background", background)
        mass, background = _for_all_examples(indices, mass, background)
        *ones, classes = background.shape or (0,)
        checks.check(
            background.ndim == 1 or (set(ones[:-1]) <= {1} and len(ones) == len(batch) + 1),
            f"{name}.background: expected shape [V], or {(*(1,) * len(batch), 'B', 'V')} where "
            f"stacked, since all examples share it (t[i] cuts targets of examples), got "
            f"{checks.describe(background)}",
        )
        batch = (*batch, *ones[-1:])
        num_classes = num_classes or classes
        checks.check(
            classes == num_classes,
            f"{name}.background: expected {num_classes} classes, {name}.num_classes, "
            f"got {checks.describe(background)}",
        )
    checks.check_shape(
        f"{name}.background_mass", mass, batch, f"the batch of {name}.indices, and B backgrounds"
    )
    return SparseTargets(indices, weights, mass, background, num_classes)


@functools.partial(jax.jit, inline=True)
def _of_labels(labels: jax.Array) -> SparseTargets:
    """Returns labels as SparseTargets of K = 1 and weight 1, of weak type as Python's 1.0 is."""
    indices = labels[..., None]
    return SparseTargets(indices, jnp.where(indices == indices, 1.0, 1.0))  # noqa: PLR0124


def check_num_classes(name: str, num_classes: Any) -> None:
    """Raises TypeError or ValueError unless `num_classes` is a positive int."""
    expected = f"{name}: expected a positive int of 32 bits, got {num_classes!r}"
    checks.check(checks.is_int(num_classes), expected, TypeError)
    checks.check(0 < int(num_classes) < 2**31, expected)


def as_classes(name: str, x: Any) -> jax.Array:
    """Returns `x` as a jax array; integers too large for int32 stay out of range, not wrapped."""
    if isinstance(x, np.ndarray | np.generic) and np.issubdtype(x.dtype, np.integer):
        x = _as_int32(x)  # At once: where JAX has no int64 it would wrap.
    x = checks.as_array(name, x, "integer labels, floating dense targets or SparseTargets")
    is_wide = x.dtype != jnp.int32 and jnp.issubdtype(x.dtype, jnp.integer)
    return _as_int32(x) if is_wide else x


def _as_int32(x: Any) -> Any:
    """Returns integers, of NumPy or JAX, as the nearest int32."""
    ours, theirs = jnp.iinfo(jnp.int32), jnp.iinfo(x.dtype)
    if ours.min <= theirs.min and theirs.max <= ours.max:
        return x.astype(jnp.int32)
    return x.clip(max(ours.min, theirs.min), min(ours.max, theirs.max)).astype(jnp.int32)


def check_targets(
    targets: jax.Array | SparseTargets,
    batch: tuple[int, ...],
    num_classes: int,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Raises ValueError unless `targets` are for `batch` examples of `num_classes` classes.

    `shape` is that of the logits, where their class axis may be another one: for a hint.
    """
    if not isinstance(targets, SparseTargets):
        fits = f"{batch} labels or {(*batch, num_classes)} masses: batch and classes of the logits"
        checks.check_shape("targets", targets, (*batch, num_classes), fits)
        return
    given = targets.batch_shape
    checks.check(
        given == batch,
        f"targets: expected shape {batch} for labels, {(*batch, 'K')} for sparse indices or "
        f"{(*batch, num_classes)} for floating dense targets (the batch of the logits), got "
        f"{given} labels or {targets.indices.shape} indices"
        f"{_hint(given, batch, num_classes, shape)}",
    )
    known = targets.num_classes
    checks.check(
        known in (None, num_classes),
        f"targets: expected {num_classes} classes, those of the logits, got {known}, those of the "
        "class weights or background of targets",
    )


def _hint(
    given: tuple[int, ...],
    batch: tuple[int, ...],
    num_classes: int,
    shape: tuple[int, ...] | None,
) -> str:
    """Returns advice for labels of a shape that is not the batch's, or nothing."""
    if given == (*batch, num_classes):
        return "; make masses float: targets.astype(jnp.float32)"
    shape = shape or ()
    fitting = [a for a in range(len(shape)) if (*shape[:a], *shape[a + 1 :]) == given]
    return f"; they fit classes along axis={fitting[0]}" if fitting else ""


def is_valid(labels: jax.Array, num_classes: int) -> jax.Array:
    """Returns where labels are in [0, V)."""
    return (labels >= 0) & (labels < num_classes)


def map_examples(function: Callable[[Any], Any], targets: AnyTargets) -> AnyTargets:
    """Applies `function` to every array that has the batch's axes: all but the background."""
    if not isinstance(targets, SparseTargets):
        return function(targets)
    mass = targets.background_mass
    return dataclasses.replace(
        targets,
        indices=function(targets.indices),
        weights=function(targets.weights),
        background_mass=None if mass is None else function(mass),
    )


def map_masses(function: Callable[[Any], Any], targets: AnyTargets) -> AnyTargets:
    """Applies `function` to every array of mass: dense, or weights and background_mass."""
    if not isinstance(targets, SparseTargets):
        return function(targets)
    mass = targets.background_mass
    return dataclasses.replace(
        targets,
        weights=function(targets.weights),
        background_mass=None if mass is None else function(mass),
    )


def batch_of(targets: jax.Array | SparseTargets) -> tuple[int, ...]:
    """Returns the shape of one loss per example."""
    return targets.batch_shape if isinstance(targets, SparseTargets) else targets.shape[:-1]


def num_classes_of(targets: jax.Array | SparseTargets) -> int | None:
    """Returns V where the targets know it."""
    return targets.num_classes if isinstance(targets, SparseTargets) else targets.shape[-1]


def in_dtype(targets: AnyTargets, dtype: jax.typing.DTypeLike) -> AnyTargets:
    """Returns targets with all their mass in a dtype."""
    targets = map_masses(lambda mass: mass.astype(dtype), targets)
    if not isinstance(targets, SparseTargets) or targets.background is None:
        return targets
    return dataclasses.replace(targets, background=targets.background.astype(dtype))


def mass_dtype(*trees: Any) -> jnp.dtype:
    """Returns float64 where some mass of `trees` is, else float32.

    Labels and Python numbers do not count beside other mass; alone they have JAX's default dtype.
    """
    leaves = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.floating)]
    strong = [x.dtype for x in leaves if not x.weak_type]
    return wide_dtype(*(strong or [jnp.result_type(float)]))


def stacked_background(targets: SparseTargets) -> jax.Array | None:
    """Returns the background as float[B, V], without the batch's axes; None if there is none."""
    background = targets.background
    return None if background is None else background.reshape(background.shape[-2:])


def expand_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Returns x with axes of size 1 at its end, to stand against `other`."""
    return x.reshape(x.shape + (1,) * (other.ndim - x.ndim))
