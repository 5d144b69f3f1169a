"""The two inner loops of decode attention as LLVM vector code: 16 numbers at a time, accumulators in registers.

LLVM's own vectorizer would reduce after every row and reload what can stay in registers.
"""

# ruff: noqa: ARG001 (numba looks at the names of what it compiles)
from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels.attention import cache
from octavo.kernels.native.dtypes import BF16
from octavo.kernels.native.llvm import F32, F32X16, I64, broadcast, load16, multiply_add, prefetch, store16, sum_lanes

first_key = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(cache.first_key)


def _scaled(builder: Any, base: Any, index: Any, step: int) -> Any:
    return builder.add(base, builder.mul(index, ir.Constant(I64, step)))


def _make_dot(rows: int, kind: int) -> Any:
    size = 2 if kind == BF16 else 4

    @intrinsic  # type: ignore[untyped-decorator]
    def dot(typingctx: Any, q: Any, dim: Any, keys: Any, count: Any, scores: Any, width: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            q, dim, keys, count, scores, width = args
            totals = [cgutils.alloca_once(builder, F32X16) for _ in range(rows)]
            with cgutils.for_range(builder, count) as outer:
                key = _scaled(builder, keys, builder.mul(outer.index, dim), size)
                for total in totals:
                    builder.store(ir.Constant(F32X16, [0.0] * 16), total)
                with cgutils.for_range(builder, builder.udiv(dim, ir.Constant(I64, 16))) as inner:
                    k = load16(builder, _scaled(builder, key, inner.index, 16 * size), kind)
                    for r, total in enumerate(totals):
                        row = _scaled(builder, q, builder.mul(dim, ir.Constant(I64, r)), 4)
                        part = load16(builder, _scaled(builder, row, inner.index, 64), -1)
                        builder.store(multiply_add(builder, part, k, builder.load(total)), total)
                for r, total in enumerate(totals):
                    at = builder.add(builder.mul(width, ir.Constant(I64, r)), outer.index)
                    target = builder.inttoptr(_scaled(builder, scores, at, 4), F32.as_pointer())
                    builder.store(sum_lanes(builder, builder.load(total)), target)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 6), codegen

    return dot


def _make_add(rows: int, kind: int, vectors: int) -> Any:
    size = 2 if kind == BF16 else 4

    @intrinsic  # type: ignore[untyped-decorator]
    def add(typingctx: Any, out: Any, dim: Any, values: Any, count: Any, weights: Any, width: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, dim, values, count, weights, width = args
            totals = {}
            for r in range(rows):
                for v in range(vectors):
                    totals[r, v] = cgutils.alloca_once(builder, F32X16)
                    at = builder.add(builder.mul(dim, ir.Constant(I64, r)), ir.Constant(I64, 16 * v))
                    builder.store(load16(builder, _scaled(builder, out, at, 4), -1), totals[r, v])
            with cgutils.for_range(builder, count) as loop:
                row = _scaled(builder, values, builder.mul(loop.index, dim), size)
                parts = [
                    load16(builder, builder.add(row, ir.Constant(I64, 16 * v * size)), kind) for v in range(vectors)
                ]
                for r in range(rows):
                    at = builder.add(builder.mul(width, ir.Constant(I64, r)), loop.index)
                    pointer = builder.inttoptr(_scaled(builder, weights, at, 4), F32.as_pointer())
                    weight = broadcast(builder, builder.load(pointer))
                    for v, part in enumerate(parts):
                        total = totals[r, v]
                        builder.store(multiply_add(builder, weight, part, builder.load(total)), total)
            for (r, v), total in totals.items():
                at = builder.add(builder.mul(dim, ir.Constant(I64, r)), ir.Constant(I64, 16 * v))
                store16(builder, builder.load(total), _scaled(builder, out, at, 4))
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 6), codegen

    return add


