"""The adapters of an engine: read in a thread, kept in memory by use, and put into the slots that the scheduler names.

An adapter is known by the digest of its files, so that a name that is given to other files names another adapter. One
that was read once and had to make room is read again when a request needs it, and only if its files are the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from octavo.runtime.messages import AdapterLoaded, LoadAdapter
from octavo.runtime.scheduling.adapter_slots import Adapter, AdapterSlots

if TYPE_CHECKING:
    from octavo.runtime.model.adapters import LoadedAdapter, ModelAdapters
    from octavo.runtime.parallel.followers import Followers
    from octavo.runtime.scheduling.plan import StepPlan
    from octavo.runtime.scheduling.sequence import Sequence

log = logging.getLogger(__name__)

MOST_FINISHED = 256  # that are taken at once


class _Read(NamedTuple):
    """What became of reading an adapter: `error` says why it isn't there."""

    digest: str
    loaded: LoadedAdapter | None
    error: str = ""


class _Entry:
    """An adapter, and what is known of it.

    loaded: its tensors, while they are in memory. is_named: requests may name it. is_asked: a LoadAdapter waits for its
    answer.
    """

    def __init__(self, message: LoadAdapter) -> None:
        self.adapter = Adapter(message.digest, message.name)
        self.directory = Path(message.directory)
        self.loaded: LoadedAdapter | None = None
        self.is_reading = False
        self.is_named = True
        self.is_asked = False


