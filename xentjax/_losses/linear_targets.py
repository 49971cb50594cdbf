"""The front door of a teacher's head: `LinearTargets` become checked arrays and a mass."""

from typing import Any

import jax
import jax.numpy as jnp

from xentjax._jax import checks
from xentjax._losses import stats
from xentjax._softmax import head_teacher as teacher
from xentjax._softmax.head_blocks import Head, Params, identity
from xentjax._softmax.head_plan import HeadPlan
from xentjax._softmax.head_teacher import TeacherMass
from xentjax._softmax.partial import masked
from xentjax._targets.linear import LinearTargets


def as_arrays(targets: LinearTargets) -> LinearTargets:
    """Returns the targets with arrays of the right dtypes."""

    def floating(name):
        x = checks.as_array(f"targets.{name}", getattr(targets, name))
        checks.check_floating(f"targets.{name}", x)
        return x

    return LinearTargets(
        floating("inputs"),
        floating("kernel"),
        bias=None if targets.bias is None else floating("bias"),
        temperature=checks.as_positive("targets.temperature", targets.temperature),
        class_axis=targets.class_axis,
    )


def as_mass(
    targets: LinearTargets,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    mask: jax.Array | None,
    class_mask: jax.Array | None,
) -> TeacherMass:
    """Returns the mass of targets for logits of a shape [..., V], in a dtype."""
    inputs, kernel = targets.inputs, targets.kernel
    class_axis, (batch, num_classes) = checked_shapes(
        "targets.", inputs, kernel, targets.class_axis
    )
    checks.check(
        (*batch, num_classes) == shape,
        f"targets: expected a teacher of {shape[:-1]} tokens and {shape[-1]} classes, those of "
        f"inputs and kernel, got {batch} tokens and {num_classes} classes",
    )
    if targets.bias is not None:
        checks.check_shape("targets.bias", targets.bias, (num_classes,), "the classes of kernel")
    params = Params(kernel, targets.bias, class_mask, [])
    # Its plan is that of the student's head, which reads it.
    head = Head(class_axis, identity, HeadPlan(1, 1, False))
    inputs = masked(inputs, mask)
    tau = jnp.asarray(targets.temperature)
    return TeacherMass(inputs, params, tau, None, None, head, dtype)


def heaviest(head: Head, mass: TeacherMass) -> jax.Array:
    """Returns the class of the largest mass, int32[N], the first of all devices' classes."""
    largest, labels = teacher.heaviest(head, jax.lax.stop_gradient(mass))
    if not head.axes:
        return labels
    is_largest = largest == jax.lax.pmax(largest, head.axes)
    return stats.first(
        is_largest, labels, mass.params.kernel.shape[mass.head.class_axis], head.axes
    )


def checked_shapes(
    of: str, inputs: jax.Array, kernel: jax.Array, class_axis: Any
) -> tuple[int, tuple[tuple[int, ...], int]]:
    """Returns (class_axis as 0 or 1, (batch, number of classes)) of a head.

    Errors name the arguments with `of` in front: "" or "targets.".
    """
    checks.check(
        inputs.ndim >= 1, f"{of}inputs: expected shape [..., D], got {checks.describe(inputs)}"
    )
    checks.check(
        kernel.ndim == 2,
        f"{of}kernel: expected shape [D, V], or [V, D] with class_axis=0, got "
        f"{checks.describe(kernel)}",
    )
    expected = f"{of}class_axis: expected −2, −1, 0 or 1, got {class_axis!r}"
    checks.check(checks.is_int(class_axis), expected, TypeError)
    checks.check(class_axis in (-2, -1, 0, 1), expected)
    class_axis %= 2
    (*batch, features), num_classes = inputs.shape, kernel.shape[class_axis]
    checks.check_known(f"{of}inputs", features, "features")
    checks.check_known(f"{of}kernel", num_classes, "classes")
    checks.check(
        kernel.shape[1 - class_axis] == features and num_classes > 0,
        f"{of}kernel: expected {features} features (those of {of}inputs) on axis {1 - class_axis} "
        f"and at least one class on axis {class_axis}, got {checks.describe(kernel)}",
    )
    return class_axis, (tuple(batch), num_classes)