_dot_bf16_1, _dot_bf16_2, _dot_bf16_3, _dot_bf16_4 = (_make_dot(r, BF16) for r in (1, 2, 3, 4))
_dot_float32_1, _dot_float32_2, _dot_float32_3, _dot_float32_4 = (_make_dot(r, -1) for r in (1, 2, 3, 4))
_add_bf16x64_1, _add_bf16x64_2, _add_bf16x64_3, _add_bf16x64_4 = (_make_add(r, BF16, 4) for r in (1, 2, 3, 4))
_add_bf16x16_1, _add_bf16x16_2, _add_bf16x16_3, _add_bf16x16_4 = (_make_add(r, BF16, 1) for r in (1, 2, 3, 4))
_add_float32x16_1, _add_float32x16_2, _add_float32x16_3, _add_float32x16_4 = (_make_add(r, -1, 1) for r in (1, 2, 3, 4))


@intrinsic  # type: ignore[untyped-decorator]
def _fetch_line(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        prefetch(builder, args[0], 1)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@numba.njit
def fetch(address, size):  # type: ignore[no-untyped-def]
    """Prefetch `size` bytes of memory; the address may be invalid."""
    for line in range(0, size, 64):
        _fetch_line(address + line)


@numba.njit
def dot_rows(rows, q, dim, keys, is_bf16, count, scores, width):  # type: ignore[no-untyped-def]
    """scores[r, j] = q[r] . keys[j] for r < rows <= 4, j < count; q float32 [rows, dim], keys bf16 or float32.

    scores is float32 with rows `width` apart; dim is a multiple of 16; all arrays are addresses.
    """
    if is_bf16:
        if rows == 1:
            _dot_bf16_1(q, dim, keys, count, scores, width)
        elif rows == 2:
            _dot_bf16_2(q, dim, keys, count, scores, width)
        elif rows == 3:
            _dot_bf16_3(q, dim, keys, count, scores, width)
        else:
            _dot_bf16_4(q, dim, keys, count, scores, width)
    elif rows == 1:
        _dot_float32_1(q, dim, keys, count, scores, width)
    elif rows == 2:
        _dot_float32_2(q, dim, keys, count, scores, width)
    elif rows == 3:
        _dot_float32_3(q, dim, keys, count, scores, width)
    else:
        _dot_float32_4(q, dim, keys, count, scores, width)


@numba.njit
def add_weighted_rows(rows, out, dim, values, is_bf16, count, weights, width):  # type: ignore[no-untyped-def]
    """out[r] += sum over j < count of weights[r, j] * values[j]; layouts as in `dot_rows`, out float32 [rows, dim]."""
    size = 2 if is_bf16 else 4
    column = 0
    while column < dim:
        o = out + 4 * column
        v = values + size * column
        if is_bf16 and column + 64 <= dim:
            if rows == 1:
                _add_bf16x64_1(o, dim, v, count, weights, width)
            elif rows == 2:
                _add_bf16x64_2(o, dim, v, count, weights, width)
            elif rows == 3:
                _add_bf16x64_3(o, dim, v, count, weights, width)
            else:
                _add_bf16x64_4(o, dim, v, count, weights, width)
            column += 64
            continue
        if is_bf16:
            if rows == 1:
                _add_bf16x16_1(o, dim, v, count, weights, width)
            elif rows == 2:
                _add_bf16x16_2(o, dim, v, count, weights, width)
            elif rows == 3:
                _add_bf16x16_3(o, dim, v, count, weights, width)
            else:
                _add_bf16x16_4(o, dim, v, count, weights, width)
        elif rows == 1:
            _add_float32x16_1(o, dim, v, count, weights, width)
        elif rows == 2:
            _add_float32x16_2(o, dim, v, count, weights, width)
        elif rows == 3:
            _add_float32x16_3(o, dim, v, count, weights, width)
        else:
            _add_float32x16_4(o, dim, v, count, weights, width)
        column += 16
