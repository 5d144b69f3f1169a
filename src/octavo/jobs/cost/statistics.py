"""Intervals: where the same measurement, made again, is expected to come out, 19 times of 20.

Runs come in groups: those of one load, and those of the search. Each group by itself is drawn anew with replacement,
its runs and the segments of time within each (a bootstrap in two levels), and every figure is computed from the draw;
the variances that the groups cause are added. The interval is Student's, with Welch's degrees of freedom, since a few
runs say little about their spread; it is symmetric in the logarithm, and wider by sqrt(2), since the second measurement
is as uncertain as the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec
import numpy as np

DRAWS = 120
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 %, 1 to 10 degrees of freedom
NORMAL = 1.96

T = TypeVar("T")
U = TypeVar("U")


class Interval(msgspec.Struct, frozen=True):
    """A figure, and where its like is expected in a second measurement, 19 times of 20."""

    value: float
    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """True where no difference is to be seen."""
        return self.low <= other.high and other.low <= self.high

    def scaled(self, factor: float) -> Interval:
        """The same in another unit."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


def intervals(
    groups: Mapping[str, Sequence[T]],
    whole: Callable[[T], U],
    drawn: Callable[[T, np.random.Generator], U],
    figures: Callable[[Mapping[str, Sequence[U]]], Mapping[str, float]],
    pieces: int,
    draws: int = DRAWS,
) -> dict[str, Interval]:
    """Every figure with its interval; one that is not a finite number above 0 is left out.

    figures are computed from what `whole` makes of each run, or `drawn` of its `pieces` segments, drawn anew.
    """
    rng = np.random.default_rng(0)
    fixed = {name: [whole(run) for run in runs] for name, runs in groups.items()}
    values = {name: value for name, value in figures(fixed).items() if math.isfinite(value) and value > 0}
    variances: dict[str, list[tuple[float, int]]] = {name: [] for name in values}
    for group, runs in groups.items():
        if not runs:
            continue
        found = []
        for _ in range(draws):
            again = [drawn(runs[i], rng) for i in rng.integers(0, len(runs), len(runs))]
            found.append(figures({**fixed, group: again}))
        freedom = (len(runs) if len(runs) > 1 else pieces) - 1
        for name in values:
            logs = [
                math.log(draw[name]) for draw in found if math.isfinite(draw.get(name, 0)) and draw.get(name, 0) > 0
            ]
            if len(logs) > 1:
                variances[name].append((float(np.var(logs)) * (freedom + 1) / freedom, freedom))
    return {name: _student(value, variances[name]) for name, value in values.items()}


def mean_interval(values: Sequence[float], weights: Sequence[float] | None = None) -> Interval:
    """The weighted mean of what was measured in independent pieces, by the same rule."""
    measured = np.asarray(values, dtype=float)
    weighted = np.ones_like(measured) if weights is None else np.asarray(weights, dtype=float)
    mean = float(np.average(measured, weights=weighted))
    count = len(measured)
    if count < 2 or mean <= 0:
        return Interval(mean, mean, mean)
    shares = weighted / weighted.sum()
    variance = float((shares**2 * (measured - mean) ** 2).sum()) * count / (count - 1)
    return _student(mean, [(variance / mean**2, count - 1)])


def _student(value: float, variances: Sequence[tuple[float, int]]) -> Interval:
    """variances of the logarithm, each with its degrees of freedom."""
    total = sum(variance for variance, _ in variances)
    if total <= 0:
        return Interval(value, value, value)
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in variances)
    width = student(freedom) * math.sqrt(2 * total)
    return Interval(value, value * math.exp(-width), value * math.exp(min(width, 50.0)))


def student(freedom: float) -> float:
    """The 97.5th percentile of Student's distribution, of the next smaller whole number of degrees of freedom."""
    degrees = max(1, math.floor(freedom))
    if degrees <= len(STUDENT):
        return STUDENT[degrees - 1]
    return NORMAL + (NORMAL**3 + NORMAL) / (4 * degrees)  # Cornish and Fisher's first term
