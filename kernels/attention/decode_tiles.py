"""The inner loops of decode attention as LLVM vector code, for AVX-512 BF16: up to 4 query heads over a chunk of keys.

The chunk lies in runs of `block` rows, one after another in memory, whose addresses (int64) are given in the order in
which they are read; each row is fetched while the row at the same place of the run `ahead` further on is computed on.
  q        [rows, D] bf16
  scores   [keys, width] float32, width being 1, 2 or 4: q . k * factor, where 2 ** score is the unnormalized weight;
           then, in the same place, the weights
  out      [rows, D] float32
D is a multiple of 32 and `block` one of 4. 8-bit codes are converted exactly: int8 to bf16 or float32; e4m3 by way of
float16, whose exponent is 8 larger: e4m3 numbers come out as 1 / E4M3 of what they are.
"""

# ruff: noqa: ARG001 (numba looks at the names of what it compiles)
from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels.native.dtypes import BF16, INT8
from octavo.kernels.native.llvm import (
    BF16X32,
    F32,
    F32X16,
    I8,
    I16,
    I32,
    I32X16,
    I64,
    all_lanes,
    broadcast,
    call,
    dot_pairs,
    exp2,
    larger,
    load16,
    multiply_add,
    prefetch,
    soft_cap,
    store16,
)

E4M3 = 256.0
WIDTHS = (0, 1, 2, 4, 4)
"""Scores of a key, by rows."""
_KEYS = 4  # of a tile
_FLOAT = -1  # load16's kind for float32
_I8X32, _I16X32 = (ir.VectorType(bits, 32) for bits in (I8, I16))
_F16X16 = ir.VectorType(ir.HalfType(), 16)
_LOW, _HIGH = (ir.Constant(I32X16, list(range(first, first + 16))) for first in (0, 16))


def _int(value: int) -> Any:
    return ir.Constant(I64, value)


def _at(builder: Any, base: Any, index: Any, step: int) -> Any:
    return builder.add(base, builder.mul(index, _int(step)))


def _load(builder: Any, address: Any, type_: Any) -> Any:
    return builder.load(builder.inttoptr(address, type_.as_pointer()), align=1)


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _load_bf16(builder: Any, address: Any, kind: int) -> Any:
    """32 cached numbers as <32 x bfloat>."""
    if kind == BF16:
        return builder.bitcast(_load(builder, address, I32X16), BF16X32)
    low, high = _load_floats(builder, address, kind)
    return call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", BF16X32, high, low)


def _load_floats(builder: Any, address: Any, kind: int) -> tuple[Any, Any]:
    """32 cached numbers as two <16 x float>: the first and the last 16; of bf16 those at even and at odd places."""
    if kind == BF16:
        pairs = _load(builder, address, I32X16)
        even = builder.shl(pairs, ir.Constant(I32X16, [16] * 16))
        odd = builder.and_(pairs, ir.Constant(I32X16, [-0x10000] * 16))
        return builder.bitcast(even, F32X16), builder.bitcast(odd, F32X16)
    codes = _load(builder, address, _I8X32)
    if kind == INT8:
        low, high = (builder.shuffle_vector(codes, codes, half) for half in (_LOW, _HIGH))
        return tuple(builder.sitofp(builder.sext(half, I32X16), F32X16) for half in (low, high))
    wide = builder.sext(codes, _I16X32)
    bits = builder.shl(wide, ir.Constant(_I16X32, [7] * 32))
    bits = builder.and_(bits, ir.Constant(_I16X32, [-0x4001] * 32))  # a copy of the sign stands in the exponent
    magnitude = builder.and_(wide, ir.Constant(_I16X32, [0x7F] * 32))
    is_nan = builder.icmp_signed("==", magnitude, ir.Constant(_I16X32, [0x7F] * 32))
    bits = builder.select(is_nan, ir.Constant(_I16X32, [0x7E00] * 32), bits)
    low, high = (builder.bitcast(builder.shuffle_vector(bits, bits, half), _F16X16) for half in (_LOW, _HIGH))
    return builder.fpext(low, F32X16), builder.fpext(high, F32X16)


def _sum_each(builder: Any, vectors: list[Any]) -> Any:
    """A vector whose lane i has the sum of vectors[i]; 4, 8 or 16 of them, repeated over the lanes."""
    bit = 1
    while len(vectors) > 1:
        low = ir.Constant(I32X16, [lane if not lane & bit else 16 + lane - bit for lane in range(16)])
        high = ir.Constant(I32X16, [lane + bit if not lane & bit else 16 + lane for lane in range(16)])
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)) for a, b in pairs
        ]
        bit *= 2
    return _fold(builder, vectors[0], bit, builder.fadd)