class Adapters:
    """All adapters of one engine. Use from its loop only.

    most_loaded: how many are kept in memory, those in slots among them. followers: the engine's other ranks, which
    read the same files; None: there are none.
    ready  a file descriptor: readable when `finished` has something to give
    """

    def __init__(
        self, model: ModelAdapters, slots: AdapterSlots, most_loaded: int, followers: Followers | None = None
    ) -> None:
        self._model = model
        self._followers = followers
        self._slots = slots
        self._most_loaded = most_loaded
        self._entries: dict[str, _Entry] = {}
        self._is_tidy = True  # nothing is to be read, and nothing to be let go of
        self._finished: SimpleQueue[_Read] = SimpleQueue()
        self._num_reading = 0
        self._thread = ThreadPoolExecutor(1, "octavo-adapters")
        self.ready, self._bell = os.pipe()
        os.set_blocking(self.ready, False)
        weakref.finalize(self, _close, self.ready, self._bell)
        slots.on_put = self._put

    def load(self, message: LoadAdapter) -> AdapterLoaded | None:
        """Make an adapter known, and read it to see whether it can be served; the answer, if it is known already."""
        entry = self._entries.setdefault(message.digest, _Entry(message))
        entry.is_named = True
        entry.directory = Path(message.directory)
        self._is_tidy = False
        if entry.loaded is not None:
            return AdapterLoaded(message.digest)
        entry.is_asked = True
        self._read(entry)
        return None

    def drop(self, digest: str) -> None:
        """No request will name it. It goes with the last that does."""
        if (entry := self._entries.get(digest)) is not None:
            entry.is_named = False
            self._is_tidy = False

    def find(self, digest: str) -> Adapter | None:
        """An adapter that requests may name, for one that does."""
        entry = self._entries.get(digest)
        if entry is None or not entry.is_named:
            return None
        if entry.loaded is None:
            self._is_tidy = False
        return entry.adapter

    def finished(self) -> tuple[list[AdapterLoaded], list[tuple[Adapter, str]]]:
        """What has been read since the last call: answers to `load`, and adapters that can't be read any more."""
        told: list[AdapterLoaded] = []
        failed: list[tuple[Adapter, str]] = []
        if not self._num_reading:
            return told, failed
        with contextlib.suppress(BlockingIOError):
            for _ in os.read(self.ready, MOST_FINISHED):
                read = self._finished.get()
                self._num_reading -= 1
                self._take(read, told, failed)
        return told, failed

    def _take(self, read: _Read, told: list[AdapterLoaded], failed: list[tuple[Adapter, str]]) -> None:
        entry = self._entries[read.digest]
        entry.is_reading = False
        entry.loaded = read.loaded
        entry.adapter.is_up = read.loaded is not None
        if entry.is_asked:
            entry.is_asked = False
            told.append(AdapterLoaded(read.digest, read.error))
            if read.error:
                entry.is_named = False
        if read.error:
            failed.append((entry.adapter, read.error))
            self._tell_followers(entry, None)
        self._is_tidy = False

    def tidy(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
        """Read what those need that are next, and forget what they don't, as memory allows.

        running, waiting: all sequences, each in order.
        """
        if self._is_tidy:
            return
        in_use = dict.fromkeys(it.adapter for it in running if it.adapter is not None)
        needed = in_use | dict.fromkeys(it.adapter for it in waiting if it.adapter is not None)
        for digest, entry in list(self._entries.items()):
            if not entry.is_named and entry.adapter not in needed and not entry.is_reading and self._forget(entry):
                del self._entries[digest]
        due = dict.fromkeys([*needed][: max(self._most_loaded, len(in_use))])
        loaded = [entry for entry in self._entries.values() if entry.loaded is not None or entry.is_reading]
        num_missing = sum(not it.is_up and not self._entries[it.digest].is_reading for it in due)
        spare = sorted((it for it in loaded if it.adapter not in due), key=lambda it: it.adapter.used_at)
        for entry in spare[: max(0, len(loaded) + num_missing - self._most_loaded)]:
            self._forget(entry)
        for adapter in due:
            if not adapter.is_up:
                self._read(self._entries[adapter.digest])
        entries = self._entries.values()
        is_complete = all(adapter.is_up for adapter in needed) and all(entry.is_named for entry in entries)
        self._is_tidy = is_complete and sum(it.loaded is not None for it in entries) <= self._most_loaded

    def begin(self, plan: StepPlan) -> None:
        """A step is under way, and uses slots."""
        for scheduled in plan.scheduled:
            if scheduled.sequence.adapter is not None:
                scheduled.sequence.adapter.num_steps += 1

    def end(self, plan: StepPlan) -> None:
        """It is not any more."""
        for scheduled in plan.scheduled:
            if scheduled.sequence.adapter is not None:
                scheduled.sequence.adapter.num_steps -= 1

    def _read(self, entry: _Entry) -> None:
        if not entry.is_reading:
            entry.is_reading = True
            self._num_reading += 1
            self._tell_followers(entry, entry.directory)
            self._thread.submit(self._read_files, entry.directory, entry.adapter.digest)

    def _read_files(self, directory: Path, digest: str) -> None:
        try:
            self._finished.put(_Read(digest, self._model.load(directory, digest)))
        except ValueError as error:
            self._finished.put(_Read(digest, None, str(error)))
        except Exception as error:  # whatever it is, somebody waits for an answer
            log.exception("adapter %s can't be read", directory)
            self._finished.put(_Read(digest, None, f"{directory} can't be read: {type(error).__name__}: {error}"))
        os.write(self._bell, b".")

    def _forget(self, entry: _Entry) -> bool:
        """Let go of an adapter's tensors, unless a step under way uses them; whether that was possible."""
        adapter = entry.adapter
        if adapter.num_steps or entry.is_reading:
            return False
        if adapter.slot >= 0:
            self._slots.put(adapter.slot, None)
        entry.loaded = None
        adapter.is_up = False
        self._tell_followers(entry, None)
        return True

    def _tell_followers(self, entry: _Entry, directory: Path | None) -> None:
        if self._followers is not None:
            self._followers.tell_adapter(entry.adapter.digest, directory)

    def _put(self, slot: int, adapter: Adapter | None) -> None:
        self._model.put(slot, None if adapter is None else self._entries[adapter.digest].loaded)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
