"""What every request passes before a route sees it: the Host header and the API key. Plain ASGI."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.server.access import Access, host_name
from octavo.server.errors import error_response

PROBES = frozenset({"/health", "/ping"})  # a probe has no key, and learns no more than whether the server works
OPEN_PATHS = frozenset({"/metrics", "/version", "/docs", "/openapi.json"})  # unless --protect-all closes them


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
        fitting = [
            secrets.compare_digest(given.strip(), key) for key in self._accepted
        ]  # all keys, so that the time tells nothing
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
