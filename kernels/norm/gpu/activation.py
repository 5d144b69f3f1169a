"""Triton bodies of gated activations, f(gate) * up, stored as they are or quantized to fp8 or int8.

f is silu or the tanh-approximated gelu; both are g * sigmoid(z), with z = g or 2 sqrt(2 / pi) (g + 0.044715 g^3). A
program has a token's whole row where the row has one scale, else a part of it. The input may be split-K partial sums.
Codes are made of the float32 product, not of one rounded to 16 bits.
References: `norm.reference`, `fp8.reference`, `int8.reference`. Limit: bytes; 5 for each output element with bf16 in
and fp8 out, over 3.0 TB/s on an H100.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv, power_of_two
from octavo.kernels.launching.numerics import sigmoid
from octavo.kernels.norm.gpu.store_quantized import expect_scale, store_quantized


@triton.jit
def _gated(
    x,
    out,
    scale,
    stored,
    column_permutation,
    split_size,
    width,
    GELU: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP: tl.constexpr,
    STATIC: tl.constexpr,
    MOVED: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    token = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    at = first + tl.arange(0, BLOCK)
    seen = at < width
    row = x + token.to(tl.int64) * (2 * width) + at
    gate = tl.load(row, mask=seen, other=0.0).to(tl.float32)
    up = tl.load(row + width, mask=seen, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLIT_K):
        gate += tl.load(row + split * split_size, mask=seen, other=0.0)
        up += tl.load(row + split * split_size + width, mask=seen, other=0.0)
    z = gate
    if GELU:
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    value = gate * sigmoid(z) * up
    store_quantized(value, out, scale, stored, column_permutation, token, first, width, GROUP, STATIC, MOVED, BLOCK)


def silu_and_mul(
    x: Tensor,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    group_size: int = 0,
    static_scale: Tensor | None = None,
    column_permutation: Tensor | None = None,
) -> Launch:
    """silu(gate) * up of x = gate, up [T, 2 I], or of the sum of x [S, T, 2 I] float32, into out [T, I].

    out is bf16, fp16 or float32; or float8_e4m3fn or int8 with scale [T, ceil(I / group_size)] float32, a scale for
    each group of columns, or [T, 1] with group_size 0; group_size is a power of two. static_scale [1] float32: as of
    `fp8.gpu.quantize`. column_permutation [I] int32: the position of each column in out; not with groups.
    """
    return _launch(x, out, scale, group_size, static_scale, column_permutation, gelu=False)


def gelu_tanh_and_mul(
    x: Tensor,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    group_size: int = 0,
    static_scale: Tensor | None = None,
    column_permutation: Tensor | None = None,
) -> Launch:
    """gelu(gate) * up, tanh-approximated; all else as in `silu_and_mul`."""
    return _launch(x, out, scale, group_size, static_scale, column_permutation, gelu=True)


def _launch(
    x: Tensor,
    out: Tensor,
    scale: Tensor | None,
    group_size: int,
    static_scale: Tensor | None,
    column_permutation: Tensor | None,
    *,
    gelu: bool,
) -> Launch:
    expect_scale("an activation", out, scale, group_size, column_permutation)
    tokens, width = out.shape
    split_k = x.shape[0] if x.dim() == 3 else 1
    expect(x=(x, (split_k, tokens, 2 * width) if x.dim() == 3 else (tokens, 2 * width)), out=(out, (tokens, width)))
    expect(scale=(scale, (tokens, cdiv(width, group_size) if group_size else 1)), static_scale=(static_scale, 1))
    expect(column_permutation=(column_permutation, (width,)))
    block = max(power_of_two(width), group_size)
    if scale is not None and group_size == 0:
        sizes = tuning.choose("activation rows", tokens, width, split_k, x.device)
    else:
        sizes = tuning.choose("activation", tokens, width, split_k, x.device)
        block = min(block, max(sizes.pop("block"), group_size))
    return Launch(
        _gated,
        (tokens, cdiv(width, block)),
        {
            "x": x,
            "out": out,
            "scale": out if scale is None else scale,
            "split_size": tokens * 2 * width,
            "stored": out if static_scale is None else static_scale,
            "STATIC": static_scale is not None,
            "column_permutation": out if column_permutation is None else column_permutation,
            "MOVED": column_permutation is not None,
            "width": width,
            "GELU": gelu,
            "SPLIT_K": split_k,
            "GROUP": group_size,
            "BLOCK": block,
        },
        **sizes,
        num_stages=1,
    )
