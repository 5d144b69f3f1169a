"""The server's connection to one engine process: messages out and in, and how its end is noticed.

The process may end, say that it can't go on, freeze or hang (heartbeat.py), or send what can't be read: each is told
once, with the reason, and nothing that comes afterwards is taken. What the messages are about is the fleet's
(fleet/fleet.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import Callable

import msgspec
import zmq

from octavo.runtime.launch import EngineElsewhere, EngineProcess, heartbeat_address, how_it_ended, resident_bytes
from octavo.runtime.link import has_message
from octavo.runtime.messages import (
    AdapterLoaded,
    Asleep,
    Failed,
    FromEngine,
    Ping,
    Pong,
    Ready,
    Shutdown,
    Sleep,
    StepOutputs,
    ToEngine,
)
from octavo.server.heartbeat import Heartbeat

logger = logging.getLogger(__name__)

MEET_SECONDS = 0.02  # between two tries to reach an engine that another process has started
LAST_MESSAGE_SECONDS = 0.1  # that a message may take to come out of the socket of a process that has ended


class EngineDeadError(RuntimeError):
    """No more outputs come; the message says why, such as that the engine process has ended."""


class EngineClient:
    """A connection to one engine process. Use from one event loop only.

    on_step is called with each step's outputs and stats; on_death once, with the reason, unless `close` comes first;
    on_adapter with this client and what became of each adapter that the engine was asked to load.
    Of an engine that another process has started, `come_up` and `end` tell what that process knows of it.
    silence_limit: seconds after which an engine process that doesn't echo, or whose loop gets nothing done, is killed.
    """

    def __init__(
        self,
        engine: EngineProcess | EngineElsewhere,
        context: zmq.Context[zmq.Socket[bytes]],
        silence_limit: float,
        on_step: Callable[[StepOutputs], None],
        on_death: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._on_step = on_step
        self._on_death: Callable[[str], None] | None = on_death
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.bind(engine.address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._nonces = itertools.count(1)
        self._asleep: asyncio.Future[Asleep] | None = None
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self._descriptor = self._socket.fileno()
        self._loop.add_reader(self._descriptor, self._receive)
        self.on_adapter: Callable[[EngineClient, AdapterLoaded], None] | None = None
        self.death: str | None = None  # why the engine is dead; None while it lives
        self.has_ended = False  # the process has, and its last messages may still come
        self._tasks: list[asyncio.Task[None]] = []
        if isinstance(engine, EngineProcess):
            self._heartbeat = Heartbeat(context, heartbeat_address(engine.address), engine.num_ranks)
            self._tasks.append(self._loop.create_task(self._end_when_silent(engine, silence_limit)))
            self._watch_process(engine, self._loop)

    async def ready(self) -> Ready:
        """Wait until the engine can serve. Raises EngineDeadError with the engine's own message if it can't."""
        return await asyncio.shield(self._ready)

    async def ping(self, deadline: float) -> bool:
        """Whether the engine's loop answers within `deadline` seconds."""
        nonce = next(self._nonces)
        answer = self._pings[nonce] = self._loop.create_future()
        try:
            self.send(Ping(nonce))
            async with asyncio.timeout(deadline):
                await answer
        except (TimeoutError, EngineDeadError):
            return False
        finally:
            del self._pings[nonce]
        return True

    async def sleep(self) -> Asleep:
        """Have the engine, which has no request, give memory back. Raises EngineDeadError."""
        if self.death is not None:
            raise EngineDeadError(self.death)
        self._asleep = self._loop.create_future()
        self.send(Sleep())
        return await self._asleep

    def send(self, message: ToEngine) -> None:
        """Send a message; it is lost where the engine is dead."""
        self.send_frame(self._encoder.encode(message))

    def send_frame(self, frame: bytes) -> None:
        """The same for a message that is encoded already."""
        if self.death is None:
            # the queue is unbounded: a send fails only when no engine is connected, and its end is noticed elsewhere
            with contextlib.suppress(zmq.Again):
                self._socket.send(frame, zmq.NOBLOCK)
            self._loop.call_soon(self._receive)

    def come_up(self, ready: Ready) -> None:
        """The engine, which another process has started, can serve: it is ready once it has answered here too."""
        self._tasks.append(self._loop.create_task(self._meet(ready)))

    def end(self, message: str) -> None:
        """The engine, which another process has started, is dead."""
        self._die(message)

    @property
    def is_closed(self) -> bool:
        """Whether nothing of it is left."""
        return self._socket.closed

    @property
    def resident_bytes(self) -> int:
        """The memory that the engine's processes hold, as far as they run on this machine and are this one's."""
        return resident_bytes(self._engine.process.pid) if isinstance(self._engine, EngineProcess) else 0

    async def close(self, *, is_final: bool = False) -> None:
        """End the engine process, if it is this one's, and the connection. May be called again.

        on_death is not called any more. is_final: no other engine is started in its place.
        """
        self._on_death = None
        if self._socket.closed:
            return
        engine = self._engine
        if self.death is None:
            if isinstance(engine, EngineProcess):
                self.send(Shutdown(is_final))
            self._die("the server is shutting down")
        for task in self._tasks:
            task.cancel()
        if isinstance(engine, EngineProcess):
            try:
                await asyncio.to_thread(engine.close)
            except RuntimeError:  # the interpreter is ending, and starts no thread any more
                engine.close()
            self._heartbeat.close()
        if self._socket.closed:  # it was closed twice, and its descriptor may be another's by now
            return
        self._loop.remove_reader(self._descriptor)
        self._socket.close(linger=0)

    def _receive(self) -> None:
        """Take all messages that are there. The descriptor signals the first one only, perhaps during a send."""
        try:
            has_more = True
            while has_more and self.death is None:
                self._take(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))
                has_more = has_message(self._socket)
        except zmq.Again:
            pass
        except Exception as error:
            logger.exception("the engine's messages can't be read any more")
            self._die(f"internal error: {type(error).__name__}")  # else every open request would wait forever

    def _take(self, message: FromEngine) -> None:
        match message:
            case StepOutputs():
                self._on_step(message)
            case Pong():
                if (answer := self._pings.get(message.nonce)) is not None and not answer.done():
                    answer.set_result(None)
            case AdapterLoaded():
                if self.on_adapter is not None:
                    self.on_adapter(self, message)
            case Asleep():
                if self._asleep is not None and not self._asleep.done():
                    self._asleep.set_result(message)
            case Ready():
                self._heartbeat.begin()
                self._ready.set_result(message)
            case Failed():
                if message.traceback:
                    logger.error("the engine failed:\n%s", message.traceback.rstrip())
                self._die(message.message)

    def _die(self, message: str) -> None:
        if self.death is not None:
            return
        self.death = message
        self._loop.remove_reader(self._descriptor)
        if not self._ready.done():
            self._ready.set_exception(EngineDeadError(message))
            self._ready.exception()  # marks it as seen: perhaps nobody waits yet
        for answer in (*self._pings.values(), self._asleep):
            if answer is not None and not answer.done():
                answer.set_exception(EngineDeadError(message))
                answer.exception()
        if self._on_death is not None:
            self._on_death(message)

    async def _meet(self, ready: Ready) -> None:
        """Ping until the engine answers: what is sent before it has connected is lost."""
        answer = self._pings[0] = self._loop.create_future()
        while self.death is None and not answer.done() and not self._ready.done():
            self.send(Ping(0))
            await asyncio.sleep(MEET_SECONDS)
        if self.death is None and not self._ready.done():
            self._ready.set_result(ready)

    async def _end_when_silent(self, engine: EngineProcess, limit: float) -> None:
        message = await self._heartbeat.end(limit, engine.progress)
        engine.process.kill()
        self._die(message)

    def _end(self, message: str) -> None:
        """The process has ended. A last message (Failed, with the reason) may be in the socket, and comes first.

        Meanwhile engines that were killed together are found dead, and get none of each other's requests.
        """
        self.has_ended = True
        self._loop.call_later(LAST_MESSAGE_SECONDS, self._die, message)

    def _watch_process(self, engine: EngineProcess, loop: asyncio.AbstractEventLoop) -> None:
        """A thread that waits for the process's end, however it comes."""

        def wait() -> None:
            how = how_it_ended(engine.process.wait())
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended too
                loop.call_soon_threadsafe(self._end, f"the engine process ended ({how})")

        threading.Thread(target=wait, name="octavo-engine-watch", daemon=True).start()
