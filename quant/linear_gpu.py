"""Which Triton body runs a quantized weight on a GPU: a pure function of its scheme, its shape and the GPU.

FP8 needs the units of compute capability 8.9 (L40S, 4090) or 9.0 (H100); what an A100 can't multiply is dequantized at
load, as is whatever no kernel has. Kernels are imported when a weight asks for one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.int4.reference import group_of_column
from octavo.kernels.rounded import Hidden, Rounded, Rounding
from octavo.kernels.tables import choose
from octavo.quant.body import Body, tensors_of
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.scheme import CHANNEL, TENSOR, QuantScheme

FP8_CAPABILITY = 89
FEW_BITS = ("int4", "int3", "int2")


def lacks_fp8(scheme: QuantScheme, dtype: torch.dtype, capability: int) -> str | None:
    """What to tell a user whose GPU (0: none) can't multiply a scheme's fp8 activations; None where it needn't."""
    activation = scheme.activation
    if activation is None or activation.dtype != "fp8_e4m3" or dtype == torch.float32:
        return None
    if not 0 < capability < FP8_CAPABILITY:
        return None
    return (
        f"{scheme} is emulated: fp8 products need compute capability 8.9 (L40S, 4090, H100) and this GPU has "
        f"{capability // 10}.{capability % 10}; its weights are dequantized to {str(dtype)[6:]} at load"
    )


def gpu_body(part: QuantizedWeight, bias: Tensor | None, out: torch.dtype, capability: int) -> Body | None:
    """The body whose outputs are of type `out`; None where the weight is to be dequantized.

    part and bias [N] lie on the GPU; the body computes with x in bf16 or fp16.
    """
    weight, activation = part.scheme.weight, part.scheme.activation
    if activation is None:
        return _weight_only(part, bias, out)
    fp8_units = capability >= FP8_CAPABILITY
    if activation.dtype == "fp8_e4m3" and weight.dtype == "fp8_e4m3":
        return _fp8(part, bias, out) if fp8_units else None
    if activation.dtype == weight.dtype == "int8":
        return _int8(part, bias, out)
    if weight.dtype in FEW_BITS and rounds_rows_to_fp8(part.scheme, capability):
        return _few_bits(part, bias, out, Rounding(torch.float8_e4m3fn))
    return None


def rounds_rows_to_fp8(scheme: QuantScheme, capability: int) -> bool:
    """Whether tokens are rounded to e4m3, each by its own largest number, on a GPU that multiplies it."""
    activation = scheme.activation
    if activation is None or activation.dtype != "fp8_e4m3" or capability < FP8_CAPABILITY:
        return False
    return activation.dynamic and activation.granularity == CHANNEL


def _fp8(part: QuantizedWeight, bias: Tensor | None, out: torch.dtype) -> Body | None:
    from octavo.kernels.fp8.gpu import gemm
    from octavo.kernels.fp8.gpu.few import BLOCK

    granularity, activation = part.scheme.weight.granularity, part.scheme.activation
    assert activation is not None
    blocks, inputs = granularity.block in ((BLOCK, BLOCK), (1, BLOCK)), activation.granularity
    if blocks and not (activation.dynamic and inputs.kind == "group" and inputs.group_size == BLOCK):
        return None
    if not blocks and (granularity.kind not in ("tensor", "channel") or (activation.dynamic and inputs != CHANNEL)):
        return None
    packed = gemm.pack(part.codes, part.scale, bias, part.input_scale, blocks=blocks)
    name = f"fp8 x fp8, {'blocks' if blocks else 'token' if activation.dynamic else 'static'}"
    wants = Rounding(torch.float8_e4m3fn, BLOCK if blocks else 0, packed.input_scale)
    return _eight_bits(name, packed, out, wants)


def _int8(part: QuantizedWeight, bias: Tensor | None, out: torch.dtype) -> Body | None:
    from octavo.kernels.int8.gpu import gemm

    weight, activation = part.scheme.weight, part.scheme.activation
    assert activation is not None
    if not weight.symmetric or weight.granularity.kind not in ("tensor", "channel"):
        return None
    if part.shape[1] > gemm.MAX_COLUMNS or activation.granularity != (CHANNEL if activation.dynamic else TENSOR):
        return None
    packed = gemm.pack(part.codes, part.scale, bias, part.input_scale)
    name = f"int8 x int8{'' if activation.dynamic else ', static'}"
    return _eight_bits(name, packed, out, Rounding(torch.int8, static_scale=packed.input_scale))


