"""The file that blocks of the prefix cache lie in, as bytes: its format, and what is right in it after any death.

Two files for each engine, engine-N.kv and engine-N.index, in a directory that nobody else may read. The former is
slots of equal size: a record is a head and a block's bytes, padded to whole pages, so that a slot is overwritten
without being read. The latter is a page that says what the blocks are of (JSON), and an entry for each slot: its
block's name, and a stamp that orders the slots by their last use. A record is written before its entry.

Nothing is believed that doesn't prove itself: a record's head has the checksum of its name and its bytes, so a write
that was cut short, a flipped bit, or an entry that names another record is found by whoever reads it. Blocks of
anything but what the page says are not looked at: then both files are begun anew. Writes go through `pwrite`, not a
mapping: a full disk is an error then, and not the process's death.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

FORMAT = 1
PAGE = 4096
NAME_BYTES = 40  # the longest name
HEAD = np.dtype([("length", "u1"), ("name", "u1", NAME_BYTES), ("pad", "V7"), ("checksum", "u1", 16)])  # of a record
ENTRY = np.dtype([("stamp", "<u8"), ("length", "u1"), ("name", "u1", NAME_BYTES), ("pad", "V15")])  # stamp 0: empty
LATEST = 1 << 62  # a stamp above it is damaged
LOCK_SECONDS = 10.0  # that an engine which is ending may take to let go of the file

Bytes = NDArray[np.uint8]
Verdict = Literal["right", "gone", "damaged"]


class BlockFileError(ValueError):
    """A directory that can't be used; the message is one line."""


