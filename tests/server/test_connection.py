"""Connections that nothing comes over any more are closed; a small application stands behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from octavo.server import connection, middleware
from octavo.server.connection import Connection
from octavo.server.errors import error_response
from octavo.server.middleware import BodyLimit

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the body; an HTTPException as octavo's handlers would."""
    body = b""
    try:
        while not body.endswith(b"."):
            body += (await receive()).get("body", b"")
    except middleware.HTTPException as error:
        await error_response(error.status_code, str(error.detail))(scope, receive, send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = uvicorn.Config(BodyLimit(echo, 100), http=Connection, ws="none", lifespan="off", log_config=None, port=0)
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
    try:
        yield reader, writer
    finally:
        writer.close()
        await server.shutdown()


def run(test: Any) -> None:
    async def inside() -> None:
        async with connected() as (reader, writer):
            await asyncio.wait_for(test(reader, writer), 60)

    asyncio.run(inside())


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"POST / HT", HEAD[:-2]])
def test_a_head_that_does_not_come(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.01)

    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(begun)
        assert await reader.read() == b""

    run(test)


def test_the_head_of_a_second_request_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"123456789.")
        await reader.readuntil(b"123456789.")
        monkeypatch.setattr(connection, "HEAD_SECONDS", 0.01)
        writer.write(HEAD[:-2])
        assert await reader.read() == b""

    run(test)


def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.01)

    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"1234")
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")

    run(test)


def test_bodies_and_heads_in_any_pieces() -> None:
    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upgrade = HEAD.replace(b"Host", b"Connection: upgrade\r\nUPGRADE: h2c\r\nHost")
        in_body = b"\r\nUpgrade:."  # which is not a header there
        for head in (HEAD.replace(b"10", b"11"), upgrade.replace(b"10", b"11")):
            writer.write(head + in_body)
            assert (await reader.readuntil(in_body)).startswith(b"HTTP/1.1 200 ")
        for byte in HEAD + b"123456789.":
            writer.write(bytes([byte]))
            await writer.drain()
        assert (await reader.readuntil(b"123456789.")).startswith(b"HTTP/1.1 200 ")
        writer.write(HEAD + b"1234")
        await writer.drain()
        writer.write(b"56789.")
        assert (await reader.readuntil(b"123456789.")).startswith(b"HTTP/1.1 200 ")

    run(test)
