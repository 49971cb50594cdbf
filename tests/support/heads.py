"""The fused head under a plan that a test chooses: blocks as small as its arrays."""

from xentjax._jax import mesh as meshes
from xentjax._losses import linear
from xentjax._losses.linear import Options


def linear_loss(
    inputs, kernel, targets, *, bias=None, where=None, weights=None, reduction="mean", **options
):
    """Returns what `linear_softmax_cross_entropy` does, under `plan`, and with other options."""
    arrays = linear.as_arrays(inputs, kernel, targets, bias, where, weights)
    return linear.losses_of(arrays, Options(**options), reduction)


def linear_loss_and_stats(inputs, kernel, targets, *, bias=None, where=None, **options):
    """Returns what `linear_softmax_cross_entropy_with_stats` does, under `plan`."""
    arrays = linear.as_arrays(inputs, kernel, targets, bias, where, None)
    return linear._losses_and_stats(arrays, Options(**options, with_stats=True))


def vocab_parallel_loss(*args, axis_name, **kwargs):
    """Returns what `vocab_parallel_linear_softmax_cross_entropy` does, under `plan`."""
    return linear_loss(*args, axes=meshes.axis_names(axis_name), **kwargs)
