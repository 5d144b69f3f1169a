"""A server that answers with bytes out of a script: it stands in for one of somebody else's, over real sockets."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

HANG_UP = b""  # in a script: close the connection here


@dataclass
class Asked:
    """One request as it came. `hung_up` is set when its client leaves before the script is at its end."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int
    hung_up: threading.Event = field(default_factory=threading.Event)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Script = Callable[[Asked], AsyncIterator[bytes] | Iterable[bytes]]


class ScriptedServer:
    """Answers each request with the pieces that the script gives, each written by itself."""

    def __init__(self, script: Script, tls: ssl.SSLContext | None = None) -> None:
        self.asked: list[Asked] = []
        self.url = ""
        self._script = script
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.Task[None]] = set()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def paths(self) -> list[str]:
        return [asked.path for asked in self.asked]

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        scheme = "https" if self._tls else "http"
        self.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._started.set()
        await self._stopping.wait()
        while len(asyncio.all_tasks()) > 1:  # a client that has just come is accepted in a task before it has its own
            while self._connections:
                self._connections.pop().cancel()
            await asyncio.sleep(0)
        server.close()  # while none is being accepted: asyncio would lose its socket
        await asyncio.sleep(0)  # the sockets of closed transports are closed in the next turn

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while asked := await self._read(reader, id(writer)):
                self.asked.append(asked)
                if not await self._answer(asked, reader, writer):
                    return
        except ConnectionError:
            pass
        except asyncio.CancelledError:
            writer.transport.abort()  # what nobody has read would keep it open
        finally:
            self._connections.discard(task)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, connection: int) -> Asked | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            return None
        request_line, *lines = head.strip().split("\r\n")
        method, path, _ = request_line.split(" ")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Asked(method, path, headers, body, connection)

    async def _answer(self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Write the script's pieces; False when the connection is done with, from either side."""
        pump = asyncio.ensure_future(self._pump(asked, writer))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait((pump, gone), return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                return pump.result()
            asked.hung_up.set()
            return False
        finally:
            for task in (pump, gone):
                task.cancel()
            await asyncio.wait((pump, gone))

    async def _pump(self, asked: Asked, writer: asyncio.StreamWriter) -> bool:
        pieces = self._script(asked)
        async for piece in pieces if isinstance(pieces, AsyncIterator) else _each(pieces):
            if piece == HANG_UP:
                return False
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        return True


async def _each(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


@contextmanager
def serving(script: Script, tls: ssl.SSLContext | None = None) -> Iterator[ScriptedServer]:
    """A server on a free port, until the block ends."""
    server = ScriptedServer(script, tls)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def whole(content: Any, status: str = "200 OK") -> list[bytes]:
    """A whole JSON answer."""
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return [head.encode() + body]


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """One HTTP chunk."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def stream(events: Iterable[bytes]) -> list[bytes]:
    """A streamed answer, an event a chunk, each written by itself."""
    return [STREAM_HEAD, *(chunk(data) for data in events), STREAM_END]


def byte_by_byte(pieces: Iterable[bytes]) -> list[bytes]:
    """The same bytes, each written by itself."""
    return [bytes([byte]) for piece in pieces for byte in piece]


def usage(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    """The last event of a stream with include_usage."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"choices": [], "usage": counts | more}


def text(content: str, finish_reason: str | None = None) -> dict[str, Any]:
    """An event of /v1/completions."""
    return {"choices": [{"index": 0, "text": content, "finish_reason": finish_reason}]}


def delta(finish_reason: str | None = None, **content: str) -> dict[str, Any]:
    """An event of /v1/chat/completions."""
    return {"choices": [{"index": 0, "delta": content, "finish_reason": finish_reason}]}
