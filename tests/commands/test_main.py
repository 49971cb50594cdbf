"""The command line: every number of `explain` against 80 digits, and every wrong argument."""

import argparse
import math
import os
import signal
import subprocess
import sys
from typing import NamedTuple

import mpmath
import numpy as np
import pytest

import xentjax
from xentjax.__main__ import main
from xentjax._commands.common import check_writable

EXTRAS = ["matplotlib", "optax", "rich", "sklearn"]


def assert_shown(text, expected):
    """Asserts that a number as printed, four decimals or four digits, is `expected` rounded.

    Beside the rounding of the print there is that of float32, a few ulp.
    """
    half_unit = 5e-4 * abs(expected) if "e" in text else 5e-5
    assert float(text) == pytest.approx(expected, rel=1e-6, abs=half_unit), text


class Answer(NamedTuple):
    """What `explain` prints: cells by column and class, and the value at the end of each link."""

    columns: dict[str, list[str]]
    values: dict[str, str]
    text: str


def explain(capsys, *argv):
    code = main(["explain", *argv])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    _, table, links = captured.out.split("\n\n")
    heading, _, _, *rows = [line.split() for line in table.splitlines()]
    columns = dict(zip(heading, map(list, zip(*rows, strict=True)), strict=True))
    values = {}
    for line in links.splitlines():
        if not line.startswith(" ") and " = " in line:
            values[line.split()[0]] = line.rpartition(" = ")[2].split()[0]
    return Answer(columns, values, captured.out)


def assert_answer(answer, logits, truth, nats):
    """Asserts every number of the chain, from the logits and the truth, with `nats` in the unit."""
    with mpmath.workdps(80):
        z = [mpmath.mpf(float(x)) for x in logits]
        lse = mpmath.log(mpmath.fsum(map(mpmath.exp, z)))
        surprisals, p = [lse - x for x in z], [mpmath.exp(x - lse) for x in z]
        loss = float(mpmath.fsum(t * s for t, s in zip(truth, surprisals, strict=True) if t > 0))
        entropy = float(mpmath.fsum(q * s for q, s in zip(p, surprisals, strict=True) if q > 0))
        found = {
            "probability": p,
            "surprisal": [s / nats for s in surprisals],
            "truth": truth,
            "gradient": [(q - float(t)) / nats for q, t in zip(p, truth, strict=True)],
        }
        found = {name: list(map(float, column)) for name, column in found.items()}
    for name, column in found.items():
        for text, expected in zip(answer.columns[name], column, strict=True):
            assert_shown(text, expected)
    assert_shown(answer.values["entropy"], entropy / nats)
    assert_shown(answer.values["cross-entropy"], loss / nats)
    assert_shown(answer.values["loss"], loss / nats)
    perplexity = float(answer.values["perplexity"])
    assert perplexity == pytest.approx(math.exp(loss), rel=5.1e-5)  # Half of the fifth digit.


def test_explain_the_article(capsys):
    answer = explain(capsys, "0.1,0.2,0.7", "--label", "dog", "--classes", "panda,bird,dog")
    assert answer.columns["class"] == ["panda", "bird", "dog"]
    assert answer.columns["gradient"] == ["0.1000", "0.2000", "-0.3000"]
    assert answer.values["loss"] == answer.values["cross-entropy"] == "0.3567"
    assert "= 0.1000·2.3026 + 0.2000·1.6094 + 0.7000·0.3567\n" in answer.text
    assert "lse(z) − z_dog = 0.3567 nats\n" in answer.text
    assert_answer(answer, np.log([0.1, 0.2, 0.7]), [0, 0, 1], 1)


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize(
    ("numbers", "label"),
    [
        ("-1,2,3", 0),
        ("-.5,0.25,1e2", 2),
        ("20,5", 0),  # Confident: the loss is 3.06e-7.
        ("16777217,16777216", 1),  # Apart in float64, the same in float32.
        ("0,-inf,1", 0),
        (" 1, 2 ,3", 1),
        ("4", 0),
    ],
)
def test_explain_logits(capsys, numbers, label, bits):
    argv = ["--logits", numbers, "--label", str(label), *["--bits"] * bits]
    logits = [float(number) for number in numbers.split(",")]
    answer = explain(capsys, *argv)
    assert_answer(answer, logits, np.eye(len(logits))[label], math.log(2) if bits else 1)
    for text, logit in zip(answer.columns["logit"], logits, strict=True):
        assert float(text) == pytest.approx(logit, rel=5e-4)
    assert ("bits" if bits else "nats") in answer.text
    assert ("nats" if bits else "bits") not in answer.text


