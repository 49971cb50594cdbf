"""The language model: a short run from end to end, its perplexity recomputed in float64 NumPy."""

import argparse
import contextlib
import dataclasses
import functools
import io
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.image
import numpy as np
import pytest
from cases import mainly

from xentjax.__main__ import main
from xentjax._commands import lm as _lm

STEPS, BATCH = 12, 64


class Run(NamedTuple):
    """One short run: its exit code, its output, its picture, its text and its courses."""

    code: int
    out: str
    err: str
    output: Path
    corpus: _lm.Corpus
    courses: dict[str, _lm.Course]


def run_lm(output, *, learn=_lm.learn, steps=STEPS, columns=80):
    """Runs a small model with `learn` in the place of its own; returns code, output and errors."""
    sizes = {"steps": steps, "vocabulary": 300, "batch": BATCH, "budget": 0, "output": output}
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(_lm, "learn", learn)
        patch.setenv("COLUMNS", str(columns))
        code = main(["lm", *(f"--{name}={value}" for name, value in sizes.items())])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    kept = {}
    learn = _lm.learn

    def recording(heads, corpus, *args):
        kept["corpus"], kept["courses"] = corpus, learn(heads, corpus, *args)
        return kept["courses"]

    output = tmp_path_factory.mktemp("lm") / "picture.png"
    return Run(*run_lm(output, learn=recording), output, **kept)


def test_lm_succeeds_and_saves_the_picture(lm):
    assert (lm.code, lm.err) == (0, "")
    assert f"Picture: {lm.output}" in lm.out
    assert matplotlib.image.imread(lm.output, format="png").shape == (825, 1650, 4)


def table_row(out, name):
    """Returns the cells after the name."""
    (row,) = [line for line in out.splitlines() if line.strip().startswith(name)]
    return [float(cell) for cell in row.replace(name, "").split()]


@pytest.mark.parametrize("columns", mainly([40, 60, 100], 40))
def test_lm_fits_the_terminal(lm, tmp_path, columns):
    out = run_lm(tmp_path / "x.png", learn=lambda *args: lm.courses, columns=columns)[1]
    out = out.partition("\nPicture")[0]
    assert max(map(len, out.splitlines())) <= columns
    for name in lm.courses:
        rows = [line for line in out.splitlines() if line.startswith(name)]
        cells = [float(cell) for row in rows for cell in row.replace(name, "").split()]
        assert cells == table_row(lm.out, name)


def test_lm_shows_every_step(lm):
    """The time left is known as soon as the first step is done."""
    shown = []
    heads = {"full": _lm.full_logits}
    arguments = argparse.Namespace(steps=3, batch=BATCH, seed=0)
    _lm.learn(heads, lm.corpus, arguments, lambda done, perplexity=None: shown.append(done))
    assert sorted(set(shown)) == [0, 1, 2, 3]


def perplexity(model, windows):
    """Returns the perplexity of the last words of windows, in float64."""
    embedding, bias, kernel, hidden_bias, out = (np.asarray(x, np.float64) for x in model)
    words = embedding[windows[:, :-1]].reshape(len(windows), -1)
    hidden = words @ kernel + hidden_bias
    cubic = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
    logits = (0.5 * hidden * (1 + np.tanh(cubic))) @ out @ embedding.T + bias
    lse = np.log(np.exp(logits).sum(-1))
    return np.exp(np.mean(lse - logits[np.arange(len(windows)), windows[:, -1]]))


@pytest.mark.parametrize("name", ["full logits (optax)", "block by block (xentjax)"])
def test_lm_table(lm, name):
    course = lm.courses[name]
    end = len(lm.corpus.test) - 9  # Eight words of context and the next one.
    first = np.linspace(0, end, _lm.TEST_SIZE).astype(int)
    windows = np.stack([lm.corpus.test[i : i + 9] for i in first])
    milliseconds, temporaries, before, after = table_row(lm.out, name)
    # Float32's rounding of a loss of some nats, a few ulp, and half of the last digit.
    assert after == pytest.approx(perplexity(course.state[0], windows), rel=5e-6, abs=5.1e-4)
    frequency = (lm.corpus.counts + 1) / (lm.corpus.counts + 1).sum()
    unigram = np.exp(-np.log(frequency[windows[:, -1]]).mean())
    assert before == pytest.approx(unigram, rel=0.05)  # All but the frequencies is small at first.
    assert after < before  # By how much depends on the text of this Python.
    assert milliseconds == pytest.approx(1000 * np.median(course.seconds), abs=0.501)
    assert temporaries == pytest.approx(course.temporaries / 2**20, abs=0.0501)
    assert len(course.seconds) == STEPS
    assert list(course.losses) == [0, 2, 4, 6, 8, 10, 12]


