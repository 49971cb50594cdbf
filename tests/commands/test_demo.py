"""The demo: a short run from end to end, its table recomputed in float64 NumPy from its logits."""

import contextlib
import io
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib.image
import numpy as np
import pytest

from xentjax.__main__ import main
from xentjax._commands import demo as _demo


class Run(NamedTuple):
    """One short run of the demo: its exit code, its output, its picture, its epochs."""

    code: int
    out: str
    err: str
    output: Path
    courses: dict[str, list[_demo.Epoch]]


def run_demo(output, learn, columns=80):
    """Runs the demo for two epochs with `learn` in the place of its own."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(_demo, "learn", learn)
        patch.setenv("COLUMNS", str(columns))
        code = main(["demo", "--epochs", "2", "--seed", "1", "--output", str(output)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    courses = {}
    learn = _demo.learn

    def recording(recipe, *args):
        name = {function: name for name, function in _demo.RECIPES.items()}[recipe]
        for epoch in learn(recipe, *args):
            courses.setdefault(name, []).append(epoch)
            yield epoch

    output = tmp_path_factory.mktemp("demo") / "picture.png"
    return Run(*run_demo(output, recording), output, courses)


def test_demo_succeeds_and_saves_the_picture(demo):
    assert (demo.code, demo.err) == (0, "")
    assert f"Picture: {demo.output}" in demo.out
    assert matplotlib.image.imread(demo.output, format="png").shape == (825, 1650, 4)


def table_row(out, name):
    """Returns the cells after the name, without their signs of percent."""
    rows = [line.split() for line in out.splitlines() if line.split()[:1] == [name]]
    return [float(cell.rstrip("%")) for cell in rows[-1][1:]]


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_demo_fits_the_terminal(demo, tmp_path, columns):
    out = run_demo(tmp_path / "x.png", replay(demo), columns)[1].partition("Picture")[0]
    assert max(map(len, out.splitlines())) <= columns
    for name in _demo.RECIPES:
        found = [line for line in out.splitlines() if line.startswith(f"{name} ")]
        cells = [cell for line in found if "━" not in line for cell in line.split()[1:]]
        assert [float(cell.rstrip("%")) for cell in cells] == table_row(demo.out, name)


@pytest.mark.parametrize("name", list(_demo.RECIPES))
def test_demo_table(demo, name):
    logits = demo.courses[name][-1].logits.astype(np.float64)
    labels = np.asarray(_demo.load()[1][1])
    lse = np.log(np.exp(logits).sum(-1))
    losses = lse - logits[np.arange(len(labels)), labels]
    confidences, correct = np.exp(logits.max(-1) - lse), logits.argmax(-1) == labels
    calibration_error = 0.0
    for low in np.arange(10) / 10:
        inside = (confidences > low) & (confidences <= low + 0.1)
        calibration_error += abs(np.sum(correct[inside]) - np.sum(confidences[inside]))
    accuracy, confidence, ece, loss, by_optax, bits, perplexity = table_row(demo.out, name)
    assert accuracy == pytest.approx(100 * correct.mean(), abs=0.05001)
    assert confidence == pytest.approx(100 * confidences.mean(), abs=0.05001)
    assert ece == pytest.approx(100 * calibration_error / len(labels), abs=0.05001)
    # Half of the last digit, and float32's rounding in a mean of 897.
    assert loss == pytest.approx(losses.mean(), rel=1e-6, abs=5.1e-7)
    assert by_optax == pytest.approx(losses.mean(), rel=1e-6, abs=5.1e-7)
    assert bits == pytest.approx(losses.mean() / math.log(2), rel=1e-6, abs=5.1e-5)
    assert perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-6, abs=5.1e-5)


def test_demo_names_the_best(demo):
    rows = {name: table_row(demo.out, name) for name in _demo.RECIPES}
    most_accurate = max(rows, key=lambda name: rows[name][0])
    lowest_loss = min(rows, key=lambda name: rows[name][3])
    best_calibrated = min(rows, key=lambda name: rows[name][2])
    assert (
        f"Most accurate: {most_accurate}. Lowest loss: {lowest_loss}. "
        f"Best calibrated: {best_calibrated}.\n" in demo.out
    )


def test_demo_learns(demo):
    """Within two epochs, and no training loss gets below the entropy of its targets."""
    for first, last in demo.courses.values():
        assert last.train_loss < first.train_loss
        assert last.accuracy > 0.8
    smoothed = 0.9 * np.eye(10)[0] + 0.01
    assert demo.courses["smoothed"][-1].train_loss > -np.sum(smoothed * np.log(smoothed))


def test_demo_repeats_itself(demo):
    train, test = _demo.load()
    for seed, same in (1, True), (2, False):
        *_, last = _demo.learn(_demo.hard_labels, train, test, epochs=2, seed=seed)
        assert np.array_equal(last.logits, demo.courses["hard"][-1].logits) == same


def test_demo_fails_where_optax_differs(demo, monkeypatch, tmp_path):
    theirs = _demo.optax.softmax_cross_entropy_with_integer_labels
    monkeypatch.setattr(
        _demo.optax,
        "softmax_cross_entropy_with_integer_labels",
        lambda logits, labels: theirs(logits, labels) * (1 + 1e-5),
    )
    code, out, err = run_demo(tmp_path / "x.png", replay(demo))
    assert code == 1
    assert "Most accurate" in out
    assert err.startswith("error: hard: the loss is 0.")
    assert "expected a relative difference of at most 1e-06" in err


def test_demo_says_why_it_could_not_save(demo, monkeypatch, tmp_path):
    def savefig(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "x.png"))

    monkeypatch.setattr(_demo.Figure, "savefig", savefig)
    code, _, err = run_demo(tmp_path / "x.png", replay(demo))
    assert code == 1
    assert err.startswith("error: argument --output: ")
    assert "Permission denied" in err


def replay(demo):
    """Returns a `learn` that has the epochs of an earlier run."""
    courses = iter(demo.courses.values())
    return lambda *args: iter(next(courses))
