"""Triton body of SiLU * up for experts and a shared expert's slices, rounded to e4m3 or int8 by whole rows.

A row of one expert has a scale. The slices of a token's shared expert formed one row when the checkpoint was
calibrated, so they have one scale, that of their largest value. A program has a token and one of its experts, or all
slices: it reads them twice, the first time for the scale; the second time they come from the L1 cache.
Reference: `norm.reference.silu_and_mul`, then `fp8.reference` or `int8.reference` per token, of the slices side by
side. Limit: bytes; 5 for each output element with bf16 in and fp8 out, over 3.0 TB/s on an H100.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, power_of_two
from octavo.kernels.launching.numerics import divided, largest, sigmoid, step_of, to_codes
from octavo.kernels.norm.gpu.store_quantized import store_quantized


@triton.jit
def silu_and_mul_row(x, row, width, BLOCK: tl.constexpr):
    """silu(gate) * up of a row of x [rows, 2 width], in float32; zeros from width on."""
    at = tl.arange(0, BLOCK)
    of_row = x + row.to(tl.int64) * (2 * width) + at
    gate = tl.load(of_row, mask=at < width, other=0.0).to(tl.float32)
    up = tl.load(of_row + width, mask=at < width, other=0.0).to(tl.float32)
    return gate * sigmoid(gate) * up


@triton.jit
def _shared_expert_activation(
    x,
    out,
    scale,
    width,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    token = tl.program_id(0) // (TOP_K + 1)
    j = tl.program_id(0) % (TOP_K + 1)
    row = token * (TOP_K + SHARED) + j
    if j < TOP_K:
        store_quantized(
            silu_and_mul_row(x, row, width, BLOCK), out, scale, None, None, row, 0, width, 0, False, False, BLOCK
        )
        return
    kind: tl.constexpr = out.dtype.element_ty
    most = tl.zeros((BLOCK,), tl.int32)
    for s in range(SHARED):
        most = tl.maximum(most, tl.abs(silu_and_mul_row(x, row + s, width, BLOCK)).to(tl.int32, bitcast=True))
    step = step_of(largest(most.to(tl.float32, bitcast=True), 0), kind)
    at = tl.arange(0, BLOCK)
    for s in range(SHARED):
        code = to_codes(divided(silu_and_mul_row(x, row + s, width, BLOCK), step), kind)
        tl.store(out + (row + s).to(tl.int64) * width + at, code, mask=at < width)
        tl.store(scale + row + s, step)


def shared_expert_activation(x: Tensor, out: Tensor, scale: Tensor, top_k: int, shared: int) -> Launch:
    """silu(gate) * up of x = gate, up [T * (top_k + shared), 2 I] into codes out [T * (top_k + shared), I].

    out is float8_e4m3fn or int8 with scale [T * (top_k + shared), 1] float32; a token's last `shared` rows have one.
    """
    rows, width = out.shape
    expect(x=(x, (rows, 2 * width)), out=(out, (rows, width)), scale=(scale, (rows, 1)))
    if out.dtype not in (torch.float8_e4m3fn, torch.int8) or rows % (top_k + shared):
        raise ValueError(f"{rows} rows of {out.dtype} for tokens of {top_k} experts and {shared} slices")
    return Launch(
        _shared_expert_activation,
        (rows // (top_k + shared) * (top_k + 1),),
        {
            "x": x,
            "out": out,
            "scale": scale,
            "width": width,
            "TOP_K": top_k,
            "SHARED": shared,
            "BLOCK": power_of_two(width),
        },
        **tuning.choose("activation rows", rows, width, 1, x.device),
        num_stages=1,
    )
