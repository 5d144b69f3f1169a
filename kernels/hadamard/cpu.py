"""The CPU's fast Walsh-Hadamard transform of rows, in place: float32 inside. Reference: `hadamard.reference`.

Two levels at a time are one pass over the block, so that each number is loaded half as often. Neighbors up to 8 apart
lie within one vector; their passes have strides that are known, which LLVM makes shuffles of.
"""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from octavo.kernels.hadamard.reference import is_block
from octavo.kernels.native.dtypes import KINDS, load_row, size_of, store_row
from octavo.kernels.native.jit import kernel, next_item, threads_for

_EXACT = {"contract", "nsz"}


@numba.njit(fastmath=_EXACT)
def _pairs(row, count):  # type: ignore[no-untyped-def]
    """The first level: neighbors."""
    for i in range(count // 2):
        first = row[2 * i]
        second = row[2 * i + 1]
        row[2 * i] = first + second
        row[2 * i + 1] = first - second


@numba.njit(fastmath=_EXACT)
def _fours(row, count):  # type: ignore[no-untyped-def]
    """The first two levels."""
    for i in range(count // 4):
        a = row[4 * i]
        b = row[4 * i + 1]
        c = row[4 * i + 2]
        d = row[4 * i + 3]
        row[4 * i] = (a + b) + (c + d)
        row[4 * i + 1] = (a - b) + (c - d)
        row[4 * i + 2] = (a + b) - (c + d)
        row[4 * i + 3] = (a - b) - (c - d)


@numba.njit(fastmath=_EXACT)
def _two_levels(row, count, half):  # type: ignore[no-untyped-def]
    """The levels of numbers that lie half and 2 half apart."""
    for begin in range(0, count, 4 * half):
        for i in range(begin, begin + half):
            a = row[i]
            b = row[i + half]
            c = row[i + 2 * half]
            d = row[i + 3 * half]
            row[i] = (a + b) + (c + d)
            row[i + half] = (a - b) + (c - d)
            row[i + 2 * half] = (a + b) - (c + d)
            row[i + 3 * half] = (a - b) - (c - d)


@numba.njit
def hadamard_row(row, count, block):  # type: ignore[no-untyped-def]
    """A float32 row times the matrix, in place; block: a power of two that divides count."""
    levels = 0
    while 1 << levels < block:
        levels += 1
    half = 1
    if levels % 2:
        _pairs(row, count)
        half = 2
    elif levels:
        _fours(row, count)
        half = 4
    while half < block:
        _two_levels(row, count, half)
        half *= 4
    factor = np.float32(np.float64(block) ** -0.5)
    for i in range(count):
        row[i] *= factor


@kernel("qqqqq")
def _rows(args):  # type: ignore[no-untyped-def]
    """x, kind, rows, columns, block; items are single rows."""
    a = numba.carray(args, (6,), np.int64)
    kind = a[2]
    rows = a[3]
    count = a[4]
    stride = count * size_of(kind)
    row = np.empty(count, np.float32)
    while True:
        i = next_item(args)
        if i >= rows:
            break
        load_row(a[1] + i * stride, kind, row, count)
        hadamard_row(row, count, a[5])
        store_row(row, np.float32(1), a[1] + i * stride, kind, count)


def hadamard_(x: Tensor, block: int) -> Tensor:
    """`hadamard.reference.hadamard` of rows [T, K] that lie one after another, in their place."""
    rows, columns = x.shape
    if not is_block(block, columns) or not x.is_contiguous():
        raise ValueError(f"rows {list(x.shape)} have no Hadamard blocks of {block}")
    _rows.start(threads_for(x.numel()), x.data_ptr(), KINDS[x.dtype], rows, columns, block)
    return x


KERNELS = (_rows,)
