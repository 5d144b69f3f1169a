"""Which Triton body runs a quantized weight on a GPU: a pure function of its scheme, its shape and the GPU.

FP8 needs the units of compute capability 8.9 (L40S, 4090) or 9.0 (H100); what an A100 can't multiply is dequantized at
load, as is whatever no kernel has. Kernels are imported when a weight asks for one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from octavo.quant.qparams import QuantizedWeight
from octavo.quant.scheme import CHANNEL, PRESETS, Granularity

FP8_CAPABILITY = 89
MAX_INT8_COLUMNS = 131_071  # an int32 sum of products of two bytes holds no more
Run = Callable[[Tensor], Tensor]


def gpu_body(part: QuantizedWeight, out: torch.dtype, capability: int) -> tuple[str, Run, int] | None:
    """(name, x [M, K] -> [M, N] of type out, bytes of the weight); None where the weight is to be dequantized.

    part lies on the GPU; the body computes with x in bf16 or fp16.
    """
    weight, activation = part.scheme.weight, part.scheme.activation
    if activation is None:
        return _weight_only(part, out)
    fp8_units = capability >= FP8_CAPABILITY
    if activation.dtype == "fp8_e4m3" and weight.dtype == "fp8_e4m3":
        return _fp8(part, out) if fp8_units else None
    if part.scheme == PRESETS["W8A8"] and part.shape[1] <= MAX_INT8_COLUMNS:
        return _int8(part, out)
    per_token = activation.dynamic and activation.granularity == CHANNEL
    if activation.dtype == "fp8_e4m3" and per_token and weight.dtype in ("int4", "int3", "int2") and fp8_units:
        return _few_bits(part, out, "fp8")
    return None


def _fp8(part: QuantizedWeight, out: torch.dtype) -> tuple[str, Run, int] | None:
    from octavo.kernels.fp8.gpu import gemm
    from octavo.kernels.fp8.gpu.few import BLOCK

    granularity, activation = part.scheme.weight.granularity, part.scheme.activation
    assert activation is not None
    blocks = granularity.block == (BLOCK, BLOCK)
    inputs = activation.granularity
    if blocks and not (activation.dynamic and inputs.kind == "group" and inputs.group_size == BLOCK):
        return None
    if not blocks and (granularity.kind not in ("tensor", "channel") or (activation.dynamic and inputs != CHANNEL)):
        return None
    packed = gemm.pack(part.codes, part.scale, input_scale=part.input_scale, blocks=blocks)
    name = f"fp8 x fp8, {'blocks' if blocks else 'token' if activation.dynamic else 'static'}"
    return name, lambda x: gemm.matmul(*gemm.rounded(x, packed), packed, out), _bytes(packed)


def _int8(part: QuantizedWeight, out: torch.dtype) -> tuple[str, Run, int]:
    from octavo.kernels.int8.gpu import gemm

    packed = gemm.pack(part.codes, part.scale)
    return "int8 x int8", lambda x: gemm.matmul(*gemm.rounded(x, packed), packed, out), _bytes(packed)


def _weight_only(part: QuantizedWeight, out: torch.dtype) -> tuple[str, Run, int] | None:
    weight = part.scheme.weight
    if weight.is_float or weight.granularity.kind not in ("channel", "group"):
        return None
    if weight.dtype != "int8":
        return _few_bits(part, out, "16 bits")
    from octavo.kernels.int8.gpu import weights

    size = _group_size(weight.granularity)
    if part.g_idx is not None or (size != -1 and size % 32):
        return None
    packed = weights.pack(part.codes, part.scale, size, part.zero_point)
    return "int8 weights", lambda x: weights.linear(x, packed).to(out), _bytes(packed)


def _few_bits(part: QuantizedWeight, out: torch.dtype, inputs: str) -> tuple[str, Run, int]:
    from octavo.kernels.int4.gpu import linear, packing

    k, size = part.shape[1], _group_size(part.scheme.weight.granularity)
    groups = part.g_idx if part.g_idx is not None else torch.arange(k, device=part.codes.device) // max(size, 1)
    if size == -1:
        groups = torch.zeros(k, dtype=torch.int64, device=part.codes.device)
    bits = 2 if part.scheme.weight.bits == 2 else 4  # 3 bits lie in the fields of 4
    packed = packing.pack(part.codes, part.scale, part.zero_point, groups.long(), bits=bits)
    name = f"{part.scheme.weight.dtype} weights{' in 4 bits' if part.scheme.weight.bits == 3 else ''}, {inputs}"
    if inputs == "fp8":
        return name, lambda x: linear.linear_fp8(x, packed).to(out), _bytes(packed)
    return name, lambda x: linear.matmul(x, packed, None, out), _bytes(packed)


def _group_size(granularity: Granularity) -> int:
    """-1 where a row has one scale."""
    return granularity.group_size or -1


def _bytes(packed: Any) -> int:
    """Of all tensors of a packed weight."""
    return sum(value.nbytes for value in vars(packed).values() if isinstance(value, Tensor))
