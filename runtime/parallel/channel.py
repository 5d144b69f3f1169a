"""Orders from the driver to its followers, and their logits back, in memory that the processes share.

The memory has no name (memfd), so nothing of it is left when the processes are gone, however they ended. It holds a
ring of orders, which all followers read, and one place for each follower's answer. What has been written is counted in
pipes, a byte for each: a reader sleeps in the system, without the interpreter's lock, until there is something.
"""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from octavo.runtime.parallel.order import Int32s

NUM_SLOTS = 4  # orders that may be written before a follower has read the first of them


class ChannelEnds(msgspec.Struct, frozen=True):
    """What a follower needs to open its end: file descriptors that it inherits, and the layout of the memory.

    orders   is read: counts orders that it has not read
    room     is written: counts slots of the ring that it has read
    answers  is written: counts its answers
    """

    memory: int
    orders: int
    room: int
    answers: int
    order_numbers: int
    answer_numbers: int
    place: int  # which of the answers is its own

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.memory, self.orders, self.room, self.answers)


@dataclass(frozen=True)
class _Pipes:
    """The two ends, (to read, to write), of the pipes between the driver and one follower."""

    orders: tuple[int, int]
    room: tuple[int, int]
    answers: tuple[int, int]

    @classmethod
    def create(cls) -> _Pipes:
        pipes = cls(os.pipe(), os.pipe(), os.pipe())
        os.write(pipes.room[1], bytes(NUM_SLOTS))
        return pipes


@dataclass(frozen=True)
class _Memory:
    """The shared memory as arrays. An order and an answer each have their length before them."""

    orders: NDArray[np.int32]  # [NUM_SLOTS, 1 + order_numbers]
    answer_shapes: NDArray[np.int64]  # [followers, 2]
    answers: NDArray[np.float32]  # [followers, answer_numbers]


def _map(descriptor: int, order_numbers: int, answer_numbers: int, num_followers: int) -> _Memory:
    orders = NUM_SLOTS * (1 + order_numbers) * 4
    orders += -orders % 64
    shapes = num_followers * 16
    shapes += -shapes % 64
    size = orders + shapes + num_followers * answer_numbers * 4
    if os.fstat(descriptor).st_size < size:
        os.ftruncate(descriptor, size)
    memory = mmap.mmap(descriptor, size)
    return _Memory(
        np.frombuffer(memory, np.int32, NUM_SLOTS * (1 + order_numbers)).reshape(NUM_SLOTS, -1),
        np.frombuffer(memory, np.int64, 2 * num_followers, orders).reshape(num_followers, 2),
        np.frombuffer(memory, np.float32, num_followers * answer_numbers, orders + shapes).reshape(num_followers, -1),
    )


class DriverChannel:
    """The driver's end. `wake` ends whatever it waits for; then it raises what `fail` was told."""

    def __init__(self, num_followers: int, order_numbers: int, answer_numbers: int) -> None:
        """order_numbers: int32 of the largest order; answer_numbers: float32 of the largest answer."""
        memory = os.memfd_create("octavo-orders", os.MFD_CLOEXEC)
        self._memory = _map(memory, order_numbers, answer_numbers, num_followers)
        self._pipes = [_Pipes.create() for _ in range(num_followers)]
        self.ends = [
            ChannelEnds(memory, pipes.orders[0], pipes.room[1], pipes.answers[1], order_numbers, answer_numbers, place)
            for place, pipes in enumerate(self._pipes)
        ]
        self._num_sent = 0
        self._failure: str | None = None
        self._is_closed = False
        self._closing = threading.Lock()  # after `close` a descriptor's number may be that of somebody else's file

    def send(self, order: Int32s) -> None:
        """Tell all followers; waits for one that is NUM_SLOTS orders behind."""
        for pipes in self._pipes:
            self._wait(pipes.room)
        slot = self._memory.orders[self._num_sent % NUM_SLOTS]
        slot[1 : 1 + len(order)] = order
        slot[0] = len(order)
        self._num_sent += 1
        for pipes in self._pipes:
            _count(pipes.orders[1])

    def receive(self, place: int) -> NDArray[np.float32]:
        """Wait for a follower's answer to the last order; valid until the next order is sent."""
        self._wait(self._pipes[place].answers)
        rows, columns = self._memory.answer_shapes[place].tolist()
        return self._memory.answers[place, : rows * columns].reshape(rows, columns)

    def fail(self, message: str) -> None:
        """Let every later call, and those that wait, raise this message; may be called from any thread."""
        with self._closing:
            if self._is_closed:
                return
            self._failure = message
            for pipes in self._pipes:
                _count(pipes.room[1])
                _count(pipes.answers[1])

    def close(self) -> None:
        """Give the descriptors back: whoever sends or receives from now on is told so."""
        with self._closing:
            self._is_closed = True
            self._failure = self._failure or "the channel to the other ranks is closed"
            for pipes in self._pipes:
                for descriptor in (*pipes.orders, *pipes.room, *pipes.answers):
                    os.close(descriptor)
            os.close(self.ends[0].memory)

    def _wait(self, pipe: tuple[int, int]) -> None:
        if self._failure is None:
            os.read(pipe[0], 1)
        if self._failure is not None:
            raise RuntimeError(self._failure)


class FollowerChannel:
    """A follower's end."""

    def __init__(self, ends: ChannelEnds, num_followers: int) -> None:
        self._ends = ends
        self._memory = _map(ends.memory, ends.order_numbers, ends.answer_numbers, num_followers)
        self._num_read = 0

    def receive(self) -> Int32s:
        """Wait for the next order."""
        os.read(self._ends.orders, 1)
        slot = self._memory.orders[self._num_read % NUM_SLOTS]
        order: Int32s = slot[1 : 1 + slot[0]].copy()
        self._num_read += 1
        _count(self._ends.room)
        return order

    def answer(self, logits: NDArray[np.float32]) -> None:
        """Hand over logits [L, vocab] of the last order."""
        self._memory.answer_shapes[self._ends.place] = logits.shape
        self._memory.answers[self._ends.place, : logits.size] = logits.ravel()
        _count(self._ends.answers)


def _count(descriptor: int) -> None:
    """Add one to what a pipe counts."""
    os.write(descriptor, b"\0")