@pytest.mark.parametrize("smoothing", ["0", "0.1", "1"])
def test_explain_smoothing(capsys, smoothing):
    share = float(smoothing)
    answer = explain(capsys, "0.7,0.2,0.1", "--label", "0", "--smoothing", smoothing)
    truth = (1 - share) * np.array([1, 0, 0]) + share / 3
    assert_answer(answer, np.log([0.7, 0.2, 0.1]), truth, 1)


def test_explain_what_was_ruled_out(capsys):
    answer = explain(capsys, "0,0.2,0.8", "--label", "0")
    for name in ("cross-entropy", "loss", "perplexity"):
        assert answer.values[name] == "inf"
    assert answer.columns["surprisal"] == ["inf", "1.6094", "0.2231"]
    assert answer.columns["gradient"] == ["-1.0000", "0.2000", "0.8000"]
    assert answer.values["entropy"] == "0.5004"  # 0 · inf = 0.
    assert "nan" not in answer.text


def test_explain_a_perplexity_beyond_float64(capsys):
    answer = explain(capsys, "800,0", "--logits", "--label", "1")
    assert answer.values["loss"] == "800.0000"
    assert "e^H(t, p) = more than 1.8e+308\n" in answer.text


def test_explain_many_classes(capsys):
    """No sum is written out that nobody would read."""
    answer = explain(capsys, ",".join(["0.05"] * 20), "--label", "19")
    assert_answer(answer, np.zeros(20), np.eye(20)[19], 1)
    assert "0.0500·2.9957" not in answer.text


def test_explain_takes_a_name_before_an_index(capsys):
    argv = ["0.1,0.2,0.7", "--classes", "1,2,3"]
    assert explain(capsys, *argv, "--label", "1").values["loss"] == "2.3026"
    assert explain(capsys, *argv, "--label", "0").values["loss"] == "2.3026"
    assert explain(capsys, *argv, "--label", "3").values["loss"] == "0.3567"


def test_explain_aligns_wide_names(capsys):
    wide = explain(capsys, "0.1,0.2,0.7", "--label", "🐶", "--classes", "🐼,🐦,🐶").text
    plain = explain(capsys, "0.1,0.2,0.7", "--label", "cc", "--classes", "aa,bb,cc").text
    for emoji, letters in ("🐼", "aa"), ("🐦", "bb"), ("🐶", "cc"):
        wide = wide.replace(emoji, letters)
    assert wide == plain


@pytest.mark.parametrize("numbers", ["0.333333,0.333333,0.333334", "0.333333,0.333333,0.333333"])
def test_explain_takes_rounded_probabilities(capsys, numbers):
    assert explain(capsys, numbers, "--label", "0").values["loss"] == "1.0986"


def test_explain_normalizes(capsys):
    answer = explain(capsys, "0.333,0.333,0.333", "--normalize", "--label", "1")
    assert answer.columns["weight"] == ["0.3330"] * 3
    assert "p_v = w_v / Σ_u w_u, Σ_u w_u = 0.9990\n" in answer.text
    assert "z = log w\n" in answer.text
    assert_answer(answer, np.zeros(3), [0, 1, 0], 1)
    answer = explain(capsys, "30,0,10", "--normalize", "--label", "0", "--bits")
    assert answer.columns["probability"] == ["0.7500", "0.0000", "0.2500"]
    assert answer.values["loss"] == "0.4150"


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_explain_fits_the_terminal(capsys, monkeypatch, columns):
    """Names, numbers and formulas are the same as at 500 columns, in lines that fit."""
    argv = ["--logits", "12345,-2.5,3", "--label", "bird", "--classes", "panda,bird,dog"]
    monkeypatch.setenv("COLUMNS", "500")
    wide = explain(capsys, *argv).text.replace("─", "").split()
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["explain", *argv]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert set(wide) == set(out.replace("─", "").split())


