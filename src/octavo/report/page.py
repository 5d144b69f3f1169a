"""A page in one file that needs no network: style, script and charts stand in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from octavo.report.chart import Chart
from octavo.report.table import Table

HERE = Path(__file__).parent
LIBRARIES = ("chart.js", "chartjs-chart-error-bars.js")


@dataclass(frozen=True)
class Answer:
    """What the reader came for: the first line is the answer, the others say more. unsure: colored as a warning."""

    lines: tuple[str, ...]
    unsure: bool = False


@dataclass(frozen=True)
class Tiles:
    """A few figures in large type: (figure, what it is)."""

    tiles: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Picture:
    """An element of SVG, in which whoever has drawn it has escaped what strangers named."""

    svg: str


@dataclass(frozen=True)
class Charts:
    """Charts side by side where there is room."""

    charts: tuple[Chart, ...]


Block = Answer | Tiles | Items | Facts | Table | Picture | Charts


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A report. The first section has no heading."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]

    def to_html(self) -> str:
        """The whole file. Every text is escaped."""
        charts: list[Chart] = []
        body = "\n".join(_section(section, charts) for section in self.sections)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_file('page.css')}</style>\n</head>\n<body>\n<main>\n"
            f'<h1>{escape(self.title)}</h1>\n<p class="sub">{escape(self.subtitle)}</p>\n'
            f"{body}\n</main>\n{_scripts(charts)}</body>\n</html>\n"
        )

    def to_markdown(self) -> str:
        """The same without charts and pictures."""
        parts = [f"# {self.title}\n\n{self.subtitle}\n"]
        for section in self.sections:
            blocks = [text for block in section.blocks if (text := _markdown(block))]
            if blocks:
                parts += [f"## {section.title}\n"] if section.title else []
                parts += blocks
        return "\n".join(parts)


def _section(section: Section, charts: list[Chart]) -> str:
    blocks = "\n".join(_html(block, charts) for block in section.blocks)
    return f"<h2>{escape(section.title)}</h2>\n{blocks}" if section.title else blocks


def _html(block: Block, charts: list[Chart]) -> str:
    match block:
        case Answer(lines, unsure):
            inner = "".join(f"<p>{escape(line)}</p>" for line in lines)
            return f'<div class="answer{" unsure" if unsure else ""}">{inner}</div>'
        case Tiles(tiles):
            inner = "".join(
                f'<div class="tile"><b>{escape(b)}</b><span>{escape(text)}</span></div>' for b, text in tiles
            )
            return f'<div class="tiles">{inner}</div>'
        case Items(lines):
            return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
        case Facts(facts):
            inner = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in facts)
            return f"<dl>\n{inner}</dl>"
        case Picture(svg):
            return f'<figure class="picture">{svg}</figure>'
        case Table():
            return block.to_html()
        case Charts(found):
            return f'<div class="charts">{"".join(_figure(chart, charts) for chart in found)}</div>'


def _figure(chart: Chart, charts: list[Chart]) -> str:
    charts.append(chart)
    label = escape(chart.summary)
    canvas = f'<canvas data-chart="{len(charts) - 1}" role="img" aria-label="{label}"></canvas>'
    return f'<figure><figcaption>{escape(chart.title)}</figcaption><div class="plot">{canvas}</div></figure>'


def _markdown(block: Block) -> str:
    match block:
        case Answer((first, *others), _):
            return "\n>\n".join([f"> **{first}**", *(f"> {line}" for line in others)]) + "\n"
        case Tiles(tiles):
            return "\n".join(f"- **{figure}**: {text}" for figure, text in tiles) + "\n"
        case Items(lines):
            return "\n".join(f"- {line}" for line in lines) + "\n"
        case Facts(facts):
            return "\n".join(f"- {name}: {value}" for name, value in facts) + "\n"
        case Table():
            return block.to_markdown()
        case _:
            return ""


def _scripts(charts: Sequence[Chart]) -> str:
    if not charts:
        return ""
    # "<" can't stand in a script: "</script>" in a name out of a checkpoint would end it
    configs = json.dumps([chart.config() for chart in charts], separators=(",", ":")).replace("<", "\\u003c")
    parts = [f'<script type="application/json" id="charts">{configs}</script>\n']
    for name in LIBRARIES:
        licence = _file(f"vendor/{Path(name).stem}.LICENSE").replace("*/", "* /").replace("</", "< /")
        parts.append(f"<script>/*!\n{licence}*/\n{_file(f'vendor/{name}')}</script>\n")
    return "".join(parts) + f"<script>{_file('page.js')}</script>\n"


def _file(name: str) -> str:
    return (HERE / name).read_text("utf-8")
