"""`bench --head-plan`, and the page that has its figures."""

import re
from pathlib import Path

import pytest

from xentjax.__main__ import main
from xentjax._commands.bench import head_plans

PAGE = (Path(__file__).parents[2] / "docs" / "large.md").read_text()


def shown(capsys, *argv):
    """Returns the lines that are printed."""
    assert main(["bench", "--head-plan", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_the_page_says_what_the_code_says():
    table = re.findall(r"^\| (\d+) × (\d+) × (\d+) (\w+) \| (.+?) \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(table) == 4 * len(head_plans.PLANS)
    for *head, dtype, name, cells in table:
        assert cells.split(" | ") == head_plans.cells(tuple(map(int, head)), dtype, name)


def test_figures_are_those_of_the_formula(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = shown(capsys, "8192x2304x256000")
    assert lines[0] == "head 8192 × 2304 × 256000 float32"
    (row,) = (line for line in lines[: lines.index("")] if line.startswith("CPU"))
    cells = re.split(r"  +", row)[1:]
    # 32 chunks add to a kernel's gradient, and 22 blocks to that of all inputs.
    kernel, inputs = 4 * 2304 * 256000 / 2**30, 4 * 8192 * 2304 / 2**30
    assert cells[:4] == ["256 × 32", "11648 × 22", "kept", "29"]
    assert round(3 * 2 * 8192 * 2304 * 256000 / 1e12) == 29
    assert float(cells[4]) == pytest.approx(2 * 32 * kernel + 2 * 22 * inputs, abs=0.05)
    # The logits are written, read, and their gradient is written, read by two matmuls.
    assert float(cells[6]) == pytest.approx(3 * 4 * 8192 * 256000 / 2**30, abs=0.05)
    (row,) = (line for line in lines[: lines.index("")] if line.startswith("budget 0"))
    assert re.split(r"  +", row)[3:5] == ["recomputed", "38.7"]


def test_every_head_of_the_benchmark_is_shown_in_60_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = shown(capsys)
    assert [line for line in lines if line.startswith("head ")] == [
        f"head {head} {dtype}"
        for head in ("2048 × 768 × 50257", "16384 × 4096 × 128256")
        for dtype in ("float32", "bfloat16")
    ]
    assert max(map(len, lines)) <= 60
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("size", ["0x1x1", "2048x768", "1x2x3x4", "axbxc", "1x1x-1"])
def test_a_size_that_is_none_is_one_line_of_error(capsys, size):
    assert main(["bench", "--head-plan", size]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: argument --head-plan: expected tokens x features x classes, "
        f"as in 2048x768x50257, got {size!r}\n"
    )
