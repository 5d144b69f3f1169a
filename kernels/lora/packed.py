"""An adapter of a linear layer as the CPU's kernel reads it: one piece of memory, which a step streams through.

All is found by its distance from the beginning, so that it can be moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.lora.reference import LayerAdapter, LowRank, padded_rank
from octavo.kernels.native.huge_memory import huge_tensor

LANES = 16  # rows of a slab of A, as in `native.gemm_tile`
WIDTH = 64  # columns of a block of B
SLAB_STEP = 64  # bytes of a slab's step, 16 lanes of one column in float32 or two in bf16
_LINE = 64  # bytes: of a cache line, where each part of an adapter begins

# Of an adapter, before its parts: where A's slabs begin, their number; the number of blocks, where these begin; where
# gain and shift begin, 0 where there is none. In bytes from its beginning.
(SLABS_AT, NUM_SLABS, NUM_BLOCKS, BLOCKS_AT, GAIN_AT, SHIFT_AT) = range(6)
HEADER_WORDS = 8  # a line
# Of a block: its column of the output, width, the column of x A^T, rank, where B's columns begin; the scale, a float64.
(COLUMN, BLOCK_WIDTH, LOW_COLUMN, RANK, COLUMNS_AT, SCALE) = range(6)
BLOCK_WORDS = 6


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter of a layer as the kernel reads it: a header, and parts that each begin a cache line. data: uint8."""

    data: Tensor

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes


def pack(adapter: LayerAdapter, num_rows: int, dtype: torch.dtype) -> PackedAdapter:
    """An adapter of a layer of `num_rows` outputs; A and B in bf16 or float32.

    A: slabs [R / 16, steps, 16, columns] as in `native.gemm_tile`, R the sum of padded ranks. B: blocks [rank, 64].
    """
    memory = _Memory()
    header = np.zeros(HEADER_WORDS, np.int64)
    memory.add(header)
    if adapter.parts:
        header[SLABS_AT] = memory.add(torch.cat([_slabs(part.a, dtype) for part in adapter.parts]))
    words: list[tuple[int, ...]] = []
    low = 0
    for part in adapter.parts:
        words += _blocks(part, low, memory.add(_columns(part.b, dtype)), dtype.itemsize)
        low += padded_rank(len(part.a))
    if adapter.gain is not None or adapter.shift is not None:
        words = _and_the_rest(words, num_rows)
    header[NUM_SLABS] = low // LANES
    header[NUM_BLOCKS] = len(words)
    header[BLOCKS_AT] = memory.add(np.array(words, np.int64))
    for word, values in ((GAIN_AT, adapter.gain), (SHIFT_AT, adapter.shift)):
        if values is not None:
            header[word] = memory.add(values.float())
    return PackedAdapter(memory.joined())


class _Memory:
    """Parts of one piece of memory, each at the beginning of a cache line."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._size = 0

    def add(self, values: Tensor | NDArray[np.int64]) -> int:
        """Where they begin. They are read when all are there."""
        tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        begin = self._size
        self._parts.append(tensor.contiguous())
        self._size += _in_lines(tensor.nbytes)
        return begin

    def joined(self) -> Tensor:
        joined = torch.zeros(self._size, dtype=torch.uint8)
        begin = 0
        for part in self._parts:
            if part.nbytes:
                joined[begin : begin + part.nbytes] = part.view(-1).view(torch.uint8)
            begin += _in_lines(part.nbytes)
        return joined


def _in_lines(num_bytes: int) -> int:
    return -(-num_bytes // _LINE) * _LINE


def join(adapters: Sequence[PackedAdapter]) -> list[PackedAdapter]:
    """The same ones behind each other in memory, in huge pages as far as they fill any."""
    memory = huge_tensor(sum(it.num_bytes for it in adapters))
    pieces = torch.split(memory, [it.num_bytes for it in adapters])
    for piece, adapter in zip(pieces, adapters, strict=True):
        piece.copy_(adapter.data)
    return [PackedAdapter(piece) for piece in pieces]


def _slabs(a: Tensor, dtype: torch.dtype) -> Tensor:
    """[r, K] -> [ceil(r / 16), steps, 16, columns of a step]."""
    columns = 2 if dtype == torch.bfloat16 else 1
    padded = torch.nn.functional.pad(a.to(dtype), (0, 0, 0, -len(a) % LANES))
    return padded.view(-1, LANES, a.shape[1] // columns, columns).transpose(1, 2)


def _columns(b: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, r] -> [ceil(N / 64), r, 64]."""
    padded = torch.nn.functional.pad(b.to(dtype), (0, 0, 0, -len(b) % WIDTH))
    return padded.view(-1, WIDTH, b.shape[1]).transpose(1, 2)


def _blocks(part: LowRank, low: int, begin: int, size: int) -> list[tuple[int, ...]]:
    """Of B's columns, which begin there, in numbers of so many bytes."""
    n, rank = part.b.shape
    scale = int(np.array([part.scale], np.float64).view(np.int64)[0])
    return [
        (part.first + column, min(WIDTH, n - column), low, rank, begin + column * rank * size, scale)
        for column in range(0, n, WIDTH)
    ]


def _and_the_rest(words: list[tuple[int, ...]], num_rows: int) -> list[tuple[int, ...]]:
    """With blocks of rank 0 for the columns that no part has: gain and shift are of all columns."""
    begin = 0
    more: list[tuple[int, ...]] = []
    for column, width, *_ in [*sorted(words), (num_rows, 0)]:
        more += [(at, min(WIDTH, column - at), 0, 0, 0, 0) for at in range(begin, column, WIDTH)]
        begin = column + width
    return words + more