def _fold(builder: Any, vector: Any, width: int, join: Any) -> Any:
    """Join all lanes whose numbers are equal modulo `width`."""
    bit = 8
    while bit >= width:
        turned = builder.shuffle_vector(vector, vector, ir.Constant(I32X16, [lane ^ bit for lane in range(16)]))
        vector = join(vector, turned)
        bit //= 2
    return vector


class _Runs:
    """The runs of a chunk: a loop over them, and where each row's counterpart further on lies."""

    def __init__(self, builder: Any, runs: Any, ahead: Any, block: Any, keys: Any) -> None:
        self.builder = builder
        self.runs = runs
        self.ahead = ahead
        self.block = block
        self.keys = keys

    @property
    def count(self) -> Any:
        builder = self.builder
        return builder.udiv(builder.sub(builder.add(self.keys, self.block), _int(1)), self.block)

    def run(self, index: Any) -> tuple[Any, Any, Any]:
        """A run's address, how far on the one lies that is fetched meanwhile, and how many keys the run has."""
        builder = self.builder
        address = _load(builder, _at(builder, self.runs, index, 8), I64)
        further = _load(builder, _at(builder, self.runs, builder.add(index, self.ahead), 8), I64)
        left = builder.sub(self.keys, builder.mul(index, self.block))
        return address, builder.sub(further, address), _smaller(builder, left, self.block)


def make_scores(rows: int, kind: int) -> Any:
    """scores(q, dim, runs, ahead, block, keys, scores, factor): of keys in fours; any numbers behind the last."""
    width = WIDTHS[rows]
    size = 2 if kind == BF16 else 1
    count = _KEYS * width

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typingctx: Any, q: Any, dim: Any, runs: Any, ahead: Any, block: Any, keys: Any, scores: Any, factor: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            q, dim, runs, ahead, block, keys, scores, factor = args
            factor = broadcast(builder, factor)
            row_bytes = builder.mul(dim, _int(size))
            queries = [builder.add(q, builder.mul(dim, _int(2 * r))) for r in range(rows)]
            totals = [[cgutils.alloca_once(builder, F32X16) for _ in range(rows)] for _ in range(_KEYS)]
            chunk = _Runs(builder, runs, ahead, block, keys)
            with cgutils.for_range(builder, chunk.count) as outer:
                address, distance, left = chunk.run(outer.index)
                target = _at(builder, scores, builder.mul(outer.index, block), 4 * width)
                with cgutils.for_range(builder, builder.udiv(builder.add(left, _int(_KEYS - 1)), _int(_KEYS))) as loop:
                    first = builder.add(address, builder.mul(loop.index, builder.mul(row_bytes, _int(_KEYS))))
                    places = [builder.add(first, builder.mul(row_bytes, _int(k))) for k in range(_KEYS)]
                    for total in (total for line in totals for total in line):
                        builder.store(all_lanes(0.0), total)
                    with cgutils.for_range(builder, builder.udiv(dim, _int(32))) as step:
                        parts = [_load_bf16(builder, _at(builder, x, step.index, 64), BF16) for x in queries]
                        for place, line in zip(places, totals, strict=True):
                            at = _at(builder, place, step.index, 32 * size)
                            prefetch(builder, builder.add(at, distance), 1)
                            key = _load_bf16(builder, at, kind)
                            for part, total in zip(parts, line, strict=True):
                                builder.store(dot_pairs(builder, builder.load(total), key, part), total)
                    padded = [
                        builder.load(line[r]) if r < rows else all_lanes(0.0) for line in totals for r in range(width)
                    ]
                    result = builder.fmul(_sum_each(builder, padded), factor)
                    _store_first(builder, result, count, _at(builder, target, loop.index, 4 * count))
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 7, types.float32), codegen

    return tile


def _store_first(builder: Any, vector: Any, count: int, address: Any) -> None:
    """The first `count` lanes of a <16 x float>."""
    if count < 16:
        vector = builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, count), list(range(count))))
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=4)


