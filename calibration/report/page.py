"""The look of a report: one HTML page that needs nothing else: no script, no font, no image, no link to anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6575; --line: #d5dae2; --page: #fff; --card: #f5f7fa;
  --bar: #3a6ea5; --mark: #c2571a; --good: #1b7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --line: #384151; --page: #14181f;
  --card: #1d232d; --bar: #6ba0d8; --mark: #e8935a; --good: #58c48b; --bad: #f2837b; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.sub { color: var(--soft); margin: .2rem 0 1.2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; }
.tile { background: var(--card); border-radius: 8px; padding: .7rem 1rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.verdict { border-left: 4px solid var(--good); padding: .4rem .9rem; margin: 1.2rem 0; background: var(--card); }
.verdict.failed { border-color: var(--bad); } .verdict p { margin: .2rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; background: var(--card); border-radius: 8px; }
.bar { fill: var(--bar); } .line { fill: none; stroke: var(--bar); stroke-width: 2; } .dot { fill: var(--bar); }
.mark { stroke: var(--mark); stroke-width: 2; } .grid { stroke: var(--line); }
.tick { fill: var(--soft); font-size: 12px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page out of sections that are HTML already; empty ones are left out. The title is escaped."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def heading(title: str, below: str) -> str:
    """What the page is about, and a line on it."""
    return f'<h1>{escape(title)}</h1>\n<p class="sub">{escape(below)}</p>'


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """Figures to be seen first, each with what it is."""
    inner = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(text)}</span></div>' for b, text in figures)
    return f'<div class="tiles">{inner}</div>'


def verdict(lines: Iterable[str], *, passed: bool) -> str:
    """What to make of it."""
    inner = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="verdict{"" if passed else " failed"}">{inner}</div>'


def listing(facts: Mapping[str, object]) -> str:
    """Names and values; those without a value are left out."""
    known = {name: value for name, value in facts.items() if value not in (None, "")}
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>\n" for name, value in known.items())
    return f"<dl>\n{items}</dl>"
