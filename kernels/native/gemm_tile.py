"""Register tiles of a GEMM as LLVM vector code: up to 8 rows of x times up to 64 rows of the weight, along all of K.

Weights lie in slabs of 16 rows (N): [N / 16, steps, 16 lanes, bytes per lane and step], N padded with zeros. One
step of a lane is
  INT8  4 columns, 4 bytes, each code + 128 as uint8 (AVX-512 VNNI multiplies unsigned by signed bytes)
  BF16  2 columns, bf16
  W8    2 columns, 2 signed bytes, converted to bf16 in registers
  W4    8 columns, an int32: code + 8 of column 2p at bits 4p, of column 2p + 1 at bits 16 + 4p. Masked and joined
        with 0x4300 a nibble q is the bf16 number 128 + q exactly; the 136 is taken off by the sums of x.
  W5    32 columns: four of W4's words, and an int32 with the fifth bits: of columns 8 i + 2p and 8 i + 2p + 1 at bits
        4i + p and 16 + 4i + p. A code is q + 16, and 144 is taken off.
  W6    16 columns: two of W4's words, and an int32 with the fifth and sixth bits: of columns 8 i + 2p and 8 i + 2p + 1
        at bits 8i + 2p and 16 + 8i + 2p. A code is q + 32, and 160 is taken off.
  FLOAT 1 column, float32
  FP4   8 columns, an int32: e2m1 codes in W4's places, looked up by each halfword's five low bits in a table of 16 bf16
        numbers; it stands there twice, so the fifth bit, which is another code's, makes no difference.
  IQ4   as FP4, of the 16 integers of ggml's IQ4 blocks
  INT4  8 columns, 4 bytes: code + 8 of column p in byte p's low half, of column 4 + p in its high half. Each half of
        a word is four unsigned bytes, as VNNI multiplies them.
A tile reads its rows of x at `x`, `row_bytes` apart, and its slabs of the weight at `weight`, `slab_bytes` apart; rows
and slabs past the last repeat it. It writes its part of the output at `out`, `out_bytes` from row to row, straight from
the registers: `width` columns, by masked stores, of the rows up to last_row. So edges need no other code.
`ahead` is the distance in bytes from these weights to those that this thread needs next; `part` is the slab that is
prefetched from there meanwhile, -1 being all: a tile of many rows spreads the prefetching over several calls.
"""
# ruff: noqa: ARG001 (numba looks at the names of what it compiles)

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels.gemm import limits
from octavo.kernels.int4.reference import IQ4_LEVELS
from octavo.kernels.native import dtypes
from octavo.kernels.native.llvm import (
    BF16X16,
    BF16X32,
    F32,
    F32X16,
    I8,
    I16,
    I16X32,
    I32,
    I32X16,
    I64,
    broadcast,
    call,
    dot_pairs,
    load16,
    masked_store,
    multiply_add,
    prefetch,
    sum_lanes,
)

INT8, BF16, W8, W4, FLOAT, FP4, INT4, W5, W6, IQ4 = range(10)
LANES = limits.LANES
STEP_COLUMNS = (4, 2, 2, 8, 1, 8, 8, 32, 16, 8)
STEP_BYTES = (64, 64, 32, 64, 64, 64, 64, 320, 192, 64)
WORDS = {W4: 1, W5: 4, W6: 2, IQ4: 1}  # of W4's in a step
HIGH_BITS = {W5: 1, W6: 2}  # of a code, in a word of their own behind those
_X_BYTES = (4, 4, 4, 16, 4, 16, 8, 64, 32, 16)  # of a row of x in a step
_LINE = 64  # bytes of a cache line
_E2M1 = [0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0]  # 0, 0.5, 1, 1.5, 2, 3, 4 and 6 in bf16
_TABLES = {
    FP4: 2 * [*_E2M1, *(0x8000 | number for number in _E2M1)],
    IQ4: 2 * [int.from_bytes(struct.pack(">f", level)[:2]) for level in IQ4_LEVELS],
}  # of bf16


def at_step(builder: Any, base: Any, index: Any, step: int) -> Any:
    """base + index * step."""
    return builder.add(base, builder.mul(index, ir.Constant(I64, step)))


