"""What ranks exchange, in plain torch: the specification of the collective kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def all_reduce(of_ranks: Sequence[Tensor]) -> Tensor:
    """The sum of all ranks' tensors of one shape, float32, added in the order of ranks: the same bits on each."""
    total = of_ranks[0].clone()
    for part in of_ranks[1:]:
        total += part
    return total


def gather(of_ranks: Sequence[Tensor]) -> Tensor:
    """All ranks' tensors of one shape, float32, side by side: [ranks, ...]."""
    return torch.stack(list(of_ranks))


def hand_over(sent: Sequence[Tensor]) -> list[Tensor]:
    """What one rank receives from another: the tensors that were sent to it, in their order, bit for bit."""
    return [x.clone() for x in sent]
