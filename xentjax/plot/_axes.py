"""Parts that the pictures share: axes, the style of the notebooks, units, words beside points."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from xentjax._jax import checks

STYLE = {
    "axes.prop_cycle": cycler(
        color=["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]
    ),
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.dpi": 80,
    "figure.figsize": (6.4, 3.4),
    "grid.alpha": 0.3,
    "image.cmap": "cividis",
    "legend.frameon": False,
    "lines.linewidth": 2,
}
"""Settings of matplotlib: the style of the notebooks, with Okabe and Ito's colours."""

GREY = "0.4"


def axes(ax: Axes | None) -> Axes:
    """Returns the axes to draw into."""
    if ax is None:
        return plt.gca()
    checks.check(isinstance(ax, Axes), f"ax: expected matplotlib Axes, got {ax!r}", TypeError)
    return ax


def colour(i: int) -> str:
    """Returns a colour of the user's style as it is now; "C0" would be looked up at drawing."""
    return to_hex(f"C{i}")


def unit(base: float | None) -> str:
    """Returns the unit of a base of logarithms, for a label."""
    return {None: "nats", 2: "bits"}.get(base) or f"units of base {base:g}"


def nats(base: float | None) -> float:
    """Returns one unit of a base in nats."""
    return 1.0 if base is None else math.log(base)


def names_of(classes: Sequence[str] | None, count: int) -> list[str]:
    """Returns the names of classes: numbers, where there are none."""
    if classes is None:
        return [str(v) for v in range(count)]
    checks.check(
        len(classes) == count, f"classes: expected {count} names, got {len(classes)} names"
    )
    return list(classes)
