"""Results of `octavo bench` compared: a ratio to the first one for each figure, its 95 % interval, and a verdict.

A result is a file of --save-result, or of --append-result with a line for each repetition; vLLM's are read too.

    three repetitions or more on both sides   the interval is Welch's t on logarithms: it covers what other repetitions
                                              would give. A bootstrap of so few values would be too narrow
    one run with --save-detailed              a bootstrap: over requests for latencies, over twentieths of the run's
                                              time for throughputs. It doesn't know how much runs differ from each other
    otherwise                                 no interval, and no verdict

"no difference seen" means that the interval has 1 in it: not that there is none. Of twenty figures without a
difference, one seems to have one.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
MIN_REPETITIONS = 3
NEARLY = 0.02
PARTS = 20  # of a run's time
SEED = 0
THROUGHPUTS = {
    "request_throughput": "requests/s",
    "request_goodput": "good requests/s",
    "output_throughput": "output tokens/s",
    "steady_output_throughput": "steady output tokens/s",
    "total_token_throughput": "tokens/s",
}
UNDETAILED = ("request_goodput", "steady_output_throughput")  # whose parts --save-detailed doesn't tell
LATENCIES = ("ttft", "tpot", "itl", "e2el")
DETAILS = ("duration", "input_lens", "output_lens", "ttfts", "itls", "start_times", "errors")
TOTALS = ("num_prompts", "total_input_tokens")  # of SETTINGS, those that differ a little by chance; over a time, a lot
SETTINGS = (
    "request_rate", "burstiness", "max_concurrency", "num_prompts", "total_input_tokens", "backend", "workload",
    "trace", "max_seconds", "warmup_seconds", "latencies_from",
)  # fmt: skip
# Student's t at 97.5 %, for 1 to 30 degrees of freedom
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

Floats = NDArray[np.float64]


class CompareError(ValueError):
    """Files that can't be compared; the message is one line."""


@dataclass(frozen=True)
class Side:
    """One result: its name, and its runs as their files say."""

    name: str
    runs: list[dict[str, Any]]

    def values(self, key: str) -> list[float]:
        """A figure of each run that has it."""
        found = [float(run[key]) for run in self.runs if isinstance(run.get(key), int | float)]
        return [value for value in found if math.isfinite(value)]


@dataclass(frozen=True)
class Comparison:
    """One figure of two results. interval: of the ratio, None where the files don't tell; how: what it was made of."""

    key: str
    base: float
    other: float
    ratio: float
    interval: tuple[float, float] | None
    how: str

    @property
    def verdict(self) -> str:
        """In words; more is better of what is a second's, less of what is milliseconds."""
        if self.interval is None:
            return "no interval: no verdict"
        low, high = self.interval
        if low <= 1 <= high:
            return "no difference seen"
        change = abs(self.ratio - 1) * 100
        return f"{change:.1f} % {'more' if self.ratio > 1 else 'less'}: {'better' if self._better else 'worse'}"

    @property
    def _better(self) -> bool:
        return (self.ratio > 1) == (self.key in THROUGHPUTS)


def read_side(path: Path) -> Side:
    """A result's runs. Raises CompareError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise CompareError(f"{path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise CompareError(f"{path} is not text: {e}") from e
    try:
        content = json.loads(text)
        runs = content if isinstance(content, list) else [content]
    except ValueError:
        try:
            runs = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as e:
            raise CompareError(f"{path} is neither JSON nor JSON lines: {e}") from e
    if not runs or not all(isinstance(run, dict) and "output_throughput" in run for run in runs):
        raise CompareError(f"{path} is no result of octavo bench or vllm bench serve: it has no output_throughput")
    return Side(str(path), runs)


def compare(base: Side, other: Side) -> list[Comparison]:
    """Every figure that both have."""
    return [_compared(key, base, other) for key in _shared_keys(base, other) if not _has_zero(key, base, other)]


def zero_notes(base: Side, other: Side) -> list[str]:
    """Figures that have no ratio, since they are 0 in a run: a goodput of nothing, say."""
    return [
        f"{_label(key)} has no ratio: {', '.join(f'{value:g}' for value in base.values(key))} and "
        f"{', '.join(f'{value:g}' for value in other.values(key))}"
        for key in _shared_keys(base, other)
        if _has_zero(key, base, other) and any((*base.values(key), *other.values(key)))
    ]


def _shared_keys(base: Side, other: Side) -> list[str]:
    return [key for key in [*THROUGHPUTS, *_latency_keys(base)] if base.values(key) and other.values(key)]


def _has_zero(key: str, base: Side, other: Side) -> bool:
    return min(*base.values(key), *other.values(key)) <= 0


def setting_notes(base: Side, other: Side) -> list[str]:
    """Settings in which the loads differ, so that figures may differ for that reason alone."""
    notes = []
    runs = [*base.runs, *other.runs]
    timed = any(run.get("max_seconds") is not None for run in runs)
    for key in SETTINGS:
        if not all(key in run for run in runs) or (timed and key in TOTALS):
            continue  # vLLM's files don't say everything
        ours, theirs = (sorted({json.dumps(run.get(key)) for run in side.runs}) for side in (base, other))
        by_chance = key in TOTALS and _nearly_equal(base.values(key), other.values(key))
        if ours != theirs and not by_chance:
            notes.append(f"{key} differs: {', '.join(ours)} and {', '.join(theirs)}")
    return notes


def repetition_notes(side: Side) -> list[str]:
    """Settings in which one side's own runs differ: lines of several loads in one file, say."""
    notes = []
    for key in SETTINGS:
        found = sorted({json.dumps(run[key]) for run in side.runs if key in run})
        if len(found) > 1 and key not in TOTALS:
            notes.append(f"{key} differs within {side.name}, whose runs are no repetitions then: {', '.join(found)}")
    return notes


