"""Figures in words: dollars, rates and times with their intervals, to as many digits as they have."""

from __future__ import annotations

import math
from collections.abc import Mapping

from octavo.jobs.cost.statistics import Interval
from octavo.report.table import Cell

NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "end-to-end"}


def figure(value: float) -> str:
    """Three digits: 0.0312, 4.21, 1,350, 12.3 M."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    for limit, divisor, name in ((1e9, 1e9, " B"), (1e6, 1e6, " M")):
        if value >= limit:
            return f"{value / divisor:.3g}{name}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 8)}f}"


def dollars(value: float) -> str:
    """$0.0312."""
    return f"${figure(value)}"


def between(interval: Interval) -> str:
    """'4.05 to 4.40'."""
    return f"{figure(interval.low)} to {figure(interval.high)}"


def cell(interval: Interval | None, *, money: bool = False, marked: bool = False) -> Cell:
    """A figure above its interval; a dash where there is none."""
    if interval is None:
        return Cell("–")
    text = dollars(interval.value) if money else figure(interval.value)
    return Cell(text, between(interval), marked)


def percent(interval: Interval | None) -> Cell:
    """A share in percent."""
    if interval is None:
        return Cell("–")
    return Cell(f"{interval.value:.1%}", f"{interval.low:.1%} to {interval.high:.1%}")


def whole(interval: Interval | None) -> Cell:
    """Machines: one can't have a part of one; below, how many are busy."""
    if interval is None:
        return Cell("–")
    return Cell(f"{math.ceil(interval.value - 1e-9):,}", f"{between(interval)} busy")


def slo_in_words(slo: Mapping[str, float], percentile: float) -> str:
    """'99 % of the requests within TTFT 500 ms and TPOT 50 ms'."""
    limits = " and ".join(f"{NAMES[name]} {limit:g} ms" for name, limit in slo.items())
    return f"{percentile:g} % of the requests within {limits}"


def duration(seconds: float) -> str:
    """'4 minutes', '1 h 20 min'."""
    minutes = max(1, round(seconds / 60))
    if minutes < 100:
        return f"{minutes} minute{'s' if minutes > 1 else ''}"
    return f"{minutes // 60} h {minutes % 60} min"
