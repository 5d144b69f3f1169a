"""The store of responses: what is found again, by whom, for how long, and what gives way."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from octavo.server.store import (
    MEMORY,
    ROW_BYTES,
    STOPPED,
    MissingError,
    ResponseStore,
    Stored,
    StoreError,
    prepare_shared,
)

Json = dict[str, Any]
FOREVER = 1e9


def response(name: str, previous: str | None = None, text: str = "") -> Json:
    return {"id": name, "status": "completed", "previous_response_id": previous, "output": [{"text": text}]}


def put(
    store: ResponseStore, name: str, previous: str | None = None, *, active: bool = False, text: str = ""
) -> Future[None]:
    return store.put("me", response(name, previous, text), [{"said": name}], [b"a: 1\n\n", b"b: 2\n\n"], active=active)


def get(store: ResponseStore, name: str, owner: str = "me") -> Stored:
    return asyncio.run(store.get(name, owner))


def names(store: ResponseStore, *asked: str) -> list[str]:
    """Those that are there. Asking is a use, so it changes what goes next."""
    found = []
    for name in asked:
        try:
            found.append(get(store, name).response["id"])
        except MissingError:
            continue
    return found


@pytest.fixture(params=["memory", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return MEMORY if request.param == "memory" else str(tmp_path / "responses.db")


@pytest.fixture
def store(place: str) -> Iterator[ResponseStore]:
    made = ResponseStore(place, 1 << 20, FOREVER)
    yield made
    made.close()


def test_what_is_put_is_found_by_its_owner_alone(store: ResponseStore) -> None:
    put(store, "a", text="Zürich")
    assert get(store, "a") == Stored(response("a", text="Zürich"), [{"said": "a"}])
    assert asyncio.run(store.events("a", "me")) == [b"a: 1\n\n", b"b: 2\n\n"]
    for ask in (store.get, store.events, store.conversation):
        with pytest.raises(MissingError):
            asyncio.run(ask("a", "you"))
    assert asyncio.run(store.delete("a", "you")) is False
    assert asyncio.run(store.delete("a", "me")) is True
    assert asyncio.run(store.delete("a", "me")) is False
    assert asyncio.run(store.size()) == (0, 0)


def test_a_conversation_is_told_from_its_beginning(store: ResponseStore) -> None:
    put(store, "a")
    put(store, "b", "a")
    put(store, "c", "b")
    assert [stored.response["id"] for stored in asyncio.run(store.conversation("c", "me"))] == ["a", "b", "c"]
    asyncio.run(store.delete("a", "me"))
    with pytest.raises(MissingError, match=r"^a$"):
        asyncio.run(store.conversation("c", "me"))


def sized(place: str, count: int) -> ResponseStore:
    """A store that has room for so many of the responses of `put`."""
    one = ResponseStore(MEMORY, 1 << 20, FOREVER)
    put(one, "a")
    _, size = asyncio.run(one.size())
    one.close()
    assert size > ROW_BYTES
    return ResponseStore(place, size * count + size // 2, FOREVER)


def test_what_was_used_longest_ago_gives_way(place: str) -> None:
    store = sized(place, 3)
    for name in "abc":
        put(store, name)
    get(store, "a")
    put(store, "d")
    assert names(store, "b", "c", "a", "d") == ["c", "a", "d"]
    put(store, "c")  # replaced, so nothing has to go
    assert names(store, "a", "c", "d") == ["a", "c", "d"]
    count, size = asyncio.run(store.size())
    assert (count, size <= store.max_bytes) == (3, True)
    store.close()


def test_a_conversation_s_beginning_outlives_its_end(place: str) -> None:
    store = sized(place, 3)
    put(store, "a")
    put(store, "b", "a")
    asyncio.run(store.conversation("b", "me"))
    put(store, "x")
    put(store, "y")
    assert names(store, "a", "b") == ["a"]
    store.close()


def test_what_still_runs_stays(place: str) -> None:
    store = sized(place, 2)
    for name in "abc":
        put(store, name, active=True)
    put(store, "d")
    assert names(store, "a", "b", "c", "d") == ["a", "b", "c"]
    for name in "abc":
        put(store, name)
    assert names(store, "a", "b", "c") == ["b", "c"]
    store.close()


def test_what_is_larger_than_the_store_drives_nothing_out(place: str, caplog: pytest.LogCaptureFixture) -> None:
    store = sized(place, 3)
    put(store, "a")
    with pytest.raises(StoreError, match="more than the store has"):
        put(store, "b", text="x" * 10_000).result()
    assert names(store, "a", "b") == ["a"]
    assert "could not be stored" in caplog.text
    store.close()


def test_what_is_not_used_expires(place: str) -> None:
    store = ResponseStore(place, 1 << 20, -1.0)  # everything is too old at once
    put(store, "a")
    with pytest.raises(MissingError):
        get(store, "a")
    put(store, "b", active=True)
    assert names(store, "b") == ["b"]
    assert asyncio.run(store.size())[0] == 1
    store.close()


def test_a_file_is_read_again_and_what_ran_has_failed(tmp_path: Path) -> None:
    place = str(tmp_path / "responses.db")
    store = ResponseStore(place, 1 << 20, FOREVER)
    put(store, "a")
    put(store, "b", active=True)
    size = asyncio.run(store.size())
    store.close()
    again = ResponseStore(place, 1 << 20, FOREVER)
    assert asyncio.run(again.size()) == size
    assert get(again, "a") == Stored(response("a"), [{"said": "a"}])
    failed = get(again, "b").response
    assert (failed["status"], failed["error"]["message"]) == ("failed", STOPPED)
    again.close()


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, but longer than the header of one: " + 100 * "x")
    with pytest.raises(StoreError, match=r"--response-store .*notes\.txt.*not a database"):
        ResponseStore(str(file), 1 << 20, FOREVER)
    with pytest.raises(StoreError, match="unable to open"):
        ResponseStore(str(tmp_path / "nowhere" / "file"), 1 << 20, FOREVER)
    newer = tmp_path / "newer.db"
    with sqlite3.connect(newer) as database:
        database.execute("PRAGMA user_version = 7")
    database.close()
    with pytest.raises(StoreError, match="format 7"):
        ResponseStore(str(newer), 1 << 20, FOREVER)


def test_a_file_serves_one_server(tmp_path: Path) -> None:
    place = str(tmp_path / "responses.db")
    store = ResponseStore(place, 1 << 20, FOREVER)
    put(store, "a")
    assert names(store, "a") == ["a"]
    with pytest.raises(StoreError, match="locked"):
        ResponseStore(place, 1 << 20, FOREVER)
    store.close()


def test_a_second_server_of_several_processes_leaves_what_runs(tmp_path: Path) -> None:
    place = str(tmp_path / "responses.db")
    lock = prepare_shared(place, 1 << 20, FOREVER)
    assert lock is not None
    store = ResponseStore(place, 1 << 20, FOREVER, ending="00")
    put(store, "a00", active=True).result()
    with pytest.raises(StoreError, match="another server"):
        prepare_shared(place, 1 << 20, FOREVER)
    assert get(store, "a00").response == response("a00")
    store.close()
    os.close(lock)
    with pytest.raises(StoreError, match=r"--response-store .*: No such file or directory"):
        prepare_shared(str(tmp_path / "nowhere" / "file"), 1 << 20, FOREVER)


def test_what_finds_no_room_beside_running_ones_is_told() -> None:
    store = ResponseStore(MEMORY, 8 * ROW_BYTES, FOREVER)
    put(store, "running", active=True, text="x" * 8 * ROW_BYTES).result()
    with pytest.raises(StoreError, match="still run"):
        put(store, "c").result()
    assert names(store, "running", "c") == ["running"]
    store.close()


@pytest.mark.parametrize("is_written", [False, True])
def test_a_run_that_is_cancelled_before_it_began_leaves_nothing(is_written: bool) -> None:
    """Cancelled while its record waits to be written, or while it is being written."""
    store = ResponseStore(MEMORY, 1 << 30, FOREVER)
    may_write = threading.Event()

    async def cancelled() -> tuple[int, int]:
        writer = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(store._thread, may_write.wait))
        beginning = asyncio.ensure_future(store.begin("me", response("a", text="x" * (64 << 20)), []))
        await asyncio.sleep(0)
        if is_written:
            may_write.set()
            while store._thread._work_queue.qsize():
                time.sleep(0)
        beginning.cancel()
        may_write.set()
        with pytest.raises(asyncio.CancelledError):
            await beginning
        await writer
        return await store.size()

    assert asyncio.run(cancelled()) == (0, 0)
    store.close()
