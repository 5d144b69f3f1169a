"""Tells a frozen engine process (stopped, or starved of CPU) from a busy one, however long its step takes.

The engine process echoes each beat from a thread that needs no Python (runtime/process.py), so an echo means that the
process runs, not that its loop turns.
"""

from __future__ import annotations

import asyncio
import contextlib

import zmq

BEATS = 10  # in the time after which silence is a freeze


class Heartbeat:
    """The server's end of the echo. Use from one event loop only.

    has_begun: whether the process has shown a sign of life, be it an echo or another one.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.bind(address)
        self.has_begun = False

    async def silence(self, seconds: float) -> None:
        """Return when no echo has come for that long. The time before `has_begun`, while the engine starts, is free.

        Missed beats are counted rather than seconds: a server that was itself stopped sees no silence when it wakes up.
        """
        missed = 0
        while missed < BEATS:
            self._beat()
            await asyncio.sleep(seconds / BEATS)
            if self._heard():
                self.has_begun = True
                missed = 0
            elif self.has_begun:
                missed += 1

    def close(self) -> None:
        self._socket.close(linger=0)

    def _beat(self) -> None:
        with contextlib.suppress(zmq.Again):  # nobody is there yet
            self._socket.send(b"", zmq.NOBLOCK)

    def _heard(self) -> bool:
        """Whether an echo has come since the last call."""
        is_heard = False
        with contextlib.suppress(zmq.Again):
            while True:
                self._socket.recv(zmq.NOBLOCK)
                is_heard = True
        return is_heard