def test_lm_learns_the_same_with_both(lm):
    theirs, ours = (np.array(list(course.losses.values())) for course in lm.courses.values())
    difference = np.abs(np.exp(ours - theirs) - 1).max()
    assert difference <= 1e-5  # Some ulp of float32 losses of 4 nats, and little that builds up.
    shown = float(lm.out.partition("differ by at most ")[2].split()[0])
    assert shown == pytest.approx(difference, rel=0.06, abs=1e-15)


def test_lm_needs_less_memory():
    corpus = _lm.Corpus(*(np.zeros(100, np.int32),) * 2, counts=np.ones(20_001, np.int64))
    arguments = argparse.Namespace(steps=1, batch=512)
    blocks = functools.partial(_lm.block_by_block, memory_budget=2**25)
    key = jax.random.key(0)
    full, ours = (
        _lm.begin(h, corpus, arguments, key).temporaries for h in (_lm.full_logits, blocks)
    )
    logits = 4 * 512 * 20_001
    assert full >= 2 * logits  # And their gradient.
    # The budget, the embedding's gradient, and 4 MiB for the rest of the network.
    assert ours <= 2**25 + 4 * _lm.FEATURES * 20_001 + 2**22 < full


def test_lm_fails_where_the_curves_differ(lm, tmp_path):
    def learn(*args):
        theirs, ours = lm.courses.items()
        losses = ours[1].losses | {4: ours[1].losses[4] + 2e-4}
        return dict([theirs, (ours[0], dataclasses.replace(ours[1], losses=losses))])

    code, out, err = run_lm(tmp_path / "x.png", learn=learn)
    assert code == 1
    assert "Picture" in out
    assert err.startswith("error: after 4 steps the perplexities differ by 2.0e-04 of themselves")


def test_lm_says_why_it_could_not_save(lm, monkeypatch, tmp_path):
    def savefig(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "x.png"))

    monkeypatch.setattr(_lm.Figure, "savefig", savefig)
    code, _, err = run_lm(tmp_path / "x.png", learn=lambda *args: lm.courses)
    assert code == 1
    assert err.startswith("error: argument --output: ")


def test_lm_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    code, out, err = run_lm(tmp_path / "x.png")
    assert (code, out) == (1, "")
    assert "expected the sources of the standard library, got too few words" in err


def test_read(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text("skipped " * 9)
    for i in range(9):
        (tmp_path / f"{i}.py").write_text("x == ((y))\n" if i else "y = x", "utf-8")
    (tmp_path / "9.py").write_bytes(b"x --- y\xff\n")
    corpus = _lm.read(tmp_path, 4)
    # The vocabulary has <unk> and three of x, y (9 times each), ==, ((, )), newline (8), = (1).
    assert list(corpus.counts) == [8 * 3 + 1, 9, 9, 8]
    assert list(corpus.train[:3]) == [1, 0, 2]  # Most frequent first; at a tie, the first seen.
    assert list(corpus.test) == [2, 0, 1, 0, 0]
    assert len(_lm.read(tmp_path, 100).counts) == 8


@pytest.mark.parametrize("option", ["steps", "vocabulary", "batch", "budget", "seed"])
def test_lm_bad_arguments(capsys, option):
    assert main(["lm", f"--{option}", "-1"]) == 2
    assert f"argument --{option}: expected a whole number from " in capsys.readouterr().err


@pytest.mark.parametrize("package", ["matplotlib", "optax", "rich"])
def test_lm_without_an_extra(capsys, monkeypatch, package):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in "xentjax._commands.lm", "xentjax._commands.common":
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(["lm"]) == 1
    needs = f"lm needs {package}, which is not installed"
    assert capsys.readouterr().err == f'error: {needs}: pip install "xentjax[demo]"\n'