def _load(builder: Any, address: Any, type_: Any) -> Any:
    return builder.load(builder.inttoptr(address, type_.as_pointer()), align=1)


def dot(builder: Any, kind: int, total: Any, x: Any, w: Any) -> Any:
    """total + the dot products of each lane's step columns; x is the step of one row of x, as an i32."""
    spread = broadcast(builder, x)
    if kind in (INT8, INT4):
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", I32X16, total, w, spread)
    if kind == FLOAT:
        return multiply_add(builder, builder.bitcast(spread, F32X16), w, total)
    spread = builder.bitcast(spread, BF16X32)
    return dot_pairs(builder, total, spread, w)


def _decode(builder: Any, kind: int, address: Any, word: int) -> list[Any]:
    """The vectors of a word of a step of a slab, ready for `dot`: one, but four of two columns where a word is of
    nibbles, two for INT4. Only W5 and W6 have several words.
    """
    if kind == INT8:
        return [_load(builder, address, I32X16)]
    if kind == BF16:
        return [builder.bitcast(_load(builder, address, I32X16), BF16X32)]
    if kind == FLOAT:
        return [_load(builder, address, F32X16)]
    if kind == W8:
        halves = []
        for offset in (0, 16):
            codes = _load(builder, builder.add(address, ir.Constant(I64, offset)), ir.VectorType(I8, 16))
            halves.append(builder.sitofp(builder.sext(codes, I32X16), F32X16))
        return [call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", BF16X32, halves[1], halves[0])]
    nibbles = _load(builder, builder.add(address, ir.Constant(I64, _LINE * word)), I32X16)
    if kind == INT4:
        high = builder.lshr(nibbles, ir.Constant(I32X16, [4] * 16))
        return [builder.and_(half, ir.Constant(I32X16, [0x0F0F0F0F] * 16)) for half in (nibbles, high)]
    if kind in _TABLES:
        table = ir.Constant(I16X32, _TABLES[kind])
        indices = [builder.bitcast(_shifted(builder, nibbles, -4 * p), I16X32) for p in range(4)]
        found = [call(builder, "llvm.x86.avx512.permvar.hi.512", I16X32, table, index) for index in indices]
        return [builder.bitcast(numbers, BF16X32) for numbers in found]
    pairs = []
    for p in range(4):
        codes = builder.and_(_shifted(builder, nibbles, -4 * p), ir.Constant(I32X16, [0x000F000F] * 16))
        if kind in HIGH_BITS:
            bits = HIGH_BITS[kind]
            plane = _load(builder, builder.add(address, ir.Constant(I64, _LINE * WORDS[kind])), I32X16)
            high = _shifted(builder, plane, 4 - bits * (4 * word + p))
            mask = (16 << bits) - 16
            codes = builder.or_(codes, builder.and_(high, ir.Constant(I32X16, [mask << 16 | mask] * 16)))
        pairs.append(builder.bitcast(builder.or_(codes, ir.Constant(I32X16, [0x43004300] * 16)), BF16X32))
    return pairs


def _shifted(builder: Any, word: Any, left: int) -> Any:
    """Words shifted left, or right where that is below 0."""
    if left == 0:
        return word
    amount = ir.Constant(I32X16, [abs(left)] * 16)
    return builder.shl(word, amount) if left > 0 else builder.lshr(word, amount)


class Tile:
    """Emits one tile: addresses of its rows and slabs, accumulators, and the loop over steps."""

    def __init__(self, builder: Any, kind: int, rows: int, vectors: int, args: list[Any]) -> None:
        x, row_bytes, self.last_row, weight, slab_bytes, self.last_slab = args
        self.builder = builder
        self.kind = kind
        self.x = [builder.add(x, builder.mul(row_bytes, self.row(r))) for r in range(rows)]
        self.w = [builder.add(weight, builder.mul(slab_bytes, self.slab(v))) for v in range(vectors)]
        self.vector = I32X16 if kind in (INT8, INT4) else F32X16
        self.totals = [[cgutils.alloca_once(builder, self.vector) for _ in range(vectors)] for _ in range(rows)]

    def row(self, index: int) -> Any:
        """The number of a row, not past the last one."""
        return self._clamp(index, self.last_row)

    def slab(self, index: int) -> Any:
        """The number of a slab, not past the last one."""
        return self._clamp(index, self.last_slab)

    def _clamp(self, index: int, last: Any) -> Any:
        constant = ir.Constant(I64, index)
        return self.builder.select(self.builder.icmp_signed("<", constant, last), constant, last)

    def look_ahead(self, ahead: Any, part: Any) -> list[Any]:
        """How far from each slab's weights those lie that are fetched into L2 meanwhile; 0: nowhere."""
        builder = self.builder
        zero = ir.Constant(I64, 0)
        wanted = [builder.icmp_signed("==", part, ir.Constant(I64, v)) for v in range(len(self.w))]
        every = builder.icmp_signed("<", part, zero)
        return [builder.select(builder.or_(every, this), ahead, zero) for this in wanted]

    def accumulate(self, first: Any, steps: Any, ahead: list[Any], starts: list[Any] | None = None) -> None:
        """Set each row's accumulators to its vector of `starts`, or to zero, and run steps first .. first + steps."""
        builder = self.builder
        kind = self.kind
        for r, row in enumerate(self.totals):
            for total in row:
                builder.store(ir.Constant(self.vector, [0] * 16) if starts is None else starts[r], total)
        with cgutils.for_range(builder, steps) as loop:
            step = builder.add(first, loop.index)
            at = [at_step(builder, w, step, STEP_BYTES[kind]) for w in self.w]
            for address, distance in zip(at, ahead, strict=True):
                for line in range(0, STEP_BYTES[kind], _LINE):
                    prefetch(builder, builder.add(builder.add(address, distance), ir.Constant(I64, line)), 2)
            for word in range(WORDS.get(kind, 1)):
                self._multiply(step, word, [_decode(builder, kind, address, word) for address in at])

    def _multiply(self, step: Any, word: int, weights: list[list[Any]]) -> None:
        """Add the products of a word of each slab."""
        builder = self.builder
        count = len(weights[0])
        for part in range(count):
            for x, row in zip(self.x, self.totals, strict=True):
                offset = ir.Constant(I64, 4 * (count * word + part))
                columns = _load(builder, builder.add(at_step(builder, x, step, _X_BYTES[self.kind]), offset), I32)
                for w, total in zip(weights, row, strict=True):
                    builder.store(dot(builder, self.kind, builder.load(total), columns, w[part]), total)

    def sums(self) -> list[list[Any]]:
        """Where float32 sums over groups stand, as `totals`; 0 at first."""
        places = [[cgutils.alloca_once(self.builder, F32X16) for _ in row] for row in self.totals]
        for row in places:
            for place in row:
                self.builder.store(ir.Constant(F32X16, [0.0] * 16), place)
        return places

    def total(self, row: int, vector: int) -> Any:
        return self.builder.load(self.totals[row][vector])

    def store(self, values: Callable[[int], list[Any]], kind: Any, out: Any, out_bytes: Any, width: Any) -> None:
        """Write the float32 vectors that `values` makes for a row, as numbers of `kind` (see `native.dtypes`)."""
        builder = self.builder
        columns = builder.trunc(width, I32)
        lanes = [ir.Constant(I32X16, list(range(16 * v, 16 * v + 16))) for v in range(len(self.w))]
        masks = [builder.icmp_signed("<", lane, broadcast(builder, columns)) for lane in lanes]
        for r in range(len(self.x)):
            with builder.if_then(builder.icmp_signed("<=", ir.Constant(I64, r), self.last_row), likely=True):
                row = builder.add(out, builder.mul(out_bytes, ir.Constant(I64, r)))
                _store_row(builder, values(r), masks, kind, row)


def _store_row(builder: Any, values: list[Any], masks: list[Any], kind: Any, row: Any) -> None:
    def store(size: int, convert: Callable[[Any], Any]) -> None:
        for v, (value, mask) in enumerate(zip(values, masks, strict=True)):
            masked_store(builder, convert(value), builder.add(row, ir.Constant(I64, 16 * size * v)), mask)

    is_kind = {k: builder.icmp_signed("==", kind, ir.Constant(I64, k)) for k in (dtypes.BF16, dtypes.FP16)}
    with builder.if_else(is_kind[dtypes.BF16], likely=True) as (then, otherwise):
        with then:
            store(2, lambda value: _to_bf16(builder, value))
        with otherwise, builder.if_else(is_kind[dtypes.FP16]) as (half, single):
            with half:
                store(2, lambda value: builder.fptrunc(value, ir.VectorType(ir.HalfType(), 16)))
            with single:
                store(4, lambda value: value)


def _to_bf16(builder: Any, value: Any) -> Any:
    rounded = call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", BF16X16, value)
    return builder.bitcast(rounded, ir.VectorType(I16, 16))


def emit(operands: Any, body: Callable[[Any, list[Any]], None]) -> Any:
    """What an intrinsic of one tuple of int64 returns: its signature and its code, `body` of the tuple's values."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        body(builder, cgutils.unpack_tuple(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.UniTuple(types.int64, len(operands))), codegen


def make_tile(rows: int, vectors: int, kind: int = BF16) -> Any:
    """For BF16 and FLOAT: tile((x, row_bytes, last_row, weight, slab_bytes, last_slab, out_kind, out, out_bytes, width,
    steps, ahead, part)), all int64; `out_kind` is of `native.dtypes`.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typingctx: Any, operands: Any) -> Any:
        def body(builder: Any, args: list[Any]) -> None:
            emitted = Tile(builder, kind, rows, vectors, args[:6])
            emitted.accumulate(ir.Constant(I64, 0), args[10], emitted.look_ahead(*args[11:13]))
            emitted.store(lambda r: [emitted.total(r, v) for v in range(vectors)], *args[6:10])

        return emit(operands, body)

    return tile


def make_int8_tile(rows: int, vectors: int) -> Any:
    """For INT8: as make_tile, with (..., part, x_scales, x_sums, scales) at the end:

    out[r, c] = (dot - x_sums[r]) * x_scales[r] * scales[c]; x_sums int32, scales float32.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typingctx: Any, operands: Any) -> Any:
        def body(builder: Any, args: list[Any]) -> None:
            emitted = Tile(builder, INT8, rows, vectors, args[:6])
            emitted.accumulate(ir.Constant(I64, 0), args[10], emitted.look_ahead(*args[11:13]))
            x_scales, x_sums, scales = args[13:]
            at = [at_step(builder, scales, emitted.slab(v), 64) for v in range(vectors)]
            w_scales = [load16(builder, address, -1) for address in at]

            def values(r: int) -> list[Any]:
                offset = ir.Constant(I64, 4 * r)
                correction = broadcast(builder, _load(builder, builder.add(x_sums, offset), I32))
                scale = broadcast(builder, _load(builder, builder.add(x_scales, offset), F32))
                whole = [builder.sub(emitted.total(r, v), correction) for v in range(vectors)]
                floats = [builder.fmul(builder.sitofp(number, F32X16), scale) for number in whole]
                return [builder.fmul(a, b) for a, b in zip(floats, w_scales, strict=True)]

            emitted.store(values, *args[6:10])

        return emit(operands, body)

    return tile


def make_scaled_tile(rows: int, vectors: int) -> Any:
    """For FP4: as make_tile, with (..., part, groups, scales, row_scales) at the end:

    out = row_scales * sum over groups g of scales[g] * (dot over g), with `steps` steps in a group, scales bf16
    [N / 16, groups, 16] and row_scales float32 [N / 16, 16].
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typingctx: Any, operands: Any) -> Any:
        def body(builder: Any, args: list[Any]) -> None:
            emitted = Tile(builder, FP4, rows, vectors, args[:6])
            groups, scales, row_scales = args[13:]
            finals = _sum_scaled(emitted, args[10:13], groups, (scales, dtypes.BF16))
            at = [at_step(builder, row_scales, emitted.slab(v), 64) for v in range(vectors)]
            whole = [load16(builder, address, -1) for address in at]

            def values(r: int) -> list[Any]:
                return [builder.fmul(builder.load(final), w) for final, w in zip(finals[r], whole, strict=True)]

            emitted.store(values, *args[6:10])

        return emit(operands, body)

    return tile


