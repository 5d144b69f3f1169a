"""Triton bodies of the norms: residual + RMSNorm, and rounding what comes out to fp8 or int8, in one pass.

y = (x + r) / sqrt(mean((x + r)^2) + eps) * w, a program for each token, the whole row in registers. x may be split-K
partial sums of the GEMM before, which are added up on the way. References: `fused.reference`, `fp8.reference`,
`int8.reference`. Limit: bytes; with a residual and an fp8 output 7 bytes an element (3 without), over 3.0 TB/s on an
H100.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.fused.gpu.rounding import store_rounded
from octavo.kernels.launch import Launch, Proof, meta, power_of_two
from octavo.kernels.numeric import narrow
from octavo.kernels.overlap import await_previous, prefetch

WARPS = ((2048, 4), (8192, 8), (1 << 30, 16))  # elements of a row at the most, warps


@triton.jit
def _norm(
    x, weight, residual, out, scale, total, x_part, width, eps,
    PARTS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        prefetch(weight + tl.minimum(tl.arange(0, (BLOCK + 31) // 32) * 32, width - 1))
    await_previous(OVERLAPS)
    token = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    seen = at < width
    row = token.to(tl.int64) * width
    value = tl.load(x + row + at, mask=seen, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(x + part * x_part + row + at, mask=seen, other=0.0)
    if HAS_RESIDUAL:
        dtype: tl.constexpr = residual.dtype.element_ty
        if x.dtype.element_ty != dtype:  # as the GEMM would have rounded it
            value = narrow(value, dtype).to(tl.float32)
        value += tl.load(residual + row + at, mask=seen, other=0.0).to(tl.float32)
        rounded = narrow(value, dtype)
        tl.store(total + row + at, rounded, mask=seen)
        value = rounded.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value) / width + eps)
    value *= tl.load(weight + at, mask=seen, other=0.0)
    store_rounded(value, out, scale, token, 0, width, GROUP, BLOCK)


def norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    scale: Tensor | None = None,
    group_size: int = 0,
) -> Launch:
    """RMSNorm of x [T, H], or of the sum of x [S, T, H] float32, into out [T, H].

    weight    [H] float32
    residual  [T, H], added first; total [T, H] receives the sum in its type, which is then normed
    out       bf16, fp16 or float32; or float8_e4m3fn or int8 with scale [T, ceil(H / group_size)] float32, a scale for
              each group of columns, or [T, 1] with group_size 0; group_size is a power of two
    """
    parts, (num_tokens, width) = (x.shape[0] if x.dim() == 3 else 1), x.shape[-2:]
    if (out.dtype in (torch.float8_e4m3fn, torch.int8)) != (scale is not None):
        raise ValueError(f"a norm into {out.dtype} {'needs' if scale is None else 'has no'} scale")
    if (residual is None) != (total is None):
        raise ValueError("residual and total come together")
    block = max(power_of_two(width), group_size)
    return Launch(
        _norm,
        (num_tokens,),
        {
            "x": x, "weight": weight, "residual": x if residual is None else residual, "out": out,
            "scale": out if scale is None else scale, "total": out if total is None else total,
            "x_part": num_tokens * width, "width": width, "eps": eps,
            "PARTS": parts, "HAS_RESIDUAL": residual is not None, "GROUP": group_size, "BLOCK": block,
        },
        num_warps=next(warps for most, warps in WARPS if block <= most),
        num_stages=1,
    )  # fmt: skip


def proofs() -> dict[str, Proof]:
    """Llama's widths: 128-bit loads and stores throughout."""
    example = partial(meta, dtype=torch.bfloat16)
    made: dict[str, Proof] = {}
    for width in (576, 4096, 8192):
        rows, weight = example(64, width), example(width, dtype=torch.float32)
        sums = example(4, 64, width, dtype=torch.float32)
        scale = example(64, 1, dtype=torch.float32)
        fp8, int8 = example(64, width, dtype=torch.float8_e4m3fn), example(64, width, dtype=torch.int8)
        for name, launch in {
            "norm": norm(rows, weight, 1e-5, rows, residual=rows, total=rows),
            "norm fp8": norm(rows, weight, 1e-5, fp8, scale=scale, residual=rows, total=rows),
            "norm fp8 groups": norm(rows, weight, 1e-5, fp8, scale=scale, group_size=128, residual=rows, total=rows),
            "norm int8 of 4 partial sums": norm(sums, weight, 1e-5, int8, scale=scale, residual=rows, total=rows),
        }.items():
            made[f"{name} {width}"] = Proof(launch, expects=(r"LDG\.E\.128", r"STG\.E\.128"))
    return made
