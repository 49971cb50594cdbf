"""The benchmark: a run over tiny sizes from end to end, its losses recomputed in float64 NumPy."""

import collections
import contextlib
import dataclasses
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.image
import numpy as np
import pytest

import xentjax
from xentjax.__main__ import main
from xentjax._commands.bench import cases, contenders, report, timing
from xentjax._commands.bench.cases import Case, Plan, Row, Size

ROUNDS = 4
SMALL, LANGUAGE = Size(8, 5), Size(16, 40, 4)
VALUES = ("masked", "mixup", "dense", "binary", "multilabel")
TINY = Plan(
    rows=(
        Row("small", SMALL, "float32", ("eager", *VALUES), ("value",)),
        Row("small", SMALL, "float32", ("labels", "smoothing"), ("gradient",)),
        Row("language", LANGUAGE, "float32", ("head",)),
        Row("language", LANGUAGE, "float32", ("head-50",), ("value",)),
        Row("language", LANGUAGE, "bfloat16", ("labels",), ("gradient",)),
    ),
    large=(Row("large", Size(32, 64), "bfloat16", ("dense",)),),
    at=SMALL,
    examples=(8,),
    classes=(5, 10),
    absent=("torch fused",),
    rounds=10,
    sample=1e-12,  # One call each.
    patience=60,
    compilations=1,
    imports=1,
)
TINY_MAP = dataclasses.replace(
    cases.MAP,
    sample=1e-12,
    rows=(
        Row("8x20", Size(8, 20), "float32", ("labels", "smoothing", "excluded")),
        Row("8x20", Size(8, 20), "float32", ("labels",), logits="x50"),
        Row("8x20", Size(8, 20), "float32", ("dense",), ("value",), logits="low16"),
        Row("8x20", Size(8, 20), "float32", ("eager-smoothing",)),
    ),
)


class Run(NamedTuple):
    """One run: its exit code, its output, its files and its measurements."""

    code: int
    out: str
    err: str
    record: dict[str, Any]
    picture: Path
    measurements: dict[Case, timing.Measurement]


def run_bench(*argv, plan="quick", columns=80, **patches):
    """Runs `bench --quick` or `--map` over the tiny sizes; returns code, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setitem(cases.PLANS, "quick", TINY)
        patch.setitem(cases.PLANS, "map", TINY_MAP)
        patch.setenv("COLUMNS", str(columns))
        for name, value in patches.items():
            patch.setattr(timing, name, value)
        code = main(["bench", f"--{plan}", f"--rounds={ROUNDS}", *argv])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return run(tmp_path_factory.mktemp("bench"), "quick")


@pytest.fixture(scope="module")
def speed_map(tmp_path_factory):
    return run(tmp_path_factory.mktemp("map"), "map")


def run(folder, plan):
    """Runs the benchmark from end to end, its measurements recorded."""
    found, measure = {}, timing.measure

    def recording(case, *args):
        found[case] = measure(case, *args)
        return found[case]

    files = folder / "record.json", folder / "picture.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tokamax", None)
        code, out, err = run_bench(
            f"--json={files[0]}", f"--output={files[1]}", plan=plan, measure=recording
        )
    return Run(code, out, err, json.loads(files[0].read_text()), files[1], found)


def again(bench, *argv, plan="quick", columns=80, **changes):
    """Runs with the measurements of before, `changes` made to outcomes of labels' gradient."""
    found = dict(bench.measurements)
    case = next(x for x in found if (x.loss, x.output) == ("labels", "gradient"))
    outcomes = dict(found[case].outcomes)
    for name, change in changes.items():
        outcomes[name] = dataclasses.replace(outcomes[name], **change)
    found[case] = dataclasses.replace(found[case], outcomes=outcomes)
    return run_bench(*argv, plan=plan, columns=columns, measure=lambda case, *args: found[case])


def test_bench_succeeds_and_saves_the_picture(bench):
    assert (bench.code, bench.err) == (0, "")
    assert f"Picture: {bench.picture}" in bench.out
    assert matplotlib.image.imread(bench.picture, format="png").shape == (1200, 1650, 4)


