"""Sphinx builds the documentation from these pages and the package's docstrings: `make docs`."""

from __future__ import annotations

import os
import re
from typing import Any

import introvae

project = "introvae"
author = "the introvae authors"
version = release = introvae.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["results"]
myst_heading_anchors = 3
# Raw text keeps its symbols: quotes and dashes in commands must stay what one can type, and no page needs MathJax.
smartquotes = False
suppress_warnings = ["myst.strikethrough"]

html_theme = "furo"
html_title = f"introvae {version}"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"

# Pages with code cells run at every build, so that what they show is what this version does.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autoclass_content = "class"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# "Arguments" of a class are those of its making; "Source" is where an equation is from.
napoleon_custom_sections = [("Source", "notes_style")]
napoleon_preprocess_types = False

os.environ.setdefault("MPLBACKEND", "agg")

# Docstrings are plain text: |x - y|, sum_f and E* mean what they say there, and `name` is code.
MEANT = re.compile(r"(?<![`\w])`([^`\n]+)`(?!`)")


def plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make a docstring valid reStructuredText: what stands in backquotes is code, bars and stars are themselves."""
    builtins = (str(kind.__doc__) for kind in (bool, int, float, str, tuple))
    if lines and lines[0].strip() and any(doc.startswith(lines[0].strip()) for doc in builtins):
        lines.clear()  # a setting without a docstring of its own has that of bool or str
    for index, line in enumerate(lines):
        parts = MEANT.split(line)
        escaped = [re.sub(r"([|*]|(?<=\w)_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
        code = [f"``{part}``" for part in parts[1::2]]
        if line.lstrip().startswith((">>>", "...")):
            continue
        lines[index] = "".join(a + b for a, b in zip(escaped, [*code, ""], strict=True))


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain, priority=100)
