"""CPU bodies of a cache's rows: as numbers that share a scale, or each with its own.

Reference of the latter: `attention.token_rows`, bit by bit.
"""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from octavo.kernels.attention.token_rows import SCALE_BYTES, type_of
from octavo.kernels.native.dtypes import KINDS, bits_to_float, float_to_bits, load_row, size_of, store_row
from octavo.kernels.native.jit import view

ROWS8, ROWS4 = range(len(KINDS), len(KINDS) + 2)
"""Kinds behind those of `native.dtypes`: rows with scales of their own."""


def kind_of(store: Tensor, head_dim: int) -> int:
    """Of a cache's keys or values."""
    own = type_of(store, head_dim)
    return KINDS[store.dtype] if own is None else {8: ROWS8, 4: ROWS4}[own.bits]


@numba.njit(inline="always")
def row_bytes(kind, dim):  # type: ignore[no-untyped-def]
    """Bytes of one head of one token."""
    if kind == ROWS8:
        return dim + SCALE_BYTES
    if kind == ROWS4:
        return dim // 2 + SCALE_BYTES
    return dim * size_of(kind)


@numba.njit
def hadamard(head, dim):  # type: ignore[no-untyped-def]
    """`token_rows.hadamard` of one float32 row, in place."""
    block = dim & -dim
    half = 1
    while half < block:
        for begin in range(0, dim, 2 * half):
            for i in range(begin, begin + half):
                first = head[i]
                second = head[i + half]
                head[i] = first + second
                head[i + half] = first - second
        half *= 2
    factor = np.float32(np.float64(block) ** -0.5)
    for i in range(dim):
        head[i] *= factor


@numba.njit
def load_rows(address, kind, out, rows, dim):  # type: ignore[no-untyped-def]
    """Decode rows that lie one after another into the float32 array `out`; shared scales are the caller's."""
    if kind == ROWS8:
        for r in range(rows):
            at = address + r * (dim + SCALE_BYTES)
            codes = view(at, (dim,), np.int8)
            scale = view(at + dim, (1,), np.float32)[0]
            row = out[r * dim : (r + 1) * dim]
            for i in range(dim):
                row[i] = np.float32(codes[i]) * scale
    elif kind == ROWS4:
        half = dim // 2
        for r in range(rows):
            at = address + r * (half + SCALE_BYTES)
            pairs = view(at, (half,), np.uint8)
            word = view(at + half, (1,), np.uint32)[0]
            zero = np.float32(word & np.uint32(15))
            scale = bits_to_float(np.uint32(word & np.uint32(0xFFFFFFF0)))
            first = out[r * dim : r * dim + half]
            for i in range(half):
                first[i] = (np.float32(np.int32(pairs[i]) & np.int32(15)) - zero) * scale
            second = out[r * dim + half : (r + 1) * dim]
            for i in range(half):
                second[i] = (np.float32(np.int32(pairs[i]) >> np.int32(4)) - zero) * scale
    else:
        load_row(address, kind, out, rows * dim)


@numba.njit
def store_head(values, scale, address, kind, dim):  # type: ignore[no-untyped-def]
    """Encode a row of a float32 array; scale is that of rows that share one."""
    if kind < ROWS8:
        store_row(values, scale, address, kind, dim)
        return
    low = np.float32(0)
    high = np.float32(0)
    odd = np.float32(0)  # NaN if one number is NaN or infinite
    for i in range(dim):
        low = min(low, values[i])
        high = max(high, values[i])
        odd += values[i] * np.float32(0)
    if kind == ROWS8:
        _store8(values, max(-low, high), odd, address, dim)
    else:
        _store4(values, low, high - low, odd, address, dim)


@numba.njit(error_model="numpy")
def _store8(values, top, odd, address, dim):  # type: ignore[no-untyped-def]
    scale = np.float32(1) if top == 0 else top / np.float32(127)
    codes = view(address, (dim,), np.int8)
    for i in range(dim):
        codes[i] = np.int8(min(max(np.rint(values[i] / scale), np.float32(-127)), np.float32(127)))
    view(address + dim, (1,), np.float32)[0] = scale + odd


@numba.njit(error_model="numpy")
def _store4(values, low, extent, odd, address, dim):  # type: ignore[no-untyped-def]
    half = dim // 2
    scale = np.float32(1) if extent == 0 else extent / np.float32(15)
    scale = bits_to_float(np.uint32(float_to_bits(scale) & np.uint32(0xFFFFFFF0)))
    zero = np.float32(min(max(np.rint(-low / scale), np.float32(0)), np.float32(15)))
    pairs = view(address, (half,), np.uint8)
    for i in range(half):
        first = min(max(np.rint(values[i] / scale) + zero, np.float32(0)), np.float32(15))
        second = min(max(np.rint(values[half + i] / scale) + zero, np.float32(0)), np.float32(15))
        pairs[i] = np.uint8(np.uint32(first) | (np.uint32(second) << np.uint32(4)))
    word = np.uint32(float_to_bits(scale) | np.uint32(zero))
    view(address + half, (1,), np.uint32)[0] = np.uint32(0x7FC00000) if odd != odd else word
