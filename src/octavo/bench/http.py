"""An HTTP/1.1 client for load: kept connections on asyncio, each piece of a body handed on with the time it came.

It knows bytes and the clock, not what the bytes mean. httptools, in C, parses the answers (headers, chunks): a client
like httpx needs 0.1 ms an event, which takes the more CPU time from the server the faster it is. A kept connection that
the server closed while idle is replaced once, as long as no byte of an answer has come.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import httptools

from octavo.bench.sse import http_error
from octavo.version import VERSION

CONNECT_SECONDS = 30.0

T = TypeVar("T")

# What takes a body: the time of arrival (perf_counter, seconds), and the bytes
Sink = Callable[[float, bytes], None]


class HttpError(Exception):
    """No answer, or a broken one; the message is one line."""


class _StaleError(HttpError):
    """The connection ended before a byte of the answer."""


async def within(seconds: float, what: str, answer: Awaitable[T]) -> T:
    """An answer that must come in time. Raises HttpError, which says what was asked, where it doesn't."""
    try:
        async with asyncio.timeout(seconds):
            return await answer
    except TimeoutError as e:
        raise HttpError(f"{what}: no answer within {seconds:g} s") from e


class Answer:
    """The head of an answer. location: where it sends the client instead, or ''."""

    def __init__(self, status: int, content_type: str, location: str = "") -> None:
        self.status = status
        self.content_type = content_type
        self.location = location

    def error(self, body: bytes) -> str:
        """Why it is no success, in one line. Redirects are not followed: each would count in a latency."""
        if 300 <= self.status < 400 and self.location:
            return f"HTTP {self.status}: the server redirects to {self.location}; --base-url must be the last address"
        return http_error(self.status, body)


class Client:
    """Requests to one server; connections are made as they are needed and kept."""

    def __init__(self, base_url: str, headers: dict[str, str] | None = None, *, insecure: bool = False) -> None:
        try:
            parts = urlsplit(base_url)
        except ValueError as e:
            raise HttpError(f"{base_url}: {e}") from e
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise HttpError(f"{base_url!r} is not a URL such as http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        try:
            self._address = (parts.hostname, parts.port or (443 if secure else 80))
        except ValueError as e:
            raise HttpError(f"{base_url}: {e}") from e
        for name, value in (headers or {}).items():
            if "\n" in name + value or "\r" in name + value:
                raise HttpError(f"the header {name!r} has a line break, which would begin another one")
        self._tls = _tls(insecure) if secure else None
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._head = "".join(
            f"{name}: {value}\r\n"
            for name, value in {
                "Host": parts.netloc.rpartition("@")[2],
                "User-Agent": f"octavo/{VERSION}",
                "Content-Type": "application/json",
                **(headers or {}),
            }.items()
        )
        self._idle: list[_Connection] = []

    async def send(self, method: str, path: str, body: bytes, sink: Sink, headers: str = "") -> Answer:
        """Send a request; its body goes to `sink` as it arrives. Cancelling closes the connection.

        headers: more of them for this request, each line ended by CRLF.

        Raises HttpError where no whole answer comes. A status that is no success is an answer.
        """
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}{headers}Content-Length: {len(body)}\r\n\r\n"
        request = head.encode() + body
        while self._idle:
            connection = self._idle.pop()
            try:
                return await self._exchange(connection, request, sink)
            except _StaleError:
                continue
        return await self._exchange(await self._connect(), request, sink)

    async def json(self, method: str, path: str, content: Any = None) -> Any:
        """A whole answer's JSON; anything but a success is an HttpError with the server's message."""
        found = await self.whole(method, path, content)
        try:
            return json.loads(found)
        except ValueError as e:
            raise HttpError(f"{method} {path}: the answer is not JSON") from e

    async def whole(self, method: str, path: str, content: Any = None) -> bytes:
        """A whole answer, whatever it is, if it is a success."""
        pieces: list[bytes] = []
        body = b"" if content is None else json.dumps(content).encode()
        answer = await self.send(method, path, body, lambda _, piece: pieces.append(piece))
        if answer.status != 200:
            raise HttpError(f"{method} {path}: {answer.error(b''.join(pieces))}")
        return b"".join(pieces)

    def close(self) -> None:
        """Close the kept connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _exchange(self, connection: _Connection, request: bytes, sink: Sink) -> Answer:
        try:
            answer = await connection.exchange(request, sink)
        except BaseException:
            connection.close()
            raise
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    async def _connect(self) -> _Connection:
        host, port = self._address
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(_Connection, host, port, ssl=self._tls)
        except TimeoutError as e:
            raise HttpError(f"no connection to {host}:{port} within {CONNECT_SECONDS:.0f} s") from e
        except OSError as e:
            raise HttpError(f"no connection to {host}:{port}: {e.strerror or e}") from e
        except UnicodeError as e:
            raise HttpError(f"{host!r} is no name of a host: {e}") from e
        return connection


def _tls(insecure: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class _Connection(asyncio.Protocol):
    """One connection, one request at a time. The on_ methods are httptools' callbacks."""

    def __init__(self) -> None:
        self.reusable = False
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None

    async def exchange(self, request: bytes, sink: Sink) -> Answer:
        if self._transport is None or self._transport.is_closing():
            raise _StaleError("the connection was closed")
        self._parser = httptools.HttpResponseParser(self)
        self._sink = sink
        self._now = 0.0  # when the piece that is being parsed arrived; 0.0: none has
        self._content_type = ""
        self._location = ""
        self._in_body = self._framed = self.reusable = False
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not of that class

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # nothing was asked: what comes now could be taken for the next answer
            return
        self._now = perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as e:
            self._fail(HttpError(f"the answer is not HTTP: {e}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._answer is None or self._answer.done():
            return
        if self._in_body and not self._framed and exc is None:
            self._finish()  # no length was given: such a body ends with its connection
        elif self._now:
            self._fail(HttpError("the connection ended in the middle of the answer"))
        else:
            self._fail(_StaleError(f"the connection ended without an answer{f': {exc}' if exc else ''}"))

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower == b"content-type":
            self._content_type = value.decode("latin-1").partition(";")[0].strip().lower()
        elif lower == b"location":
            self._location = value.decode("latin-1")
        elif lower in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        self._in_body = self._parser.get_status_code() >= 200

    def on_body(self, body: bytes) -> None:
        self._sink(self._now, body)

    def on_message_complete(self) -> None:
        if not self._in_body:
            return  # 100 Continue, 103 Early Hints: the answer itself follows
        self.reusable = self._parser.should_keep_alive()
        self._finish()

    def _finish(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(self._parser.get_status_code(), self._content_type, self._location))

    def _fail(self, error: HttpError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
