"""All-reduce and gather between processes of one machine, over memory that they share. Reference: `.reference`.

The memory: a stop word, then a number for each rank, each on a cache line of its own, then two buffers of CHUNK floats
for each rank. Tensors go through in chunks. For each, a rank copies its own into one of its buffers, publishes how many
chunks it has copied, waits until all others have published as many, and reads all buffers. The next chunk goes through
the other buffer, so this one wait is all there is: who has published chunk n has read all of chunk n - 1, whose buffers
chunk n + 1 will overwrite.

Whoever waits spins, gives way to other threads only after SPINS turns (a peer on a core of its own is there sooner),
and looks at the stop word as it does: a peer that has died never keeps anybody waiting.
"""

from __future__ import annotations

import mmap
import os

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.native.atomics import give_way, pause, read_word, sleep, write_word
from octavo.kernels.native.jit import kernel, pointer, view

CHUNK = 65_536  # floats: 256 KB, so that the buffers of a few ranks stay in a core's cache
LINE = 64  # bytes
SPINS = 4096  # some 0.2 ms
PATIENCE = 100_000  # turns, some 0.1 s of giving way, after which a rank that waits sleeps between its looks

SUM = 0
NOTHING = -1

_COUNT = 0  # of the state: chunks that this rank has exchanged
_STOPPED = 1  # 1 where an exchange was given up


@numba.njit
def _wait(memory, rank, size, number):  # type: ignore[no-untyped-def]
    """Wait until all ranks have published `number` chunks; False when the stop word was set first."""
    base = pointer(memory)
    for other in range(size):
        turns = 0
        while other != rank and read_word(base, 8 * (1 + other)) < number:
            turns += 1
            if turns <= SPINS:
                pause()
                continue
            if turns % 64 == 0 and read_word(base, 0) != 0:
                return False
            if turns < PATIENCE:
                give_way()
            else:
                sleep(50)
    return True


@numba.njit
def _add(total, other, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        total[i] += other[i]


@numba.njit
def _copy(source, target, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        target[i] = source[i]


@kernel("qqqqqqq")
def _exchange(args):  # type: ignore[no-untyped-def]
    """memory, rank, size, x, elements, out, state. out: SUM (into x), NOTHING, or the address of [size, elements]."""
    a = numba.carray(args, (8,), np.int64)
    memory = a[1]
    rank = a[2]
    size = a[3]
    elements = a[5]
    state = view(a[7], (2,), np.int64)
    buffers = memory + LINE * (1 + size)
    begin = 0
    while begin < elements:
        count = min(CHUNK, elements - begin)
        number = state[_COUNT] + 1
        of_turn = buffers + (number & 1) * size * CHUNK * 4
        own = view(a[4] + begin * 4, (count,), np.float32)
        _copy(own, view(of_turn + rank * CHUNK * 4, (count,), np.float32), count)
        write_word(pointer(memory), 8 * (1 + rank), number)
        if not _wait(memory, rank, size, number):
            state[_STOPPED] = 1
            return
        state[_COUNT] = number
        for other in range(size):
            theirs = view(of_turn + other * CHUNK * 4, (count,), np.float32)
            if a[6] == SUM and other > 0:
                _add(own, theirs, count)
            elif a[6] == SUM:
                _copy(theirs, own, count)
            elif a[6] != NOTHING:
                _copy(theirs, view(a[6] + (other * elements + begin) * 4, (count,), np.float32), count)
        begin += count


def num_bytes(size: int) -> int:
    """Of the memory that `size` ranks share."""
    return LINE * (1 + size) + 2 * size * CHUNK * 4


class SharedMemory:
    """One rank's end: every rank must make the same calls in the same order.

    descriptor: of a file in memory, zeros at first, that all ranks have open. Each may ask for its size; it is grown.
    """

    def __init__(self, descriptor: int, rank: int, size: int) -> None:
        if os.fstat(descriptor).st_size < num_bytes(size):
            os.ftruncate(descriptor, num_bytes(size))
        self._bytes = np.frombuffer(mmap.mmap(descriptor, num_bytes(size)), np.uint8)
        self._address = self._bytes.ctypes.data
        self._state = np.zeros(2, np.int64)
        self.rank = rank
        self.size = size

    def all_reduce(self, x: Tensor) -> bool:
        """`reference.all_reduce`, written into x, float32 without gaps. False when it was stopped."""
        return self._exchange(x, SUM)

    def gather(self, x: Tensor, out: Tensor) -> bool:
        """`reference.gather` of x into out [ranks, ...], float32 without gaps. False when it was stopped."""
        assert out.is_contiguous()
        assert out.numel() == self.size * x.numel()
        return self._exchange(x, out.data_ptr())

    def send(self, x: Tensor) -> bool:
        """This rank's part in a `gather` whose result it doesn't want."""
        return self._exchange(x, NOTHING)

    def stop(self) -> None:
        """End whatever any rank waits for here, now and later; may be called from any thread and process."""
        self._bytes[:8].view(np.int64)[0] = 1

    def _exchange(self, x: Tensor, out: int) -> bool:
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        _exchange.start(1, self._address, self.rank, self.size, x.data_ptr(), x.numel(), out, self._state.ctypes.data)
        return not self._state[_STOPPED]


KERNELS = (_exchange,)
