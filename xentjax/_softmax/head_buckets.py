"""The fused head of some classes and all others as one: logits of buckets, block by block.

A bucket has the logit of its class; the last has lse_rest = log Σ_v exp(z_v) over the classes of no
other bucket. Its gradient is softmax over those classes alone, so that nothing cancels.
"""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from xentjax._jax.rule import Backend, Rule
from xentjax._softmax import head_blocks as blocks
from xentjax._softmax import head_recomputed as recomputed
from xentjax._softmax import partial
from xentjax._softmax.head_blocks import Head
from xentjax._targets import mass as masses
from xentjax._targets.types import is_valid


@dataclasses.dataclass(frozen=True)
class HeadBuckets(Rule):
    """(inputs [N, D], Params, valid classes int32[N, K]) -> logits of buckets [N, K + 1]."""

    head: Head

    def reference(self, inputs, params, classes):
        head, num_classes = self.head, blocks.num_classes_of(self.head, params)
        dtype = blocks.arithmetic_dtype(inputs, params)

        def on_tokens(first, length, out):
            x, of_tokens = blocks.tokens_of((inputs, Places(classes)), first, length)

            def on_classes(start, size, carry):
                picked, top, total = carry
                z = blocks.logits_of(head, x, blocks.classes_of(head, params, start, size))
                places = of_tokens.block(start, size)
                picked += places.pick(z)
                others = places.leave_out(z)
                new_top = jnp.maximum(top, jax.lax.stop_gradient(others.max(-1)))
                shift = partial.finite(new_top)
                total = total * jnp.exp(top - shift) + jnp.exp(others - shift[:, None]).sum(-1)
                return picked, new_top, total

            nothing = blocks.zeros((length,), dtype, x)
            carry = blocks.zeros(of_tokens.classes.shape, dtype, x), nothing - jnp.inf, nothing
            picked, top, total = blocks.for_each(num_classes, head.plan.classes, on_classes, carry)
            is_none = total == 0
            rest = top + jnp.log(jnp.where(is_none, jnp.ones_like(total), total))
            rest = jnp.where(is_none, jnp.full_like(rest, -jnp.inf), rest)
            return blocks.put(out, jnp.concatenate([picked, rest[:, None]], axis=-1), first)

        out = blocks.zeros((inputs.shape[0], classes.shape[1] + 1), dtype, inputs)
        return blocks.for_each(inputs.shape[0], head.plan.tokens, on_tokens, out)

    def forward(self, backend, needs_grad, *args):
        del backend, needs_grad
        buckets = self.reference(*args)
        return buckets, buckets

    def backward(self, backend, needs_grad, args, summary, cotangents):
        inputs, params, classes = args
        # Places stand for the mass on a block, and cotangents of buckets for those of losses.
        places, tokens = (
            cast(Any, x) for x in (Places(classes), BucketGradient(summary[:, -1], cotangents))
        )
        needs, known = (*needs_grad[:2], ()), (inputs, params, places, None)
        of_inputs, of_params, _ = recomputed.gradients(self.head, needs, known, tokens, backend)
        return of_inputs, of_params, classes


class Places(NamedTuple):
    """Classes of each token, int32[N, K], counted from the first class of a block of logits.

    Those below 0, or past the block's last class, are not in it.
    """

    classes: jax.Array

    def block(self, start: jax.typing.ArrayLike, size: int) -> "Places":
        """Returns the same classes, counted from `start`."""
        del size
        return Places(self.classes - start)

    def pick(self, logits: jax.Array) -> jax.Array:
        """Returns the logits at these classes, [N, K]; 0 for those that are not in the block."""
        inside, at = self._inside(logits)
        return jnp.where(inside, masses.at_classes(logits, at), jnp.zeros((), logits.dtype))

    def leave_out(self, logits: jax.Array) -> jax.Array:
        """Returns the logits with −∞ at these classes."""
        lowest = jnp.full(self.classes.shape, -jnp.inf, logits.dtype)
        return logits.at[self._rows_and_places(logits)].set(lowest, mode="drop")

    def add(self, logits: jax.Array, values: jax.Array) -> jax.Array:
        """Returns the logits with values [N, K] added at these classes."""
        return logits.at[self._rows_and_places(logits)].add(values, mode="drop")

    def _inside(self, logits):
        size = logits.shape[-1]
        return is_valid(self.classes, size), jnp.clip(self.classes, 0, size - 1)

    def _rows_and_places(self, logits):
        """Returns the index of these classes, which is out of range for those of another block."""
        inside, at = self._inside(logits)
        return masses.rows_and(jnp.where(inside, at, jnp.full_like(at, logits.shape[-1])))


class BucketGradient(NamedTuple):
    """The numbers that the gradient of some tokens is made from.

    Attributes:
      rest: The logit of the last bucket, [N].
      cotangents: Those of the buckets, [N, K + 1].
    """

    rest: jax.Array
    cotangents: jax.Array

    def of_logits(self, logits: jax.Array, places: Places, backend: Backend) -> jax.Array:
        """Returns the cotangent of the logits of some classes."""
        del backend
        shares = jnp.exp(places.leave_out(logits) - partial.finite(self.rest)[:, None])
        return places.add(self.cotangents[:, -1:] * shares, self.cotangents[:, :-1])
