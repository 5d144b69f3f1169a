"""The specification of the small operators, in plain torch. Each computes in float32 and returns its input's type.

`input_quant` is refused: only a GPU's bodies quantize their output for the next GEMM.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.quantized_activation import ActivationQuant, refuse_input_quant


def embed(token_ids: Tensor, table: Tensor, factor: float = 1.0) -> Tensor:
    """table [V, H] at token_ids [T], times factor: [T, H]."""
    rows = F.embedding(token_ids, table)
    return rows if factor == 1.0 else rows * factor


def rms_norm(x: Tensor, weight: Tensor, eps: float, input_quant: ActivationQuant | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; weight float32 (Gemma's 1 + w is added at load)."""
    refuse_input_quant(input_quant)
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    after: Tensor | None = None,
    multiplier: float = 1.0,
    input_quant: ActivationQuant | None = None,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is rounded to x's type before the norm.

    x is first normed by `after`, if there is one, and multiplied by the multiplier. Without a weight, returns the sum
    twice.
    """
    refuse_input_quant(input_quant)
    x = x if after is None else rms_norm(x, after, eps)
    total = (x if multiplier == 1.0 else x * multiplier) + residual
    return (total if weight is None else rms_norm(total, weight, eps)), total


def silu_and_mul(gate_up: Tensor, input_quant: ActivationQuant | None = None) -> Tensor:
    """[T, 2 I] -> [T, I]: silu(first half) * second half."""
    refuse_input_quant(input_quant)
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float, input_quant: ActivationQuant | None = None) -> Tensor:
    """[T, 2 I] -> [T, I]: g * sigmoid(alpha g) * (u + 1), g the first half up to limit, u the second within +-limit."""
    refuse_input_quant(input_quant)
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(gate_up.dtype)


def relu2(up: Tensor, input_quant: ActivationQuant | None = None) -> Tensor:
    """[T, I] -> [T, I]: what is above 0, squared, and 0 else. Of MLPs without a gate."""
    refuse_input_quant(input_quant)
    return F.relu(up).square()


def gelu_tanh_and_mul(gate_up: Tensor, input_quant: ActivationQuant | None = None) -> Tensor:
    """[T, 2 I] -> [T, I]: tanh-approximated gelu(first half) * second half."""
    refuse_input_quant(input_quant)
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)
