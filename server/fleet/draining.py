"""One engine after the other is replaced by a new process, without a request that ends for it."""

from __future__ import annotations

import asyncio

from octavo.server.fleet.fleet import POLL_SECONDS, Fleet


async def drain(fleet: Fleet, index: int) -> None:
    """Give an engine no more requests, wait until it has none, and replace its process by a new one.

    Whoever asks for it meanwhile waits for the same new process.
    """
    member = fleet.members[index]
    if member.is_draining or not member.is_up:
        while member.is_draining:
            await asyncio.sleep(POLL_SECONDS)
        return
    member.is_draining = True
    fleet.on_drain(index)
    try:
        while member.num_answers and member.is_up:
            await asyncio.sleep(POLL_SECONDS)
        if member.is_up and fleet.refusal is None:
            member.go_down(f"engine {index} was drained, and is started again")
            await fleet.replace(member, 0.0)
    finally:
        member.is_draining = False
        fleet.chooser.resume(member)
        fleet.place()
