"""The CPU's kernels (AVX-512), from the canonical weight to their packed ones. Each is imported when a layer asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octavo.kernels.gemm.limits import STEP_OF_INTEGERS
from octavo.kernels.packed_weight import PackedWeight
from octavo.quant.body import Body, PackOptions, PermutedColumns, dense_of, rounding, scheme_rounding
from octavo.quant.input_rounding import Round
from octavo.quant.qparams import QuantizedWeight, Weight
from octavo.quant.super_blocks import MOST_SIGNED, SUPER, factored

if TYPE_CHECKING:
    from octavo.kernels.dense.integers_cpu import Scales


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
    from octavo.kernels.dense import integers_cpu

    return Body(_pack_integers, integers_cpu.linear)


def permuted_integers() -> Body:
    """As `integers`, with act-order: x's columns are put into the order of the groups before each product."""
    from octavo.kernels.dense import integers_cpu

    def pack(weight: QuantizedWeight, options: PackOptions) -> PackedWeight:
        sorted_, order = weight.sorted_by_group()
        return PermutedColumns(_pack_integers(sorted_, options), order)

    def run(x: Tensor, packed: Any, out_dtype: torch.dtype) -> Tensor:
        return integers_cpu.linear(x[:, packed.order], packed.inner, out_dtype)

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
    from octavo.kernels.dense import integers_cpu

    w = weight.scheme.weight
    size = w.granularity.tile(*weight.shape)[1]
    bits = max(w.bits, 4)
    if min(size, weight.shape[1]) % STEP_OF_INTEGERS.get(bits, 1):
        bits = 8
    low = 0 if w.minima else -(1 << (bits - 1))
    return integers_cpu.pack(weight.codes, _scales(weight, size), bits, low)


def _scales(weight: QuantizedWeight, group_size: int) -> Scales:
    """Scales, and what is to be taken off, in as few bytes as hold them exactly."""
    from octavo.kernels.dense.integers_cpu import Scales
    from octavo.kernels.native.grouped_tile import FLOAT, HALF, ZERO

    scale = weight.scale.float()
    minima = weight.zero_point
    if minima is not None and not weight.scheme.weight.minima:
        storage = HALF if _are_halves(scale) else FLOAT
        return Scales(storage, scale.half() if storage == HALF else scale, minima, minimum_storage=ZERO)
    found = [scale] if minima is None else [scale, minima.float()]
    if weight.scheme.weight.scales == "super" and scale.shape[1] % (SUPER // group_size) == 0:
        in_super_blocks = _in_super_blocks(found, SUPER // group_size)
        if in_super_blocks is not None:
            return in_super_blocks
    storage = HALF if all(map(_are_halves, found)) else FLOAT
    if storage == HALF:
        found = [numbers.half() for numbers in found]
    return Scales(storage, found[0], found[1] if len(found) > 1 else None)


def _are_halves(numbers: Tensor) -> bool:
    """Whether float16 holds them exactly."""
    return torch.equal(numbers.half().float(), numbers)


def _in_super_blocks(values: list[Tensor], groups: int) -> Scales | None:
    """Scales and minima [N, G] as integers and units; None where they are no such products."""
    from octavo.kernels.dense.integers_cpu import Scales
    from octavo.kernels.native.grouped_tile import SUPER as INTEGERS

    whole = []
    units = []
    for numbers in values:
        blocks = numbers.reshape(-1, groups)
        try:
            unit, integers = factored(blocks, MOST_SIGNED, 128, likely=(63, -128, 127, 32, 31, 15))
        except ValueError:
            return None
        whole.append(integers.to(torch.int8).reshape(numbers.shape))
        units.append(unit.half().reshape(len(numbers), -1))
    minima, minimum_units = (whole[1], units[1]) if len(values) > 1 else (None, None)
    return Scales(INTEGERS, whole[0], minima, units[0], minimum_units)


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
