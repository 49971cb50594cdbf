"""The fused head under a plan that a test chooses: blocks as small as its arrays."""

from xentjax._jax import mesh as meshes
from xentjax._losses import linear
from xentjax._losses.linear import Options

ARRAYS = ("bias", "class_mask", "where", "weights", "z_loss")


def call(inputs, kernel, targets, options):
    """Returns (the arrays of a head, its other options)."""
    given = {name: options.pop(name, None) for name in ARRAYS}
    if "axis_name" in options:
        options["axes"] = meshes.axis_names(options.pop("axis_name"))
    return linear.as_arrays(inputs, kernel, targets, **given), options


def linear_loss(inputs, kernel, targets, *, reduction="mean", **options):
    """Returns the loss of `linear_softmax_cross_entropy`, or on a mesh, under `plan`."""
    arrays, options = call(inputs, kernel, targets, options)
    return linear.losses_of(arrays, Options(**options), reduction)


def linear_loss_and_stats(inputs, kernel, targets, **options):
    """Returns (losses, SoftmaxStats) of a head under `plan`."""
    arrays, options = call(inputs, kernel, targets, options)
    return linear.losses_and_stats(arrays, Options(**options, with_stats=True))
