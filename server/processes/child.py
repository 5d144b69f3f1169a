"""The life of one of several server processes: it serves as a single one does; engines and signals are its parent's.

It listens on the socket that all share, whose connections go to whoever accepts them first, and on a Unix socket of its
own for what others hand over (home.py). It ends when its parent does.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from shutil import rmtree

from fastapi import FastAPI

from octavo.collector import settled
from octavo.runtime.messages import Ready
from octavo.server.engine_client import EngineDeadError
from octavo.server.fleet.fleet import Fleet
from octavo.server.lifecycle import DRAINING, DrainingServer, uvicorn_config
from octavo.server.listen_sockets import Listener, handles, reserve_path
from octavo.server.lora_options import LoraModule
from octavo.server.message.model_formats import ModelFormats
from octavo.server.options import ListenOptions
from octavo.server.processes.board import Board
from octavo.server.processes.engines import EnginesElsewhere, joined
from octavo.server.processes.home import Homes
from octavo.server.processes.places import Places
from octavo.server.processes.words import (
    AdaptersServed,
    Beat,
    Drain,
    EngineDown,
    EngineUp,
    Pausing,
    Prepared,
    Serve,
    Stop,
    ToServer,
    Unable,
    Words,
)
from octavo.server.template_renderer import TemplateRenderer
from octavo.text.chat_template import ChatTemplateError

PUBLISH_SECONDS = 0.5  # between two looks at what only now and then changes


@dataclass(frozen=True)
class Ways:
    """How a child is made of what is its own. make_fleet: for the engines that the parent tells of.

    make_app: with what brings its counters up to date, which other processes read. modules: adapters served at start.
    """

    make_fleet: Callable[[EnginesElsewhere], Fleet]
    prepare: Callable[[], Awaitable[ModelFormats]]
    make_app: Callable[[Fleet, Ready, ModelFormats], tuple[FastAPI, Callable[[], None]]]
    max_body: int
    modules: tuple[LoraModule, ...]


class Child:
    """One server process. `number` is its place among the others, which a successor takes over."""

    def __init__(
        self, words: Words[ToServer], places: Places, number: int, num_engines: int, options: ListenOptions
    ) -> None:
        self._words = words
        self._places = places
        self._number = number
        self._options = options
        self._engines = EnginesElsewhere(words, places, number, num_engines)
        self._may_serve = asyncio.Event()
        self._server: DrainingServer | None = None
        self._adapters: AdaptersServed | None = None

    async def serve(self, ways: Ways, renderer: TemplateRenderer, listener: Listener) -> bool:
        """Until the parent says so. Returns whether it could serve at all."""
        await self._words.open()
        fleet = self._engines.fleet = ways.make_fleet(self._engines)
        life = asyncio.ensure_future(self._serve(fleet, ways, renderer, listener))
        hearing = asyncio.ensure_future(self._hear(life))
        try:
            await life
        except asyncio.CancelledError:
            return True  # told to stop before it served
        except (EngineDeadError, ChatTemplateError, ValueError, OSError) as error:
            self._words.say(Unable(str(error)))
            return False
        finally:
            hearing.cancel()
            await fleet.close()
            renderer.stop(DRAINING)
            self._words.close()
        return True

    async def _serve(self, fleet: Fleet, ways: Ways, renderer: TemplateRenderer, listener: Listener) -> None:
        formats, ready = await asyncio.gather(ways.prepare(), joined(fleet))
        if self._adapters is None:
            await fleet.adapters.load_all(ways.modules)
        else:
            await fleet.adapters.load_all(self._adapters.modules, again=True)
        app, count = ways.make_app(fleet, ready, formats)
        publishing = asyncio.ensure_future(self._publish(fleet, app, count))
        fleet.on_drain = lambda index: self._words.say(Drain(index))
        homes = Homes(
            app,
            self._places,
            self._number,
            ways.max_body,
            lambda: self._say_state(fleet),
            uses_tls=self._options.ssl_certfile is not None,
        )
        config = uvicorn_config(app, self._options, homes)
        server = self._server = DrainingServer(config, fleet, renderer, None, self._options)
        fleet.on_death = server.end_without_engine
        if fleet.death is not None:
            server.end_without_engine()
        settled()
        own = reserve_path(self._places.http(self._number))
        self._words.say(Prepared())
        await self._may_serve.wait()
        try:
            await server.serve(sockets=[*handles(listener.socket, self._places.num_servers), own])
        finally:
            publishing.cancel()
            await homes.close()

    def _say_state(self, fleet: Fleet) -> None:
        self._words.say(Pausing(fleet.is_paused, fleet.stands_still))
        self._words.say(AdaptersServed(tuple(fleet.adapters.modules)))

    async def _publish(self, fleet: Fleet, app: FastAPI, count: Callable[[], None]) -> None:
        """Let the other processes see what this one has under way: with each request and step, and now and then."""
        board = Board(self._places.board, self._places.num_servers, self._number)
        admission = app.state.admission

        def write() -> None:
            num_answers, num_tokens = admission.under_way
            board.write(num_answers, num_tokens, fleet.finish_rate())

        def write_all() -> None:
            write()
            board.write_owners(admission.owners)

        fleet.elsewhere = board.elsewhere
        fleet.on_step = lambda *_: write()
        admission.on_change = write_all
        while True:
            write_all()
            count()
            await asyncio.sleep(PUBLISH_SECONDS)

    async def _hear(self, life: asyncio.Future[None]) -> None:
        while (word := await self._words.hear()) is not None:
            match word:
                case EngineUp() | EngineDown():
                    self._engines.take(word)
                case Pausing(is_paused=True):
                    self._engines.fleet.begin_paused(stands_still=word.stands_still)
                case AdaptersServed():
                    self._adapters = word
                case Drain():
                    self._engines.drain(word.index)
                case Serve():
                    self._may_serve.set()
                case Beat():
                    self._words.say(word)
                case Stop():
                    if self._server is not None and self._may_serve.is_set():
                        self._server.handle_exit(word.number, None)
                    else:
                        life.cancel()
        rmtree(self._places.directory, ignore_errors=True)  # nobody else does
        os._exit(1)
