"""CPU body of low-rank adapters: for all slots that a step uses, both products in one launch (AVX-512 BF16).

First x A^T of each slot's rows (shrink) to float32, in two sums, of either half of x's columns; then their total's
product with B, added to the output in float32 (expand). Which rows, and of which adapter, the kernel reads in memory,
so that a recorded step serves whatever adapters later steps use. Each output's sums run in one order, whatever other
rows there are. Reference: `lora.reference.ReferenceSlots`.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.lora.packed import (
    BLOCK_WIDTH,
    BLOCK_WORDS,
    BLOCKS_AT,
    COLUMN,
    COLUMNS_AT,
    GAIN_AT,
    HEADER_WORDS,
    LOW_COLUMN,
    NUM_BLOCKS,
    NUM_SLABS,
    RANK,
    SCALE,
    SHIFT_AT,
    SLAB_STEP,
    SLABS_AT,
    WIDTH,
    PackedAdapter,
    pack,
)
from octavo.kernels.lora.reference import LayerAdapter, floating
from octavo.kernels.lora.rows import AdapterRows
from octavo.kernels.lora.vectors import (
    SLABS,
    TOGETHER,
    add_bf16,
    add_float,
    expand_bf16,
    expand_bf16_one,
    expand_float,
    expand_float_one,
    shrink_bf16,
    shrink_float,
)
from octavo.kernels.native import dtypes
from octavo.kernels.native.atomics import add_word, give_way, pause, read_word
from octavo.kernels.native.dtypes import KINDS, load_row, size_of, store_row
from octavo.kernels.native.gemm_tile import BF16, FLOAT, LANES
from octavo.kernels.native.jit import kernel, next_item, threads_for, view

_CHUNK = 64  # rows of an item
_SPLITS = 2  # sums of x A^T: of a matrix of rank 16, two threads take half each
_LEAST = 8  # rows times blocks of an item, for taking one costs as much as some blocks
_ITEMS = 8  # of a thread, so that one that is delayed leaves some to others
_DONE = 1 << 32  # in the counter of items, above those that were taken: those of the first product that are done

# The kernel's arguments, in the order of the call in `CpuSlots.add`.
(_THREADS, _X, _KIND, _STEPS, _ROW_BYTES, _OUT, _OUT_KIND, _N, _ROW_LIST, _STARTS, _SLOTS, _TABLE, _H, _H_STRIDE) = (
    range(1, 15)
)
_H_SPLIT = 15


@numba.njit
def _items(a, table, starts, slots, ends):  # type: ignore[no-untyped-def]
    """How many blocks an item has; ends [2, slots]: how many items the slots up to each one are, of either product."""
    blocks = 0
    work = 0
    for slot in range(slots):
        if table[slot] != 0:
            count = starts[slot + 1] - starts[slot]
            own = view(table[slot], (HEADER_WORDS,), np.int64)[NUM_BLOCKS]
            blocks += (count + _CHUNK - 1) // _CHUNK * own
            work += count * own
    wanted = max(a[_THREADS], min(work // _LEAST, a[_THREADS] * _ITEMS))
    group = max(1, (blocks + wanted - 1) // wanted)
    shrinks = 0
    expands = 0
    for slot in range(slots):
        if table[slot] != 0:
            header = view(table[slot], (HEADER_WORDS,), np.int64)
            chunks = (starts[slot + 1] - starts[slot] + _CHUNK - 1) // _CHUNK
            shrinks += chunks * ((header[NUM_SLABS] + SLABS - 1) // SLABS) * _SPLITS
            expands += chunks * ((header[NUM_BLOCKS] + group - 1) // group)
        ends[0, slot] = shrinks
        ends[1, slot] = expands
    return group


@numba.njit
def _shrink(a, adapter, item, first, end):  # type: ignore[no-untyped-def]
    """One of the sums of some slabs of x A^T, of a chunk of the rows first .. end of a slot."""
    header = view(adapter, (HEADER_WORDS,), np.int64)
    slabs = header[NUM_SLABS]
    per_chunk = (slabs + SLABS - 1) // SLABS * _SPLITS
    slab = item % per_chunk // _SPLITS * SLABS
    split = item % _SPLITS
    half = (a[_STEPS] + _SPLITS - 1) // _SPLITS
    begin = min(split * half, a[_STEPS])
    steps = min(half, a[_STEPS] - begin)
    slab_bytes = a[_STEPS] * SLAB_STEP
    weight = adapter + header[SLABS_AT] + slab * slab_bytes + begin * SLAB_STEP
    stride = a[_H_STRIDE] * 4
    i = first + item // per_chunk * _CHUNK
    last = min(end, i + _CHUNK)
    while i < last:
        last_row = min(TOGETHER, last - i) - 1
        numbers = a[_ROW_LIST] + 8 * i
        h = a[_H] + split * a[_H_SPLIT] + i * stride + slab * LANES * 4
        operands = (a[_X] + 4 * begin, a[_ROW_BYTES], numbers, last_row, weight, slab_bytes, h, stride, steps)
        if a[_KIND] == BF16:
            shrink_bf16(min(SLABS, slabs - slab), last_row, operands)
        else:
            shrink_float(min(SLABS, slabs - slab), last_row, operands)
        i += TOGETHER


@numba.njit
def _total(a, slabs, first, count, low):  # type: ignore[no-untyped-def]
    """low [count, 16 * slabs]: x A^T of rows first .. first + count, whose sums are complete."""
    columns = slabs * LANES
    for i in range(count):
        at = a[_H] + (first + i) * a[_H_STRIDE] * 4
        begin = view(at, (columns,), np.float32)
        rest = view(at + a[_H_SPLIT], (columns,), np.float32)
        for j in range(columns):
            low[i * columns + j] = begin[j] + rest[j]


@numba.njit
def _multiply(kind, low, stride, count, b, rank, sums):  # type: ignore[no-untyped-def]
    """sums [4, 64] of up to four rows with a block of B."""
    if kind == BF16:
        if count == 1:
            expand_bf16_one(low, stride, 0, b, rank, sums)
        else:
            expand_bf16(low, stride, count - 1, b, rank, sums)
    elif count == 1:
        expand_float_one(low, stride, 0, b, rank, sums)
    else:
        expand_float(low, stride, count - 1, b, rank, sums)


@numba.njit
def _change(out, kind, block, scale, sums, gain, shift, old):  # type: ignore[no-untyped-def]
    """A row's part of the output that a gain or a shift changes, or whose numbers are fp16."""
    width = block[BLOCK_WIDTH]
    column = block[COLUMN]
    added = view(sums, (width,), np.float32)
    load_row(out, kind, old, width)
    for j in range(width):
        old[j] += scale * added[j]
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
def _expand(a, adapter, item, group, first, end, scratch):  # type: ignore[no-untyped-def]
    """Some blocks of the output, of a chunk of the rows first .. end of a slot."""
    header = view(adapter, (HEADER_WORDS,), np.int64)
    groups = (header[NUM_BLOCKS] + group - 1) // group
    begin = item % groups * group
    i = first + item // groups * _CHUNK
    count = min(end, i + _CHUNK) - i
    sums = scratch.ctypes.data
    old = scratch[TOGETHER * WIDTH : (TOGETHER + 1) * WIDTH]
    low = scratch[(TOGETHER + 1) * WIDTH :]
    _total(a, header[NUM_SLABS], i, count, low)
    stride = header[NUM_SLABS] * LANES * 4
    rows = view(a[_ROW_LIST] + 8 * i, (count,), np.int64)
    kind = a[_OUT_KIND]
    gain = adapter + header[GAIN_AT] if header[GAIN_AT] != 0 else 0
    shift = adapter + header[SHIFT_AT] if header[SHIFT_AT] != 0 else 0
    for number in range(begin, min(header[NUM_BLOCKS], begin + group)):
        address = adapter + header[BLOCKS_AT] + number * BLOCK_WORDS * 8
        block = view(address, (BLOCK_WORDS,), np.int64)
        scale = np.float32(view(address, (BLOCK_WORDS,), np.float64)[SCALE])
        for r in range(0, count, TOGETHER):
            some = min(TOGETHER, count - r)
            at = low.ctypes.data + r * stride + block[LOW_COLUMN] * 4
            _multiply(a[_KIND], at, stride, some, adapter + block[COLUMNS_AT], block[RANK], sums)
            for s in range(some):
                out = a[_OUT] + (rows[r + s] * a[_N] + block[COLUMN]) * size_of(kind)
                own = sums + s * WIDTH * 4
                if gain != 0 or shift != 0 or kind == dtypes.FP16:
                    _change(out, kind, block, scale, own, gain, shift, old)
                elif kind == dtypes.BF16:
                    add_bf16(out, own, scale, block[BLOCK_WIDTH])
                else:
                    add_float(out, own, scale, block[BLOCK_WIDTH])


