"""The site that `make docs` builds out of this folder: Sphinx reads the Markdown that GitHub shows, by MyST."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

from octavo.version import VERSION

project = "octavo"
release = VERSION
root_doc = "index"
extensions = ["myst_parser"]
myst_heading_anchors = 4  # links lead to headings by GitHub's names for them
html_theme = "furo"  # has its fonts and scripts with it: a page loads nothing from elsewhere
html_title = f"octavo {VERSION}"
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def lead_to_site(*event: Any) -> None:
    """Let links lead to a text of the repository's root where it stands on the site."""
    content: list[str] = event[-1]  # behind the application, and the names of the page and of what it includes
    content[0] = content[0].replace("](CONTRIBUTING.md)", "](contributing.md)").replace("](../README.md", "](index.md")


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", lead_to_site)
    app.connect("include-read", lead_to_site)
