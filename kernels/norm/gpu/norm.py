"""Triton body of the steps between two sublayers: norm, residual, norm, and quantization to fp8 or int8, in one pass.

y = (x + r) / sqrt(mean((x + r)^2) + eps) * w, a program for each token, the whole row in registers. x may be split-K
partial sums of the GEMM before, which are added up here, and may be normed or scaled before the sum.
References: `norm.reference`, `fp8.reference`, `int8.reference`. Limit: bytes; with a residual and an fp8 output 7 an
element (3 without), over 3.0 TB/s on an H100.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect, refuse
from octavo.kernels.launching.dependent_launch import await_previous, prefetch
from octavo.kernels.launching.launch import Launch, cdiv, power_of_two
from octavo.kernels.launching.numerics import narrow
from octavo.kernels.norm.gpu.store_quantized import expect_scale, store_quantized


@triton.jit
def _normed(value, weight, width, eps, BLOCK: tl.constexpr):
    """RMSNorm of a row, which has zeros from width on."""
    at = tl.arange(0, BLOCK)
    value *= tl.rsqrt(tl.sum(value * value) / width + eps)
    return value * tl.load(weight + at, mask=at < width, other=0.0)


@triton.jit
def _norm(
    x,
    after,
    weight,
    residual,
    out,
    scale,
    stored,
    column_permutation,
    plain,
    total,
    x_split,
    x_row,
    width,
    eps,
    multiplier,
    SPLIT_K: tl.constexpr,
    HAS_OUT: tl.constexpr,
    GROUP: tl.constexpr,
    STATIC: tl.constexpr,
    MOVED: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        line = tl.minimum(tl.arange(0, (BLOCK + 31) // 32) * 32, width - 1)
        if after is not None:
            prefetch(after + line)
        if weight is not None:
            prefetch(weight + line)
    await_previous(OVERLAPS)
    token = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    seen = at < width
    row = token.to(tl.int64) * width
    of_x = x + token.to(tl.int64) * x_row + at
    value = tl.load(of_x, mask=seen, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLIT_K):
        value += tl.load(of_x + split * x_split, mask=seen, other=0.0)
    if residual is not None:
        dtype: tl.constexpr = residual.dtype.element_ty
        if x.dtype.element_ty != dtype or SPLIT_K > 1:  # as the GEMM would have rounded it
            value = narrow(value, dtype).to(tl.float32)
        if after is not None:
            value = narrow(_normed(value, after, width, eps, BLOCK), dtype).to(tl.float32)
        value = narrow(value * multiplier, dtype).to(tl.float32)
        value += tl.load(residual + row + at, mask=seen, other=0.0).to(tl.float32)
        rounded = narrow(value, dtype)
        tl.store(total + row + at, rounded, mask=seen)
        value = rounded.to(tl.float32)
    if weight is not None:
        value = _normed(value, weight, width, eps, BLOCK)
    if plain is not None:
        tl.store(plain + row + at, narrow(value, plain.dtype.element_ty), mask=seen)
    if HAS_OUT:
        store_quantized(value, out, scale, stored, column_permutation, token, 0, width, GROUP, STATIC, MOVED, BLOCK)


def norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    after: Tensor | None = None,
    multiplier: float = 1.0,
    scale: Tensor | None = None,
    group_size: int = 0,
    static_scale: Tensor | None = None,
    plain: Tensor | None = None,
    column_permutation: Tensor | None = None,
) -> Launch:
    """RMSNorm of x [T, H], or of the sum of x [S, T, H], into out [T, H].

    x         [S, T, H]: float32 split-K parts, or the outputs of each token's S experts
    weight    [H] float32; None: no norm behind the sum. out is then written only if it is of codes, those of the sum
    residual  [T, H], added before the norm; total [T, H] receives the sum in its type, and that is what is normed
    after     [H] float32: x is normed by it, and multiplied by the multiplier, before the residual is added
    out       bf16, fp16 or float32; or float8_e4m3fn or int8 with scale [T, ceil(H / group_size)] float32, a scale for
              each group of columns, or [T, 1] with group_size 0; group_size is a power of two
    static_scale  [1] float32: as of `fp8.gpu.quantize`
    plain     [T, H] bf16, fp16 or float32: also receives the numbers whose codes out has
    column_permutation  [H] int32: the position of each column in out; not with groups
    """
    split_k = x.shape[0] if x.dim() == 3 else 1
    num_tokens, width = x.shape[-2:]
    rows = (num_tokens, width)
    groups = cdiv(width, group_size) if group_size else 1
    expect_scale("a norm", out, scale, group_size, column_permutation)
    expect(
        residual=(residual, rows),
        total=(total, rows),
        weight=(weight, width),
        after=(after, width),
        scale=(scale, (num_tokens, groups)),
        static_scale=(static_scale, 1),
        plain=(plain, rows),
        column_permutation=(column_permutation, (width,)),
        out=(None if weight is None and scale is None else out, rows),
    )
    _expect_what_is_added(x, weight, residual, total, after, multiplier)
    block = max(power_of_two(width), group_size)
    return Launch(
        _norm,
        (num_tokens,),
        {
            "x": x,
            "after": after,
            "weight": weight,
            "residual": residual,
            "out": out,
            "multiplier": multiplier,
            "scale": out if scale is None else scale,
            "total": out if total is None else total,
            "stored": out if static_scale is None else static_scale,
            "STATIC": static_scale is not None,
            "plain": plain,
            "column_permutation": out if column_permutation is None else column_permutation,
            "MOVED": column_permutation is not None,
            "HAS_OUT": weight is not None or scale is not None,
            "x_split": x.stride(0) if x.dim() == 3 else 0,
            "x_row": x.stride(-2),
            "width": width,
            "eps": eps,
            "SPLIT_K": split_k,
            "GROUP": group_size,
            "BLOCK": block,
        },
        **tuning.choose("norm", num_tokens, width, split_k, x.device),
        num_stages=1,
    )


def _expect_what_is_added(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    total: Tensor | None,
    after: Tensor | None,
    multiplier: float,
) -> None:
    """Raises ValueError. x's rows may have any stride: split-K parts one after another, or a token's side by side."""
    if x.stride(-1) != 1:
        refuse("x", x, tuple(x.shape))
    if (residual is None) != (total is None):
        raise ValueError("residual and total come together")
    if residual is None and (weight is None or after is not None or multiplier != 1.0):
        raise ValueError("without a residual there must be a weight, no `after` and no multiplier")
