"""The README's code runs, top to bottom, as one script, and its links and its map are right."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

# Both scripts of "One device and many" train the same model.
SAME = """
assert len(jax.devices()) == 8
assert len(one) == len(many) > 1
assert one[-1] < one[0]
assert max(abs(a - b) / a for a, b in zip(one, many, strict=True)) <= 1e-6
"""


def test_the_code_runs(tmp_path):
    """A new process has the eight devices that the README says how to have."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    (variable,) = set(re.findall(r"`(\w+=\d+) python train\.py`", README))
    script = tmp_path / "train.py"
    script.write_text("\n".join([*blocks, SAME]))
    environment = os.environ | dict([variable.split("=")])
    words = [sys.executable, "-W", "error", script]
    run = subprocess.run(words, check=False, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_commands_are_those_of_the_makefile():
    """Each `make` of the README and of CONTRIBUTING.md has a target."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"\bmake (demo|test|lint|clean)\b", (ROOT / page).read_text()))
        assert {"test", "lint"} <= named <= targets


# The map of the folders.

LAYERS = re.findall(r"^xentjax/(\w+)(?:/|\.py) ", README, re.MULTILINE)


def imports(path):
    """Yields the part of xentjax that each import of a file is from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            package, _, rest = f"{module}.".partition(".")
            if package == "xentjax":
                part = rest.partition(".")[0]
                yield part if part in LAYERS else "__init__"


def test_the_map_has_every_folder():
    folders = {path.parent.name for path in (ROOT / "xentjax").glob("*/__init__.py")}
    assert folders == set(LAYERS) - {"__init__"}


def test_a_folder_calls_only_those_below():
    for layer, name in enumerate(LAYERS):
        folder = ROOT / "xentjax" / name
        files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
        for path in files:
            above = set(imports(path)) - set(LAYERS[layer:])
            assert not above, f"{path.relative_to(ROOT)} imports {above}"
