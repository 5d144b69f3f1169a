"""The server's life: wait for the engines, print what was loaded, listen, and at SIGTERM finish what is under way.

Draining: /health and new requests get 503, running requests get `shutdown_timeout` seconds; what is left then ends with
an error object. A second SIGINT ends at once. When no engine is left, the requests are told, and the server ends too.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from octavo.collector import settled
from octavo.runtime.messages import Ready, StepOutputs
from octavo.server.connection import Connection
from octavo.server.engine_client import EngineDeadError
from octavo.server.fleet.fleet import Fleet
from octavo.server.listen_sockets import BACKLOG, Listener, handles, listen
from octavo.server.message.model_formats import ModelFormats
from octavo.server.metrics import Metrics
from octavo.server.options import ListenOptions
from octavo.server.template_renderer import TemplateRenderer

logger = logging.getLogger(__name__)

STATS_SECONDS = 10.0
TICK_SECONDS = 1.0  # for which a Date header holds
LAST_WORDS_SECONDS = 2.0  # for the error objects of requests that were not finished in time
DRAIN_POLL_SECONDS = 0.05
DRAINING = "the server is shutting down"


class EngineStartError(RuntimeError):
    """The engine could not start; the message is its own."""


async def serve(
    open_fleet: Callable[[], Fleet],
    renderer: TemplateRenderer,
    prepare: Callable[[Fleet], Awaitable[ModelFormats]],
    make_app: Callable[[Fleet, Ready, ModelFormats], tuple[FastAPI, Metrics]],
    listener: Listener,
    options: ListenOptions,
) -> bool:
    """Serve until told to stop. Returns whether an engine was alive then.

    open_fleet connects to the engines, and prepare is called while they load.

    Raises EngineStartError, BindError, and ChatTemplateError for a template that can't be compiled.
    """
    client = open_fleet()
    stop = Signals()
    try:
        formats = asyncio.ensure_future(prepare(client))
        if not await stop.comes_before(all_ready(client, formats)):
            app, metrics = make_app(client, await client.ready(), formats.result())
            log = StepLog(metrics, client)
            client.on_step = metrics.step if options.disable_log_stats else log.step
            client.on_restart = metrics.restart
            ticker = asyncio.create_task(log.tick_forever())
            stop.server = DrainingServer(uvicorn_config(app, options), client, renderer, listener, options)
            settled()
            client.on_death = stop.server.end_without_engine
            if client.death is not None:
                stop.server.end_without_engine()
            await stop.server.serve(sockets=handles(listener.socket))
            ticker.cancel()
        return client.death is None
    except EngineDeadError as error:
        raise EngineStartError(str(error)) from error
    finally:
        await client.close()
        renderer.stop(DRAINING)


async def all_ready(client: Fleet, formats: Awaitable[ModelFormats]) -> None:
    """Wait for both; the first failure ends the wait."""
    await asyncio.gather(formats, client.ready())


class Serves(Protocol):
    """What a server is over: the engines of a model, or several models."""

    @property
    def death(self) -> str | None:
        """Why nothing is left; None while there is."""

    @property
    def num_open(self) -> int:
        """Requests that are under way."""

    def refuse(self, message: str) -> None:
        """Take no new requests; open ones go on."""

    def fail_all(self, message: str) -> None:
        """End all that is under way with an error."""


class Renders(Protocol):
    """Whoever renders templates."""

    def stop(self, message: str) -> None:
        """Render no more."""


class Exits(Protocol):
    """Who is told of signals while the server serves."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End; at a second SIGINT, at once."""


class Signals:
    """Handles SIGINT and SIGTERM: before the server listens they end the wait for the engine; later they drain it."""

    def __init__(self) -> None:
        self.server: Exits | None = None
        loop = asyncio.get_running_loop()
        self._early: asyncio.Future[None] = loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._come, number)

    def _come(self, number: int) -> None:
        if self.server is not None:
            self.server.handle_exit(number, None)
        elif not self._early.done():
            self._early.set_result(None)

    async def comes_before(self, ready: Awaitable[None]) -> bool:
        """Wait until `ready` is done or a signal comes; whether it was a signal. Raises what `ready` raises."""
        waiting = asyncio.ensure_future(ready)
        try:
            await asyncio.wait((waiting, self._early), return_when=asyncio.FIRST_COMPLETED)
            if not self._early.done():
                waiting.result()
            return self._early.done()
        finally:
            waiting.cancel()


