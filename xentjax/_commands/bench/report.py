"""Tables and a picture of the measurements of `python -m xentjax bench`."""

import math
from collections.abc import Iterable, Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xentjax._commands.bench.cases import IN_PICTURE, MASKED, Plan, Size
from xentjax._commands.bench.contenders import CONTENDERS
from xentjax._commands.bench.timing import OUT_OF_MEMORY, Measurement, Outcome
from xentjax._commands.common import COLOURS, tidy
from xentjax._explain.text import definitions, paragraph, table

LEGEND = (
    ("∇", "with the gradient; else the mean loss alone"),
    ("eager", "one call that is not compiled"),
    ("ours, ms", "median of the samples; ±: half of the distance between their quartiles"),
    ("÷ ours", "how many times as long another takes: above 1, xentjax is faster"),
    ("ours ÷", "how many times as long as a copy of the logits, or as a head's matmuls"),
    ("temp. %", "temporaries beside arguments and results, in % of the logits"),
    ("compile", "optax's time to trace and compile from nothing ÷ ours"),
)


def tables(measurements: Sequence[Measurement]) -> Iterator[str]:
    """Yields the lines of a table for each size and dtype, and of their legend."""
    groups: dict[tuple, list[Measurement]] = {}
    for m in measurements:
        if m.case.size != "scaling":
            key = (m.case.is_head, m.case.loss in MASKED, m.case.size, m.case.dtype)
            groups.setdefault(key, []).append(m)
    for group in groups.values():
        yield from ("", *paragraph(_title(group)), *table(_columns(group)))
    if groups:
        yield from ("", *definitions(LEGEND))


def _columns(group: list[Measurement]) -> list[list[str]]:
    """Returns the table of cases that differ in the loss and in the output alone, by column."""
    case = group[0].case
    limit = "matmuls" if case.is_head else "copy"
    others = [name for name in group[0].outcomes if name in CONTENDERS[case.loss]][1:]
    headings = ["", "ours,\nms", "±"]
    headings += [name.replace(" ", "\n") + "\n÷ ours" for name in others]
    headings += [f"ours ÷\n{limit}", "temp. %\nours", "temp. %\noptax", "compile\n÷ ours"]
    rows = [headings]
    for m in group:
        ours, optax = m.outcomes["xentjax"], m.outcomes["optax"]
        low, median, high = ours.quartiles() if ours.seconds else (math.nan,) * 3
        row = [
            m.case.loss + (" ∇" if m.case.output == "gradient" else ""),
            ours.problem or three_digits(1000 * median),
            f"{50 * (high - low) / median:.0f}%" if ours.seconds else "",
            *(_ratio(m, name) for name in others),
            ratio_text(ours.median() / m.outcomes[limit].median()),
            *(_percent(outcome.temporaries, m.case.logits_bytes) for outcome in (ours, optax)),
            ratio_text(optax.compile_median() / ours.compile_median()),
        ]
        rows.append(row)
    return [list(column) for column in zip(*rows, strict=True)]


def _title(group: list[Measurement]) -> str:
    """Returns the size and the dtype of a table, and the times of its limits."""
    case = group[0].case
    n, v, features = case.shape
    kind = "masked head" if case.loss in MASKED else "head"
    shape = f"{kind} {n} × {features} × {v}" if case.is_head else f"{n} × {v}"
    takes = []
    for name in ("matmuls",) if case.is_head else ("copy", "read"):
        medians = [1000 * m.outcomes[name].median() for m in group]
        low, high = three_digits(min(medians)), three_digits(max(medians))
        takes.append(f"{name} {low if low == high else f'{low} … {high}'} ms")
    logits = f"{case.logits_bytes / 2**20:.3g} MiB"
    return f"{case.size}: {shape} {case.dtype}, {logits}; {', '.join(takes)}"


def _ratio(m: Measurement, name: str) -> str:
    """Returns how many times as long as xentjax a contender takes."""
    other, ours = m.outcomes[name], m.outcomes["xentjax"]
    if other.problem is not None:
        return other.problem if other.problem == OUT_OF_MEMORY else "–"
    return "wrong" if other.is_wrong(m.case.dtype) else ratio_text(other.median() / ours.median())


def three_digits(x: float) -> str:
    """Returns three digits of a number, never in powers of ten."""
    if not math.isfinite(x):
        return "–"
    digits = 2 - math.floor(math.log10(x)) if x > 0 else 0
    return f"{x:.{min(max(digits, 0), 4)}f}"


def ratio_text(ratio: float) -> str:
    """Returns a ratio with two decimals, or fewer where it is large."""
    return f"{ratio:.{2 if ratio < 10 else 1 if ratio < 100 else 0}f}" if ratio > 0 else "–"


