"""Distributions of lengths in tokens: a table of percentiles out of a published trace, or a log-normal one.

Each has `mean` and `draw(rng)`; a drawn length is a whole number from 1 up.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from dataclasses import dataclass

# The percentiles of the tables below: closer together where lengths grow fast.
PERCENTILES = (0, 1, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90, 95, 98, 99, 99.5, 99.9, 100)


@dataclass(frozen=True)
class Table:
    """The lengths at PERCENTILES; straight lines between them."""

    lengths: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the table: some 1 % off the trace's own, which it simplifies."""
        steps = zip(PERCENTILES, PERCENTILES[1:], self.lengths, self.lengths[1:], strict=False)
        return sum((b - a) / 100 * (low + high) / 2 for a, b, low, high in steps)

    def draw(self, rng: random.Random) -> int:
        """One length."""
        percentile = rng.random() * 100
        i = bisect_right(PERCENTILES, percentile) - 1
        share = (percentile - PERCENTILES[i]) / (PERCENTILES[i + 1] - PERCENTILES[i])
        return _whole(self.lengths[i] + share * (self.lengths[i + 1] - self.lengths[i]))

    def scaled(self, factor: float) -> Table:
        """The same distribution of lengths times `factor`."""
        return Table(tuple(length * factor for length in self.lengths))


@dataclass(frozen=True)
class LogNormal:
    """A log-normal distribution: its mean, and the standard deviation of its logarithm, of which 0 means one length."""

    mean: float
    sigma: float = 0.0

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return _whole(rng.lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma))

    def scaled(self, factor: float) -> LogNormal:
        """The same distribution of lengths times `factor`."""
        return LogNormal(self.mean * factor, self.sigma)


Lengths = Table | LogNormal


def _whole(length: float) -> int:
    return max(1, round(length))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split())


# Azure LLM inference trace 2023: 19,366 requests to a conversation service and 8,819 to a coding one in an hour of
# November 2023 (github.com/Azure/AzurePublicDataset, CC BY 4.0; Patel et al., Splitwise, ISCA 2024).
AZURE_CHAT_ANSWERS = Table(
    _numbers("7 16 41 54 67 77 85 91 96 103 113 129 151 177 217 384 395 400 411 424 451 540 601 643 954 1000")
)
AZURE_CODE_PROMPTS = Table(
    _numbers(
        "3 17 75 147 232 386 578 770 939 1075 1261 1469 1690 1909 2164 2433 2744 3192 3920 5188 7303 7436 7436 7436 "
        "7437 7437"
    )
)
AZURE_CODE_ANSWERS = Table(_numbers("6 6 6 7 7 8 9 9 10 11 12 13 14 16 18 20 24 29 39 55 90 171 251 359 825 1899"))
