"""One client's connection: uvicorn's HTTP/1.1, with limits on what comes before any route is asked.

uvicorn takes a head (request line and headers) of any length, and waits for its end forever. Of a request that offers
an upgrade, as Java's client does for HTTP/2, its parser drops the body; here the offer is passed over.
"""

from __future__ import annotations

import asyncio
import re

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from octavo.server.errors import error_json

MAX_HEAD = 1 << 16  # bytes
HEAD_SECONDS = 60.0
UPGRADE = re.compile(rb"\r\nupgrade(?=:)", re.IGNORECASE)


class Connection(HttpToolsProtocol):
    """Refuses a head that is too long, and closes a connection whose head does not come."""

    _head_size = 0  # bytes of an unfinished head
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_timer is not None or not self.cycle.more_body:  # else it is of a body
            head, end, rest = data.partition(b"\r\n\r\n")
            data = UPGRADE.sub(b"\r\nx-upgrade", head) + end + rest
        super().data_received(data)
        if self._head_timer is not None:
            self._head_size += len(data)
            if self._head_size > MAX_HEAD:
                self._refuse(431, f"the request's head is longer than {MAX_HEAD} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._has_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _expect_head(self) -> None:
        self._has_head()
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _has_head(self) -> None:
        self._head_size = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        self._has_head()
        if self.transport.is_closing():
            return
        content = error_json(status, message)
        head = f"content-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head.encode() + content)
        self.transport.close()
