"""What an engine gets done, as its server sees it without asking: a few numbers in memory that all its ranks map too.

An answer to a message would tell the same only between steps, and a step may take minutes. A number that grows with
each layer tells a long step from one that hangs in a kernel, in a lock, or in the wait for another rank, and needs
nothing of the process that hangs. A stage that waits for the one before it makes none, but then that one does. It
imports no torch: the server imports it.
"""

from __future__ import annotations

import mmap
import os

_COUNT = 0
_IS_WORKING = 1
_LAYERS_LOADED = 2
_LAYERS = 3
_BYTES = 32


class Progress:
    """One end; all are opened with the path of one file, which whoever comes first makes."""

    def __init__(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _BYTES)
            self._words = memoryview(mmap.mmap(descriptor, _BYTES)).cast("q")
        finally:
            os.close(descriptor)

    def mark(self) -> None:
        """Something has been done. Two threads at once may count as one, which changes the number too."""
        self._words[_COUNT] += 1

    def work(self) -> None:
        """From now on there is something to do, so that marks must come."""
        self._words[_IS_WORKING] = 1
        self.mark()

    def rest(self) -> None:
        """From now on no mark need come."""
        self._words[_IS_WORKING] = 0

    def load(self, loaded: int, layers: int) -> None:
        """So many of the layers have been loaded."""
        self._words[_LAYERS] = layers
        self._words[_LAYERS_LOADED] = loaded

    @property
    def loaded(self) -> tuple[int, int]:
        """(the layers that have been loaded, those that there are); the latter is 0 before the first one is begun."""
        return self._words[_LAYERS_LOADED], self._words[_LAYERS]

    @property
    def count(self) -> int | None:
        """How many marks there have been; None while none need come."""
        return self._words[_COUNT] if self._words[_IS_WORKING] else None
