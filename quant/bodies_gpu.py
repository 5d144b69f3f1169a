"""The GPU's kernels (Triton), from the canonical weight to their packed ones. Each is imported when a layer asks.

Weights and biases lie on the GPU already; x is bf16 or fp16. An input that the kernel before has rounded, or whose
columns it has moved, comes as `QuantizedActivation`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.launching.tuning import choose
from octavo.kernels.packed_weight import PackedWeight
from octavo.kernels.quantized_activation import ActivationQuant, Hidden, QuantizedActivation
from octavo.quant.body import Body, PackOptions
from octavo.quant.qparams import QuantizedWeight


def eight_bits() -> Body:
    """fp8 x fp8 and int8 x int8, which share their GEMMs. An input that nobody rounded before costs a launch."""
    from octavo.kernels.fp8.gpu import linear as fp8
    from octavo.kernels.gemm.limits import FP8_BLOCK
    from octavo.kernels.int8.gpu import linear as int8

    def pack(weight: QuantizedWeight, options: PackOptions) -> PackedWeight:
        if weight.scheme.weight.dtype == "int8":
            return int8.pack(weight.codes, weight.scale, options.bias, weight.input_scale)
        blocks = weight.scheme.weight.granularity.kind == "block"
        return fp8.pack(weight.codes, weight.scale, options.bias, weight.input_scale, blocks=blocks)

    def input_quant(packed: Any) -> ActivationQuant:
        return ActivationQuant(packed.codes.dtype, FP8_BLOCK if packed.blocks else 0, packed.input_scale)

    def rounded(x: Hidden, packed: Any) -> tuple[Tensor, Tensor]:
        return (x.codes, x.scale) if isinstance(x, QuantizedActivation) else fp8.quantize_input(x, packed)

    def run(x: Hidden, packed: Any, out_dtype: torch.dtype) -> Tensor:
        return fp8.matmul(*rounded(x, packed), packed, out_dtype)

    def split_k(x: Hidden, packed: Any, out_dtype: torch.dtype) -> Tensor:
        codes, scale = rounded(x, packed)
        n, k = packed.codes.shape
        if _splits_k(packed.kind, codes.shape[0], n, k, codes.device):
            return fp8.split_k_partials(codes, scale, packed)
        return fp8.matmul(codes, scale, packed, out_dtype)

    return Body(pack, run, split_k, input_quant, adds_bias=True)


def scales_of_columns(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None, int]:
    """A weight's scales [N, G] and zero points, and how many columns share one; K, where a row has one scale."""
    n, k = weight.shape
    rows, size = weight.scheme.weight.granularity.tile(n, k)

    def of_rows(table: Tensor) -> Tensor:
        return table.repeat_interleave(rows, 0)[:n]

    zero = weight.zero_point
    return of_rows(weight.scale), None if zero is None else of_rows(zero), size


def decoded() -> Body:
    """Weights of 2 to 8 bits, decoded in registers, inputs in 16 bits."""
    return _decoded(None)


def decoded_fp8() -> Body:
    """Weights of 2 to 4 bits, decoded to e4m3, times tokens rounded to e4m3."""
    return _decoded(ActivationQuant(torch.float8_e4m3fn))


def _decoded(rounding: ActivationQuant | None) -> Body:
    from octavo.kernels.gemm.gpu import packed_linear

    def input_quant(packed: Any) -> ActivationQuant | None:
        if packed.column_permutation is None:
            return rounding
        return replace(rounding or ActivationQuant(None), column_permutation=packed.column_permutation)

    def codes_of(x: Hidden, packed: Any) -> tuple[Tensor, Tensor | None, bool]:
        """x's numbers, their scales, and whether their columns are in the weight's order already."""
        if isinstance(x, QuantizedActivation):
            is_permuted = packed.order is not None and packed.columns == packed.k
            return x.codes, None if rounding is None else x.scale, is_permuted
        if rounding is None:
            return x, None, False
        ready = packed_linear.quantize_input(x)
        return ready.codes, ready.scale, False

    def run(x: Hidden, packed: Any, out_dtype: torch.dtype) -> Tensor:
        codes, scale, is_permuted = codes_of(x, packed)
        return packed_linear.matmul(codes, packed, scale, out_dtype, is_permuted=is_permuted)

    def split_k(x: Hidden, packed: Any, out_dtype: torch.dtype) -> Tensor:
        codes, scale, is_permuted = codes_of(x, packed)
        kind = packed_linear.table_of(packed, codes.dtype)
        if _splits_k(kind, codes.shape[0], packed.shape[1], packed.columns, codes.device):
            return packed_linear.split_k_partials(codes, packed, scale, is_permuted=is_permuted)
        return packed_linear.matmul(codes, packed, scale, out_dtype, is_permuted=is_permuted)

    def pack(weight: QuantizedWeight, options: PackOptions) -> PackedWeight:
        packed: PackedWeight = pack_words(weight, options.bias)
        return packed

    return Body(pack, run, split_k, input_quant, adds_bias=True)


def pack_words(weight: QuantizedWeight, bias: Tensor | None = None, *, least_bits: int = 2) -> Any:
    """A weight as `packing.PackedWords`; 3 bits lie in the fields of 4."""
    from octavo.kernels.gemm.gpu import packing

    scale, zero_point, size = scales_of_columns(weight)
    groups = size if weight.g_idx is None else weight.g_idx
    bits = 8 if weight.scheme.weight.bits > 4 else max(weight.scheme.weight.bits, least_bits)
    return packing.pack(weight.codes, scale, zero_point, groups, bias, bits)


def _splits_k(kind: str, m: int, n: int, k: int, device: torch.device) -> bool:
    """Whether the card's table has a GEMM of this size split along K."""
    row = choose(kind, m, n, k, device)
    return row["split_k"] > 1 and not row.get("dequantize")
