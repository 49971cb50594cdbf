"""Tables and explanations in plain text, no wider than the terminal; no number is ever cut."""

import shutil
import textwrap
import unicodedata
from collections.abc import Sequence

Column = Sequence[str]
"""A heading, whose lines end in "\\n", and the cells below it."""

GAP = "  "


def terminal_width() -> int:
    """Returns the columns of the terminal: 80 where there is none."""
    return shutil.get_terminal_size().columns


def width(text: str) -> int:
    """Returns the columns of a terminal that `text` takes: 2 for wide signs, as 🐼."""
    return sum(1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)


def table(columns: Sequence[Column]) -> list[str]:
    """Returns the lines of a table, with the first column set to the left and others to the right.

    A table that is too wide has narrower gaps. Columns that do not fit even so stand below, with
    the first column again.
    """
    widths = [_column_width(column) for column in columns]
    room = terminal_width() - widths[0]
    gap = GAP if sum(widths[1:]) + len(GAP) * (len(widths) - 1) <= room else " "
    lines, block, left = [], [columns[0]], room
    for column, width_of_column in zip(columns[1:], widths[1:], strict=True):
        needed = len(gap) + width_of_column
        if len(block) > 1 and needed > left:
            lines += [*_block(block, gap), ""]
            block, left = [columns[0]], room
        block.append(column)
        left -= needed
    return lines + _block(block, gap)


def _column_width(column: Column) -> int:
    return max(width(line) for text in column for line in text.split("\n"))


def _block(columns: Sequence[Column], gap: str) -> list[str]:
    """Returns headings, a rule and rows."""
    widths = [_column_width(column) for column in columns]
    headings = [column[0].split("\n") for column in columns]
    height = max(map(len, headings))
    headings = [[""] * (height - len(lines)) + lines for lines in headings]
    rule = "─" * (sum(widths) + len(gap) * (len(widths) - 1))
    rows = zip(*(column[1:] for column in columns), strict=True)
    return [
        *(_row(cells, widths, gap) for cells in zip(*headings, strict=True)),
        rule,
        *(_row(cells, widths, gap) for cells in rows),
    ]


def _row(cells: Sequence[str], widths: Sequence[int], gap: str) -> str:
    spaces = [" " * (most - width(cell)) for cell, most in zip(cells, widths, strict=True)]
    padded = [cells[0] + spaces[0], *map(str.__add__, spaces[1:], cells[1:])]
    return gap.join(padded).rstrip()


def paragraph(text: str, indent: str = "") -> list[str]:
    """Returns the lines of a text; those after the first begin with `indent`."""
    return textwrap.wrap(
        text,
        terminal_width(),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def definitions(entries: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns each (name, text, text, ...) as lines, with the name before the first text."""
    start = max(len(name) for name, *_ in entries) + len(GAP)
    lines = []
    for name, *texts in entries:
        for i, text in enumerate(texts):
            label = f"{'' if i else name:<{start}}"
            lines += paragraph(label + text, " " * start)
    return lines
