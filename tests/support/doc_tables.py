"""Tables in the pages of docs/ that are made from the code: they are found by the marks around them, and written anew.

A table of options, say, stands between `<!-- options: NAME -->` and `<!-- end of options -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


@dataclass(frozen=True)
class DocTables:
    """Those of one kind, which their marks name. makers: what makes each of them."""

    kind: str
    makers: Mapping[str, Callable[[], str]]

    @property
    def _table(self) -> re.Pattern[str]:
        return re.compile(rf"(<!-- {self.kind}: (.+?) -->\n).*?(<!-- end of {self.kind} -->)", re.DOTALL)

    def shown(self) -> list[str]:
        """The names of all that stand in pages."""
        return [match[2] for page in DOCS.glob("*.md") for match in self._table.finditer(page.read_text("utf-8"))]

    def changed(self) -> dict[Path, str]:
        """The pages whose tables are out of date, as they should be."""
        texts = {page: page.read_text("utf-8") for page in DOCS.glob("*.md")}
        fresh = {page: self._table.sub(self._made, text) for page, text in texts.items()}
        return {page: text for page, text in fresh.items() if text != texts[page]}

    def _made(self, old: re.Match[str]) -> str:
        return f"{old[1]}\n{self.makers[old[2]]()}\n{old[3]}"

    def write(self) -> None:
        """Write these pages."""
        for page, text in self.changed().items():
            page.write_text(text, "utf-8")
            print(f"written: {page.name}")
