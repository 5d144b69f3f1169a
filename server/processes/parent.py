"""The process that starts the engines and several server processes of one port, and serves nothing itself.

It alone decides about restarts, of engines as of server processes, and tells the servers. An engine's death costs
requests a pause, as it does with one server process. A server process's death cuts its streams; the others go on, the
engines drop what it had asked for, and another process takes its place. One that is frozen, or whose event loop hangs,
is killed. Signals come here, and are passed on.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from types import FrameType

import msgspec

from octavo.runtime.launch import how_it_ended
from octavo.runtime.messages import AbandonServer, Ready
from octavo.runtime.shared_link import server_name
from octavo.server.engine_client import EngineDeadError
from octavo.server.fleet.collector import FleetCounters
from octavo.server.fleet.draining import drain
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.restarts import Restarts
from octavo.server.heartbeat import BEATS
from octavo.server.lifecycle import DRAINING, LAST_WORDS_SECONDS, EngineStartError, Signals, StepLog, all_ready
from octavo.server.listen_sockets import Listener, listen
from octavo.server.message.model_formats import ModelFormats
from octavo.server.metrics import Metrics
from octavo.server.options import ListenOptions
from octavo.server.processes.board import Board
from octavo.server.processes.figures import ProcessFigures
from octavo.server.processes.launch import ServerProcess, ServerStartError
from octavo.server.processes.places import Places
from octavo.server.processes.words import (
    AdaptersServed,
    Beat,
    Drain,
    Drained,
    EngineDown,
    EngineUp,
    Pausing,
    Prepared,
    Serve,
    Stop,
    ToParent,
    ToServer,
    Unable,
    Words,
)
from octavo.server.template_renderer import TemplateRenderer

logger = logging.getLogger(__name__)

RESTARTS = 10  # of each server process, in ten minutes
FIRST_RESTART_SECONDS = 0.1
COUNT_SECONDS = 0.5
END_SECONDS = 5.0  # for a server process to end once it has nothing under way


class Server:
    """The place of one server process, through all of its processes.

    generation: how many came before this one. num_missed: beats in a row that it has not answered.
    """

    def __init__(self, number: int, process: ServerProcess) -> None:
        self.number = number
        self.generation = 0
        self.restarts = Restarts(RESTARTS, FIRST_RESTART_SECONDS)
        self.take(process)

    def take(self, process: ServerProcess) -> None:
        """Have this process from now on."""
        self.process = process
        self.words: Words[ToParent] = Words(process.link, ToParent)
        self.is_running = True
        self.is_prepared = asyncio.Event()
        self.num_missed = 0
        self.trouble = ""

    def beat(self) -> None:
        """Ask it for a sign of life, once it has started."""
        if self.is_running and self.is_prepared.is_set():
            self.num_missed += 1
            self.words.say(Beat())

    def end_if_silent(self, seconds: float) -> None:
        """Kill its process when that has been silent for all of the beats in so many seconds."""
        if self.is_running and self.num_missed >= BEATS:
            self.trouble = (
                f"server process {self.number} is frozen or hangs: its event loop has not turned for {seconds:g} s "
                "(--engine-timeout)"
            )
            self.process.process.kill()


class Parent:
    """All server processes. start: starts one anew, of a number and a generation."""

    def __init__(
        self,
        client: Fleet,
        processes: list[ServerProcess],
        start: Callable[[int, int], ServerProcess],
        places: Places,
        options: ListenOptions,
    ) -> None:
        self._client = client
        self._start = start
        self._places = places
        self._options = options
        self._servers = [Server(number, process) for number, process in enumerate(processes)]
        self._engines: list[EngineDown | None] = [None] * len(client.members)
        self._readies: list[Ready] = []
        self._drained: dict[int, set[int]] = {}  # by engine that drains: which servers have nothing of it any more
        self._pausing = Pausing(is_paused=False, stands_still=False)
        self._adapters: AdaptersServed | None = None
        self._serves = False
        self._is_stopping = False
        self._lives: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Begin to listen to the server processes."""
        self._lives = [asyncio.ensure_future(self._live(server)) for server in self._servers]

    async def prepared(self, ready: Ready) -> None:
        """Let the servers have the engines, and wait until each could serve.

        Raises EngineDeadError, and ServerStartError where it is a server that can't.
        """
        self._client.on_down = self._engine_is_down
        self._client.on_up = self.engine_is_up
        lengths = {"max_model_len": ready.max_model_len}
        self._readies = [msgspec.structs.replace(one, **lengths) for one in self._client.readies]
        for server in self._servers:
            self._tell_engines(server)
        waiting = asyncio.ensure_future(self._all_prepared())
        await asyncio.wait((waiting, *self._lives), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            if self._client.death is not None:
                raise EngineDeadError(self._client.death)
            raise ServerStartError(next(server.trouble for server in self._servers if not server.is_running))

    async def _all_prepared(self) -> None:
        for server in self._servers:
            await server.is_prepared.wait()

    async def serve(self) -> bool:
        """Let the servers serve until all of them have ended. Returns whether that was asked for."""
        self._serves = True
        for server in self._servers:
            server.words.say(Serve())
        watching = asyncio.ensure_future(self._watch())
        try:
            await asyncio.gather(*self._lives)
        finally:
            watching.cancel()
        return self._is_stopping

    async def _watch(self) -> None:
        """End server processes that are silent. Beats are counted as those of engines are (heartbeat.py)."""
        seconds = self._options.engine_timeout
        while True:
            for server in self._servers:
                server.beat()
            await asyncio.sleep(seconds / BEATS)
            for server in self._servers:
                server.end_if_silent(seconds)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (uvicorn's)
        """A signal has come."""
        if not self._is_stopping:
            self._is_stopping = True
            self._client.refuse(DRAINING)
            limit = self._options.shutdown_timeout + LAST_WORDS_SECONDS + END_SECONDS
            asyncio.get_running_loop().call_later(limit, self.kill)
        self._tell_all(Stop(sig))

    def end_without_engine(self) -> None:
        """No engine is left: the servers know, and end by themselves, unless they are to go on without."""
        logger.error("%s", self._client.death)

    def engine_is_up(self, index: int) -> None:
        """An engine has been started again."""
        self._engines[index] = None
        self._tell_all(EngineUp(index, self._readies[index]))

    def kill(self) -> None:
        """End all server processes that are left."""
        self._is_stopping = True
        for server in self._servers:
            server.process.kill()

    async def count(self, metrics: Metrics, counters: FleetCounters, figures: ProcessFigures) -> None:
        """Keep what is counted here up to date."""
        while True:
            counters.take()
            metrics.settle()
            figures.take([os.getpid(), *(server.process.process.pid for server in self._servers if server.is_running)])
            await asyncio.sleep(COUNT_SECONDS)

    def _engine_is_down(self, index: int, message: str, delay: float | None) -> None:
        self._engines[index] = EngineDown(index, message, delay)
        self._drained.pop(index, None)
        self._tell_all(EngineDown(index, message, delay))

    def _tell_all(self, word: ToServer) -> None:
        for server in self._servers:
            if server.is_running:
                server.words.say(word)

    def _tell_engines(self, server: Server) -> None:
        """How all engines are, for a server process that knows nothing yet."""
        server.words.say(self._pausing)
        if self._adapters is not None:
            server.words.say(self._adapters)
        for index, ready in enumerate(self._readies):
            server.words.say(EngineUp(index, ready))
            member = self._client.members[index]
            if (down := self._engines[index]) is not None:
                server.words.say(down)
            elif not member.is_up:  # all have let go of it, and it is being replaced
                server.words.say(EngineDown(index, member.trouble, None if member.is_lost else 0.0))
            elif index in self._drained:
                server.words.say(Drain(index))

    async def _live(self, server: Server) -> None:
        """A server's place: listen to its process; where that ends, start another one, if there may be one."""
        while True:
            await server.words.open()
            while (word := await server.words.hear()) is not None:
                self._take(server, word)
            code = await asyncio.to_thread(server.process.process.wait)
            server.words.close()
            server.is_running = False
            if self._is_stopping or self._client.death is not None:
                return
            server.trouble = server.trouble or f"server process {server.number} ended ({how_it_ended(code)})"
            if not self._serves or not await self._replace(server):
                return

    async def _replace(self, server: Server) -> bool:
        """Start a process in a dead one's place, after a while; whether there is one."""
        self._forget(server)
        delay = server.restarts.next_delay()
        if delay is None:
            logger.error("%s too often, and is not started again", server.trouble)
            return False
        logger.error("%s: its streams are cut, and another one is started in %g s", server.trouble, delay)
        await asyncio.sleep(delay)
        if self._is_stopping:
            return False
        server.generation += 1
        try:
            server.take(self._start(server.number, server.generation))
        except OSError as error:
            logger.error("server process %d could not be started again: %s", server.number, error)
            return False
        self._tell_engines(server)
        server.words.say(Serve())
        return True

    def _forget(self, server: Server) -> None:
        """What a dead process had under way is no more."""
        Board(self._places.board, self._places.num_servers, server.number)
        for member in self._client.members:
            if member.is_up:
                member.client.send(AbandonServer(server_name(server.number, server.generation)))
        for index in list(self._drained):
            self._count_drained(index)

    def _take(self, server: Server, word: ToParent) -> None:
        match word:
            case Prepared():
                server.is_prepared.set()
                if server.generation:
                    logger.info("server process %d is up again", server.number)
            case Beat():
                server.num_missed = 0
            case Pausing():
                self._pausing = word
            case AdaptersServed():
                self._adapters = word
            case Unable():
                server.trouble = word.message
            case Drain(index):
                if index not in self._drained and self._client.members[index].is_up:
                    self._drained[index] = set()
                    self._tell_all(word)
            case Drained(index):
                if index in self._drained:  # else it has died meanwhile
                    self._drained[index].add(server.number)
                    self._count_drained(index)

    def _count_drained(self, index: int) -> None:
        """Replace an engine that no server process has anything of."""
        if self._drained[index] >= {server.number for server in self._servers if server.is_running}:
            del self._drained[index]
            task = asyncio.get_running_loop().create_task(drain(self._client, index))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


async def serve_with_processes(
    open_fleet: Callable[[], Fleet],
    make_parent: Callable[[Fleet], Parent],
    renderer: TemplateRenderer,
    prepare: Callable[[Fleet], Awaitable[ModelFormats]],
    report: Callable[[Fleet, Ready, ModelFormats], tuple[Metrics, FleetCounters]],
    listener: Listener,
    options: ListenOptions,
) -> bool:
    """Serve until told to stop. Returns whether it was that, and no death, that ended it.

    report makes the metrics that this process counts, and says what has been loaded. Raises EngineStartError,
    ServerStartError, BindError, and ChatTemplateError for a template that can't be compiled.
    """
    client = open_fleet()
    parent = make_parent(client)
    stop = Signals()
    ticking: list[asyncio.Task[None]] = []
    try:
        parent.open()
        formats = asyncio.ensure_future(prepare(client))

        async def all_prepared() -> None:
            await all_ready(client, formats)
            await parent.prepared(await client.ready())

        if await stop.comes_before(all_prepared()):
            return True
        metrics, counters = report(client, await client.ready(), formats.result())
        renderer.stop(DRAINING)
        log = StepLog(metrics, client)
        client.on_step = metrics.step if options.disable_log_stats else log.step
        figures = ProcessFigures(metrics.registry)
        ticking = [
            asyncio.create_task(log.tick_forever()),
            asyncio.create_task(parent.count(metrics, counters, figures)),
        ]
        client.on_restart = metrics.restart
        client.on_death = parent.end_without_engine
        stop.server = parent
        listen(listener.socket)
        logger.info("serving on %s", listener.url)
        was_asked = await parent.serve()
        return was_asked and client.death is None
    except EngineDeadError as error:
        raise EngineStartError(str(error)) from error
    finally:
        for task in ticking:
            task.cancel()
        await asyncio.to_thread(parent.kill)
        await client.close()
        renderer.stop(DRAINING)
