"""No words after `python -m xentjax` end in a traceback: an answer, or one line of error."""

import contextlib
import io

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import xentjax.__main__ as command_line
from xentjax.__main__ import main

NUMBERS = st.lists(
    st.one_of(
        st.sampled_from(
            ["0", "1", "-1", "0.5", "inf", "-inf", "nan", "1e38", "1e400", "-0", "", "x"]
        ),
        st.floats(width=32).map(str),
        st.text(max_size=4),
    ),
    max_size=3,
).map(",".join)
OPTIONS = st.one_of(
    st.sampled_from(
        ["--logits", "--normalize", "--bits", "--label", "--classes", "--smoothing", "--epochs"]
    ),
    st.sampled_from(["--seed", "--output", "--json", "--quick", "--map", "--cases", "--rounds"]),
    st.sampled_from(["--label=0", "--smoothing=.1", "--classes=a,b", "0", "1", "--", "-", "-h"]),
    st.text(max_size=6),
    NUMBERS,
)
ARGV = st.tuples(
    st.sampled_from(["explain", "explain", "demo", "lm", "bench", "", "no such command"]),
    NUMBERS,
    st.lists(OPTIONS, max_size=5),
).map(lambda parts: [parts[0], parts[1], *parts[2]])


def outcome(argv):
    """Returns (exit code, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as ended:  # Of --help and --version.
            code = ended.code
    return code, out.getvalue(), err.getvalue()


def check(examples, monkeypatch):
    # A training or a measurement is not run, whatever its options.
    load = command_line._load
    monkeypatch.setattr(
        command_line, "_load", lambda name: load(name) if name == "explain" else lambda _: 0
    )

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None)
    @given(ARGV)
    @example(["explain", "0.1,0.9", "--label", "\x00"])
    @example(["explain", "1e400,1", "--logits", "--label", "0"])
    @example(["explain", "1e-320,1", "--normalize", "--label", "0", "--bits"])
    @example(["explain", "1e38,-1e38", "--logits", "--label", "1", "--smoothing", "1"])
    @example(["demo", "--output", "\x00.png"])
    @example(["bench", "--cases", "ordinary,,"])
    def on_words(argv):
        code, out, err = outcome(argv)
        assert code in (0, 2)
        assert (code == 0) == (err == "")
        if code == 2:
            assert out == ""
            assert err.startswith("error: ")
            assert err.endswith("\n")
            assert "Traceback" not in err

    on_words()


def test_no_words_end_in_a_traceback(monkeypatch):
    check(40, monkeypatch)


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_no_words_end_in_a_traceback_at_length(monkeypatch):
    check(3000, monkeypatch)
