"""Answers that end when their client does: server-sent events, and whole answers whose client may hang up.

Starlette's own StreamingResponse costs a task group and several awaits an event; with 32 streams that is time taken
from the engine's cores, so these few lines speak ASGI themselves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.server.connection import CHUNK
from octavo.server.encoding import encode_json
from octavo.server.errors import ApiError

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Framing:
    """How a dialect's streams are written: the media type, what an error is as a last piece, and what ends each."""

    media_type: str
    error: Callable[[ApiError], bytes]
    end: bytes = b""


def event(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(content) + b"\n\n"


SERVER_SENT = Framing("text/event-stream", lambda error: event(error.body()), DONE)
"""OpenAI's older dialects and vLLM: events without names, [DONE] at the end, behind an error too."""


class EventStream(Response):
    """Events as they come. An ApiError becomes a last one."""

    def __init__(self, events: AsyncGenerator[bytes, None], framing: Framing = SERVER_SENT) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=framing.media_type)
        del self.headers["content-length"]
        self._events = events
        self._framing = framing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        write_chunk: Callable[[bytes], bool] = scope.get("state", {}).get(CHUNK, _not_at_once)
        await unless_hung_up(receive, lambda: self._pump(send, write_chunk))

    async def _pump(self, send: Send, write_chunk: Callable[[bytes], bool]) -> None:
        async with aclosing(self._events) as events:
            try:
                async for chunk in events:
                    if not write_chunk(chunk):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                last = b""
            except ApiError as error:
                last = self._framing.error(error)
            except Exception as error:
                logger.exception("a stream broke off")
                last = self._framing.error(ApiError(500, f"internal error: {type(error).__name__}"))
        last += self._framing.end
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _not_at_once(_: bytes) -> bool:
    """Where no connection stands behind the request (server/inner_call.py)."""
    return False


async def unless_hung_up(receive: Receive, begin: Callable[[], Awaitable[T]]) -> T | None:
    """The result of the work that `begin` begins; None, with the work cancelled, when the client hangs up first.

    The work has cleaned up by then. For a client that is gone already it is not begun.
    """
    task = asyncio.ensure_future(_a_turn_later(begin))
    listener = asyncio.ensure_future(_cancel_when_hung_up(receive, task))
    try:
        await asyncio.wait((task,))
        return None if task.cancelled() else task.result()
    finally:
        listener.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _a_turn_later(begin: Callable[[], Awaitable[T]]) -> T:
    """Begin when the listener has had its turn."""
    await asyncio.sleep(0)
    return await begin()


async def _cancel_when_hung_up(receive: Receive, task: asyncio.Future[T]) -> None:
    """Cancels here instead of after a wait: a stream that waited for its client would first send all that piled up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()
