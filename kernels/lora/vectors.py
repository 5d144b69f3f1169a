"""Vector code of low-rank adapters: rows of x times slabs of A, their products times a block of B, sums into a row.

Slabs are those of `native.gemm_tile`; which rows of x are multiplied, the code reads in memory.
"""
# ruff: noqa: ARG001 (numba looks at the names of what it compiles)

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels.lora.packed import SLAB_STEP, WIDTH
from octavo.kernels.native import dtypes
from octavo.kernels.native.gemm_tile import BF16, FLOAT, LANES, dot
from octavo.kernels.native.llvm import (
    BF16X16,
    BF16X32,
    F32,
    F32X16,
    I16,
    I32,
    I32X16,
    I64,
    broadcast,
    call,
    load16,
    masked_load,
    masked_store,
    multiply_add,
    prefetch,
    store16,
)

TOGETHER = 4  # rows that a slab of A, or a block of B, is multiplied with at once
SLABS = 3  # slabs that a row is multiplied with at once, at most
_AHEAD = 2048  # bytes to what is fetched of an adapter meanwhile: with one row, the processor's own fetching is as good


def _make_shrink(kind: int, rows: int, slabs: int) -> Any:
    """shrink((x, row_bytes, rows, last_row, weight, slab_bytes, h, stride, steps)), all int64: h[r, 0 .. 16 * slabs] =
    the products of row rows[r] of x with these slabs. Two sums each, of even steps and of odd ones, so that the second
    needn't wait for the first. Rows past the last repeat it.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def shrink(typingctx: Any, operands: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, row_bytes, numbers, last_row, weight, slab_bytes, h, stride, steps = cgutils.unpack_tuple(
                builder, args[0]
            )

            def constant(value: int) -> Any:
                return ir.Constant(I64, value)

            def at(base: Any, index: Any, step: int) -> Any:
                return builder.add(base, builder.mul(index, constant(step)))

            def load(address: Any, type_: Any) -> Any:
                return builder.load(builder.inttoptr(address, type_.as_pointer()), align=1)

            inputs = []
            outputs = []
            for r in range(rows):
                row = builder.select(builder.icmp_signed("<", constant(r), last_row), constant(r), last_row)
                inputs.append(builder.add(x, builder.mul(load(at(numbers, row, 8), I64), row_bytes)))
                outputs.append(builder.add(h, builder.mul(stride, row)))
            weights = [builder.add(weight, builder.mul(slab_bytes, constant(v))) for v in range(slabs)]
            totals = [
                [[cgutils.alloca_once(builder, F32X16) for _ in range(slabs)] for _ in range(rows)] for _ in range(2)
            ]
            for total in (total for sums in totals for row in sums for total in row):
                builder.store(ir.Constant(F32X16, [0.0] * LANES), total)

            def accumulate(step: Any, sums: list[list[Any]]) -> None:
                if rows > 1:
                    for place in weights:
                        prefetch(builder, builder.add(at(place, step, SLAB_STEP), constant(_AHEAD)), 1)
                loaded = [load(at(place, step, SLAB_STEP), I32X16) for place in weights]
                vectors = [builder.bitcast(w, BF16X32 if kind == BF16 else F32X16) for w in loaded]
                for place, row in zip(inputs, sums, strict=True):
                    columns = load(at(place, step, 4), I32)
                    for vector, total in zip(vectors, row, strict=True):
                        builder.store(dot(builder, kind, builder.load(total), columns, vector), total)

            with cgutils.for_range(builder, builder.lshr(steps, constant(1))) as loop:
                for odd, sums in enumerate(totals):
                    accumulate(builder.add(builder.shl(loop.index, constant(1)), constant(odd)), sums)
            with builder.if_then(builder.trunc(steps, ir.IntType(1)), likely=False):
                accumulate(builder.sub(steps, constant(1)), totals[0])
            for out, even, odds in zip(outputs, *totals, strict=True):
                for v in range(slabs):
                    value = builder.fadd(builder.load(even[v]), builder.load(odds[v]))
                    store16(builder, value, builder.add(out, constant(4 * LANES * v)))
            return context.get_dummy_value()

        return types.void(types.UniTuple(types.int64, len(operands))), codegen

    return shrink


def _make_shrinks(kind: int) -> Any:
    """shrink(slabs, last_row, operands): of so many slabs, up to three, and rows, up to four."""
    (one, two, three), (one_rows, two_rows, three_rows) = (
        [_make_shrink(kind, rows, slabs) for slabs in range(1, SLABS + 1)] for rows in (1, TOGETHER)
    )

    @numba.njit
    def shrink(slabs, last_row, operands):  # type: ignore[no-untyped-def]
        if last_row == 0:
            if slabs == 1:
                one(operands)
            elif slabs == 2:
                two(operands)
            else:
                three(operands)
        elif slabs == 1:
            one_rows(operands)
        elif slabs == 2:
            two_rows(operands)
        else:
            three_rows(operands)

    return shrink


shrink_bf16 = _make_shrinks(BF16)
shrink_float = _make_shrinks(FLOAT)


def _make_expand(kind: int, rows: int) -> Any:
    """expand(low, stride, last_row, b, rank, sums): of each row, float32 sums[r, 0 .. 64] = sum over j of
    low[r, j] * b[j, 0 .. 64]; all int64, stride in bytes. Rows past the last repeat it.
    """
    size = 2 if kind == dtypes.BF16 else 4
    vectors = WIDTH // LANES

    @intrinsic  # type: ignore[untyped-decorator]
    def expand(typingctx: Any, low: Any, stride: Any, last_row: Any, b: Any, rank: Any, sums: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            low, stride, last_row, b, rank, sums = args

            def at(base: Any, index: Any, step: int) -> Any:
                return builder.add(base, builder.mul(index, ir.Constant(I64, step)))

            numbers = [ir.Constant(I64, row) for row in range(rows)]
            clamped = [builder.select(builder.icmp_signed("<", n, last_row), n, last_row) for n in numbers]
            lows = [builder.add(low, builder.mul(stride, row)) for row in clamped]
            totals = [[cgutils.alloca_once(builder, F32X16) for _ in range(vectors)] for _ in range(rows)]
            for total in (total for row in totals for total in row):
                builder.store(ir.Constant(F32X16, [0.0] * LANES), total)
            with cgutils.for_range(builder, rank) as loop:
                block = at(b, loop.index, size * WIDTH)
                if rows > 1:
                    for line in range(0, size * WIDTH, 64):
                        prefetch(builder, builder.add(block, ir.Constant(I64, _AHEAD + line)), 1)
                places = [builder.add(block, ir.Constant(I64, size * LANES * v)) for v in range(vectors)]
                weights = [load16(builder, place, kind) for place in places]
                for place, row in zip(lows, totals, strict=True):
                    value = builder.load(builder.inttoptr(at(place, loop.index, 4), F32.as_pointer()))
                    spread = broadcast(builder, value)
                    for weight, total in zip(weights, row, strict=True):
                        builder.store(multiply_add(builder, spread, weight, builder.load(total)), total)
            for r, row in enumerate(totals):
                for v, total in enumerate(row):
                    offset = ir.Constant(I64, 4 * (WIDTH * r + LANES * v))
                    store16(builder, builder.load(total), builder.add(sums, offset))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return expand


expand_bf16_one, expand_bf16 = (_make_expand(dtypes.BF16, rows) for rows in (1, TOGETHER))
expand_float_one, expand_float = (_make_expand(dtypes.FLOAT32, rows) for rows in (1, TOGETHER))


def _make_add(kind: int) -> Any:
    """add(out, sums, scale, width): out[0 .. width] += scale * sums, numbers of this kind and float32."""
    size = 2 if kind == dtypes.BF16 else 4
    vector = ir.VectorType(I16 if kind == dtypes.BF16 else F32, LANES)

    @intrinsic  # type: ignore[untyped-decorator]
    def add(typingctx: Any, out: Any, sums: Any, scale: Any, width: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, sums, scale, width = args
            factor = broadcast(builder, scale)
            columns = broadcast(builder, builder.trunc(width, I32))
            for v in range(WIDTH // LANES):
                lanes = ir.Constant(I32X16, list(range(LANES * v, LANES * v + LANES)))
                mask = builder.icmp_signed("<", lanes, columns)
                place = builder.add(out, ir.Constant(I64, size * LANES * v))
                value = masked_load(builder, place, vector, mask)
                if kind == dtypes.BF16:
                    wide = builder.shl(builder.zext(value, I32X16), ir.Constant(I32X16, [16] * LANES))
                    value = builder.bitcast(wide, F32X16)
                addend = load16(builder, builder.add(sums, ir.Constant(I64, 4 * LANES * v)), dtypes.FLOAT32)
                value = multiply_add(builder, addend, factor, value)
                if kind == dtypes.BF16:
                    rounded = call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", BF16X16, value)
                    value = builder.bitcast(rounded, vector)
                masked_store(builder, value, place, mask)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32, types.int64), codegen

    return add


add_bf16 = _make_add(dtypes.BF16)
add_float = _make_add(dtypes.FLOAT32)