def test_bench_records_the_setting(bench):
    record = bench.record
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["cpu"]
    assert record["device"]["platform"] == jax.default_backend()
    assert record["versions"]["jax"] == jax.__version__
    assert record["versions"]["xentjax"] == xentjax.__version__
    assert record["date"].endswith("+00:00")
    assert (record["rounds"], record["plan"]) == (ROUNDS, "quick")
    assert set(record["import_seconds"]) == {"jax", "jax, xentjax"}
    assert all(0 < x < 60 for samples in record["import_seconds"].values() for x in samples)


def test_bench_records_every_sample(bench):
    assert len(bench.record["cases"]) == len(cases.all_cases(TINY, "cpu")) == 16
    for case in bench.record["cases"]:
        itemsize = 2 if case["dtype"] == "bfloat16" else 4
        assert case["logits_bytes"] == itemsize * case["examples"] * case["classes"]
        is_head = case["loss"].startswith("head")
        assert set(case["limits"]) == ({"matmuls"} if is_head else {"copy", "read"})
        everyone = case["contenders"] | case["limits"]
        assert {"xentjax", "optax"} <= set(everyone)
        for name, outcome in everyone.items():
            if outcome["problem"] is not None:
                assert (name, outcome["problem"]) in (
                    ("torch", "not installed"),
                    ("tokamax", "not installed"),
                )
                assert (outcome["value"], outcome["seconds"]["median"]) == (None, None)
                continue
            seconds = outcome["seconds"]
            assert len(seconds["samples"]) == ROUNDS
            assert outcome["calls_per_sample"] == 1
            quartiles = [seconds[x] for x in ("lower_quartile", "median", "upper_quartile")]
            assert quartiles == pytest.approx(np.quantile(seconds["samples"], [0.25, 0.5, 0.75]))
            compiled = name != "torch" and (case["loss"] != "eager" or name in case["limits"])
            assert len(outcome["trace_seconds"]) == len(outcome["compile_seconds"]) == compiled
            assert (outcome["temporaries"] is not None) == compiled


def test_bench_counts_the_flops_of_the_matmuls(bench):
    n, v, d = LANGUAGE
    flops = {
        case["output"]: case["limits"]["matmuls"]["flops"]
        for case in bench.record["cases"]
        if case["loss"] == "head"
    }
    assert flops == {"value": 2 * n * v * d, "gradient": 3 * 2 * n * v * d}


def expected_value(case):
    """Returns the mean loss of a case, in float64 by NumPy."""
    (z, *kernel), targets = (
        [np.asarray(x, np.float64) for x in side] for side in cases.inputs(case)
    )
    if case.is_head:
        z = z @ kernel[0]
    if case.loss in ("binary", "multilabel"):
        p = 1 / (1 + np.exp(-z))
        losses = -targets[0] * np.log(p) - (1 - targets[0]) * np.log1p(-p)
        return losses.mean() if case.loss == "binary" else losses.sum(-1).mean()
    surprisals = np.log(np.exp(z).sum(-1, keepdims=True)) - z
    if case.loss in ("dense", "excluded"):
        return (targets[0] * np.where(targets[0] > 0, surprisals, 0)).sum(-1).mean()
    labels = targets[0].astype(int)
    of_label = surprisals[np.arange(len(z)), labels]
    match case.loss:
        case "masked" | "head-50":
            return of_label[targets[1] == 1].mean()
        case "smoothing" | "eager-smoothing":
            return (0.9 * of_label + 0.1 * surprisals.mean(-1)).mean()
        case "mixup":
            other = surprisals[np.arange(len(z)), targets[1].astype(int)]
            return (targets[2] * of_label + (1 - targets[2]) * other).mean()
    return of_label.mean()


def test_everyone_has_the_same_right_answer(bench, speed_map):
    for case, measurement in [*bench.measurements.items(), *speed_map.measurements.items()]:
        expected = expected_value(case)
        for name in set(measurement.outcomes) & set(contenders.CONTENDERS[case.loss]):
            outcome = measurement.outcomes[name]
            if outcome.problem is None:  # Some ulp of float32, of a few nats.
                assert outcome.value == pytest.approx(expected, rel=2e-6), (case, name)
                assert not outcome.is_wrong(case.dtype)
                compared = outcome.value_difference, outcome.gradient_difference
                gradient = name != "optax" and case.output == "gradient"
                assert [x is not None for x in compared] == [name != "optax", gradient]


