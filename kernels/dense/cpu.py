"""CPU body of GEMMs with bf16 activations: weights in bf16, or in fp4 with scales per group of columns.

Products of bf16 numbers summed in float32 (AVX-512 BF16). References: `x @ w.T`, of fp4 its numbers'.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.dense.slabs import fields_of, rows_of, slabs_of, words_of
from octavo.kernels.fp4.reference import decode_e2m1, encode_e2m1
from octavo.kernels.native.dtypes import KINDS, size_of
from octavo.kernels.native.gemm_tile import (
    BF16,
    FP4,
    LANES,
    STEP_BYTES,
    STEP_COLUMNS,
    make_rows,
    make_scaled_tile,
    make_tile,
)
from octavo.kernels.native.grouped_tile import make_grouped_rows
from octavo.kernels.native.huge_memory import in_huge_pages
from octavo.kernels.native.jit import kernel, next_item, threads_for
from octavo.kernels.packed_weight import PackedWeight, present

_CHUNK = 128
_bf16_rows = make_rows(make_tile)
_fp4_rows = make_grouped_rows(make_scaled_tile)


@dataclass(frozen=True)
class Packed(PackedWeight):
    """slabs as in `native.gemm_tile`; of fp4 weights scale, bf16 [N / 16, groups, 16], and row_scale, float32 [N / 16,
    16], which each row's sum is multiplied by.
    """

    kind: int
    slabs: Tensor
    scale: Tensor | None
    row_scale: Tensor | None
    num_rows: int
    num_columns: int

    @property
    def num_groups(self) -> int:
        return 1 if self.scale is None else self.scale.shape[1]

    @cached_property
    def arguments(self) -> tuple[int, ...]:
        """What of the kernel's arguments is the same in every call, in their order."""
        steps = self.num_columns // self.num_groups // STEP_COLUMNS[self.kind]
        scale, row_scale = (0 if t is None else t.data_ptr() for t in (self.scale, self.row_scale))
        n = self.num_rows
        k = self.num_columns
        slabs = self.slabs.shape[0]
        return (
            self.slabs.data_ptr(),
            scale,
            row_scale,
            self.kind,
            n,
            k,
            slabs,
            self.num_groups,
            STEP_BYTES[self.kind],
            steps,
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return present(self.slabs, self.scale, self.row_scale)

    def unpack(self) -> Tensor:
        if self.scale is None or self.row_scale is None:
            return rows_of(self.slabs).float()[: self.num_rows, : self.num_columns]
        numbers = decode_e2m1(rows_of(fields_of(self.slabs, 4)).to(torch.uint8)).float()
        scale = rows_of(self.scale[..., None]).float().repeat_interleave(self.num_columns // self.num_groups, 1)
        return (numbers * scale * self.row_scale.reshape(-1, 1))[: self.num_rows, : self.num_columns]


def pack_bf16(weight: Tensor) -> Packed:
    """weight [N, K], K even."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.to(torch.bfloat16), (0, 0, 0, -n % LANES))
    return Packed(BF16, in_huge_pages(slabs_of(padded, 2)), None, None, n, k)


def pack_fp4(numbers: Tensor, scale: Tensor, row_scale: Tensor) -> Packed:
    """numbers [N, K] e4m3, of e2m1's; scale [N, G], of numbers that bf16 holds; row_scale [N]; groups of K / G columns.

    A weight is number * scale * row_scale.
    """
    n, k = numbers.shape
    pad = (0, 0, 0, -n % LANES)
    codes = torch.nn.functional.pad(encode_e2m1(numbers), pad)
    scales = torch.nn.functional.pad(scale.to(torch.bfloat16), pad)
    rows = torch.nn.functional.pad(row_scale.float(), (0, -n % LANES)).reshape(-1, LANES).contiguous()
    slabs = in_huge_pages(slabs_of(words_of(codes), 1))
    return Packed(FP4, slabs, in_huge_pages(slabs_of(scales, 1)[..., 0]), rows, n, k)


# The kernel's arguments: what changes from call to call, and `Packed.arguments`.
(_X, _M, _VECTORS, _OUT, _THREADS, _OUT_KIND) = range(1, 7)
(_WEIGHT, _SCALE, _ROW_SCALE, _WEIGHTS, _N, _K, _SLABS, _GROUPS, _STEP_BYTES, _STEPS) = range(7, 17)


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
    tiles = (slabs + vectors - 1) // vectors
    size = size_of(kind)
    xb = k * 2  # from row to row of x, of out, from slab to slab
    ob = n * size
    wb = a[_STEP_BYTES] * steps * groups
    ahead = a[_THREADS] * vectors * wb if m > 4 or weights == FP4 else 0  # else the processor's own fetching is as good
    while True:
        item = next_item(args)
        if item >= tiles * ((m + _CHUNK - 1) // _CHUNK):
            break
        slab = (item % tiles) * vectors
        chunk = item // tiles
        first = chunk * _CHUNK
        last = min(m, (chunk + 1) * _CHUNK)
        w = a[_WEIGHT] + slab * wb
        we = slabs - 1 - slab
        sc = a[_SCALE] + slab * groups * 32
        rs = a[_ROW_SCALE] + slab * 64
        width = min(vectors * LANES, n - slab * LANES)
        i = first
        while i < last:
            part = (i - first) // 8 if last - first > 16 else -1
            x = a[_X] + i * xb
            xe = last - 1 - i
            out = a[_OUT] + (i * n + slab * LANES) * size
            tile = (x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part)
            if weights == BF16:
                i += _bf16_rows(vectors, xe, tile)
            else:
                i += _fp4_rows(vectors, xe, tile + (groups, sc, rs))  # noqa: RUF005 (numba)


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
