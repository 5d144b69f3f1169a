"""Programs that count themselves, so that the last one continues with what all have stored: it saves a launch."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching.launch import power_of_two


@triton.jit
def last_block(counter, programs):
    """Whether a program is the last of `programs` to get here after storing its results; the counter is then 0 again.

    All warps have stored before one thread counts and releases the stores. The last program may read all results, but
    past L1 (`cache_modifier=".cg"`), which may hold old values.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


def counters_for(count: int, device: torch.device) -> Tensor:
    """At least `count` int32 counters: zeros that every launch leaves as zeros, so nothing is launched to clear them.

    All launches on a device share them and may not overlap. The first call for a size allocates, which a CUDA graph
    may not capture.
    """
    return _counters(power_of_two(count), device)


@cache
def _counters(size: int, device: torch.device) -> Tensor:
    """Kept as long as the process lives: a CUDA graph may hold their address."""
    return torch.zeros(size, dtype=torch.int32, device=device)