def test_map_shows_and_records_every_speed(speed_map):
    assert (speed_map.code, speed_map.err) == (0, "")
    assert not speed_map.picture.exists()
    table = rows(speed_map.out, "8 × 20 float32")
    losses = ["labels", "smoothing", "excluded", "labels x50", "dense low16", "eager-smoothing"]
    assert list(table) == losses
    for case, m in speed_map.measurements.items():
        assert set(m.outcomes) == {"xentjax", "optax"}
        name = case.loss if case.logits == "ordinary" else f"{case.loss} {case.logits}"
        ms, speed, *compiling = table[name][3 * (case.output == "gradient") :][:3]
        ours, optax = m.outcomes["xentjax"], m.outcomes["optax"]
        assert float(ms) == pytest.approx(1000 * ours.median(), rel=5e-3, abs=5e-5)
        assert float(speed) == pytest.approx(optax.median() / ours.median(), rel=0.05, abs=5e-3)
        if case.loss != "eager-smoothing":
            ratio = ours.compile_median() / optax.compile_median()
            assert float(compiling[0]) == pytest.approx(ratio, rel=0.05, abs=5e-3)


def test_map_sums_up(speed_map):
    speeds = {
        case: m.outcomes["optax"].median() / m.outcomes["xentjax"].median()
        for case, m in speed_map.measurements.items()
    }
    usual = [
        speed
        for case, speed in speeds.items()
        if (case.loss, case.logits, case.output)
        in {("labels", "ordinary", "value"), ("smoothing", "ordinary", "value")}
    ]
    found = speed_map.record["map"]["usual"]["speed"]
    assert (found["cases"], found["worst"]) == (2, pytest.approx(min(usual)))
    assert found["geometric_mean"] == pytest.approx(math.sqrt(usual[0] * usual[1]))
    unusual = speed_map.record["map"]["unusual"]
    assert {name: side["cases"] for name, side in unusual.items()} == {
        "speed": 3,
        "speed ∇": 2,
        "compile": 5,
    }
    x50, ordinary = (
        next(
            m.outcomes["xentjax"].median()
            for case, m in speed_map.measurements.items()
            if (case.loss, case.logits, case.output) == ("labels", logits, "value")
        )
        for logits in ("x50", "ordinary")
    )
    shown = re.search(r"\nlabels, value, 8 × 20 float32 x50 +(\S+)\n", speed_map.out)[1]
    assert float(shown) == pytest.approx(x50 / ordinary, rel=0.05, abs=5e-3)


def test_map_lists_slow_cases(speed_map):
    fast, slow = {"seconds": [0.93]}, {"seconds": [1.0]}
    argv = "--cases=labels,ordinary,gradient"
    out = again(speed_map, argv, plan="map", xentjax=slow, optax=fast)[1]
    assert "Speed below 0.95, gradient: 1 of 1\n  0.93  labels, gradient, 8 × 20 float32\n" in out
    out = again(speed_map, argv, plan="map", xentjax=fast, optax=slow)[1]
    assert "Speed below 0.95, gradient: 0 of 1\n" in out


def test_map_has_the_cases_it_promises():
    found = cases.all_cases(cases.MAP, "cpu")
    assert len(set(found)) == len(found)
    assert sum(not case.is_eager and not case.is_unusual for case in found) == 116
    assert {case.logits for case in found} == set(cases.LOGITS)
    for loss in ("labels", "smoothing", "dense"):
        for shape in ((256, 10), (4096, 1000), (1024, 50257)):
            for dtype in ("float32", "bfloat16"):
                for output in ("value", "gradient"):
                    name = f"{shape[0]}x{shape[1]}"
                    assert Case(loss, name, Size(*shape), dtype, output) in found
    assert Case("eager-smoothing", "256x10", Size(256, 10), "float32", "value") in found


def numbers(out):
    """Returns all numbers of a text, how often each."""
    return collections.Counter(re.findall(r"\d+(?:\.\d+)?", out))


