"""CPU body of GEMMs in float32: each output is one chain of multiply-adds, in the order of columns (AVX-512).

So a row's output has the same bits whatever other rows stand beside it, which torch's own product doesn't promise: that
chooses its blocks, and so the order of its sums, by the number of rows. Reference: `x @ w.T`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.native.dtypes import KINDS, size_of
from octavo.kernels.native.gemm_tile import FLOAT, LANES, STEP_BYTES, make_rows, make_tile
from octavo.kernels.native.huge_memory import in_huge_pages
from octavo.kernels.native.jit import kernel, next_item, threads_for
from octavo.kernels.packed_weight import PackedWeight

_CHUNK = 128  # rows of x that one item of work passes over with a tile of weights
_MOST_OF_FEW = 4  # rows up to which a tile takes four slabs of weights instead of three, and fewer rows
_rows = make_rows(partial(make_tile, kind=FLOAT))


@dataclass(frozen=True)
class PackedFloat32(PackedWeight):
    """slabs: float32 [ceil(N / 16), K, 16]."""

    slabs: Tensor
    num_rows: int

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.slabs,)

    def unpack(self) -> Tensor:
        return self.slabs.transpose(1, 2).flatten(0, 1)[: self.num_rows]


def pack(weight: Tensor) -> PackedFloat32:
    """weight [N, K] of any floating type."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, 0, 0, -n % LANES))
    return PackedFloat32(in_huge_pages(padded.view(-1, LANES, k).transpose(1, 2)), n)


# The kernel's arguments, in the order of the call in `linear`.
(_X, _M, _VECTORS, _OUT, _THREADS, _OUT_KIND, _WEIGHT, _N, _K, _SLABS) = range(1, 11)


@kernel("qqqqqqqqqq")
def _gemm(args):  # type: ignore[no-untyped-def]
    """Items: (chunk of x's rows, tile of slabs)."""
    a = numba.carray(args, (11,), np.int64)
    m = a[_M]
    n = a[_N]
    k = a[_K]
    slabs = a[_SLABS]
    vectors = a[_VECTORS]
    kind = a[_OUT_KIND]
    tiles = (slabs + vectors - 1) // vectors
    xb = k * 4  # from row to row of x, of out, from slab to slab
    ob = n * size_of(kind)
    wb = STEP_BYTES[FLOAT] * k
    ahead = a[_THREADS] * vectors * wb if m > _MOST_OF_FEW else 0  # else the processor's own fetching is as good
    while True:
        item = next_item(args)
        if item >= tiles * ((m + _CHUNK - 1) // _CHUNK):
            break
        slab = (item % tiles) * vectors
        first = (item // tiles) * _CHUNK
        last = min(m, first + _CHUNK)
        w = a[_WEIGHT] + slab * wb
        we = slabs - 1 - slab
        width = min(vectors * LANES, n - slab * LANES)
        i = first
        while i < last:
            part = (i - first) // 8 if last - first > 16 else -1
            x = a[_X] + i * xb
            out = a[_OUT] + i * ob + slab * LANES * size_of(kind)
            i += _rows(vectors, last - 1 - i, (x, xb, last - 1 - i, w, wb, we, kind, out, ob, width, k, ahead, part))


def linear(x: Tensor, packed: PackedFloat32, out_dtype: torch.dtype) -> Tensor:
    """x [M, K], of 16 bits or float32 -> [M, N] bf16, fp16 or float32."""
    x = x.float().contiguous()
    m, k = x.shape
    n = packed.num_rows
    out = x.new_empty(m, n, dtype=out_dtype)
    threads = threads_for(n * k)
    _gemm.start(
        threads,
        x.data_ptr(),
        m,
        4 if m <= _MOST_OF_FEW else 3,
        out.data_ptr(),
        threads,
        KINDS[out_dtype],
        packed.slabs.data_ptr(),
        n,
        k,
        packed.slabs.shape[0],
    )
    return out


KERNELS = (_gemm,)
