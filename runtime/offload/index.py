"""Which blocks lie in which slot of a file, and which are overwritten next. Pure bookkeeping over names.

A name is findable once its block has been written. What is being written or read is pinned: its slot is nobody else's
meanwhile. Of the others, the least recently used one makes room.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class OffloadIndex:
    """Slots 0 .. num_slots - 1. found: (name, slot) of what lies there already, least recently used first.

    touched    names whose place in the order has changed since it was emptied, in that order
    discarded  slots whose block is not to be found any more, likewise
    """

    def __init__(self, num_slots: int, found: Iterable[tuple[bytes, int]] = ()) -> None:
        self.num_slots = num_slots
        self._slots: OrderedDict[bytes, int] = OrderedDict(found)
        taken = set(self._slots.values())
        self._free = [slot for slot in range(num_slots - 1, -1, -1) if slot not in taken]
        self._pins: Counter[bytes] = Counter()
        self._writing: dict[bytes, int] = {}
        self._num_put = 0
        self.touched: OrderedDict[bytes, None] = OrderedDict()
        self.discarded: list[int] = []

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: bytes) -> bool:
        """Whether its block can be read."""
        return name in self._slots and name not in self._writing

    @property
    def is_full(self) -> bool:
        """Whether a new block takes another one's slot."""
        return not self._free

    def slot_of(self, name: bytes) -> int | None:
        """Where its block lies, or is being written."""
        return self._slots.get(name)

    def touch(self, name: bytes) -> bool:
        """Its block has been used; whether there is one, be it one that is being written."""
        if name not in self._slots:
            return False
        self._slots.move_to_end(name)
        self.touched[name] = None
        self.touched.move_to_end(name)
        return True

    def pin(self, names: Sequence[bytes]) -> list[int]:
        """Where these blocks lie, which are to be read."""
        self._pins.update(names)
        return [self._slots[name] for name in names]

    def unpin(self, names: Iterable[bytes]) -> None:
        """They have been read."""
        for name in names:
            self._pins[name] -= 1
            if not self._pins[name]:
                del self._pins[name]

    def put(self, name: bytes) -> tuple[int, int] | None:
        """(a slot to write this new name's block to, what `written` is to be told); None where all are pinned."""
        slot = self._free.pop() if self._free else self._least_used()
        if slot is None:
            return None
        self._num_put += 1
        self._slots[name] = slot
        self._writing[name] = self._num_put
        return slot, self._num_put

    def written(self, name: bytes, number: int) -> None:
        """Its block can be read now, unless it was discarded meanwhile."""
        if self._writing.get(name) == number:
            del self._writing[name]

    def discard(self, name: bytes) -> None:
        """Let nobody find this block any more."""
        slot = self._slots.pop(name, None)
        if slot is not None:
            self._writing.pop(name, None)
            self.touched.pop(name, None)
            self._free.append(slot)
            self.discarded.append(slot)

    def clear(self) -> None:
        """Forget all of them."""
        for name in list(self._slots):
            self.discard(name)

    def _least_used(self) -> int | None:
        for name, slot in self._slots.items():
            if name not in self._writing and name not in self._pins:
                del self._slots[name]
                self.touched.pop(name, None)
                return slot
        return None
