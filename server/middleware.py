"""What every request passes before a route sees it: Host header, API key, request id, metrics. Plain ASGI."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.access import Access, host_name
from octavo.server.admission import Admission
from octavo.server.errors import ApiError, error_response
from octavo.server.fleet.fleet import Fleet
from octavo.server.metrics import Metrics

MAX_REQUEST_ID = 256
ANTHROPIC_PATH = "/v1/messages"
PROBES = frozenset({"/health", "/ping"})  # a probe has no key, and learns no more than whether the server works
UNCOUNTED = frozenset({"/metrics", "/health", "/load", "/ping", "/version", "/server_info"})  # vLLM doesn't either
OPENAI_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses"})
GENERATING_PATHS = OPENAI_PATHS | {
    "/v1/messages",
    "/api/chat",
    "/api/generate",
    "/generate",
    "/invocations",
    "/v1/decisions",
    "/v1/systemone",
}
OPEN_PATHS = frozenset({"/metrics", "/version", "/docs", "/openapi.json"})  # unless --protect-all closes them


KEY_PROBLEM = "the API key is missing or wrong: Authorization: Bearer KEY, or x-api-key: KEY"


class Authentication:
    """401 unless the request carries one of the keys (Authorization: Bearer KEY, or Anthropic's x-api-key: KEY).

    PROBES need none, nor do OPEN_PATHS unless `protect_all`. Routes find in the scope's state, as `owner`, whose key it
    was: a digest, since it is written to files. A request from within the server has it there already.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._accepted = [key.encode() for key in access.keys]
        self._owners = [hashlib.sha256(key).hexdigest() for key in self._accepted]
        self._open = PROBES if access.protect_all else PROBES | OPEN_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        needs_none = scope["type"] != "http" or scope["path"] in self._open or scope["method"] == "OPTIONS"
        if needs_none or "owner" in scope.get("state", ()) or self._fits(scope):
            await self._app(scope, receive, send)
            return
        response = error_response(401, KEY_PROBLEM, path=scope["path"])
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _fits(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").encode("latin-1").partition(b" ")
        given = [headers.get("x-api-key", "").encode("latin-1").strip()]
        if scheme.lower() == b"bearer":
            given.append(bearer.strip())
        # all of them, so that the time tells nothing
        fitting = [secrets.compare_digest(one, key) for one in given for key in self._accepted]
        fits = any(fitting)
        if fits:
            scope.setdefault("state", {})["owner"] = self._owners[fitting.index(True) % len(self._owners)]
        return fits


class FullQueue:
    """429 for a request that would have to wait behind too many, before its body is read.

    A flood is refused at a fraction of what it costs to read, check and render it.
    """

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in GENERATING_PATHS:
            try:
                self._admission.check_room()
            except ApiError as error:
                response = error_response(error.status, error.message, error.param, error.code, scope["path"])
                response.headers.update(error.headers)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class RequestIds:
    """Repeats a request's X-Request-Id in its response, so that logs of both ends meet; makes one where there is none.

    An id that no header may hold, or of more than MAX_REQUEST_ID characters, is replaced. Routes find it in the scope's
    state as `request_id`. Below /v1/messages it is Anthropic's request-id as well.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        is_good = 0 < len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable()
        request_id = given if is_good else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        headers = [(b"x-request-id", request_id.encode())]
        if scope["path"].startswith(ANTHROPIC_PATH):
            headers.append((b"request-id", request_id.encode()))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        await self._app(scope, receive, send_with_id)


class Reports:
    """What each request and its response have to tell: the metrics of HTTP, and ORCA's load report.

    A request with the header `endpoint-load-metrics-format: TEXT` or `JSON`, as balancers send it, gets
    `endpoint-load-metrics`: how full the engine is.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, client: Fleet) -> None:
        self._app = app
        self._metrics = metrics
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        form = Headers(scope=scope).get("endpoint-load-metrics-format", "").upper()
        status = 499  # nobody was there to get one

        async def send_with_report(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if form in ("TEXT", "JSON"):
                    header = (b"endpoint-load-metrics", self._load(form).encode())
                    message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        try:
            await self._app(scope, receive, send_with_report)
        finally:
            unrouted = scope["path"] if scope["path"] in GENERATING_PATHS else "none"  # FullQueue answers before routes
            route: Any = scope.get("route")
            handler: str = getattr(route, "path", unrouted)
            if handler not in UNCOUNTED:
                self._metrics.request(handler, scope["method"], status, time.monotonic() - begun)

    def _load(self, form: str) -> str:
        stats = self._client.stats
        values = {
            "kv_cache_usage_perc": 0.0 if stats is None else float(stats.kv_cache_usage),
            "num_requests_waiting": 0.0 if stats is None else float(stats.num_waiting),
        }
        if form == "JSON":
            return "JSON " + json.dumps({"named_metrics": values})
        return "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in values.items())


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
                await error_response(421, message, path=scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)
