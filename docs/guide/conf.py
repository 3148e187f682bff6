"""The guides as a site: one build a language (`make docs`)."""

import os
import re

from kitaeru import __version__

language = os.environ.get("KITAERU_DOCS_LANGUAGE", "en")
_japanese = language == "ja"

project = "kitaeru"
author = "kitaeru"
version = release = __version__
html_title = "kitaeru 鍛える"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# The reference is made from the docstrings; types stand in the signatures.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# The pages are written in each language, not translated by catalogues.
locale_dirs: list[str] = []

html_theme = "sphinx_book_theme"
html_theme_options = {
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "use_download_button": False,
    "navbar_persistent": [],
    "icon_links": [
        {
            "name": "English" if _japanese else "日本語",
            "url": "../en/index.html" if _japanese else "../ja/index.html",
            "icon": "fa-solid fa-language",
            "attributes": {"target": "_self"},
        }
    ],
}
html_static_path = ["_static"]
html_css_files = ["guide.css"]
html_show_sourcelink = False
html_copy_source = False


def _code(app, what, name, obj, options, lines):
    """Docstrings mark code as Markdown does, with one backtick; reStructuredText wants two."""
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", "\n".join(lines))
    lines[:] = text.split("\n")


def setup(app):
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", _code)
