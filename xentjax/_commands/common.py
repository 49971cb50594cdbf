"""What the commands that train and draw have in common."""

import sys

from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73")  # Apart for colour-blind readers too.


def fail(message: str) -> int:
    """Prints what went wrong; returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 1


def tidy(ax: Axes) -> None:
    """Puts a faint grid behind what is drawn, and takes away the frame."""
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
