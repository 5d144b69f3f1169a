"""The CPU's kernels (AVX-512), from the canonical weight to their packed ones. Each is imported when a layer asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo.kernels.packed_weight import PackedWeight
from octavo.quant.body import Body, PackOptions, PermutedColumns, dense_of, rounding, scheme_rounding
from octavo.quant.input_rounding import Round
from octavo.quant.qparams import QuantizedWeight, Weight


def int8() -> Body:
    """Products of int8 codes; the kernel rounds each token."""
    from octavo.kernels.int8 import cpu

    def pack(weight: QuantizedWeight, options: PackOptions) -> PackedWeight:  # noqa: ARG001
        return cpu.pack(weight.codes, weight.scale)

    return Body(pack, cpu.linear)


def int4() -> Body:
    """As `int8`, of codes of 4 bits and fewer with scales for groups."""
    from octavo.kernels.int4 import cpu

    def pack(weight: QuantizedWeight, options: PackOptions) -> PackedWeight:  # noqa: ARG001
        return cpu.pack(weight.codes, weight.scale)

    return Body(pack, cpu.linear)


def integers() -> Body:
    """Integers decoded to bf16 in registers, 2 and 3 bits in int4's layout."""
    from octavo.kernels.dense import cpu

    return Body(_pack_integers, cpu.linear)


def permuted_integers() -> Body:
    """As `integers`, with act-order: x's columns are put into the order of the groups before each product."""
    from octavo.kernels.dense import cpu

    def pack(weight: QuantizedWeight, options: PackOptions) -> PackedWeight:
        sorted_, order = weight.sorted_by_group()
        return PermutedColumns(_pack_integers(sorted_, options), order)

    def run(x: Tensor, packed: Any, out_dtype: torch.dtype) -> Tensor:
        return cpu.linear(x[:, packed.order], packed.inner, out_dtype)

    return Body(pack, run)


def integers_rounding() -> Body:
    """As `integers`, with inputs rounded as the scheme says, by torch."""
    return rounding(integers())


def fp4() -> Body:
    """e2m1 numbers decoded to bf16 in registers."""
    from octavo.kernels.dense import cpu

    return Body(_pack_fp4, cpu.linear)


def fp4_rounding() -> Body:
    """As `fp4`, with inputs rounded as the scheme says: to e2m1 by a kernel, else by torch."""
    return rounding(fp4(), _rounding_of)


def bf16() -> Body:
    """Of a weight that isn't quantized."""
    from octavo.kernels.dense import cpu

    return Body(_pack_bf16, cpu.linear)


def dequantized() -> Body:
    return bf16()


def dequantized_rounding() -> Body:
    """As `dequantized`, with inputs rounded as the scheme says."""
    return rounding(bf16())


def float32() -> Body:
    """Of a weight that isn't quantized, or of its dequantized numbers; inputs of 16 bits are widened."""
    from octavo.kernels.dense import float32_cpu

    return Body(_pack_float32, float32_cpu.linear)


def dequantized_float32() -> Body:
    return float32()


def dequantized_float32_rounding() -> Body:
    """As `dequantized_float32`, with inputs rounded as the scheme says."""
    return rounding(float32())


def _pack_integers(weight: QuantizedWeight, options: PackOptions) -> PackedWeight:  # noqa: ARG001
    from octavo.kernels.dense import cpu

    bits = 8 if weight.scheme.weight.bits > 4 else 4
    if not weight.scheme.weight.minima:
        return cpu.pack_int(weight.codes, weight.scale, weight.zero_point, bits)
    codes, scale, zero_point = _over_zero_points(weight)
    least = 8 if bits == 4 else 0
    return cpu.pack_int(codes - least, scale, zero_point - least, bits)


def _over_zero_points(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from 0 up, scales and zero points, all float32 but the codes, of a weight over minima.

    Where a scale is 0 its group is a constant: codes of 0, a zero point of 1 and the minimum for a scale.
    """
    scale = weight.scale.float()
    assert weight.zero_point is not None
    minima = weight.zero_point
    empty = scale == 0
    zero_point = torch.where(empty, 1.0, minima / torch.where(empty, 1.0, scale))
    size = weight.scheme.weight.granularity.tile(*weight.shape)[1]
    is_constant = empty.repeat_interleave(size, 1)[:, : weight.shape[1]]
    return weight.codes.masked_fill(is_constant, 0), torch.where(empty, minima, scale), zero_point


def _pack_fp4(weight: QuantizedWeight, options: PackOptions) -> PackedWeight:  # noqa: ARG001
    """Scales as they are stored, which bf16 holds; what divides e4m3 scales is each row's."""
    from octavo.kernels.dense import cpu

    scale = weight.scale.float()
    rows = torch.ones(weight.shape[0])
    if weight.scheme.weight.scales == "e4m3" and weight.global_scale is not None:
        scale = (scale * weight.global_scale).to(torch.float8_e4m3fn)
        rows /= weight.global_scale
    return cpu.pack_fp4(weight.codes, scale, rows)


def _rounding_of(weight: QuantizedWeight, options: PackOptions) -> Round:
    """How a layer's input is rounded, to bf16 where a kernel does it."""
    activation = weight.scheme.activation
    rounds = scheme_rounding(weight, options)
    if activation is None or activation.dtype != "fp4_e2m1":
        return rounds
    from octavo.kernels.fp4 import round_cpu

    round_cpu.prepare()
    size = activation.granularity.group_size or weight.shape[1]
    whole = float(weight.input_scale) if activation.has_stored_scale and weight.input_scale is not None else 0.0
    return lambda x: round_cpu.round_rows(x, size, whole)


def _pack_bf16(weight: Weight, options: PackOptions) -> PackedWeight:
    from octavo.kernels.dense import cpu

    return cpu.pack_bf16(dense_of(weight, options.target.dtype))


def _pack_float32(weight: Weight, options: PackOptions) -> PackedWeight:
    from octavo.kernels.dense import float32_cpu

    return float32_cpu.pack(dense_of(weight, options.target.dtype))