@pytest.mark.parametrize("plan", ["quick", "map"])
def test_no_number_is_cut_at_60_columns(bench, speed_map, plan):
    before = {"quick": bench, "map": speed_map}[plan]
    words = "--cases=value,gradient", f"--output={before.picture}"
    outs = [again(before, *words, plan=plan, columns=n)[1] for n in (500, 60)]
    wide, narrow = (re.split(r"\nPicture|\n\(", out)[0].partition("\n\n")[2] for out in outs)
    assert not numbers(wide) - numbers(narrow)
    assert max(map(len, narrow.splitlines())) <= 60
    assert not re.search(r"\S…|…\S", narrow)


def rows(out, title):
    """Returns the cells of the table below a title, by the name of the row."""
    lines = iter(out.partition(f"\n{title}")[2].splitlines())
    next(line for line in lines if "─" in line)
    table = {}
    while line := next(lines).strip():
        name, cells = re.fullmatch(r"([\w-]+(?: ∇| x50| low16)?) +(.*)", line).groups()
        table[name] = cells.split()
    return table


def test_bench_table(bench):
    case = Case("smoothing", "small", SMALL, "float32", "gradient")
    ours, optax, copy = (
        bench.measurements[case].outcomes[name] for name in ("xentjax", "optax", "copy")
    )
    table = rows(bench.out, "small: 8 × 5 float32, 0.000153 MiB; copy")
    assert list(table) == ["eager", *VALUES, "labels ∇", "smoothing ∇"]
    ms, spread, by_optax, _, _, by_copy, temporaries, theirs, compiling = table["smoothing ∇"]
    median = float(np.median(ours.seconds))
    assert float(ms) == pytest.approx(1000 * median, rel=5e-3, abs=5e-5)
    low, high = np.quantile(ours.seconds, [0.25, 0.75])
    assert float(spread.rstrip("%")) == pytest.approx(50 * (high - low) / median, abs=0.51)
    assert float(by_optax) == pytest.approx(np.median(optax.seconds) / median, rel=0.05, abs=5e-3)
    assert float(by_copy) == pytest.approx(median / np.median(copy.seconds), rel=0.05, abs=5e-3)
    assert float(temporaries) == pytest.approx(100 * ours.temporaries / 160, abs=0.51)
    assert float(theirs) == pytest.approx(100 * optax.temporaries / 160, abs=0.51)
    compile_ratio = optax.compile_median() / ours.compile_median()
    assert float(compiling) == pytest.approx(compile_ratio, rel=0.05, abs=5e-3)
    assert list(rows(bench.out, "language: head 16 × 4 × 40 float32")) == ["head", "head ∇"]
    assert list(rows(bench.out, "language: 16 × 40 bfloat16")) == ["labels ∇"]


def test_bench_fits_80_columns(bench):
    tables = bench.out.partition("small: ")[2].partition("Picture")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert not re.search(r"\S…|…\S", tables)


def test_bench_lists_where_it_is_slower(bench):
    faster, slower = {"seconds": [1.0] * ROUNDS}, {"seconds": [2.5] * ROUNDS}
    line = "\n  labels, gradient, 8 × 5 float32 (2.50 times as long)\n"
    words = "--cases=small,labels"
    assert line in again(bench, words, xentjax=slower, optax=faster)[1]
    out = again(bench, words, xentjax=faster, optax=slower)[1]
    assert "xentjax takes longer than optax in none of these." in out


@pytest.mark.parametrize(
    "change",
    [{"value_difference": 2e-4}, {"gradient_difference": 2e-4}, {"value_difference": math.nan}],
)
def test_bench_fails_where_it_is_wrong(bench, change):
    code, out, err = again(bench, "--cases=small,labels", xentjax=change)
    assert code == 1
    assert "÷ ours" in out
    assert err.startswith("error: labels, gradient, 8 × 5 float32: xentjax is off optax's loss by ")
    change = {"value_difference": 9e-5, "gradient_difference": 9e-5}
    assert again(bench, "--cases=small,labels", xentjax=change)[::2] == (0, "")


def test_bench_shows_who_else_is_wrong(bench):
    change = {"problem": None, "value_difference": 2e-4, "gradient_difference": 0.0}
    code, out, err = again(bench, "--cases=small,labels", torch=change | {"seconds": [1.0]})
    assert (code, err) == (0, "")
    assert rows(out, "small: ")["labels ∇"][4] == "wrong"
    assert "torch is off optax's loss by 2.0e-04" in out


