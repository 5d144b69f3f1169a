"""Responses that can be asked for again: in memory or in a file, within a limit of bytes and of time.

It is SQLite in both cases, used by one thread: writes are queued and never waited for on the event loop. What was used
longest ago goes first when there is too much; a conversation's beginning counts as used whenever its end is. What still
runs stays, however much there is. A response is found only under the owner that it was stored for.

Several processes of one server share a file: each piece of work is a transaction then.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec

logger = logging.getLogger(__name__)

OFF = "off"
MEMORY = "memory"
ROW_BYTES = 512  # that a response takes beside its contents, about
FORMAT = 1  # of the file
STOPPED = "the server ended while this response was being made"

Json = dict[str, Any]
T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, previous TEXT, active INTEGER NOT NULL, used INTEGER NOT NULL,
    expires REAL NOT NULL, size INTEGER NOT NULL, response BLOB NOT NULL, input BLOB NOT NULL, events BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON responses (active, used);
CREATE INDEX IF NOT EXISTS by_time ON responses (active, expires);
"""
_SHARED_SCHEMA = "CREATE INDEX IF NOT EXISTS by_size ON responses (size);"  # their sum is asked for with each work
_SIZE = "SELECT coalesce(sum(size), 0) FROM responses"
LOCK_SECONDS = 30.0  # that a process waits for what another one writes


class StoreError(RuntimeError):
    """The store can't be used, or can't keep this; the message says why."""


class MissingError(LookupError):
    """There is no such response; the message is its id."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A response as it was answered, and the items that its own request brought."""

    response: Json
    input: list[Json]


