"""What a server tells of itself at /metrics, under vLLM's names, and what happened between two looks at it.

octavo and vLLM have these names, and so has what passes theirs on. Figures are by engine, summed over all other labels.
A counter that has fallen was begun anew, as its server was, and counts from 0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

LATENCIES = {
    "ttft": "vllm:time_to_first_token_seconds",
    "tpot": "vllm:request_time_per_output_token_seconds",
    "itl": "vllm:inter_token_latency_seconds",
}
PERCENTILES = (50, 90, 99)
GENERATED = "vllm:generation_tokens_total"

Buckets = Mapping[float, float]  # how many were at most so long, by seconds


class ScrapeError(ValueError):
    """A page without the figures that are looked for; the message is one line."""


@dataclass(frozen=True)
class Look:
    """A page of /metrics at a time. values and buckets: by engine, then by name."""

    time: float
    model: str
    values: Mapping[str, Mapping[str, float]]
    buckets: Mapping[str, Mapping[str, Buckets]]

    @property
    def engines(self) -> list[str]:
        """Their labels, in order."""
        return sorted(self.values, key=lambda label: (len(label), label))


@dataclass(frozen=True)
class Figures:
    """Of one engine or several, between two looks. None: the server doesn't say, or nothing has happened.

    Rates are a second's. kv_usage and prefix_hits are shares from 0 to 1, the latter of the prompt tokens looked up.
    is_up: how many of the engines can answer. percentiles: in seconds, by the keys of LATENCIES and by PERCENTILES.
    """

    running: float | None
    waiting: float | None
    kv_usage: float | None
    output_rate: float | None
    prompt_rate: float | None
    request_rate: float | None
    prefix_hits: float | None
    is_up: float | None
    percentiles: Mapping[str, Mapping[int, float]]


def read_page(text: str, time: float) -> Look:
    """Read what a server has sent. Raises ScrapeError for what has none of vLLM's names."""
    values: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    buckets: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
    wanted = {f"{name}_bucket": key for key, name in LATENCIES.items()}
    models: set[str] = set()
    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except ValueError as error:
        raise ScrapeError(f"the page can't be read as Prometheus's: {error}") from error
    for sample in samples:
        if not sample.name.startswith(("vllm:", "octavo:")) or "engine" not in sample.labels:
            continue
        engine = sample.labels["engine"]
        models |= {sample.labels["model_name"]} if "model_name" in sample.labels else set()
        if sample.name in wanted:
            buckets[engine][wanted[sample.name]][_bound(sample.name, sample.labels)] += sample.value
        else:
            values[engine][sample.name] += sample.value
    if not any(GENERATED in named for named in values.values()):
        raise ScrapeError(f"the page has no {GENERATED}: vLLM's names are read, which vLLM and octavo have")
    return Look(time, ", ".join(sorted(models)), values, buckets)


def _bound(name: str, labels: Mapping[str, str]) -> float:
    try:
        return float(labels["le"])
    except (KeyError, ValueError) as error:
        raise ScrapeError(f"a line of {name} has no number under the label le") from error


def figures(before: Look | None, after: Look, engines: Iterable[str]) -> Figures:
    """Of these engines together, since `before`. None is the beginning of the server, since when no rate is known."""
    chosen = list(engines)
    seconds = None if before is None else after.time - before.time

    def now(name: str) -> float | None:
        found = [after.values[engine][name] for engine in chosen if name in after.values.get(engine, {})]
        return sum(found) if found else None

    def grown(name: str) -> float | None:
        found = [_growth(_value(before, engine, name), _value(after, engine, name)) for engine in chosen]
        known = [growth for growth in found if growth is not None]
        return sum(known) if known else None

    def rate(name: str) -> float | None:
        growth = grown(name)
        return growth / seconds if seconds and growth is not None else None

    usage = now("vllm:kv_cache_usage_perc")
    looked_up = grown("vllm:prefix_cache_queries_total")
    found = grown("vllm:prefix_cache_hits_total")
    return Figures(
        running=now("vllm:num_requests_running"),
        waiting=now("vllm:num_requests_waiting"),
        kv_usage=None if usage is None else usage / len(chosen),
        output_rate=rate(GENERATED),
        prompt_rate=rate("vllm:prompt_tokens_total"),
        request_rate=rate("vllm:request_success_total"),
        prefix_hits=found / looked_up if looked_up and found is not None else None,
        is_up=now("octavo:engine_up"),
        percentiles={key: _percentiles(before, after, chosen, key) for key in LATENCIES},
    )


def _value(look: Look | None, engine: str, name: str) -> float | None:
    return 0.0 if look is None else look.values.get(engine, {}).get(name)


def _growth(before: float | None, after: float | None) -> float | None:
    if after is None:
        return None
    return after if before is None or after < before else after - before


def _percentiles(before: Look | None, after: Look, engines: Iterable[str], key: str) -> dict[int, float]:
    counts: dict[float, float] = defaultdict(float)
    for engine in engines:
        new = after.buckets.get(engine, {}).get(key, {})
        old: Buckets = {} if before is None else before.buckets.get(engine, {}).get(key, {})
        if any(new[bound] < old.get(bound, 0.0) for bound in new):
            old = {}
        for bound, count in new.items():
            counts[bound] += count - old.get(bound, 0.0)
    found = {percent: percentile(counts, percent / 100) for percent in PERCENTILES}
    return {percent: value for percent, value in found.items() if value is not None}


def percentile(counts: Buckets, share: float) -> float | None:
    """As Prometheus's histogram_quantile: evenly spread within a bucket; beyond the last bound, that bound."""
    bounds = sorted(counts)
    if not bounds or counts[bounds[-1]] <= 0:
        return None
    rank = share * counts[bounds[-1]]
    low = 0.0
    below = 0.0
    for bound in bounds:
        if counts[bound] >= rank:
            if math.isinf(bound):
                return low
            inside = counts[bound] - below
            return low + (bound - low) * ((rank - below) / inside if inside else 0.0)
        low = bound
        below = counts[bound]
    return low
