"""What the README and docs/ say that can be checked: their commands, the options that they name, their links.

Shell stands in fences of bash, and in indented blocks. A command is a line of it, or several where a line
ends in a backslash or within quotes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
FRONT = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
MARKDOWN = MarkdownIt("commonmark").enable("table")
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command of a page. block: which of the page's blocks it stands in."""

    page: str
    line: int
    block: int
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def pages() -> list[str]:
    """All pages, by their paths in the repository."""
    return [*FRONT, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@cache
def tokens(page: str) -> tuple[Token, ...]:
    """A page as its blocks and what stands in them."""
    found: list[Token] = []
    for token in MARKDOWN.parse((ROOT / page).read_text("utf-8")):
        found += [token, *(token.children or ())]
    return tuple(found)


def commands(page: str) -> list[Command]:
    """The commands of a page's shell blocks."""
    found = []
    for number, token in enumerate(tokens(page)):
        if token.type == "code_block" or (token.type == "fence" and token.info in ("bash", "sh")):
            assert token.map is not None
            begin = token.map[0] + (2 if token.type == "fence" else 1)
            found += [Command(page, begin + line, number, words) for line, words in shell(token.content)]
    return found


def code_of(page: str, language: str) -> list[str]:
    """The page's blocks of another language."""
    return [token.content for token in tokens(page) if token.type == "fence" and token.info == language]


def spans(page: str) -> list[str]:
    """What stands between backquotes in the page's text."""
    return [token.content for token in tokens(page) if token.type == "code_inline"]


def links(page: str) -> list[str]:
    """Where the page's links and pictures lead."""
    found = [token.attrGet("href") or token.attrGet("src") for token in tokens(page)]
    return [link for link in found if isinstance(link, str)]


def anchors(page: str) -> set[str]:
    """The names by which links lead to the page's headings, on GitHub and on the site."""
    found = tokens(page)
    headings = [found[i + 1].content for i, token in enumerate(found) if token.type == "heading_open"]
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shell(text: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(number of the line, words) of each command, without variables before it, `&` behind it, and comments."""
    whole = ""
    begin = 0
    for number, line in enumerate(text.split("\n")):
        begin = begin if whole else number
        whole += line
        if whole.endswith("\\"):
            whole = whole[:-1]
            continue
        try:
            words = shlex.split(whole, comments=True)
        except ValueError:  # a quote is open
            whole += "\n"
            continue
        whole = ""
        while words and ASSIGNMENT.fullmatch(words[0]):
            words.pop(0)
        if words:
            yield begin, tuple(words[:-1] if words[-1] == "&" else words)
    assert not whole, f"a command has no end: {whole}"
