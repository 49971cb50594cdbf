"""An explanation as a table with bars, for notebooks: styles in place, no script, any theme."""

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from xentjax._explain.report import columns, decimals, examples, title

if TYPE_CHECKING:
    from xentjax._explain.explanation import Explanation

MAX_ROWS = 40  # More classes are not shown: the ones with most mass or probability are.
BARS = {"probability": "#0072b2", "truth": "#009e73", "share": "#cc79a7", "gradient": "#d55e00"}

_CELL = "padding:0.15em 0.7em;white-space:nowrap;text-align:right"
_HEAD = f"{_CELL};vertical-align:bottom;font-weight:600"


def as_html(e: "Explanation") -> str:
    """Returns a table for each example, and says how many were left out."""
    tables = [_table(one, name) for name, one in examples(e)]
    left = e.losses.size - len(tables)
    more = [f"<p>… and {left} more examples</p>"] * (left > 0)
    return f'<div style="overflow-x:auto">{"".join([*tables, *more])}</div>'


def _table(e: "Explanation", name: str) -> str:
    rows = _rows(e)
    heads = "".join(
        f'<th style="{_HEAD};text-align:{_side(head)}">{escape(head)}<br>'
        f'<i style="font-weight:400">{_subscripts(symbol)}</i></th>'
        for head, symbol, _ in columns(e)
    )
    columns_of_cells = [_cells(e, head, cells) for head, _, cells in columns(e)]
    body = "".join(f"<tr>{''.join(column[v] for column in columns_of_cells)}</tr>" for v in rows)
    left = len(e.classes) - len(rows)
    more = f'<p style="margin:0.2em 0.7em">… and {left} more classes</p>' if left else ""
    return (
        '<table style="border-collapse:collapse;margin:0.5em 0">'
        f'<caption style="caption-side:top;text-align:left;padding:0.3em 0.7em">'
        f"{escape(name + title(e))}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{more}"
        f'<p style="margin:0.2em 0.7em 0.8em">{escape(_summary(e))}</p>'
    )


def _side(head: str) -> str:
    """Returns the side that a column is set to: names to the left, numbers to the right."""
    return "left" if head == "class" else "right"


def _subscripts(symbol: str) -> str:
    return escape(symbol).replace("_v", "<sub>v</sub>")


def _rows(e: "Explanation") -> list[int]:
    """Returns the classes to show, in their order."""
    weight = np.maximum(e.probabilities, e.targets)
    return sorted(np.argsort(-weight, kind="stable")[:MAX_ROWS].tolist())


def _cells(e: "Explanation", head: str, cells: list[str]) -> list[str]:
    """Returns the cells of one column, with a bar behind a number that has one."""
    values = {
        "probability": e.probabilities,
        "truth": e.targets,
        "share": e.shares,
        "gradient": e.gradients,
    }.get(head)
    if values is None:
        return [
            f'<td style="{_CELL};text-align:{_side(head)}">{escape(cell)}</td>' for cell in cells
        ]
    finite = np.abs(values[np.isfinite(values)])
    largest = max(float(finite.max(initial=0)), 1.0 if head in ("probability", "truth") else 0.0)
    return [
        f'<td style="{_CELL}">{escape(cell)}{_bar(value, largest, BARS[head])}</td>'
        for cell, value in zip(cells, values, strict=True)
    ]


def _bar(value: float, largest: float, colour: str) -> str:
    """Returns a bar below the number; negative ones are hatched."""
    share = 1.0 if np.isinf(value) else abs(value) / largest if largest else 0.0
    fill = (
        f"repeating-linear-gradient(45deg,{colour} 0 2px,transparent 2px 4px)"
        if value < 0
        else colour
    )
    return (
        '<div style="height:4px;width:6em;margin-left:auto">'
        f'<div style="height:4px;width:{100 * share:.1f}%;background:{fill}"></div></div>'
    )


def _summary(e: "Explanation") -> str:
    """Returns the numbers of one example in one line."""
    numbers = {
        "entropy": e.entropy,
        "target’s entropy": e.target_entropy,
        "cross-entropy": e.cross_entropy,
        "KL": e.kl_divergence,
        "loss": e.losses,
    }
    found = " · ".join(f"{name} {decimals(value)}" for name, value in numbers.items())
    return f"{found} ({e.unit}). A hatched bar is negative."
