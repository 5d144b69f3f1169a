"""What each server process has under way, as all of them see it: numbers in memory that all of them map.

Each writes its own row, and reads the others'. Two that admit a request at the same moment don't see each other, so a
limit may be exceeded by one request for each further process.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Mapping, Sequence
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


class Elsewhere:
    """What the other processes of a server have, read from their rows when it is asked; nothing without rows."""

    def __init__(self, rows: Sequence[memoryview] = ()) -> None:
        self._rows = rows

    @property
    def num_answers(self) -> int:
        """Open answers."""
        return self._sum(_NUM_ANSWERS)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompts that wait."""
        return self._sum(_NUM_TOKENS)

    @property
    def finish_rate(self) -> float:
        """Answers that are finished a second."""
        return self._sum(_FINISHED) / 1000

    @property
    def owners(self) -> Counter[int]:
        """Answers under way, by the `owner_key` of whose they are."""
        owners = Counter[int]()
        for row in self._rows:
            for place in range(_OWNERS, _OWNERS + 2 * row[_NUM_OWNERS], 2):
                owners[row[place]] += row[place + 1]
        return owners

    def _sum(self, column: int) -> int:
        return sum([row[column] for row in self._rows])


@lru_cache(MAX_OWNERS)
def owner_key(owner: str) -> int:
    """An owner as a number."""
    return int.from_bytes(sha256(owner.encode()).digest()[:7], "big")


class Board:
    """The view of process number `own`, of so many. The file is made by whoever comes first.

    elsewhere: what the others have.
    """

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
        self.elsewhere = Elsewhere(rows)
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
