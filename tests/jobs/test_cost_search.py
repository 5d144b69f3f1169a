"""The search for the highest rate within an SLO, against a queue whose law is known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat

import numpy as np
import pytest
from queueing import highest_rate, waits

from octavo.jobs.cost.search import Outcome, crossing, find_rate

Measure = Callable[[float], Outcome]


def queue(service: float, limit: float, requests: int, seed: int) -> tuple[list[float], Measure]:
    """The rates that were measured, and a measurement of an M/D/1 queue in virtual time."""
    rng = np.random.default_rng(seed)
    asked: list[float] = []

    def measure(rate: float) -> Outcome:
        asked.append(rate)
        gaps = rng.exponential(1 / rate, requests)
        latency = waits(gaps, np.full(len(gaps), service)) + service
        counted = latency[len(latency) // 10 :]
        return Outcome(rate, len(counted), int((counted > limit).sum()))

    return asked, measure


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("service", "limit", "percentile"), [(0.1, 0.5, 99.0), (0.1, 0.15, 99.0), (0.02, 0.5, 99.0), (0.1, 0.3, 90.0)]
)
def test_rate_is_within_5_percent_of_the_analytic_one(
    service: float, limit: float, percentile: float, seed: int
) -> None:
    """From a start that is far too high, and from one that is far too low."""
    exact = highest_rate(service, limit, percentile)
    for start in (3 / service, 0.05 / service):
        asked, measure = queue(service, limit, 40_000, seed)
        search = find_rate(measure, start, percentile, rounds=3)
        assert search.rate == pytest.approx(exact, rel=0.05)
        assert search.limited
        assert [outcome.rate for outcome in search.outcomes] == asked


def test_analytic_law_is_that_of_the_queue() -> None:
    """The closed form against a long simulation: it is what the other test's truth is made of."""
    rng = np.random.default_rng(5)
    rate = highest_rate(0.1, 0.5, 99.0)
    gaps = rng.exponential(1 / rate, 2_000_000)
    late = waits(gaps, np.full(len(gaps), 0.1)) + 0.1 > 0.5
    assert late.mean() == pytest.approx(0.01, rel=0.1)


def test_no_rate_keeps_a_limit_below_the_service_itself() -> None:
    asked, measure = queue(0.1, 0.09, 200, 0)
    search = find_rate(measure, 10.0, 99.0, rounds=3)
    assert (search.rate, search.limited) == (0.0, True)
    assert min(asked) == pytest.approx(10 / 2**10)


def test_limit_that_is_never_reached_is_said() -> None:
    search = find_rate(lambda rate: Outcome(rate, 100, 0), 1.0, 99.0, rounds=3)
    assert (search.rate, search.limited) == (1024.0, False)


def test_measurements_that_contradict_each_other_are_pooled() -> None:
    """One lucky run at a high rate doesn't move the answer above the runs around it."""
    bad = [Outcome(rate, 1000, missed) for rate, missed in ((8.0, 2), (9.0, 4), (10.0, 60), (11.0, 80))]
    lucky = [*bad, Outcome(10.5, 100, 0)]
    assert 9.0 < crossing(bad, 99.0) < 10.0
    assert 9.0 < crossing(lucky, 99.0) < 10.1
    assert crossing([Outcome(8.0, 100, 90)], 99.0) == 0.0
    assert crossing([Outcome(8.0, 0, 0)], 99.0) == 8.0
    assert crossing([Outcome(8.0, 1000, 0), Outcome(9.0, 1000, 0)], 99.0) == 9.0


def test_rates_below_those_that_kept_the_slo_by_chance_are_tried() -> None:
    """At 4 a second none missed the SLO at first, and a tenth just below: a lower rate keeps it."""
    missed = chain([0], repeat(2))

    def measure(rate: float) -> Outcome:
        if rate > 4.2:
            return Outcome(rate, 40, 20)
        return Outcome(rate, 20, next(missed) if rate > 3 else 0)

    search = find_rate(measure, 4.0, 99.0, rounds=1)
    assert 2 < search.rate < 3.7
