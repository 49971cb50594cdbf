"""Pictures of losses, targets and calibration, computed by the code that trains models.

`import xentjax.plot` needs matplotlib, which `pip install "xentjax[plot]"` brings. Every function
draws into `ax`, or into the current axes of pyplot, and returns the Axes. Colours and fonts are
those of the user's style; `plt.rcParams.update(xentjax.plot.STYLE)` sets that of the notebooks,
whose colours differ for colour-blind readers too.

Information.
  surprisal_curve: the cost of an outcome of each probability
  cross_entropy_areas: entropy and cross-entropy, as the areas of bars

Losses.
  log_loss: binary log loss for both labels
  log_loss_beside_difference: −log p beside 1 − p, or their slopes
  margin: loss or gradient by the margin of the right class, naive and exact
  simplex: the loss of every prediction over three classes, and where a step leads
  loss_surface: a loss over two directions in the space of its parameters

Targets and calibration.
  steps_to_target: prediction, target, and the steps from the one to the other
  target_bars: the mass on each class of targets of any form
  reliability: accuracy by confidence
"""

from xentjax.plot._axes import STYLE
from xentjax.plot._calibration import reliability
from xentjax.plot._information import cross_entropy_areas, surprisal_curve
from xentjax.plot._losses import log_loss, log_loss_beside_difference, loss_surface, margin, simplex
from xentjax.plot._targets import steps_to_target, target_bars

__all__ = [
    "STYLE",
    "surprisal_curve",
    "cross_entropy_areas",
    "log_loss",
    "log_loss_beside_difference",
    "margin",
    "simplex",
    "loss_surface",
    "steps_to_target",
    "target_bars",
    "reliability",
]