@pytest.mark.parametrize("problem", ["out of memory", "not installed"])
def test_bench_leaves_a_gap(bench, tmp_path, problem):
    nothing = dict.fromkeys(["value", "value_difference", "gradient_difference", "temporaries"])
    change = {"problem": problem, "seconds": [], "compile_seconds": [], "trace_seconds": []}
    words, file = "--cases=small,labels", tmp_path / "x.json"
    code, out, err = again(bench, words, f"--json={file}", optax=change | nothing)
    assert (code, err) == (0, "")
    cells = " ".join(rows(out, "small: ")["labels ∇"])
    assert ("out of memory" in cells) == (problem == "out of memory")
    assert cells.endswith("– –")
    (case,) = json.loads(file.read_text())["cases"]
    assert case["contenders"]["optax"]["problem"] == problem


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("small", 8),
        ("labels", 4),
        ("labels,small", 1),
        ("labels,masked,small", 2),
        ("head", 2),
        ("head,value", 1),
        ("bfloat16", 1),
        ("scaling", 4),
        ("import", 0),
    ],
)
def test_words_choose_cases(words, expected):
    found = cases.all_cases(TINY, "cpu")
    chosen = cases.chosen(found, TINY, words.split(","))
    assert len(chosen) == expected


def test_large_cases_are_for_accelerators():
    on_cpu, on_gpu = (cases.all_cases(TINY, platform) for platform in ("cpu", "gpu"))
    assert [case for case in on_gpu if case not in on_cpu] == [
        Case("dense", "large", Size(32, 64), "bfloat16", output) for output in ("value", "gradient")
    ]


def test_the_full_benchmark_has_every_case():
    found = cases.all_cases(cases.FULL, "cpu")
    assert len(set(found)) == len(found)
    for loss in ("labels", "masked", "smoothing", "mixup", "dense"):
        for shape in ((256, 10), (4096, 1000), (2048, 50257)):
            for dtype in ("float32", "bfloat16"):
                outputs = {
                    case.output
                    for case in found
                    if (case.loss, case.shape[:2], case.dtype) == (loss, shape, dtype)
                }
                assert outputs == {"value", "gradient"}, (loss, shape, dtype)
    assert {case.shape for case in found if case.loss == "head"} == {(2048, 50257, 768)}
    assert {case.loss for case in found} == set(contenders.CONTENDERS)


NOT_ROUNDS = "argument --rounds: expected a whole number from 1 to 10000, got "


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--rounds 0", NOT_ROUNDS + "'0'"),
        ("--rounds x", NOT_ROUNDS + "'x'"),
        ("--cases labls", "argument --cases: expected words of eager, labels, "),
        ("--cases labels,,small", "with commas between them, got ''"),
        ("--cases head,small", "expected words that a case has together, got head,small"),
        ("--json no/x.json", "argument --json: expected a file in a folder that exists, got "),
        ("--output x.gif", "argument --output: expected a name in .png, .pdf or .svg, got 'x.gif'"),
        ("--quik", "unrecognized arguments: --quik"),
    ],
)
def test_bench_bad_arguments(argv, message):
    code, out, err = run_bench(*argv.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("option", "owner", "name"),
    [("json", Path, "write_text"), ("output", report.Figure, "savefig")],
)
def test_bench_says_why_it_could_not_save(bench, monkeypatch, tmp_path, option, owner, name):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(owner, name, refuse)
    code, _, err = again(bench, "--cases=scaling", f"--{option}={tmp_path / 'x.png'}")
    assert code == 1
    assert err == f"error: argument --{option}: [Errno 13] Permission denied\n"


@pytest.mark.parametrize("package", ["matplotlib", "optax", "rich"])
def test_bench_without_an_extra(capsys, monkeypatch, package):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("xentjax._commands.bench")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "xentjax._commands.common", raising=False)
    assert main(["bench"]) == 1
    needs = f"bench needs {package}, which is not installed"
    assert capsys.readouterr().err == f'error: {needs}: pip install "xentjax[demo]"\n'
