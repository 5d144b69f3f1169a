"""Repetitions of nothing but repetitions, `(a{1,1000}){1,1000}`: what is refused before an engine runs out of fuel.

Such a pattern matches one text in many ways, and each count of each level is a state of llguidance's lexer. Levels
that something parts, as in `([a-z]{1,1000} ){1,1000}`, have one way, and are fine.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

MOST = 2500  # of the levels' product: 50 times 50 work with a vocabulary of 151k, 70 times 70 run out of fuel
MOST_WITHIN = 50  # of the product without the largest level: one long level alone is harmless
_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?:\?[:=!i]+|\?P?<\w+>)?|.", re.DOTALL)
_COUNT = re.compile(r"\{(\d+)(?:,(\d*))?\}|[?*+]")


@dataclass(slots=True)
class _Level:
    """A group, or the whole pattern. last: the counts of its last item; best: those of an alternative of one item."""

    num_items: int = 0
    last: list[int] = field(default_factory=list)
    best: list[int] = field(default_factory=list)

    def end_alternative(self) -> None:
        """Another alternative begins, or none."""
        if self.num_items == 1 and math.prod(self.last) > math.prod(self.best):
            self.best = self.last
        self.num_items = 0
        self.last = []


def endless_counts(pattern: str) -> list[int]:
    """The counts of the first repetition that is too large, from the inside out; none where all are fine."""
    levels = [_Level()]
    position = 0
    while position < len(pattern):
        count = _COUNT.match(pattern, position)
        if count is not None and levels[-1].num_items:
            most = _most(count)
            last = levels[-1].last = [*levels[-1].last, *([most] if most > 1 else [])]
            if math.prod(last) > MOST and math.prod(last) // max(last) > MOST_WITHIN:
                return last
            position = count.end()
            continue
        atom = _ATOM.match(pattern, position)
        assert atom is not None
        position = atom.end()
        if atom[0] == "[":  # a class that isn't closed, which the translation refuses
            return []
        if atom[0][0] == "(":
            levels.append(_Level())
        elif atom[0] == "|":
            levels[-1].end_alternative()
        elif atom[0] == ")" and len(levels) > 1:
            group = levels.pop()
            group.end_alternative()
            levels[-1].num_items += 1
            levels[-1].last = group.best
        else:
            levels[-1].num_items += 1
            levels[-1].last = []
    return []


def _most(count: re.Match[str]) -> int:
    """How often it repeats at most; 1 where there is no limit, since nothing is counted then."""
    if count[1] is None:
        return 1
    return max(1, int((count[2] or count[1])[:9]))
