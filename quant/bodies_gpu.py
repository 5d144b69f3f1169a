"""The GPU's kernels (Triton), from the canonical weight to their packed ones. Each is imported when a layer asks.

Weights and biases lie on the GPU already; x is bf16 or fp16. An input that the kernel before has rounded, or whose
columns it has moved, comes as `QuantizedActivation`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.int4.reference import group_of_column
from octavo.kernels.launching.tuning import choose
from octavo.kernels.packed_weight import PackedWeight
from octavo.kernels.quantized_activation import ActivationQuant, Hidden, QuantizedActivation
from octavo.quant.body import Body, PackOptions, PermutedColumns
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
        if _splits_k(packed.kind, codes.shape[0], *packed.codes.shape):
            return fp8.split_k_partials(codes, scale, packed)
        return fp8.matmul(codes, scale, packed, out_dtype)

    return Body(pack, run, split_k, input_quant, adds_bias=True)


def bytes_of_weights() -> Body:
    """int8 or e4m3 weights decoded in registers, with scales of any granularity."""
    from octavo.kernels.gemm.gpu import w8a16_gemm

    def pack(weight: QuantizedWeight, options: PackOptions) -> PackedWeight:
        scale, zero_point, size = scales_of_columns(weight)
        return w8a16_gemm.pack(weight.codes, scale, -1 if size >= weight.shape[1] else size, zero_point, options.bias)

    def split_k(x: Tensor, packed: Any, out_dtype: torch.dtype) -> Tensor:
        if _splits_k("w8a16", x.shape[0], packed.words.shape[1], packed.num_columns):
            return w8a16_gemm.split_k_partials(x, packed)
        return w8a16_gemm.linear(x, packed, out_dtype)

    return Body(pack, w8a16_gemm.linear, split_k, adds_bias=True)


def permuted_bytes_of_weights() -> Body:
    """As `bytes_of_weights`, with act-order: x's columns are moved by the norm before, or by a launch."""
    from octavo.kernels.int4.gpu.permute_columns import gathered

    plain = bytes_of_weights()
    plain_split_k = plain.split_k
    assert plain_split_k is not None

    def pack(weight: QuantizedWeight, options: PackOptions) -> PackedWeight:
        sorted_, order = weight.sorted_by_group()
        return PermutedColumns(plain.pack(sorted_, options), order.int())

    def input_quant(packed: Any) -> ActivationQuant:
        return ActivationQuant(None, column_permutation=packed.order.argsort().int())

    def arranged(x: Hidden, packed: Any) -> Tensor:
        return x.codes if isinstance(x, QuantizedActivation) else gathered(x, packed.order)

    def run(x: Hidden, packed: Any, out_dtype: torch.dtype) -> Tensor:
        return plain.run(arranged(x, packed), packed.inner, out_dtype)

    def split_k(x: Hidden, packed: Any, out_dtype: torch.dtype) -> Tensor:
        return plain_split_k(arranged(x, packed), packed.inner, out_dtype)

    return Body(pack, run, split_k, input_quant, adds_bias=True)


def scales_of_columns(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None, int]:
    """A weight's scales [N, G] and zero points, and how many columns share one; K, where a row has one scale."""
    n, k = weight.shape
    rows, size = weight.scheme.weight.granularity.tile(n, k)

    def of_rows(table: Tensor) -> Tensor:
        return table.repeat_interleave(rows, 0)[:n]

    zero = weight.zero_point
    return of_rows(weight.scale), None if zero is None else of_rows(zero), size


def few_bits() -> Body:
    """Weights of 2 to 4 bits, inputs in 16 bits."""
    return _few_bits(None)


def few_bits_fp8() -> Body:
    """Weights of 2 to 4 bits, decoded to e4m3, times tokens rounded to e4m3."""
    return _few_bits(ActivationQuant(torch.float8_e4m3fn))


def _few_bits(rounding: ActivationQuant | None) -> Body:
    from octavo.kernels.int4.gpu import linear

    kind = "int4" if rounding is None else "int4 fp8"

    def input_quant(packed: Any) -> ActivationQuant | None:
        if packed.column_permutation is None:
            return rounding
        return replace(rounding or ActivationQuant(None), column_permutation=packed.column_permutation)

    def codes_of(x: Hidden, packed: Any) -> tuple[Tensor, Tensor | None, bool]:
        """x's numbers, their scales, and whether their columns are in the weight's order already."""
        if isinstance(x, QuantizedActivation):
            is_permuted = packed.order is not None and packed.columns == packed.shape[1]
            return x.codes, None if rounding is None else x.scale, is_permuted
        if rounding is None:
            return x, None, False
        ready = linear.quantize_input(x)
        return ready.codes, ready.scale, False

    def run(x: Hidden, packed: Any, out_dtype: torch.dtype) -> Tensor:
        codes, scale, is_permuted = codes_of(x, packed)
        return linear.matmul(codes, packed, scale, out_dtype, is_permuted=is_permuted)

    def split_k(x: Hidden, packed: Any, out_dtype: torch.dtype) -> Tensor:
        codes, scale, is_permuted = codes_of(x, packed)
        if _splits_k(kind, codes.shape[0], packed.shape[0], packed.columns):
            return linear.split_k_partials(codes, packed, scale, is_permuted=is_permuted)
        return linear.matmul(codes, packed, scale, out_dtype, is_permuted=is_permuted)

    return Body(_pack_few_bits, run, split_k, input_quant, adds_bias=True)


def _pack_few_bits(weight: QuantizedWeight, options: PackOptions) -> PackedWeight:
    from octavo.kernels.int4.gpu import packing

    groups = weight.g_idx
    if groups is None:
        size = weight.scheme.weight.granularity.group_size or weight.shape[1]
        groups = group_of_column(weight.shape[1], size).to(weight.codes.device)
    bits = 2 if weight.scheme.weight.bits == 2 else 4  # 3 bits lie in the fields of 4
    return packing.pack(weight.codes, weight.scale, weight.zero_point, groups.long(), options.bias, bits=bits)


def _splits_k(kind: str, m: int, n: int, k: int) -> bool:
    """Whether the card's table has a GEMM of this size split along K."""
    row = choose(kind, m, n, k)
    return row["split_k"] > 1 and not row.get("dequantize")