class BlockFile:
    """The file of engine `number` in a directory, for blocks of block_bytes.

    description  what all blocks in it are of: one that says otherwise is begun anew
    max_bytes    of both files together
    found        (name, slot) of what lay in it, least recently used first
    note         a line for a person, where what was there is not used
    row_bytes    of a record: what `write` and `read` are given
    Raises BlockFileError. One thread may write while another one reads; a slot is never written and read at once.
    """

    def __init__(
        self, directory: Path, number: int, description: Mapping[str, Any], block_bytes: int, max_bytes: int
    ) -> None:
        self.note = ""
        self.path = directory / f"engine-{number}.kv"
        self._block_bytes = block_bytes
        self.row_bytes = -(-(HEAD.itemsize + block_bytes) // PAGE) * PAGE
        self.num_slots = (max_bytes - PAGE) // (self.row_bytes + ENTRY.itemsize)
        if self.num_slots < 1:
            least = PAGE + self.row_bytes + ENTRY.itemsize
            raise BlockFileError(f"{max_bytes:,} bytes hold no block of {block_bytes:,}; {least:,} are one")
        self._stamp = 0
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._data = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            self._lock()
            self._index = os.open(self.path.with_suffix(".index"), os.O_RDWR | os.O_CREAT, 0o600)
            self._page = _page_of(description)
            self._open()
            self.found = self._load()
        except OSError as error:
            raise BlockFileError(f"{error.filename or self.path}: {error.strerror}") from None

    def write(self, slot: int, name: bytes, row: Bytes) -> None:
        """Write a record, whose bytes stand in the row behind its head, and then its entry. Raises OSError."""
        head = np.zeros(1, HEAD)
        _put_name(head, name)
        head["checksum"] = np.frombuffer(self._checksum(name, row), np.uint8)
        row[: HEAD.itemsize] = head.view(np.uint8)
        _write_all(self._data, row, slot * self.row_bytes)
        self.stamp([(slot, name)])

    def read(self, slot: int, name: bytes, row: Bytes) -> Verdict:
        """Read a record into a row. "gone": the slot is another block's by now. Raises OSError."""
        count = os.preadv(self._data, [row.data], slot * self.row_bytes)
        if count < self.row_bytes:
            return "damaged"
        head = row[: HEAD.itemsize].view(HEAD)[0]
        if bytes(head["name"][: head["length"]]) != name:
            return "gone"
        return "right" if bytes(head["checksum"]) == self._checksum(name, row) else "damaged"

    def expect(self, slots: Iterable[int]) -> None:
        """These slots will be read soon: let the system begin to fetch them from its disk."""
        for slot in slots:
            os.posix_fadvise(self._data, slot * self.row_bytes, self.row_bytes, os.POSIX_FADV_WILLNEED)

    def stamp(self, slots: Iterable[tuple[int, bytes]]) -> None:
        """(slot, name): these are the ones that were used last, in this order. Raises OSError."""
        entry = np.zeros(1, ENTRY)
        for slot, name in slots:
            self._stamp += 1
            entry["stamp"] = self._stamp
            _put_name(entry, name)
            _write_all(self._index, entry.view(np.uint8), PAGE + slot * ENTRY.itemsize)

    def clear(self, slots: Iterable[int]) -> None:
        """Let nobody find what lies in these slots. Raises OSError."""
        empty = np.zeros(ENTRY.itemsize, np.uint8)
        for slot in slots:
            _write_all(self._index, empty, PAGE + slot * ENTRY.itemsize)

    def begin_anew(self, description: Mapping[str, Any] | None = None) -> None:
        """Empty both files; with a description, for blocks of something else. Raises OSError."""
        if description is not None:
            self._page = _page_of(description)
        os.ftruncate(self._index, 0)
        os.ftruncate(self._data, 0)
        _write_all(self._index, np.frombuffer(self._page, np.uint8), 0)

    def close(self) -> None:
        os.close(self._index)
        os.close(self._data)

    def _checksum(self, name: bytes, row: Bytes) -> bytes:
        digest = xxhash.xxh3_128(name)
        digest.update(row[HEAD.itemsize : HEAD.itemsize + self._block_bytes].data)
        return digest.digest()

    def _lock(self) -> None:
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._data, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise BlockFileError(f"{self.path} is in use by another engine") from None
                time.sleep(0.05)
            else:
                return

    def _open(self) -> None:
        """Begin anew unless all that lies there is of the same. What a smaller size leaves no room for is dropped."""
        there = os.pread(self._index, PAGE, 0)
        if there != self._page:
            if there:
                self.note = f"{self.path}: {_difference(there, self._page)}, so it is begun anew"
            self.begin_anew()
        sizes = ((self._index, PAGE + self.num_slots * ENTRY.itemsize), (self._data, self.num_slots * self.row_bytes))
        for descriptor, most in sizes:
            if os.fstat(descriptor).st_size > most:
                os.ftruncate(descriptor, most)

    def _load(self) -> list[tuple[bytes, int]]:
        """What the entries say. A name that stands twice, as after a death between two writes, is the later one's."""
        text = os.pread(self._index, self.num_slots * ENTRY.itemsize, PAGE)
        entries = np.frombuffer(text[: len(text) // ENTRY.itemsize * ENTRY.itemsize], ENTRY)
        order = np.argsort(entries["stamp"], kind="stable")
        filled = order[(entries["stamp"][order] > 0) & (entries["stamp"][order] < LATEST)]
        if len(filled):
            self._stamp = int(entries["stamp"][filled[-1]])
        names = entries["name"].tobytes()
        lengths = entries["length"].tolist()
        found: dict[bytes, int] = {}
        for slot in filled.tolist():
            name = names[slot * NAME_BYTES : slot * NAME_BYTES + lengths[slot]]
            found.pop(name, None)
            found[name] = slot
        return list(found.items())


def _page_of(description: Mapping[str, Any]) -> bytes:
    text = msgspec.json.encode({"format": FORMAT, **description})
    if len(text) >= PAGE:
        raise ValueError(f"a description of {len(text)} bytes: {PAGE - 1} are the most")
    return text.ljust(PAGE - 1) + b"\n"


def _difference(there: bytes, page: bytes) -> str:
    """In what a file is another one's."""
    try:
        said = msgspec.json.decode(there, type=dict[str, Any])
    except msgspec.DecodeError:
        return "its first page is damaged"
    wanted = msgspec.json.decode(page, type=dict[str, Any])
    keys = [key for key in wanted if said.get(key) != wanted[key]] or sorted(said.keys() - wanted.keys())
    return f"its blocks are of another {', '.join(keys)}"


def _put_name(entry: NDArray[Any], name: bytes) -> None:
    entry["length"] = len(name)
    entry["name"][0, : len(name)] = np.frombuffer(name, np.uint8)
    entry["name"][0, len(name) :] = 0


def _write_all(descriptor: int, data: Bytes, offset: int) -> None:
    count = os.pwrite(descriptor, data.data, offset)
    if count < len(data):  # a disk that is full, or a limit of the process
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
