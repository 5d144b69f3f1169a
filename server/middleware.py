"""What every request passes before a route sees it: Host header, API key, request id, metrics. Plain ASGI."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.access import ANY_HOST, Access, host_name
from octavo.server.admission import Admission
from octavo.server.connection import Whole, header_lines
from octavo.server.errors import ApiError, error_json, error_response
from octavo.server.fleet.fleet import Fleet
from octavo.server.metrics import Metrics
from octavo.server.turns import Turns

MAX_REQUEST_ID = 256
LOAD_FORMAT = b"endpoint-load-metrics-format"
ANTHROPIC_PATH = "/v1/messages"
PROBES = frozenset({"/health", "/ping"})  # a probe has no key, and learns no more than whether the server works
UNCOUNTED = frozenset({"/metrics", "/health", "/load", "/ping", "/version", "/server_info"})  # vLLM doesn't either
GENERATING_PATHS = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/api/chat",
        "/api/generate",
        "/generate",
        "/invocations",
        "/v1/decisions",
        "/v1/systemone",
    }
)
OPEN_PATHS = frozenset({"/metrics", "/version", "/docs", "/openapi.json"})  # unless --protect-all closes them


PLACE = "place"  # in the scope's state: what a request holds in the queue
KEY_PROBLEM = "the API key is missing or wrong: Authorization: Bearer KEY, or x-api-key: KEY"


class Keys:
    """The API keys that are accepted, and whose each is: a digest, since it is written to files."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._accepted = [key.encode() for key in keys]
        self._owners = [hashlib.sha256(key).hexdigest() for key in self._accepted]

    def owner(self, authorization: bytes, api_key: bytes) -> str | None:
        """Whose key a request carries in one of these headers; None: nobody's. Without keys everybody is ""."""
        if not self._accepted:
            return ""
        scheme, _, bearer = authorization.partition(b" ")
        given = [api_key.strip()]
        if scheme.lower() == b"bearer":
            given.append(bearer.strip())
        # all of them, so that the time tells nothing
        fitting = [secrets.compare_digest(one, key) for one in given for key in self._accepted]
        return self._owners[fitting.index(True) % len(self._owners)] if any(fitting) else None


class Hosts:
    """The Host headers that the server answers to. `*.name` stands for all names that end in it, `*` for any."""

    def __init__(self, hosts: Sequence[str]) -> None:
        names = [host_name(host) for host in hosts]
        self._takes_any = ANY_HOST in hosts
        self._names = frozenset(names)
        self._endings = tuple(name[1:] for name in names if name.startswith("*."))
        self.shown = ", ".join(dict.fromkeys(names))

    def admit(self, given: str) -> bool:
        """Whether a request with this header is served; one without is: every browser sends it."""
        if self._takes_any:
            return True
        name = host_name(given)
        return not name or name in self._names or name.endswith(self._endings)


