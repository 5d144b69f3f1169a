"""CPU body of W8A8: tokens rounded to int8, integer dot products (AVX-512 VNNI), both scales in the epilogue.

Reference: `int8.reference.linear`. The weight is stored as code + 128, so each token's sum of codes, times 128, is
taken off the dot product. A 32-bit sum holds 2**31 / (255 * 128) = 65,793 columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.gemm.limits import MAX_INT8_COLUMNS_CPU
from octavo.kernels.int8.quantize_cpu import quantize_row
from octavo.kernels.native.dtypes import KINDS, size_of
from octavo.kernels.native.gemm_tile import LANES, make_int8_tile, make_rows
from octavo.kernels.native.huge_memory import in_huge_pages
from octavo.kernels.native.jit import kernel, next_item, threads_for, view
from octavo.kernels.packed_weight import PackedWeight

MAX_COLUMNS = MAX_INT8_COLUMNS_CPU
_FEW_ROWS = 8  # rows that every thread rounds for itself
_CHUNK = 128  # rows of x that one item of work passes over with a tile of weights in the L1 cache

_rows = make_rows(make_int8_tile)


@dataclass(frozen=True)
class PackedInt8(PackedWeight):
    """slabs: uint8 [ceil(N / 16), ceil(K / 4), 16, 4]; scale: float32 [ceil(N / 16) * 16]."""

    slabs: Tensor
    scale: Tensor
    num_rows: int
    num_columns: int

    @cached_property
    def arguments(self) -> tuple[int, ...]:
        """What of the kernel's arguments is the same in every call, in their order."""
        slabs, steps = self.slabs.shape[:2]
        return self.slabs.data_ptr(), self.scale.data_ptr(), self.num_rows, self.num_columns, slabs, steps

    def tensors(self) -> tuple[Tensor, ...]:
        return self.slabs, self.scale

    def unpack(self) -> Tensor:
        codes = self.slabs.transpose(1, 2).flatten(2).flatten(0, 1).float() - 128
        return (codes * self.scale[:, None])[: self.num_rows, : self.num_columns]


def pack(codes: Tensor, scale: Tensor) -> PackedInt8:
    """codes [N, K] int8 and scale [N, 1] into slabs."""
    n, k = codes.shape
    if k > MAX_COLUMNS:
        raise ValueError(f"{k} columns overflow a 32-bit sum of int8 products; {MAX_COLUMNS} is the most")
    padded = torch.nn.functional.pad(codes, (0, -k % 4, 0, -n % LANES))
    shifted = (padded.to(torch.int16) + 128).to(torch.uint8)
    slabs = in_huge_pages(shifted.reshape(-1, LANES, padded.shape[1] // 4, 4).transpose(1, 2))
    return PackedInt8(slabs, torch.nn.functional.pad(scale.float().reshape(-1), (0, -n % LANES)), n, k)


@kernel("qqqqqqqq")
def _quantize(args):  # type: ignore[no-untyped-def]
    """x, codes, scales, sums, kind, rows, columns, columns of codes (padded with zeros). Items are rows."""
    a = numba.carray(args, (9,), np.int64)
    kind = a[5]
    rows = a[6]
    count = a[7]
    width = a[8]
    scales = view(a[3], (rows,), np.float32)
    sums = view(a[4], (rows,), np.int32)
    row = np.zeros((count + 15) // 16 * 16, np.float32)
    while True:
        i = next_item(args)
        if i >= rows:
            break
        scales[i], sums[i] = quantize_row(a[1] + i * count * size_of(kind), kind, count, row, a[2] + i * width, width)


# The kernel's arguments: what changes from call to call, and `PackedInt8.arguments`.
(_X, _CODES, _X_SCALE, _X_SUM, _X_KIND, _M, _VECTORS, _OUT, _THREADS, _OUT_KIND) = range(1, 11)
(_WEIGHT, _SCALE, _N, _K, _SLABS, _STEPS) = range(11, 17)


@kernel("qqqqqqqqqqqqqqqq")
def _gemm(args):  # type: ignore[no-untyped-def]
    """Items: (chunk of x's rows, tile of slabs).

    Where the codes' address is 0 every thread rounds x for itself: for few rows that costs less than a pass of its own.
    """
    a = numba.carray(args, (17,), np.int64)
    x_kind = a[_X_KIND]
    m = a[_M]
    vectors = a[_VECTORS]
    kind = a[_OUT_KIND]
    n = a[_N]
    k = a[_K]
    slabs = a[_SLABS]
    steps = a[_STEPS]
    own = a[_CODES] == 0
    x_codes = np.empty((m if own else 0, steps * 4), np.int8)
    x_scales = np.empty(m if own else 0, np.float32)
    x_sums = np.empty(m if own else 0, np.int32)
    codes = a[_CODES]
    x_scale = a[_X_SCALE]
    x_sum = a[_X_SUM]
    if own:
        row = np.zeros((k + 15) // 16 * 16, np.float32)
        codes = x_codes.ctypes.data
        x_scale = x_scales.ctypes.data
        x_sum = x_sums.ctypes.data
        for i in range(m):
            at = codes + i * steps * 4
            x_scales[i], x_sums[i] = quantize_row(a[_X] + i * k * size_of(x_kind), x_kind, k, row, at, steps * 4)
    tiles = (slabs + vectors - 1) // vectors
    xb = steps * 4  # from row to row of x, of out, from slab to slab
    ob = n * size_of(kind)
    wb = steps * 64
    ahead = a[_THREADS] * vectors * wb if m > 4 else 0  # else the processor's own fetching is as good
    while True:
        item = next_item(args)
        if item >= tiles * ((m + _CHUNK - 1) // _CHUNK):
            break
        slab = (item % tiles) * vectors
        first = (item // tiles) * _CHUNK
        last = min(m, (item // tiles + 1) * _CHUNK)
        w = a[_WEIGHT] + slab * wb
        we = slabs - 1 - slab
        sc = a[_SCALE] + slab * 64
        width = min(vectors * LANES, n - slab * LANES)
        i = first
        while i < last:
            part = (i - first) // 8 if last - first > 16 else -1
            x = codes + i * xb
            xs = x_scale + i * 4
            xt = x_sum + i * 4
            xe = last - 1 - i
            out = a[_OUT] + i * ob + slab * LANES * size_of(kind)
            operands = (x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, xs, xt, sc)
            i += _rows(vectors, xe, operands)


def linear(x: Tensor, packed: PackedInt8, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [M, K] bf16, fp16 or float32 -> [M, N] in one of these types: x's own, unless one is named."""
    x = x.contiguous()
    m = x.shape[0]
    n = packed.num_rows
    kind = KINDS[x.dtype]
    rounded = (0, 0, 0)
    if m > _FEW_ROWS:
        width = packed.slabs.shape[1] * 4
        codes = torch.empty(m, width, dtype=torch.int8)  # scales; sums, which are int32
        numbers = torch.empty(2, m)
        rounded = (codes.data_ptr(), numbers.data_ptr(), numbers.data_ptr() + 4 * m)
        _quantize.start(threads_for(x.numel()), x.data_ptr(), *rounded, kind, m, packed.num_columns, width)
    out = x.new_empty(m, n, dtype=out_dtype or x.dtype)
    threads = threads_for(n * packed.num_columns)
    _gemm.start(
        threads,
        x.data_ptr(),
        *rounded,
        kind,
        m,
        3 if m > 4 else 4,
        out.data_ptr(),
        threads,
        KINDS[out.dtype],
        *packed.arguments,
    )
    return out


KERNELS = (_quantize, _gemm)
