"""The mass of a teacher's head: softmax of its logits, of which a block at a time is made."""

import dataclasses
from typing import Any, Self, cast

import jax
import jax.numpy as jnp

from xentjax._softmax import head_blocks as blocks
from xentjax._softmax.head_blocks import Head, Params
from xentjax._softmax.partial import PartialSoftmax, finite
from xentjax._targets.mass import DenseMass, Mass, times


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherMass:
    """The mass exp(z_v − lse(z)) of a teacher's logits z, on the classes of its kernel.

    Attributes:
      inputs: The teacher's features of each token, [N, D].
      params: Its kernel, bias and class mask.
      temperature: The divisor of its logits.
      log_normalizer: lse(z) over all classes, [N]; None until it is known.
      logits: z, [N, V]; None where each block is made when it is read.
      head: The teacher's class axis.
      dtype: That of the arithmetic.
    """

    inputs: jax.Array
    params: Params
    temperature: jax.Array
    log_normalizer: jax.Array | None
    logits: jax.Array | None
    head: Head = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    def logits_of(self, start: Any, size: int) -> jax.Array:
        """Returns the logits of the classes [start, start + size), [N, size]."""
        if self.logits is not None:
            return jax.lax.dynamic_slice_in_dim(self.logits, start, size, 1)
        params = blocks.classes_of(self.head, self.params, start, size)
        raw = blocks.raw_logits(self.head, self.inputs, params).astype(self.dtype)
        return blocks.transformed(self.head, raw / self.temperature.astype(self.dtype), params)

    def block(self, start: Any, size: int) -> DenseMass:
        """Returns the mass on the classes [start, start + size)."""
        return DenseMass(jnp.exp(self.logits_of(start, size) - self._lse()[:, None]))

    def map_examples(self, function: Any) -> Self:
        """Returns the mass with function(x) for every array x that has the tokens' axis."""
        lse = None if self.log_normalizer is None else function(self.log_normalizer)
        logits = None if self.logits is None else function(self.logits)
        return dataclasses.replace(
            self, inputs=function(self.inputs), log_normalizer=lse, logits=logits
        )

    def _lse(self):
        assert self.log_normalizer is not None
        return finite(self.log_normalizer)


HeadMass = Mass | TeacherMass


def normalized(head: Head, mass: HeadMass, keeps_logits: bool = False) -> HeadMass:
    """Returns a mass that knows its log-normalizer, and keeps its logits if asked to."""
    if not isinstance(mass, TeacherMass):
        return mass
    num_classes = blocks.num_classes_of(mass.head, mass.params)
    nothing = blocks.zeros(mass.inputs.shape[:1], mass.dtype, mass.inputs)

    def add_classes(start, size, carry):
        kept, top, total = carry
        z = mass.logits_of(start, size)
        new_top = jnp.maximum(top, jax.lax.stop_gradient(z).max(-1))
        total = total * _shrunk(top, new_top) + jnp.exp(z - finite(new_top)[:, None]).sum(-1)
        return (blocks.put(kept, z, start, 1) if keeps_logits else None), new_top, total

    kept = None
    if keeps_logits:
        kept = blocks.zeros((*nothing.shape, num_classes), mass.dtype, mass.inputs)
    carry = kept, nothing - jnp.inf, nothing
    kept, top, total = blocks.for_each(num_classes, head.plan.classes, add_classes, carry)
    if head.axes:
        of_all = jax.lax.pmax(jax.lax.stop_gradient(top), head.axes)
        total = jax.lax.psum(total * _shrunk(top, of_all), head.axes)
        top = of_all
    return dataclasses.replace(mass, log_normalizer=finite(top) + jnp.log(total), logits=kept)


def _shrunk(top, new_top):
    """Returns exp(top − new_top), the factor of a sum of exponentials under a larger top."""
    return jnp.exp(top - finite(new_top))


def no_top(mass: HeadMass, like: jax.Array) -> jax.Array | None:
    """Returns the top of a teacher before any class, for `block_under`; `like` are zeros [N]."""
    return like - jnp.inf if isinstance(mass, TeacherMass) else None


def block_under(
    mass: HeadMass, start: Any, size: int, top: jax.Array | None, whole: PartialSoftmax
) -> tuple[Mass, jax.Array | None, PartialSoftmax]:
    """Returns (the mass of a block of classes, the new top, the PartialSoftmax so far under it).

    The mass of a teacher is known up to a factor until all classes are seen: it is that of
    exp(z − top), where top is the largest logit so far.
    """
    if not isinstance(mass, TeacherMass):
        return mass.block(start, size), None, whole
    z, old_top = mass.logits_of(start, size), cast(jax.Array, top)
    new_top = jnp.maximum(old_top, z.max(-1))
    whole = with_mass_times(_shrunk(old_top, new_top), whole)
    return DenseMass(jnp.exp(z - finite(new_top)[:, None])), new_top, whole


def with_mass_times(factor: jax.Array, part: PartialSoftmax) -> PartialSoftmax:
    """Returns the PartialSoftmax under `factor` times the mass."""
    rest = None if part.mass_of_rest is None else times(factor, part.mass_of_rest)
    return part._replace(
        mass=factor * part.mass, mass_of_rest=rest, excess=times(factor, part.excess)
    )


def over_devices(
    head: Head, whole: PartialSoftmax, top: jax.Array | None
) -> tuple[PartialSoftmax, jax.Array | None]:
    """Returns (the PartialSoftmax of all devices' classes, the teacher's log-normalizers)."""
    if top is None:
        return blocks.over_devices(head, whole), None
    if head.axes:
        of_all = jax.lax.pmax(top, head.axes)
        whole = blocks.over_devices(head, with_mass_times(_shrunk(top, of_all), whole))
        top = cast(jax.Array, of_all)
    top = finite(top)
    total = jnp.where(whole.mass == 0, jnp.ones_like(whole.mass), whole.mass)  # No class is left.
    return with_mass_times(1 / total, whole), top + jnp.log(total)


def knowing(mass: HeadMass, log_normalizer: jax.Array | None) -> HeadMass:
    """Returns a teacher's mass with its log-normalizers, [N], and any other as it is."""
    if not isinstance(mass, TeacherMass):
        return mass
    return dataclasses.replace(mass, log_normalizer=log_normalizer)


def heaviest(head: Head, mass: TeacherMass) -> tuple[jax.Array, jax.Array]:
    """Returns (the largest logit, its class), [N], among those of this device."""
    num_classes = blocks.num_classes_of(mass.head, mass.params)

    def on_tokens(first, length, out):
        t = blocks.tokens_of(mass, first, length)

        def on_classes(start, size, carry):
            top, best = carry
            z = t.logits_of(start, size)
            there = start + jnp.argmax(z, axis=-1).astype(jnp.int32)
            return jnp.maximum(top, z.max(-1)), jnp.where(z.max(-1) > top, there, best)

        of_tokens = blocks.for_each(num_classes, head.plan.classes, on_classes, nothing_of(t))
        return blocks.put(out, of_tokens, first)

    def nothing_of(t):
        like = blocks.zeros(t.inputs.shape[:1], t.dtype, t.inputs)
        return like - jnp.inf, like.astype(jnp.int32)

    return blocks.for_each(mass.inputs.shape[0], head.plan.tokens, on_tokens, nothing_of(mass))
