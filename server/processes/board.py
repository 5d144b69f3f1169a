"""What each server process has under way, as all of them see it: numbers in memory that all of them map.

Each writes its own row, and reads the others'. Two that admit a request at the same moment don't see each other, so a
limit may be exceeded by one request for each further process.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from itertools import islice

MAX_OWNERS = 256  # of each process, of whom the others know
_NUM_ANSWERS = 0
_NUM_TOKENS = 1
_FINISHED = 2  # thousandths of an answer a second
_NUM_OWNERS = 3
_OWNERS = 4  # of each one its key, and its answers
_COLUMNS = _OWNERS + 2 * MAX_OWNERS


@dataclass(frozen=True)
class Elsewhere:
    """What the other processes of a server have: open answers, tokens of prompts that wait, answers finished a second.

    owners: answers under way, by the `owner_key` of whose they are.
    """

    num_answers: int = 0
    num_tokens: int = 0
    finish_rate: float = 0.0
    owners: Mapping[int, int] = field(default_factory=dict)


ALONE = Elsewhere()


def alone() -> Elsewhere:
    """Where there is one process."""
    return ALONE


@lru_cache(MAX_OWNERS)
def owner_key(owner: str) -> int:
    """An owner as a number."""
    return int.from_bytes(sha256(owner.encode()).digest()[:7], "big")


class Board:
    """The view of process number `own`, of so many. The file is made by whoever comes first."""

    def __init__(self, path: str, num_servers: int, own: int) -> None:
        size = 8 * _COLUMNS * num_servers
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size)
            words = memoryview(mmap.mmap(descriptor, size)).cast("q")
        finally:
            os.close(descriptor)
        rows = [words[_COLUMNS * number : _COLUMNS * (number + 1)] for number in range(num_servers)]
        self._own = rows.pop(own)
        self._others = rows
        self.write(0, 0, 0.0)
        self.write_owners({})

    def write(self, num_answers: int, num_tokens: int, finish_rate: float) -> None:
        """What this process has."""
        self._own[_NUM_ANSWERS] = num_answers
        self._own[_NUM_TOKENS] = num_tokens
        self._own[_FINISHED] = round(1000 * finish_rate)

    def write_owners(self, owners: Mapping[str, int]) -> None:
        """Whose that is."""
        place = _OWNERS
        for owner, count in islice(dict(owners).items(), MAX_OWNERS):  # a copy: a ticket may vanish meanwhile
            self._own[place] = owner_key(owner)
            self._own[place + 1] = count
            place += 2
        self._own[_NUM_OWNERS] = (place - _OWNERS) // 2

    def elsewhere(self) -> Elsewhere:
        """What the other processes have."""
        num_answers, num_tokens, finished = (
            sum(row[column] for row in self._others) for column in (_NUM_ANSWERS, _NUM_TOKENS, _FINISHED)
        )
        owners = Counter[int]()
        for row in self._others:
            for place in range(_OWNERS, _OWNERS + 2 * row[_NUM_OWNERS], 2):
                owners[row[place]] += row[place + 1]
        return Elsewhere(num_answers, num_tokens, finished / 1000, owners)
