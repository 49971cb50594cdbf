"""Equations as MathML, which browsers draw themselves: no script, no font, no network.

Those of pages and notebooks are LaTeX, which latex2mathml reads. Those of docstrings are plain
text, which `equations` reads.
"""

import re

from docutils.nodes import SkipNode
from equations import is_equation, of_text
from latex2mathml.converter import convert
from sphinx.util.docutils import SphinxTranslator


def _equations_of_docstring(app, what, name, thing, options, lines):
    """Turns the equations before the first section of a docstring into MathML."""
    del app, what, name, thing, options
    done, paragraph, in_head = [], [], True
    for line in [*lines, ""]:
        in_head = in_head and not re.match(r"(:\w+|\.\. )", line)
        if line.strip():
            paragraph.append(line)
            continue
        if in_head and done and is_equation(paragraph):
            equations = re.split(r" {3,}", " ".join(x.strip() for x in paragraph))
            math = "".join(of_text(equation.rstrip(",;")) for equation in equations)
            paragraph = [".. raw:: html", "", f'   <div class="equation">{math}</div>']
        done += [*paragraph, ""]
        paragraph = []
    lines[:] = done[:-1]


def _visit_inline(self: SphinxTranslator, node):
    self.body.append(convert(node.astext()))
    raise SkipNode


def _visit_block(self: SphinxTranslator, node):
    self.body.append(convert(node.astext(), display="block"))
    raise SkipNode


def setup(app):
    """Installs the two readers of equations."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    app.connect("autodoc-process-docstring", _equations_of_docstring, priority=790)
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
