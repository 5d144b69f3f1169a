"""The CPU's layouts of weights: slabs of 16 rows (`native.gemm_tile`)."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.gemm.limits import LANES


def slabs_of(rows: Tensor, columns: int) -> Tensor:
    """[N, K] -> [N / 16, K / columns, 16, columns]."""
    return rows.reshape(-1, LANES, rows.shape[1] // columns, columns).transpose(1, 2).contiguous()


def rows_of(slabs: Tensor) -> Tensor:
    """[N / 16, steps, 16, columns] -> [N, steps * columns]."""
    return slabs.transpose(1, 2).flatten(2).flatten(0, 1)


def words_of(nibbles: Tensor) -> Tensor:
    """[N, K] of 0..15 to W4's words [N, K / 8] int32."""
    n, k = nibbles.shape
    pairs = nibbles.reshape(n, k // 8, 4, 2)
    shifts = 4 * torch.arange(4, dtype=torch.int32)
    return ((pairs[..., 0] << shifts).sum(-1) | ((pairs[..., 1] << shifts).sum(-1) << 16)).to(torch.int32)


def nibbles_of(words: Tensor) -> Tensor:
    """Words [..., 1] int32 to their nibbles [..., 8], in the order of columns."""
    shifts = (16 * half + 4 * pair for pair in range(4) for half in range(2))
    return torch.cat([(words >> shift) & 15 for shift in shifts], dim=-1)
