"""Configuration of Sphinx. `make docs` builds the pages into docs/_build/html; warnings are errors.

Help pages, configuration keys, the API and the pages of the notebooks are written from the code at
every build. Git ignores them.
"""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import generated  # noqa: E402, it lies beside this file

project = "distill"
author = "the authors of distill"
copyright = author
release = version = version_of("distill")
html_title = "distill"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # Lightning documents its own hooks
autodoc_default_options = {"members": True, "show-inheritance": True}
nitpicky = False  # annotations name classes of torch and diffusers, documented elsewhere

generated.write(HERE / "look_up")
generated.write_notebooks(HERE / "notebooks")
generated.copy_studies(HERE / "experiments")


def setup(app: object) -> None:
    app.connect("source-read", generated.at_home)
    app.connect("autodoc-process-docstring", generated.as_rst, priority=400)  # before napoleon
