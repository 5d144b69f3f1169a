"""A server process's view of engines that its parent has started: the parent's words, told to the fleet."""

from __future__ import annotations

import asyncio

from octavo.runtime.launch import EngineElsewhere
from octavo.runtime.messages import Ready
from octavo.server.engine_client import EngineDeadError
from octavo.server.fleet.draining import drain
from octavo.server.fleet.fleet import Fleet
from octavo.server.processes.places import Places
from octavo.server.processes.words import Drained, EngineDown, EngineUp, ToServer, Words

POLL_SECONDS = 0.02


async def joined(fleet: Fleet) -> Ready:
    """Take part where others start the engines: wait until one is up. Raises EngineDeadError if none will be."""
    for member in fleet.members:
        fleet.spawn(fleet.welcome(member))
    while fleet.death is None:
        if ready := next((member.ready for member in fleet.members if member.is_up), None):
            return ready
        await asyncio.sleep(POLL_SECONDS)
    raise EngineDeadError(fleet.death)


class TheirRestarts:
    """The parent decides, and has said so."""

    delay: float | None = 0.0

    def next_delay(self) -> float | None:
        """What it has said last."""
        return self.delay


class EnginesElsewhere:
    """All engines of the server. Use from one event loop only. fleet: the one that they are for; set it at once."""

    fleet: Fleet

    def __init__(self, words: Words[ToServer], places: Places, number: int, num_engines: int) -> None:
        self._words = words
        self._places = places
        self._number = number
        self._latest: list[EngineUp | EngineDown | None] = [None] * num_engines
        self._restarts = [TheirRestarts() for _ in range(num_engines)]
        self._draining: set[asyncio.Task[None]] = set()

    def all(self) -> list[EngineElsewhere]:
        """The way to each of them."""
        return [self._way_to(index) for index in range(len(self._latest))]

    def restarts(self, index: int) -> TheirRestarts:
        """Who decides about an engine's restarts."""
        return self._restarts[index]

    def start(self, index: int) -> EngineElsewhere:
        """The way to the engine's next process, which the parent starts, as soon as a drained one is let go of here."""
        if isinstance(self._latest[index], EngineUp) and self.fleet.members[index].is_draining:
            self._latest[index] = None
            self._words.say(Drained(index))
        asyncio.get_running_loop().call_soon(self._tell, index)  # by then the fleet has a client for it
        return self._way_to(index)

    def take(self, word: EngineUp | EngineDown) -> None:
        """Something has become of an engine."""
        index = word.index
        self._latest[index] = word
        if isinstance(word, EngineUp):
            self.fleet.members[index].ready = word.ready
            self._tell(index)
        else:
            self._restarts[index].delay = word.delay
            self.fleet.members[index].client.end(word.message)

    def drain(self, index: int) -> None:
        """Another process has been asked to have this engine drained."""
        if not self.fleet.members[index].is_draining:
            task = asyncio.get_running_loop().create_task(self._drain(index))
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)

    async def _drain(self, index: int) -> None:
        """Once this process has met the engine, unless that has died by then."""
        before = self._latest[index]
        while not self.fleet.members[index].is_up:
            await asyncio.sleep(POLL_SECONDS)
            if self._latest[index] is not before:
                return
        await drain(self.fleet, index)

    def _tell(self, index: int) -> None:
        """Let the fleet's client know how the engine is, if that has been said before there was this client."""
        client = self.fleet.members[index].client
        match self._latest[index]:
            case EngineUp() as up if client.death is None:
                client.come_up(up.ready)
            case EngineDown(message=message, delay=None):
                client.end(message)

    def _way_to(self, index: int) -> EngineElsewhere:
        return EngineElsewhere(self._places.address(self._number, index))


def named_seed(seed: int, number: int, generation: int) -> int:
    """The seed of a server process's own draws: requests without a seed must not draw alike in two of them."""
    return seed + ((number + 1) << 40) + (generation << 56)
