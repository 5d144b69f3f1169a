"""What one connection may cost: heads, trailers, bodies and answers on which nothing moves, and what is not HTTP.

A small application stands behind real sockets.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import logging
import socket
import struct
import termios
from collections.abc import Awaitable, Callable

import pytest
import uvloop
from socket_app import connected
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.server import connection
from octavo.server.connection import MAX_HEAD, Connection, Door, Whole

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
Test = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
    """Answer with the body."""
    body = b""
    while not body.endswith(b"."):
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
    await answer(send, body)


async def answer(send: Send, body: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def unasked(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
    """Answer without reading the body, as 401 and 404 do."""
    await answer(send, b"no.")


class Streamer:
    """Streams an answer that waits in the middle until the test lets it go on."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.num_begun = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        self.num_begun += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await self.may_end.wait()
        await send({"type": "http.response.body", "body": b"two", "more_body": False})


STREAMED = b"transfer-encoding: chunked\r\n\r\n3\r\none\r\n"
STREAMED_END = b"3\r\ntwo\r\n0\r\n\r\n"


def run(test: Test, app: ASGIApp | None = None, door: Door | None = None) -> None:
    async def inside() -> None:
        async with connected(app or echo, door) as (reader, writer):
            await asyncio.wait_for(test(reader, writer), 60)

    asyncio.run(inside())


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection ends, by a reset too."""
    received = b""
    try:
        while piece := await reader.read(1 << 16):
            received += piece
    except ConnectionError:
        pass
    return received


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"POST / HT", HEAD[:-2]])
def test_a_head_that_does_not_come(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.01)

    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(begun)
        assert await read_all(reader) == b""  # reset where the bytes come when the time is up

    run(test)


def test_the_head_of_a_second_request_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"123456789.")
        await reader.readuntil(b"123456789.")
        monkeypatch.setattr(connection, "HEAD_SECONDS", 0.01)
        writer.write(HEAD[:-2])
        assert await read_all(reader) == b""

    run(test)


def test_bodies_and_heads_in_any_pieces() -> None:
    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upgrade = HEAD.replace(b"Host", b"Connection: upgrade\r\nUPGRADE: h2c\r\nHost")
        in_body = b"\r\nUpgrade:."  # which is not a header there
        for head in (HEAD.replace(b"10", b"11"), upgrade.replace(b"10", b"11")):
            writer.write(head + in_body)
            assert (await reader.readuntil(in_body)).startswith(b"HTTP/1.1 200 ")
        for head in (HEAD, upgrade):
            for byte in head + b"123456789.":
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0)  # each byte is a segment
            assert (await reader.readuntil(b"123456789.")).startswith(b"HTTP/1.1 200 ")
        writer.write(HEAD + b"1234")
        await writer.drain()
        writer.write(b"56789.")
        assert (await reader.readuntil(b"123456789.")).startswith(b"HTTP/1.1 200 ")

    run(test)


@pytest.mark.parametrize("cut", [1, 2, 5, 9, 10])
def test_an_upgrade_header_cut_across_segments(cut: int) -> None:
    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _, rest = HEAD.partition(b"\r\nHost")
        head += b"\r\nConnection: upgrade"
        line = b"\r\nUpgrade: h2c"
        writer.write(head + line[:cut])
        await asyncio.sleep(0.02)  # a segment of its own
        writer.write(line[cut:] + b"\r\nHost" + rest + b"123456789.")
        assert (await reader.readuntil(b"123456789.")).startswith(b"HTTP/1.1 200 ")

    run(test)


def test_small_trailers_are_dropped() -> None:
    seen: list[dict[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        seen.append(dict(scope["headers"]))
        await answer(send, b"yes.")

    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):  # the connection stays open
            writer.write(CHUNKED + b"2\r\nab\r\n0\r\nAuthorization: Bearer x\r\nX-Sum: 5\r\n\r\n")
            assert (await reader.readuntil(b"yes.")).startswith(b"HTTP/1.1 200 ")

    run(test, app)
    assert [set(headers) for headers in seen] == [{b"host", b"transfer-encoding"}] * 2


@pytest.mark.parametrize("line", [b"a", b"X-Trailer: 1\r\n"], ids=["one endless line", "endless lines"])
@pytest.mark.parametrize("body", [b"", b"4\r\nbody\r\n"])
def test_trailers_have_the_limit_of_a_head(line: bytes, body: bytes) -> None:
    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + body + b"0\r\nX-First: 1\r\n")
        sent = 0
        while not reader.at_eof() and sent < 100 * MAX_HEAD:
            piece = line * (4096 // len(line))
            writer.write(piece)
            sent += len(piece)
            await asyncio.sleep(0)
            if reader._buffer:  # type: ignore[attr-defined]
                break
        assert (await read_all(reader)).startswith(b"HTTP/1.1 431 ")
        assert sent < 20 * MAX_HEAD

    run(test)


def test_an_answer_before_the_body_s_end_closes_the_connection() -> None:
    """And the client gets the answer although it goes on sending for a while."""

    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD.replace(b"10", b"20000000"))
        for _ in range(20):
            writer.write(b"a" * 100_000)
            await asyncio.sleep(0)
        received = await read_all(reader)
        assert received.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close\r\n" in received
        assert received.endswith(b"no.")

    run(test, unasked)


def test_an_answer_behind_the_body_s_end_leaves_the_connection_open() -> None:
    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(3):
            writer.write(HEAD + b"123456789.")
            received = await reader.readuntil(b"no.")
            assert b"connection: close" not in received

    run(test, unasked)


def test_what_is_not_http_behind_a_request_that_is_being_answered() -> None:
    """The answer comes whole, without an error in the middle of it, and then the connection closes."""

    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"123456789.")
        begin = await reader.readuntil(STREAMED)
        assert begin.startswith(b"HTTP/1.1 200 ")
        writer.write(b"nonsense\r\n\r\n" * 10)
        await asyncio.sleep(0.05)
        app.may_end.set()
        assert await read_all(reader) == STREAMED_END

    app = Streamer()
    run(test, app)


def test_what_is_not_http_behind_requests_that_wait() -> None:
    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((HEAD + b"123456789.") * 2 + HEAD[:-4] + b"\r\nBad Header: 1\r\n\r\n")
        await reader.readuntil(STREAMED)
        app.may_end.set()
        received = await read_all(reader)
        assert received.count(b"HTTP/1.1 200 ") == 1
        assert received.startswith(STREAMED_END)
        assert received.endswith(STREAMED_END)
        assert app.num_begun == 2

    app = Streamer()
    run(test, app)


def test_a_broken_body_behind_a_request_that_is_being_answered() -> None:
    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"123456789." + CHUNKED + b"4\r\nbody\r\nno size\r\n")
        await reader.readuntil(STREAMED)
        app.may_end.set()
        assert await read_all(reader) == STREAMED_END
        assert app.num_begun == 1

    app = Streamer()
    run(test, app)


def test_a_client_that_hangs_up_is_noticed_behind_requests_that_wait() -> None:
    ended: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        while (message := await receive())["type"] != "http.disconnect":
            assert message["type"] == "http.request"
        ended.append(scope["path"])

    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:  # noqa: ARG001
        writer.write((HEAD + b"123456789.") * 2)
        await asyncio.sleep(0.05)
        assert ended == []
        writer.transport.abort()
        while not ended:
            await asyncio.sleep(0.01)

    run(test, app)
    assert ended == ["/"]


def test_a_client_that_takes_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.1)
    ended = asyncio.Event()

    async def hangs_up(receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def app(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        gone = asyncio.ensure_future(hangs_up(receive))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
            await asyncio.sleep(0)
        ended.set()

    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()
        writer.write(HEAD + b"123456789.")
        await ended.wait()
        writer.transport.resume_reading()
        assert b"\r\n0\r\n\r\n" not in await read_all(reader)

    run(test, app)


def test_a_slow_client_is_not_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.2)
    size = 30_000_000

    async def app(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        await answer(send, b"x" * size)

    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"123456789.")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 30000000" in head
        num_read = 0
        while num_read < size:
            num_read += len(await reader.read(1 << 20))
            await asyncio.sleep(0.02)

    run(test, app)


def test_what_is_not_http_is_warned_of_seldom(caplog: pytest.LogCaptureFixture) -> None:
    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = writer.get_extra_info("peername")
        for _ in range(20):
            other, out = await asyncio.open_connection(host, port)
            out.write(b"nonsense\r\n\r\n")
            assert (await read_all(other)).startswith(b"HTTP/1.1 400 ")
            out.close()
        writer.write(HEAD + b"123456789.")  # the first connection stays usable
        await reader.readuntil(b"123456789.")

    with caplog.at_level(logging.WARNING):
        run(test)
    warnings = [record for record in caplog.records if "not HTTP" in record.message]
    assert len(warnings) == 1
    assert not [record for record in caplog.records if record.name == "uvicorn.error"]


def test_the_kernel_says_what_a_client_has_not_taken() -> None:
    """What `_num_untaken` reads is there on this system."""
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"12345")
        assert struct.unpack("i", fcntl.ioctl(left.fileno(), termios.TIOCOUTQ, bytes(4)))[0] > 0


class Places:
    """A door with so many places, each of which is held for ever."""

    def __init__(self, count: int) -> None:
        self.num_left = count
        self.num_asked = 0

    def refusal(self, scope: Scope) -> Whole | None:  # noqa: ARG002
        self.num_asked += 1
        return None if self.num_left else Whole(429, b"content-length: 3\r\n", b"no.")

    def counts(self, scope: Scope) -> bool:  # noqa: ARG002
        return True

    def hold(self, scope: Scope) -> None:  # noqa: ARG002
        self.num_left -= 1


class Counted:
    """`echo`, and how many requests it got."""

    num_begun = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_begun += 1
        await echo(scope, receive, send)


def test_a_place_is_for_whose_body_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both heads come while there is a place; the application never hears of the one whose body comes later."""
    monkeypatch.setattr(connection, "PUT_OFF_SECONDS", 60.0)
    door = Places(1)
    app = Counted()

    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection(*writer.get_extra_info("peername"))
        writer.write(HEAD)
        other_writer.write(HEAD + b"1234")
        while door.num_asked < 2:
            await asyncio.sleep(0)
        assert app.num_begun == 0
        other_writer.write(b"56789.")
        assert (await other_reader.readuntil(b"123456789.")).startswith(b"HTTP/1.1 200 ")
        writer.write(b"123456789.")
        assert (await reader.readuntil(b"no.")).startswith(b"HTTP/1.1 429 ")
        other_writer.close()
        assert (app.num_begun, door.num_left) == (1, 0)

    run(test, app, door)


