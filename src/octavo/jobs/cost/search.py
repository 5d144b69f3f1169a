"""The search for the highest rate of requests that keeps an SLO: a rule over `measure`, which knows no server.

A measurement is noisy, and what it says near the limit is a coin's toss. So a bisection finds the neighborhood, then
each round measures around the present estimate, which is made of all measurements together: `crossing`. Shares of
requests are compared, not percentiles of latencies: a percentile of a few hundred requests that wait for each other is
too low in most runs, while the share that missed the SLO is right in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

AROUND = (0.9, 0.95, 1.0, 1.05)  # of the estimate: what a round measures
STEPS = 10  # doublings, or halvings, before the search ends without a limit, or without a rate
TOLERANCE = 1.12  # the bisection ends when its bounds are so close


class Outcome(NamedTuple):
    """A measurement: requests a second, how many there were, and how many of them missed a limit of the SLO."""

    rate: float
    num_requests: float
    num_missed: float


class Search(NamedTuple):
    """rate: the highest that keeps the SLO; 0 where none does. limited: False if every rate that was tried keeps it."""

    rate: float
    limited: bool
    outcomes: list[Outcome]


def find_rate(measure: Callable[[float], Outcome], start: float, percentile: float, rounds: int) -> Search:
    """Bisect from `start` requests a second, about what the server can do, then refine in `rounds` rounds.

    A rate keeps the SLO if `percentile` percent of its requests do.
    """
    outcomes: list[Outcome] = []

    def keeps(rate: float) -> bool:
        outcomes.append(measure(rate))
        return outcomes[-1].num_missed <= outcomes[-1].num_requests * (1 - percentile / 100)

    low, high = _bracket(keeps, start)
    if low == 0.0 or math.isinf(high):
        return Search(low, low == 0.0, outcomes)
    while high / low > TOLERANCE:
        middle = math.sqrt(low * high)
        if keeps(middle):
            low = middle
        else:
            high = middle
    for _ in range(rounds):
        found = crossing(outcomes, percentile) or low
        for factor in AROUND:
            keeps(found * factor)
    for _ in range(STEPS):
        if crossing(outcomes, percentile):
            break
        keeps(min(outcome.rate for outcome in outcomes) / math.sqrt(2))  # what kept the SLO did so by chance
    return Search(crossing(outcomes, percentile), True, outcomes)


def _bracket(keeps: Callable[[float], bool], start: float) -> tuple[float, float]:
    """A rate that keeps the SLO and a higher one that doesn't; 0 or infinity where there is none."""
    if keeps(start):
        for low in (start * 2**step for step in range(STEPS)):
            if not keeps(low * 2):
                return low, low * 2
        return start * 2**STEPS, math.inf
    for high in (start / 2**step for step in range(STEPS)):
        if keeps(high / 2):
            return high / 2, high
    return 0.0, start / 2**STEPS


def crossing(outcomes: Sequence[Outcome], percentile: float) -> float:
    """The rate at which as many requests miss the SLO as may, out of all measurements; 0 where more do at each one.

    The share that misses can but grow with the rate, so measurements that contradict each other are pooled (isotonic
    regression by pool-adjacent-violators). Between two pools it is a straight line in logarithms. Where no measurement
    has too many, it is the highest rate that was tried.
    """
    allowed = 1 - percentile / 100
    pools: list[tuple[float, float, float]] = []  # requests, requests * log rate, requests that missed
    for rate, num_requests, num_missed in sorted(outcomes):
        pools.append((num_requests, num_requests * math.log(rate), num_missed))
        while len(pools) > 1 and pools[-2][2] * pools[-1][0] >= pools[-1][2] * pools[-2][0]:
            last = pools.pop()
            before = pools.pop()
            pools.append((before[0] + last[0], before[1] + last[1], before[2] + last[2]))
    pools = [pool for pool in pools if pool[0] > 0]
    # a share of nothing has no logarithm: half a request more, or a quarter of what may miss
    over = [math.log((missed + min(0.5, count * allowed / 4)) / (count * allowed)) for count, _, missed in pools]
    over = list(accumulate(over, max))
    if not over or over[-1] <= 0:
        return max(outcome.rate for outcome in outcomes)
    if over[0] > 0:
        return 0.0
    return float(np.exp(np.interp(0.0, over, [log_rate / count for count, log_rate, _ in pools])))
