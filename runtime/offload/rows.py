"""Blocks of a KV cache as rows of bytes, and back: all that a block has in any tensor, in the order of the layers.

Layers of several groups share tensors (worker/kv_layout.py), so a row is as large whichever group has the block. Bytes
are copied as they are: a block that is read back is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.attention.cache import LayerCache
from octavo.runtime.worker.cache_memory import tensors_of

Bytes = NDArray[np.uint8]
PIECE_BYTES = 1 << 17  # of one tensor, gathered at a time: they stay in a core's cache until they are copied on


class BlockRows:
    """The blocks of these caches, which are on the CPU. block_bytes: of a row."""

    def __init__(self, caches: Sequence[LayerCache]) -> None:
        self._pieces = [_bytes_of(tensor) for tensor in tensors_of(caches)]  # of each tensor [num_blocks, bytes]
        ends = np.cumsum([piece.shape[1] for piece in self._pieces]).tolist()
        self._places = [slice(end - piece.shape[1], end) for piece, end in zip(self._pieces, ends, strict=True)]
        self.block_bytes: int = ends[-1]

    def copy_out(self, blocks: Sequence[int], rows: Bytes) -> None:
        """Copy blocks into rows [len(blocks), block_bytes]."""
        for chosen, part in self._parts(blocks, rows):
            for piece, place in zip(self._pieces, self._places, strict=True):
                part[:, place] = piece[chosen]

    def copy_in(self, rows: Bytes, blocks: Sequence[int]) -> None:
        """Copy rows [len(blocks), block_bytes] into blocks."""
        for chosen, part in self._parts(blocks, rows):
            for piece, place in zip(self._pieces, self._places, strict=True):
                piece[chosen] = part[:, place]

    def _parts(self, blocks: Sequence[int], rows: Bytes) -> list[tuple[NDArray[np.int64], Bytes]]:
        count = max(1, PIECE_BYTES // max(piece.shape[1] for piece in self._pieces))
        wanted = np.asarray(blocks, np.int64)
        return [(wanted[i : i + count], rows[i : i + count]) for i in range(0, len(blocks), count)]


def _bytes_of(tensor: Tensor) -> Bytes:
    flat: Bytes = tensor.view(torch.uint8).numpy().reshape(len(tensor), -1)
    assert np.shares_memory(flat, tensor.view(torch.uint8).numpy())
    return flat
