"""Of requests that come together only some begin in one turn of the loop, and what clients send is read in between."""

from __future__ import annotations

import asyncio
import socket

import pytest

from octavo.server import turns
from octavo.server.turns import AT_ONCE, Turns


def test_a_client_is_heard_while_others_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that can always be read tells of each turn of the loop how many had begun."""
    monkeypatch.setattr(turns, "SECONDS", 0.0)
    begun: list[int] = []
    heard: list[int] = []

    async def work(limit: Turns, number: int) -> None:
        await limit.next()
        begun.append(number)

    async def run() -> None:
        limit = Turns()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.send(b"x")
            asyncio.get_running_loop().add_reader(ours, lambda: heard.append(len(begun)))
            await asyncio.gather(*(work(limit, number) for number in range(10 * AT_ONCE)))

    asyncio.run(run())
    assert begun == list(range(10 * AT_ONCE))
    assert max(after - before for before, after in zip([0, *heard], heard, strict=False)) <= AT_ONCE


def test_what_has_time_begins_at_once() -> None:
    async def run() -> None:
        limit = Turns()
        waiting = limit.next()
        with pytest.raises(StopIteration):
            waiting.send(None)

    asyncio.run(run())


def test_who_is_gone_takes_nobody_s_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "SECONDS", 0.0)

    async def run() -> None:
        limit = Turns()
        waiting = [asyncio.ensure_future(limit.next()) for _ in range(3 * AT_ONCE)]
        await asyncio.sleep(0)
        for gone in waiting[1 : 2 * AT_ONCE]:
            gone.cancel()
        await asyncio.wait_for(asyncio.gather(*waiting[2 * AT_ONCE :]), 60)

    asyncio.run(run())
