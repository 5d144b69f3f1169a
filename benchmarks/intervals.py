"""How sure a figure of a few rounds is: what it would be over other rounds like these (bootstrap)."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

RESAMPLES = 2000


def interval(values: Sequence[float], of: Callable[[Sequence[float]], float] = statistics.fmean) -> tuple[float, float]:
    """The middle 95 % of `of` over values that are drawn again, as many as there are."""
    rng = random.Random(0)
    found = sorted(of(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]
