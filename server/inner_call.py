"""A request to the application from within the server: through all of it, but over no socket."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message


async def post_within(app: ASGIApp, path: str, body: bytes, state: dict[str, Any]) -> tuple[int, str, bytes]:
    """(status, request id, body) of the answer. Cancelling it is what hanging up is.

    state: the scope's, which no client can set; `owner` there stands for an API key.
    """
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
        "state": state,
    }
    sent: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    pieces: list[bytes] = []
    start: Message = {}

    async def receive() -> Message:
        if sent:
            return sent.pop()
        await asyncio.get_running_loop().create_future()  # it never hangs up
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            pieces.append(message.get("body", b""))

    await app(scope, receive, send)
    named = dict(start["headers"])
    return start["status"], named.get(b"x-request-id", b"").decode(), b"".join(pieces)
