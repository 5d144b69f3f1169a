"""A page of charts of one load: when its requests ran, how long they took, and what the server did over time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from octavo.bench.load import LoadResult, Record
from octavo.bench.metrics import Metrics, tokens_by_time, tpot
from octavo.bench.report import notes
from octavo.report.chart import Chart, ChartPoint, Series
from octavo.report.page import Charts, Items, Page, Section, Tiles

MAX_REQUESTS = 1000  # in a chart with a point for each
MAX_BARS = 200  # of the timeline
CURVE_POINTS = 50


def page(title: str, asked: str, result: LoadResult, metrics: Metrics, thresholds: tuple[float, float]) -> Page:
    """The page. asked: what the load was, in words; thresholds: gaps between tokens, in ms, that color the timeline."""
    good = [record for record in result.records if record.error is None and record.token_times]
    over_time = (_timeline(good, result.begin, thresholds), _latencies_over_time(good, result.begin))
    others = (_distribution(good), *_over_time(good, result.begin), _lengths(good))
    tiles = (
        (f"{metrics.completed:,}", f"requests answered, {metrics.failed:,} failed"),
        (f"{metrics.output_throughput:,.1f}", "output tokens/s"),
        (f"{metrics.latencies['ttft'].median:,.0f} ms", "TTFT, median"),
        (f"{metrics.latencies['tpot'].median:,.1f} ms", "TPOT, median"),
    )
    sections = (
        Section("", (Tiles(tiles), Items((asked, *notes(result))))),
        Section("Over time", (Charts(over_time),)),
        Section("Distributions and load", (Charts(others),)),
    )
    return Page(title, f"{metrics.duration:,.1f} s of octavo bench", sections)


def _timeline(records: Sequence[Record], begin: float, thresholds: tuple[float, float]) -> Chart:
    """A bar for each request, from its beginning to its last token, with a mark at the first."""
    low, high = thresholds
    groups: tuple[list[ChartPoint], ...] = ([], [], [])
    for number, record in enumerate(sorted(records, key=lambda record: record.begin)[:MAX_BARS]):
        slowest = max(record.itls, default=0.0) * 1e3
        group = 0 if slowest < low else 1 if slowest < high else 2
        span = (record.begin - begin, record.end - begin)
        label = f"TTFT {record.ttft * 1e3:.0f} ms, longest gap {slowest:.0f} ms"
        groups[group].append(ChartPoint(record.token_times[0] - begin, number, x_bounds=span, label=label))
    names = (f"longest gap under {low:g} ms", f"{low:g} to {high:g} ms", f"{high:g} ms and more")
    shown = min(len(records), MAX_BARS)
    return Chart(
        "Requests: a bar from begin to end, a mark at the first token"
        + ("" if shown == len(records) else f" (the first {shown})"),
        "seconds",
        "request",
        [Series(name, points, i, line=False) for i, (name, points) in enumerate(zip(names, groups, strict=True))],
        f"{shown} of {len(records)} requests as bars over time",
    )


def _latencies_over_time(records: Sequence[Record], begin: float) -> Chart:
    chosen = _thinned(records)
    ttfts = [ChartPoint(record.begin - begin, record.ttft * 1e3) for record in chosen]
    e2els = [ChartPoint(record.begin - begin, record.latency * 1e3) for record in chosen]
    return Chart(
        "Latency of each request by when it began",
        "seconds",
        "ms",
        [Series("TTFT", ttfts, 0, line=False), Series("E2EL", e2els, 1, line=False)],
        "TTFT and end-to-end latency of requests over time",
        y_logarithmic=True,
    )


def _distribution(records: Sequence[Record]) -> Chart:
    """How many of the values are at most as large."""
    values = {
        "TTFT": [record.ttft for record in records],
        "TPOT": [tpot(record) for record in records if record.output_len > 1],
        "ITL": [gap for record in records for gap in record.itls],
    }
    series = []
    for color, (name, seconds) in enumerate(values.items()):
        shares = np.linspace(0, 100, CURVE_POINTS)
        found = np.percentile(np.asarray(seconds) * 1e3, shares) if seconds else np.zeros(0)
        points = [ChartPoint(float(x), float(y)) for x, y in zip(found, shares, strict=False) if x > 0]
        series.append(Series(name, points, color))
    return Chart(
        "Share of values that are at most so long",
        "ms",
        "%",
        series,
        "cumulative distributions of TTFT, TPOT and ITL",
        x_logarithmic=True,
    )


def _over_time(records: Sequence[Record], begin: float) -> tuple[Chart, Chart]:
    """Tokens a second, and requests under way."""
    end = max((record.end for record in records), default=begin)
    width = max((end - begin) / CURVE_POINTS, min(1.0, (end - begin) / 10)) or 1.0
    edges = np.arange(0, max(end - begin, width) + width, width)
    times, shares = tokens_by_time(records)
    tokens, _ = np.histogram(np.asarray(times) - begin, bins=edges, weights=shares)
    middles = (edges[:-1] + edges[1:]) / 2
    running = [sum(record.start - begin <= at < record.end - begin for record in records) for at in middles]
    rate = [ChartPoint(float(at), float(count) / width) for at, count in zip(middles, tokens, strict=True)]
    under_way = [ChartPoint(float(at), float(count)) for at, count in zip(middles, running, strict=True)]
    return (
        Chart(
            "Output tokens a second",
            "seconds",
            "tokens/s",
            [Series("output tokens/s", rate, 0)],
            "output tokens a second over time",
        ),
        Chart(
            "Requests under way",
            "seconds",
            "requests",
            [Series("requests under way", under_way, 1)],
            "requests under way over time",
        ),
    )


def _lengths(records: Sequence[Record]) -> Chart:
    chosen = _thinned(records)
    points = [ChartPoint(float(record.input_len), float(record.output_len)) for record in chosen]
    return Chart(
        "Tokens of prompts and answers",
        "prompt tokens",
        "answer tokens",
        [Series("requests", points, 0, line=False)],
        "lengths of prompts and answers",
    )


def _thinned(records: Sequence[Record]) -> Sequence[Record]:
    """Every so many-th of the requests, so that a chart stays readable."""
    return records[:: max(1, math.ceil(len(records) / MAX_REQUESTS))]
