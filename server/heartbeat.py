"""Tells an engine that is frozen (stopped, or starved of CPU), or that hangs, from one that is busy.

Each rank's process echoes each beat from a thread that needs no Python (runtime/parallel/lifeline.py), so an echo means
that the process runs, not that its loop turns. How far the loop is, the driver tells layer by layer
(runtime/progress.py), so that no step takes too long, and one that hangs is seen, in a kernel or in a lock.
"""

from __future__ import annotations

import asyncio
import contextlib

import zmq

from octavo.runtime.progress import Progress

BEATS = 10  # in the time after which silence is a freeze, and a layer that takes so long is a hang


class Heartbeat:
    """The server's end of the echo of one engine's ranks. Use from one event loop only."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, num_ranks: int = 1) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._socket.bind(address)
        self._ranks = [b"%d" % rank for rank in range(num_ranks)]
        self._missed: dict[bytes, int] = {}  # beats in a row, of each rank that has shown a sign of life

    def begin(self) -> None:
        """The driver has shown one, be it an echo or another one."""
        self._missed.setdefault(self._ranks[0], 0)

    async def end(self, seconds: float, progress: Progress) -> str:
        """Return what is wrong when for that long a rank has not echoed, or the loop has not got on with its work.

        The time before a rank's first sign of life, while it starts, is free. Missed beats are counted rather than
        seconds: a server that was itself stopped sees no silence when it wakes up.
        """
        num_idle = 0
        last = progress.count
        while True:
            self._beat()
            await asyncio.sleep(seconds / BEATS)
            heard = self._heard()
            self._missed = {rank: 0 if rank in heard else missed + 1 for rank, missed in self._missed.items()}
            self._missed |= dict.fromkeys(heard, 0)
            frozen = [rank.decode() for rank, missed in self._missed.items() if missed == BEATS]
            if frozen:
                who = "the engine process" if len(self._ranks) == 1 else f"rank {frozen[0]} of {len(self._ranks)}"
                return f"{who} is frozen: not a sign of life for {seconds:g} s (--engine-timeout)"
            count = progress.count
            num_idle = 0 if count is None or count != last else num_idle + 1
            last = count
            if num_idle == BEATS:
                return f"the engine hangs: not one layer of its step was done in {seconds:g} s (--engine-timeout)"

    def close(self) -> None:
        self._socket.close(linger=0)

    def _beat(self) -> None:
        for rank in self._ranks:
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart([rank, b""], zmq.NOBLOCK)  # to who isn't there yet it goes nowhere

    def _heard(self) -> set[bytes]:
        """Ranks of which an echo has come since the last call."""
        ranks: set[bytes] = set()
        with contextlib.suppress(zmq.Again):
            while True:
                ranks.add(self._socket.recv_multipart(zmq.NOBLOCK)[0])
        return ranks
