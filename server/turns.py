"""How much of one turn of the event loop the beginning of requests may take.

Between two turns the loop reads what clients have sent, and refuses what has no place. When many requests come at once,
they are begun over several turns: a client that is to be refused is not held up by all that is done for the others.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

SECONDS = 0.01  # of a turn
AT_ONCE = 8  # that have waited: what each of them takes is not known before


class Turns:
    """Use from one event loop only."""

    def __init__(self) -> None:
        self._until: float | None = None  # this turn's end; None: nothing has begun in it
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def next(self) -> None:
        """Wait for a turn that has time, behind those that wait already; without any, this one may have it."""
        if not self._waiting and (self._until is None or time.monotonic() < self._until):
            if self._until is None:
                self._open()
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _open(self) -> None:
        self._until = time.monotonic() + SECONDS
        asyncio.get_running_loop().call_soon(self._close)

    def _close(self) -> None:
        """The next turn has begun."""
        self._until = None
        count = 0
        while self._waiting and count < AT_ONCE:
            turn = self._waiting.popleft()
            if not turn.done():  # its client may have hung up
                turn.set_result(None)
                count += 1
        if count:
            self._open()
