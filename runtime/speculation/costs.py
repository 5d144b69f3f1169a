"""What a token more costs in a step, as measured, and how many drafts pay."""

from __future__ import annotations

from bisect import insort
from collections import defaultdict, deque
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.runtime.scheduling.plan import StepPlan

NUM_KEPT = 9  # last steps of a size, of which the median counts: a step that something else held up changes nothing
NUM_BELIEVED = 2  # steps of a size, before which it is only guessed what they take
SHARE = 0.06  # of a step's time without its tokens, that each token adds where nothing is known: bf16's on two cores
GAIN = 1.02  # tokens a second that drafts must promise, over none: estimates are no better
PROBE = 100  # of so many choices one is made against the estimates, to see whether they still hold
MOST_FOR_PROBE = 1.5  # times what a step without drafts takes, as far as it is guessed


class StepCosts:
    """Seconds of decode steps by their tokens, drafts among them: medians of what was measured last."""

    def __init__(self) -> None:
        self._last: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=NUM_KEPT))
        self._sizes: list[int] = []  # that are believed, ascending
        self._seconds: dict[int, float] = {}
        self._num_observed = 0
        self._when: dict[int, int] = {}  # of each size, what had been observed when it was last
        self._num_choices = 0

    @property
    def is_known(self) -> bool:
        """Whether any size is believed: what others take is guessed in seconds then, and in no unit before."""
        return bool(self._sizes)

    def take(self, plan: StepPlan, seconds: float) -> None:
        """A step has been computed; one with a chunk of a prompt tells nothing here."""
        if all(it.wants == "token" and it.end - it.start == 1 + it.num_drafts for it in plan.scheduled):
            self.observe(plan.num_tokens, seconds)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A decode step of so many tokens took so long."""
        self._num_observed += 1
        self._when[num_tokens] = self._num_observed
        last = self._last[num_tokens]
        last.append(seconds)
        if len(last) < NUM_BELIEVED:
            return
        if num_tokens not in self._seconds:
            insort(self._sizes, num_tokens)
        self._seconds[num_tokens] = sorted(last)[(len(last) - 1) // 2]

    def seconds(self, sizes: Rows[int]) -> NDArray[np.float64]:
        """Of steps of so many tokens, ascending. Sizes that were not measured are guessed from those next to them.

        A smaller step is never taken to cost more than a larger one.
        """
        factors = [self._seconds[size] / _guessed(size) for size in self._sizes]
        found = np.interp(sizes, self._sizes or [1], factors or [1.0]) * _guessed(np.asarray(sizes))
        falling: NDArray[np.float64] = np.minimum.accumulate(found[::-1])
        return falling[::-1]

    def choose(self, chances: Rows[Rows[float]], num_sequences: int) -> list[int]:
        """How many of each sequence's first drafts to check, in a step that is to bring num_sequences tokens anyway.

        chances: of each draft, that it and those in front of it are right: what it adds to the step's tokens.
        """
        counts = [0] * len(chances)
        entries = [(-chance, place) for place, row in enumerate(chances) for chance in _falling(row)]
        entries.sort()
        gained = np.cumsum([0.0, *(-chance for chance, _ in entries)]) + num_sequences
        self._num_choices += 1
        is_probe = self._num_choices % PROBE == 0
        if gained[-1] < GAIN * num_sequences and not is_probe:
            return counts
        sizes = [num_sequences, *_larger_sizes(num_sequences, num_sequences + len(entries))]
        rates = gained[[size - num_sequences for size in sizes]] / self.seconds(sizes)
        best = int(rates.argmax())
        if rates[best] < GAIN * rates[0]:
            best = 0
        if is_probe:
            best = 0 if best else self._one_to_probe(sizes)
        for _, place in entries[: sizes[best] - num_sequences]:
            counts[place] += 1
        return counts

    def _one_to_probe(self, sizes: Rows[int]) -> int:
        """The place among these of what was not measured for longest, and can't cost much."""
        most = MOST_FOR_PROBE * _guessed(sizes[0])
        places = [place for place, size in enumerate(sizes) if place and _guessed(size) <= most]
        return min(places, key=lambda place: self._when.get(sizes[place], 0), default=0)


def _larger_sizes(num_sequences: int, most: int) -> list[int]:
    """What steps with drafts may have of tokens: few enough that each is measured often, and can be recorded.

    Numbers of three bits and zeros; where none of these is large and small enough, the most.
    """
    sizes = []
    size = num_sequences
    while (size := _next_size(size)) <= most:
        sizes.append(size)
    return sizes or ([most] if most > num_sequences else [])


def _next_size(size: int) -> int:
    """The next larger number of three bits and zeros."""
    shift = max(0, size.bit_length() - 3)
    return ((size >> shift) + 1) << shift


def _guessed(num_tokens: Any) -> Any:
    """What steps of so many tokens take, but for a factor."""
    return 1 + SHARE * num_tokens


def _falling(chances: Rows[float]) -> list[float]:
    """A draft is no more likely than those in front of it, whatever the averages say."""
    found: list[float] = []
    for chance in chances:
        found.append(min(chance, found[-1]) if found else chance)
    return found
