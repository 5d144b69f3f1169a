"""The plots of the cost report, as charts out of a server's points and runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from octavo.jobs.cost.choice import pareto_front, price
from octavo.jobs.cost.figures import NEAR, Point
from octavo.jobs.cost.plan import Settings
from octavo.jobs.cost.state import ServerState
from octavo.jobs.cost.statistics import Interval
from octavo.jobs.cost.wording import NAMES
from octavo.report.chart import Bounds, Chart, ChartPoint, Series

STEPS = 40  # of a distribution's curve
SHOWN_MISSES = 0.5  # a load that misses the SLO more often is far beyond: the plots end there


def charts(servers: Sequence[ServerState], settings: Settings) -> tuple[Chart, ...]:
    """Quality against cost, latencies against load, throughput, and latencies at the SLO."""
    found = [_pareto(servers)]
    found += [_latency(servers, settings, name) for name in ("ttft", "tpot")]
    found.append(_closed(servers))
    found += [_distribution(servers, settings, name) for name in ("ttft", "tpot")]
    return tuple(chart for chart in found if chart is not None)


def _pareto(servers: Sequence[ServerState]) -> Chart | None:
    rows: list[tuple[int, ServerState, Interval, Interval]] = []
    for number, server in enumerate(servers):
        cost = price(server)
        kl = server.quality.kl if server.quality is not None else None
        if cost is not None and kl is not None:
            rows.append((number, server, cost, kl))
    if len(rows) < 2:
        return None
    series = [
        Series(server.label, [ChartPoint(cost.value, kl.value, _bounds(kl), _bounds(cost))], number, line=False)
        for number, server, cost, kl in rows
    ]
    front = [rows[i] for i in pareto_front([(row[2].value, row[3].value) for row in rows])]
    if len(front) > 1:
        points = [ChartPoint(cost.value, kl.value) for _, _, cost, kl in front]
        series.append(Series("nothing is cheaper and better", points, 5, dashed=True))
    names = ", ".join(row[1].label for row in front)
    return Chart(
        "Quality against cost, at the SLO",
        "$ per 1M output tokens, all in",
        "mean KL to the first model, nats",
        series,
        f"Mean KL divergence against dollars per million output tokens. On the Pareto front: {names}.",
    )


def _latency(servers: Sequence[ServerState], settings: Settings, name: str) -> Chart | None:
    series = []
    for number, server in enumerate(servers):
        points = _loads(server, "open")
        for percentile, dashed in ((50, True), (99, False)):
            key = f"{name}_{percentile}"
            shown = [
                ChartPoint(point.load, found.value, _bounds(found))
                for point in points
                if (found := point.figures.get(key)) is not None
            ]
            series.append(Series(f"{server.label} p{percentile}", shown, number, dashed=dashed))
    if not any(s.points for s in series):
        return None
    limit = settings.slo.get(name)
    return Chart(
        f"{NAMES[name]} against load, requests at random times",
        "requests per second",
        f"{NAMES[name]}, ms",
        series,
        f"Median and 99th percentile of {NAMES[name]} for each model, against requests per second.",
        y_logarithmic=True,
        limit=None if limit is None else (limit, f"the SLO, {limit:g} ms"),
    )


def _closed(servers: Sequence[ServerState]) -> Chart | None:
    series = []
    for number, server in enumerate(servers):
        points = [
            ChartPoint(point.load, rate.value, _bounds(rate))
            for point in _loads(server, "closed")
            if (rate := point.figures.get("output_rate")) is not None
        ]
        series.append(Series(server.label, points, number))
    if not any(s.points for s in series):
        return None
    return Chart(
        "Throughput against concurrency",
        "requests at a time",
        "output tokens per second",
        series,
        "Output tokens per second against the number of requests at a time, for each model.",
        x_logarithmic=True,
    )


def _distribution(servers: Sequence[ServerState], settings: Settings, name: str) -> Chart | None:
    series = []
    for number, server in enumerate(servers):
        rate = server.values.get("slo_rate")
        if rate is None:
            continue
        times = [
            time
            for run in server.runs
            if run.load.rate is not None and abs(run.load.rate / rate.value - 1) <= NEAR
            for time in getattr(run.answers, name)
        ]
        if times:
            shares = np.linspace(0, 100, STEPS)
            points = [ChartPoint(float(x), float(p)) for x, p in zip(np.percentile(times, shares), shares, strict=True)]
            series.append(Series(server.label, points, number, markers=False))
    if not series:
        return None
    limit = settings.slo.get(name)
    within = f"; the SLO is {limit:g} ms" if limit is not None else ""
    return Chart(
        f"Distribution of {NAMES[name]} at the SLO",
        f"{NAMES[name]}, ms{within}",
        "% of the requests up to there",
        series,
        f"Cumulative distribution of {NAMES[name]} for each model at its rate at the SLO.",
    )


def _loads(server: ServerState, kind: str) -> list[Point]:
    points = server.figures.points if server.figures is not None else []
    return [p for p in points if p.kind == kind and (kind == "closed" or p.num_missed <= SHOWN_MISSES * p.num_requests)]


def _bounds(interval: Interval) -> Bounds | None:
    return (interval.low, interval.high) if interval.high > interval.low else None
