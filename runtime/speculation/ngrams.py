"""Where each run of a few tokens stands in a text that grows: what drafters look up.

A dict has the last place of each run, and a list the place before each place, so that a token more takes the same time
however long the text is, and all places of a run are found from the last one back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

TOKEN_BITS = 22  # of a token in a run's name: no vocabulary has more than four million
SEPARATOR = (1 << TOKEN_BITS) - 1  # between texts that are kept one behind another: no token


class NgramIndex:
    """A text and its runs of `size` tokens. A place is the number of tokens in front of what follows a run."""

    __slots__ = ("_before", "_last", "_mask", "_name", "size", "tokens")

    def __init__(self, size: int) -> None:
        self.size = size
        self.tokens: list[int] = []
        self._before: list[int] = [-1]  # of each place, the last one before it that ends in the same run; -1: none
        self._last: dict[int, int] = {}
        self._mask = (1 << TOKEN_BITS * size) - 1
        self._name = 0  # the last run's tokens, side by side

    def extend(self, tokens: Iterable[int]) -> None:
        """Add the next tokens."""
        text = self.tokens
        name = self._name
        for token in tokens:
            text.append(token)
            name = (name << TOKEN_BITS | token) & self._mask
            place = len(text)
            if place < self.size:
                self._before.append(-1)
                continue
            self._before.append(self._last.get(name, -1))
            self._last[name] = place
        self._name = name

    def end(self, text: Sequence[int]) -> int:
        """The last place at which the last tokens of another text end; -1 where there is none."""
        if len(text) < self.size:
            return -1
        name = 0
        for token in text[-self.size :]:
            name = name << TOKEN_BITS | token
        return self._last.get(name, -1)

    def places(self, place: int, most: int) -> Iterator[int]:
        """This place, those before it that end in the same run, `most` of them at the most, the last ones first."""
        while place >= 0 and most:
            yield place
            place = self._before[place]
            most -= 1

    def earlier(self, most: int) -> Iterator[int]:
        """The places before the text's end that end in the same run."""
        return self.places(self._before[-1], most)


def match_length(one: Sequence[int], at: int, other: Sequence[int], end: int, most: int) -> int:
    """How many tokens in front of place `at` of one text are those in front of `end` of another, `most` at the most."""
    length = 0
    most = min(most, at, end)
    while length < most and one[at - 1 - length] == other[end - 1 - length]:
        length += 1
    return length
