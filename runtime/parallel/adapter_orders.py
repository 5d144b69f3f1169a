"""What the driver tells its followers of adapters, on the way of its orders: files to read, and to forget.

Which slot has which adapter stands in each step's order, so a follower puts it there when a step needs it, and waits
for what it reads only then: the driver has read the same files before it plans such a step.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from octavo.runtime.parallel.order import Int32s, StepOrder

if TYPE_CHECKING:
    from octavo.runtime.model.adapters import LoadedAdapter, ModelAdapters

MOST_NUMBERS = 2048  # of such an order: a path has 4,096 bytes at most
_MARK = -1  # in the place of a step's number


class _Told(msgspec.Struct, frozen=True):
    """directory: None: it is forgotten."""

    digest: str
    directory: str | None


def is_step(order: Int32s) -> bool:
    """Whether it is a step's order."""
    return bool(order[0] != _MARK)


def adapter_order(digest: str, directory: Path | None) -> Int32s:
    """To read an adapter, or with None to forget it."""
    told = msgspec.json.encode(_Told(digest, None if directory is None else str(directory)))
    numbers = np.zeros(2 + -(-len(told) // 4), np.int32)
    numbers[:2] = _MARK, len(told)
    numbers[2:].view(np.uint8)[: len(told)] = np.frombuffer(told, np.uint8)
    return numbers


class FollowerAdapters:
    """A follower's adapters: what it was told of, and its slots. Use from its loop only."""

    def __init__(self, model: ModelAdapters) -> None:
        self._model = model
        self._reading: dict[str, Future[LoadedAdapter]] = {}
        self._in_slots: dict[int, str] = {}
        self._thread = ThreadPoolExecutor(1, "octavo-adapters")

    def take(self, order: Int32s) -> None:
        """Do what an order about adapters says."""
        told = msgspec.json.decode(order[2:].tobytes()[: int(order[1])], type=_Told)
        if told.directory is not None:
            directory = Path(told.directory)
            self._reading[told.digest] = self._thread.submit(self._model.load, directory, told.digest, is_checked=True)
            return
        self._reading.pop(told.digest, None)
        for slot in [slot for slot, digest in self._in_slots.items() if digest == told.digest]:
            self._model.put(slot, None)
            del self._in_slots[slot]

    def place(self, step: StepOrder) -> None:
        """Have in its slot what a step uses. Raises AdapterError where it can't be read here."""
        for slot, digest in step.adapters_in_slots():
            if self._in_slots.get(slot) != digest:
                self._model.put(slot, self._reading[digest].result())
                self._in_slots[slot] = digest
