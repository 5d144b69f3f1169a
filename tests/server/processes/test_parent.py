"""What the process that has the engines tells servers: real engines without a model, and servers that the test is."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import fake_engine
import pytest
import uvloop

from octavo.runtime.launch import EngineProcess
from octavo.server.engine_client import EngineDeadError
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.limits import FleetLimits
from octavo.server.options import ListenOptions
from octavo.server.processes.engines import EnginesElsewhere, joined
from octavo.server.processes.launch import ServerProcess
from octavo.server.processes.parent import Parent
from octavo.server.processes.places import Places
from octavo.server.processes.words import (
    Beat,
    Drain,
    Drained,
    EngineDown,
    EngineUp,
    Pausing,
    Prepared,
    Serve,
    Stop,
    ToServer,
    Words,
)

NUM_SERVERS = 2
PATIENCE = 60.0  # seconds; not a measurement, only so that a hang is a failure


class Servers:
    """Processes that do nothing, in the place of servers; what they say and hear is the test's."""

    def __init__(self) -> None:
        self._processes: dict[int, ServerProcess] = {}
        self.words: dict[int, Words[ToServer]] = {}

    def start(self, number: int, _: int) -> ServerProcess:
        ours, theirs = socket.socketpair()
        self._processes[number] = ServerProcess(subprocess.Popen(["sleep", "600"]), ours)
        self.words[number] = Words(theirs, ToServer)
        return self._processes[number]

    async def hear(self, number: int, last: type[ToServer]) -> list[ToServer]:
        """What a server is told, up to a word of this kind; to beats it says that it lives."""
        heard: list[ToServer] = []
        while not heard or not isinstance(heard[-1], last):
            word = await self.words[number].hear()
            assert word is not None, heard
            if isinstance(word, Beat):
                self.words[number].say(word)
            else:
                heard.append(word)
        return heard

    async def end_of(self, number: int) -> int:
        """Wait for the end of a server's process, with which its socket closes; the exit code."""
        code = await asyncio.to_thread(self._processes[number].process.wait, PATIENCE)
        self.words[number].close()
        return code

    def end(self, number: int) -> None:
        self._processes[number].process.kill()
        self.words[number].close()


@dataclass
class Running:
    """A parent with one engine."""

    parent: Parent
    fleet: Fleet
    servers: Servers
    started: list[EngineProcess]
    serving: asyncio.Task[bool] | None = None

    def signal_engine(self, number: int) -> None:
        os.kill(self.started[-1].process.pid, number)


@asynccontextmanager
async def running(limits: FleetLimits, *, holds_new: bool = False, silence: float = PATIENCE) -> AsyncIterator[Running]:
    """holds_new: an engine that is started anew is stopped, as if it took long to load.

    silence: seconds after which a silent server is ended.
    """
    servers = Servers()
    with TemporaryDirectory(dir="/tmp") as directory:
        places = Places(directory, NUM_SERVERS)
        launcher = fake_engine.launcher(1, places.addresses)
        started = launcher.start_all()

        def start(index: int) -> EngineProcess:
            started.append(launcher.start(index))
            if holds_new:
                started[-1].process.send_signal(signal.SIGSTOP)
            return started[-1]

        fleet = Fleet(started[:], start, limits)
        processes = [servers.start(number, 0) for number in range(NUM_SERVERS)]
        parent = Parent(fleet, processes, servers.start, places, ListenOptions(engine_timeout=silence))
        parent.open()
        try:
            async with asyncio.timeout(PATIENCE):
                for words in servers.words.values():
                    await words.open()
                yield Running(parent, fleet, servers, started)
        finally:
            parent.kill()
            for number in range(NUM_SERVERS):
                servers.end(number)
            await asyncio.gather(*parent._lives)
            await fleet.close()


async def serving(one: Running) -> None:
    """Every server has prepared, and serves."""
    preparing = asyncio.create_task(one.parent.prepared(await one.fleet.ready()))
    for words in one.servers.words.values():
        words.say(Prepared())
    await preparing
    one.serving = asyncio.create_task(one.parent.serve())
    for number in range(NUM_SERVERS):
        await one.servers.hear(number, Serve)


def run(test: Callable[[], Awaitable[None]]) -> None:
    uvloop.run(test())  # type: ignore[arg-type]


