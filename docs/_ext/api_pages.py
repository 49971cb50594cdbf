"""The pages of the API: one for each group of names in the docstrings of xentjax and its plots."""

import re
from pathlib import Path

from docutils import nodes
from groups import groups_of
from sphinx import addnodes

import xentjax
import xentjax.plot

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "api"
INTRODUCTION = """# API

Every public name, by the task that it is for. Shapes are written as `float[..., V]`: any axes of a
batch, then one of V classes. Losses are in nats.

"""


def write() -> None:
    """Writes the pages that have changed, so that the next build reads no more than these."""
    FOLDER.mkdir(exist_ok=True)
    pages, index = {}, INTRODUCTION
    for module in (xentjax, xentjax.plot):
        for heading, names in groups_of(module):
            title = heading if module is xentjax else f"Pictures: {heading.lower()}"
            slug = re.sub(r"\W+", "-", title.lower()).strip("-")
            pages[f"{slug}.md"] = _page(module.__name__, title, [name for name, _ in names])
            index += f"## [{title}]({slug}.md)\n\n"
            rows = (f"| {{py:obj}}`~{module.__name__}.{name}` | {text} |" for name, text in names)
            index += "| name | |\n|---|---|\n" + "\n".join(rows) + "\n\n"
    listed = "\n".join(name.removesuffix(".md") for name in pages)
    pages["index.md"] = f"{index}```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    for old in set(FOLDER.glob("*.md")) - {FOLDER / name for name in pages}:
        old.unlink()
    for name, text in pages.items():
        path = FOLDER / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def _page(module: str, title: str, names: list[str]) -> str:
    directives = "\n".join(_directive(module, name) for name in names)
    return f"# {title}\n\n```{{eval-rst}}\n.. currentmodule:: {module}\n\n{directives}```\n"


def _directive(module: str, name: str) -> str:
    thing = getattr({"xentjax": xentjax, "xentjax.plot": xentjax.plot}[module], name)
    if isinstance(thing, type):
        fields = ", ".join(thing.__annotations__)  # Attributes describes them.
        options = f"   :members:\n   :exclude-members: {fields}\n"
        return f".. autoclass:: {name}\n{options}\n"
    return f".. auto{'function' if callable(thing) else 'data'}:: {name}\n\n"


def _link_names(app, what, name, thing, options, lines):
    """Links `name` in a docstring to the public name's entry."""
    del app, what, name, thing, options
    public = "|".join(sorted(xentjax.__all__, key=len, reverse=True))
    quoted = re.compile(rf"(?<![`:\w])`({public})`(?!`)")
    lines[:] = [quoted.sub(r":py:obj:`~xentjax.\1`", line) for line in lines]


def _escape_bars(app, what, name, thing, options, lines):
    """Lets |x| be a size and not a substitution; lines of examples stay as they are."""
    del app, what, name, thing, options
    in_example = False
    for i, line in enumerate(lines):
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        if not in_example and "`" not in line and "<math" not in line:
            lines[i] = line.replace("|", r"\|")


def _name_files(app, doctree):
    """Turns links of the README and of CONTRIBUTING.md to files of the repository into paths."""
    del app
    for node in list(doctree.findall(addnodes.pending_xref)):
        target = str(node.get("reftarget", "")).partition("#")[0]
        is_file = target and (ROOT / target).is_file() and not (ROOT / "docs" / target).exists()
        if is_file and node.get("reftype") == "myst":
            node.replace_self(nodes.literal(text=target))


def setup(app):
    """Writes the pages before they are read."""
    app.connect("builder-inited", lambda app: write())
    app.connect("autodoc-process-docstring", _link_names, priority=800)
    app.connect("autodoc-process-docstring", _escape_bars, priority=950)
    app.connect("doctree-read", _name_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
