"""A table as a value: its cells as they are shown, and the same table as HTML, Markdown, CSV and on a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class Cell:
    """A figure, and under it what is uncertain of it or how it was found; marked: the best of its column."""

    text: str
    small: str = ""
    marked: bool = False


Content = str | Cell


@dataclass(frozen=True)
class Table:
    """The first column is text, the others are figures. note: a line below."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Content, ...], ...]
    note: str = ""

    def without(self, head: str) -> Table:
        """The table without a column."""
        left = [i for i, name in enumerate(self.heads) if name != head]
        rows = tuple(tuple(row[i] for i in left) for row in self.rows)
        return replace(self, heads=tuple(self.heads[i] for i in left), rows=rows)

    def to_html(self) -> str:
        """The table in a box that scrolls sideways; nothing without rows. Every cell is escaped."""
        if not self.rows:
            return ""
        title = f'<p class="caption">{escape(self.title)}</p>' if self.title else ""
        heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in self.heads)
        rows = "\n".join(f"<tr>{_row(row)}</tr>" for row in self.rows)
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        label = escape(self.title or "table")
        return (
            f'{title}<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
            f"<thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>{note}"
        )

    def to_markdown(self) -> str:
        """With its title as a paragraph in bold; nothing without rows."""
        if not self.rows:
            return ""
        align = ("---", *("---:" for _ in self.heads[1:]))
        lines = [_markdown_row(self.heads), _markdown_row(align), *(_markdown_row(row) for row in self.rows)]
        title = [f"**{self.title}**", ""] if self.title else []
        note = ["", self.note] if self.note else []
        return "\n".join([*title, *lines, *note]) + "\n"

    def to_rich(self) -> rich.table.Table:
        """A table for the terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title))
        for i, head in enumerate(self.heads):
            table.add_column(head, justify="right" if i else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(_plain(content)) for content in row))
        return table


def to_csv(heads: Sequence[str], rows: Iterable[Sequence[str | float | int]]) -> str:
    """Plain figures for a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return text.getvalue()


def _row(row: Sequence[Content]) -> str:
    first, *rest = row
    return f'<th scope="row">{_html(first)}</th>' + "".join(
        f"<td{' class=best' if isinstance(content, Cell) and content.marked else ''}>{_html(content)}</td>"
        for content in rest
    )


def _html(content: Content) -> str:
    if isinstance(content, str):
        return escape(content)
    small = f"<small>{escape(content.small)}</small>" if content.small else ""
    return f"{escape(content.text)}{small}"


def _markdown_row(row: Sequence[Content]) -> str:
    return f"| {' | '.join(_markdown(content) for content in row)} |"


def _markdown(content: Content) -> str:
    text = _plain(content).replace("|", "\\|").replace("\n", " ")
    return f"**{text}**" if isinstance(content, Cell) and content.marked else text


def _plain(content: Content) -> str:
    return content if isinstance(content, str) else content.text + (f" ({content.small})" if content.small else "")
