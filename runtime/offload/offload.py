"""Blocks on their way between the KV cache and the file: what is written when, who reads, and what came of it.

A block is written once the step that fills it is over, not when it is evicted: a process that is killed has no time
left. Its bytes are copied between two steps, since a later one may give it to somebody else; a thread then writes them.
Blocks that a request waits for are read by a second thread, into the blocks that are held for them: when every step
that was ordered before these were held is over, because such a step may still write to what it was told of.

On a CPU the KV cache is host memory, so there is no level of memory between it and the file: what the file's pages take
of the system's page cache is one, which gives way to whoever needs the memory.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.runtime.offload.block_file import HEAD, BlockFile
from octavo.runtime.offload.index import OffloadIndex
from octavo.runtime.offload.rows import BlockRows
from octavo.runtime.offload.stats import OffloadStats
from octavo.runtime.scheduling.plan import StepPlan
from octavo.runtime.scheduling.prefix_cache import Fetch, PrefixCache

log = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]
STAGING_BYTES = 64 << 20  # of blocks that wait to be written, or those of a step: what comes beyond is left out
READ_BYTES = 4 << 20  # that are read at a time
STAMP_SECONDS = 5.0  # between two times that the order of use is written
MOST_FINISHED = 256  # fetches that are taken at once


class _Read(NamedTuple):
    """What became of a fetch: of each of its blocks, whether it may be used.

    wrong: (name, slot) of those that don't lie where they should. num_damaged: of them, those that nothing else lies in
    the place of.
    """

    fetch: Fetch
    generation: int
    are_right: list[bool]
    wrong: list[tuple[bytes, int]]
    num_damaged: int
    seconds: float


class _Written(NamedTuple):
    names: list[tuple[bytes, int]]  # with the index's numbers
    num_rows: int
    seconds: float


class Offload:
    """The file of one engine's prefix cache. Use from the engine's loop only.

    step_blocks: how many one step may fill.
    ready  a file descriptor: readable when `finished` has something to give
    """

    def __init__(self, file: BlockFile, rows: BlockRows, prefixes: PrefixCache, step_blocks: int = 1) -> None:
        self.file = file
        self._rows = rows
        self._prefixes = prefixes
        self._index = OffloadIndex(file.num_slots, file.found)
        prefixes.index = self._index
        self._offered: deque[tuple[int, list[tuple[bytes, int]]]] = deque()
        self._fetches: deque[tuple[int, int, Fetch]] = deque()
        self._generation = 0
        self._num_reading = 0
        num_rows = max(step_blocks, STAGING_BYTES // file.row_bytes)
        self._staging = np.empty((num_rows, file.row_bytes), np.uint8)  # a ring, of which memory is taken as it is used
        self._next_row = 0
        self._num_staged = 0
        self._stamped_at = time.monotonic()
        self._is_broken = False
        self._load_bytes = 0
        self._load_seconds = 0.0
        self._store_bytes = 0
        self._store_seconds = 0.0
        self._num_skipped = 0
        self._num_damaged = 0
        self._written: SimpleQueue[_Written] = SimpleQueue()
        self._finished: SimpleQueue[_Read] = SimpleQueue()
        self._writer = ThreadPoolExecutor(1, "octavo-offload-writes")
        self._reader = ThreadPoolExecutor(1, "octavo-offload-reads")
        self.ready, self._bell = os.pipe()
        os.set_blocking(self.ready, False)
        weakref.finalize(self, _close, self.ready, self._bell)

    def begin_fetches(self, num_ordered: int, num_finished: int) -> None:
        """Read what the last plan asks for, as soon as so many steps are over."""
        for fetch in self._prefixes.fetches:
            self._fetches.append((num_ordered, self._generation, fetch))
        self._prefixes.fetches.clear()
        self._read_until(num_finished)

    def after(self, plan: StepPlan, seconds: float) -> None:
        """A step has been computed, in so much time."""
        self._prefixes.costs.take(plan, seconds)

    def take_offers(self, num_ordered: int, num_finished: int) -> None:
        """Write what has been offered, as soon as so many steps are over."""
        if self._prefixes.offered:
            self._offered.append((num_ordered, self._prefixes.offered))
            self._prefixes.offered = []
        while self._offered and self._offered[0][0] <= num_finished:
            self._store(self._offered.popleft()[1])
        self._read_until(num_finished)
        self._settle()

    def finished(self) -> list[tuple[Fetch, list[bool]]]:
        """What has been read since the last call."""
        if not self._num_reading:
            return []
        try:
            count = len(os.read(self.ready, MOST_FINISHED))
        except BlockingIOError:
            return []
        return [self._take(self._finished.get()) for _ in range(count)]

    def forget(self, description: dict[str, object] | None = None) -> None:
        """Let nothing be found that lies in the file, or is on its way there; returns when that is so.

        description: of the blocks from now on, where the model is another one (select.description_of); then the prefix
        cache in memory must be forgotten too, with no step under way.
        """
        self._generation += 1
        self._offered.clear()
        self._prefixes.offered.clear()
        self._index.clear()
        self._index.discarded.clear()
        try:
            self._writer.submit(self.file.begin_anew, description).result()
            self._is_broken = False
            self._settle()
            self._num_staged = 0  # what was left out behind a failure has said nothing
        except OSError as error:
            self._fail(error)

    def stats(self) -> OffloadStats:
        """Gauges and counters as they are now."""
        return OffloadStats(
            usage=len(self._index) / self._index.num_slots,
            num_queries=self._prefixes.num_file_queries,
            num_hits=self._prefixes.num_file_hits,
            load_bytes=self._load_bytes,
            load_seconds=self._load_seconds,
            store_bytes=self._store_bytes,
            store_seconds=self._store_seconds,
            num_skipped=self._num_skipped,
            num_damaged=self._num_damaged,
        )

    def close(self) -> None:
        """Write what waits, and let go of the file."""
        self._write_order()
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown()
        self.file.close()

    def _read_until(self, num_finished: int) -> None:
        while self._fetches and self._fetches[0][0] <= num_finished:
            _, generation, fetch = self._fetches.popleft()
            self._num_reading += 1
            self._reader.submit(self._read, fetch, generation, self._prefixes.costs.computing(fetch.num_tokens))

    def _read(self, fetch: Fetch, generation: int, most_seconds: float | None) -> None:
        """In the reader's thread. What would take longer than computing it is left."""
        are_right: list[bool] = []
        wrong: list[tuple[bytes, int]] = []
        num_damaged = 0
        blocks = fetch.blocks
        begin = time.perf_counter()
        count = max(1, READ_BYTES // self.file.row_bytes)
        rows = np.empty((min(count, len(fetch.slots)), self.file.row_bytes), np.uint8)
        try:
            self.file.expect(fetch.slots)
            for i in range(0, len(fetch.slots), count):
                if most_seconds is not None and time.perf_counter() - begin > most_seconds:
                    break
                names = fetch.names[i : i + count]
                slots = fetch.slots[i : i + count]
                wanted = zip(slots, names, rows, strict=False)
                verdicts = [self.file.read(*it) for it in wanted]
                right = [place for place, verdict in enumerate(verdicts) if verdict == "right"]
                found = zip(names, slots, verdicts, strict=True)
                wrong += [(name, slot) for name, slot, verdict in found if verdict != "right"]
                num_damaged += verdicts.count("damaged")
                chosen = rows[: len(names)] if len(right) == len(names) else rows[right]
                self._rows.copy_in(self._bytes_in(chosen), [blocks[i + place] for place in right])
                are_right += [verdict == "right" for verdict in verdicts]
        except OSError as error:
            log.warning("%s can't be read: %s", self.file.path, error.strerror)
        except Exception:  # whatever it is, a request waits for an answer
            log.exception("%s can't be read", self.file.path)
        are_right += [False] * (len(fetch.slots) - len(are_right))
        self._finished.put(_Read(fetch, generation, are_right, wrong, num_damaged, time.perf_counter() - begin))
        os.write(self._bell, b".")

    def _take(self, read: _Read) -> tuple[Fetch, list[bool]]:
        self._num_reading -= 1
        if read.generation != self._generation:
            return read.fetch, [False] * len(read.are_right)
        num_read = sum(read.are_right)
        self._load_bytes += num_read * self._rows.block_bytes
        self._load_seconds += read.seconds
        if num_read:
            self._prefixes.costs.read(num_read, read.seconds)
        if read.num_damaged:
            self._num_damaged += read.num_damaged
            log.warning("%s: %d blocks are not what was written: they are left out", self.file.path, read.num_damaged)
        for name, slot in read.wrong:
            if self._index.slot_of(name) == slot:  # or it has been written elsewhere meanwhile
                self._index.discard(name)
        return read.fetch, read.are_right

    def _store(self, offered: Sequence[tuple[bytes, int]]) -> None:
        """Copy those blocks that hold what was offered, and have a thread write them."""
        find = self._prefixes.pool.find
        fresh = {name: block for name, block in offered if find(name) == block and self._index.slot_of(name) is None}
        room = 0 if self._is_broken else len(self._staging) - self._num_staged
        self._num_skipped += max(0, len(fresh) - room)
        self._clear_discarded()
        blocks: list[int] = []
        records: list[tuple[bytes, int, int]] = []
        for name, block in islice(fresh.items(), room):
            if (place := self._index.put(name)) is not None:
                blocks.append(block)
                records.append((name, *place))
        begin = 0
        while begin < len(blocks):
            rows = self._staging[self._next_row : self._next_row + len(blocks) - begin]
            self._next_row = (self._next_row + len(rows)) % len(self._staging)
            self._num_staged += len(rows)
            end = begin + len(rows)
            self._rows.copy_out(blocks[begin:end], self._bytes_in(rows))
            self._do(partial(self._write, rows, records[begin:end]))
            begin = end

    def _bytes_in(self, rows: Bytes) -> Bytes:
        """Of records, the blocks' own bytes."""
        return rows[:, HEAD.itemsize : HEAD.itemsize + self._rows.block_bytes]

    def _write(self, rows: Bytes, records: Sequence[tuple[bytes, int, int]]) -> None:
        """In the writer's thread. records: (name, slot, the index's number)."""
        begin = time.perf_counter()
        written = []
        try:
            for row, (name, slot, number) in zip(rows, records, strict=True):
                self.file.write(slot, name, row)
                written.append((name, number))
        finally:
            self._written.put(_Written(written, len(rows), time.perf_counter() - begin))

    def _settle(self) -> None:
        """Take what was written, and write the order of use now and then."""
        while not self._written.empty():
            done = self._written.get()
            self._num_staged -= done.num_rows
            self._store_bytes += len(done.names) * self._rows.block_bytes
            self._store_seconds += done.seconds
            for name, number in done.names:
                self._index.written(name, number)
        self._clear_discarded()
        if self._index.touched and time.monotonic() - self._stamped_at > STAMP_SECONDS:
            self._write_order()

    def _write_order(self) -> None:
        self._stamped_at = time.monotonic()
        places = [(slot, name) for name in self._index.touched if (slot := self._index.slot_of(name)) is not None]
        self._index.touched.clear()
        self._do(lambda: self.file.stamp(places))

    def _clear_discarded(self) -> None:
        if self._index.discarded:
            slots = list(self._index.discarded)
            self._index.discarded.clear()
            self._do(lambda: self.file.clear(slots))

    def _do(self, job: Callable[[], None]) -> None:
        """Have the writer's thread do something to the file, in order. After the first failure nothing is written."""
        self._writer.submit(self._try, job)

    def _try(self, job: Callable[[], None]) -> None:
        if self._is_broken:
            return
        try:
            job()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._is_broken = True
        log.warning("%s can't be written: %s; no further blocks are", self.file.path, error.strerror)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
