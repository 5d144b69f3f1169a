"""Drafts out of a request's own text: what followed the last time that its last tokens stood there (prompt lookup)."""

from __future__ import annotations

from octavo.runtime.speculation.ngrams import NgramIndex, match_length

LONG_RUN = 3  # tokens: longer matches are found by their last ones
MOST_COMPARED = 8  # places that are compared for the longest match


class OwnText:
    """A prompt and its answer, as far as it has been read, and up to `count` drafts where its end has stood before.

    Drafts go on from the longest match of the last tokens, `least` of them at least, among the last few places where
    those stood; of equals, and beyond `longest` tokens, the last one counts. A match that the text goes on as is no
    shorter than any other one afterwards, so that nothing is looked up while it lasts.
    kind: how long the match is, which says how good its drafts are.
    """

    def __init__(self, count: int, least: int, longest: int) -> None:
        self._count = count
        self._longest = longest
        self._index = NgramIndex(*run_sizes(least))
        self._place = 0  # behind the match
        self.kind = 0  # 0: there is none

    def read(self, new: list[int]) -> None:
        """Take the next tokens."""
        self._index.extend(new)
        if self.kind:
            goes_on = self._index.tokens[self._place : self._place + len(new)] == new
            self._place += len(new)
            self.kind = min(self.kind + len(new), self._longest) if goes_on else 0

    def drafts(self) -> list[int]:
        """What may follow; nothing where nothing matches."""
        tokens = self._index.tokens
        if not self.kind:
            for place in self._index.earlier(MOST_COMPARED):
                length = match_length(tokens, place, tokens, len(tokens), self._longest)
                if length > self.kind:
                    self._place = place
                    self.kind = length
        return following(tokens, self._place, self._count) if self.kind else []

    def end(self) -> None:
        """The answer is complete: nothing is kept of it."""


def run_sizes(least: int) -> range:
    """Of the runs by which matches of `least` tokens and more are found: the longest ones first, or they'd be missed
    where their last tokens are frequent.
    """
    return range(least, max(least, LONG_RUN) + 1)


def following(tokens: list[int], place: int, count: int) -> list[int]:
    """`count` tokens behind a place; beyond the text's end, what has stood since that place, over and over."""
    found = tokens[place : place + count]
    period = len(tokens) - place
    while len(found) < count:
        found += found[len(found) - period : len(found) - period + count - len(found)]
    return found
