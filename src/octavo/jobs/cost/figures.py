"""From runs to figures with intervals: the rate at the SLO, throughputs, latencies, and what they cost.

All figures of a server are computed together from one draw of its runs, so that an interval of a price has in it what
is uncertain of the rate, of the tokens and of the division between prompts and answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from octavo.jobs.cost.loads import SEGMENTS, WARM_UP, Run, Sample, Totals
from octavo.jobs.cost.plan import Settings
from octavo.jobs.cost.prices import ApiPrice, Traffic, break_even, machines_needed, prefill_share, token_prices
from octavo.jobs.cost.search import Outcome, crossing
from octavo.jobs.cost.statistics import DRAWS, Interval, intervals, mean_interval

NEAR = 0.12  # runs whose rate is so close to the SLO's, as a share of it, show the latencies there
PERCENTILES = (50.0, 90.0, 99.0)
SAME_POINT = 0.04  # runs whose rates differ by such a share are one point of a plot
POINT_DRAWS = 40  # for the intervals of a point in a plot


class Question(msgspec.Struct, frozen=True):
    """What is asked of the runs. tokens_per_day: input and output tokens together."""

    settings: Settings
    cost_per_hour: float
    tokens_per_day: float | None = None
    api_prices: tuple[ApiPrice, ...] = ()


class Point(msgspec.Struct, frozen=True):
    """A load and its figures, for tables and plots: output_rate, and ttft_50 to tpot_99."""

    label: str
    kind: str
    load: float  # requests a second, or how many at a time
    num_requests: int
    num_missed: int
    figures: dict[str, Interval]


class Figures(msgspec.Struct, frozen=True):
    """All that was found of a server. limited: False where every rate that was tried keeps the SLO."""

    values: dict[str, Interval]
    points: list[Point]
    saturating: int
    limited: bool
    keeps_slo: bool
    num_requests: int


def figures_of(runs: Sequence[Run], question: Question) -> Figures | None:
    """The figures of a server; None where too little was measured for any: a closed load, and one at a rate."""
    settings = question.settings
    samples = [Sample(run, settings.slo) for run in runs]
    groups = _grouped(samples)
    closed = {name: group for name, group in groups.items() if name.startswith("closed")}
    answered = {name: group for name, group in closed.items() if any(s.totals.answer_tokens for s in group)}
    if not answered or not groups["open"]:
        return None
    saturating = max(answered, key=lambda name: _mean(s.totals.output_tokens for s in answered[name]))
    outcomes = [Outcome(s.load.rate or 0.0, s.num_requests, s.num_missed) for s in groups["open"]]
    rate = crossing(outcomes, settings.percentile)
    allowed = 1 - settings.percentile / 100

    def figures(drawn: Mapping[str, Sequence[Totals]]) -> dict[str, float]:
        return _values(drawn, question, saturating, keeps_slo=rate > 0)

    values = intervals(groups, lambda s: s.totals, Sample.drawn_totals, figures, SEGMENTS)
    if sizes := [run.memory for run in runs if run.memory is not None]:
        values["memory"] = mean_interval(sizes)
    near = [s for s in groups["open"] if s.load.rate and rate and abs(s.load.rate / rate - 1) <= NEAR]
    if near:
        values |= {f"slo_{name}": value for name, value in _latency_intervals({"near": near}).items()}
    return Figures(
        values=values,
        points=_points(groups),
        saturating=int(saturating.split()[1]),
        limited=any(o.num_missed > allowed * o.num_requests for o in outcomes),
        keeps_slo=rate > 0,
        num_requests=sum(s.num_requests for s in samples),
    )


def _grouped(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = {"open": [], "prefill": [], "cached": []}
    for sample in samples:
        kind = sample.load.kind
        groups.setdefault(f"closed {sample.load.concurrency}" if kind == "closed" else kind, []).append(sample)
    return groups


def _values(
    groups: Mapping[str, Sequence[Totals]], question: Question, saturating: str, *, keeps_slo: bool
) -> dict[str, float]:
    """Every figure of a server out of one draw of its runs."""
    inputs, outputs = _tokens(groups[saturating])
    output_rate = _mean(t.output_tokens for t in groups[saturating])
    at_saturation = Traffic(output_rate / outputs if outputs else 0.0, inputs, outputs)
    prefill_rate = _mean(t.input_tokens for t in groups["prefill"])
    cached_rate = _mean(t.input_tokens for t in groups["cached"])
    share = prefill_share(at_saturation, prefill_rate)
    watts = _mean(t.watts for t in groups[saturating])
    ratio = prefill_rate / cached_rate if cached_rate else math.nan
    found = {"prefill_rate": prefill_rate, "cached_rate": cached_rate, "prefill_share": share}
    found |= {"watts": watts, "joules_per_output_token": watts / output_rate if output_rate else 0.0}
    situations = {"saturation": at_saturation}
    if keeps_slo:
        seconds = question.settings.seconds * (1 - WARM_UP)
        outcomes = [Outcome(t.rate, t.requests * seconds, t.missed * seconds) for t in groups["open"]]
        rate = crossing(outcomes, question.settings.percentile) or min(o.rate for o in outcomes)
        situations["slo"] = Traffic(rate, *_tokens(groups["open"]))
    for name, traffic in situations.items():
        if min(traffic) > 0:
            found |= {f"{name}_{key}": value for key, value in _priced(traffic, question, share, ratio).items()}
    return found


def _priced(traffic: Traffic, question: Question, share: float, cached_ratio: float) -> dict[str, float]:
    """Rates, prices, machines and break-even of a traffic that one machine serves."""
    cost = question.cost_per_hour
    prices = token_prices(cost, traffic, share, cached_ratio)
    found = {
        "rate": traffic.rate,
        "output_rate": traffic.rate * traffic.outputs,
        "input_rate": traffic.rate * traffic.inputs,
        "output_rate_per_dollar": traffic.rate * traffic.outputs / cost,
        "usd_input": prices.input,
        "usd_output": prices.output,
        "usd_cached": prices.cached,
        "usd_all_in": prices.all_in,
    }
    if question.tokens_per_day is not None:
        found["machines"] = machines_needed(question.tokens_per_day, traffic)
    for price in question.api_prices:
        found[f"break_even_{price.name}"] = break_even(cost, traffic, price)
        found[f"capacity_share_{price.name}"] = break_even(cost, traffic, price) * machines_needed(1.0, traffic)
    return found


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _tokens(runs: Sequence[Totals]) -> tuple[float, float]:
    """Tokens of a prompt and of an answer, in the mean over the answered requests; 0 without any."""
    answered = sum(run.answered for run in runs)
    if not answered:
        return 0.0, 0.0
    return sum(run.prompt_tokens for run in runs) / answered, sum(run.answer_tokens for run in runs) / answered


def _latency_intervals(groups: Mapping[str, Sequence[Sample]], draws: int = DRAWS) -> dict[str, Interval]:
    """ttft_50 to tpot_99 of the answered requests of all these runs together, in milliseconds."""
    return intervals(groups, lambda s: s.times, Sample.drawn_times, _percentiles, SEGMENTS, draws)


def _percentiles(groups: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in ("ttft", "tpot"):
        times = np.concatenate([run[name] for runs in groups.values() for run in runs])
        if len(times):
            values = np.percentile(times, PERCENTILES)
            found |= {f"{name}_{p:.0f}": float(value) for p, value in zip(PERCENTILES, values, strict=True)}
    return found


def _points(groups: Mapping[str, Sequence[Sample]]) -> list[Point]:
    """A point for the runs at about the same rate, from the lowest up, and one for each concurrency."""
    close: list[list[Sample]] = []
    for sample in sorted(groups["open"], key=lambda sample: sample.load.rate or 0.0):
        if close and (sample.load.rate or 0.0) <= (close[-1][0].load.rate or 0.0) * (1 + SAME_POINT):
            close[-1].append(sample)
        else:
            close.append([sample])
    points = [_point(group, "open", _mean(sample.load.rate or 0.0 for sample in group)) for group in close]
    closed = {int(name.split()[1]): group for name, group in groups.items() if name.startswith("closed")}
    return points + [_point(closed[n], "closed", float(n)) for n in sorted(closed)]


def _point(samples: Sequence[Sample], kind: str, load: float) -> Point:
    """Its intervals are those of the segments: two runs or three at about one rate say nothing of their spread."""
    alone = {str(number): [sample] for number, sample in enumerate(samples)}
    return Point(
        label=f"{load:.3g} requests/s" if kind == "open" else f"{load:.0f} at a time",
        kind=kind,
        load=load,
        num_requests=sum(s.num_requests for s in samples),
        num_missed=sum(s.num_missed for s in samples),
        figures=intervals(alone, lambda s: s.totals, Sample.drawn_totals, _throughput, SEGMENTS, POINT_DRAWS)
        | _latency_intervals(alone, POINT_DRAWS),
    )


def _throughput(groups: Mapping[str, Sequence[Totals]]) -> dict[str, float]:
    return {"output_rate": _mean(run.output_tokens for runs in groups.values() for run in runs)}