def uvicorn_config(app: FastAPI, options: ListenOptions, outermost: ASGIApp | None = None) -> uvicorn.Config:
    """outermost: the application with what stands in front of it."""
    return uvicorn.Config(
        outermost or app,
        http=functools.partial(Connection, door=app.state.door),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=options.uvicorn_log_level,
        access_log=not options.disable_uvicorn_access_log,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(options.shutdown_timeout + LAST_WORDS_SECONDS) + 1,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        ssl_ca_certs=options.ssl_ca_certs,
    )


class DrainingServer(uvicorn.Server):
    """uvicorn's server, with a drain, and a limit on how long it waits for requests that are under way.

    listener: what it opens to clients; None: it has been opened.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        client: Serves,
        renderer: Renders,
        listener: Listener | None,
        options: ListenOptions,
    ) -> None:
        super().__init__(config)
        self._listener = listener
        self._client = client
        self._renderer = renderer
        self._options = options
        self._is_asked_to_end = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `Signals`."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._listener is not None:
            listen(self._listener.socket)
        await super().startup(sockets)
        if self._listener is not None:
            logger.info("serving on %s", self._listener.url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._is_asked_to_end.set()

    async def main_loop(self) -> None:
        """uvicorn's looks ten times a second whether it is to end, and makes the Date header anew every tenth time."""
        while not self.should_exit:
            await self.on_tick(0)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_asked_to_end.wait(), TICK_SECONDS)

    def end_without_engine(self) -> None:
        """End, since no engine is left, unless --keep-alive-on-engine-death."""
        logger.error("%s", self._client.death)
        if not self._options.keep_alive_on_engine_death:
            self.should_exit = True
            self._is_asked_to_end.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        client = self._client
        limit = self._options.shutdown_timeout if client.death is None else 0.0
        client.refuse(DRAINING)
        if client.num_open:
            logger.info("shutting down: %d requests get %g s to finish", client.num_open, limit)
        loop = asyncio.get_running_loop()
        timers = (
            loop.call_later(limit, self._give_up),
            loop.call_later(limit + LAST_WORDS_SECONDS, self._hang_up),
        )
        try:
            await self._drain()
            await super().shutdown(sockets)
        finally:
            for timer in timers:
                timer.cancel()
        if self.force_exit and self.server_state.tasks:
            self._hang_up()  # a task that the loop cancels instead would log a traceback
            await asyncio.wait(self.server_state.tasks, timeout=LAST_WORDS_SECONDS)

    async def _drain(self) -> None:
        """Wait for open requests. New ones, and /health, are answered with 503 meanwhile."""
        while self._client.num_open and not self.force_exit:
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    def _give_up(self) -> None:
        """End what is under way with an error."""
        message = self._client.death or f"{DRAINING}, and did not wait longer"
        self._client.fail_all(message)
        self._renderer.stop(message)

    def _hang_up(self) -> None:
        """Close the connections of clients that don't read, or whose request has not arrived yet."""
        self._give_up()
        for connection in tuple(self.server_state.connections):
            assert isinstance(connection, Connection)
            connection.transport.abort()


class StepLog:
    """Logs, every ten seconds while there is work, what the engines did since the last line."""

    def __init__(self, metrics: Metrics, client: Fleet) -> None:
        self._metrics = metrics
        self._client = client
        self._num_generated = 0
        self._num_prompt = 0
        self._has_news = False

    def step(self, engine: int, step: StepOutputs) -> None:
        """Count an engine's step, for the log and for the metrics."""
        self._metrics.step(engine, step)
        shared = step.shared
        generated = sum(len(output.token_ids) for output in step.outputs) if shared is None else shared.num_generated
        self._num_generated += generated
        self._num_prompt += max(0, step.stats.step_tokens - generated)
        self._has_news = True

    async def tick_forever(self) -> None:
        """Log until cancelled."""
        begin = time.monotonic()
        while True:
            await asyncio.sleep(STATS_SECONDS)
            seconds = time.monotonic() - begin
            begin = time.monotonic()
            stats = self._client.stats
            if not self._has_news or stats is None:
                continue
            logger.info(
                "prompt %.0f tokens/s, generation %.0f tokens/s, running %d, waiting %d, KV cache %.1f%%, "
                "prefix cache hits %.1f%%",
                self._num_prompt / seconds,
                self._num_generated / seconds,
                stats.num_running,
                stats.num_waiting,
                100 * stats.kv_cache_usage,
                100 * stats.prefix_cache_hits / max(1, stats.prefix_cache_queries),
            )
            self._num_generated = self._num_prompt = 0
            self._has_news = bool(stats.num_running or stats.num_waiting)