@pytest.mark.parametrize(("seconds", "size"), [(0.01, 10), (60.0, 1 << 18)])
def test_a_body_that_is_slow_or_long_is_left_to_the_application(
    seconds: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PUT_OFF_SECONDS", seconds)
    door = Places(1)
    app = Counted()

    async def test(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD.replace(b"10", str(size).encode()) + b"x" * (size - 1))
        while not app.num_begun:
            await asyncio.sleep(0.001)
        assert door.num_left == 1
        writer.write(b".")
        assert len(await reader.readuntil(b"x.")) > size
        assert door.num_left == 0

    run(test, app, door)


@pytest.mark.parametrize(
    ("app", "door", "sent"),
    [
        (echo, None, HEAD + b"123456789."),
        (echo, Places(0), HEAD + b"123456789."),
        (unasked, None, HEAD),
        (echo, None, HEAD + b"1234"),
        (echo, None, HEAD[:20]),
    ],
    ids=["answered", "refused", "answered early", "left in a body", "left in a head"],
)
def test_a_connection_that_has_ended_leaves_nothing_to_the_collector(
    app: ASGIApp, door: Door | None, sent: bytes
) -> None:
    """In a flood of them the collector's pauses were a tenth of a second each, a third of the server's time."""

    def connections() -> int:
        return sum(isinstance(each, Connection) for each in gc.get_objects())

    async def test() -> None:
        async with connected(app, door) as (_, first):
            before = connections()
            for _ in range(3):
                _, writer = await asyncio.open_connection(*first.get_extra_info("peername"))
                writer.write(sent)
                while connections() == before:
                    await asyncio.sleep(0.001)
                writer.close()
            while connections() > before:
                await asyncio.sleep(0.001)

    gc.collect()
    gc.disable()
    try:
        uvloop.run(asyncio.wait_for(test(), 60))
    finally:
        gc.enable()
