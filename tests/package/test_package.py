"""The package: what importing it brings, and which names it has."""

import contextlib
import importlib.metadata
import importlib.resources
import inspect
import re
import subprocess
import sys
import types
import typing

import pytest

import xentjax

PUBLIC = {name: getattr(xentjax, name) for name in xentjax.__all__}
FUNCTIONS = {name: f for name, f in PUBLIC.items() if inspect.isfunction(f)}
CLASSES = {name: c for name, c in PUBLIC.items() if inspect.isclass(c)}


# Importing.

IMPORT = """
import sys
import jax
before = set(sys.modules)
import xentjax
print(*sorted({m.split(".")[0] for m in set(sys.modules) - before}))
"""


def test_import_brings_no_more_than_it_needs():
    command = [sys.executable, "-c", IMPORT]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    brought = set(run.stdout.split())
    assert "chex" in brought
    assert not brought & {"optax", "matplotlib", "sklearn", "torch", "rich", "scipy", "pandas"}


# What is public.


def test_all_is_what_is_there():
    assert len(set(xentjax.__all__)) == len(xentjax.__all__)
    there = {
        name
        for name, value in vars(xentjax).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert set(xentjax.__all__) == there
    namespace = {}
    exec("from xentjax import *", namespace)
    assert set(xentjax.__all__) <= set(namespace)


def test_public_names_are_functions_classes_and_one_alias():
    assert set(PUBLIC) - set(FUNCTIONS) - set(CLASSES) == {"Targets"}


HEADING = re.compile(r"^(Args|Attributes|Returns|Raises|Example|Source):\n", re.MULTILINE)


def sections_of(thing):
    """Returns a docstring's sections by name; the text before the first is that of ""."""
    first, *rest = HEADING.split(inspect.getdoc(thing) or "")
    return {"": first} | dict(zip(rest[::2], rest[1::2], strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_takes_and_shows_how(name):
    sections = sections_of(FUNCTIONS[name])
    assert sections[""].splitlines()[0].endswith(".")
    assert f"xentjax.{name}(" in sections["Example"]
    assert ">>> " in sections["Example"]
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    if parameters:
        described = re.findall(r"^  (\w+): ", sections["Args"], flags=re.MULTILINE)
        assert described == list(parameters)
        assert "Returns" in sections
        assert "Raises" in sections
        assert set(typing.get_type_hints(FUNCTIONS[name])) == {*parameters, "return"}


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_describes_its_parts(name):
    sections = sections_of(CLASSES[name])
    described = re.findall(r"^  (\w+): ", sections["Attributes"], flags=re.MULTILINE)
    assert described == list(CLASSES[name].__annotations__)
    if not hasattr(CLASSES[name], "_fields"):  # What functions return is shown by theirs.
        assert ">>> import xentjax" in sections["Example"]
    for method, value in vars(CLASSES[name]).items():
        if inspect.isfunction(value) and not method.startswith("_"):
            assert value.__doc__, method


def test_types_are_shipped():
    assert importlib.resources.files("xentjax").joinpath("py.typed").is_file()


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", xentjax.__version__)
    # A source tree that is only on the path has no metadata.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        assert importlib.metadata.version("xentjax") == xentjax.__version__
