"""Rounding a row of activations to int8 as LLVM vector code: numba leaves these loops to single numbers.

Reference: `int8.reference.quantize_per_token`.
"""

# ruff: noqa: ARG001 (numba looks at the names of what it compiles)
from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels.native.dtypes import load_row
from octavo.kernels.native.llvm import (
    F32,
    F32X16,
    I8,
    I32,
    I32X16,
    I64,
    broadcast,
    call,
    load16,
    masked_store,
    multiply_add,
)

_I8X16 = ir.VectorType(I8, 16)
_LANES = ir.Constant(I32X16, list(range(16)))


def _constant(value: float) -> Any:
    return ir.Constant(F32X16, [value] * 16)


@intrinsic  # type: ignore[untyped-decorator]
def _largest(typingctx: Any, row: Any, vectors: Any) -> Any:
    """The largest magnitude of 16 * vectors float32 numbers; NaN if one is NaN or infinite."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, vectors = args
        top = cgutils.alloca_once(builder, F32X16)
        poison = cgutils.alloca_once(builder, F32X16)
        builder.store(_constant(0), top)
        builder.store(_constant(0), poison)
        with cgutils.for_range(builder, vectors) as loop:
            x = load16(builder, builder.add(row, builder.mul(loop.index, ir.Constant(I64, 64))), -1)
            size = call(builder, "llvm.fabs.v16f32", F32X16, x)
            largest = builder.load(top)
            builder.store(builder.select(builder.fcmp_ordered(">", size, largest), size, largest), top)
            builder.store(multiply_add(builder, x, _constant(0), builder.load(poison)), poison)
        most = call(builder, "llvm.vector.reduce.fmax.v16f32", F32, builder.load(top))
        nothing = call(builder, "llvm.vector.reduce.fmul.v16f32", F32, ir.Constant(F32, 0), builder.load(poison))
        return builder.fadd(most, nothing)

    return types.float32(types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _round(typingctx: Any, row: Any, vectors: Any, scale: Any, codes: Any, width: Any) -> Any:
    """codes[i] = clamp(rint(row[i] / scale)) for i < width; returns the sum of all 16 * vectors codes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, vectors, scale, codes, width = args
        total = cgutils.alloca_once(builder, I32X16)
        builder.store(ir.Constant(I32X16, [0] * 16), total)
        divisor = broadcast(builder, scale)
        columns = broadcast(builder, builder.trunc(width, I32))
        with cgutils.for_range(builder, vectors) as loop:
            first = builder.mul(loop.index, ir.Constant(I64, 16))
            x = load16(builder, builder.add(row, builder.mul(first, ir.Constant(I64, 4))), -1)
            x = call(builder, "llvm.rint.v16f32", F32X16, builder.fdiv(x, divisor))
            x = call(builder, "llvm.maxnum.v16f32", F32X16, x, _constant(-128))  # NaN becomes a number: scale tells it
            x = call(builder, "llvm.minnum.v16f32", F32X16, x, _constant(127))
            code = builder.fptosi(x, I32X16)
            builder.store(builder.add(code, builder.load(total)), total)
            lane = builder.add(broadcast(builder, builder.trunc(first, I32)), _LANES)
            mask = builder.icmp_signed("<", lane, columns)
            masked_store(builder, builder.trunc(code, _I8X16), builder.add(codes, first), mask)
        return call(builder, "llvm.vector.reduce.add.v16i32", I32, builder.load(total))

    return types.int32(types.int64, types.int64, types.float32, types.int64, types.int64), codegen


@numba.njit  # type: ignore[untyped-decorator]
def quantize_row(address: Any, kind: Any, count: Any, row: Any, codes: Any, width: Any) -> Any:
    """Round `count` numbers of a kind to `width` >= count codes at an address (zeros behind the last).

    row: float32 [a multiple of 16, >= count], zeros behind `count`. Returns (scale, 128 * sum of the codes).
    """
    load_row(address, kind, row, count)
    top = _largest(row.ctypes.data, row.size // 16)
    scale = np.float32(1) if top == 0 else top / np.float32(127.5)
    return scale, _round(row.ctypes.data, row.size // 16, scale, codes, width) * np.int32(128)