class Authentication:
    """401 unless the request carries one of the keys (Authorization: Bearer KEY, or Anthropic's x-api-key: KEY).

    PROBES need none, nor do OPEN_PATHS unless `protect_all`, nor a request of which `is_public` says so. Routes find in
    the scope's state, as `owner`, whose key it was. A request from within the server has it there already.
    """

    def __init__(self, app: ASGIApp, access: Access, is_public: Callable[[Scope], bool] | None = None) -> None:
        self._app = app
        self._keys = Keys(access.keys)
        self._is_public = is_public
        self._open = PROBES if access.protect_all else PROBES | OPEN_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._needs_none(scope) or "owner" in scope.get("state", ()) or self._fits(scope):
            await self._app(scope, receive, send)
            return
        response = error_response(401, KEY_PROBLEM, path=scope["path"])
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _needs_none(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["path"] in self._open or scope["method"] == "OPTIONS":
            return True
        return self._is_public is not None and self._is_public(scope)

    def _fits(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        owner = self._keys.owner(
            headers.get("authorization", "").encode("latin-1"), headers.get("x-api-key", "").encode("latin-1")
        )
        if owner is not None:
            scope.setdefault("state", {})["owner"] = owner
        return owner is not None


class FullQueue:
    """429 for a request that would have to wait behind too many, before its body is read.

    A flood is refused at a fraction of what it costs to read, check and render it; most of it by QueueDoor.
    """

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _asks_for_answers(scope):
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        if PLACE not in state:
            try:
                self._admission.check_room(state.get("owner", ""))
            except ApiError as error:
                response = error_response(error.status, error.message, error.param, error.code, scope["path"])
                response.headers.update(error.headers)
                await response(scope, receive, send)
                return
        try:
            await self._turns.next()
            await self._app(scope, receive, send)
        finally:
            leave_place(scope)


def leave_place(scope: Scope) -> None:
    """Give back what a request holds in the queue, if it holds anything. May be called again."""
    if (place := scope["state"].get(PLACE)) is not None:
        place.leave()


def _asks_for_answers(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in GENERATING_PATHS


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
        request_id = _request_id(Headers(scope=scope).get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = request_id
        headers = _naming(request_id, scope["path"])

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        await self._app(scope, receive, send_with_id)


def _request_id(given: str) -> str:
    is_good = 0 < len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable()
    return given if is_good else secrets.token_hex(16)


def _naming(request_id: str, path: str) -> list[tuple[bytes, bytes]]:
    """The headers of the response."""
    name = request_id.encode()
    headers = [(b"x-request-id", name)]
    if path.startswith(ANTHROPIC_PATH):
        headers.append((b"request-id", name))
    return headers


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
        form = Headers(scope=scope).get(LOAD_FORMAT.decode(), "").upper()
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
    """421 for a Host header that names another server."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = Hosts(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = Headers(scope=scope).get("host", "")
            if not self._hosts.admit(given):
                message = (
                    f"the Host header is {given[:80]!r}, and this server answers to {self._hosts.shown}; "
                    "--allowed-hosts names what it answers to, and * is any"
                )
                await error_response(421, message, path=scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


class QueueDoor:
    """FullQueue as the door of connections, which send its response themselves, at less than half the cost.

    The application is asked where it has more to say: where the host or the key doesn't fit, for a page of another
    origin, and for a balancer that wants a load report.
    """

    def __init__(self, admission: Admission, metrics: Metrics, access: Access) -> None:
        self._admission = admission
        self._metrics = metrics
        self._keys = Keys(access.keys)
        self._hosts = Hosts(access.hosts)

    def refusal(self, scope: Scope) -> Whole | None:
        """FullQueue's response; None where a request has a place, or where the application has more to say."""
        if not (self._admission.is_full and _asks_for_answers(scope)):
            return None
        owner = self._owner_of(scope)
        if owner is None:
            return None
        try:
            self._admission.check_room(owner)
        except ApiError as error:
            path = scope["path"]
            self._metrics.request(path, "POST", error.status, 0.0)
            request_id = _request_id(_header(scope, b"x-request-id").decode("latin-1"))
            named = header_lines(_naming(request_id, path))
            headers, body = _refusal(error.status, error.message, error.code, path, tuple(error.headers.items()))
            return Whole(error.status, named + headers, body)
        return None

    def counts(self, scope: Scope) -> bool:
        """Whether a request takes a place of which there are only so many."""
        return self._admission.is_limited and _asks_for_answers(scope)

    def hold(self, scope: Scope) -> None:
        """Hold a place for a request that has come whole, if there is one; without a place it is asked for later."""
        if PLACE in scope["state"] or not self.counts(scope):
            return
        owner = self._owner_of(scope)
        if owner is not None and (place := self._admission.hold(owner)) is not None:
            scope["state"] |= {"owner": owner, PLACE: place}

    def _owner_of(self, scope: Scope) -> str | None:
        """Whose request it is; None where the application has more to say."""
        headers = dict(reversed(scope["headers"]))  # of several the first, as everywhere
        if (
            b"origin" in headers
            or LOAD_FORMAT in headers
            or not self._hosts.admit(headers.get(b"host", b"").decode("latin-1"))
        ):
            return None
        return self._keys.owner(headers.get(b"authorization", b""), headers.get(b"x-api-key", b""))


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for given, value in scope["headers"] if given == name), b"")


@lru_cache(1024)
def _refusal(
    status: int, message: str, code: str | None, path: str, more: tuple[tuple[str, str], ...]
) -> tuple[bytes, bytes]:
    """(header lines, body): the same for all whom a queue refuses at one path within a second."""
    content = error_json(status, message, None, code, path)
    headers = [(b"content-length", str(len(content)).encode()), (b"content-type", b"application/json")]
    headers += [(name.lower().encode(), value.encode()) for name, value in more]
    return header_lines(headers), content
