"""Register tiles of a GEMM as LLVM vector code: up to 8 rows of x times up to 64 rows of the weight, along all of K.

Weights lie in slabs of 16 rows (N): [N / 16, steps, 16 lanes, bytes per lane and step], N padded with zeros. One
step of a lane is
  INT8  4 columns, 4 bytes, each code + 128 as uint8 (AVX-512 VNNI multiplies unsigned by signed bytes)
  BF16  2 columns, bf16
  W8    2 columns, 2 signed bytes, converted to bf16 in registers
  W4    8 columns, an int32: code + 8 of column 2p at bits 4p, of column 2p + 1 at bits 16 + 4p. Masked and joined
        with 0x4300 a nibble q is the bf16 number 128 + q exactly; the 136 is taken off by the sums of x.
One tile function: tile(x, row bytes, last row, weight, slab bytes, last slab, steps, out, ...) writes
out [rows, vectors * 16] int32 or float32. Rows and slabs past the last repeat it, so edges need no other code.
"""
# ruff: noqa: ARG001 (numba looks at the names of what it compiles)

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels.attention.vectors import broadcast, load16, multiply_add

INT8, BF16, W8, W4 = range(4)
LANES = 16
STEP_COLUMNS = (4, 2, 2, 8)
STEP_BYTES = (64, 64, 32, 64)

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_I32X16 = ir.VectorType(_I32, 16)
_F32 = ir.FloatType()
_F32X16 = ir.VectorType(_F32, 16)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BF16X32 = ir.VectorType(_BFloat(), 32)


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    function = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)


def _at(builder: Any, base: Any, index: Any, step: int) -> Any:
    return builder.add(base, builder.mul(index, ir.Constant(_I64, step)))


def _load(builder: Any, address: Any, type_: Any) -> Any:
    return builder.load(builder.inttoptr(address, type_.as_pointer()), align=1)


def _dot(builder: Any, kind: int, total: Any, x: Any, w: Any) -> Any:
    """total + the dot products of each lane's step columns; x is the step of one row of x, as an i32."""
    spread = broadcast(builder, x)
    if kind == INT8:
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", _I32X16, total, w, spread)
    spread = builder.bitcast(spread, _BF16X32)
    return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _F32X16, total, spread, w)


def _decode(builder: Any, kind: int, address: Any) -> list[Any]:
    """The vectors of one step of a slab, ready for `_dot`: one, or four of two columns each for W4."""
    if kind == INT8:
        return [_load(builder, address, _I32X16)]
    if kind == BF16:
        return [builder.bitcast(_load(builder, address, _I32X16), _BF16X32)]
    if kind == W8:
        halves = []
        for offset in (0, 16):
            codes = _load(builder, builder.add(address, ir.Constant(_I64, offset)), ir.VectorType(_I8, 16))
            halves.append(builder.sitofp(builder.sext(codes, _I32X16), _F32X16))
        return [_call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _BF16X32, halves[1], halves[0])]
    word = _load(builder, address, _I32X16)
    pairs = []
    for p in range(4):
        nibbles = builder.lshr(word, ir.Constant(_I32X16, [4 * p] * 16)) if p else word
        nibbles = builder.and_(nibbles, ir.Constant(_I32X16, [0x000F000F] * 16))
        nibbles = builder.or_(nibbles, ir.Constant(_I32X16, [0x43004300] * 16))
        pairs.append(builder.bitcast(nibbles, _BF16X32))
    return pairs


