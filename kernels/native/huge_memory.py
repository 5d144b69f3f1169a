"""Memory for what every step streams through: with the system's small pages the TLB would miss at each of them."""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
_PIECE = 2 * HUGE_PAGE  # what weights that are smaller than half of it share
_ALIGNMENT = 64  # a cache line, and a vector


def huge_tensor(num_bytes: int) -> Tensor:
    """[num_bytes] uint8 zeros: huge pages as far as they are filled, where Linux gives any, and small ones behind them.

    It begins at a huge page's beginning. Its memory is given back with the last tensor that has a part of it.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    skip = -whole.data_ptr() % HUGE_PAGE
    filled = num_bytes // HUGE_PAGE * HUGE_PAGE
    if filled and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, skip, filled)
    return whole[skip : skip + num_bytes]


class _Pieces:
    """Memory for many small tensors, one behind the other: most weights of a small model wouldn't fill a huge page."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8. A piece is given back with the last tensor in it."""
        if num_bytes > _PIECE // 2:
            return huge_tensor(num_bytes)
        with self._lock:
            if num_bytes > len(self._left):
                self._left = huge_tensor(_PIECE)
            taken = self._left[:num_bytes]
            self._left = self._left[-(-num_bytes // _ALIGNMENT) * _ALIGNMENT :]
        return taken


_pieces = _Pieces()


def in_huge_pages(weight: Tensor) -> Tensor:
    """The same numbers, contiguous, for what every step reads: on a CPU a copy."""
    if weight.device.type != "cpu":
        return weight.contiguous()
    return _pieces.take(weight.nbytes).view(weight.dtype).view(weight.shape).copy_(weight)
