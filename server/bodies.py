"""Requests' bodies: read within limits, decoded as strict JSON, checked against their type, and then dropped.

Python's decoders hold the interpreter for the whole of a body: 31 MB of small lists take seconds, in which nothing else
is served, in a thread as well. Large bodies are therefore decoded in a process of their own (body_process.py), one
at a time; what comes back is an object whose parts are limited in number.
"""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import msgspec
from fastapi import Request
from pydantic import TypeAdapter, ValidationError

from octavo.server.errors import ApiError, bad_request, explain
from octavo.server.frame_process import FrameProcess

BODY_SECONDS = 60.0  # for the next piece of a body
UNCOUNTED = 1 << 16  # bytes of each body that don't count for all together, so that small ones are always taken
LARGE = 1 << 18  # bytes; smaller bodies take some 50 ms at the worst
DECODE_SECONDS = 60.0

DECODED = b"D"  # in front of what the process answers
REFUSED = b"R"
OUT_OF_MEMORY = b"M"


class Bodies:
    """Reads the bodies of all requests of one server. Use from one event loop only."""

    def __init__(self, limit: int, total: int) -> None:
        self._limit = limit
        self._total = max(total, limit)
        self._num_held = 0  # bytes of bodies that are being received or decoded
        self._process = FrameProcess("octavo.server.body_process")
        self._lock = asyncio.Lock()

    async def decoded(
        self, http: Request, kind: TypeAdapter[Any], annotation: Any, *, any_content_type: bool = False
    ) -> Any:
        """The body as a value of `annotation`, which `kind` checks; None when the client hung up. Raises ApiError.

        Leaves its size in http.state.body_size. any_content_type: it may have any, or none, unless a web page sends it:
        a browser lets any page send what isn't JSON to another origin.
        """
        content = bytearray()
        try:
            if not await self.receive(http, content):
                return None
            http.state.body_size = len(content)
            if content and not (_is_json(http) or (any_content_type and "origin" not in http.headers)):
                raise bad_request("the body must be a JSON object, sent with content-type: application/json")
            if len(content) < LARGE:
                return validated(content, kind)
            return await asyncio.shield(self._decode_elsewhere(content, annotation))
        finally:
            self.let_go(content)

    def let_go(self, content: bytearray) -> None:
        """What has been received is not needed any more."""
        self._num_held -= _counted(len(content))
        content.clear()  # a traceback may keep this frame for a while

    async def receive(self, http: Request, content: bytearray) -> bool:
        """Receive the body into `content`, until `let_go`; whether the client is still there. Raises ApiError."""
        length = http.headers.get("content-length", "")
        if length.isdigit() and int(length) > self._limit:
            raise self._too_large()
        more = True
        while more:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    message = await http.receive()
            except TimeoutError:
                raise ApiError(408, "the body did not come") from None
            if message["type"] == "http.disconnect":
                return False
            piece = message.get("body", b"")
            more = message.get("more_body", False)
            size = len(content) + len(piece)
            if size > self._limit:
                raise self._too_large()
            added = _counted(size) - _counted(len(content))
            if added and self._num_held + added > self._total:
                raise ApiError(
                    503,
                    f"the bodies of requests that are being received take {self._total} bytes together "
                    "(--max-total-body-bytes); send this one again in a moment",
                )
            self._num_held += added
            content += piece
        return True

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._limit} bytes (--max-body-bytes)")

    async def _decode_elsewhere(self, content: bytearray, annotation: Any) -> Any:
        """In the process. Shielded by the caller: its answer must not be taken for that of the next body."""
        async with self._lock:
            try:
                async with asyncio.timeout(DECODE_SECONDS):
                    await self._process.connect()
                    answer = await self._process.exchange(pickle.dumps((annotation, content), protocol=5))
            except (OSError, EOFError, TimeoutError):
                answer = OUT_OF_MEMORY
            if answer == OUT_OF_MEMORY:
                self._process.close()
        if answer[:1] == DECODED:
            return pickle.loads(memoryview(answer)[1:])
        if answer[:1] == REFUSED:
            status, message, param = msgspec.msgpack.decode(answer[1:])
            raise ApiError(status, message, param=param)
        raise ApiError(413, "the body is made of so many values that it takes too much memory or time to decode")

    def close(self) -> None:
        """End the process."""
        self._process.close()


def validated(content: bytes | bytearray, kind: TypeAdapter[Any]) -> Any:
    """A body decoded and checked. Raises ApiError, which says where it isn't JSON or which field is wrong."""
    if not content:
        raise bad_request("the request has no JSON body")
    body = None
    try:
        body = msgspec.json.decode(content)
        return kind.validate_python(body)
    except ValidationError as error:
        message, param = explain(error.errors(include_url=False), body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        message = f"the body is not JSON: {error}"
        param = None
    except RecursionError:
        message = "the body is nested too deeply"
        param = None
    raise bad_request(message, param)


def _counted(num_bytes: int) -> int:
    """The bytes of a body that count for all together."""
    return max(0, num_bytes - UNCOUNTED)


def _is_json(http: Request) -> bool:
    media = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media == "application/json" or (media.startswith("application/") and media.endswith("+json"))