def _percent(part: int | None, whole: int) -> str:
    if part is None:
        return "–"
    share = 100 * part / whole
    return f"{share:.0f}" if share >= 10 or share == 0 else f"{share:.2g}"


def slower(measurements: Iterable[Measurement]) -> list[str]:
    """Returns the cases in which xentjax takes longer than optax does, and how much longer."""
    found = []
    for m in measurements:
        ratio = m.outcomes["xentjax"].median() / m.outcomes["optax"].median()
        if ratio > 1:
            found.append(f"{describe(m)} ({ratio:.2f} times as long)")
    return found


def describe(m: Measurement) -> str:
    """Returns the name of a case."""
    n, v, *_ = m.case.shape
    logits = "" if m.case.logits == "ordinary" else f" {m.case.logits}"
    return f"{m.case.loss}, {m.case.output}, {n} × {v} {m.case.dtype}{logits}"


Points = dict[str, dict[Size, Measurement]]
"""By loss and size."""

STYLES = {"labels": "-", "smoothing": "--"}


def picture(measurements: Sequence[Measurement], plan: Plan, where: str) -> Figure:
    """Returns time and temporaries, by the number of classes and by that of examples."""
    points: Points = {}
    for m in measurements:
        if m.case.size == "scaling":
            points.setdefault(m.case.loss, {})[m.case.shape] = m
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    figure.suptitle(f"Mean loss and its gradient, float32, on {where}", weight="bold")
    by_classes = {v: Size(plan.at.examples, v) for v in sorted(plan.classes)}
    by_examples = {n: Size(n, plan.at.classes) for n in sorted(plan.examples)}
    sides = (
        (by_classes, f"classes, for {plan.at.examples:,} examples"),
        (by_examples, f"examples, of {plan.at.classes:,} classes"),
    )
    for (sizes, label), column in zip(sides, axes.T, strict=True):
        draw_times(column[0], sizes, points)
        draw_temporaries(column[1], sizes, points)
        for ax in column:
            ax.set(xscale="log", yscale="log", xlabel=label)
            ax.set_xticks(list(sizes), [f"{x:,}" for x in sizes], fontsize="small")
            ax.minorticks_off()
            ax.yaxis.set_major_formatter("{x:g}")
            tidy(ax)
    axes[0, 0].set_ylabel("time (ms)")
    axes[1, 0].set_ylabel("temporaries (MiB)")
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=len(lines[0]), fontsize="small")
    return figure


def draw_times(ax: Axes, sizes: dict[int, Size], points: Points) -> None:
    """Draws the median between its quartiles for each contender, and for a copy."""
    for name, colour in zip(IN_PICTURE, COLOURS, strict=False):
        for loss, found in points.items():
            outcomes = [found[size].outcomes[name] for size in sizes.values()]
            draw_line(ax, list(sizes), outcomes, f"{name}, {loss}", colour, STYLES[loss])
    any_loss = next(iter(points.values()))
    copies = [any_loss[size].outcomes["copy"] for size in sizes.values()]
    draw_line(ax, list(sizes), copies, "the logits: a copy, their size", "0.5", ":")
    ax.set_title("Time: median, and its quartiles")


def draw_line(
    ax: Axes, xs: list[int], outcomes: list[Outcome], label: str, colour: str, style: str
) -> None:
    """Draws milliseconds, and a band from quartile to quartile; a gap where there is no time."""
    quartiles = [x.quartiles() if x.seconds else (math.nan,) * 3 for x in outcomes]
    low, median, high = ([1000 * y for y in ys] for ys in zip(*quartiles, strict=True))
    ax.plot(xs, median, color=colour, ls=style, marker=".", label=label)
    ax.fill_between(xs, low, high, color=colour, alpha=0.15, lw=0)


def draw_temporaries(ax: Axes, sizes: dict[int, Size], points: Points) -> None:
    """Draws the temporaries of each compiled function, and the size of the logits."""
    for name, colour in zip(IN_PICTURE, COLOURS, strict=False):
        for loss, found in points.items():
            needs = [found[size].outcomes[name].temporaries for size in sizes.values()]
            # A logarithm has no zero; less than a KiB is as good as nothing.
            needs = [math.nan if x is None else max(x, 2**10) / 2**20 for x in needs]
            ax.plot(list(sizes), needs, color=colour, ls=STYLES[loss], marker=".")
    any_loss = next(iter(points.values()))
    logits = [any_loss[size].case.logits_bytes / 2**20 for size in sizes.values()]
    ax.plot(list(sizes), logits, color="0.5", ls=":", marker=".")
    ax.set_title("Temporaries: beside arguments and results")
