"""Every notebook runs from top to bottom, and what it has stored is what running it shows."""

import copy
import re
import sys
from decimal import Decimal
from pathlib import Path

import nbformat
import pytest
from cases import mainly
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\d+(?:\.(\d+))?(?:e([-+]?\d+))?")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|usr|Users|opt|var)/|[A-Z]:\\")


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Runs a copy of `notebook` in `folder`; raises CellExecutionError if a cell fails."""
    # With no folders to look for kernels in, "python3" is the Python that runs this test,
    # whatever kernels the user has registered.
    kernel = AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])
    )
    where = {"metadata": {"path": folder}}
    client = NotebookClient(copy.deepcopy(notebook), km=kernel, timeout=120, resources=where)
    return client.execute(cleanup_kc=True)


def shown(notebook: NotebookNode) -> list[list[tuple[str, str]]]:
    """Returns what each code cell prints and displays, as (kind, text); a picture's is its size."""
    return [
        [("stdout", "".join(streams(cell, "stdout")))]
        + [
            (" ".join(sorted(output.data)), output.data.get("text/plain", ""))
            for output in cell.outputs
            if output.output_type in ("display_data", "execute_result")
        ]
        for cell in code_cells(notebook)
    ]


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def streams(cell: NotebookNode, name: str) -> list[str]:
    return [o.text for o in cell.outputs if o.output_type == "stream" and o.name == name]


def same_text(stored: str, fresh: str) -> bool:
    """Whether two texts agree; decimals may differ by one in the last place, which is rounding."""
    if NUMBER.sub("#", stored).split() != NUMBER.sub("#", fresh).split():
        return False
    pairs = zip(NUMBER.finditer(stored), NUMBER.finditer(fresh), strict=True)
    return all(
        abs(Decimal(a[0]) - Decimal(b[0])) <= max(last_place(a), last_place(b)) for a, b in pairs
    )


def last_place(number: re.Match[str]) -> Decimal:
    """Returns what one in the last written place is worth; 0 for an integer, which is exact."""
    decimals, exponent = number.groups()
    if decimals is None and exponent is None:
        return Decimal(0)
    return Decimal(10) ** (int(exponent or 0) - len(decimals or ""))


def differences(stored: NotebookNode, fresh: NotebookNode) -> list[str]:
    """Returns a line for each code cell that has not stored what it shows when run."""
    return [
        f"code cell {i}: stored {a}, fresh {b}"
        for i, (a, b) in enumerate(zip(shown(stored), shown(fresh), strict=True), start=1)
        if [kind for kind, _ in a] != [kind for kind, _ in b]
        or not all(same_text(x, y) for (_, x), (_, y) in zip(a, b, strict=True))
    ]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize(
    "name", mainly([path.stem for path in NOTEBOOKS], "03_exact", "05_large_vocabularies")
)
def test_runs_and_shows_what_is_stored(name):
    (path,) = (path for path in NOTEBOOKS if path.stem == name)
    stored = nbformat.read(path, as_version=4)
    assert differences(stored, execute(stored, path.parent)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert not [text for cell in cells for text in streams(cell, "stderr")]
    assert not MACHINE_PATH.search(str(shown(notebook)))
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.metadata for cell in notebook.cells)
    assert path.stat().st_size < 400_000


def test_runs_with_this_python_in_the_given_folder(tmp_path):
    cells = [new_code_cell("import os, sys\nprint(sys.executable)"), new_code_cell("os.getcwd()")]
    executable, folder = shown(execute(new_notebook(cells=cells), tmp_path))
    assert executable == [("stdout", f"{sys.executable}\n")]
    assert folder == [("stdout", ""), ("text/plain", repr(str(tmp_path.resolve())))]


def test_a_failing_cell_is_an_error(tmp_path):
    broken = new_notebook(cells=[new_code_cell("assert 1 + 1 == 3, 'not so'")])
    with pytest.raises(CellExecutionError, match="not so"):
        execute(broken, tmp_path)


def test_another_output_is_a_difference(tmp_path):
    stored = execute(new_notebook(cells=[new_code_cell("print('1.25 nats')")]), tmp_path)
    fresh = copy.deepcopy(stored)
    assert differences(stored, fresh) == []
    fresh.cells[0].outputs[0].text = "1.27 nats\n"
    assert len(differences(stored, fresh)) == 1
    fresh.cells[0].outputs = []
    assert len(differences(stored, fresh)) == 1


@pytest.mark.parametrize(
    ("stored", "fresh", "same"),
    [
        ("1.0297 nats", "1.0297 nats", True),
        ("1.0297 nats", "1.0298 nats", True),
        ("1.0297 nats", "1.0299 nats", False),
        ("1.0297 nats", "1.0297 bits", False),
        ("+0.0000", "-0.0001", True),
        ("3.06e-07", "3.07e-07", True),
        ("3.06e-07", "3.06e-08", False),
        ("3.06e-07", "0", False),
        (" 9.9999 a", "10.0000 a", True),
        ("label 2", "label 3", False),
        ("1.00", "1.00 2.00", False),
    ],
)
def test_same_text(stored, fresh, same):
    assert same_text(stored, fresh) is same
