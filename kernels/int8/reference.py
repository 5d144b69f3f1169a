"""The specification of int8 x int8 GEMMs: activations rounded token by token, integer dot products, two scales.

M tokens, K columns, N rows of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (codes [M, K] int8, scale [M, 1] float32) with scale = absmax / 127.5, codes in -128..127.

    127.5 is compressed-tensors' divisor (half of the range 255), and its files are made for it. The largest element,
    when negative, lands on the tie -127.5, which rounds to even: -128. A token of zeros has scale 1. A NaN or an
    infinity in a token has no code: the token's scale is NaN or infinite and tells of it.
    """
    x32 = x.float()
    absmax = x32.abs().amax(dim=-1, keepdim=True)
    most = torch.full_like(absmax, 127.5)  # by a number torch would multiply on a GPU, by its reciprocal
    scale = torch.where(absmax == 0, 1.0, absmax / most)
    return (x32 / scale).round().clamp(-128, 127).nan_to_num(0.0).to(torch.int8), scale


def fake_quantize_per_token(x: Tensor) -> Tensor:
    """What the codes of `quantize_per_token` stand for, [M, K] float32."""
    codes, scale = quantize_per_token(x)
    return codes.float() * torch.where(scale.isfinite(), scale, torch.nan)


def fake_quantize_static(x: Tensor, scale: Tensor) -> Tensor:
    """x rounded to int8 with the stored scale [] of the checkpoint, saturating, in float32. Infinity stays."""
    return torch.where(x.isinf(), x.float(), (x.float() / scale).round().clamp(-128, 127) * scale)


def linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """quantize(x) [M, K] @ (codes [N, K] * scale [N, 1])^T -> [M, N] float32; the integer sum is exact."""
    x_codes, x_scale = quantize_per_token(x)
    total = x_codes.double() @ codes.double().T
    return (total * x_scale.double() * scale.double().reshape(1, -1)).float()
