"""The memory of a KV cache, which on a CPU is given back to the system while the engine sleeps.

The pages are given back and not the addresses: recorded steps go on pointing to them (replays.py), and what is read or
written there next is a new page of zeros, as it was when the cache was made.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from octavo.freed_memory import give_back_freed_memory
from octavo.kernels.linear_attention.states import Cache, StateCache


def tensors_of(caches: Iterable[Cache]) -> list[Tensor]:
    """All tensors of these caches once: layers of several groups share them (kv_layout.py)."""
    return list({it.data_ptr(): it for cache in caches for it in _tensors(cache)}.values())


def _tensors(cache: Cache) -> tuple[Tensor, ...]:
    return cache.parts if isinstance(cache, StateCache) else (cache.key, cache.value)


def give_back(caches: Iterable[Cache]) -> int:
    """Give back what these caches, on a CPU, hold, and what steps have freed. Returns how many bytes fewer are held."""
    advise = ctypes.CDLL(None, use_errno=True).madvise
    before = resident_bytes()
    give_back_freed_memory()
    for tensor in tensors_of(caches):
        begin = tensor.data_ptr()
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (begin + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end <= first:
            continue
        if advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED):
            number = ctypes.get_errno()
            raise OSError(number, f"the KV cache's memory can't be given back: {os.strerror(number)}")
    return max(0, before - resident_bytes())


def resident_bytes() -> int:
    """The memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
