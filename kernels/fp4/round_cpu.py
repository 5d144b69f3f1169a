"""CPU body of rounding a layer's input to e2m1 with a scale for each row and group, in bf16.

References: `fp4.reference.fake_quantize_nvfp4` and `fake_quantize_mx`, rounded to bf16.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.native.dtypes import (
    BF16,
    bits_to_float,
    e4m3_to_float,
    float_to_bits,
    float_to_e4m3,
    load_row,
    round_to_e2m1,
    store_row,
)
from octavo.kernels.native.jit import kernel, next_item, threads_for


@numba.njit(inline="always")
def _scale_of(top, whole):  # type: ignore[no-untyped-def]
    """The scale of a group whose largest magnitude is top; whole: what divides e4m3 scales, 0: powers of two."""
    if whole != 0:
        stored = e4m3_to_float(float_to_e4m3(top / np.float32(6.0) * whole))
        return (np.float32(0.125) if stored == 0 else stored) / whole
    biased = np.int32((float_to_bits(top) + np.uint32(1 << 21)) >> np.uint32(23)) - np.int32(2)
    exponent = np.uint32(min(max(biased, np.int32(0)), np.int32(254)))
    return bits_to_float(np.uint32(1 << 22) if exponent == 0 else exponent << np.uint32(23))


@kernel("qqqqqd")
def _round_rows(args):  # type: ignore[no-untyped-def]
    """x, out, rows, columns, group size, whole or 0. Items: rows."""
    a = numba.carray(args, (7,), np.int64)
    whole = np.float32(numba.carray(args, (7,), np.float64)[6])
    columns = a[4]
    size = a[5]
    row = np.empty(columns, np.float32)
    while True:
        item = next_item(args)
        if item >= a[3]:
            break
        load_row(a[1] + item * columns * 2, BF16, row, columns)
        for begin in range(0, columns, size):
            group = row[begin : min(begin + size, columns)]
            top = np.float32(0)
            odd = np.float32(0)
            for value in group:
                top = max(top, abs(value))
                odd += value * np.float32(0)
            if odd != 0:  # a NaN: of infinities and of NaN, which the largest must be
                for value in group:
                    top = value if value != value else top
            scale = _scale_of(top, whole)
            for j in range(group.size):
                value = group[j]
                rounded = round_to_e2m1(value / scale) * scale
                group[j] = rounded if value * np.float32(0) == 0 else value
        store_row(row, np.float32(1), a[2] + item * columns * 2, BF16, columns)


def round_rows(x: Tensor, group_size: int, whole: float) -> Tensor:
    """x [M, K] bf16 to the same, rounded; whole: what divides e4m3 scales, 0 for scales that are powers of two."""
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, columns = x.shape
    threads = threads_for(rows * columns)
    _round_rows.start(threads, x.data_ptr(), out.data_ptr(), rows, columns, group_size, whole)
    return out


def prepare() -> None:
    """Compile, or load what was compiled: not in the first step."""
    _round_rows.compile()


KERNELS = (_round_rows,)
