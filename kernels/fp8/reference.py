"""The specification of FP8 (e4m3) rounding of activations, per token, per group of columns, or with a stored scale.

Each returns float32 values that are exactly code * scale; a GEMM of those with dequantized weights in float32 is the
truth that a scaled GEMM is compared with. M tokens, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
UE8M0_LEAST = 1e-4  # the largest magnitude that groups of smaller ones are taken to have


def round_to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale rounded to e4m3, saturating, times scale: float32 of x's shape; scale broadcasts over x."""
    codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.float() * scale


def has_nan(codes: Tensor) -> bool:
    """Whether e4m3 codes hold a NaN, which kernels that decode them by their bits take for 480; int8 has none."""
    return codes.dtype == torch.float8_e4m3fn and bool((codes.view(torch.int8) & 0x7F == 0x7F).any())


def fake_quantize_per_token(x: Tensor) -> Tensor:
    """One scale absmax / 448 for each row of x [M, K]."""
    return round_to_e4m3(x, _scale(x.float().abs().amax(dim=-1, keepdim=True)))


def fake_quantize_per_group(x: Tensor, group_size: int) -> Tensor:
    """One scale for each row and `group_size` columns of x [M, K]; the last group may be short."""
    grouped = tiles(x, group_size)
    return untiled(round_to_e4m3(grouped, _scale(grouped.abs().amax(dim=-1, keepdim=True))), x.shape[1])


def fake_quantize_per_group_ue8m0(x: Tensor, group_size: int) -> Tensor:
    """As `fake_quantize_per_group`, by powers of two: the least that is at least max(absmax, UE8M0_LEAST) / 448.

    Source: deepseek-ai/DeepSeek-V3, `inference/kernel.py`, act_quant with scale_fmt ue8m0.
    """
    grouped = tiles(x, group_size)
    bits = (grouped.abs().amax(dim=-1, keepdim=True).clamp(min=UE8M0_LEAST) / E4M3_MAX).view(torch.int32)
    scale = (((bits + (1 << 23) - 1) >> 23) << 23).view(torch.float32)
    return untiled(round_to_e4m3(grouped, scale), x.shape[1])


def fake_quantize_static(x: Tensor, scale: Tensor) -> Tensor:
    """The stored scale [] of the checkpoint, for every element. Infinity stays: clamped, it would hide."""
    return torch.where(x.isinf(), x.float(), round_to_e4m3(x, scale.float()))


def tiles(x: Tensor, group_size: int) -> Tensor:
    """[M, K] to [M, groups, group_size] float32, a short last group filled up with zeros."""
    m, k = x.shape
    return torch.nn.functional.pad(x.float(), (0, -k % group_size)).reshape(m, -(-k // group_size), group_size)


def untiled(grouped: Tensor, k: int) -> Tensor:
    """The inverse of `tiles`: [M, groups, group_size] to [M, K]."""
    return grouped.flatten(1)[:, :k]


def _scale(absmax: Tensor) -> Tensor:
    most = torch.full_like(absmax, E4M3_MAX)  # by a number torch would multiply on a GPU, by its reciprocal
    return torch.where(absmax > 0, absmax / most, torch.ones_like(absmax))
