"""The specification of GEMMs with integer weights and unquantized activations (W4A16, and W8A16 by the same formula).

M tokens, K columns, N rows of the weight, G groups along K.
"""

from __future__ import annotations

import torch
from torch import Tensor

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the codes of ggml's IQ4 blocks stand for. Source: ggml-org/ggml, `src/ggml-common.h`."""


def group_of_column(num_columns: int, group_size: int) -> Tensor:
    """[K] int64: which group each column belongs to; the last group may be short."""
    return torch.arange(num_columns) // group_size


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, groups: Tensor) -> Tensor:
    """(codes [N, K] - zero_point [N, G]) * scale [N, G], spread over K by groups [K] -> [N, K] float32."""
    values = codes.float()
    if zero_point is not None:
        values = values - zero_point.float()[:, groups]
    return values * scale.float()[:, groups]


def linear(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, groups: Tensor) -> Tensor:
    """x [M, K] @ dequantize(...)^T -> [M, N] float32."""
    return x.float() @ dequantize(codes, scale, zero_point, groups).T
