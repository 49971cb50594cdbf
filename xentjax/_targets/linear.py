"""Targets that are the softmax of a teacher's head."""

import dataclasses

import jax
from jaxtyping import Array, ArrayLike, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearTargets:
    """The softmax of a teacher's logits as targets of a head, read block by block.

    t = softmax((inputs @ kernel + bias) / temperature)

    `linear_softmax_cross_entropy` and its kin take them as targets, so that neither the student's
    logits nor the teacher's are ever all in memory. They cost one or two matmuls more than labels
    do. Gradients go to the teacher's arrays only if they are asked for. The loss is the
    cross-entropy; the divergence is less by the teacher's entropy, which the student cannot change.

    A pytree: it goes through jit and shard_map as arrays do. In a `shard_map` that splits classes
    over devices, kernel and bias are this device's shards.

    Attributes:
      inputs: The teacher's features of each token, float[..., D], of the student's batch.
      kernel: float[D, V], or float[V, D] with class_axis=0; the student's V, and a D of its own.
      bias: float[V], or None.
      temperature: A positive scalar. To train the student at it too, its logit transform is
        `temperature(tau)`, and the loss times tau² has gradients of the usual size.
      class_axis: The axis of the kernel that counts classes: 0, or 1 or −1.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> student, teacher = jnp.eye(2, 3), jnp.eye(2, 4)
      >>> targets = xentjax.LinearTargets(teacher, jnp.ones((4, 5)), temperature=2.0)
      >>> loss = xentjax.linear_softmax_cross_entropy(student, jnp.zeros((3, 5)), targets)
      >>> print(loss.round(4), jnp.log(5).round(4))
      1.6094 1.6094

    Source:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.
    """

    inputs: Float[Array, "*batch d"]
    kernel: Float[Array, "d v"] | Float[Array, "v d"]
    bias: Float[Array, " v"] | None = dataclasses.field(default=None, kw_only=True)
    temperature: ArrayLike = dataclasses.field(default=1.0, kw_only=True)
    class_axis: int = dataclasses.field(default=-1, kw_only=True, metadata={"static": True})
