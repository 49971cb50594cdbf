"""Reliability diagrams."""

import numpy as np
from jaxtyping import ArrayLike
from matplotlib.axes import Axes

from xentjax._jax import checks
from xentjax.plot._axes import GREY, axes

MARKERS = "osD^v"


def reliability(
    confidence: ArrayLike,
    accuracy: ArrayLike,
    counts: ArrayLike,
    *,
    label: str | None = None,
    fewest: int = 1,
    ax: Axes | None = None,
) -> Axes:
    """Draws the accuracy of bins of predictions by their confidence.

    A calibrated model keeps to the diagonal. Call it again with the same axes for another model.

    Args:
      confidence: The mean confidence of each bin, float[B]; NaN in an empty one.
      accuracy: The share of each bin that was right, float[B].
      counts: How many predictions each bin has, [B].
      label: The name of the model, for the legend.
      fewest: Bins of fewer predictions are not drawn: their accuracy is mostly chance.
      ax: The axes to draw into; None takes pyplot's current ones.

    Returns:
      The axes, in percent.

    Raises:
      ValueError: The shapes differ.
      TypeError: ax is no Axes.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> import xentjax.plot
      >>> _, ax = plt.subplots()
      >>> ax = xentjax.plot.reliability([0.55, 0.95], [0.5, 0.9], [10, 30], label="a model", ax=ax)
      >>> ax.get_xlabel()
      'confidence (%)'

    Source:
      Guo et al., On Calibration of Modern Neural Networks, 2017, section 2.
    """
    ax = axes(ax)
    confidence, accuracy, counts = map(np.asarray, (confidence, accuracy, counts))
    for name, x in {"accuracy": accuracy, "counts": counts}.items():
        expected = f"{name}: expected shape {confidence.shape} (that of confidence), got {x.shape}"
        checks.check(x.shape == confidence.shape, expected)
    drawn = sum(line.get_marker() in tuple(MARKERS) for line in ax.lines)
    if not drawn:
        ax.plot([0, 100], [0, 100], color=GREY, ls=":", lw=1.5, label="calibrated")
        ax.text(3, 35, "too cautious", color=GREY, fontstyle="italic")
        ax.text(97, 15, "too sure", color=GREY, fontstyle="italic", ha="right")
    shown = counts >= max(fewest, 1)
    look = {"color": f"C{drawn}", "marker": MARKERS[drawn % len(MARKERS)], "clip_on": False}
    ax.plot(100 * confidence[shown], 100 * accuracy[shown], **look, label=label)
    ax.set(xlim=(0, 100), ylim=(0, 103), xlabel="confidence (%)", ylabel="accuracy (%)")
    ax.set_title("Reliability" + (f" (bins of {fewest} predictions or more)" if fewest > 1 else ""))
    ax.legend(loc="upper left", fontsize="small")
    return ax
