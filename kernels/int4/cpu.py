"""CPU body of W4A8: tokens rounded to int8, dot products with int4 codes (AVX-512 VNNI), summed exactly in each group.

Reference: `int4.reference.linear` of `int8.reference.quantize_per_token`'s numbers. The weight is stored as code + 8,
so each token's sum of codes over a group, times 8, is taken off that group's dot product. The sums of groups are
scaled and added in float32, in the order of the columns, and a token's scale comes last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.int8.quantize_cpu import quantize_row
from octavo.kernels.native.dtypes import KINDS, size_of
from octavo.kernels.native.gemm_tile import LANES, make_int4_tile
from octavo.kernels.native.huge_memory import in_huge_pages
from octavo.kernels.native.jit import kernel, next_item, threads_for, view
from octavo.kernels.packed_weight import PackedWeight

_FEW_ROWS = 8  # rows that every thread rounds for itself
_CHUNK = 128  # rows of x that one item of work passes over with a tile of weights in the L1 cache

_ROWS = 4  # of a tile of three vectors: sums of products and of groups, 12 each, stay in registers

_one, _two, _many = (make_int4_tile(rows, vectors) for rows, vectors in ((1, 4), (2, 4), (_ROWS, 3)))


@numba.njit
def _rows(vectors, last_row, operands):  # type: ignore[no-untyped-def]
    """The tile of a shape that fits so many rows; returns how many it has."""
    if vectors == 3:
        _many(operands)
        return _ROWS
    if last_row > 0:
        _two(operands)
        return 2
    _one(operands)
    return 1


@dataclass(frozen=True)
class PackedInt4(PackedWeight):
    """slabs: int32 [ceil(N / 16), K / 8, 16], see `native.gemm_tile`; scale: float32 [ceil(N / 16), groups, 16]."""

    slabs: Tensor
    scale: Tensor
    num_rows: int
    num_columns: int

    @cached_property
    def arguments(self) -> tuple[int, ...]:
        """What of the kernel's arguments is the same in every call, in their order."""
        slabs, steps = self.slabs.shape[:2]
        groups = self.scale.shape[1]
        where = self.slabs.data_ptr(), self.scale.data_ptr()
        return *where, self.num_rows, self.num_columns, slabs, groups, steps // groups

    def tensors(self) -> tuple[Tensor, ...]:
        return self.slabs, self.scale

    def unpack(self) -> Tensor:
        places = 8 * (torch.arange(8) % 4) + 4 * (torch.arange(8) // 4)
        nibbles = (self.slabs[..., None] >> places.int()) & 15  # [slabs, steps, lanes, columns]
        codes = nibbles.transpose(1, 2).flatten(2).flatten(0, 1).float() - 8
        size = self.num_columns // self.scale.shape[1]
        scale = self.scale.transpose(1, 2).flatten(0, 1).repeat_interleave(size, 1)
        return (codes * scale)[: self.num_rows]


def pack(codes: Tensor, scale: Tensor) -> PackedInt4:
    """codes [N, K] int8 of -8..7 and scale [N, G] into slabs; groups of K / G columns, a multiple of 8."""
    n, k = codes.shape
    pad = (0, 0, 0, -n % LANES)
    nibbles = torch.nn.functional.pad(codes.to(torch.int32) + 8, pad).reshape(-1, LANES, k // 8, 2, 4)
    shifts = 8 * torch.arange(4, dtype=torch.int32) + 4 * torch.arange(2, dtype=torch.int32)[:, None]
    slabs = in_huge_pages((nibbles << shifts).sum((3, 4)).to(torch.int32).transpose(1, 2))
    scales = torch.nn.functional.pad(scale.float(), pad).reshape(-1, LANES, scale.shape[1])
    return PackedInt4(slabs, in_huge_pages(scales.transpose(1, 2)), n, k)


@numba.njit
def _round(address, kind, count, row, codes, starts, groups):  # type: ignore[no-untyped-def]
    """Round a row of x to codes; starts[g] is what the dot product of group g begins with. Returns the scale."""
    scale, _ = quantize_row(address, kind, count, row, codes, count)
    size = count // groups
    for g in range(groups):
        group = view(codes + g * size, (size,), np.int8)
        total = np.int32(0)
        for j in range(size):
            total += np.int32(group[j])
        starts[g] = total * np.int32(-8)
    return scale


@kernel("qqqqqqqq")
def _quantize(args):  # type: ignore[no-untyped-def]
    """x, codes, scales, starts, kind, rows, columns, groups. Items are rows."""
    a = numba.carray(args, (9,), np.int64)
    kind = a[5]
    rows = a[6]
    count = a[7]
    groups = a[8]
    scales = view(a[3], (rows,), np.float32)
    starts = view(a[4], (rows, groups), np.int32)
    row = np.zeros((count + 15) // 16 * 16, np.float32)
    while True:
        i = next_item(args)
        if i >= rows:
            break
        scales[i] = _round(a[1] + i * count * size_of(kind), kind, count, row, a[2] + i * count, starts[i], groups)


# The kernel's arguments: what changes from call to call, and `PackedInt4.arguments`.
(_X, _CODES, _X_SCALE, _STARTS, _X_KIND, _M, _VECTORS, _OUT, _THREADS, _OUT_KIND) = range(1, 11)
(_WEIGHT, _SCALE, _N, _K, _SLABS, _GROUPS, _STEPS) = range(11, 18)


@kernel("qqqqqqqqqqqqqqqqq")
def _gemm(args):  # type: ignore[no-untyped-def]
    """Items: (chunk of x's rows, tile of slabs).

    Where the codes' address is 0 every thread rounds x for itself: for few rows that costs less than a pass of its own.
    """
    a = numba.carray(args, (18,), np.int64)
    x_kind = a[_X_KIND]
    m = a[_M]
    vectors = a[_VECTORS]
    kind = a[_OUT_KIND]
    n = a[_N]
    k = a[_K]
    slabs = a[_SLABS]
    groups = a[_GROUPS]
    steps = a[_STEPS]
    own = a[_CODES] == 0
    own_codes = np.empty((m if own else 0, k), np.int8)
    own_scales = np.empty(m if own else 0, np.float32)
    own_starts = np.empty((m if own else 0, groups), np.int32)
    codes = a[_CODES]
    x_scale = a[_X_SCALE]
    starts = a[_STARTS]
    if own:
        row = np.zeros((k + 15) // 16 * 16, np.float32)
        codes = own_codes.ctypes.data
        x_scale = own_scales.ctypes.data
        starts = own_starts.ctypes.data
        for i in range(m):
            at = a[_X] + i * k * size_of(x_kind)
            own_scales[i] = _round(at, x_kind, k, row, codes + i * k, own_starts[i], groups)
    tiles = (slabs + vectors - 1) // vectors
    ob = n * size_of(kind)  # from row to row of out, from slab to slab
    wb = steps * groups * 64
    ahead = a[_THREADS] * vectors * wb
    while True:
        item = next_item(args)
        if item >= tiles * ((m + _CHUNK - 1) // _CHUNK):
            break
        slab = (item % tiles) * vectors
        first = (item // tiles) * _CHUNK
        last = min(m, (item // tiles + 1) * _CHUNK)
        w = a[_WEIGHT] + slab * wb
        we = slabs - 1 - slab
        sc = a[_SCALE] + slab * groups * 64
        width = min(vectors * LANES, n - slab * LANES)
        i = first
        while i < last:
            part = (i - first) // _ROWS if last - first > 16 else -1
            x = codes + i * k
            xs = x_scale + i * 4
            st = starts + i * groups * 4
            xe = last - 1 - i
            out = a[_OUT] + i * ob + slab * LANES * size_of(kind)
            operands = (x, k, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, groups, sc, st, xs)
            i += _rows(vectors, xe, operands)


def linear(x: Tensor, packed: PackedInt4, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [M, K] bf16, fp16 or float32 -> [M, N] in one of these types: x's own, unless one is named."""
    x = x.contiguous()
    m = x.shape[0]
    n = packed.num_rows
    k = packed.num_columns
    kind = KINDS[x.dtype]
    rounded = (0, 0, 0)
    if m > _FEW_ROWS:
        groups = packed.scale.shape[1]
        codes = torch.empty(m, k, dtype=torch.int8)
        numbers = torch.empty(1 + groups, m)  # scales; starts [M, G], which are int32
        rounded = (codes.data_ptr(), numbers.data_ptr(), numbers.data_ptr() + 4 * m)
        _quantize.start(threads_for(x.numel()), x.data_ptr(), *rounded, kind, m, k, groups)
    out = x.new_empty(m, n, dtype=out_dtype or x.dtype)
    threads = threads_for(n * k)
    _gemm.start(
        threads,
        x.data_ptr(),
        *rounded,
        kind,
        m,
        3 if m > 2 else 4,
        out.data_ptr(),
        threads,
        KINDS[out.dtype],
        *packed.arguments,
    )
    return out