@kernel("qqqqqqqqqqqqqqq")
def _adapt(args):  # type: ignore[no-untyped-def]
    """Items: those of the first product, slot by slot, then those of the second, which wait for all of the first."""
    a = numba.carray(args, (16,), np.int64)
    slots = a[_SLOTS]
    table = view(a[_TABLE], (slots,), np.int64)
    starts = view(a[_STARTS], (slots + 1,), np.int64)
    most = min(_CHUNK, starts[slots])
    scratch = np.empty((TOGETHER + 1) * WIDTH + most * a[_H_STRIDE], np.float32)
    ends = np.empty((2, slots), np.int64)
    group = _items(a, table, starts, slots, ends)
    shrinks = ends[0, slots - 1]
    total = shrinks + ends[1, slots - 1]
    while True:
        item = next_item(args) % _DONE
        if item >= total:
            break
        expands = item >= shrinks
        if expands:
            spins = 0
            while read_word(args, 0) // _DONE < shrinks:
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
            _expand(a, table[slot], item, group, starts[slot], starts[slot + 1], scratch)
        else:
            _shrink(a, table[slot], item, starts[slot], starts[slot + 1])
            add_word(args, 0, _DONE)


class CpuSlots:
    """The adapters of one linear layer, x [T, K] -> [T, N], by slot; called by one thread at a time.

    low_columns: the most that x A^T has. dtype: of A and B, bf16 for an input in bf16, else float32.
    """

    def __init__(self, num_slots: int, num_rows: int, num_columns: int, low_columns: int, dtype: torch.dtype) -> None:
        assert floating(dtype) == dtype
        self._table: NDArray[np.int64] = np.zeros(num_slots, np.int64)  # where each slot's adapter lies; 0: none
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
        self._table[slot] = 0 if adapter is None else adapter.data.data_ptr()

    @property
    def is_used(self) -> bool:
        """Whether any slot has something."""
        return any(adapter is not None for adapter in self._adapters)

    def add(self, out: Tensor, x: Tensor, rows: AdapterRows) -> None:
        """out [T, N] += what the adapters of its rows make of x [T, K], in place."""
        assert rows.starts.shape[0] == self._num_slots + 1
        x = x.to(self._dtype).contiguous()
        size = x.element_size()
        h = x.new_empty(_SPLITS, x.shape[0], self._low_columns, dtype=torch.float32)
        threads = threads_for(self._elements * x.shape[0], at_least=16384)
        _adapt.start(
            threads,
            threads,
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
            self._table.ctypes.data,
            h.data_ptr(),
            self._low_columns,
            x.shape[0] * self._low_columns * 4,
        )


KERNELS = (_adapt,)
