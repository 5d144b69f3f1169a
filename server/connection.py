"""One client's connection: uvicorn's HTTP/1.1 protocol, with limits that hold before any route is asked.

uvicorn takes a head (request line and headers) and trailers (header lines behind a chunked body) of any length, waits
for either forever, waits forever for a client that takes nothing of its answer, and goes on reading a body whose answer
has been sent. When a request offers an upgrade, as Java's client does for HTTP/2, its parser drops the body; here the
offer is ignored, as HTTP allows.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import re
import struct
import termios
import time
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import httptools
from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import get_client_addr, get_path_with_query_string

from octavo.server.errors import error_json

logger = logging.getLogger(__name__)

MAX_HEAD = 1 << 16  # bytes of a request line with its headers, and again of the trailers behind a chunked body
HEAD_SECONDS = 60.0
STALL_SECONDS = 60.0  # within which a client must take at least a byte of an answer that is ready
PUT_OFF_SECONDS = 0.05  # for the body of a request to come before it is started
BODY_SECONDS = 1.0  # for the rest of a body that is not wanted, so that the connection may stay open
LINGER_SECONDS = 2.0  # for the client to read the last answer before its connection is closed
WARNING_SECONDS = 10.0

UPGRADE = re.compile(rb"\r\nupgrade(?=:)", re.IGNORECASE)
UPGRADE_LINE = b"\r\nupgrade:"


class Whole(NamedTuple):
    """A whole response. headers: their lines."""

    status: int
    headers: bytes
    body: bytes


def header_lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Headers as they are sent."""
    return b"".join([name + b": " + value + b"\r\n" for name, value in headers])


class Door(Protocol):
    """What is asked about each request before the application is, at half the cost: no task, no middleware."""

    def refusal(self, scope: Scope) -> Whole | None:
        """The response to a request that needs no application; None: it needs one."""

    def counts(self, scope: Scope) -> bool:
        """Whether `hold` has to know when a request has come whole."""

    def hold(self, scope: Scope) -> None:
        """A request for the application has come whole."""


CHUNK = "octavo_write_chunk"
"""Where a request's state has what sends a piece of a streamed answer at once; False: it must go through `send`."""


