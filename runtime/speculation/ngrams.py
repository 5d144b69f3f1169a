"""Where each run of a few tokens stands in a text that grows: what drafters look up.

A dict has the last place of each run, and an array the place before each place, so that a token more takes the same
time however long the text is, and all places of a run are found from the last one back.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

TOKEN_BITS = 22  # of a token in a run's name: no vocabulary has more than four million
SEPARATOR = (1 << TOKEN_BITS) - 1  # between texts that are kept one behind another: no token


class NgramIndex:
    """A text and its runs of `sizes` tokens. A place is the number of tokens in front of what follows a run."""

    __slots__ = ("_runs", "tokens")

    def __init__(self, *sizes: int) -> None:
        self.tokens: list[int] = []
        self._runs = [_Runs(size) for size in sorted(sizes, reverse=True)]

    def extend(self, tokens: list[int]) -> None:
        """Add the next tokens."""
        begin = len(self.tokens)
        self.tokens += tokens
        for runs in self._runs:
            runs.extend(tokens, begin)

    def ends(self, text: Sequence[int], most: int) -> list[int]:
        """The places at which the last tokens of another text end, by the largest run of which there is one.

        `most` of them at the most, the last ones first.
        """
        for runs in self._runs:
            if places := list(runs.places(runs.end(text), most)):
                return places
        return []

    def earlier(self, most: int) -> list[int]:
        """As `ends`, of its own text: the places before its end."""
        for runs in self._runs:
            if places := list(runs.places(runs.before[-1], most)):
                return places
        return []


class _Runs:
    """The runs of one size. before: of each place, the last one before it that ends in the same run; -1: none."""

    __slots__ = ("_last", "_mask", "_name", "before", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.before = array("i", [-1])
        self._last: dict[int, int] = {}
        self._mask = (1 << TOKEN_BITS * size) - 1
        self._name = 0  # the last run's tokens, side by side

    def extend(self, tokens: list[int], begin: int) -> None:
        """Add the next tokens, of which there are `begin` before."""
        last = self._last
        before = self.before
        mask = self._mask
        name = self._name
        for place, token in enumerate(tokens, begin + 1):
            name = (name << TOKEN_BITS | token) & mask
            if place < self.size:
                before.append(-1)
                continue
            before.append(last.get(name, -1))
            last[name] = place
        self._name = name

    def end(self, text: Sequence[int]) -> int:
        """The last place at which the last tokens of a text end; -1 where there is none."""
        if len(text) < self.size:
            return -1
        name = 0
        for token in text[-self.size :]:
            name = name << TOKEN_BITS | token
        return self._last.get(name, -1)

    def places(self, place: int, most: int) -> Iterator[int]:
        """This place, and those before it that end in the same run."""
        while place >= 0 and most:
            yield place
            place = self.before[place]
            most -= 1


def match_length(one: Sequence[int], at: int, other: Sequence[int], end: int, most: int) -> int:
    """How many tokens in front of place `at` of one text are those in front of `end` of another, `most` at the most."""
    length = 0
    most = min(most, at, end)
    while length < most and one[at - 1 - length] == other[end - 1 - length]:
        length += 1
    return length
