"""What one process of a server keeps, and others are asked for: its keeper answers, whoever got the request.

Sessions, files and batches are kept by process 0; a response under way in the background by the one that makes it,
whose number stands at the end of the response's id. What is for all of the server (to pause, to abort) every process
does. A request is handed over as it is, on the keeper's own socket, and passes everything there that it would have
passed here: so this stands in front of the whole application.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.errors import error_response
from octavo.server.hop_headers import end_to_end
from octavo.server.middleware import leave_place
from octavo.server.processes.places import Places
from octavo.server.streaming import unless_hung_up

KEEPER = 0  # of what is not bound to the process that made it
KEPT = re.compile(r"/v1/(files|batches)(/|$)|/(open|close)_session$")
RESPONSE = re.compile(r"/v1/responses/resp_[0-9a-f]{30}([0-9a-f]{2})(/|$)")
FOR_ALL = frozenset(
    {"/pause", "/resume", "/pause_generation", "/continue_generation", "/abort_request", "/abort_requests"}
    | {f"{prefix}/{verb}_lora_adapter" for prefix in ("", "/v1") for verb in ("load", "unload")}
)
# By the path, what stands in the body of each request about a session; an escape may stand for any of it.
SESSION_MARKS = {"/generate": (b"session_params", b"\\u"), "/invocations": (b"requestType", b"\\u")}
SESSION_HEADER = b"x-amzn-sagemaker-session-id"
MAX_BODY_FOR_ALL = 1 << 20
TOKEN = b"x-octavo-process"


def response_ending(number: int) -> str:
    """How the ids of responses end that this process makes."""
    return f"{number:02x}"


class HungUpError(RuntimeError):
    """The client is gone."""


class Homes:
    """The application in front of which this stands, and the ways to those of the other processes.

    max_body: bytes of a body that is looked into. told_all is called when every process has done what was for all.
    uses_tls: all sockets do, those of the processes too.
    """

    def __init__(
        self,
        app: ASGIApp,
        places: Places,
        number: int,
        max_body: int,
        told_all: Callable[[], None],
        *,
        uses_tls: bool = False,
    ) -> None:
        self._app = app
        self._number = number
        self._token = places.token.encode()
        self._max_body = max_body
        self._told_all = told_all
        self._url = httpx.URL("https://process" if uses_tls else "http://process")
        limits = httpx.Limits(max_connections=None)
        transports = [  # the certificate is not for this: who can connect to such a socket is this user
            httpx.AsyncHTTPTransport(uds=places.http(one), limits=limits, verify=False)
            for one in range(places.num_servers)
        ]
        self._clients = [httpx.AsyncClient(transport=one, timeout=None) for one in transports]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (TOKEN, self._token) in scope["headers"]:
            await self._app(scope, receive, send)
        elif scope["method"] == "POST" and scope["path"] in FOR_ALL:
            await self._ask_all(scope, receive, send)
        else:
            keeper = self._keeper(scope)
            if keeper == self._number != KEEPER and (marks := SESSION_MARKS.get(scope["path"])):
                keeper, receive = await self._keeper_by_body(receive, marks)
            if keeper == self._number:
                await self._app(scope, receive, send)
            else:
                await self._hand_over(keeper, scope, receive, send)

    async def close(self) -> None:
        """Close the connections to the others."""
        for client in self._clients:
            await client.aclose()

    def _keeper(self, scope: Scope) -> int:
        """Who answers a request, as its head tells. Of a response that no process makes any more, anybody."""
        path = scope["path"]
        if KEPT.match(path) or any(name == SESSION_HEADER for name, _ in scope["headers"]):
            return KEEPER
        if (named := RESPONSE.match(path)) and int(named[1], 16) < len(self._clients):
            return int(named[1], 16)
        return self._number

    async def _keeper_by_body(self, receive: Receive, marks: tuple[bytes, ...]) -> tuple[int, Receive]:
        """Who answers a request that may be about a session; and what receives its body once more."""
        messages: list[Message] = []
        body = bytearray()
        more = True
        while more and len(body) <= self._max_body:
            message = await receive()
            messages.append(message)
            body += message.get("body", b"")
            more = message["type"] == "http.request" and message.get("more_body", False)
        messages.reverse()

        async def receive_again() -> Message:
            return messages.pop() if messages else await receive()

        return (KEEPER if any(mark in body for mark in marks) else self._number), receive_again

    async def _hand_over(self, keeper: int, scope: Scope, receive: Receive, send: Send) -> None:
        body_is_there = asyncio.Event()

        async def pieces() -> AsyncGenerator[bytes, None]:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise HungUpError
                more = message.get("more_body", False)
                yield message.get("body", b"")
            body_is_there.set()

        async def receive_behind_body() -> Message:
            await body_is_there.wait()
            return await receive()

        has_body = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
        if not has_body:
            body_is_there.set()
        leave_place(scope)  # the keeper, which counts those of all processes, has one for it
        request = self._request(scope, pieces() if has_body else None)
        await unless_hung_up(receive_behind_body, lambda: self._pass_on(keeper, request, scope, send))

    async def _pass_on(self, keeper: int, request: httpx.Request, scope: Scope, send: Send) -> None:
        """Send the keeper's answer as it comes. Where the keeper dies meanwhile, the client's answer is cut too."""
        try:
            upstream = await self._clients[keeper].send(request, stream=True)
        except HungUpError:
            return
        except httpx.TransportError:
            await self._refuse(keeper, scope, send)
            return
        try:
            await send(
                {"type": "http.response.start", "status": upstream.status_code, "headers": _headers_of(upstream)}
            )
            async for chunk in upstream.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except httpx.TransportError:
            return
        finally:
            await upstream.aclose()

    async def _ask_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have every process do it. The answer is that of one which can't, or this one's."""
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY_FOR_ALL:
                await error_response(413, f"the body is larger than {MAX_BODY_FOR_ALL} bytes")(scope, receive, send)
                return
        requests = [client.send(self._request(scope, bytes(body))) for client in self._clients]
        answers = await asyncio.gather(*requests, return_exceptions=True)
        for number, answer in enumerate(answers):
            if isinstance(answer, httpx.TransportError):
                await self._refuse(number, scope, send)
                return
            if isinstance(answer, BaseException):
                raise answer
        self._told_all()
        own = answers[self._number]
        chosen = next((one for one in answers if isinstance(one, httpx.Response) and one.is_error), own)
        assert isinstance(chosen, httpx.Response)
        await send({"type": "http.response.start", "status": chosen.status_code, "headers": _headers_of(chosen)})
        await send({"type": "http.response.body", "body": chosen.content, "more_body": False})

    def _request(self, scope: Scope, content: AsyncGenerator[bytes, None] | bytes | None) -> httpx.Request:
        query = scope["query_string"]
        target = scope["raw_path"] + (b"?" + query if query else b"")
        headers = [*end_to_end(scope["headers"]), (TOKEN, self._token)]
        url = self._url.copy_with(raw_path=target)
        return httpx.Request(scope["method"], url, headers=headers, content=content)

    async def _refuse(self, keeper: int, scope: Scope, send: Send) -> None:
        message = f"server process {keeper}, which this is for, is being started again; try again in a moment"
        response = error_response(503, message, path=scope["path"])
        response.headers["Retry-After"] = "1"
        await response(scope, _nothing, send)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _headers_of(upstream: httpx.Response) -> list[tuple[bytes, bytes]]:
    return [(name.lower(), value) for name, value in end_to_end(upstream.headers.raw)]