P = "0.1,0.2,0.7"
NOT_PROBABILITIES = "NUMBERS: expected probabilities of at least 0 that sum to 1, got "
NORMALIZE = "(--normalize divides by their sum, --logits takes logits)"
NOT_WEIGHTS = "NUMBERS: expected weights of at least 0 with a sum above 0, got "
NOT_LOGITS = "NUMBERS: expected logits from −1e+300 to 1e+300, or −inf, got "
NOT_NUMBERS = "NUMBERS: expected numbers with commas between them, got "
NOT_NAMES = "--classes: expected 3 different names, one for each of NUMBERS, got "
NOT_A_SHARE = "--smoothing: expected a number from 0 to 1, got "
NOT_EPOCHS = "--epochs: expected a whole number from 1 to 10000, got "


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("explain 0.1,0.2,0.6 --label 0", NOT_PROBABILITIES),
        ("explain 0.1,0.2,0.6 --label 0", "got [0.1, 0.2, 0.6], which sum to 0.9"),
        ("explain 0.1,0.2,0.6 --label 0", NORMALIZE),
        ("explain 0,0 --normalize --label 0", NOT_WEIGHTS + "[0., 0.]"),
        ("explain -1,2 --normalize --label 0", NOT_WEIGHTS + "[-1.,  2.]"),
        ("explain inf,2 --normalize --label 0", NOT_WEIGHTS + "[inf,  2.]"),
        ("explain 1,2 --normalize --logits --label 0", "--logits: not allowed with argument --n"),
        ("explain 0.3333,0.3333,0.3333 --label 0", NOT_PROBABILITIES),
        ("explain -0.1,0.4,0.7 --label 0", NOT_PROBABILITIES),
        ("explain nan,1 --label 0", NOT_PROBABILITIES),
        ("explain inf,1 --label 0", NOT_PROBABILITIES),
        ("explain 0.1;0.9 --label 0", NOT_NUMBERS + "0.1;0.9"),
        ("explain 0.1,,0.9 --label 0", NOT_NUMBERS + "0.1,,0.9"),
        ("explain nan,1 --logits --label 0", NOT_LOGITS + "[nan,  1.]"),
        ("explain inf,1 --logits --label 0", NOT_LOGITS + "[inf,  1.]"),
        ("explain -1e301,1 --logits --label 0", NOT_LOGITS + "[-1.e+301,  1.e+000]"),
        ("explain -inf,-inf --logits --label 0", "NUMBERS: expected at least one logit above −inf"),
        (f"explain {P}", "the following arguments are required: --label"),
        ("explain --label 0", "the following arguments are required: NUMBERS"),
        (f"explain {P} --label 3", "--label: expected a name or an index of the 3 classes"),
        (f"explain {P} --label -1", "classes 0, 1, 2, got -1"),
        (f"explain {P} --label cat --classes panda,bird,dog", "classes panda, bird, dog, got cat"),
        (f"explain {','.join(['0.05'] * 20)} --label 20", "the 20 classes 0 … 19, got 20"),
        (f"explain {P} --label 0 --classes a,b", NOT_NAMES + "a,b"),
        (f"explain {P} --label 0 --classes a,b,b", NOT_NAMES + "a,b,b"),
        (f"explain {P} --label 0 --classes a,,b", NOT_NAMES + "a,,b"),
        (f"explain {P} --label 0 --smoothing 2", NOT_A_SHARE + "'2'"),
        (f"explain {P} --label 0 --smoothing -.1", NOT_A_SHARE + "'-.1'"),
        (f"explain {P} --label 0 --smoothing nan", NOT_A_SHARE + "'nan'"),
        (f"explain {P} --label 0 --base 2", "unrecognized arguments: --base 2"),
        (f"explain {P} --lab 0", "the following arguments are required: --label"),
        ("demo --epochs 0", NOT_EPOCHS + "'0'"),
        ("demo --epochs 1.5", NOT_EPOCHS + "'1.5'"),
        ("demo --epochs -3", NOT_EPOCHS + "'-3'"),
        ("demo --seed x", "--seed: expected a whole number from 0 to 4294967295, got 'x'"),
        ("demo --output x.gif", "--output: expected a name in .png, .pdf or .svg, got 'x.gif'"),
        ("demo --output no/x.png", "--output: expected a file in a folder that exists, got"),
        ("train", "invalid choice: 'train'"),
    ],
)
def test_bad_arguments(capsys, argv, message):
    assert main(argv.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


TOO_LONG = "x" * 300 + ".png"


@pytest.mark.parametrize("command", ["demo", "lm", "bench --cases scaling"])
def test_a_file_that_cannot_be_written_is_found_first(capsys, command):
    assert main([*command.split(), "--output", TOO_LONG]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    expected = f"--output: expected a file that can be written, got '{TOO_LONG}': File name too"
    assert expected in captured.err
    assert captured.err.count("\n") == 1


def test_a_record_that_cannot_be_written_is_found_first(capsys):
    assert main(["bench", "--map", "--json", TOO_LONG]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "argument --json: expected a file that can be written" in captured.err


def test_a_file_is_left_as_it_is(tmp_path):
    old, new = tmp_path / "old.png", tmp_path / "new.png"
    old.write_bytes(b"old")
    check_writable("--output", old)
    check_writable("--output", new)
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]
    assert old.read_bytes() == b"old"


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="nothing stops this user")
def test_read_only_files_and_folders(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "x.png"
    folder.mkdir(0o500)
    file.touch(0o400)
    for path in folder / "x.png", file:
        with pytest.raises(argparse.ArgumentError, match=r"can be written, got .*: Permission"):
            check_writable("--output", path)


def test_a_folder_is_no_picture(capsys, tmp_path):
    (tmp_path / "x.png").mkdir()
    assert main(["demo", "--output", str(tmp_path / "x.png")]) == 2
    assert "argument --output: expected a file in a folder that exists" in capsys.readouterr().err


def test_without_a_command_the_commands_are_listed(capsys):
    assert main([]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("usage: python -m xentjax")
    for command in "demo", "lm", "explain", "bench":
        assert f"\n    {command} " in captured.out


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"], ["explain", "--help"]])
def test_help(capsys, argv):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m xentjax")


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"xentjax {xentjax.__version__}\n"


@pytest.mark.parametrize("package", EXTRAS)
def test_demo_without_an_extra(capsys, monkeypatch, package):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in "xentjax._commands.demo", "xentjax._commands.common":
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(["demo"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    needs = f"demo needs {package}, which is not installed"
    assert captured.err == f'error: {needs}: pip install "xentjax[demo]"\n'


def test_explain_as_a_program_with_the_core_alone():
    """Also where the terminal knows no Greek."""
    hide = f"import runpy, sys; sys.modules.update(dict.fromkeys({EXTRAS}))"
    program = f"{hide}; runpy.run_module('xentjax', run_name='__main__', alter_sys=True)"
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, "explain", "-1,2", "--logits", "--label=1"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert "? p_v" not in process.stdout
    assert "lse(z) ? z_1 = 0.0486 nats" in process.stdout


def start(*argv, options=()):
    """Starts a command as a program."""
    return subprocess.Popen(
        [sys.executable, *options, "-m", "xentjax", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there Ctrl-C is no signal to one process")
def test_ctrl_c_while_jax_is_imported():
    with start("explain", "1,2", "--logits", "--label=0", options=["-X", "importtime"]) as process:
        while "numpy" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    # The main thread may tell of an import more before the process ends, in a line that is torn.
    lines = [line for line in err.splitlines() if "|" not in line]
    assert (process.returncode, lines, out) == (130, ["interrupted"], "")


@pytest.mark.skipif(sys.platform == "win32", reason="there Ctrl-C is no signal to one process")
@pytest.mark.parametrize(
    "argv", ["demo --epochs=10000 --output={}/x.png", "bench --rounds=10000 --cases=labels"]
)
def test_ctrl_c_is_told_in_one_line(tmp_path, argv):
    with start(*argv.format(tmp_path).split()) as process:
        first = process.stdout.readline()  # After it come compilations and computations.
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert first.startswith("Handwritten digits" if "demo" in argv else "")
    assert "Picture" not in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="the system has no such signal")
def test_a_reader_may_stop_early():
    with start("explain", ",".join(["0.0001"] * 10_000), "--label=1") as process:
        assert process.stdout.readline() == "Classes: 10000. Truth: 1. Unit: nats.\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGPIPE
