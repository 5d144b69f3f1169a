"""The inner loops of prefill attention as LLVM vector code, for AVX-512 BF16.

Query rows lie across a vector's lanes and keys one below the other, so that the softmax of a row is arithmetic between
vectors and never within one. A strip is 48 query rows, 3 vectors. The lines of every array over a strip are LINE = 192
bytes apart, even where fewer than 3 vectors are used:
  q       [D / 2, 48, 2] bf16     two neighbouring dimensions of each row
  scores  [keys, 48] float32      q . k * factor, where 2 ** score is the unnormalized weight; then, in the same place,
  weights [keys / 2, 48, 2] bf16  two neighbouring keys of each row
  out     [D, 48] float32
Keys are plain rows [keys, D] bf16, values [D / 16, keys / 2, 16, 2] bf16. All arguments are addresses or int64.
"""

# ruff: noqa: ARG001 (numba looks at the names of what it compiles)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels.native.llvm import (
    BF16X16,
    BF16X32,
    F32X16,
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
    soft_cap,
    store16,
)

LANES = 16
VECTORS = 3
LINE = VECTORS * LANES * 4
_ANY = -1  # load16's kind for float32


def _int(value: int) -> Any:
    return ir.Constant(I64, value)


def _at(builder: Any, base: Any, index: Any, step: int) -> Any:
    return builder.add(base, builder.mul(index, _int(step)))


def _load(builder: Any, address: Any, type_: Any) -> Any:
    return builder.load(builder.inttoptr(address, type_.as_pointer()), align=2)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=2)


def _transpose(builder: Any, vectors: list[Any]) -> list[Any]:
    """Move element j of vector i to element i of vector j; each stage exchanges one bit of the two indices."""
    for bit in (1, 2, 4, 8):
        low = ir.Constant(I32X16, [lane if not lane & bit else 16 + lane - bit for lane in range(16)])
        high = ir.Constant(I32X16, [lane + bit if not lane & bit else 16 + lane for lane in range(16)])
        turned = list(vectors)
        for i in range(16):
            if not i & bit:
                a = vectors[i]
                b = vectors[i | bit]
                turned[i] = builder.shuffle_vector(a, b, low)
                turned[i | bit] = builder.shuffle_vector(a, b, high)
        vectors = turned
    return vectors


def _emit(count: int, body: Callable[..., None], last: Any = types.int64) -> Any:
    """The signature and the code of an intrinsic with `count` int64 arguments, the last of type `last`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        body(builder, *args)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * (count - 1), last), codegen


def _tile(builder: Any, totals: list[list[Any]], x: Any, row: Any, step: int, w: Any, steps: Any) -> None:
    """totals[r][v] += products of x's row r with w [steps, 48, 2]; rows are `row` bytes apart, steps `step` bytes."""
    rows = [builder.add(x, builder.mul(row, _int(r))) for r in range(len(totals))]
    with cgutils.for_range(builder, steps) as loop:
        line = _at(builder, w, loop.index, LINE)
        columns = [_load(builder, builder.add(line, _int(64 * v)), I32X16) for v in range(len(totals[0]))]
        columns = [builder.bitcast(c, BF16X32) for c in columns]
        for address, line_totals in zip(rows, totals, strict=True):
            pair = _load(builder, _at(builder, address, loop.index, step), I32)
            pair = builder.bitcast(broadcast(builder, pair), BF16X32)
            for column, total in zip(columns, line_totals, strict=True):
                builder.store(dot_pairs(builder, builder.load(total), pair, column), total)


def make_score_tile(rows: int, vectors: int) -> Any:
    """tile(keys, bytes of a key, q, steps, scores, factor): `rows` keys times `vectors` vectors of q, times factor."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typingctx: Any, keys: Any, row: Any, q: Any, steps: Any, scores: Any, factor: Any) -> Any:
        def body(builder: Any, keys: Any, row: Any, q: Any, steps: Any, scores: Any, factor: Any) -> None:
            totals = [[cgutils.alloca_once(builder, F32X16) for _ in range(vectors)] for _ in range(rows)]
            for line in totals:
                for total in line:
                    builder.store(all_lanes(0.0), total)
            _tile(builder, totals, keys, row, 4, q, steps)
            factor = broadcast(builder, factor)
            for r, line in enumerate(totals):
                for v, total in enumerate(line):
                    value = builder.fmul(builder.load(total), factor)
                    store16(builder, value, builder.add(scores, _int(LINE * r + 64 * v)))

        return _emit(6, body, types.float32)

    return tile


def make_value_tile(rows: int, vectors: int) -> Any:
    """tile(values, weights, steps, out, factors): out = out * factors + values^T times weights, `rows` dimensions."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typingctx: Any, values: Any, weights: Any, steps: Any, out: Any, factors: Any) -> Any:
        def body(builder: Any, values: Any, weights: Any, steps: Any, out: Any, factors: Any) -> None:
            scale = [load16(builder, builder.add(factors, _int(64 * v)), _ANY) for v in range(vectors)]
            totals = [[cgutils.alloca_once(builder, F32X16) for _ in range(vectors)] for _ in range(rows)]
            places = [[builder.add(out, _int(LINE * r + 64 * v)) for v in range(vectors)] for r in range(rows)]
            for line, at in zip(totals, places, strict=True):
                for total, place, s in zip(line, at, scale, strict=True):
                    builder.store(builder.fmul(load16(builder, place, _ANY), s), total)
            _tile(builder, totals, values, _int(4), 64, weights, steps)
            for line, at in zip(totals, places, strict=True):
                for total, place in zip(line, at, strict=True):
                    store16(builder, builder.load(total), place)

        return _emit(5, body)

    return tile


