"""The speed map of `python -m xentjax bench --map`: optax beside xentjax at every kind of size.

A speed is optax's time ÷ ours; a compile time is ours ÷ optax's.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from xentjax._commands.bench.report import describe, ratio_text, three_digits
from xentjax._commands.bench.timing import Measurement
from xentjax._explain.text import definitions, table

GOALS = {"value": 0.8, "gradient": 0.95}
"""The least speed that a case should have."""

LEGEND = (
    ("ours, ms", "median of the samples, of the mean loss (∇: with its gradient)"),
    ("speed", "optax's time ÷ ours: above 1, xentjax is faster"),
    ("compile", "our time to trace and compile from nothing ÷ optax's"),
    ("x50", "logits times 50"),
    ("low16", "the first 16 columns of the logits at −200"),
    ("excluded", "dense targets; a tenth of the classes is ruled out: target 0, logit −inf"),
    ("unusual", "x50, low16 and excluded"),
)


def speed(m: Measurement) -> float:
    """Returns optax's time ÷ ours."""
    return m.outcomes["optax"].median() / m.outcomes["xentjax"].median()


def compile_ratio(m: Measurement) -> float:
    """Returns our time to trace and compile ÷ optax's."""
    return m.outcomes["xentjax"].compile_median() / m.outcomes["optax"].compile_median()


def tables(measurements: Sequence[Measurement]) -> Iterator[str]:
    """Yields lines: the speed of every case, the price of unusual logits, and a summary."""
    groups: dict[tuple, list[Measurement]] = {}
    for m in measurements:
        groups.setdefault((m.case.shape, m.case.dtype), []).append(m)
    for (size, dtype), group in groups.items():
        yield from ("", f"{size.examples} × {size.classes} {dtype}", *table(_columns(group)))
    yield from ("", *definitions(LEGEND))
    unusual = list(beside_ordinary(measurements))
    if unusual:
        rows = [(describe(m), ratio_text(ratio)) for m, ratio in unusual]
        yield from ("", "Our time ÷ our time with ordinary logits")
        yield from table(_by_column(("", "÷"), rows))
    yield from ("", "Geometric means of the compiled cases, and the worst case")
    yield from _summary_lines(summary(measurements))
    yield from below_goals(measurements)


def _by_column(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [list(column) for column in zip(headings, *rows, strict=True)]


def _columns(group: Sequence[Measurement]) -> list[list[str]]:
    """Returns the table of one size and dtype: a row has the value and the gradient."""
    headings = ["", "ours,\nms", "\nspeed", "com-\npile"]
    headings += ["∇ ours,\nms", "∇\nspeed", "∇ com-\npile"]
    found: dict[str, dict[str, Measurement]] = {}
    for m in group:
        logits = "" if m.case.logits == "ordinary" else f" {m.case.logits}"
        found.setdefault(m.case.loss + logits, {})[m.case.output] = m
    rows = []
    for name, outputs in found.items():
        cells = [_cells(outputs[x]) if x in outputs else ["", "", ""] for x in GOALS]
        rows.append([name, *cells[0], *cells[1]])
    return _by_column(headings, rows)


def _cells(m: Measurement) -> list[str]:
    ratios = ratio_text(speed(m)), ratio_text(compile_ratio(m))
    return [three_digits(1000 * m.outcomes["xentjax"].median()), *ratios]


def beside_ordinary(measurements: Sequence[Measurement]) -> Iterator[tuple[Measurement, float]]:
    """Yields each case of unusual logits, and our time ÷ that with ordinary logits."""
    found = {m.case: m for m in measurements}
    for m in measurements:
        ordinary = found.get(dataclasses.replace(m.case, logits="ordinary"))
        if m.case.logits != "ordinary" and ordinary is not None:
            ours, usual = (x.outcomes["xentjax"].median() for x in (m, ordinary))
            yield m, ours / usual


def summary(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Returns `side` of the usual and of the unusual cases, for speeds and compile times.

    Only compiled cases count.
    """
    compiled = [m for m in measurements if not m.case.is_eager]
    groups = {
        "usual": [m for m in compiled if not m.case.is_unusual],
        "unusual": [m for m in compiled if m.case.is_unusual],
    }
    return {
        name: {
            "speed": side([m for m in group if m.case.output == "value"], speed, min),
            "speed ∇": side([m for m in group if m.case.output == "gradient"], speed, min),
            "compile": side(group, compile_ratio, max),
        }
        for name, group in groups.items()
    }


def side(
    measurements: Sequence[Measurement],
    ratio: Callable[[Measurement], float],
    worst_of: Callable[..., Measurement],
) -> dict[str, Any] | None:
    """Returns how many cases there are, the geometric mean of a ratio, and the worst case."""
    measured = [m for m in measurements if math.isfinite(ratio(m))]
    if not measured:
        return None
    worst = worst_of(measured, key=ratio)
    return {
        "cases": len(measured),
        "geometric_mean": float(np.exp(np.mean(np.log([ratio(m) for m in measured])))),
        "worst": ratio(worst),
        "worst_case": describe(worst),
    }


def _summary_lines(found: dict[str, Any]) -> list[str]:
    """Returns the table of a summary, and the names of the worst cases below it."""
    rows, worst = [], []
    for group, sides in found.items():
        for name, numbers in sides.items():
            if numbers is not None:
                ratios = ratio_text(numbers["geometric_mean"]), ratio_text(numbers["worst"])
                rows.append((f"{group}, {name}", str(numbers["cases"]), *ratios))
                worst.append((f"{group}, {name}", numbers["worst_case"]))
    return [*table(_by_column(("", "cases", "mean", "worst"), rows)), "", *definitions(worst)]


def below_goals(measurements: Sequence[Measurement]) -> Iterator[str]:
    """Yields a heading for each goal, and the cases that miss it, slowest first."""
    for output, goal in GOALS.items():
        ms = [m for m in measurements if m.case.output == output]
        missed = sorted((m for m in ms if speed(m) < goal), key=speed)
        if ms:
            yield f"\nSpeed below {goal:g}, {output}: {len(missed)} of {len(ms)}"
            yield from (f"  {ratio_text(speed(m))}  {describe(m)}" for m in missed)