def _eight_bits(name: str, packed: Any, out: torch.dtype, wants: Rounding | None) -> Body:
    """fp8 and int8 share their GEMMs. An input that nobody rounded before is rounded by a launch of its own."""
    from octavo.kernels.fp8.gpu import gemm

    n, k = packed.codes.shape

    def codes_of(x: Hidden) -> tuple[Tensor, Tensor]:
        return (x.codes, x.scale) if isinstance(x, Rounded) else gemm.rounded(x, packed)

    def run(x: Hidden) -> Tensor:
        return gemm.matmul(*codes_of(x), packed, out)

    def partial(x: Hidden) -> Tensor:
        codes, scale = codes_of(x)
        if _in_parts(packed.kind, codes.shape[0], n, k):
            return gemm.partial_sums(codes, scale, packed)
        return gemm.matmul(codes, scale, packed, out)

    return Body(name, run, _bytes(packed), wants, partial, has_bias=packed.bias is not None)


def _weight_only(part: QuantizedWeight, bias: Tensor | None, out: torch.dtype) -> Body | None:
    weight = part.scheme.weight
    if weight.is_float or weight.granularity.kind not in ("channel", "group"):
        return None
    if weight.dtype != "int8":
        return _few_bits(part, bias, out, None)
    return _bytes_of_weights(part, bias, out)


def _bytes_of_weights(part: QuantizedWeight, bias: Tensor | None, out: torch.dtype) -> Body | None:
    """With act-order its columns lie group after group, and x's are put there, by the norm before or by a launch."""
    from octavo.kernels.int4.gpu.columns import gathered
    from octavo.kernels.int8.gpu import weights

    (n, k), codes, order, wants = part.shape, part.codes, None, None
    size = part.scheme.weight.granularity.group_size or k
    if size < k and size % 32:
        return None
    if part.g_idx is not None:
        groups, columns = part.g_idx.long().sort(stable=True)
        if not torch.equal(groups.cpu(), group_of_column(k, size)):  # groups of other sizes
            return None
        codes, order, wants = codes[:, columns], columns.int(), Rounding(None, places=columns.argsort().int())
    packed = weights.pack(codes, part.scale, -1 if size >= k else size, part.zero_point, bias)

    def arranged(x: Hidden) -> Tensor:
        if isinstance(x, Rounded):
            return x.codes
        return x if order is None else gathered(x, order)

    def run(x: Hidden) -> Tensor:
        return weights.linear(arranged(x), packed, out)

    def partial(x: Hidden) -> Tensor:
        ready = arranged(x)
        if _in_parts("w8a16", ready.shape[0], n, k):
            return weights.partial_sums(ready, packed)
        return weights.linear(ready, packed, out)

    return Body("int8 weights", run, _bytes(packed), wants, partial, has_bias=bias is not None)


def _few_bits(part: QuantizedWeight, bias: Tensor | None, out: torch.dtype, wants: Rounding | None) -> Body:
    from octavo.kernels.int4.gpu import linear, packing

    n, k = part.shape
    groups = part.g_idx
    if groups is None:
        groups = group_of_column(k, part.scheme.weight.granularity.group_size or k).to(part.codes.device)
    bits = 2 if part.scheme.weight.bits == 2 else 4  # 3 bits lie in the fields of 4
    packed = packing.pack(part.codes, part.scale, part.zero_point, groups.long(), bias, bits=bits)
    fp8, places = wants is not None, packed.places
    if places is not None:
        wants = replace(wants or Rounding(None), places=places)

    def codes_of(x: Hidden) -> tuple[Tensor, Tensor | None, bool]:
        """And whether their columns are in the weight's order."""
        if isinstance(x, Rounded):
            return x.codes, x.scale if fp8 else None, places is not None
        if not fp8:
            return x, None, False
        ready = linear.rounded(x)
        return ready.codes, ready.scale, False

    def run(x: Hidden) -> Tensor:
        codes, scale, is_arranged = codes_of(x)
        return linear.matmul(codes, packed, scale, out, is_arranged=is_arranged)

    def partial(x: Hidden) -> Tensor:
        codes, scale, is_arranged = codes_of(x)
        if _in_parts("int4 fp8" if fp8 else "int4", codes.shape[0], n, packed.columns):
            return linear.partial_sums(codes, packed, scale, is_arranged=is_arranged)
        return linear.matmul(codes, packed, scale, out, is_arranged=is_arranged)

    name = f"{part.scheme.weight.dtype} weights{' in 4 bits' if part.scheme.weight.bits == 3 else ''}"
    name += ", fp8" if fp8 else ", 16 bits"
    return Body(name, run, _bytes(packed), wants, partial, has_bias=bias is not None)


def _in_parts(kind: str, m: int, n: int, k: int) -> bool:
    """Whether the table has a GEMM of this size split along K."""
    row = choose(kind, m, n, k)
    return row["parts"] > 1 and not row.get("dequantize")


def _bytes(packed: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(packed))