@intrinsic  # type: ignore[untyped-decorator]
def softmax16(typingctx: Any, scores: Any, keys: Any, top: Any, total: Any, factor: Any) -> Any:
    """One step of the online softmax for one vector of rows: turns the scores of `keys` keys into weights, in place.

    keys is a multiple of 8. top, total: the rows' largest score and sum of weights so far, which are updated. factor:
    receives what the output of earlier keys must be multiplied by.
    The sum is taken over the rounded weights, so that they add up to exactly 1: a weight's rounding error then counts
    with its value's distance from the row's mean instead of with the whole value.
    """

    def body(builder: Any, scores: Any, keys: Any, top: Any, total: Any, factor: Any) -> None:
        before = load16(builder, top, _ANY)
        best = cgutils.alloca_once_value(builder, before)
        with cgutils.for_range(builder, builder.udiv(keys, _int(8))) as loop:
            first = _at(builder, scores, loop.index, 8 * LINE)
            lines = [load16(builder, builder.add(first, _int(LINE * j)), _ANY) for j in range(8)]
            while len(lines) > 1:
                lines = [larger(builder, a, b) for a, b in zip(lines[::2], lines[1::2], strict=True)]
            builder.store(larger(builder, lines[0], builder.load(best)), best)
        now = builder.load(best)
        change = exp2(builder, builder.fsub(before, now))
        store16(builder, now, top)
        store16(builder, change, factor)
        added = cgutils.alloca_once_value(builder, builder.fmul(load16(builder, total, _ANY), change))
        ones = builder.bitcast(ir.Constant(I32X16, [0x3F803F80] * 16), BF16X32)
        order = ir.Constant(ir.VectorType(I32, 32), [16 * (i % 2) + i // 2 for i in range(32)])
        with cgutils.for_range(builder, builder.udiv(keys, _int(2))) as loop:
            at = _at(builder, scores, loop.index, 2 * LINE)
            a, b = (load16(builder, builder.add(at, _int(LINE * j)), _ANY) for j in range(2))
            a, b = (exp2(builder, builder.fsub(x, now)) for x in (a, b))
            pair = call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", BF16X32, b, a)
            pair = builder.shuffle_vector(pair, pair, order)
            builder.store(dot_pairs(builder, builder.load(added), pair, ones), added)
            _store(builder, pair, _at(builder, scores, loop.index, LINE))
        store16(builder, builder.load(added), total)

    return _emit(5, body)


@intrinsic  # type: ignore[untyped-decorator]
def mask16(typingctx: Any, scores: Any, keys: Any, first: Any, lowest: Any, highest: Any) -> Any:
    """One vector of rows: set scores to -infinity where key first + j lies outside lowest .. highest (int32 [16])."""

    def body(builder: Any, scores: Any, keys: Any, first: Any, lowest: Any, highest: Any) -> None:
        low, high = (_load(builder, address, I32X16) for address in (lowest, highest))
        with cgutils.for_range(builder, keys) as loop:
            key = broadcast(builder, builder.trunc(builder.add(first, loop.index), I32))
            seen = builder.and_(builder.icmp_signed("<=", low, key), builder.icmp_signed("<=", key, high))
            at = _at(builder, scores, loop.index, LINE)
            store16(builder, builder.select(seen, load16(builder, at, _ANY), all_lanes(float("-inf"))), at)

    return _emit(5, body)


@intrinsic  # type: ignore[untyped-decorator]
def cap16(typingctx: Any, scores: Any, keys: Any, cap: Any) -> Any:
    """One vector of rows: replace scores 2 log2(e) x by cap * tanh(x)."""

    def body(builder: Any, scores: Any, keys: Any, cap: Any) -> None:
        cap = broadcast(builder, cap)
        with cgutils.for_range(builder, keys) as loop:
            at = _at(builder, scores, loop.index, LINE)
            store16(builder, soft_cap(builder, load16(builder, at, _ANY), cap), at)

    return _emit(3, body, types.float32)


@intrinsic  # type: ignore[untyped-decorator]
def pack_queries16(typingctx: Any, rows: Any, pairs: Any, q: Any) -> Any:
    """Pack 16 rows of `pairs` >= 16 pairs of bf16, at the addresses in rows (int64 [16]), into one vector of q."""

    def body(builder: Any, rows: Any, pairs: Any, q: Any) -> None:
        sources = [_load(builder, builder.add(rows, _int(8 * r)), I64) for r in range(16)]
        last = builder.sub(pairs, _int(16))  # the last block may overlap the one before it
        with cgutils.for_range(builder, builder.udiv(builder.add(pairs, _int(15)), _int(16))) as loop:
            first = builder.mul(loop.index, _int(16))
            first = builder.select(builder.icmp_signed("<", first, last), first, last)
            block = [_load(builder, _at(builder, source, first, 4), I32X16) for source in sources]
            for p, vector in enumerate(_transpose(builder, block)):
                _store(builder, vector, builder.add(_at(builder, q, first, LINE), _int(LINE * p)))

    return _emit(3, body)


@intrinsic  # type: ignore[untyped-decorator]
def store_outputs16(typingctx: Any, out: Any, dim: Any, total: Any, rows: Any, move: Any, scale: Any) -> Any:
    """Store one vector of out, times scale / total, as bf16 rows at the addresses in rows (int64 [16]) plus `move`."""

    def body(builder: Any, out: Any, dim: Any, total: Any, rows: Any, move: Any, scale: Any) -> None:
        targets = [builder.add(_load(builder, builder.add(rows, _int(8 * r)), I64), move) for r in range(16)]
        factor = builder.fdiv(broadcast(builder, scale), load16(builder, total, _ANY))
        with cgutils.for_range(builder, builder.udiv(dim, _int(16))) as loop:
            at = _at(builder, out, loop.index, 16 * LINE)
            block = [load16(builder, builder.add(at, _int(LINE * d)), _ANY) for d in range(16)]
            block = _transpose(builder, [builder.fmul(x, factor) for x in block])
            for target, vector in zip(targets, block, strict=True):
                rounded = call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", BF16X16, vector)
                _store(builder, rounded, _at(builder, target, loop.index, 32))

    return _emit(6, body, types.float32)


@intrinsic  # type: ignore[untyped-decorator]
def pack_values(typingctx: Any, rows: Any, dim: Any, keys: Any, values: Any, slab: Any) -> Any:
    """Pack value rows [keys, dim] bf16, keys even, as [dim / 16, keys / 2, 16, 2]; one slab takes `slab` bytes."""

    def body(builder: Any, rows: Any, dim: Any, keys: Any, values: Any, slab: Any) -> None:
        order = ir.Constant(ir.VectorType(I32, 32), [16 * (i % 2) + i // 2 for i in range(32)])
        half = ir.VectorType(I16, 16)
        with cgutils.for_range(builder, builder.udiv(keys, _int(2))) as pair:
            above = builder.add(rows, builder.mul(builder.mul(pair.index, dim), _int(4)))
            below = _at(builder, above, dim, 2)
            with cgutils.for_range(builder, builder.udiv(dim, _int(16))) as loop:
                a, b = (_load(builder, _at(builder, row, loop.index, 32), half) for row in (above, below))
                target = _at(builder, builder.add(values, builder.mul(loop.index, slab)), pair.index, 64)
                _store(builder, builder.shuffle_vector(a, b, order), target)

    return _emit(5, body)


@intrinsic  # type: ignore[untyped-decorator]
def copy(typingctx: Any, source: Any, size: Any, target: Any) -> Any:
    """Copy `size` bytes."""

    def body(builder: Any, source: Any, size: Any, target: Any) -> None:
        target, source = (builder.inttoptr(address, cgutils.voidptr_t) for address in (target, source))
        cgutils.raw_memcpy(builder, target, source, size, 1)

    return _emit(3, body)


@intrinsic  # type: ignore[untyped-decorator]
def clear(typingctx: Any, target: Any, size: Any) -> Any:
    """Write `size` bytes of zeros."""

    def body(builder: Any, target: Any, size: Any) -> None:
        cgutils.memset(builder, builder.inttoptr(target, cgutils.voidptr_t), size, 0)

    return _emit(2, body)


@intrinsic  # type: ignore[untyped-decorator]
def to_bf16(typingctx: Any, source: Any, count: Any, target: Any) -> Any:
    """Round `count` float32 numbers, a multiple of 16, to bf16."""

    def body(builder: Any, source: Any, count: Any, target: Any) -> None:
        with cgutils.for_range(builder, builder.udiv(count, _int(16))) as loop:
            value = load16(builder, _at(builder, source, loop.index, 64), _ANY)
            rounded = call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", BF16X16, value)
            _store(builder, rounded, _at(builder, target, loop.index, 32))

    return _emit(3, body)
