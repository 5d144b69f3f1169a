"""A layer's input as it passes between kernels: plain, in partial sums of the GEMM before, or rounded to codes.

A norm, an activation or attention that rounds what it computes saves the GEMM behind it a launch, and the first two
the bytes of a plain tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a GEMM wants its input [T, K]: codes of float8_e4m3fn or int8, a scale per token and `group_size` columns.

    dtype None: plain numbers, in another order. places [K] int32: where each column goes.
    group_size 0: one scale for each token. static_scale [1] float32: the checkpoint's, for all of them.
    keeps_plain: the plain tensor as well, for a router.
    """

    dtype: torch.dtype | None
    group_size: int = 0
    static_scale: Tensor | None = None
    keeps_plain: bool = False
    places: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rounded:
    """codes [T, K], and float32 scales [T, 1] or [T, ceil(K / group_size)] that they are multiplied by; [T, 0]
    of plain numbers.

    plain [T, K]: what they were rounded from, where that was asked for.
    """

    codes: Tensor
    scale: Tensor
    plain: Tensor | None = None

    @staticmethod
    def empty(
        tokens: int, columns: int, wants: Rounding, device: torch.device, dtype: torch.dtype | None = None
    ) -> Rounded:
        """Room for them; dtype is that of plain numbers."""
        groups = -(-columns // wants.group_size) if wants.group_size else int(wants.dtype is not None)
        codes = torch.empty(tokens, columns, dtype=wants.dtype or dtype, device=device)
        plain = torch.empty(tokens, columns, dtype=dtype, device=device) if wants.keeps_plain else None
        return Rounded(codes, torch.empty(tokens, groups, device=device), plain)


Hidden = Tensor | Rounded
