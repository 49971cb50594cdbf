"""Target mass: one interface to dense and sparse targets, for the arithmetic of losses.

A mass is non-negative, t_v for each class v of each example. Both kinds are

    t_v = density_v + Σ_k weights_k · [indices_k = v]

Dense mass is all density. Sparse mass has points, and a density that is None, uniform, or a prior.
No method makes an array [..., V] of its own from sparse mass without a prior.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self, TypeGuard, cast

import jax
import jax.numpy as jnp
import numpy as np

from xentjax._targets import types
from xentjax._targets.types import SparseTargets

SumOverClasses = Callable[[jax.Array], jax.Array]
"""[..., V] -> [...]: a backend may sum in an order of its own."""


def sum_over_classes(x: jax.Array) -> jax.Array:
    """Returns Σ_v x_v, [...]."""
    return x.sum(-1)


def own_pass(*arrays: Any) -> Any:
    """Returns arrays for a pass of its own: XLA would make an array of terms that two passes share.

    Passes with the same arrays, in the same order, are the same.
    """
    return jax.lax.optimization_barrier(arrays)


def _no_rounding(gaps: jax.Array, top: jax.Array) -> jax.Array:
    """Returns gaps top − z with 0 where they are less than two floats can differ by.

    Where z is a product, XLA may subtract it before it is rounded (jaxlib 0.10.2), and the leader
    is then as far from itself as rounding moved it.
    """
    half_ulp = jnp.abs(top) * jnp.asarray(jnp.finfo(gaps.dtype).epsneg, gaps.dtype)
    return jnp.where(jnp.abs(gaps) < half_ulp, jnp.zeros_like(gaps), gaps)


def times(mass: jax.Array, cost: jax.Array) -> jax.Array:
    """Returns mass · cost with 0 · inf = 0, in derivatives too."""
    return mass * jnp.where((mass == 0) & jnp.isposinf(cost), jnp.zeros_like(cost), cost)


def sum_of_costs(mass: jax.Array, gaps: jax.Array, add: SumOverClasses) -> jax.Array:
    """Returns Σ_v mass_v · gaps_v with 0 · inf = 0, [...], by arithmetic alone; gaps_v ≥ 0.

    It is not made to be differentiated.
    """
    largest = jnp.asarray(jnp.finfo(gaps.dtype).max, gaps.dtype)
    # Above 1, or 0 where there is no mass. The minimum keeps XLA from multiplying the constants of
    # both lines first: 0 · inf is NaN.
    scaled = jnp.minimum(mass * largest, largest)
    most = scaled * scaled * largest  # inf, or 0.
    return add(mass * jnp.minimum(gaps, most))


def zero_at_class(classes: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x [..., V], numbers in [0, 1], with 0 for one class c of each example.

    It is min(|v − c|, x_v): arithmetic, and no choice.
    """
    num_classes = x.shape[-1]
    if num_classes > 1 / jnp.finfo(x.dtype).eps:  # They are not told apart as floats.
        return jnp.where(is_class(classes, x), jnp.zeros_like(x), x)
    v = jax.lax.broadcasted_iota(x.dtype, (1,) * (x.ndim - 1) + (num_classes,), x.ndim - 1)
    return jnp.minimum(jnp.abs(v - classes.astype(x.dtype)[..., None]), x)