def make_mix(rows: int, kind: int) -> Any:
    """mix(weights, dim, runs, ahead, block, keys, out): the rows' sums of values, each times its weight."""
    width = WIDTHS[rows]
    size = 2 if kind == BF16 else 1

    @intrinsic  # type: ignore[untyped-decorator]
    def mix(typingctx: Any, weights: Any, dim: Any, runs: Any, ahead: Any, block: Any, keys: Any, out: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            weights, dim, runs, ahead, block, keys, out = args
            row_bytes = builder.mul(dim, _int(size))
            totals = [[cgutils.alloca_once(builder, F32X16) for _ in range(2)] for _ in range(rows)]
            chunk = _Runs(builder, runs, ahead, block, keys)
            with cgutils.for_range(builder, builder.udiv(dim, _int(32))) as columns:
                for total in (total for line in totals for total in line):
                    builder.store(all_lanes(0.0), total)
                with cgutils.for_range(builder, chunk.count) as outer:
                    address, distance, count = chunk.run(outer.index)
                    address = _at(builder, address, columns.index, 32 * size)
                    source = _at(builder, weights, builder.mul(outer.index, block), 4 * width)
                    with cgutils.for_range(builder, count) as loop:
                        at = builder.add(address, builder.mul(loop.index, row_bytes))
                        prefetch(builder, builder.add(at, distance), 1)
                        values = _load_floats(builder, at, kind)
                        weight_at = _at(builder, source, loop.index, 4 * width)
                        for r, line in enumerate(totals):
                            weight = broadcast(builder, _load(builder, builder.add(weight_at, _int(4 * r)), F32))
                            for value, total in zip(values, line, strict=True):
                                builder.store(multiply_add(builder, weight, value, builder.load(total)), total)
                for r, line in enumerate(totals):
                    target = builder.add(out, builder.mul(dim, _int(4 * r)))
                    _store_columns(builder, [builder.load(total) for total in line], kind, target, columns.index)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 7), codegen

    return mix


def _store_columns(builder: Any, halves: list[Any], kind: int, row: Any, index: Any) -> None:
    """32 columns as `_load_floats` has them."""
    a, b = halves
    if kind == BF16:
        orders = [[16 * (i % 2) + first + i // 2 for i in range(16)] for first in (0, 8)]
        a, b = (builder.shuffle_vector(*halves, ir.Constant(I32X16, order)) for order in orders)
    at = _at(builder, row, index, 128)
    store16(builder, a, at)
    store16(builder, b, builder.add(at, _int(64)))


def make_softmax(width: int) -> Any:
    """softmax(scores, vectors, cap, top, total): turn scores into weights 2 ** (score - top), in place.

    vectors: of 16 scores, -infinity where there is no key. cap: 0, or a soft cap in units of log2(e), of scores that
    are then 2 log2(e) x. top, total: receive the largest score and the sum of weights of each row, 16 numbers each.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def softmax(typingctx: Any, scores: Any, vectors: Any, cap: Any, top: Any, total: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            scores, vectors, cap, top, total = args
            best = cgutils.alloca_once_value(builder, ir.Constant(F32X16, [-3.4028234e38] * 16))
            is_capped = builder.fcmp_ordered(">", cap, ir.Constant(F32, 0.0))
            with builder.if_then(is_capped, likely=False), cgutils.for_range(builder, vectors) as loop:
                at = _at(builder, scores, loop.index, 64)
                x = load16(builder, at, _FLOAT)
                no_key = builder.fcmp_ordered("==", x, ir.Constant(F32X16, [float("-inf")] * 16))
                capped = soft_cap(builder, x, broadcast(builder, cap))
                store16(builder, builder.select(no_key, x, capped), at)
            with cgutils.for_range(builder, vectors) as loop:
                x = load16(builder, _at(builder, scores, loop.index, 64), _FLOAT)
                builder.store(larger(builder, x, builder.load(best)), best)
            largest = _fold(builder, builder.load(best), width, lambda a, b: larger(builder, a, b))
            store16(builder, largest, top)
            added = cgutils.alloca_once_value(builder, all_lanes(0.0))
            with cgutils.for_range(builder, vectors) as loop:
                at = _at(builder, scores, loop.index, 64)
                weight = exp2(builder, builder.fsub(load16(builder, at, _FLOAT), largest))
                store16(builder, weight, at)
                builder.store(builder.fadd(builder.load(added), weight), added)
            store16(builder, _fold(builder, builder.load(added), width, builder.fadd), total)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32, types.int64, types.int64), codegen

    return softmax
