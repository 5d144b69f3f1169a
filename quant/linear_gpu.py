"""Which Triton body runs a quantized weight on a GPU: a pure function of its scheme, its shape and the GPU.

FP8 needs the units of compute capability 8.9 (L40S, 4090) or 9.0 (H100). Where there is no product of a weight with
what its scheme rounds activations to, as on an A100, the weight is decoded in registers and activations stay as they
are; a weight that no kernel has at all is dequantized at load. Kernels are imported when a weight asks for one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.int4.reference import group_of_column
from octavo.kernels.launching.tuning import choose
from octavo.kernels.quantized_activation import Hidden, Rounded, Rounding
from octavo.quant.body import Body, tensors_of
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.scheme import CHANNEL, TENSOR, QuantScheme

FP8_CAPABILITY = 89
FEW_BITS = ("int4", "int3", "int2")


def multiplies(scheme: QuantScheme, columns: int, capability: int) -> bool:
    """Whether a GPU has a product of a scheme's weight [N, columns] with activations rounded as it says."""
    from octavo.kernels.gemm.gpu.gemm_swap_ab import BLOCK
    from octavo.kernels.int8.gpu.linear import MAX_COLUMNS

    weight = scheme.weight
    activation = scheme.activation
    if activation is None or (activation.dtype == "fp8_e4m3" and capability < FP8_CAPABILITY):
        return False
    per = weight.granularity
    inputs = activation.granularity
    if weight.dtype in FEW_BITS:
        of_tokens = activation.dtype == "fp8_e4m3" and activation.dynamic and inputs == CHANNEL
        return of_tokens and per.kind in ("channel", "group")
    of_rows = per.kind in ("tensor", "channel") and inputs == (CHANNEL if activation.dynamic else TENSOR)
    if weight.dtype == activation.dtype == "int8":
        return of_rows and weight.symmetric and columns <= MAX_COLUMNS
    if not weight.dtype == activation.dtype == "fp8_e4m3":
        return False
    of_blocks = per.block in ((BLOCK, BLOCK), (1, BLOCK)) and inputs.kind == "group" and inputs.group_size == BLOCK
    return of_rows or (of_blocks and activation.dynamic)


def keeps_inputs(scheme: QuantScheme, dtype: torch.dtype, capability: int) -> str:
    """What to tell a user whose GPU has no product of a scheme's weight with inputs that are rounded as it says."""
    said = f"{scheme}: inputs stay in {str(dtype)[6:]}, and weights are what is quantized: "
    if scheme.activation and scheme.activation.dtype == "fp8_e4m3" and capability < FP8_CAPABILITY:
        major, minor = divmod(capability, 10)
        return f"{said}fp8 products need compute capability 8.9 (L40S, 4090, H100) and this GPU has {major}.{minor}"
    return f"{said}no kernel here has such products"


def gpu_body(part: QuantizedWeight, bias: Tensor | None, out: torch.dtype, capability: int) -> Body | None:
    """The body whose outputs are of type `out`; None where the weight is to be dequantized.

    part and bias [N] lie on the GPU; the body computes with x in bf16 or fp16.
    """
    scheme = part.scheme
    if not multiplies(scheme, part.shape[1], capability):
        return _weight_only(part, bias, out)
    if scheme.weight.dtype in FEW_BITS:
        return _few_bits(part, bias, out, Rounding(torch.float8_e4m3fn))
    return _int8(part, bias, out) if scheme.weight.dtype == "int8" else _fp8(part, bias, out)


def _fp8(part: QuantizedWeight, bias: Tensor | None, out: torch.dtype) -> Body:
    from octavo.kernels.fp8.gpu import linear
    from octavo.kernels.gemm.gpu.gemm_swap_ab import BLOCK

    blocks = part.scheme.weight.granularity.kind == "block"
    activation = part.scheme.activation
    packed = linear.pack(part.codes, part.scale, bias, part.input_scale, blocks=blocks)
    name = f"fp8 x fp8, {'blocks' if blocks else 'token' if activation and activation.dynamic else 'static'}"
    wants = Rounding(torch.float8_e4m3fn, BLOCK if blocks else 0, packed.input_scale)
    return _eight_bits(name, packed, out, wants)


def _int8(part: QuantizedWeight, bias: Tensor | None, out: torch.dtype) -> Body:
    from octavo.kernels.int8.gpu import linear

    packed = linear.pack(part.codes, part.scale, bias, part.input_scale)
    name = f"int8 x int8{'' if packed.input_scale is None else ', static'}"
    return _eight_bits(name, packed, out, Rounding(torch.int8, static_scale=packed.input_scale))


