"""CPU body of W8A8: tokens rounded to int8, integer dot products (AVX-512 VNNI), both scales in the epilogue.

Reference: `int8.reference.linear`. The weight is stored as code + 128, so each token's sum of codes, times 128, is
taken off the dot product. A 32-bit sum holds 2**31 / (255 * 128) = 65,793 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.convert import KINDS, load_row, size_of, store_row
from octavo.kernels.native import kernel, next_item, threads_for, view
from octavo.kernels.tile import INT8, LANES, make_tile

MAX_COLUMNS = 65_792
_CHUNK = 128  # rows of x that one item of work passes over with a tile of weights in the L1 cache

_T1, _T2, _T4, _T8 = make_tile(INT8, 1, 4), make_tile(INT8, 2, 4), make_tile(INT8, 4, 4), make_tile(INT8, 8, 3)


@dataclass(frozen=True)
class PackedInt8:
    """slabs: uint8 [ceil(N / 16), ceil(K / 4), 16, 4]; scale: float32 [ceil(N / 16) * 16]."""

    slabs: Tensor
    scale: Tensor
    num_rows: int
    num_columns: int

    @property
    def num_bytes(self) -> int:
        return self.slabs.numel() + 4 * self.scale.numel()


def pack(codes: Tensor, scale: Tensor) -> PackedInt8:
    """codes [N, K] int8 and scale [N, 1] into slabs."""
    n, k = codes.shape
    if k > MAX_COLUMNS:
        raise ValueError(f"{k} columns overflow a 32-bit sum of int8 products; {MAX_COLUMNS} is the most")
    padded = torch.nn.functional.pad(codes, (0, -k % 4, 0, -n % LANES))
    shifted = (padded.to(torch.int16) + 128).to(torch.uint8)
    slabs = shifted.reshape(-1, LANES, padded.shape[1] // 4, 4).transpose(1, 2).contiguous()
    return PackedInt8(slabs, torch.nn.functional.pad(scale.float().reshape(-1), (0, -n % LANES)), n, k)


@kernel("qqqqqqqq")
def _quantize(args):  # type: ignore[no-untyped-def]
    """x, codes, scales, sums, kind, rows, columns, columns of codes (padded with zeros). Items are rows."""
    a = numba.carray(args, (9,), np.int64)
    kind, rows, count, width = a[5], a[6], a[7], a[8]
    codes = view(a[2], (rows, width), np.int8)
    scales, sums = view(a[3], (rows,), np.float32), view(a[4], (rows,), np.int32)
    row = np.empty(count, np.float32)
    while True:
        i = next_item(args)
        if i >= rows:
            break
        load_row(a[1] + i * count * size_of(kind), kind, row, count)
        scales[i] = _scale(row, count)
        sums[i] = _round(row, codes[i], scales[i], count)
        for j in range(count, width):
            codes[i, j] = 0


@numba.njit
def _scale(row, count):  # type: ignore[no-untyped-def]
    top = np.float32(0)
    for j in range(count):
        top = max(top, abs(row[j]))
    return top / np.float32(127.5) if top > 0 else np.float32(1)


@numba.njit
def _round(row, codes, scale, count):  # type: ignore[no-untyped-def]
    """Codes of one row; returns 128 times their sum."""
    total = np.int32(0)
    for j in range(count):
        code = np.int32(min(max(np.rint(row[j] / scale), np.float32(-128)), np.float32(127)))
        codes[j] = np.int8(code)
        total += code
    return total * np.int32(128)


@kernel("qqqqqqqqqqqq")
def _gemm(args):  # type: ignore[no-untyped-def]
    """The arguments' order is that of the call in `linear`. Items: (chunk of x's rows, tile of slabs)."""
    a = numba.carray(args, (13,), np.int64)
    out_kind, m, n, slabs, steps, vectors = a[7], a[8], a[9], a[10], a[11], a[12]
    x_scale, x_sum = view(a[2], (m,), np.float32), view(a[3], (m,), np.int32)
    w_scale = view(a[5], (slabs * LANES,), np.float32)
    size = size_of(out_kind)
    acc = np.empty(8 * 4 * LANES, np.int32)
    row = np.empty(4 * LANES, np.float32)
    tiles = (slabs + vectors - 1) // vectors
    chunks = (m + _CHUNK - 1) // _CHUNK
    at = acc.ctypes.data
    while True:
        item = next_item(args)
        if item >= tiles * chunks:
            break
        slab = (item % tiles) * vectors
        first, last = (item // tiles) * _CHUNK, min(m, (item // tiles + 1) * _CHUNK)
        weight, slab_bytes, last_slab = a[4] + slab * steps * 64, steps * 64, slabs - 1 - slab
        width = min(vectors * LANES, n - slab * LANES)
        while first < last:
            left = last - first
            x, last_row = a[1] + first * steps * 4, left - 1
            if vectors == 3:
                _T8(x, steps * 4, last_row, weight, slab_bytes, last_slab, steps, at)
                rows = 8
            elif left > 2:
                _T4(x, steps * 4, last_row, weight, slab_bytes, last_slab, steps, at)
                rows = 4
            elif left > 1:
                _T2(x, steps * 4, last_row, weight, slab_bytes, last_slab, steps, at)
                rows = 2
            else:
                _T1(x, steps * 4, last_row, weight, slab_bytes, last_slab, steps, at)
                rows = 1
            for r in range(min(rows, left)):
                _scale_row(
                    acc[r * vectors * LANES :],
                    x_sum[first + r],
                    x_scale[first + r],
                    w_scale[slab * LANES :],
                    row,
                    width,
                )
                to = a[6] + ((first + r) * n + slab * LANES) * size
                store_row(row, np.float32(1), to, out_kind, width)
            first += rows


@numba.njit
def _scale_row(acc, x_sum, x_scale, w_scale, row, width):  # type: ignore[no-untyped-def]
    for j in range(width):
        row[j] = np.float32(acc[j] - x_sum) * x_scale * w_scale[j]


def linear(x: Tensor, packed: PackedInt8) -> Tensor:
    """x [M, K] bf16, fp16 or float32 -> [M, N] in x's type."""
    x = x.contiguous()
    m, k = x.shape
    n, steps = packed.num_rows, packed.slabs.shape[1]
    codes = torch.empty(m, steps * 4, dtype=torch.int8)
    scale, total = torch.empty(m), torch.empty(m, dtype=torch.int32)
    kind = KINDS[x.dtype]
    _quantize.start(
        threads_for(x.numel()),
        x.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        total.data_ptr(),
        kind,
        m,
        k,
        steps * 4,
    )
    out = x.new_empty(m, n)
    _gemm.start(
        threads_for(packed.slabs.numel()),
        codes.data_ptr(), scale.data_ptr(), total.data_ptr(), packed.slabs.data_ptr(), packed.scale.data_ptr(),
        out.data_ptr(), kind, m, n, packed.slabs.shape[0], steps, 3 if m > 4 else 4,
    )  # fmt: skip
    return out


KERNELS = (_quantize, _gemm)
