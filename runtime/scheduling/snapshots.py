"""Copies of states that sequences may begin with, in rows of the state caches behind those of all slots.

A snapshot has the name of the last block of its prefix, and is good for whoever has the prefix's blocks. What a step
copies can be a source from the next step on, and what is a source of a step is not overwritten in it: rows are read
and written within a step in no order, and steps run in the order in which they are planned.
"""

from __future__ import annotations

from collections import OrderedDict


class Snapshots:
    """Rows first_row .. first_row + count. The one that was used longest ago is given away first."""

    def __init__(self, first_row: int, count: int) -> None:
        self._free = list(range(first_row + count - 1, first_row - 1, -1))
        self._row_of: OrderedDict[bytes, int] = OrderedDict()  # who was used last is the last one
        self._of_step: dict[bytes, int] = {}
        self._sources: set[bytes] = set()
        self._forgotten: list[int] = []  # rows that the step which is being planned may read or write

    def begin_step(self) -> None:
        """Another step is planned: let what the last one copies be found."""
        self._row_of |= self._of_step
        self._of_step = {}
        self._sources = set()
        self._free += self._forgotten
        self._forgotten = []

    def has(self, name: bytes) -> bool:
        return name in self._row_of

    def is_coming(self, name: bytes) -> bool:
        """Whether the step that is being planned makes it."""
        return name in self._of_step

    def use(self, name: bytes) -> int:
        """The row of one that there is, as a source of the step that is being planned."""
        self._row_of.move_to_end(name)
        self._sources.add(name)
        return self._row_of[name]

    def make(self, name: bytes) -> int | None:
        """A row that the step being planned copies a state to; None: it is there, or no row can be had."""
        if name in self._of_step:
            return None
        if name in self._row_of:
            self._row_of.move_to_end(name)
            return None
        row = self._free.pop() if self._free else self._taken_away()
        if row is not None:
            self._of_step[name] = row
        return row

    def _taken_away(self) -> int | None:
        oldest = next((name for name in self._row_of if name not in self._sources), None)
        return None if oldest is None else self._row_of.pop(oldest)

    def forget(self, name: bytes) -> None:
        """Let nobody find it: its numbers are not to be trusted."""
        for names in (self._row_of, self._of_step):
            if (row := names.pop(name, None)) is not None:
                self._forgotten.append(row)

    def reset(self) -> None:
        """Forget all of them."""
        for name in [*self._row_of, *self._of_step]:
            self.forget(name)
