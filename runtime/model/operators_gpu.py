"""The decoder's operators on a GPU: Triton launches, with memory allocated for what they return.

Each takes the split-K parts of the GEMM before it, and can quantize its output for the GEMM behind it
(kernels/quantized_activation.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.rope_decode import rope_and_attention
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.launching.launch import Launch
from octavo.kernels.norm.gpu.activation import gelu_tanh_and_mul, silu_and_mul
from octavo.kernels.norm.gpu.embedding import embed
from octavo.kernels.norm.gpu.norm import norm
from octavo.kernels.quantized_activation import ActivationQuant, Hidden, QuantizedActivation
from octavo.runtime.model.operators import Ops


def make_ops(dtype: torch.dtype) -> Ops:
    """The bodies for a model that computes in bf16 or fp16."""
    return Ops(
        name="triton",
        embed=_embed,
        rms_norm=partial(_rms_norm, dtype),
        add_rms_norm=_add_rms_norm,
        silu_and_mul=partial(_gated, dtype, silu_and_mul),
        gelu_tanh_and_mul=partial(_gated, dtype, gelu_tanh_and_mul),
        rope_and_attention=partial(_rope_and_attention, dtype),
        compiles_kernels=True,
    )


def _embed(token_ids: Tensor, table: Tensor, factor: float) -> Tensor:
    out = table.new_empty(token_ids.shape[0], table.shape[1])
    embed(token_ids, table, out, factor)()
    return out


def _room(
    x: Tensor, columns: int, dtype: torch.dtype, input_quant: ActivationQuant | None
) -> tuple[Hidden, Tensor, dict[str, Any]]:
    """(operator's result, not yet written; the tensor in it that the kernel writes; its arguments for quantizing)."""
    if input_quant is None:
        plain = torch.empty(x.shape[-2], columns, dtype=dtype, device=x.device)
        return plain, plain, {}
    rounded = QuantizedActivation.empty(x.shape[-2], columns, input_quant, x.device, dtype)
    how = {
        "group_size": input_quant.group_size,
        "static_scale": input_quant.static_scale,
        "column_permutation": input_quant.column_permutation,
    }
    how |= {} if input_quant.dtype is None else {"scale": rounded.scale}
    return rounded, rounded.codes, how if rounded.plain is None else {**how, "plain": rounded.plain}


def _rms_norm(
    dtype: torch.dtype, x: Tensor, weight: Tensor, eps: float, input_quant: ActivationQuant | None = None
) -> Hidden:
    result, out, rounding = _room(x, x.shape[-1], dtype, input_quant)
    norm(x, weight, eps, out, **rounding)()
    return result


def _add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    after: Tensor | None = None,
    multiplier: float = 1.0,
    input_quant: ActivationQuant | None = None,
) -> tuple[Hidden, Tensor]:
    total = torch.empty_like(residual)
    plain = weight is None and input_quant is None
    result, out, rounding = (total, total, {}) if plain else _room(x, x.shape[-1], residual.dtype, input_quant)
    norm(x, weight, eps, out, residual=residual, total=total, after=after, multiplier=multiplier, **rounding)()
    return result, total


def _gated(
    dtype: torch.dtype, activation: Callable[..., Launch], gate_up: Tensor, input_quant: ActivationQuant | None = None
) -> Hidden:
    result, out, rounding = _room(gate_up, gate_up.shape[-1] // 2, dtype, input_quant)
    activation(gate_up, out, **rounding)()
    return result


def _rope_and_attention(
    dtype: torch.dtype,
    qkv: Tensor,
    step: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    input_quant: ActivationQuant | None = None,
) -> Hidden:
    return rope_and_attention(qkv, step, cache, shape, cos_sin, q_norm, k_norm, eps, dtype, input_quant)
