"""What every request passes before a route sees it: the Host header, the key, the body's size and pace. Plain ASGI."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.access import Access, host_name
from octavo.server.errors import error_response

PROBES = frozenset({"/health", "/ping"})  # who asks them has no key, and learns one bit
OPEN_PATHS = frozenset({"/metrics", "/version", "/docs", "/openapi.json"})  # unless --protect-all closes them
BODY_SECONDS = 60.0  # for the next piece of a body


class Authentication:
    """401 unless the request carries one of the keys (Authorization: Bearer KEY).

    PROBES need none, nor do OPEN_PATHS unless `protect_all`.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._accepted = [key.encode() for key in access.keys]
        self._open = PROBES if access.protect_all else PROBES | OPEN_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open or scope["method"] == "OPTIONS" or self._fits(scope):
            await self._app(scope, receive, send)
            return
        response = error_response(401, "the API key is missing or wrong: Authorization: Bearer KEY")
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _fits(self, scope: Scope) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").encode("latin-1").partition(b" ")
        fitting = [secrets.compare_digest(given.strip(), key) for key in self._accepted]  # all, in equal time
        return scheme.lower() == b"bearer" and any(fitting)


class AllowedHosts:
    """421 for a Host header that names another server. `*.name` stands for all names that end in it, `*` for any.

    A request without the header is served: every browser sends it.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        names = [host_name(host) for host in hosts]
        self._names = frozenset(names)
        self._endings = tuple(name[1:] for name in names if name.startswith("*."))
        self._shown = ", ".join(dict.fromkeys(names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = Headers(scope=scope).get("host", "")
            name = host_name(given)
            if name and name not in self._names and not name.endswith(self._endings):
                message = (
                    f"the Host header is {given[:80]!r}, and this server answers to {self._shown}; --allowed-hosts "
                    "names what it answers to, and * is any"
                )
                await error_response(421, message)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """413 for a body of more than `limit` bytes, by its Content-Length or, without one, as soon as it gets there.

    408 for a body of which nothing comes for BODY_SECONDS.
    """

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
        is_whole = False

        async def limited() -> Message:
            nonlocal num_received, is_whole
            if is_whole:
                return await receive()  # that the client hangs up, some day
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not come", {"Connection": "close"}) from None
            num_received += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if num_received > self._limit:
                raise HTTPException(413, self._message, {"Connection": "close"})
            return message

        await self._app(scope, limited, send)
