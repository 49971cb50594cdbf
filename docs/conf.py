"""The documentation: `make docs` builds docs/_build/html, which is read without a network."""

import shutil
import sys
from pathlib import Path

import matplotlib

import xentjax

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
# Sphinx reads no page from outside its folder.
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)
# STIX, for browsers that have no font for mathematics; matplotlib brings it, with its licence.
(HERE / "_fonts").mkdir(exist_ok=True)
for name in ("STIXGeneral.ttf", "LICENSE_STIX"):
    shutil.copy(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, HERE / "_fonts")

project = "xentjax"
author = "the xentjax developers"
copyright = author
version = release = xentjax.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_copybutton",
    "api_pages",
    "mathml",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
default_role = "code"
nitpicky = False
toc_object_entries_show_parents = "hide"

# Docstrings.
autodoc_typehints = "none"  # Args says the types, with their shapes.
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "notes_style")]
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
add_module_names = False

# Pages and notebooks. The test suite runs the notebooks; here their stored outputs are shown.
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True

# The theme brings its own styles and scripts; nothing is fetched.
html_theme = "furo"
html_title = f"xentjax {version}"
html_static_path = ["_static", "_fonts"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True
