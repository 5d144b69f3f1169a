"""When requests are meant to be sent: seconds after the start of a load, drawn before it starts.

Gaps come from a gamma distribution, as in `vllm bench serve`: a shape (burstiness) of 1 makes a Poisson process, less
makes bursts, more makes even gaps. A ramp changes the rate from request to request, by vLLM's two rules.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal


@dataclass(frozen=True)
class Ramp:
    """A rate that changes from `start` to `end` requests a second over the requests of a load."""

    strategy: Literal["linear", "exponential"]
    start: float
    end: float

    def rate_at(self, index: int, count: int) -> float:
        """The rate before request `index` of `count`."""
        progress = index / max(count - 1, 1)
        if self.strategy == "linear":
            return self.start + (self.end - self.start) * progress
        ratio: float = (self.end / self.start) ** progress
        return self.start * ratio


def arrival_times(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Seconds after the start at which to send each request: gaps from a gamma distribution, exponential at 1.

    They are stretched to end at count / rate exactly, as vLLM does, so that seeds differ in the order of gaps only.
    """
    if rate == math.inf:
        return [0.0] * count
    times = list(accumulate(_gap(rate, burstiness, rng) for _ in range(count)))
    if not times or times[-1] == 0:  # a burstiness near 0 makes gaps that are too short for a float
        return times
    return [time * (count / rate) / times[-1] for time in times]


def ramped_times(count: int, ramp: Ramp, burstiness: float, rng: random.Random) -> list[float]:
    """The same for a rate that changes; its times are not stretched, as in vLLM."""
    return list(accumulate(_gap(ramp.rate_at(i, count), burstiness, rng) for i in range(count)))


def times_within(seconds: float, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """The arrivals of a process at `rate` in the first `seconds`: their number is random, as a process's is."""
    times: list[float] = []
    now = _gap(rate, burstiness, rng)
    while now < seconds:
        times.append(now)
        now += _gap(rate, burstiness, rng)
    return times


def _gap(rate: float, burstiness: float, rng: random.Random) -> float:
    return 1 / rate if burstiness == math.inf else rng.gammavariate(burstiness, 1 / (rate * burstiness))
