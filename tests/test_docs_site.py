"""The site of `make docs` loads nothing from elsewhere. CI runs `make docs`; this test is for a release (`-m slow`)."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from documented import ROOT

LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "object": "data"}


class Loads(HTMLParser):
    """What a page loads by itself; links that a reader follows aren't among it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get(LOADED.get(tag, ""))
        if target is not None:
            self.found.append(target)


@pytest.mark.slow
def test_the_site_needs_no_network(tmp_path: Path) -> None:
    (rule,) = re.findall(
        r"^\t\$\(BIN\)/python (-m sphinx .*) docs build/site$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    subprocess.run([sys.executable, *rule.split(), "docs", str(tmp_path)], cwd=ROOT, check=True)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        for target in Loads(page.read_text("utf-8")).found:
            assert not re.match("(https?:)?//", target), f"{page.name} loads {target}"
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text("utf-8")), style
    assert (tmp_path / "searchindex.js").is_file()
