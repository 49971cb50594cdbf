"""Targets of any form as bars, and the steps from a prediction to its target."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import ArrayLike
from matplotlib.axes import Axes

from xentjax._jax import checks
from xentjax._targets.transforms import dense_targets
from xentjax._targets.types import Targets
from xentjax.plot._axes import axes, colour, names_of

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
        ax.bar(left, mass, width, color=colour(i), hatch=hatch, edgecolor="white", label=name)
    ax.set_xticks(np.arange(num_classes), names)
    ax.set(xlabel="class", ylabel="target mass (a share of 1)", title="Targets")
    ax.grid(visible=False, axis="x")
    ax.legend()
    return ax


def steps_to_target(
    prediction: ArrayLike,
    target: ArrayLike,
    *,
    classes: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the prediction for one example, its target, and an arrow from the one to the other.

    With prediction T · p, where T = Σ_v t_v, the arrow of class v is −∂loss/∂z_v = t_v − T · p_v.

    Args:
      prediction: Probabilities times the mass of the target, float[V].
      target: Masses, float[V].
      classes: The names of the V classes; None numbers them from 0.
      ax: The axes to draw into; None takes pyplot's current ones.

    Returns:
      The axes.

    Raises:
      ValueError: The shapes differ, or are those of a batch.
      TypeError: ax is no Axes.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> import xentjax.plot
      >>> _, ax = plt.subplots()
      >>> ax = xentjax.plot.steps_to_target([0.1, 0.2, 0.7], [0.0, 0.0, 1.0], ax=ax)
      >>> ax.get_title()
      'Prediction and target (shares of 1)'
    """
    ax, p, t = axes(ax), np.asarray(prediction, float), np.asarray(target, float)
    expected = f"prediction: expected shape [V], one example, got {p.shape}"
    checks.check(p.ndim == 1, expected)
    expected = f"target: expected shape {p.shape}, that of prediction, got {t.shape}"
    checks.check(t.shape == p.shape, expected)
    names, rows = names_of(classes, p.size), np.arange(p.size)
    ax.barh(rows, p, 0.6, color=colour(0), alpha=0.85, label="prediction")
    ax.plot(t, rows, "D", color=colour(1), clip_on=False, zorder=4, label="target")
    for row, start, end in zip(rows, p, t, strict=True):
        if abs(end - start) > 1e-3:
            arrow = {"arrowstyle": "->", "color": "black", "lw": 1.5, "shrinkA": 0, "shrinkB": 3}
            ax.annotate("", (end, row), (start, row), arrowprops=arrow, zorder=3)
    ax.plot([], [], color="black", lw=1.5, label="step against the gradient")
    ax.set_yticks(rows, names)
    ax.invert_yaxis()
    ax.set(xlabel="share of 1", xlim=(0, 1.03 * max(1.0, p.max(), t.max())))
    ax.set_title("Prediction and target (shares of 1)")
    ax.grid(visible=False, axis="y")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, fontsize="small")
    return ax