def make_int4_tile(rows: int, vectors: int) -> Any:
    """For INT4: as make_tile, with (..., part, groups, scales, starts, x_scales) at the end:

    out = x_scales[row] * sum over groups g of scales[g] * (starts[row, g] + dot over g), with `steps` steps in a group,
    scales float32 [N / 16, groups, 16], starts int32 [M, groups]. The sum in brackets is exact, and g goes up.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typingctx: Any, operands: Any) -> Any:
        def body(builder: Any, args: list[Any]) -> None:
            emitted = Tile(builder, INT4, rows, vectors, args[:6])
            groups, scales, starts, x_scales = args[13:]
            finals = _sum_scaled(emitted, args[10:13], groups, (scales, -1), starts)

            def values(r: int) -> list[Any]:
                at = builder.add(x_scales, ir.Constant(I64, 4 * r))
                scale = broadcast(builder, _load(builder, at, F32))
                return [builder.fmul(builder.load(final), scale) for final in finals[r]]

            emitted.store(values, *args[6:10])

        return emit(operands, body)

    return tile


def _sum_scaled(tile: Tile, walk: list[Any], groups: Any, scales: tuple[Any, int], starts: Any = None) -> Any:
    """Where the sums over groups of scale * total stand, as `tile.totals`.

    walk: (steps, ahead, part); scales: (address, kind) of [N / 16, groups, 16]; starts: address of int32 [M, groups].
    """
    builder = tile.builder
    steps, ahead, part = walk
    address, kind = scales
    scale_bytes = 32 if kind == dtypes.BF16 else 64
    distances = tile.look_ahead(ahead, part)
    finals = tile.sums()
    slabs = [at_step(builder, address, builder.mul(tile.slab(v), groups), scale_bytes) for v in range(len(tile.w))]
    rows = range(len(tile.x)) if starts is not None else ()
    firsts = [at_step(builder, starts, builder.mul(tile.row(r), groups), 4) for r in rows]
    with cgutils.for_range(builder, groups) as loop:
        begun = [broadcast(builder, _load(builder, at_step(builder, first, loop.index, 4), I32)) for first in firsts]
        tile.accumulate(builder.mul(loop.index, steps), steps, distances, begun or None)
        for v, slab in enumerate(slabs):
            scale = load16(builder, at_step(builder, slab, loop.index, scale_bytes), kind)
            for r, row in enumerate(finals):
                total = tile.total(r, v)
                number = total if starts is None else builder.sitofp(total, F32X16)
                builder.store(multiply_add(builder, scale, number, builder.load(row[v])), row[v])
    return finals


@intrinsic  # type: ignore[untyped-decorator]
def sum_bf16(typingctx: Any, address: Any, vectors: Any) -> Any:
    """The float32 sum of 32 * vectors bf16 numbers at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, vectors = args
        ones = builder.bitcast(ir.Constant(I32X16, [0x3F803F80] * 16), BF16X32)
        total = cgutils.alloca_once(builder, F32X16)
        builder.store(ir.Constant(F32X16, [0.0] * 16), total)
        with cgutils.for_range(builder, vectors) as loop:
            x = builder.bitcast(_load(builder, at_step(builder, address, loop.index, 64), I32X16), BF16X32)
            builder.store(dot_pairs(builder, builder.load(total), x, ones), total)
        return sum_lanes(builder, builder.load(total))

    return types.float32(types.int64, types.int64), codegen


def make_rows(make: Callable[[int, int], Any]) -> Any:
    """rows(vectors, last_row, operands): the tile of a shape that fits so many rows; returns how many it has.

    make(rows, vectors) makes a tile. Those of few rows have 4 vectors, the one of 8 rows has 3.
    """
    one, two, four, eight = (make(rows, vectors) for rows, vectors in ((1, 4), (2, 4), (4, 4), (8, 3)))

    @numba.njit
    def rows(vectors, last_row, operands):  # type: ignore[no-untyped-def]
        if vectors == 3:
            eight(operands)
            return 8
        if last_row > 1:
            four(operands)
            return 4
        if last_row == 1:
            two(operands)
            return 2
        one(operands)
        return 1

    return rows
