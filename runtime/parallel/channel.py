"""Orders from the driver to its followers, in memory that the processes share.

The memory has no name (memfd), so nothing of it is left when the processes are gone, however they ended. It holds a
ring of orders, which all followers read. What has been written is counted in pipes, a byte for each: a reader sleeps
in the system, without the interpreter's lock, until there is something.
"""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from octavo.runtime.parallel.config import MOST_STAGES
from octavo.runtime.parallel.lifeline import EndedError
from octavo.runtime.parallel.order import Int32s

NUM_SLOTS = MOST_STAGES  # orders that may be written before a follower has read the first of them


class ChannelEnds(msgspec.Struct, frozen=True):
    """The file descriptors that a follower inherits to open its end.

    orders   is read: counts orders that it has not read
    room     is written: counts slots of the ring that it has read
    """

    memory: int
    orders: int
    room: int

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.memory, self.orders, self.room)


@dataclass(frozen=True)
class _Pipes:
    """The two ends, (to read, to write), of the pipes between the driver and one follower."""

    orders: tuple[int, int]
    room: tuple[int, int]

    @classmethod
    def create(cls) -> _Pipes:
        pipes = cls(os.pipe(), os.pipe())
        os.write(pipes.room[1], bytes(NUM_SLOTS))
        return pipes


def _map(descriptor: int, order_numbers: int) -> NDArray[np.int32]:
    """The ring [NUM_SLOTS, 1 + order_numbers]: each order has its length before it. Whoever comes first makes it."""
    size = NUM_SLOTS * (1 + order_numbers) * 4
    if os.fstat(descriptor).st_size < size:
        os.ftruncate(descriptor, size)
    return np.frombuffer(mmap.mmap(descriptor, size), np.int32).reshape(NUM_SLOTS, -1)


class DriverChannel:
    """The driver's end. `fail` ends whatever it waits for."""

    def __init__(self, num_followers: int) -> None:
        self._memory = os.memfd_create("octavo-orders", os.MFD_CLOEXEC)
        self._pipes = [_Pipes.create() for _ in range(num_followers)]
        self.ends = [ChannelEnds(self._memory, pipes.orders[0], pipes.room[1]) for pipes in self._pipes]
        self._ring: NDArray[np.int32] | None = None
        self._num_sent = 0
        self._failure: str | None = None
        self._is_closed = False
        self._closing = threading.Lock()  # after `close` a descriptor's number may be that of somebody else's file

    def open(self, order_numbers: int) -> None:
        """order_numbers: int32 of the largest order, the same for followers. Before the first `send`."""
        self._ring = _map(self._memory, order_numbers)

    def send(self, order: Int32s) -> None:
        """Tell all followers; waits for one that is NUM_SLOTS orders behind."""
        assert self._ring is not None
        for pipes in self._pipes:
            self._wait(pipes.room)
        slot = self._ring[self._num_sent % NUM_SLOTS]
        slot[1 : 1 + len(order)] = order
        slot[0] = len(order)
        self._num_sent += 1
        for pipes in self._pipes:
            _count(pipes.orders[1])

    def fail(self, message: str) -> None:
        """Let every later call, and those that wait, raise this message; may be called from any thread."""
        with self._closing:
            if self._is_closed:
                return
            self._failure = self._failure or message
            for pipes in self._pipes:
                _count(pipes.room[1])

    def close(self) -> None:
        """Give the descriptors back: whoever sends from now on is told so."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            self._failure = self._failure or "the channel to the other ranks is closed"
            for pipes in self._pipes:
                for descriptor in (*pipes.orders, *pipes.room):
                    os.close(descriptor)
            os.close(self._memory)

    def _wait(self, pipe: tuple[int, int]) -> None:
        if self._failure is None:
            os.read(pipe[0], 1)
        if self._failure is not None:
            raise EndedError(self._failure)


class FollowerChannel:
    """A follower's end."""

    def __init__(self, ends: ChannelEnds, order_numbers: int) -> None:
        self._ends = ends
        self._ring = _map(ends.memory, order_numbers)
        self._num_read = 0

    def receive(self) -> Int32s | None:
        """Wait for the next order; None when the driver is gone."""
        if not os.read(self._ends.orders, 1):
            return None
        slot = self._ring[self._num_read % NUM_SLOTS]
        order: Int32s = slot[1 : 1 + slot[0]].copy()
        self._num_read += 1
        try:
            _count(self._ends.room)
        except BrokenPipeError:
            return None
        return order


def _count(descriptor: int) -> None:
    """Add one to what a pipe counts."""
    os.write(descriptor, b"\0")
