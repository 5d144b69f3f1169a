"""CPU body of GEMMs with bf16 activations: weights in bf16, in int8, or in int4 with scales per group of columns.

Products of bf16 numbers summed in float32 (AVX-512 BF16). References: `int4.reference.linear`, `x @ w.T`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.convert import KINDS, bf16_to_float, size_of
from octavo.kernels.native import kernel, next_item, threads_for, view
from octavo.kernels.tile import BF16, LANES, STEP_BYTES, STEP_COLUMNS, W4, W8, make_grouped_tile, make_tile, sum_bf16

_CHUNK = 128
_T1, _T2, _T4, _T8 = make_tile(1, 4), make_tile(2, 4), make_tile(4, 4), make_tile(8, 3)
_SIZES = ((1, 4), (2, 4), (4, 2), (8, 2))
_F1, _F2, _F4, _F8 = (make_grouped_tile(W4, r, v) for r, v in _SIZES)
_E1, _E2, _E4, _E8 = (make_grouped_tile(W8, r, v) for r, v in _SIZES)


@dataclass(frozen=True)
class Packed:
    """slabs as in `kernels.tile`; scale and offset float32 [N / 16, groups, 16], or None for bf16 weights."""

    kind: int
    slabs: Tensor
    scale: Tensor | None
    offset: Tensor | None
    num_rows: int
    num_columns: int

    @property
    def num_groups(self) -> int:
        return 1 if self.scale is None else self.scale.shape[1]

    @property
    def num_bytes(self) -> int:
        extra = 0 if self.scale is None else 8 * self.scale.numel()
        return self.slabs.numel() * self.slabs.element_size() + extra


def fits(bits: int, num_columns: int, group_size: int) -> bool:
    """Whether integer weights can be packed: groups are whole numbers of steps, and fill a row."""
    return num_columns % group_size == 0 and group_size % STEP_COLUMNS[W4 if bits == 4 else W8] == 0


def pack_bf16(weight: Tensor) -> Packed:
    """weight [N, K], K even."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.to(torch.bfloat16), (0, 0, 0, -n % LANES))
    return Packed(BF16, _slabs(padded, 2), None, None, n, k)