class Connection(HttpToolsProtocol):
    """Refuses heads and trailers that are too long, and closes connections on which nothing moves.

    door: is asked before the application. A request that counts for it is put off until its body has come, for a moment
    at most: of a burst whose clients send head and body apart, all heads would pass before the first body came.
    _reads_head: what comes next belongs to a head, not to a body.
    _held_back: the end of the bytes of a head so far, while it may be the beginning of an Upgrade header.
    _head_size: bytes of an unfinished head; behind a head, bytes of finished trailers.
    _line_size: bytes behind a head since the last byte of a body or the end of the last trailer.
    _running: the request that is being answered; later ones of the same connection wait in uvicorn's `pipeline`.
    _keeps_alive: whether the connection may stay open behind the newest request, once that request has come whole.
    _put_off: the request that is not started yet, as its body comes.
    _unsent: the response to a request without an application, until its body has come.
    _is_deaf: nothing that the client sends is read any more. _is_parting: nothing is sent any more either.
    """

    _reads_head = True
    _held_back = b""
    _head_size = 0
    _line_size = 0
    _is_deaf = False
    _is_parting = False
    _keeps_alive = True
    _running: RequestResponseCycle | None = None
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None
    _unsent: tuple[RequestResponseCycle, Whole] | None = None
    _unsent_timer: asyncio.TimerHandle | None = None
    _put_off: tuple[RequestResponseCycle, ASGIApp] | None = None
    _put_off_timer: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, door: Door | None = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._door = door

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._parting_transport = _PartingTransport(self)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        for timer in (self._stall_timer, self._linger_timer, self._unsent_timer, self._put_off_timer):
            if timer is not None:
                timer.cancel()
        waiting = [cycle for cycle, _ in self.pipeline]
        self.pipeline.clear()
        super().connection_lost(exc)
        for cycle in (*waiting, self._running, self.cycle):
            if cycle is not None:
                cycle.scope["state"].pop(CHUNK, None)  # or they would hold each other
                _disconnect(cycle)  # uvicorn tells the newest request only, and keeps what came of bodies
        self.cycle = self._running = None  # type: ignore[assignment]
        self._unsent = self._put_off = self._parting_transport = None  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._unset_keepalive_if_required()
        if self._reads_head:
            data = self._without_upgrade(data)
        self._line_size += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # CONNECT: it is answered with 404, like any other path that isn't there
        except httptools.HttpParserError:
            _warn_seldom(self.server_state, "a client sent what is not HTTP")
            self._refuse(400, "Invalid HTTP request received.")
            return
        if self._head_timer is not None:
            self._head_size += len(data)
            if self._head_size > MAX_HEAD:
                self._refuse(431, f"the request's head is longer than {MAX_HEAD} bytes")
        elif not self._reads_head and self._head_size + self._line_size > MAX_HEAD:
            self._refuse(431, f"the trailers behind the request's body are longer than {MAX_HEAD} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reads_head:
            super().on_header(name, value)
        else:  # a trailer is dropped: no route asks for one, and as a header it would evade a proxy's checks
            self._head_size += len(name) + len(value)
            self._line_size = 0

    def on_headers_complete(self) -> None:
        self._end_head()
        self._reads_head = False
        super().on_headers_complete()
        self._keeps_alive = self.cycle.keep_alive
        self._make_last(self.cycle)  # an answer that is sent before the body's end closes the connection

    def on_body(self, body: bytes) -> None:
        self._line_size = 0
        super().on_body(body)
        if self._unsent is not None and self.flow.read_paused:
            self._send_unsent()
        elif self._put_off is not None and self.flow.read_paused:
            self._start_put_off()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._reads_head = True
        self._head_size = 0
        self._line_size = 0
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keeps_alive
            self.cycle.transport = self.transport
        if self._put_off is not None:
            self._start_put_off()
        elif self._running is self.cycle and self._unsent is None and not self.cycle.response_started:
            self._hold(self.cycle)
        if self._unsent is not None and self._unsent[0] is self.cycle:
            self._send_unsent()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        self._running = cycle
        cycle.scope["state"][CHUNK] = self._write_chunk
        if self._is_refused(cycle):
            return
        if _is_cut(cycle) and self._door is not None and self._door.counts(cycle.scope):  # type: ignore[arg-type]
            self._put_off = (cycle, app)
            self._put_off_timer = self.loop.call_later(PUT_OFF_SECONDS, self._start_put_off)
        else:
            self._start(cycle, app)

    def _is_refused(self, cycle: RequestResponseCycle) -> bool:
        response = None if self._door is None or self.flow.write_paused else self._door.refusal(cycle.scope)  # type: ignore[arg-type]
        if response is None:
            return False
        self._unsent = (cycle, response)
        self._unsent_timer = self.loop.call_later(BODY_SECONDS if _is_cut(cycle) else 0, self._send_unsent)
        return True

    def _write_chunk(self, content: bytes) -> bool:
        """Send a piece of the answer that has begun, if it can be sent now: what `send` does, without the way there."""
        cycle = self._running
        if cycle is None or cycle.disconnected or not cycle.chunked_encoding or cycle.response_complete:
            return False
        if self.flow.write_paused or not content:
            return not content  # which would be the end
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(content), content))
        return True

    def _start(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:
        if not cycle.more_body:
            self._hold(cycle)
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]

    def _hold(self, cycle: RequestResponseCycle) -> None:
        if self._door is not None:
            self._door.hold(cycle.scope)  # type: ignore[arg-type]

    def _start_put_off(self) -> None:
        """Start a request that was put off, unless it is to be refused by now."""
        assert self._put_off is not None
        assert self._put_off_timer is not None
        cycle, app = self._put_off
        self._put_off = None
        self._put_off_timer.cancel()
        if not cycle.disconnected and not self._is_refused(cycle):
            self._start(cycle, app)

    def _send_unsent(self) -> None:
        """Send a response that is there: what uvicorn's `send` does, which takes four times as long."""
        assert self._unsent is not None
        assert self._unsent_timer is not None
        cycle, response = self._unsent
        self._unsent = None
        self._unsent_timer.cancel()
        if cycle.disconnected:
            return
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        if cycle.access_log and self.access_logger.isEnabledFor(logging.INFO):
            path = get_path_with_query_string(cycle.scope)
            said = get_client_addr(cycle.scope), cycle.scope["method"], path, cycle.scope["http_version"]
            self.access_logger.info('%s - "%s %s HTTP/%s" %d', *said, response.status)
        close = b"" if cycle.keep_alive else b"connection: close\r\n"
        head = STATUS_LINE[response.status] + header_lines(cycle.default_headers) + close + response.headers + b"\r\n"
        cycle.transport.write(head + response.body)
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()

    def on_response_complete(self) -> None:
        if self._is_parting:
            self.server_state.total_requests += 1
        else:
            super().on_response_complete()

    def shutdown(self) -> None:
        self._keeps_alive = False
        super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _without_upgrade(self, data: bytes) -> bytes:
        """These bytes of a head with its Upgrade header renamed, even where the header comes in several pieces."""
        data = self._held_back + data
        head, end, rest = data.partition(b"\r\n\r\n")
        self._held_back = b""
        if not end:
            tail = head[-len(UPGRADE_LINE) :].lower()
            held = next((n for n in range(len(tail), 0, -1) if UPGRADE_LINE.startswith(tail[-n:])), 0)
            if held == len(UPGRADE_LINE):
                held = 0  # all of it is there
            self._held_back = head[len(head) - held :]
            head = head[: len(head) - held]
        return UPGRADE.sub(b"\r\nx-upgrade", head) + end + rest

    def _expect_head(self) -> None:
        self._end_head()
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._hang_up)

    def _end_head(self) -> None:
        self._head_size = 0
        self._line_size = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int, message: str) -> None:
        """Say what is wrong with what came, and close.

        While another request is being answered nothing can be said; the connection is closed behind that answer.
        """
        self._end_head()
        if self.transport.is_closing():
            return
        broken = self.cycle if self.cycle is not None and self.cycle.more_body else None
        if self.pipeline and self.pipeline[0][0] is broken:
            self.pipeline.popleft()
        last = self.pipeline[0][0] if self.pipeline else self._running
        if last is None or last.response_complete or (last is broken and not last.response_started):
            if broken is not None:
                _disconnect(broken)
            content = error_json(status, message)
            head = f"content-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + head.encode() + content)
            self._part()
        else:
            self._is_deaf = True
            self._make_last(last)

    def _make_last(self, cycle: RequestResponseCycle) -> None:
        """Close the connection behind the answer to this request, once the client has had time to read the answer."""
        cycle.keep_alive = False
        cycle.transport = self._parting_transport  # type: ignore[assignment]

    def _part(self) -> None:
        """Send no more, and close in a moment.

        Closing at once would reset the connection when bytes of the client's are still on their way, and with a reset
        the client may lose the answer. They are read and dropped meanwhile.
        """
        if self._is_parting or self.transport.is_closing():
            return
        self._is_deaf = True
        self._is_parting = True
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._linger_timer = self.loop.call_later(LINGER_SECONDS, self._hang_up)

    def _hang_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
            if self.transport.get_write_buffer_size():  # the transport closes only when the client has taken that
                self._watch_reader()

    def _watch_reader(self) -> None:
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(STALL_SECONDS, self._check_reader, self._num_untaken())

    def _check_reader(self, untaken_before: int) -> None:
        """End the connection of a client that has taken nothing since."""
        self._stall_timer = None
        if self._num_untaken() < untaken_before:
            self._watch_reader()
            return
        logger.info("hung up on a client that took nothing of its answer for %g s", STALL_SECONDS)
        self.transport.abort()

    def _num_untaken(self) -> int:
        """Bytes of the answer that the client has not taken, here and in the kernel."""
        try:
            descriptor = self.transport.get_extra_info("socket").fileno()
            (in_kernel,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))
        except (OSError, AttributeError):  # closed; or a system that doesn't tell of sockets
            in_kernel = 0
        return self.transport.get_write_buffer_size() + int(in_kernel)


