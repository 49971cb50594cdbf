"""The documentation: its code runs, its links lead somewhere, and every public name has a page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
            scripts.append(tmp_path / f"{page.stem}.py")
            scripts[-1].write_text("\n".join(blocks))
    assert "recipes" in [script.stem for script in scripts]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "MPLBACKEND": "agg"}
    words = [sys.executable, "-W", "error", "-c", RUN, *scripts]
    run = subprocess.run(
        words, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link