def pack_int(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Packed:
    """codes [N, K] int8 in the signed range of 4 or 8 bits; scale and zero_point [N, G]; groups of K / G columns."""
    n, k = codes.shape
    pad = (0, 0, 0, -n % LANES)
    codes = torch.nn.functional.pad(codes, pad)
    offset = torch.zeros_like(scale, dtype=torch.float32) if zero_point is None else zero_point.float()
    if bits == 4:
        nibbles = (codes.to(torch.int32) + 8).reshape(codes.shape[0], k // 8, 4, 2)
        shifts = 4 * torch.arange(4, dtype=torch.int32)
        words = ((nibbles[..., 0] << shifts).sum(-1) | ((nibbles[..., 1] << shifts).sum(-1) << 16)).to(torch.int32)
        slabs, offset = _slabs(words, 1), offset + 136
    else:
        slabs = _slabs(codes, 2)
    scale, offset = (_slabs(torch.nn.functional.pad(t.float(), pad), 1)[..., 0] for t in (scale, offset))
    return Packed(W4 if bits == 4 else W8, slabs, scale.contiguous(), offset.contiguous(), n, k)


def _slabs(rows: Tensor, columns: int) -> Tensor:
    """[N, K] -> [N / 16, K / columns, 16, columns]."""
    return rows.reshape(-1, LANES, rows.shape[1] // columns, columns).transpose(1, 2).contiguous()


@numba.njit(fastmath={"reassoc", "contract", "nsz"})
def _sum_groups(address, sums, groups, size):  # type: ignore[no-untyped-def]
    """The sums of a row's `groups` groups of `size` bf16 numbers."""
    for g in range(groups):
        at = address + 2 * g * size
        total = sum_bf16(at, size // 32)
        rest = view(at + size // 32 * 64, (size % 32,), np.uint16)
        for j in range(size % 32):
            total += bf16_to_float(rest[j])
        sums[g] = total


@numba.njit
def _bf16_rows(vectors, x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part):  # type: ignore[no-untyped-def]
    """One tile of bf16 weights, as many rows as it has; returns how many (see `kernels.tile` for the arguments)."""
    if vectors == 3:
        _T8(x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part)
        return 8
    if xe > 1:
        _T4(x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part)
        return 4
    if xe == 1:
        _T2(x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part)
        return 2
    _T1(x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part)
    return 1


@numba.njit
def _w4_rows(vectors, x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, groups, sc, of, s):  # type: ignore[no-untyped-def]
    if vectors == 2 and xe > 3:
        _F8(x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, groups, sc, of, s)
        return 8
    if vectors == 2:
        _F4(x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, groups, sc, of, s)
        return 4
    if xe >= 1:
        _F2(x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, groups, sc, of, s)
        return 2
    _F1(x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, groups, sc, of, s)
    return 1


@numba.njit
def _w8_rows(vectors, x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, groups, sc, of, s):  # type: ignore[no-untyped-def]
    if vectors == 2 and xe > 3:
        _E8(x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, groups, sc, of, s)
        return 8
    if vectors == 2:
        _E4(x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, groups, sc, of, s)
        return 4
    if xe >= 1:
        _E2(x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, groups, sc, of, s)
        return 2
    _E1(x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, groups, sc, of, s)
    return 1


@kernel("qqqqqqqqqqqqqqqq")
def _gemm(args):  # type: ignore[no-untyped-def]
    """The arguments' order is that of the call in `linear`. Items: (chunk of x's rows, tile of slabs)."""
    a = numba.carray(args, (17,), np.int64)
    weights, m, n, k, slabs, groups, vectors, step_bytes, steps = (
        a[5],
        a[6],
        a[7],
        a[8],
        a[9],
        a[10],
        a[11],
        a[12],
        a[13],
    )
    sums = np.empty((_CHUNK, groups), np.float32)
    have = -1  # the chunk whose sums stand in `sums`
    tiles = (slabs + vectors - 1) // vectors
    kind = a[16]
    size = size_of(kind)
    xb, ob, wb = k * 2, n * size, step_bytes * steps * groups  # from row to row of x, of out, from slab to slab
    ahead = a[15] * vectors * wb if m > 4 or weights == W4 else 0  # else the processor's own fetching is as good
    while True:
        item = next_item(args)
        if item >= tiles * ((m + _CHUNK - 1) // _CHUNK):
            break
        slab, chunk = (item % tiles) * vectors, item // tiles
        first, last = chunk * _CHUNK, min(m, (chunk + 1) * _CHUNK)
        if weights != BF16 and have != chunk:
            for i in range(first, last):
                _sum_groups(a[1] + i * xb, sums[i - first], groups, k // groups)
            have = chunk
        w, we = a[2] + slab * wb, slabs - 1 - slab
        sc, of = a[3] + slab * groups * 64, a[4] + slab * groups * 64
        width = min(vectors * LANES, n - slab * LANES)
        i = first
        while i < last:
            part = (i - first) // 8 if last - first > 16 else -1
            x, xe, out = a[1] + i * xb, last - 1 - i, a[14] + (i * n + slab * LANES) * size
            s = sums.ctypes.data + (i - first) * groups * 4
            if weights == BF16:
                i += _bf16_rows(vectors, x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part)
            elif weights == W4:
                i += _w4_rows(
                    vectors, x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, groups, sc, of, s
                )
            else:
                i += _w8_rows(
                    vectors, x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, groups, sc, of, s
                )


def linear(x: Tensor, packed: Packed, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x [M, K] bf16 -> [M, N] bf16, fp16 or float32."""
    x = x.contiguous()
    m, k = x.shape
    out = x.new_empty(m, packed.num_rows, dtype=out_dtype)
    kind, slabs, groups = packed.kind, packed.slabs, packed.num_groups
    small = 4 if kind == BF16 else 2
    vectors = 4 if m <= small else (3 if kind == BF16 else 2)
    threads = threads_for(packed.num_rows * k)
    _gemm.start(
        threads,
        x.data_ptr(), slabs.data_ptr(),
        0 if packed.scale is None else packed.scale.data_ptr(),
        0 if packed.offset is None else packed.offset.data_ptr(),
        kind, m, packed.num_rows, k, slabs.shape[0], groups, vectors,
        STEP_BYTES[kind], k // groups // STEP_COLUMNS[kind], out.data_ptr(), threads, KINDS[out_dtype],
    )  # fmt: skip
    return out


KERNELS = (_gemm,)
