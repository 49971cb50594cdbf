"""Targets of any form as bars, and an explanation as steps from prediction to target."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from xentjax._jax import checks
from xentjax._targets.transforms import dense_targets
from xentjax._targets.types import Targets
from xentjax.plot._axes import axes, names_of

if TYPE_CHECKING:
    from xentjax._explain.explanation import Explanation

HATCHES = ("", "//", "..", "xx", "\\\\", "oo")  # Bars differ without their colours too.


def target_bars(
    targets: Mapping[str, Targets],
    num_classes: int,
    *,
    classes: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the mass that targets of any form put on each class, as bars side by side.

    Args:
      targets: Targets of one example each, by their names: labels, dense, or SparseTargets.
      num_classes: V.
      classes: The names of the V classes; None numbers them from 0.
      ax: The axes to draw into; None takes pyplot's current ones.

    Returns:
      The axes.

    Raises:
      ValueError: Targets are not those of one example of V classes.
      TypeError: Targets have a dtype that cannot be one, or ax is no Axes.

    Example:
      >>> import xentjax
      >>> import matplotlib.pyplot as plt
      >>> import xentjax.plot
      >>> _, ax = plt.subplots()
      >>> kinds = {"label": 1, "smoothed": xentjax.smooth_labels(1, 0.1)}
      >>> ax = xentjax.plot.target_bars(kinds, 4, ax=ax)
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['label', 'smoothed']
    """
    ax, names = axes(ax), names_of(classes, num_classes)
    width = 0.8 / max(len(targets), 1)
    for i, (name, target) in enumerate(targets.items()):
        mass = np.asarray(dense_targets(target, num_classes))
        checks.check(
            mass.ndim == 1, f"targets: expected one example, got {mass.shape[:-1]} for {name!r}"
        )
        left = np.arange(num_classes) - 0.4 + (i + 0.5) * width
        hatch = HATCHES[i % len(HATCHES)]
        ax.bar(left, mass, width, color=f"C{i}", hatch=hatch, edgecolor="white", label=name)
    ax.set_xticks(np.arange(num_classes), names)
    ax.set(xlabel="class", ylabel="target mass (a share of 1)", title="Targets")
    ax.grid(visible=False, axis="x")
    ax.legend()
    return ax


def explanation(e: "Explanation", *, ax: Axes | None = None) -> Axes:
    """Draws prediction and target of one example, and the step from the one to the other.

    An arrow leads from T · p_v to t_v: it is as long as −∂loss/∂z_v is large, in nats. For sigmoid
    it leads from p_v to t_v.

    Args:
      e: What `xentjax.explain` returns, of one example.
      ax: The axes to draw into; None takes pyplot's current ones.

    Returns:
      The axes, with the loss in the title.

    Raises:
      ValueError: e is of a batch.
      TypeError: ax is no Axes.

    Example:
      >>> import xentjax
      >>> import matplotlib.pyplot as plt
      >>> import xentjax.plot
      >>> _, ax = plt.subplots()
      >>> e = xentjax.explain([0.1, 0.2, 0.7], 2, given="probabilities")
      >>> xentjax.plot.explanation(e, ax=ax).get_title()
      'loss = 0.3567 nats'
    """
    ax = axes(ax)
    shape = np.shape(e.losses)
    checks.check(shape == (), f"e: expected one example, e[i] of a batch, got a batch of {shape}")
    total = 1.0 if e.link == "sigmoid" else float(e.mass)
    prediction, target = total * e.probabilities, e.targets
    rows = np.arange(len(e.classes))
    symbol = "p" if np.isclose(total, 1) else "T · p"
    ax.barh(rows, prediction, 0.6, color="C0", alpha=0.85, label=f"prediction, {symbol}")
    ax.plot(target, rows, "D", color="C1", clip_on=False, zorder=4, label="target, t")
    for row, start, end in zip(rows, prediction, target, strict=True):
        if abs(end - start) > 1e-3:
            arrow = {"arrowstyle": "->", "color": "black", "lw": 1.5, "shrinkA": 0, "shrinkB": 3}
            ax.annotate("", (end, row), (start, row), arrowprops=arrow, zorder=3)
    ax.plot([], [], color="black", lw=1.5, label="step against the gradient")
    ax.set_yticks(rows, e.classes)
    ax.invert_yaxis()
    ax.set(xlabel="probability", xlim=(0, 1.03 * max(1.0, prediction.max(), target.max())))
    ax.set_title(f"loss = {float(e.losses):.4f} {e.unit}")
    ax.grid(visible=False, axis="y")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, fontsize="small")
    return ax
