"""All-reduce and gather between processes of one machine, over memory that they share. Reference: `.reference`.

The memory: a stop word, then a number for each rank, each on a cache line of its own, then two buffers of CHUNK floats
for each rank. Some of the ranks may also add up among themselves, in memory behind that of all, but for the stop word.
Tensors go through in chunks. For each, a rank copies its own into one of its buffers, publishes how many chunks it has
copied, waits until all others have published as many, and reads all buffers. The next chunk goes through the other
buffer, so this one wait is all there is: who has published chunk n has read all of chunk n - 1, whose buffers chunk
n + 1 will overwrite.

Whoever waits spins, gives way to other threads only after SPINS turns (a peer on a core of its own is there sooner),
and looks at the stop word as it does: a peer that has died never keeps anybody waiting.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.native.atomics import give_way, pause, pointer, read_word, sleep, write_word
from octavo.kernels.native.jit import kernel, view

CHUNK = 65_536  # floats: 256 KB, so that the buffers of a few ranks stay in a core's cache
LINE = 64  # bytes
SPINS = 4096  # some 0.2 ms
PATIENCE = 100_000  # turns, some 0.1 s of giving way, after which a rank that waits sleeps between its looks

SUM = 0
NOTHING = -1

_COUNT = 0  # of the state: chunks that this rank has exchanged
_STOPPED = 1  # 1 where an exchange was given up


@numba.njit
def wait_for(stop, base, index, number):  # type: ignore[no-untyped-def]
    """Wait until word `index` behind base is `number` at least; False when the word at `stop` was set first."""
    turns = 0
    while read_word(base, index) < number:
        turns += 1
        if turns <= SPINS:
            pause()
            continue
        if turns % 64 == 0 and read_word(stop, 0) != 0:
            return False
        if turns < PATIENCE:
            give_way()
        else:
            sleep(50)
    return True


@numba.njit
def _wait(stop, memory, rank, size, number):  # type: ignore[no-untyped-def]
    """Wait until all ranks have published `number` chunks; False when the stop word was set first."""
    for other in range(size):
        if other != rank and not wait_for(pointer(stop), pointer(memory), 8 * (1 + other), number):
            return False
    return True


@numba.njit
def _add(total, other, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        total[i] += other[i]


@numba.njit
def _copy(source, target, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        target[i] = source[i]


@kernel("qqqqqqqq")
def _exchange(args):  # type: ignore[no-untyped-def]
    """memory, rank, size, x, elements, out, state, stop.

    out: SUM (into x), NOTHING, or the address of [size, elements].
    """
    a = numba.carray(args, (9,), np.int64)
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
        if not _wait(a[8], memory, rank, size, number):
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
    """Of the memory in which `size` ranks add up."""
    return LINE * (1 + size) + 2 * size * CHUNK * 4


class SharedMemory:
    """One rank's end: every rank must make the same calls in the same order.

    begin  where the ranks' memory begins in that of the engine, which begins with the stop word
    """

    def __init__(self, memory: NDArray[np.uint8], begin: int, rank: int, size: int) -> None:
        self._memory = memory
        self._address = memory.ctypes.data + begin
        self._state = np.zeros(2, np.int64)
        self.rank = rank
        self.size = size

    @property
    def is_stopped(self) -> bool:
        """Whether a wait was stopped, and what came of it is no sum."""
        return bool(self._state[_STOPPED])

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

    def _exchange(self, x: Tensor, out: int) -> bool:
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        state = self._state.ctypes.data
        stop = self._memory.ctypes.data
        _exchange.start(1, self._address, self.rank, self.size, x.data_ptr(), x.numel(), out, state, stop)
        return not self.is_stopped


KERNELS = (_exchange,)