def _eight_bits(name: str, packed: Any, out: torch.dtype, wants: Rounding | None) -> Body:
    """fp8 and int8 share their GEMMs. An input that nobody rounded before is rounded by a launch of its own."""
    from octavo.kernels.fp8.gpu import linear

    n, k = packed.codes.shape

    def codes_of(x: Hidden) -> tuple[Tensor, Tensor]:
        return (x.codes, x.scale) if isinstance(x, Rounded) else linear.rounded(x, packed)

    def run(x: Hidden) -> Tensor:
        return linear.matmul(*codes_of(x), packed, out)

    def partial(x: Hidden) -> Tensor:
        codes, scale = codes_of(x)
        if _in_parts(packed.kind, codes.shape[0], n, k):
            return linear.partial_sums(codes, scale, packed)
        return linear.matmul(codes, scale, packed, out)

    return Body(name, run, _bytes(packed), wants, partial, has_bias=packed.bias is not None)


def _weight_only(part: QuantizedWeight, bias: Tensor | None, out: torch.dtype) -> Body | None:
    weight = part.scheme.weight
    if weight.dtype in FEW_BITS and weight.granularity.kind in ("channel", "group"):
        return _few_bits(part, bias, out, None)
    return _bytes_of_weights(part, bias, out) if weight.dtype in ("int8", "fp8_e4m3") else None


def scales_of_columns(part: QuantizedWeight) -> tuple[Tensor, Tensor | None, int]:
    """Its scales [N, G] and zero points, and how many columns share one; K, where a row has one scale."""
    n, k = part.shape
    zero = part.zero_point
    rows, size = part.scheme.weight.granularity.tile(n, k)

    def of_rows(table: Tensor) -> Tensor:
        return table.repeat_interleave(rows, 0)[:n]

    return of_rows(part.scale), None if zero is None else of_rows(zero), size


def _bytes_of_weights(part: QuantizedWeight, bias: Tensor | None, out: torch.dtype) -> Body | None:
    """With act-order its columns lie group after group, and x's are put there, by the norm before or by a launch."""
    from octavo.kernels.gemm.gpu import w8a16_gemm
    from octavo.kernels.int4.gpu.permute_columns import gathered

    n, k = part.shape
    codes = part.codes
    order = None
    wants = None
    scale, zero_point, size = scales_of_columns(part)
    if (size < k and size % 32) or w8a16_gemm.has_nan(codes):
        return None
    if part.g_idx is not None:
        groups, columns = part.g_idx.long().sort(stable=True)
        if not torch.equal(groups.cpu(), group_of_column(k, size)):  # groups of other sizes
            return None
        codes = codes[:, columns]
        order = columns.int()
        wants = Rounding(None, places=columns.argsort().int())
    packed = w8a16_gemm.pack(codes, scale, -1 if size >= k else size, zero_point, bias)

    def arranged(x: Hidden) -> Tensor:
        if isinstance(x, Rounded):
            return x.codes
        return x if order is None else gathered(x, order)

    def run(x: Hidden) -> Tensor:
        return w8a16_gemm.linear(arranged(x), packed, out)

    def partial(x: Hidden) -> Tensor:
        ready = arranged(x)
        if _in_parts("w8a16", ready.shape[0], n, k):
            return w8a16_gemm.partial_sums(ready, packed)
        return w8a16_gemm.linear(ready, packed, out)

    return Body(
        f"{'fp8' if packed.is_e4m3 else 'int8'} weights, 16 bits",
        run,
        _bytes(packed),
        wants,
        partial,
        has_bias=bias is not None,
    )


def _few_bits(part: QuantizedWeight, bias: Tensor | None, out: torch.dtype, wants: Rounding | None) -> Body:
    from octavo.kernels.int4.gpu import linear, packing

    n, k = part.shape
    groups = part.g_idx
    if groups is None:
        groups = group_of_column(k, part.scheme.weight.granularity.group_size or k).to(part.codes.device)
    bits = 2 if part.scheme.weight.bits == 2 else 4  # 3 bits lie in the fields of 4
    packed = packing.pack(part.codes, part.scale, part.zero_point, groups.long(), bias, bits=bits)
    fp8 = wants is not None
    places = packed.places
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
