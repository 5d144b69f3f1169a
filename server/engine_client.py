"""The server's end of the engine: requests out, outputs in, and what happens when the engine dies.

The hot path is `_dispatch`: one message a step, with the outputs of all requests in it, is decoded once and put on the
lists of the streams that wait. A stream is closed by its reader's `finally`, which aborts what is still running. What
waits for readers is bounded in bytes, for each of them and for all together.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec
import zmq

from octavo.runtime.launch import EngineProcess, heartbeat_address
from octavo.runtime.messages import (
    AbortRequest,
    AddRequest,
    EngineStats,
    Failed,
    FromEngine,
    Pause,
    Ping,
    Pong,
    Ready,
    ResetPrefixCache,
    Resume,
    Shutdown,
    StepOutputs,
    ToEngine,
    TokenOutput,
    Vocabulary,
)
from octavo.server.heartbeat import Heartbeat

logger = logging.getLogger(__name__)


POLL_SECONDS = 0.02
MAX_PENDING = 64 << 20  # bytes of outputs that wait for one reader; a first output may have more, and is kept
MAX_ALL_PENDING = 512 << 20  # of all readers
MAX_AT_ONCE = 4 << 20  # bytes that one `next` hands out, so that what they become is bounded too
OUTPUT_BYTES = 300  # of an output as an object; measured, as are the two below
LOGPROBS_BYTES = 300  # of one position's log-probabilities
TOP_BYTES = 72  # of each of its most likely tokens


class EngineDeadError(RuntimeError):
    """No more outputs come; the message says why, such as that the engine process has ended."""


def num_bytes(output: TokenOutput) -> int:
    """What an output takes in memory, about. Positions of one output have equal numbers of likely tokens."""
    total = OUTPUT_BYTES
    for entries in (output.logprobs, output.prompt_logprobs):
        if entries:
            last = entries[-1]
            total += len(entries) * (LOGPROBS_BYTES + TOP_BYTES * (0 if last is None else len(last.top_ids)))
    return total


class Stream:
    """The outputs of the requests that belong to one HTTP request, in the order in which they come.

    key_owner: whose API key the HTTP request carried; on a server without keys "".
    """

    def __init__(self, client: EngineClient, requests: Iterable[AddRequest], key_owner: str = "") -> None:
        self.key_owner = key_owner
        self._client = client
        self._requests = list(requests)
        self._open = {request_id for request in self._requests for request_id in request.request_ids}
        self._pending: list[TokenOutput] = []
        self.num_pending = 0  # bytes
        self._waiter: asyncio.Future[None] | None = None
        self._error: str | None = None

    async def __aenter__(self) -> Stream:
        self._client._add(self, self._requests)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end(set(self._open))
        self._drop_pending()
        self._client._leave(self)

    async def next(self) -> list[TokenOutput]:
        """The outputs since the last call, as far as they fit into MAX_AT_ONCE; waits for at least one.

        Raises EngineDeadError once the engine is gone.
        """
        if not self._pending:
            if self._error is not None:
                raise EngineDeadError(self._error)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            if not self._pending:
                raise EngineDeadError(self._error or "the engine is gone")
        outputs = self._pending
        if self.num_pending > MAX_AT_ONCE:
            return self._take_some(outputs)
        self.num_pending = 0
        self._pending = []
        return outputs

    def _take_some(self, outputs: list[TokenOutput]) -> list[TokenOutput]:
        size = 0
        count = 0
        while count < len(outputs) and size <= MAX_AT_ONCE:
            size += num_bytes(outputs[count])
            count += 1
        self._pending = outputs[count:]
        self.num_pending -= size
        return outputs[:count]

    def end(self, request_ids: Iterable[str]) -> None:
        """The reader has enough of these (a stop string was found): the engine shall stop them now."""
        still_open = [request_id for request_id in request_ids if request_id in self._open]
        self._open.difference_update(still_open)
        self._client._abort(still_open)

    def _put(self, output: TokenOutput) -> None:
        if output.request_id in self._open:
            is_plain = output.logprobs is None and output.prompt_logprobs is None
            size = OUTPUT_BYTES if is_plain else num_bytes(output)
            if self._pending and self.num_pending + size > MAX_PENDING:
                self._overflow()
                return
            self.num_pending += size
            self._pending.append(output)
            if output.finish_reason is not None:
                self._open.discard(output.request_id)
            self._wake()

    def _overflow(self) -> None:
        """The client doesn't read what it asked for: the engine stops, and when it reads on it gets an error."""
        self._drop_pending()
        self._error = "the answer was not read as fast as it came, and is too long to be kept"
        self.end(set(self._open))
        self._wake()

    def _drop_pending(self) -> None:
        self._pending = []
        self.num_pending = 0

    def _fail(self, message: str) -> None:
        self._error = message
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """A connection to one engine process. Use from one event loop only.

    on_step is called with each step's outputs and stats, for the metrics; `stats` is the last of the latter.
    on_death is called once, when the engine is dead and all streams have been told.
    silence_limit: seconds after which an engine process that doesn't echo is taken for frozen, and killed.
    """

    def __init__(self, engine: EngineProcess, silence_limit: float = 20.0) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.bind(engine.address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._streams: dict[str, Stream] = {}  # by request; without those that the engine has finished
        self._readers: set[Stream] = set()
        self._silent: dict[str, int] = {}  # tokens of the prompts of requests without an output
        self._finished: deque[float] = deque(maxlen=64)  # when the last requests were
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._nonces = itertools.count(1)
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self._descriptor = self._socket.fileno()
        self._loop.add_reader(self._descriptor, self._receive)
        self.death: str | None = None  # why the engine is dead; None while it lives
        self.refusal: str | None = None  # why no new request is taken; None while they are
        self.stats: EngineStats | None = None
        self._resumed = asyncio.Event()
        self._resumed.set()
        self.on_step: Callable[[StepOutputs], None] | None = None
        self.on_death: Callable[[], None] | None = None
        self._heartbeat = Heartbeat(self._context, heartbeat_address(engine.address))
        self._silence = self._loop.create_task(self._end_when_silent(silence_limit))
        self._watch_process(self._loop)

    @property
    def num_open(self) -> int:
        """Requests that the engine is working on, or has queued."""
        return len(self._streams)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of the prompts of open requests that have brought nothing yet."""
        return sum(self._silent.values())

    def finish_rate(self) -> float:
        """Answers that the engine finishes a second, by the last ones; 0 where too few have been seen."""
        times = self._finished
        return (len(times) - 1) / (time.monotonic() - times[0]) if len(times) > 1 else 0.0

    @property
    def num_pending(self) -> int:
        """Bytes of outputs that wait for their readers."""
        return sum([stream.num_pending for stream in self._readers])

    async def ready(self) -> Ready:
        """Wait until the engine can serve. Raises EngineDeadError with the engine's own message if it can't."""
        return await asyncio.shield(self._ready)

    def open(self, requests: Iterable[AddRequest], key_owner: str = "") -> Stream:
        """A stream over these requests; they start when it is entered, and end when it is left."""
        return Stream(self, requests, key_owner)

    async def ping(self, deadline: float) -> bool:
        """Whether the engine's loop answers within `deadline` seconds; False where new requests are refused."""
        if self.refusal is not None:
            return False
        nonce = next(self._nonces)
        answer = self._pings[nonce] = asyncio.get_running_loop().create_future()
        try:
            self._send(Ping(nonce))
            async with asyncio.timeout(deadline):
                await answer
        except (TimeoutError, EngineDeadError):
            return False
        finally:
            del self._pings[nonce]
        return True

    def give_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Send what the engine compiles grammars with. It must be ready: nothing is kept for one that is not."""
        self._send(vocabulary)

    def reset_prefix_cache(self) -> None:
        """Ask the engine to forget cached prefixes."""
        self._send(ResetPrefixCache())

    @property
    def is_paused(self) -> bool:
        """Whether new requests wait until `resume`."""
        return not self._resumed.is_set()

    async def resumed(self) -> None:
        """Wait while new requests may not begin."""
        await self._resumed.wait()

    async def pause(self, open_requests: Literal["abort", "wait", "keep"]) -> None:
        """Let no new request begin; those that are open are ended now, or waited for, or go on after `resume`."""
        self._resumed.clear()
        if open_requests == "keep":
            self._send(Pause())
        elif open_requests == "abort":
            self.abort()
        while open_requests == "wait" and self._streams and self.is_paused:
            await asyncio.sleep(POLL_SECONDS)

    def resume(self) -> None:
        """Let new requests begin, and those go on that were kept."""
        self._send(Resume())
        self._resumed.set()

    def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """End these requests with the finish reason `abort`, or all that are open; unknown ids are ignored."""
        named = list(self._streams if request_ids is None else request_ids)
        for request_id in named:
            if (stream := self._streams.get(request_id)) is not None:
                stream._put(TokenOutput(request_id, [], finish_reason="abort"))
        self._abort(named)

    def abort_all_of(self, key_owner: str) -> None:
        """End all open requests of this API key's owner with the finish reason `abort`."""
        self.abort([name for name, stream in self._streams.items() if stream.key_owner == key_owner])

    def refuse(self, message: str) -> None:
        """Take no new requests; open ones go on. If the engine is dead, that stays the reason."""
        self.refusal = self.death or message
        self._resumed.set()

    def fail_all(self, message: str) -> None:
        """End every open stream with an error, and abort its requests in the engine."""
        for stream in set(self._streams.values()):
            stream._fail(message)

    async def close(self) -> None:
        """End the engine process, and this connection."""
        self.on_death = None  # it is meant to end
        if self.death is None:
            self._send(Shutdown())
            self._die("the server is shutting down")
        self._silence.cancel()
        await asyncio.to_thread(self._engine.close)
        self._loop.remove_reader(self._descriptor)
        self._socket.close(linger=0)
        self._heartbeat.close()
        self._context.term()

    def _send(self, message: ToEngine) -> None:
        # the queue is unbounded: a send fails only when no engine is connected, and its end is noticed elsewhere
        with contextlib.suppress(zmq.Again):
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        self._loop.call_soon(self._receive)

    def _add(self, stream: Stream, requests: list[AddRequest]) -> None:
        if self.refusal is not None:
            raise EngineDeadError(self.refusal)
        self._readers.add(stream)
        for request in requests:
            self._streams |= dict.fromkeys(request.request_ids, stream)
            self._silent |= dict.fromkeys(request.request_ids, len(request.token_ids))
            self._send(request)

    def _leave(self, stream: Stream) -> None:
        self._readers.discard(stream)

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._streams.pop(request_id, None)
            self._silent.pop(request_id, None)
        if request_ids and self.death is None:
            self._send(AbortRequest(request_ids))

    def _receive(self) -> None:
        """Take all messages that are there. The descriptor signals the first one only, perhaps during a send."""
        try:
            while not self._socket.closed:
                self._take(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))
        except zmq.Again:
            pass
        except Exception as error:
            self._loop.remove_reader(self._descriptor)
            logger.exception("the engine's messages can't be read any more")
            self._die(f"internal error: {type(error).__name__}")  # else every open request would wait forever

    def _take(self, message: FromEngine) -> None:
        match message:
            case StepOutputs():
                self._dispatch(message)
            case Pong():
                if (answer := self._pings.get(message.nonce)) is not None and not answer.done():
                    answer.set_result(None)
            case Ready():
                self._ready.set_result(message)
            case Failed():
                if message.traceback:
                    logger.error("the engine failed:\n%s", message.traceback.rstrip())
                self._die(message.message)

    def _dispatch(self, step: StepOutputs) -> None:
        self.stats = step.stats
        for output in step.outputs:
            request_id = output.request_id
            stream = self._streams.get(request_id)
            if stream is None:
                continue  # aborted a moment ago
            if request_id in self._silent:
                del self._silent[request_id]
            stream._put(output)
            if output.finish_reason is not None:
                self._finished.append(time.monotonic())
                self._streams.pop(request_id, None)  # an overflow may have done so
        while self.num_pending > MAX_ALL_PENDING:
            max(self._readers, key=lambda stream: stream.num_pending)._overflow()
        if self.on_step is not None:
            self.on_step(step)

    def _die(self, message: str) -> None:
        if self.death is not None:
            return
        self.death = self.refusal = message
        if not self._ready.done():
            self._ready.set_exception(EngineDeadError(message))
            self._ready.exception()  # marks it as seen: perhaps nobody waits yet
        for answer in self._pings.values():
            if not answer.done():
                answer.set_exception(EngineDeadError(message))
        self.fail_all(message)
        self._resumed.set()
        self._streams.clear()
        self._silent.clear()
        if self.on_death is not None:
            self.on_death()

    async def _end_when_silent(self, limit: float) -> None:
        await self._heartbeat.silence(limit)
        self._die(f"the engine process is frozen: not a sign of life for {limit:g} s (--engine-timeout)")
        self._engine.process.kill()

    def _watch_process(self, loop: asyncio.AbstractEventLoop) -> None:
        """A thread that waits for the process's end, however it comes."""

        def wait() -> None:
            code = self._engine.process.wait()
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended too
                # a last message (Failed, with the reason) may still be in the socket: let it come first
                loop.call_soon_threadsafe(lambda: loop.call_later(0.1, self._die, f"the engine process ended ({how})"))

        threading.Thread(target=wait, name="octavo-engine-watch", daemon=True).start()
