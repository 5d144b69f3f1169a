"""CPU body of low-rank adapters: for all slots that a step uses, both products in one launch (AVX-512 BF16).

First x A^T of each slot's rows (shrink), as tiles of `native.gemm_tile`, to float32, in two sums, of either half of x's
columns; then their total's product with B, added to the output in float32 (expand). Which rows, and of which adapter,
the kernel reads in memory, so that a recorded step serves whatever adapters later steps use. Each output's sums run in
one order, whatever other rows there are. Reference: `lora.reference.ReferenceSlots`.
"""
# ruff: noqa: ARG001 (numba looks at the names of what it compiles)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.lora.reference import LayerAdapter, LowRank, floating, padded_rank
from octavo.kernels.lora.rows import AdapterRows
from octavo.kernels.native import dtypes
from octavo.kernels.native.atomics import add_word, give_way, pause, pointer, read_word, write_word
from octavo.kernels.native.dtypes import KINDS, load_row, size_of, store_row
from octavo.kernels.native.gemm_tile import BF16, FLOAT, LANES, make_tile
from octavo.kernels.native.jit import kernel, next_item, threads_for, view
from octavo.kernels.native.llvm import (
    BF16X16,
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
    store16,
)

_CHUNK = 64  # rows of an item
_ROWS = 8  # of a tile, at most
_SPLITS = 2  # sums of x A^T: a matrix of rank 16 is one slab, of which two threads take half each
_WIDTH = 64  # columns of a block of B
_TOGETHER = 4  # rows that a block is multiplied with at once
_MANY = 64  # blocks of all slots, from which on an item has several of them
_SLAB_STEP = 64  # bytes of a slab's step, 16 lanes of one column in float32 or two in bf16

# Of a slot in the table: A's slabs, their number, the number of blocks, the blocks, gain or 0, shift or 0.
(_A, _NUM_SLABS, _NUM_BLOCKS, _BLOCKS, _GAIN, _SHIFT) = range(6)
_SLOT = 8  # words of a slot
_HEADER = 8  # words before the first one, a cache line: how many items are done
# Of a block: its column of the output, width, the column of x A^T, rank, address of B's columns; the scale, a float64.
(_COLUMN, _BLOCK_WIDTH, _LOW, _RANK, _B, _SCALE) = range(6)
_BLOCK = 6  # words of a block

# The kernel's arguments, in the order of the call in `CpuSlots.add`.
(_X, _KIND, _STEPS, _ROW_BYTES, _OUT, _OUT_KIND, _N, _ROW_LIST, _STARTS, _SLOTS, _TABLE, _H, _H_STRIDE, _H_SPLIT) = (
    range(1, 15)
)


def _make_shrink(kind: int) -> Any:
    """rows(last_row, operands): the tile of so many rows; operands as of `make_tile`."""
    one, two, four, eight = (make_tile(rows, 1, kind) for rows in (1, 2, 4, 8))

    @numba.njit
    def rows(last_row, operands):  # type: ignore[no-untyped-def]
        if last_row > 3:
            eight(operands)
        elif last_row > 1:
            four(operands)
        elif last_row == 1:
            two(operands)
        else:
            one(operands)

    return rows


_shrink_bf16 = _make_shrink(BF16)
_shrink_float = _make_shrink(FLOAT)


