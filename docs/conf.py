"""How Sphinx builds the documentation: `make docs`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sphinx.application import Sphinx

import asyncstore

project = "asyncstore"
version = release = asyncstore.__version__
copyright = "asyncstore contributors"  # noqa: A001 - Sphinx wants that name

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_static"]

# Markdown: anchors as GitHub makes them, so that links work in both places.
myst_heading_anchors = 3

# The reference: a name in backticks is a link where there is something to link to.
default_role = "py:obj"
add_module_names = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"asyncstore {version}"
html_static_path = ["_static"]
html_css_files = ["extra.css"]
html_show_sourcelink = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "native"


def _as_restructured_text(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Say of a docstring's examples, and of what stands in backticks, what they are."""
    lines[:] = [_IN_BACKTICKS.sub(_name_or_text, line) for line in _with_code_marked(lines)]


_IN_BACKTICKS = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def _name_or_text(found: re.Match[str]) -> str:
    """Leave a name to be a link; anything else is code as it stands."""
    return found[0] if re.fullmatch(r"[A-Za-z][\w.]*", found[1]) else f"``{found[1]}``"


def _with_code_marked(lines: list[str]) -> Iterator[str]:
    is_code = False
    for line, before in zip(lines, ["", *lines], strict=False):
        is_indented = line.startswith("    ")
        if is_indented and not is_code and not before:
            yield from (".. code-block:: python", "")
        is_code = is_indented or (is_code and not line)
        yield line


_PAGES_FOR = {
    "../ARCHITECTURE.md": "architecture.md",
    "../CHANGELOG.md": "changelog.md",
    "../examples/helm/README.md": "chart.md",
}


def _within_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Let links to files that are pages here, too, lead to those."""
    for file, shown in _PAGES_FOR.items():
        source[0] = source[0].replace(f"]({file}", f"]({shown}")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _within_the_site)
    app.connect("autodoc-process-docstring", _as_restructured_text)
