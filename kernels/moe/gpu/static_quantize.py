"""Triton body that quantizes experts' inputs with the static scales that a checkpoint has for each expert.

For each pair of token and expert, x of the token or silu(gate) * up of the pair's row becomes e4m3 by the expert's
scale. A program has a pair's whole row. Reference: `fp8.reference.quantize_static` with the expert's scale. Limit:
bytes; 3 an element of bf16 (silu: 5 of the output) over 3.0 TB/s on an H100.
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
from octavo.kernels.moe.gpu.shared_expert_activation import silu_and_mul_row
from octavo.kernels.norm.gpu.store_quantized import store_quantized


@triton.jit
def _static_quantize(
    x,
    stored,
    chosen,
    out,
    scale,
    width,
    EACH: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    pair = tl.program_id(0)
    if GATED:
        value = silu_and_mul_row(x, pair, width, BLOCK)
    else:
        at = tl.arange(0, BLOCK)
        value = tl.load(x + (pair // EACH).to(tl.int64) * width + at, mask=at < width, other=0.0).to(tl.float32)
    own = stored + tl.load(chosen + pair)
    store_quantized(value, out, scale, own, None, pair, 0, width, 0, True, False, BLOCK)


def static_quantize(
    x: Tensor, stored: Tensor, chosen: Tensor, out: Tensor, scale: Tensor, *, gated: bool = False
) -> Launch:
    """x [T, K] into codes out [T * each, K] and scale [T * each, 1], by stored [E] of the experts chosen [T, each].

    gated  x [T * each, 2 K] is gate, up of each pair, and out is of silu(gate) * up
    A scale is the expert's, or NaN where something of the row isn't finite. out is float8_e4m3fn, chosen int32.
    """
    pairs, width = out.shape
    tokens, each = chosen.shape
    expect(
        x=(x, (pairs, 2 * width) if gated else (tokens, width)),
        stored=(stored, (stored.shape[0],)),
        chosen=(chosen, (tokens, each)),
        out=(out, (tokens * each, width)),
        scale=(scale, (pairs, 1)),
    )
    if out.dtype != torch.float8_e4m3fn:
        raise ValueError(f"rounding by stored scales into {out.dtype}: float8_e4m3fn works")
    return Launch(
        _static_quantize,
        (pairs,),
        {
            "x": x,
            "stored": stored,
            "chosen": chosen,
            "out": out,
            "scale": scale,
            "width": width,
            "EACH": each,
            "GATED": gated,
            "BLOCK": power_of_two(width),
        },
        **tuning.choose("activation rows" if gated else "quantize rows", pairs, width, int(gated), x.device),
        num_stages=1,
    )
