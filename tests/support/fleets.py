"""Fleets over engines without a model (fake_engine.py), and what their tests ask of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from octavo.runtime.launch import EngineProcess
from octavo.runtime.messages import AddRequest, SamplingParams, TokenOutput, Vocabulary
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.limits import FleetLimits
from octavo.server.fleet.stream import Stream

QUICK = FleetLimits(silence=60.0, first_restart=0.05)
PATIENCE = 120.0  # seconds; not a measurement, only so that a hang is a failure
VOCABULARY = Vocabulary([b"a"], [], [0], "{}")


@asynccontextmanager
async def fleet_of(
    engines: list[EngineProcess], start: Callable[[int], EngineProcess], limits: FleetLimits = QUICK
) -> AsyncIterator[Fleet]:
    """A fleet that is ready, for as long as the block lasts. start: starts an engine again."""
    fleet = Fleet(engines, start, limits)
    try:
        async with asyncio.timeout(PATIENCE):
            await fleet.ready()
            yield fleet
    finally:
        await fleet.close()


def request(name: str, prompt: list[int] | None = None, **params: object) -> AddRequest:
    settings = {"max_tokens": 40, "temperature": 0.0} | params
    return AddRequest(name, prompt or [len(name), 7], SamplingParams(**settings), 0.0)  # type: ignore[arg-type]


async def outputs_of(stream: Stream, num_answers: int = 1) -> list[TokenOutput]:
    """All of them, to the end of each answer."""
    found: list[TokenOutput] = []
    while sum(output.finish_reason is not None for output in found) < num_answers:
        found += await stream.next()
    return found


async def answer(fleet: Fleet, asked: AddRequest) -> list[int]:
    async with fleet.open([asked]) as stream:
        return tokens_of(await outputs_of(stream))


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def num_tokens(fleet: Fleet) -> int:
    """Of all answers that are open."""
    return sum(len(one.tokens) for one in fleet._open.values())


def pids(fleet: Fleet) -> list[int]:
    return [member.client._engine.process.pid for member in fleet.members]


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.005)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]