def _nearly_equal(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """True of totals whose means differ as little as those of random lengths do."""
    if not ours or not theirs:
        return False
    means = sorted((statistics.fmean(ours), statistics.fmean(theirs)))
    return means[1] - means[0] <= NEARLY * means[1]


def _latency_keys(side: Side) -> list[str]:
    names = "|".join(LATENCIES)
    form = re.compile(rf"(?:mean|median|p[\d.]+)_({names})_ms")
    found = [(match[1], key) for key in side.runs[0] if (match := form.fullmatch(key))]
    return [key for _, key in sorted(found, key=lambda pair: LATENCIES.index(pair[0]))]


def _compared(key: str, base: Side, other: Side) -> Comparison:
    ours = base.values(key)
    theirs = other.values(key)
    before = math.exp(statistics.fmean(map(math.log, ours)))
    after = math.exp(statistics.fmean(map(math.log, theirs)))
    interval: tuple[float, float] | None = None
    how = "one run without --save-detailed"
    if min(len(ours), len(theirs)) >= MIN_REPETITIONS:
        interval = welch(ours, theirs)
        how = f"{len(ours)} and {len(theirs)} runs"
    elif max(len(ours), len(theirs)) > 1:
        how = f"fewer than {MIN_REPETITIONS} runs"
    elif all(name in side.runs[0] for side in (base, other) for name in DETAILS):
        interval = _bootstrapped(key, base.runs[0], other.runs[0])
        how = f"bootstrap over {f'{PARTS} parts of the time' if key in THROUGHPUTS else 'requests'}"
        how = "too little to draw again" if interval is None else how
    return Comparison(key, before, after, after / before, interval, how)


def welch(base: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the ratio of two means of positive values, by Welch's t on their logarithms."""
    ours = [math.log(value) for value in base]
    theirs = [math.log(value) for value in other]
    errors = [statistics.variance(values) / len(values) for values in (ours, theirs)]
    difference = statistics.fmean(theirs) - statistics.fmean(ours)
    spread = sum(errors)
    if spread == 0:
        return math.exp(difference), math.exp(difference)
    freedom = spread**2 / sum(
        error**2 / (len(values) - 1) for error, values in zip(errors, (ours, theirs), strict=True)
    )
    whole = max(int(freedom + 1e-9), 1)  # 6.999999999999999 is 7, rounded
    t = T_975[min(whole, len(T_975)) - 1]
    return math.exp(difference - t * math.sqrt(spread)), math.exp(difference + t * math.sqrt(spread))


def _bootstrapped(key: str, base: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float] | None:
    """The middle 95 % of the ratio of two figures, each of requests (or parts of its time) drawn again."""
    rng = np.random.default_rng(SEED)
    draw = _drawn_throughput if key in THROUGHPUTS else _drawn_latency
    before = draw(key, base, rng)
    after = draw(key, other, rng)
    if before is None or after is None or not (before > 0).all():
        return None
    low, high = np.percentile(after / before, [2.5, 97.5])
    return float(low), float(high)


def _good(run: Mapping[str, Any]) -> list[int]:
    return [i for i, error in enumerate(run["errors"]) if not error]


def _drawn_throughput(key: str, run: Mapping[str, Any], rng: np.random.Generator) -> Floats | None:
    """The throughput of a run whose parts are drawn again."""
    good = _good(run)
    begun = np.asarray([run["start_times"][i] for i in good])
    if key in UNDETAILED or len(good) == 0:
        return None
    ends = begun + np.asarray([run["ttfts"][i] + sum(run["itls"][i]) for i in good])
    if key == "output_throughput":
        times = np.concatenate(
            [begun[j] + run["ttfts"][i] + np.cumsum([0.0, *run["itls"][i]]) for j, i in enumerate(good)]
        )
        weights = np.concatenate(
            [np.full(len(run["itls"][i]) + 1, run["output_lens"][i] / (len(run["itls"][i]) + 1)) for i in good]
        )
    else:
        times = ends
        sizes = [1 if key == "request_throughput" else run["output_lens"][i] + run["input_lens"][i] for i in good]
        weights = np.asarray(sizes, dtype=float)
    parts, _ = np.histogram(times, bins=PARTS, range=(begun.min(), ends.max() + 1e-9), weights=weights)
    return np.asarray(rng.choice(parts, (RESAMPLES, PARTS)).sum(axis=1)) / float(run["duration"])


def _drawn_latency(key: str, run: Mapping[str, Any], rng: np.random.Generator) -> Floats | None:
    """A statistic such as p99_itl_ms over requests that are drawn again, each with all of its values."""
    statistic, name, _ = key.split("_")
    good = _good(run)
    values, owners = _values(name, run, good)
    if len(values) == 0:
        return None
    order = np.argsort(values, kind="stable")
    values, owners = values[order], owners[order]
    shares = np.full(len(good), 1 / len(good))
    of_weights = _statistic(statistic)
    return np.asarray([of_weights(values, rng.multinomial(len(good), shares)[owners]) for _ in range(RESAMPLES)])


def _values(name: str, run: Mapping[str, Any], good: Sequence[int]) -> tuple[Floats, NDArray[np.int64]]:
    """A latency's values and the requests that they are of."""
    if name == "itl":
        values = np.asarray([gap for i in good for gap in run["itls"][i]], dtype=float)
        return values, np.repeat(np.arange(len(good)), [len(run["itls"][i]) for i in good])
    last = [run["ttfts"][i] + sum(run["itls"][i]) for i in good]
    if name == "tpot":
        some = [j for j, i in enumerate(good) if run["output_lens"][i] > 1]
        spans = [(last[j] - run["ttfts"][good[j]]) / (run["output_lens"][good[j]] - 1) for j in some]
        return np.asarray(spans, dtype=float), np.asarray(some, dtype=np.int64)
    found = last if name == "e2el" else [run["ttfts"][i] for i in good]
    return np.asarray(found, dtype=float), np.arange(len(good))


def _statistic(name: str) -> Callable[[Floats, NDArray[np.int64]], float]:
    """A statistic of sorted values with weights."""
    if name == "mean":
        return lambda values, weights: float((values * weights).sum() / max(weights.sum(), 1))
    share = 0.5 if name == "median" else float(name.removeprefix("p")) / 100

    def quantile(values: Floats, weights: NDArray[np.int64]) -> float:
        below = np.cumsum(weights)
        return float(values[min(np.searchsorted(below, share * below[-1]), len(values) - 1)])

    return quantile


def lines(base: Side, other: Side, comparisons: Sequence[Comparison]) -> list[str]:
    """The comparison as text."""
    found = [f"{other.name} against {base.name}"]
    width = max((len(_label(comparison.key)) for comparison in comparisons), default=0)
    for comparison in comparisons:
        interval = "" if comparison.interval is None else "{:.3f} to {:.3f}".format(*comparison.interval)
        found.append(
            f"  {_label(comparison.key):<{width}} {comparison.base:>10.2f} {comparison.other:>10.2f}  "
            f"x {comparison.ratio:<6.3f} {interval:<15}  {comparison.verdict}"
        )
    seen = [comparison for comparison in comparisons if comparison.interval is not None]
    different = [comparison for comparison in seen if comparison.verdict != "no difference seen"]
    if seen and not different:
        found.append(f"  no difference seen in any of the {len(seen)} figures with an interval")
    hows = dict.fromkeys(comparison.how for comparison in comparisons)
    found.append(f"  intervals of 95 %: {'; '.join(hows)}")
    notes = [*zero_notes(base, other), *setting_notes(base, other)]
    notes += [note for side in {base.name: base, other.name: other}.values() for note in repetition_notes(side)]
    return found + [f"  note: {note}" for note in notes]


def _label(key: str) -> str:
    """'p99_ttft_ms' as 'P99 TTFT (ms)'."""
    if key in THROUGHPUTS:
        return THROUGHPUTS[key]
    statistic, name, _ = key.split("_")
    return f"{statistic.capitalize()} {name.upper()} (ms)"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison for a file."""
    low, high = comparison.interval or (None, None)
    return {
        "figure": comparison.key,
        "base": comparison.base,
        "other": comparison.other,
        "ratio": comparison.ratio,
        "ratio_low": low,
        "ratio_high": high,
        "interval_from": comparison.how,
        "verdict": comparison.verdict,
    }