def _make_expand(kind: int, rows: int) -> Any:
    """expand(h, stride, split, last_row, b, rank, sums): of each row, float32 sums[r, 0 .. 64] = sum over j of
    (h[r, j] + h[r, split + j]) * b[j, 0 .. 64]; all int64, stride and split in bytes. Rows past the last repeat it.
    """
    size = 2 if kind == dtypes.BF16 else 4
    vectors = _WIDTH // LANES

    @intrinsic  # type: ignore[untyped-decorator]
    def expand(typingctx: Any, h: Any, stride: Any, split: Any, last_row: Any, b: Any, rank: Any, sums: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            h, stride, split, last_row, b, rank, sums = args

            def at(base: Any, index: Any, step: int) -> Any:
                return builder.add(base, builder.mul(index, ir.Constant(I64, step)))

            def single(address: Any) -> Any:
                return builder.load(builder.inttoptr(address, F32.as_pointer()))

            numbers = [ir.Constant(I64, row) for row in range(rows)]
            clamped = [builder.select(builder.icmp_signed("<", n, last_row), n, last_row) for n in numbers]
            lows = [builder.add(h, builder.mul(stride, row)) for row in clamped]
            totals = [[cgutils.alloca_once(builder, F32X16) for _ in range(vectors)] for _ in range(rows)]
            for total in (total for row in totals for total in row):
                builder.store(ir.Constant(F32X16, [0.0] * LANES), total)
            with cgutils.for_range(builder, rank) as loop:
                block = at(b, loop.index, size * _WIDTH)
                places = [builder.add(block, ir.Constant(I64, size * LANES * v)) for v in range(vectors)]
                weights = [load16(builder, place, kind) for place in places]
                for low, row in zip(lows, totals, strict=True):
                    place = at(low, loop.index, 4)
                    value = builder.fadd(single(place), single(builder.add(place, split)))
                    spread = broadcast(builder, value)
                    for weight, total in zip(weights, row, strict=True):
                        builder.store(multiply_add(builder, spread, weight, builder.load(total)), total)
            for r, row in enumerate(totals):
                for v, total in enumerate(row):
                    offset = ir.Constant(I64, 4 * (_WIDTH * r + LANES * v))
                    store16(builder, builder.load(total), builder.add(sums, offset))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return expand


_expand_bf16_one, _expand_bf16 = (_make_expand(dtypes.BF16, rows) for rows in (1, _TOGETHER))
_expand_float_one, _expand_float = (_make_expand(dtypes.FLOAT32, rows) for rows in (1, _TOGETHER))


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
            for v in range(_WIDTH // LANES):
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


_add_bf16 = _make_add(dtypes.BF16)
_add_float = _make_add(dtypes.FLOAT32)


@numba.njit
def _count(table, starts, slots, ends):  # type: ignore[no-untyped-def]
    """How many blocks an item has; ends [2, slots]: how many items the slots up to each one are, of either product."""
    blocks = 0
    for slot in range(slots):
        chunks = (starts[slot + 1] - starts[slot] + _CHUNK - 1) // _CHUNK
        blocks += chunks * table[_HEADER + _SLOT * slot + _NUM_BLOCKS]
    group = 4 if blocks >= _MANY else 1
    shrinks = 0
    expands = 0
    for slot in range(slots):
        at = _HEADER + _SLOT * slot
        chunks = (starts[slot + 1] - starts[slot] + _CHUNK - 1) // _CHUNK
        shrinks += chunks * table[at + _NUM_SLABS] * _SPLITS
        expands += chunks * ((table[at + _NUM_BLOCKS] + group - 1) // group)
        ends[0, slot] = shrinks
        ends[1, slot] = expands
    return group


@numba.njit
def _gather(x, row_bytes, rows, first, count, buffer):  # type: ignore[no-untyped-def]
    """The address of `count` rows of x, row_bytes apart: where they are, or copied where they don't lie together."""
    together = True
    for i in range(1, count):
        together = together and rows[first + i] == rows[first] + i
    if together:
        return x + rows[first] * row_bytes
    for i in range(count):
        given = view(x + rows[first + i] * row_bytes, (row_bytes,), np.uint8)
        for j in range(row_bytes):
            buffer[i * row_bytes + j] = given[j]
    return buffer.ctypes.data


@numba.njit
def _shrink(a, slot, item, starts, rows, table, buffer):  # type: ignore[no-untyped-def]
    """One of the sums of a slab of x A^T, of a chunk of a slot's rows."""
    at = _HEADER + _SLOT * slot
    per_chunk = table[at + _NUM_SLABS] * _SPLITS
    slab = item % per_chunk // _SPLITS
    split = item % _SPLITS
    first = starts[slot] + item // per_chunk * _CHUNK
    last = min(starts[slot + 1], first + _CHUNK)
    half = (a[_STEPS] + _SPLITS - 1) // _SPLITS
    begin = min(split * half, a[_STEPS])
    steps = min(half, a[_STEPS] - begin)
    weight = table[at + _A] + (slab * a[_STEPS] + begin) * _SLAB_STEP
    stride = a[_H_STRIDE] * 4
    low = a[_H] + split * a[_H_SPLIT] + slab * LANES * 4
    i = first
    while i < last:
        count = min(_ROWS, last - i)
        x = _gather(a[_X], a[_ROW_BYTES], rows, i, count, buffer) + 4 * begin
        last_row = count - 1
        h = low + i * stride
        operands = (x, a[_ROW_BYTES], last_row, weight, 0, 0, dtypes.FLOAT32, h, stride, LANES, steps, 0, -1)
        if a[_KIND] == BF16:
            _shrink_bf16(last_row, operands)
        else:
            _shrink_float(last_row, operands)
        i += count


@numba.njit
def _multiply(a, i, count, block, sums):  # type: ignore[no-untyped-def]
    """sums [4, 64] of rows i .. i + count, up to four, with a block of B."""
    stride = a[_H_STRIDE] * 4
    h = a[_H] + i * stride + block[_LOW] * 4
    if a[_KIND] == BF16:
        if count == 1:
            _expand_bf16_one(h, stride, a[_H_SPLIT], 0, block[_B], block[_RANK], sums.ctypes.data)
        else:
            _expand_bf16(h, stride, a[_H_SPLIT], count - 1, block[_B], block[_RANK], sums.ctypes.data)
    elif count == 1:
        _expand_float_one(h, stride, a[_H_SPLIT], 0, block[_B], block[_RANK], sums.ctypes.data)
    else:
        _expand_float(h, stride, a[_H_SPLIT], count - 1, block[_B], block[_RANK], sums.ctypes.data)


@numba.njit
def _change(out, kind, block, scale, sums, gain, shift, old):  # type: ignore[no-untyped-def]
    """A row's part of the output that a gain or a shift changes, or whose numbers are fp16."""
    width = block[_BLOCK_WIDTH]
    column = block[_COLUMN]
    load_row(out, kind, old, width)
    for j in range(width):
        old[j] += scale * sums[j]
    if gain != 0:
        gains = view(gain + 4 * column, (width,), np.float32)
        for j in range(width):
            old[j] *= gains[j]
    if shift != 0:
        shifts = view(shift + 4 * column, (width,), np.float32)
        for j in range(width):
            old[j] += shifts[j]
    store_row(old, np.float32(1), out, kind, width)


@numba.njit
def _expand(a, slot, chunk, number, starts, rows, table, sums, old):  # type: ignore[no-untyped-def]
    """A block of the output, of a chunk of a slot's rows."""
    at = _HEADER + _SLOT * slot
    address = table[at + _BLOCKS] + number * _BLOCK * 8
    block = view(address, (_BLOCK,), np.int64)
    scale = np.float32(view(address, (_BLOCK,), np.float64)[_SCALE])
    first = starts[slot] + chunk * _CHUNK
    last = min(starts[slot + 1], first + _CHUNK)
    kind = a[_OUT_KIND]
    gain = table[at + _GAIN]
    shift = table[at + _SHIFT]
    i = first
    while i < last:
        count = min(_TOGETHER, last - i)
        _multiply(a, i, count, block, sums)
        for r in range(count):
            out = a[_OUT] + (rows[i + r] * a[_N] + block[_COLUMN]) * size_of(kind)
            own = sums.ctypes.data + r * _WIDTH * 4
            if gain != 0 or shift != 0 or kind == dtypes.FP16:
                _change(out, kind, block, scale, sums[r], gain, shift, old)
            elif kind == dtypes.BF16:
                _add_bf16(out, own, scale, block[_BLOCK_WIDTH])
            else:
                _add_float(out, own, scale, block[_BLOCK_WIDTH])
        i += count


@kernel("qqqqqqqqqqqqqq")
def _adapt(args):  # type: ignore[no-untyped-def]
    """Items: those of the first product, slot by slot, then those of the second, which wait for all of the first."""
    a = numba.carray(args, (15,), np.int64)
    slots = a[_SLOTS]
    table = view(a[_TABLE], (_HEADER + _SLOT * slots,), np.int64)
    starts = view(a[_STARTS], (slots + 1,), np.int64)
    rows = view(a[_ROW_LIST], (starts[slots],), np.int64)
    done = pointer(a[_TABLE])
    buffer = np.empty(_ROWS * a[_ROW_BYTES], np.uint8)
    sums = np.empty((_TOGETHER, _WIDTH), np.float32)
    old = np.empty(_WIDTH, np.float32)
    ends = np.empty((2, slots), np.int64)
    group = _count(table, starts, slots, ends)
    shrinks = ends[0, slots - 1]
    total = shrinks + ends[1, slots - 1]
    while True:
        item = next_item(args)
        if item >= total:
            break
        expands = item >= shrinks
        if expands:
            spins = 0
            while read_word(done, 0) < shrinks:
                spins += 1
                if spins % 256 == 0:
                    give_way()
                else:
                    pause()
            item -= shrinks
        phase = 1 if expands else 0
        slot = 0
        while item >= ends[phase, slot]:
            slot += 1
        if slot > 0:
            item -= ends[phase, slot - 1]
        if expands:
            blocks = table[_HEADER + _SLOT * slot + _NUM_BLOCKS]
            groups = (blocks + group - 1) // group
            begin = item % groups * group
            for number in range(begin, min(blocks, begin + group)):
                _expand(a, slot, item // groups, number, starts, rows, table, sums, old)
        else:
            _shrink(a, slot, item, starts, rows, table, buffer)
        if add_word(done, 0, 1) == total - 1:
            write_word(done, 0, 0)  # all is done, and nobody waits any more: ready for the next launch


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter as the kernel reads it.

    words    its slot's in the table, addresses among them
    tensors  what these lead to
    """

    words: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def pack(adapter: LayerAdapter, num_rows: int, dtype: torch.dtype) -> PackedAdapter:
    """An adapter of a layer of `num_rows` outputs; A and B in bf16 or float32.

    A: slabs [R / 16, steps, 16, columns] as in `native.gemm_tile`, R the sum of padded ranks. B: blocks [rank, 64].
    """
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> int:
        kept.append(tensor)
        return tensor.data_ptr()

    slabs = [_slabs(part.a, dtype) for part in adapter.parts]
    a = keep(torch.cat(slabs)) if slabs else 0
    words: list[tuple[int, ...]] = []
    low = 0
    for part in adapter.parts:
        words += _blocks(part, low, dtype, keep)
        low += padded_rank(len(part.a))
    if adapter.gain is not None or adapter.shift is not None:
        words = _and_the_rest(words, num_rows)
    blocks = np.array(words, np.int64).reshape(-1, _BLOCK)
    gain, shift = (0 if t is None else keep(t.float().contiguous()) for t in (adapter.gain, adapter.shift))
    return PackedAdapter((a, low // LANES, len(blocks), keep(torch.from_numpy(blocks)), gain, shift), tuple(kept))


def _slabs(a: Tensor, dtype: torch.dtype) -> Tensor:
    """[r, K] -> [ceil(r / 16), steps, 16, columns of a step]."""
    columns = 2 if dtype == torch.bfloat16 else 1
    padded = torch.nn.functional.pad(a.to(dtype), (0, 0, 0, -len(a) % LANES))
    return padded.view(-1, LANES, a.shape[1] // columns, columns).transpose(1, 2).contiguous()


def _blocks(part: LowRank, low: int, dtype: torch.dtype, keep: Callable[[Tensor], int]) -> list[tuple[int, ...]]:
    n, rank = part.b.shape
    padded = torch.nn.functional.pad(part.b.to(dtype), (0, 0, 0, -n % _WIDTH))
    columns = padded.view(-1, _WIDTH, rank).transpose(1, 2).contiguous()
    address = keep(columns)
    scale = int(np.array([part.scale], np.float64).view(np.int64)[0])
    size = columns.element_size() * rank * _WIDTH
    return [
        (part.first + begin, min(_WIDTH, n - begin), low, rank, address + begin // _WIDTH * size, scale)
        for begin in range(0, n, _WIDTH)
    ]


def _and_the_rest(words: list[tuple[int, ...]], num_rows: int) -> list[tuple[int, ...]]:
    """With blocks of rank 0 for the columns that no part has: gain and shift are of all columns."""
    begin = 0
    more: list[tuple[int, ...]] = []
    for column, width, *_ in [*sorted(words), (num_rows, 0)]:
        more += [(at, min(_WIDTH, column - at), 0, 0, 0, 0) for at in range(begin, column, _WIDTH)]
        begin = column + width
    return words + more


class CpuSlots:
    """The adapters of one linear layer, x [T, K] -> [T, N], by slot; called by one thread at a time.

    low_columns: the most that x A^T has. dtype: of A and B, bf16 for an input in bf16, else float32.
    """

    def __init__(self, num_slots: int, num_rows: int, num_columns: int, low_columns: int, dtype: torch.dtype) -> None:
        assert floating(dtype) == dtype
        self._table: NDArray[np.int64] = np.zeros(_HEADER + _SLOT * num_slots + 8, np.int64)
        skip = -self._table.ctypes.data % 64 // 8
        self._words = self._table[skip : skip + _HEADER + _SLOT * num_slots]
        self._adapters: list[PackedAdapter | None] = [None] * num_slots
        self._num_slots = num_slots
        self._num_rows = num_rows
        self._num_columns = num_columns
        self._low_columns = low_columns
        self._dtype = dtype
        self._elements = low_columns * (num_rows + num_columns)

    def pack(self, adapter: LayerAdapter) -> PackedAdapter:
        """In the layout that `put` takes."""
        return pack(adapter, self._num_rows, self._dtype)

    def put(self, slot: int, adapter: PackedAdapter | None) -> None:
        """Let a slot, which no step under way uses, have this adapter."""
        self._adapters[slot] = adapter
        at = _HEADER + _SLOT * slot
        self._words[at : at + _SLOT] = 0
        if adapter is not None:
            self._words[at : at + len(adapter.words)] = adapter.words

    def add(self, out: Tensor, x: Tensor, rows: AdapterRows) -> None:
        """out [T, N] += what the adapters of its rows make of x [T, K], in place."""
        assert rows.starts.shape[0] == self._num_slots + 1
        x = x.to(self._dtype).contiguous()
        size = x.element_size()
        h = x.new_empty(_SPLITS, x.shape[0], self._low_columns, dtype=torch.float32)
        _adapt.start(
            threads_for(self._elements * x.shape[0], at_least=16384),
            x.data_ptr(),
            BF16 if size == 2 else FLOAT,
            self._num_columns * size // 4,
            self._num_columns * size,
            out.data_ptr(),
            KINDS[out.dtype],
            self._num_rows,
            rows.rows.data_ptr(),
            rows.starts.data_ptr(),
            self._num_slots,
            self._words.ctypes.data,
            h.data_ptr(),
            self._low_columns,
            x.shape[0] * self._low_columns * 4,
        )


KERNELS = (_adapt,)
