"""What `octavo top` shows: a line over time, a table of engines, a table of latencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import strftime

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from octavo.bench.scrape import LATENCIES, PERCENTILES, Figures, Look, figures
from octavo.quant.printable import printable

HISTORY = 60  # intervals of the line
HEADINGS = ("up", "running", "waiting", "KV\ncache", "output\ntok/s", "prompt\ntok/s", "req/s", "prefix\nhits")
STEPS = "▁▂▃▄▅▆▇█"
NAMES = {"ttft": "first token (TTFT)", "tpot": "per token (TPOT)", "itl": "between two (ITL)"}
UNKNOWN = "-"


@dataclass(frozen=True)
class View:
    """looks: from the oldest to the latest. rates: output tokens a second, one for each interval."""

    url: str
    looks: Sequence[Look]
    rates: Sequence[float]
    trouble: str | None

    def screen(self, interval: float) -> RenderableType:
        """All that stands on the terminal."""
        name = printable(self.looks[-1].model)  # as the server says
        head = Text(f"{name}  {self.url}  {strftime('%H:%M:%S')}, every {interval:g} s; Ctrl-C ends")
        parts: list[RenderableType] = [head]
        if self.trouble is not None:
            parts.append(Text(f"no answer: {printable(self.trouble)}", style="red"))
        if self.rates:
            parts.append(Text(f"output tokens/s, up to {max(self.rates):,.0f}\n{line(self.rates)}"))
        return Group(*parts, self.tables())

    def tables(self) -> RenderableType:
        """The figures of the latest interval, and the latencies of all looks."""
        return Group(self._engines(), self._latencies())

    def _engines(self) -> Table:
        latest = self.looks[-1]
        before = self.looks[-2] if len(self.looks) > 1 else None
        seconds = 0.0 if before is None else latest.time - before.time
        table = _table(f"last\n{seconds:.3g} s" if seconds else "now", HEADINGS)
        rows = [(engine, [engine]) for engine in latest.engines]
        for name, engines in [*rows, ("all", latest.engines)] if len(rows) > 1 else rows:
            table.add_row(Text(printable(name)), *_cells(figures(before, latest, engines), len(engines)))
        return table

    def _latencies(self) -> Table:
        latest = self.looks[-1]
        recent = figures(self.looks[0], latest, latest.engines)
        ever = figures(None, latest, latest.engines)
        seconds = latest.time - self.looks[0].time
        spans = (f"{seconds:.3g} s", "ever")
        table = _table("latency,\nof the last", [f"p{percent},\n{span}" for span in spans for percent in PERCENTILES])
        for key in LATENCIES:
            cells = [duration(span.percentiles[key].get(p)) for span in (recent, ever) for p in PERCENTILES]
            table.add_row(NAMES[key], *cells)
        return table


def _table(first: str, others: Sequence[str]) -> Table:
    """Eighty columns are enough for it."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _cells(found: Figures, num_engines: int) -> list[str]:
    up = found.is_up
    return [
        UNKNOWN if up is None else f"{up:.0f}/{num_engines}",
        _number(found.running),
        _number(found.waiting),
        _share(found.kv_usage),
        _number(found.output_rate),
        _number(found.prompt_rate),
        UNKNOWN if found.request_rate is None else f"{found.request_rate:.1f}",
        _share(found.prefix_hits),
    ]


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0%}"


def duration(seconds: float | None) -> str:
    """In the unit that a person would say it in."""
    if seconds is None:
        return UNKNOWN
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def line(values: Sequence[float]) -> str:
    """A character for each value, the highest as high as the line."""
    top = max(values) or 1.0
    return "".join(STEPS[min(int(value / top * len(STEPS)), len(STEPS) - 1)] for value in values)
