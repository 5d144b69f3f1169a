"""From records to numbers, as pure functions: throughput, latencies, goodput and dollars, by vLLM's definitions.

    TTFT  first token - begin                      TPOT  (last token - first token) / (tokens - 1), tokens > 1
    ITL   one event with tokens - the one before   E2EL  last token - begin

begin is the time at which a request was meant to be sent in an open load, and its sending in a closed one (load.py);
vLLM counts from the sending in both.

Failed requests count as failed and in nothing else; the time they took stays in the duration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from octavo.bench.load import LoadResult, Record

PERCENTILES = (10, 25, 50, 75, 90, 99)  # of vllm bench latency and startup


@dataclass(frozen=True)
class Latencies:
    """Statistics of one latency, in milliseconds; zeros where there are no values. percentiles: {99.0: ms}."""

    mean: float
    median: float
    std: float
    percentiles: Mapping[float, float]


@dataclass(frozen=True)
class Cost:
    """Dollars per million tokens; None without tokens (at_slo: without tokens within the SLO, or without --goodput)."""

    per_1m_output: float | None
    per_1m_total: float | None
    per_1m_output_at_slo: float | None


@dataclass(frozen=True)
class Metrics:
    """The figures of the report. Throughputs are per second; the goodputs are None without an SLO.

    steady_output: of a load with a warm-up, whose last answers overlap the measured time (steady_output_throughput)
    """

    completed: int
    failed: int
    duration: float
    total_input: int
    total_output: int
    cached_input: int | None
    request_throughput: float
    request_goodput: float | None
    output_throughput: float
    output_goodput: float | None
    steady_output: float | None
    total_throughput: float
    max_output_per_s: float
    max_concurrent: int
    latencies: Mapping[str, Latencies]


def measure(result: LoadResult, percentiles: Sequence[float], goodput: Mapping[str, float]) -> Metrics:
    """All numbers of a run. `goodput`: the milliseconds that a good request stays within, of ttft, tpot and e2el."""
    good = [record for record in result.records if record.error is None]
    duration = result.duration
    total_input = sum(record.input_len for record in good)
    total_output = sum(record.output_len for record in good)
    within = [record for record in good if meets(record, goodput)]
    cached = [record.cached_len for record in good if record.cached_len is not None]
    values = {
        "ttft": [record.ttft for record in good],
        "tpot": [tpot(record) for record in good if record.output_len > 1],
        "itl": [gap for record in good for gap in record.itls],
        "e2el": [record.latency for record in good],
    }
    return Metrics(
        completed=len(good),
        failed=len(result.records) - len(good),
        duration=duration,
        total_input=total_input,
        total_output=total_output,
        cached_input=sum(cached) if cached else None,
        request_throughput=len(good) / duration,
        request_goodput=len(within) / duration if goodput else None,
        output_throughput=total_output / duration,
        output_goodput=sum(record.output_len for record in within) / duration if goodput else None,
        steady_output=steady_output_throughput(result) if result.others else None,
        total_throughput=(total_input + total_output) / duration,
        max_output_per_s=peak_output_per_s(good),
        max_concurrent=peak_concurrency(good),
        latencies={name: latencies(seconds, percentiles) for name, seconds in values.items()},
    )


def latencies(seconds: Sequence[float], percentiles: Sequence[float]) -> Latencies:
    """Statistics in milliseconds, percentiles interpolated as numpy does."""
    ms = np.asarray(seconds or [0.0]) * 1e3
    return Latencies(
        mean=float(ms.mean()),
        median=float(np.median(ms)),
        std=float(ms.std()),
        percentiles={p: float(np.percentile(ms, p)) for p in percentiles},
    )


def seconds_percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """{'10': seconds, ...}, as vllm bench latency and startup report them."""
    return dict(zip(map(str, PERCENTILES), np.percentile(seconds, PERCENTILES).tolist(), strict=True))


def tpot(record: Record) -> float:
    """Seconds per token after the first; 0 for an answer of one token."""
    return (record.latency - record.ttft) / (record.output_len - 1) if record.output_len > 1 else 0.0


def meets(record: Record, goodput: Mapping[str, float]) -> bool:
    """True if a request stays within every limit; the limits are milliseconds, inclusive."""
    values = {"ttft": record.ttft, "tpot": tpot(record), "e2el": record.latency}
    return all(values[name] * 1e3 <= limit for name, limit in goodput.items())


def tokens_by_time(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """The time of each event, and its tokens: an event counts as its share of its answer."""
    times = [time for record in records for time in record.token_times]
    shares = [record.output_len / len(record.token_times) for record in records for _ in record.token_times]
    return times, shares


def peak_output_per_s(records: Sequence[Record]) -> float:
    """The most tokens in one second, counted from the first request on."""
    times, shares = tokens_by_time(records)
    if not times:
        return 0.0
    begun = min(record.start for record in records)
    seconds = [math.floor(time - begun) for time in times]
    return float(np.bincount(seconds, weights=shares).max())


def by_segment(times: Sequence[float], tokens: Sequence[float], begin: float, until: float, count: int) -> list[float]:
    """The tokens in each of `count` equal parts of the time between `begin` and `until`."""
    found, _ = np.histogram(times, np.linspace(begin, until, count + 1), weights=tokens)
    return [float(number) for number in found]


def output_by_segment(result: LoadResult, until: float, count: int) -> list[float]:
    """The output tokens of all requests, also those of the warm-up, in each part of the time from the measured begin.

    An event counts as its share of its answer. What failed counts with what had come.
    """
    return by_segment(*tokens_by_time([*result.records, *result.others]), result.begin, until, count)


def steady_output_throughput(result: LoadResult) -> float:
    """Tokens a second that came within the measured time, of all requests: see output_by_segment."""
    seconds = result.until - result.begin
    return output_by_segment(result, result.until, 1)[0] / seconds if seconds > 0 else 0.0


def peak_concurrency(records: Sequence[Record]) -> int:
    """The most requests under way at one time, each from its sending up to, not including, its last token."""
    changes = [(record.start, 1) for record in records] + [(record.end, -1) for record in records]
    now = peak = 0
    for _, change in sorted(changes):  # at one time, ends come before beginnings
        now += change
        peak = max(peak, now)
    return peak


def cost(metrics: Metrics, cost_per_hour: float, num_gpus: int) -> Cost:
    """The price of a million tokens at the measured throughput."""
    slo = metrics.output_goodput
    return Cost(
        per_1m_output=dollars_per_million(cost_per_hour, num_gpus, metrics.output_throughput),
        per_1m_total=dollars_per_million(cost_per_hour, num_gpus, metrics.total_throughput),
        per_1m_output_at_slo=None if slo is None else dollars_per_million(cost_per_hour, num_gpus, slo),
    )


def dollars_per_million(cost_per_hour: float, num_gpus: int, tokens_per_s: float) -> float | None:
    """$/h x GPUs / (tok/s x 3600) x 1e6; None where there are no tokens."""
    return cost_per_hour * num_gpus / (tokens_per_s * 3600) * 1e6 if tokens_per_s > 0 else None
