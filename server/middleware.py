"""What every request passes before a route sees it: the API key, and the size of its body. Plain ASGI."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.errors import error_response

OPEN_PATHS = frozenset({"/health", "/metrics", "/version", "/docs", "/openapi.json"})


class Authentication:
    """401 unless the request carries one of the keys (Authorization: Bearer KEY). OPEN_PATHS need none."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._accepted = [f"Bearer {key}".encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS" or self._fits(scope):
            await self._app(scope, receive, send)
            return
        response = error_response(401, "the API key is missing or wrong: Authorization: Bearer KEY")
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _fits(self, scope: Scope) -> bool:
        given = Headers(scope=scope).get("authorization", "").encode("latin-1")
        return sum(secrets.compare_digest(given, accepted) for accepted in self._accepted) > 0  # all, in equal time


class BodyLimit:
    """413 for a body of more than `limit` bytes, by its Content-Length or, without one, as soon as it gets there."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._message = f"the body is larger than {limit} bytes (--max-body-bytes)"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and int(length) > self._limit:
            response = error_response(413, self._message)
            response.headers["Connection"] = "close"  # the body is not read
            await response(scope, receive, send)
            return
        num_received = 0

        async def counted() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > self._limit:
                raise HTTPException(413, self._message, {"Connection": "close"})
            return message

        await self._app(scope, counted, send)