class _PartingTransport:
    """The transport as the last answer of a connection sees it: `close` lets the client read the answer first."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def write(self, data: bytes) -> None:
        self._connection.transport.write(data)

    def is_closing(self) -> bool:
        return self._connection.transport.is_closing()

    def close(self) -> None:
        self._connection._part()


def _disconnect(cycle: RequestResponseCycle) -> None:
    """Let the application know that the client is gone, and drop what came of the body."""
    cycle.disconnected = cycle.disconnected or not cycle.response_complete
    cycle.body = bytearray()
    cycle.message_event.set()


def _is_cut(cycle: RequestResponseCycle) -> bool:
    """Whether more of a request's body is on its way, without a client that waits to be asked for it."""
    return cycle.more_body and not cycle.waiting_for_100_continue


def _warn_seldom(server_state: object, message: str) -> None:
    """Log a warning at most every WARNING_SECONDS for each server, with the number that went unsaid."""
    said = vars(server_state).setdefault("octavo_warned", {"at": -WARNING_SECONDS, "unsaid": 0})
    now = time.monotonic()
    if now - said["at"] < WARNING_SECONDS:
        said["unsaid"] += 1
        return
    others = f" ({said['unsaid']} more since the last warning)" if said["unsaid"] else ""
    said["at"] = now
    said["unsaid"] = 0
    logger.warning("%s%s", message, others)