def zero_at_0(differences: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x [..., V], numbers in [0, 1], with 0 where a difference ≤ 0 is 0.

    It is min(−2¹²⁷ · difference_v, x_v): arithmetic, and no choice.
    """
    return jnp.minimum(differences * jnp.asarray(-(2.0**127), x.dtype), x)


def at_classes(x: jax.Array, classes: jax.Array) -> jax.Array:
    """Returns x[..., classes_j], [..., J], of x [..., V]; the classes must be valid."""
    if x.dtype.itemsize < 4:
        # XLA's CPU compiler (jaxlib 0.10.2) converts x to float32, alone here and not for all.
        x = jax.lax.optimization_barrier(x)
    batch = tuple(range(x.ndim - 1))
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(x.ndim - 1,),
        start_index_map=(x.ndim - 1,),
        operand_batching_dims=batch,
        start_indices_batching_dims=batch,
    )
    sizes = (1,) * x.ndim
    return jax.lax.gather(x, classes[..., None], numbers, sizes, mode="promise_in_bounds")


def at_class(x: jax.Array, classes: jax.Array) -> jax.Array:
    """Returns x[..., c], [...], for one class c of each example."""
    return at_classes(x, classes[..., None])[..., 0]


def is_class(classes: jax.Array, like: jax.Array) -> jax.Array:
    """Returns [..., V]: which entry is that of the class given for each example."""
    iota = jax.lax.broadcasted_iota(classes.dtype, like.shape, like.ndim - 1)
    return iota == classes[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseMass:
    """A mass for every class, float[..., V]."""

    masses: jax.Array

    @property
    def points(self) -> None:
        """None: there are no points beside the density."""
        return None

    def total(self, add: SumOverClasses = sum_over_classes) -> jax.Array:
        """Returns T = Σ_v t_v, [...]."""
        return add(self.masses)

    def excess(
        self,
        logits: jax.Array,
        top: jax.Array,
        add: SumOverClasses | None = None,
        without: jax.Array | None = None,
        with_derivative: bool = True,
    ) -> jax.Array:
        """Returns Σ_v t_v · (top − z_v), [...], with 0 · inf = 0; one class may be left out.

        With `add`, a backend's sum, top is the largest logit, and no derivative is taken.
        """
        del with_derivative
        masses, gaps = self.masses, top[..., None] - logits.astype(top.dtype)
        if add is not None:
            return sum_of_costs(masses, gaps, add)
        if without is not None:
            masses = jnp.where(is_class(without, masses), jnp.zeros_like(masses), masses)
        return times(masses, gaps).sum(-1)

    def density(self) -> jax.Array:
        """Returns the mass on each class, [..., V]."""
        return self.masses

    def heaviest(self) -> jax.Array:
        """Returns the class of the largest mass, int32[...]: for labels, the label itself."""
        return jnp.argmax(self.masses, axis=-1).astype(jnp.int32)

    def is_heaviest(self, classes: jax.Array) -> jax.Array:
        """Returns whether no class has more mass than the one given for each example."""
        return at_class(self.masses, classes) >= self.masses.max(-1)

    def block(self, start: jax.typing.ArrayLike, size: int) -> Self:
        """Returns the mass on the classes [start, start + size) as mass on these alone."""
        return type(self)(jax.lax.dynamic_slice_in_dim(self.masses, start, size, axis=-1))

    def map_examples(self, function: Callable[[Any], Any]) -> Self:
        """Returns function of all arrays that have the batch's axes."""
        return type(self)(function(self.masses))

    def own_pass(self, logits: jax.Array, top: jax.Array) -> tuple[jax.Array, jax.Array, Self]:
        """Returns (logits, top, self) for a pass of its own; top is the largest logit, [...]."""
        logits, top, masses = own_pass(logits, top, self.masses)
        return logits, top, type(self)(masses)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseMass:
    """Mass on points, and a background, on all classes or on a block of them.

    Attributes:
      indices: Valid classes, int32[..., K] with K > 0.
      weights: Their mass, float[..., K].
      background_mass: None, float[...] for a uniform background, float[..., B] for priors.
      prior: None, or the distributions of the background, float[B, V], which examples share.
      size: How many classes the mass is on.
      num_classes: How many classes there are in all.
    """

    indices: jax.Array
    weights: jax.Array
    background_mass: jax.Array | None
    prior: jax.Array | None
    size: int = dataclasses.field(metadata={"static": True})
    num_classes: int = dataclasses.field(metadata={"static": True})

    @property
    def points(self) -> tuple[jax.Array, jax.Array]:
        """(indices, weights)."""
        return self.indices, self.weights

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of one loss per example."""
        return self.indices.shape[:-1]

    def total(self, add: SumOverClasses = sum_over_classes) -> jax.Array:
        """Returns T = Σ_v t_v, [...]."""
        del add
        total = self.weights.sum(-1)
        if self.background_mass is None:
            return total
        if self.prior is None:
            return total + self._uniform(self.size)
        return total + (self.background_mass * self._of_batch(self.prior.sum(-1))).sum(-1)

    def excess(
        self,
        logits: jax.Array,
        top: jax.Array,
        add: SumOverClasses | None = None,
        without: jax.Array | None = None,
        with_derivative: bool = True,
    ) -> jax.Array:
        """Returns Σ_v t_v · (top − z_v), [...], as that of dense mass.

        Without a derivative, a point that leads is no gap away from the largest logit, `top`.
        """
        picked, weights = at_classes(logits, self.indices).astype(top.dtype), self.weights
        if without is not None:
            is_left_out = self.indices == without[..., None]
            weights = jnp.where(is_left_out, jnp.zeros_like(weights), weights)
        own_gaps = top[..., None] - picked
        if not with_derivative:
            own_gaps = _no_rounding(own_gaps, top[..., None])
        total = times(weights, own_gaps).sum(-1)
        if self.background_mass is None:
            return total
        gaps = top[..., None] - logits.astype(top.dtype)
        if without is not None:
            gaps = jnp.where(is_class(without, gaps), jnp.zeros_like(gaps), gaps)
        if self.prior is None:
            return total + times(self._uniform(1), (add or sum_over_classes)(gaps))
        if add is not None:
            return total + sum_of_costs(cast(jax.Array, self.density()), gaps, add)
        for b in range(self.prior.shape[0]):
            prior = jnp.broadcast_to(self._of_batch(self.prior[b]), gaps.shape)
            total = total + times(self.background_mass[..., b], times(prior, gaps).sum(-1))
        return total

    def density(self) -> jax.Array | None:
        """Returns the background's mass on each class: [..., V], [..., 1] if uniform, or None."""
        if self.background_mass is None:
            return None
        if self.prior is None:
            return self._uniform(1)[..., None]
        share, prior = self.background_mass[..., None], self._of_batch(self.prior)
        terms = [share[..., b, :] * prior[..., b, :] for b in range(self.prior.shape[0])]
        return functools.reduce(jnp.add, terms)

    def leader(self, logits: jax.Array) -> jax.Array:
        """Returns the class of the largest logit among the points that have weight, int32[...].

        Where there is no prior, no other class can have p and t both near their largest.
        """
        if self.indices.shape[-1] == 1:
            return self.indices[..., 0]
        z = at_classes(logits, self.indices)
        z = jnp.where(self.weights == 0, jnp.full_like(z, -jnp.inf), z)
        return at_class(self.indices, jnp.argmax(z, axis=-1))

    def at(self, classes: jax.Array) -> jax.Array:
        """Returns t_c, [...], for one class c of each example, without the density."""
        same = self.indices == classes[..., None]
        return jnp.where(same, self.weights, jnp.zeros_like(self.weights)).sum(-1)

    def beside(self, classes: jax.Array) -> jax.Array:
        """Returns Σ_{v≠c} t_v, [...], for one class c of each example, where there is no prior."""
        other = self.indices != classes[..., None]
        total = jnp.where(other, self.weights, jnp.zeros_like(self.weights)).sum(-1)
        return total if self.background_mass is None else total + self._uniform(self.size - 1)

    def heaviest(self) -> jax.Array:
        """Returns the class of the largest mass among the points: for labels, the label itself."""
        return at_class(self.indices, jnp.argmax(self._at_points(), axis=-1))

    def is_heaviest(self, classes: jax.Array) -> jax.Array:
        """Returns whether no class has more mass than the one given for each example."""
        density, most = self.density(), self._at_points().max(-1)
        if density is not None:  # The background may be the heaviest alone.
            most = jnp.maximum(most, density.max(-1))
        return self._at_with_density(classes) >= most

    def _at_points(self):
        """Returns the mass on the class of each point, [..., K], in memory linear in K."""
        classes = jnp.moveaxis(self.indices, -1, 0)
        if classes.shape[0] == 1:
            return self._at_with_density(classes[0])[..., None]
        return jnp.moveaxis(jax.lax.map(self._at_with_density, classes), 0, -1)

    def _at_with_density(self, classes):
        density = self.density()
        if density is None:
            return self.at(classes)
        here = density[..., 0] if self.prior is None else at_class(density, classes)
        return self.at(classes) + here

    def block(self, start: jax.typing.ArrayLike, size: int) -> Self:
        """Returns the mass on the classes [start, start + size) as mass on these alone."""
        indices = self.indices - start
        inside = types.is_valid(indices, size)
        prior = self.prior
        if prior is not None:
            prior = jax.lax.dynamic_slice_in_dim(prior, start, size, axis=-1)
        return dataclasses.replace(
            self,
            indices=jnp.clip(indices, 0, size - 1),
            weights=jnp.where(inside, self.weights, jnp.zeros_like(self.weights)),
            prior=prior,
            size=size,
        )

    def map_examples(self, function: Callable[[jax.Array], jax.Array]) -> Self:
        """Returns the mass with function(x) for every array x that has the batch's axes."""
        mass = self.background_mass
        return dataclasses.replace(
            self,
            indices=function(self.indices),
            weights=function(self.weights),
            background_mass=None if mass is None else function(mass),
        )

    def own_pass(self, logits: jax.Array, top: jax.Array) -> tuple[jax.Array, jax.Array, Self]:
        """Returns (logits, top, self) for a pass of its own, as of dense mass.

        A constant share of a background behind a barrier makes YNNPACK crash (jaxlib 0.10.2), so
        that 0 is added to it, which is made from the largest logit: NaN only where that is NaN.
        """
        logits, top, prior = own_pass(logits, top, self.prior)
        if prior is None:
            return logits, top, self
        share = cast(jax.Array, self.background_mass)
        zero = jnp.minimum(jnp.abs(top), 0).astype(share.dtype)[..., None]
        return logits, top, dataclasses.replace(self, prior=prior, background_mass=share + zero)

    def _uniform(self, classes):
        """Returns the mass of a uniform background on so many classes."""
        share = jnp.asarray(classes / self.num_classes, self.weights.dtype)
        return cast(jax.Array, self.background_mass) * share

    def _of_batch(self, x):
        """Returns x with axes of size 1 in front, to stand against arrays of the batch."""
        return x.reshape((1,) * len(self.batch_shape) + x.shape)


Mass = DenseMass | SparseMass


def map_examples(function: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
    """Returns a tree of arrays and masses with function(x) for every x of the examples."""

    def one(x):
        return x.map_examples(function) if hasattr(x, "map_examples") else function(x)

    return jax.tree.map(one, tree, is_leaf=lambda x: hasattr(x, "map_examples"))


def only_points_are_heavy(mass: Mass) -> TypeGuard[SparseMass]:
    """Returns whether no class but a point can hold most of the mass, as labels' mass is held."""
    return isinstance(mass, SparseMass) and mass.prior is None


def mass_of(
    targets: jax.Array | SparseTargets,
    num_classes: int,
    dtype: jax.typing.DTypeLike,
    mask: jax.Array | None,
) -> Mass:
    """Returns the mass of checked targets in the dtype of the arithmetic.

    Masked examples have none. A class outside [0, V) has a NaN weight, so that its loss and its
    gradient are NaN.
    """

    def masked(x):
        return x if mask is None else jnp.where(mask[..., None], x, jnp.zeros_like(x))

    if not isinstance(targets, SparseTargets):
        return DenseMass(masked(targets.astype(dtype)))
    indices, weights = targets.indices, targets.weights.astype(dtype)
    if indices.shape[-1] == 0:
        indices = jnp.zeros((*indices.shape[:-1], 1), jnp.int32)
        weights = jnp.zeros(indices.shape, dtype)
    usable = types.is_valid(indices, num_classes)
    if mask is not None:  # A NaN that a mask takes away is not made in the first place.
        usable |= ~mask[..., None]
    # A constant of NumPy: `jax_debug_nans` looks at the results of operations.
    weights = jnp.where(usable, masked(weights), np.asarray(np.nan, dtype))
    background_mass, prior = targets.background_mass, types.stacked_background(targets)
    if background_mass is not None:
        background_mass = background_mass.astype(dtype)
        if mask is not None:
            keep = types.expand_like(mask, background_mass)
            background_mass = jnp.where(keep, background_mass, jnp.zeros_like(background_mass))
        prior = None if prior is None else prior.astype(dtype)
    indices = jnp.clip(indices, 0, num_classes - 1)
    return SparseMass(indices, weights, background_mass, prior, num_classes, num_classes)


def add_at(x: jax.Array, classes: jax.Array, values: jax.Array) -> jax.Array:
    """Returns x [..., V] with values_j added at classes_j, [..., J], in place if it can be."""
    return jax.lax.scatter_add(
        x, classes[..., None], values, _scattered(x), mode="promise_in_bounds"
    )


def set_at(x: jax.Array, classes: jax.Array, values: jax.Array) -> jax.Array:
    """Returns x [..., V] with one class of each example set to a value, [...], in place."""
    return jax.lax.scatter(
        x,
        classes[..., None, None],
        values[..., None],
        _scattered(x),
        unique_indices=True,
        mode="promise_in_bounds",
    )


def _scattered(x):
    """Returns the numbers by which classes [..., J, 1] scatter values [..., J] to x [..., V]."""
    batch = tuple(range(x.ndim - 1))
    return jax.lax.ScatterDimensionNumbers(
        update_window_dims=(),
        inserted_window_dims=(x.ndim - 1,),
        scatter_dims_to_operand_dims=(x.ndim - 1,),
        operand_batching_dims=batch,
        scatter_indices_batching_dims=batch,
    )


def rows_and(indices: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the index of the classes `indices`, [..., K], of an array [..., V]."""
    rows = jnp.meshgrid(*map(jnp.arange, indices.shape), indexing="ij", sparse=True)[:-1]
    return (*rows, indices)