class _Tile:
    """Emits one tile: addresses of its rows and slabs, accumulators, and the loop over steps."""

    def __init__(self, builder: Any, kind: int, rows: int, vectors: int, args: list[Any]) -> None:
        x, row_bytes, last_row, weight, slab_bytes, last_slab = args
        self.builder, self.kind = builder, kind
        self.x = [builder.add(x, builder.mul(row_bytes, self._clamp(r, last_row))) for r in range(rows)]
        self.w = [builder.add(weight, builder.mul(slab_bytes, self._clamp(v, last_slab))) for v in range(vectors)]
        self.vector = _I32X16 if kind == INT8 else _F32X16
        self.totals = [[cgutils.alloca_once(builder, self.vector) for _ in range(vectors)] for _ in range(rows)]

    def _clamp(self, index: int, last: Any) -> Any:
        constant = ir.Constant(_I64, index)
        return self.builder.select(self.builder.icmp_signed("<", constant, last), constant, last)

    def accumulate(self, first: Any, steps: Any) -> None:
        """Clear the accumulators and run steps first .. first + steps."""
        builder, kind = self.builder, self.kind
        for row in self.totals:
            for total in row:
                builder.store(ir.Constant(self.vector, [0] * 16), total)
        with cgutils.for_range(builder, steps) as loop:
            step = builder.add(first, loop.index)
            weights = [_decode(builder, kind, _at(builder, w, step, STEP_BYTES[kind])) for w in self.w]
            for part in range(len(weights[0])):
                for x, row in zip(self.x, self.totals, strict=True):
                    at = builder.add(_at(builder, x, step, 16 if kind == W4 else 4), ir.Constant(_I64, 4 * part))
                    columns = _load(builder, at, _I32)
                    for w, total in zip(weights, row, strict=True):
                        builder.store(_dot(builder, kind, builder.load(total), columns, w[part]), total)

    def store(self, totals: list[list[Any]], out: Any) -> None:
        """Write accumulators to out [rows, vectors * 16]."""
        for r, row in enumerate(totals):
            for v, total in enumerate(row):
                at = self.builder.add(out, ir.Constant(_I64, 64 * (r * len(row) + v)))
                value = self.builder.load(total)
                self.builder.store(value, self.builder.inttoptr(at, self.vector.as_pointer()), align=4)


def make_tile(kind: int, rows: int, vectors: int) -> Any:
    """tile(x, row_bytes, last_row, weight, slab_bytes, last_slab, steps, out), all int64; kinds INT8, BF16, W8."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typingctx: Any,
        x: Any,
        row_bytes: Any,
        last_row: Any,
        weight: Any,
        slab_bytes: Any,
        last_slab: Any,
        steps: Any,
        out: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emitted = _Tile(builder, kind, rows, vectors, args[:6])
            emitted.accumulate(ir.Constant(_I64, 0), args[6])
            emitted.store(emitted.totals, args[7])
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 8), codegen

    return tile


def make_grouped_tile(kind: int, rows: int, vectors: int) -> Any:
    """As make_tile for W4 and W8 with scales per group of columns:

    tile(x, row_bytes, last_row, weight, slab_bytes, last_slab, steps, out, groups, scales, offsets, sums):
    out = sum over groups g of scales[g] * (dot over g - offsets[g] * sums[row, g]), with `steps` steps in a group,
    scales and offsets float32 [N / 16, groups, 16], and sums float32 [M, groups].
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typingctx: Any,
        x: Any,
        row_bytes: Any,
        last_row: Any,
        weight: Any,
        slab_bytes: Any,
        last_slab: Any,
        steps: Any,
        out: Any,
        groups: Any,
        scales: Any,
        offsets: Any,
        sums: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emitted = _Tile(builder, kind, rows, vectors, args[:6])
            _emit_groups(builder, emitted, args)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 12), codegen

    return tile


def _emit_groups(builder: Any, tile: _Tile, args: list[Any]) -> None:
    last_row, last_slab, steps, out, groups, scales, offsets, sums = args[2], args[5], *args[6:]
    finals = [[cgutils.alloca_once(builder, _F32X16) for _ in row] for row in tile.totals]
    for row in finals:
        for final in row:
            builder.store(ir.Constant(_F32X16, [0.0] * 16), final)
    with cgutils.for_range(builder, groups) as loop:
        group = loop.index
        tile.accumulate(builder.mul(group, steps), steps)
        parts = []
        for v in range(len(tile.w)):
            slab = builder.mul(tile._clamp(v, last_slab), groups)
            at = _at(builder, ir.Constant(_I64, 0), builder.add(slab, group), 64)
            parts.append([load16(builder, builder.add(base, at), -1) for base in (scales, offsets)])
        for r, row in enumerate(finals):
            at = builder.add(builder.mul(tile._clamp(r, last_row), groups), group)
            total = broadcast(builder, builder.fneg(_load(builder, _at(builder, sums, at, 4), _F32)))
            for v, final in enumerate(row):
                scale, offset = parts[v]
                value = multiply_add(builder, total, offset, builder.load(tile.totals[r][v]))
                builder.store(multiply_add(builder, scale, value, builder.load(final)), final)
    tile.store(finals, out)
