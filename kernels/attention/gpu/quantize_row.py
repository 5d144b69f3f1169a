"""Quantize a token's whole row of attention's output for the next GEMM, in attention's own launch.

The program that stores the last of a token's heads reads all of them back from L2, and writes the row as codes of
float8_e4m3fn or int8 with the scale of the row, of groups of its columns or of a checkpoint, or as plain numbers in
another order of columns: bit for bit what `fp8.gpu.quantize` or `int4.gpu.permute_columns` would compute in a launch of
its own. It works on BLOCK columns at a time, and passes over them twice if the scale is the whole row's. BLOCK is small
enough that attention needs no more registers than without it.
Limit: latency; 2 to 4 bytes of a row from L2 for each element, and a code.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.attention.gpu.arguments import RowQuant
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.launch import cdiv, power_of_two
from octavo.kernels.launching.numerics import divided, if_finite, largest, narrow, step_of, to_codes, within_codes
from octavo.kernels.norm.gpu.store_quantized import expect_scale
from octavo.kernels.quantized_activation import ActivationQuant, QuantizedActivation


@triton.jit
def _columns(row, start, width, BLOCK: tl.constexpr):
    """Columns from start on and the row's values there in float32, zeros from width on.

    Other SMs wrote them, so the loads bypass L1.
    """
    at = start + tl.arange(0, BLOCK)
    return at, tl.load(row + at, mask=at < width, other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
def _largest_of_row(row, width, BLOCK: tl.constexpr):
    """`largest` of a row of any length."""
    most = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        _, value = _columns(row, start, width, BLOCK)
        most = tl.maximum(most, tl.abs(value).to(tl.int32, bitcast=True))
    return largest(most.to(tl.float32, bitcast=True), 0)


@triton.jit
def _by_groups(value, scale, first, groups, kind: tl.constexpr, GROUP: tl.constexpr):
    """Codes of a row's columns, which begin with group `first`; stores each group's scale."""
    count: tl.constexpr = value.shape[0] // GROUP
    value = tl.reshape(value, (count, GROUP))
    most = largest(value, 1)
    steps = if_finite(step_of(most, kind), most)
    g = first + tl.arange(0, count)
    tl.store(scale + g, steps, mask=g < groups)
    return tl.reshape(to_codes(divided(value, steps[:, None]), kind), (count * GROUP,))


@triton.jit
def quantize_row(out, token, row_quant, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Write a token's row of out [T, width] as codes [T, width].

    scale: [T, ceil(width / GROUP)], or [T] with GROUP 0. stored: the checkpoint's scale, or None. Column k becomes
    column column_permutation[k], if there is a permutation.
    """
    codes, scale, stored, column_permutation, _, width = row_quant
    kind: tl.constexpr = codes.dtype.element_ty
    row = token * width
    step = 1.0
    if GROUP == 0 and scale is not None:
        most = _largest_of_row(out + row, width, BLOCK)
        step = if_finite(step_of(most, kind), most) if stored is None else tl.load(stored)
        tl.store(scale + token, if_finite(step, most))
    for start in range(0, width, BLOCK):
        at, value = _columns(out + row, start, width, BLOCK)
        if scale is None:
            code = narrow(value, kind)
        elif GROUP > 0:
            groups = tl.cdiv(width, GROUP)
            code = _by_groups(value, scale + token * groups, start // GROUP, groups, kind, GROUP)
        else:
            code = to_codes(divided(value if stored is None else within_codes(value, step), step), kind)
        place = at if column_permutation is None else tl.load(column_permutation + at, mask=at < width, other=0)
        tl.store(codes + row + place, code, mask=at < width)


def row_quant_arguments(
    out: Tensor, into: QuantizedActivation | None, input_quant: ActivationQuant | None, counters: Tensor, num_warps: int
) -> tuple[RowQuant, int, int]:
    """The `RowQuant`, ROW_GROUP and ROW_BLOCK with which rows of out [T, Hq, D] are quantized into `into`.

    Numbers that a kernel could compute are arguments too: computed before the loop over splits, each would occupy a
    register all through attention, and an argument occupies none. Raises ValueError.
    """
    if (into is None) != (input_quant is None):
        raise ValueError("into and input_quant come together")
    if into is None or input_quant is None:
        return RowQuant(), 0, 0
    tokens, heads, dim = out.shape
    group = input_quant.group_size
    columns = heads * dim
    scale = None if input_quant.dtype is None else into.scale
    expect_scale("attention", into.codes, scale, group, input_quant.column_permutation)
    expect(
        codes=(into.codes, (tokens, columns)),
        scale=(scale, (tokens, cdiv(columns, group) if group else 1)),
        static_scale=(input_quant.static_scale, 1),
        column_permutation=(input_quant.column_permutation, (columns,)),
    )
    row_quant = RowQuant(
        into.codes, scale, input_quant.static_scale, input_quant.column_permutation, counters.numel() - 1, columns
    )
    return row_quant, group, max(min(power_of_two(columns), 512 * num_warps), group)
