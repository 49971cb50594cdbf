"""Types and help, as a user meets them: a script under pyright, and the map of the names."""

import importlib.util
import inspect
import json
import re
import runpy
import subprocess
import sys
import typing
from pathlib import Path

import jax
import pytest

import xentjax

SCRIPT = Path(__file__).parents[1] / "support" / "user_script.py"


def test_a_users_script_runs():
    """In a trace, which compiles nothing."""

    def run():
        runpy.run_path(str(SCRIPT))

    jax.eval_shape(run)


@pytest.mark.skipif(
    importlib.util.find_spec("pyright") is None, reason="pyright is of the group lint"
)
def test_a_users_script_has_no_fault_of_types():
    """The script asks for strict checks; types that are not known are faults there."""
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    run = subprocess.run([*command, str(SCRIPT)], capture_output=True, text=True, check=False)
    report = json.loads(run.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    assert report["generalDiagnostics"] == []


def test_the_script_uses_every_public_name():
    used = set(re.findall(r"\bxentjax\.(\w+)", SCRIPT.read_text(encoding="utf-8")))
    # A second of the same types, and those inside a shard_map, whose types are the losses'.
    others = {name for name in xentjax.__all__ if name.startswith("vocab_parallel")}
    others |= {"temperature", "pmap_data_parallel"}
    assert used == set(xentjax.__all__) - others


def test_nothing_public_returns_any():
    for name in xentjax.__all__:
        function = getattr(xentjax, name)
        if inspect.isfunction(function) and name != "value_checks":
            overloads = typing.get_overloads(function) or [function]
            for overload in overloads:
                assert typing.get_type_hints(overload)["return"] is not typing.Any, name


def test_help_opens_with_a_map_of_the_public_names():
    text = inspect.getdoc(xentjax) or ""
    entries = re.findall(r"^  (\w+): \S", text, flags=re.MULTILINE)
    assert entries == list(xentjax.__all__)
    lines = text.splitlines()
    assert lines[0].endswith(".")
    # Beside the entries there are headings, and nothing else.
    rest = [line for line in lines[1:] if line and not line.startswith("  ")]
    assert all(line[0].isupper() and line.endswith(".") for line in rest)
