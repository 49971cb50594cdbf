"""Reliability diagrams."""

import jax
import numpy as np
from matplotlib.axes import Axes

from xentjax._losses.calibration import ReliabilityBins
from xentjax.plot._axes import GREY, axes, colour

MARKERS = "osD^v"


def reliability(
    bins: ReliabilityBins,
    *,
    label: str | None = None,
    fewest: int = 1,
    ax: Axes | None = None,
) -> Axes:
    """Draws the accuracy of bins of predictions by their confidence.

    A calibrated model keeps to the diagonal. Call it again with the same axes for another model.

    Args:
      bins: Those that `xentjax.reliability_bins` returns.
      label: The name of the model, for the legend.
      fewest: Bins of fewer predictions are not drawn: their accuracy is mostly chance.
      ax: The axes to draw into; None takes pyplot's current ones.

    Returns:
      The axes, in percent.

    Raises:
      TypeError: ax is no Axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> import xentjax
      >>> import xentjax.plot
      >>> logits, labels = jnp.array([[2.0, 0.0], [0.5, 0.0], [0.0, 1.0]]), jnp.array([0, 1, 1])
      >>> bins = xentjax.reliability_bins(logits, labels, num_bins=5)
      >>> _, ax = plt.subplots()
      >>> xentjax.plot.reliability(bins, label="a model", ax=ax).get_xlabel()
      'confidence (%)'

    Source:
      Guo et al., On Calibration of Modern Neural Networks, 2017, section 2.
    """
    ax = axes(ax)
    counts, confidence, correct = (np.asarray(x, np.float64) for x in jax.tree.leaves(bins))
    drawn = sum(line.get_marker() in tuple(MARKERS) for line in ax.lines)
    if not drawn:
        ax.plot([0, 100], [0, 100], color=GREY, ls=":", lw=1.5, label="calibrated")
        ax.text(3, 35, "too cautious", color=GREY, fontstyle="italic")
        ax.text(97, 15, "too sure", color=GREY, fontstyle="italic", ha="right")
    shown = counts >= max(fewest, 1)
    x, y = (100 * sums[shown] / counts[shown] for sums in (confidence, correct))
    look = {"color": colour(drawn), "marker": MARKERS[drawn % len(MARKERS)], "clip_on": False}
    ax.plot(x, y, **look, label=label)
    ax.set(xlim=(0, 100), ylim=(0, 103), xlabel="confidence (%)", ylabel="accuracy (%)")
    ax.set_title("Reliability" + (f" (bins of {fewest} predictions or more)" if fewest > 1 else ""))
    ax.legend(loc="upper left", fontsize="small")
    return ax
