"""Requests to one server over kept connections, so many at a time: JSON out, JSON or a stream of events back.

It uses the client of `octavo bench`: with 200 connections a request takes 0.14 ms of CPU time there, and 12.7 ms in
httpx, whose pool looks at each connection for each request. It speaks TLS, and knows no proxies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from octavo.bench.http import Client, HttpError, Sink
from octavo.bench.sse import EventSplitter, error_message, http_error, one_line

BUSY = (429, 503, 529)  # too many requests; try later
WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before a busy server is asked again
END_EVENTS = ("message_stop",)  # how Anthropic's streams end; others end with [DONE]
MAX_ERROR = 1 << 16  # bytes of a failure's body that are kept to tell why


class BackendError(RuntimeError):
    """Why a server gave no answer, in one line."""


class Wire:
    """A server's address, what each request says in its head, and how many may be under way."""

    def __init__(self, base_url: str, headers: dict[str, str], *, insecure: bool, max_connections: int) -> None:
        if max_connections < 1:
            raise ValueError(f"max_connections {max_connections}: one at least is needed")
        try:
            self._client = Client(base_url, headers, insecure=insecure)
        except HttpError as error:
            raise ValueError(str(error)) from None
        self.base_url = base_url
        self.max_connections = max_connections
        self._places = asyncio.Semaphore(max_connections)

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """A whole answer's JSON; None where it isn't JSON. Raises BackendError for all but a success."""
        pieces: list[bytes] = []
        await self._send(method, path, body, pieces)
        try:
            return msgspec.json.decode(b"".join(pieces))
        except msgspec.DecodeError:
            return None

    async def stream(self, path: str, body: Any, on_event: Callable[[Any], None]) -> None:
        """Hand over each event of a streamed answer as it comes. Raises BackendError, also where it breaks off."""
        reading = _Reading(on_event)
        async with self._places:
            status = await self._status("POST", path, msgspec.json.encode(body), reading.feed, reading.begin)
        if status != 200:
            raise BackendError(f"POST {path}: {http_error(status, reading.raw)}")
        if reading.error is not None:
            raise reading.error
        if not reading.is_over:
            raise BackendError(f"POST {path}: the stream broke off before its end")

    async def _send(self, method: str, path: str, body: Any, pieces: list[bytes]) -> None:
        content = b"" if body is None else msgspec.json.encode(body)
        async with self._places:
            status = await self._status(method, path, content, lambda _, piece: pieces.append(piece), pieces.clear)
        if not 200 <= status < 300:
            raise BackendError(f"{method} {path}: {http_error(status, b''.join(pieces))}")

    async def _status(self, method: str, path: str, content: bytes, sink: Sink, begin: Callable[[], None]) -> int:
        """The status of an answer, whose body `sink` has got. A busy server is asked again; `begin` precedes each."""
        try:
            for wait in WAITS:
                begin()
                answer = await self._client.send(method, path, content, sink)
                if answer.status not in BUSY:
                    return answer.status
                await asyncio.sleep(wait)
            begin()
            return (await self._client.send(method, path, content, sink)).status
        except HttpError as error:
            raise BackendError(f"{self.base_url}: {error}") from None


class _Reading:
    """What has come of a stream. raw: the beginning of its body, for the error where it is no stream."""

    def __init__(self, on_event: Callable[[Any], None]) -> None:
        self._on_event = on_event
        self.begin()

    def begin(self) -> None:
        self.raw = b""
        self.error: Exception | None = None
        self.is_over = False
        self._splitter = EventSplitter()

    def feed(self, _: float, piece: bytes) -> None:
        """Called by the connection, which an error must not end: it is kept."""
        if len(self.raw) < MAX_ERROR:
            self.raw += piece
        if self.error is None:
            try:
                for data in self._splitter.feed(piece):
                    self._take(data)
            except Exception as error:
                self.error = error

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.is_over = True
            return
        try:
            event = msgspec.json.decode(data)
        except msgspec.DecodeError:
            shown = one_line(data.decode(errors="replace"))
            raise BackendError(f"the server sent an event that is no JSON: {shown}") from None
        if isinstance(event, dict) and event.get("error"):
            raise BackendError(error_message(event) or one_line(str(event["error"])))
        if isinstance(event, dict) and event.get("type") in END_EVENTS:
            self.is_over = True
        self._on_event(event)
