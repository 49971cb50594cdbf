"""Helpers that the commands share which train, measure and draw."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from xentjax._explain.text import Column, definitions, paragraph, table

COLOURS = ("#0072b2", "#d55e00", "#009e73")  # Apart for colour-blind readers too.
SPEED_PERIOD = 3600  # Seconds that the time left is estimated from: one step may take minutes.


def fail(message: str) -> int:
    """Prints an error; returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 1


def check_writable(option: str, path: Path) -> None:
    """Raises ArgumentError where `path` cannot be written; leaves a file that is there as it is."""
    is_new = not os.path.exists(path)  # Path.exists raises where a name is too long.
    try:
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        expected = f"expected a file that can be written, got {str(path)!r}"
        raise argparse.ArgumentError(
            None, f"argument {option}: {expected}: {error.strerror}"
        ) from None


def columns_of(
    name: str, rows: Mapping[str, Any], cells: Mapping[str, Callable[[Any], str]]
) -> list[list[str]]:
    """Returns a table by column: the names of rows, then a cell of each row under each heading."""
    found = [[heading, *map(cell, rows.values())] for heading, cell in cells.items()]
    return [[name, *rows], *found]


def result_lines(
    columns: Sequence[Column], words: Sequence[tuple[str, ...]], end: str
) -> list[str]:
    """Returns the lines of a table, of the meanings of its words, and of a closing sentence."""
    return ["", *table(columns), "", *definitions(words), "", *paragraph(end)]


def progress_bar() -> Progress:
    """Returns a bar that shows the time so far and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        speed_estimate_period=SPEED_PERIOD,
        console=Console(),  # As wide as the terminal is now.
    )


def tidy(ax: Axes) -> None:
    """Puts a faint grid behind the curves, and takes away the frame."""
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
