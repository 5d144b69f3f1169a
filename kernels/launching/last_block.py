"""Programs that count themselves, so that the last one goes on with what all of them have stored: a launch less."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching.launch import power_of_two


@triton.jit
def last_block(counter, programs):
    """Whether a program is the last of so many that come here with what they have stored; the counter is 0 again then.

    All warps have stored before one thread counts, releasing that; whoever sees the last number may read it all, past
    L1 (`cache_modifier=".cg"`), which may hold what was there before.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}  # none ever goes: a CUDA graph may hold its address


def counters_for(count: int, device: torch.device) -> Tensor:
    """So many int32 counters or more: zeros, which every launch leaves as zeros.

    So nothing is launched to clear them. Launches of one device share them and may not overlap. The first call for a
    size allocates and may not be captured.
    """
    key = (device, power_of_two(count))
    if key not in _COUNTERS:
        _COUNTERS[key] = torch.zeros(key[1], dtype=torch.int32, device=device)
    return _COUNTERS[key]
