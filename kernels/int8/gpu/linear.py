"""W8A8 linear layers on a GPU: activations rounded to int8, integer dot products on tensor cores, two scales.

y [M, N] = (round(x) [M, K] @ codes [N, K]^T) * x_scale [M, 1] * scale [1, N] + bias. Reference:
`int8.reference.linear`. The bodies are those of FP8 (`gemm.gpu`) with int32 accumulators, so sums of up to 131,071
columns are exact; each split's sum is rounded to float32 once. Limit: N * K bytes over 3.0 TB/s for few tokens,
2 * M * N * K operations over 1979 T/s for many, on an H100.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.fp8.gpu.linear import Packed, linear, matmul, quantize_input, split_k_partials
from octavo.kernels.gemm.limits import MAX_INT8_COLUMNS_GPU

__all__ = ["Packed", "linear", "matmul", "pack", "quantize_input", "split_k_partials"]

MAX_COLUMNS = MAX_INT8_COLUMNS_GPU


def pack(codes: Tensor, scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None) -> Packed:
    """codes [N, K] int8; scale of any float type, [] or [1], or [N, 1]."""
    n, k = codes.shape
    if codes.dtype != torch.int8 or scale.numel() not in (1, n):
        raise ValueError(f"{codes.dtype} codes [{n}, {k}] have no scale of shape {list(scale.shape)}")
    if k > MAX_COLUMNS:
        raise ValueError(f"an int32 sum holds {MAX_COLUMNS} columns, not {k}")
    stored = None if input_scale is None else input_scale.float().reshape(1)
    return Packed(codes.contiguous(), scale.float().reshape(-1).contiguous(), bias, stored)
