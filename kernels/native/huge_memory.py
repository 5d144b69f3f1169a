"""Memory for what every step streams through: with the system's small pages the TLB would miss at each of them."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


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
