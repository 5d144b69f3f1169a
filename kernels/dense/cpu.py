"""CPU body of GEMMs with bf16 activations: weights in bf16, or in int8, int4 or fp4 with scales per group of columns.

Products of bf16 numbers summed in float32 (AVX-512 BF16). References: `int4.reference.linear`, `x @ w.T`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.fp4.reference import decode_e2m1, encode_e2m1
from octavo.kernels.native.dtypes import KINDS, bf16_to_float, size_of
from octavo.kernels.native.gemm_tile import (
    BF16,
    FP4,
    LANES,
    STEP_BYTES,
    STEP_COLUMNS,
    W4,
    W8,
    make_grouped_tile,
    make_rows,
    make_scaled_tile,
    make_tile,
    sum_bf16,
)
from octavo.kernels.native.jit import kernel, next_item, threads_for, view
from octavo.kernels.packed_weight import PackedWeight, present

_CHUNK = 128
_bf16_rows = make_rows(make_tile)
_SIZES = ((1, 4), (2, 4), (4, 2), (8, 2))


@dataclass(frozen=True)
class Packed(PackedWeight):
    """slabs as in `native.gemm_tile`; scale and offset float32 [N / 16, groups, 16], or None for bf16 weights.

    Of fp4 weights scale is bf16, and offset is what each row's sum is multiplied by: float32 [N / 16, 16].
    """

    kind: int
    slabs: Tensor
    scale: Tensor | None
    offset: Tensor | None
    num_rows: int
    num_columns: int

    @property
    def num_groups(self) -> int:
        return 1 if self.scale is None else self.scale.shape[1]

    @cached_property
    def arguments(self) -> tuple[int, ...]:
        """What of the kernel's arguments is the same in every call, in their order."""
        steps = self.num_columns // self.num_groups // STEP_COLUMNS[self.kind]
        scale, offset = (0 if t is None else t.data_ptr() for t in (self.scale, self.offset))
        n = self.num_rows
        k = self.num_columns
        slabs = self.slabs.shape[0]
        return (
            self.slabs.data_ptr(),
            scale,
            offset,
            self.kind,
            n,
            k,
            slabs,
            self.num_groups,
            STEP_BYTES[self.kind],
            steps,
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return present(self.slabs, self.scale, self.offset)

    def unpack(self) -> Tensor:
        slabs = self.slabs
        if self.kind == W4:
            shifts = (16 * half + 4 * pair for pair in range(4) for half in range(2))
            slabs = torch.cat([(slabs >> shift) & 15 for shift in shifts], dim=-1) + 128
        if self.kind == FP4:
            shifts = (16 * half + 4 * pair for pair in range(4) for half in range(2))
            codes = torch.cat([(slabs >> shift) & 15 for shift in shifts], dim=-1)
            numbers = decode_e2m1(_rows(codes).to(torch.uint8)).float()
            assert self.scale is not None
            assert self.offset is not None
            scale = _rows(self.scale[..., None]).float().repeat_interleave(self.num_columns // self.num_groups, 1)
            return (numbers * scale * self.offset.reshape(-1, 1))[: self.num_rows, : self.num_columns]
        values = _rows(slabs).float()
        if self.scale is not None and self.offset is not None:
            size = self.num_columns // self.num_groups
            scale, offset = (_rows(t[..., None]).repeat_interleave(size, 1) for t in (self.scale, self.offset))
            values = (values - offset) * scale
        return values[: self.num_rows, : self.num_columns]


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
        slabs = _slabs(_words(codes.to(torch.int32) + 8), 1)
        offset = offset + 136
    else:
        slabs = _slabs(codes, 2)
    scale, offset = (_slabs(torch.nn.functional.pad(t.float(), pad), 1)[..., 0] for t in (scale, offset))
    return Packed(W4 if bits == 4 else W8, slabs, scale.contiguous(), offset.contiguous(), n, k)


def pack_fp4(numbers: Tensor, scale: Tensor, row_scale: Tensor) -> Packed:
    """numbers [N, K] e4m3, of e2m1's; scale [N, G], of numbers that bf16 holds; row_scale [N]; groups of K / G columns.

    A weight is number * scale * row_scale.
    """
    n, k = numbers.shape
    pad = (0, 0, 0, -n % LANES)
    codes = torch.nn.functional.pad(encode_e2m1(numbers), pad)
    scales = torch.nn.functional.pad(scale.to(torch.bfloat16), pad)
    rows = torch.nn.functional.pad(row_scale.float(), (0, -n % LANES)).reshape(-1, LANES).contiguous()
    return Packed(FP4, _slabs(_words(codes.to(torch.int32)), 1), _slabs(scales, 1)[..., 0].contiguous(), rows, n, k)


def _words(nibbles: Tensor) -> Tensor:
    """[N, K] of 0..15 to W4's words [N, K / 8] int32."""
    n, k = nibbles.shape
    pairs = nibbles.reshape(n, k // 8, 4, 2)
    shifts = 4 * torch.arange(4, dtype=torch.int32)
    return ((pairs[..., 0] << shifts).sum(-1) | ((pairs[..., 1] << shifts).sum(-1) << 16)).to(torch.int32)


def _slabs(rows: Tensor, columns: int) -> Tensor:
    """[N, K] -> [N / 16, K / columns, 16, columns]."""
    return rows.reshape(-1, LANES, rows.shape[1] // columns, columns).transpose(1, 2).contiguous()


def _rows(slabs: Tensor) -> Tensor:
    """[N / 16, steps, 16, columns] -> [N, steps * columns]."""
    return slabs.transpose(1, 2).flatten(2).flatten(0, 1)


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


def _grouped_rows(make: Callable[[int, int], Any]) -> Any:
    """As `make_rows`, of weights with scales for groups, whose tiles are smaller."""
    one, two, four, eight = (make(rows, vectors) for rows, vectors in _SIZES)

    @numba.njit
    def rows(vectors, last_row, operands):  # type: ignore[no-untyped-def]
        if vectors == 2 and last_row > 3:
            eight(operands)
            return 8
        if vectors == 2:
            four(operands)
            return 4
        if last_row >= 1:
            two(operands)
            return 2
        one(operands)
        return 1

    return rows


_w4_rows = _grouped_rows(partial(make_grouped_tile, W4))
_w8_rows = _grouped_rows(partial(make_grouped_tile, W8))
_fp4_rows = _grouped_rows(make_scaled_tile)


# The kernel's arguments: what changes from call to call, and `Packed.arguments`.
(_X, _M, _VECTORS, _OUT, _THREADS, _OUT_KIND) = range(1, 7)
(_WEIGHT, _SCALE, _OFFSET, _WEIGHTS, _N, _K, _SLABS, _GROUPS, _STEP_BYTES, _STEPS) = range(7, 17)


@kernel("qqqqqqqqqqqqqqqq")
def _gemm(args):  # type: ignore[no-untyped-def]
    """Items: (chunk of x's rows, tile of slabs)."""
    a = numba.carray(args, (17,), np.int64)
    weights = a[_WEIGHTS]
    m = a[_M]
    n = a[_N]
    k = a[_K]
    slabs = a[_SLABS]
    groups = a[_GROUPS]
    vectors = a[_VECTORS]
    steps = a[_STEPS]
    kind = a[_OUT_KIND]
    sums = np.empty((_CHUNK, groups), np.float32)
    have = -1  # the chunk whose sums stand in `sums`
    tiles = (slabs + vectors - 1) // vectors
    size = size_of(kind)
    xb = k * 2  # from row to row of x, of out, from slab to slab
    ob = n * size
    wb = a[_STEP_BYTES] * steps * groups
    four_bits = weights in (W4, FP4)
    ahead = a[_THREADS] * vectors * wb if m > 4 or four_bits else 0  # else the processor's own fetching is as good
    while True:
        item = next_item(args)
        if item >= tiles * ((m + _CHUNK - 1) // _CHUNK):
            break
        slab = (item % tiles) * vectors
        chunk = item // tiles
        first = chunk * _CHUNK
        last = min(m, (chunk + 1) * _CHUNK)
        if weights != BF16 and weights != FP4 and have != chunk:
            for i in range(first, last):
                _sum_groups(a[_X] + i * xb, sums[i - first], groups, k // groups)
            have = chunk
        w = a[_WEIGHT] + slab * wb
        we = slabs - 1 - slab
        sc = a[_SCALE] + slab * groups * (32 if weights == FP4 else 64)
        of = a[_OFFSET] + slab * (1 if weights == FP4 else groups) * 64
        width = min(vectors * LANES, n - slab * LANES)
        i = first
        while i < last:
            part = (i - first) // 8 if last - first > 16 else -1
            x = a[_X] + i * xb
            xe = last - 1 - i
            out = a[_OUT] + (i * n + slab * LANES) * size
            s = sums.ctypes.data + (i - first) * groups * 4
            grouped = (x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part, groups, sc, of, s)
            if weights == BF16:
                i += _bf16_rows(vectors, xe, grouped[:13])
            elif weights == W4:
                i += _w4_rows(vectors, xe, grouped)
            elif weights == FP4:
                i += _fp4_rows(vectors, xe, grouped)
            else:
                i += _w8_rows(vectors, xe, grouped)


def linear(x: Tensor, packed: Packed, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x [M, K] bf16 -> [M, N] bf16, fp16 or float32."""
    x = x.contiguous()
    m = x.shape[0]
    n = packed.num_rows
    kind = packed.kind
    out = x.new_empty(m, n, dtype=out_dtype)
    vectors = 4 if m <= (4 if kind == BF16 else 2) else (3 if kind == BF16 else 2)
    threads = threads_for(n * packed.num_columns)
    _gemm.start(threads, x.data_ptr(), m, vectors, out.data_ptr(), threads, KINDS[out_dtype], *packed.arguments)
    return out


KERNELS = (_gemm,)
