"""The documentation: its code runs, its links lead somewhere, and every public name has a page."""

import html
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import xentjax
import xentjax.plot

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Each page is a script of its own, in one process: importing JAX takes longer than most of them.
RUN = """
import sys
from pathlib import Path

for path in sys.argv[1:]:
    exec(compile(Path(path).read_text(), path, "exec"), {"__name__": path})
"""


def test_the_code_runs(tmp_path):
    scripts = []
    for page in PAGES:
        if blocks := BLOCK.findall(page.read_text()):
            scripts.append(tmp_path / f"page_{page.stem}.py")
            scripts[-1].write_text("\n".join(blocks))
    assert "page_recipes" in [script.stem for script in scripts]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "MPLBACKEND": "agg"}
    words = [sys.executable, "-W", "error", "-c", RUN, *scripts]
    run = subprocess.run(
        words, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        # Notebooks are copied beside the pages before they are built; api/ is written then.
        folder = ROOT if link.startswith("notebooks/") else page.parent
        there = link.startswith(("https://", "api/")) or (folder / link).exists()
        assert there, link


def load(name):
    """Returns a module of the documentation's own, which needs no Sphinx."""
    path = ROOT / "docs" / "_ext" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_an_entry():
    """The pages of the API are made of the groups in the docstrings of the two modules."""
    pages = load("groups")
    for module in (xentjax, xentjax.plot):
        names = [name for _, group in pages.groups_of(module) for name, _ in group]
        assert len(set(names)) == len(names)
        assert set(names) == set(module.__all__) - {"STYLE"}


# Equations of docstrings become MathML.

PRESENTATION = re.compile(r"<[^>]*>")


def equations():
    """Yields the equations of the docstrings of public names."""
    for module in (xentjax, xentjax.plot):
        for name in module.__all__:
            paragraphs = (inspect.getdoc(getattr(module, name)) or "").split("\n\n")
            yield from ((name, p) for p in paragraphs[1:3] if re.search(r" = |->", p))


def test_equations_keep_their_letters_and_close_their_tags():
    mathml = load("equations")
    found = [(name, p) for name, p in equations() if mathml.is_equation(p.splitlines())]
    assert len(found) > 30
    for name, text in found:
        made = mathml.of_text(text)
        ElementTree.fromstring(made)
        shown = html.unescape(PRESENTATION.sub("", made))
        for sign, other in {"∑": "Σ", "⋅": "·", "′": "'"}.items():
            shown = shown.replace(sign, other)
        plain = re.sub(r"[\s`{}]|_(?=\{|\w{1,2}(?!\w))", "", text.translate(POWERS))
        for typed, sign in {"->": "→", ">=": "≥", "<=": "≤"}.items():
            plain = plain.replace(typed, sign)
        assert re.sub(r"\s", "", shown) == plain, name


POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
