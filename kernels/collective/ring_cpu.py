"""Bytes from one process of a machine to another, through a ring in memory that they share. Reference: `.reference`.

The ring: how many bytes have been written to it, how many have been read, each on a cache line of its own, then
CAPACITY bytes. Who sends waits only while there is no room, so a tensor that fits is handed over at once, and who
receives waits for each piece as it comes. Waiting is that of `shm_cpu`.
"""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from octavo.kernels.collective.shm_cpu import LINE, wait_for
from octavo.kernels.native.atomics import pointer, read_word, write_word
from octavo.kernels.native.jit import kernel, view

CAPACITY = 32 << 20  # bytes: the residual stream of 2,048 tokens of 8,192 numbers in bfloat16
PIECE = 1 << 18  # bytes that are copied at a time, so that reading begins before all is written
NUM_BYTES = 2 * LINE + CAPACITY

_WRITTEN = 0  # words
_READ = 8


@numba.njit
def _copy(source, target, count):  # type: ignore[no-untyped-def]
    of_source = view(source, (count,), np.uint8)
    of_target = view(target, (count,), np.uint8)
    for i in range(count):
        of_target[i] = of_source[i]


@kernel("qqqqq")
def _send(args):  # type: ignore[no-untyped-def]
    """stop word, ring, x, bytes, state: 1 where it was given up."""
    a = numba.carray(args, (6,), np.int64)
    base = pointer(a[2])
    written = read_word(base, _WRITTEN)
    begin = 0
    while begin < a[4]:
        place = written % CAPACITY
        count = min(a[4] - begin, PIECE, CAPACITY - place)
        if not wait_for(pointer(a[1]), base, _READ, written + count - CAPACITY):
            view(a[5], (1,), np.int64)[0] = 1
            return
        _copy(a[3] + begin, a[2] + 2 * LINE + place, count)
        begin += count
        written += count
        write_word(base, _WRITTEN, written)


@kernel("qqqqq")
def _receive(args):  # type: ignore[no-untyped-def]
    """As `_send`."""
    a = numba.carray(args, (6,), np.int64)
    base = pointer(a[2])
    read = read_word(base, _READ)
    begin = 0
    while begin < a[4]:
        place = read % CAPACITY
        count = min(a[4] - begin, PIECE, CAPACITY - place)
        if not wait_for(pointer(a[1]), base, _WRITTEN, read + count):
            view(a[5], (1,), np.int64)[0] = 1
            return
        _copy(a[2] + 2 * LINE + place, a[3] + begin, count)
        begin += count
        read += count
        write_word(base, _READ, read)


class Ring:
    """Either end. Each has one process; both send and receive tensors of the same sizes in the same order.

    address, stop: of NUM_BYTES zeros at first, and of a word that ends all waiting once it isn't zero.
    """

    def __init__(self, address: int, stop: int) -> None:
        self._address = address
        self._stop = stop
        self._stopped = np.zeros(1, np.int64)

    def send(self, x: Tensor) -> bool:
        """Hand x over, without gaps. False when it was stopped."""
        assert x.is_contiguous()
        _send.start(1, self._stop, self._address, x.data_ptr(), x.nbytes, self._stopped.ctypes.data)
        return not self._stopped[0]

    def receive(self, out: Tensor) -> bool:
        """Take over what was sent, into `out`, of its size and without gaps. False when it was stopped."""
        assert out.is_contiguous()
        _receive.start(1, self._stop, self._address, out.data_ptr(), out.nbytes, self._stopped.ctypes.data)
        return not self._stopped[0]


KERNELS = (_send, _receive)