class ResponseStore:
    """Use its async methods from any event loop; `put` from anywhere."""

    def __init__(self, place: str, max_bytes: int, seconds: float, ending: str | None = None) -> None:
        """place: a file, or `memory`. seconds: how long what is not used is kept. Raises StoreError.

        ending: where several processes share the file, the end of the ids of those responses that this one makes.
        """
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._ending = ending
        self._thread = ThreadPoolExecutor(1, "octavo-store")
        path = ":memory:" if place == MEMORY else place
        try:
            self._database = self._thread.submit(_open, path, is_shared=ending is not None).result()
            self._size = self._thread.submit(self._recover).result()
        except (sqlite3.Error, OSError) as error:
            self._thread.shutdown()
            raise StoreError(f"--response-store {place!r}: {error}") from None
        self._clock = self._thread.submit(self._last_use).result()

    @property
    def max_bytes(self) -> int:
        """How much it keeps."""
        return self._max_bytes

    def put(
        self, owner: str, response: Json, own_input: list[Json], events: list[bytes], *, active: bool
    ) -> Future[None]:
        """Keep a response, in place of what is there under its id. active: it is still running, so it stays.

        It is there for whoever asks from now on, and written when the future is done, which raises StoreError where
        that failed. Nothing is there under its id then.
        """
        contents = msgspec.json.encode(response), msgspec.json.encode(own_input)
        previous = response.get("previous_response_id")
        put = partial(self._put, response["id"], owner, previous, contents, events, active)
        done = self._thread.submit(self._translated, put)
        done.add_done_callback(_log_failure)
        return done

    async def begin(self, owner: str, response: Json, own_input: list[Json]) -> None:
        """Keep a response that is about to run, and is there when this returns. Raises StoreError.

        Where this is cancelled nothing is kept: nobody would make the response, and as it runs it would stay for ever.
        """
        done = self.put(owner, response, own_input, [], active=True)
        try:
            await asyncio.shield(asyncio.wrap_future(done))
        except asyncio.CancelledError:
            self._thread.submit(self._translated, partial(self._delete, response["id"], owner))
            raise

    async def get(self, response_id: str, owner: str) -> Stored:
        """Raises MissingError, and as all that follow StoreError."""
        return await self._do(lambda: self._get(response_id, owner))

    async def conversation(self, response_id: str, owner: str) -> list[Stored]:
        """This response behind all those that it goes on from, the first one first. Raises MissingError."""
        return await self._do(lambda: self._conversation(response_id, owner))

    async def events(self, response_id: str, owner: str) -> list[bytes]:
        """The events of a response that has ended. Raises MissingError."""
        return await self._do(lambda: self._events(response_id, owner))

    async def delete(self, response_id: str, owner: str) -> bool:
        """Whether it was there."""
        return await self._do(lambda: self._delete(response_id, owner))

    async def size(self) -> tuple[int, int]:
        """How many responses there are, and their bytes."""
        return await self._do(lambda: (self._count(), self._size))

    def close(self) -> None:
        """Write what is queued, and close the file."""
        self._thread.submit(self._database.close)
        self._thread.shutdown()

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._translated, work)

    # in the store's own thread

    def _translated(self, work: Callable[[], T]) -> T:
        """The result of this work on the database. Raises StoreError."""
        try:
            return work() if self._ending is None else self._alone(work)
        except sqlite3.Error as error:
            raise StoreError(f"{error} (--response-store)") from error

    def _alone(self, work: Callable[[], T]) -> T:
        """The result of work that no other process disturbs, and that goes on from what they have done."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            self._size = self._total()
            self._clock = self._last_use()
            result = work()
        except StoreError:
            self._database.execute("COMMIT")  # it is about what was to be kept; what gave way for it is gone
            raise
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")
        return result

    def _recover(self) -> int:
        """The bytes that are there. What ran when the server, or this process's predecessor, ended has failed."""
        running = self._database.execute("SELECT id, response FROM responses WHERE active").fetchall()
        for response_id, content in running:
            if not response_id.endswith(self._ending or ""):
                continue
            response = msgspec.json.decode(content)
            response |= {"status": "failed", "error": {"code": "server_error", "message": STOPPED}}
            values = msgspec.json.encode(response), response_id
            self._database.execute("UPDATE responses SET active = 0, response = ? WHERE id = ?", values)
        return self._total()

    def _total(self) -> int:
        size: int = self._database.execute(_SIZE).fetchone()[0]
        return size

    def _last_use(self) -> int:
        by_state = "SELECT coalesce(max(used), 0) FROM responses WHERE active = ?"  # the index `by_use` tells
        last: int = max(self._database.execute(by_state, (active,)).fetchone()[0] for active in (0, 1))
        return last

    def _count(self) -> int:
        count: int = self._database.execute("SELECT count(*) FROM responses").fetchone()[0]
        return count

    def _put(
        self,
        response_id: str,
        owner: str,
        previous: str | None,
        contents: tuple[bytes, bytes],
        events: list[bytes],
        active: bool,
    ) -> None:
        packed = zlib.compress(b"".join(events), 1)
        size = sum(map(len, contents)) + len(packed) + ROW_BYTES
        self._drop(response_id)
        if size > self._max_bytes and not active:
            raise StoreError(f"its {size} bytes are more than the store has (--response-store-size)")
        self._clock += 1
        row = response_id, owner, previous, active, self._clock, time.time() + self._seconds, size, *contents, packed
        self._database.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        self._size += size
        self._evict()
        if not self._has(response_id):
            raise StoreError("responses that still run take all of the store (--response-store-size)")

    def _has(self, response_id: str) -> bool:
        return self._database.execute("SELECT 1 FROM responses WHERE id = ?", (response_id,)).fetchone() is not None

    def _evict(self) -> None:
        """Drop what is too old, and what was used longest ago until the rest fits."""
        expired = "SELECT id FROM responses WHERE NOT active AND expires < ?"
        for (response_id,) in self._database.execute(expired, (time.time(),)).fetchall():
            self._drop(response_id)
        while self._size > self._max_bytes:
            oldest = "SELECT id FROM responses WHERE active = 0 ORDER BY used LIMIT 1"
            found = self._database.execute(oldest).fetchone()
            if found is None:
                return
            self._drop(found[0])

    def _drop(self, response_id: str) -> bool:
        found = self._database.execute("DELETE FROM responses WHERE id = ? RETURNING size", (response_id,)).fetchall()
        self._size -= sum(size for (size,) in found)
        return bool(found)

    def _row(self, columns: str, response_id: str, owner: str) -> Any:
        query = f"SELECT {columns} FROM responses WHERE id = ? AND owner = ? AND (active OR expires >= ?)"
        found = self._database.execute(query, (response_id, owner, time.time())).fetchone()
        if found is None:
            raise MissingError(response_id)
        self._clock += 1
        values = self._clock, time.time() + self._seconds, response_id
        self._database.execute("UPDATE responses SET used = ?, expires = ? WHERE id = ?", values)
        return found

    def _get(self, response_id: str, owner: str) -> Stored:
        response, own_input = self._row("response, input", response_id, owner)
        return Stored(msgspec.json.decode(response), msgspec.json.decode(own_input))

    def _conversation(self, response_id: str, owner: str) -> list[Stored]:
        found: list[Stored] = []
        following: str | None = response_id
        while following is not None:
            found.append(self._get(following, owner))
            following = found[-1].response["previous_response_id"]
        return found[::-1]

    def _events(self, response_id: str, owner: str) -> list[bytes]:
        (packed,) = self._row("events", response_id, owner)
        pieces = zlib.decompress(packed).split(b"\n\n")
        return [piece + b"\n\n" for piece in pieces if piece]

    def _delete(self, response_id: str, owner: str) -> bool:
        owned = "SELECT 1 FROM responses WHERE id = ? AND owner = ?"
        is_there = self._database.execute(owned, (response_id, owner)).fetchone() is not None
        return is_there and self._drop(response_id)


def prepare_shared(place: str, max_bytes: int, seconds: float) -> int | None:
    """Make the file of responses ready for several processes of one server: what ran in it has failed.

    Returns a descriptor which keeps other servers of several processes away; None where there is no file. Raises
    StoreError.
    """
    if place in (MEMORY, OFF):
        return None
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreError(f"--response-store {place!r}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StoreError(f"--response-store {place!r}: another server keeps its responses there") from None
    ResponseStore(place, max_bytes, seconds, ending="").close()
    return descriptor


def _open(path: str, *, is_shared: bool) -> sqlite3.Connection:
    """The database, for this thread alone, and unless it is shared for this process alone."""
    database = sqlite3.connect(path, timeout=LOCK_SECONDS if is_shared else 1.0, isolation_level=None)
    if not is_shared:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    found = database.execute("PRAGMA user_version").fetchone()[0]
    if found not in (0, FORMAT):
        raise sqlite3.DatabaseError(f"the file is of format {found}, and this version of octavo knows format {FORMAT}")
    database.executescript(_SCHEMA)
    if is_shared:
        database.executescript(_SHARED_SCHEMA)
    database.execute(f"PRAGMA user_version = {FORMAT}")
    return database


def _log_failure(done: Future[None]) -> None:
    if (error := done.exception()) is not None:
        logger.error("a response could not be stored: %s", error)
