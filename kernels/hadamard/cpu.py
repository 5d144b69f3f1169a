"""The CPU's fast Walsh-Hadamard transform of rows, in place: float32 inside. Reference: `hadamard.reference`.

Blocks of 16 numbers and more are done by `vectors`, in as few passes as registers allow; smaller ones level by level.
"""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from octavo.kernels.hadamard.reference import is_block
from octavo.kernels.hadamard.vectors import LANES, first_pass, next_pass
from octavo.kernels.native import cpu_features
from octavo.kernels.native.dtypes import KINDS, load_row, size_of, store_row
from octavo.kernels.native.jit import kernel, next_item, threads_for

MOST_VECTORS = 16  # of a pass where a register holds a vector
FEWER_VECTORS = 4  # where it takes two or four


@numba.njit
def _small_blocks(row, count, block, factor):  # type: ignore[no-untyped-def]
    """A float32 row times the matrix, in place, level by level."""
    half = 1
    while half < block:
        for begin in range(0, count, 2 * half):
            for i in range(begin, begin + half):
                first = row[i]
                second = row[i + half]
                row[i] = first + second
                row[i + half] = first - second
        half *= 2
    for i in range(count):
        row[i] *= factor


@numba.njit
def _large_blocks(address, count, block, factor, most):  # type: ignore[no-untyped-def]
    """The same of float32 at an address, by passes over up to `most` vectors."""
    vectors = min(block // LANES, most)
    first_pass(address, count, vectors, factor)
    done = vectors * LANES
    while done < block:
        vectors = min(block // done, most)
        next_pass(address, count, vectors, done)
        done *= vectors


@kernel("qqqqqq")
def _rows(args):  # type: ignore[no-untyped-def]
    """x, kind, rows, columns, block, most vectors; items are single rows."""
    a = numba.carray(args, (7,), np.int64)
    kind = a[2]
    rows = a[3]
    count = a[4]
    block = a[5]
    stride = count * size_of(kind)
    factor = np.float32(np.float64(block) ** -0.5)
    room = np.empty(count + LANES, np.float32)
    start = (-room.ctypes.data % 64) // 4  # loads of whole cache lines
    row = room[start : start + count]
    while True:
        i = next_item(args)
        if i >= rows:
            break
        load_row(a[1] + i * stride, kind, row, count)
        if block < LANES:
            _small_blocks(row, count, block, factor)
        else:
            _large_blocks(row.ctypes.data, count, block, factor, a[6])
        store_row(row, np.float32(1), a[1] + i * stride, kind, count)


def hadamard_(x: Tensor, block: int) -> Tensor:
    """`hadamard.reference.hadamard` of rows [T, K] that lie one after another, in their place."""
    rows, columns = x.shape
    if not is_block(block, columns) or not x.is_contiguous():
        raise ValueError(f"rows {list(x.shape)} have no Hadamard blocks of {block}")
    most = MOST_VECTORS if cpu_features.has_wide_registers() else FEWER_VECTORS
    _rows.start(threads_for(x.numel()), x.data_ptr(), KINDS[x.dtype], rows, columns, block, most)
    return x


KERNELS = (_rows,)