def test_an_engine_s_death_while_servers_prepare_is_told() -> None:
    async def test() -> None:
        async with running(FleetLimits(restarts=0)) as one:
            preparing = asyncio.create_task(one.parent.prepared(await one.fleet.ready()))
            await one.servers.hear(0, EngineUp)
            one.signal_engine(signal.SIGKILL)
            *_, word = await one.servers.hear(0, EngineDown)
            assert isinstance(word, EngineDown)
            assert word.delay is None
            for number in range(NUM_SERVERS):
                one.servers.end(number)
            with pytest.raises(EngineDeadError, match="signal 9"):
                await preparing

    run(test)


def test_an_engine_that_dies_while_servers_prepare_comes_back() -> None:
    async def test() -> None:
        async with running(FleetLimits(first_restart=0.05)) as one:
            preparing = asyncio.create_task(one.parent.prepared(await one.fleet.ready()))
            await one.servers.hear(0, EngineUp)
            one.signal_engine(signal.SIGKILL)
            heard = await one.servers.hear(0, EngineUp)
            assert [type(word) for word in heard] == [EngineDown, EngineUp]
            preparing.cancel()

    run(test)


def test_servers_that_ask_for_one_drain_have_one_new_engine() -> None:
    async def test() -> None:
        async with running(FleetLimits()) as one:
            await serving(one)
            for words in one.servers.words.values():
                words.say(Drain(0))
            for number, words in one.servers.words.items():
                assert await one.servers.hear(number, Drain) == [Drain(0)]
                words.say(Drained(0))
            for number in range(NUM_SERVERS):
                assert [type(word) for word in await one.servers.hear(number, EngineUp)] == [EngineUp]
            assert len(one.started) == 2

    run(test)


def test_a_new_server_drains_no_engine_that_is_being_replaced() -> None:
    async def test() -> None:
        async with running(FleetLimits(), holds_new=True) as one:
            await serving(one)
            one.servers.words[0].say(Drain(0))
            for number, words in one.servers.words.items():
                await one.servers.hear(number, Drain)
                words.say(Drained(0))
            while len(one.started) == 1:
                await asyncio.sleep(0.01)
            before = one.servers.words[1]
            one.servers.end(1)
            while one.servers.words[1] is before:
                await asyncio.sleep(0.01)
            await one.servers.words[1].open()
            pausing, up, down, serve = await one.servers.hear(1, Serve)
            assert pausing == Pausing(is_paused=False, stands_still=False)
            assert isinstance(up, EngineUp)
            assert down == EngineDown(0, "engine 0 was drained, and is started again", 0.0)
            assert serve == Serve()
            one.signal_engine(signal.SIGCONT)
            assert [type(word) for word in await one.servers.hear(1, EngineUp)] == [EngineUp]

    run(test)


def test_a_server_that_is_silent_is_replaced_alone(caplog: pytest.LogCaptureFixture) -> None:
    """One that loads is silent too, and isn't."""

    async def test() -> None:
        async with running(FleetLimits(), silence=0.5) as one:
            await serving(one)
            living, silent = one.servers.words.values()
            hearing = asyncio.create_task(one.servers.hear(0, Stop))
            assert await one.servers.end_of(1) == -signal.SIGKILL
            while one.servers.words[1] is silent:
                await asyncio.sleep(0.01)
            assert "server process 1 is frozen or hangs: its event loop has not turned for 0.5 s" in caplog.text
            loading = one.servers.words[1]
            await asyncio.sleep(1.0)
            assert list(one.servers.words.values()) == [living, loading]
            hearing.cancel()

    run(test)


def test_a_server_that_starts_while_an_engine_is_down_waits_for_it() -> None:
    """It hears that the engine is down before it has taken part in anything."""

    async def test() -> None:
        with TemporaryDirectory(dir="/tmp") as directory:
            places = Places(directory, 1)
            launcher = fake_engine.launcher(1, places.addresses)
            ours, theirs = socket.socketpair()
            with ours, theirs:
                engines = EnginesElsewhere(Words(theirs, ToServer), places, 0, 1)
                fleet = engines.fleet = Fleet(engines.all(), engines.start, FleetLimits(), 0, engines.restarts)
                [process] = launcher.start_all()
                parent = Fleet([process], launcher.start)
                try:
                    async with asyncio.timeout(PATIENCE):
                        ready = await parent.ready()
                        engines.take(EngineUp(0, ready))
                        engines.take(EngineDown(0, "the engine process ended", 0.0))
                        joining = asyncio.create_task(joined(fleet))
                        await asyncio.sleep(0.1)
                        assert fleet.death is None
                        engines.take(EngineUp(0, ready))
                        assert await joining == ready
                finally:
                    await fleet.close()
                    await parent.close()

    run(test)
