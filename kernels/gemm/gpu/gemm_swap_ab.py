"""Triton body of scaled GEMMs of 8-bit codes for few tokens: a step of decoding. e4m3 and int8 alike.

out [M, N] = (x [M, K] * x_scale) @ (w [N, K] * w_scale)^T + bias. The tensor core multiplies at least 64 rows, so the
weight's rows are its rows and the tokens its columns (at least 16): acc [N, M] += w [N, K] @ x [M, K]^T, stored
transposed. The other way round 16 tokens would be widened to fp16 and run on Ampere's instructions.

K may be split, for a matrix whose rows alone don't fill the GPU. Each split stores float32 sums [S, M, N] that include
the scales (and in split 0 the bias): the next kernel adds them up (`norm.gpu.norm`), or
`norm.gpu.split_k_sum` does, always in the same order.

Sums of e4m3 codes inside the tensor core keep some 14 bits. Each BLOCK_K columns are added to a float32 accumulator
with FFMA instructions, hidden behind the weight loads. Limit: N * K bytes over 3.0 TB/s on an H100.
Reference: the product of what the codes stand for (`fp8.reference`, `int8.reference`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gemm.limits import FP8_BLOCK
from octavo.kernels.launching.checks import expect, refuse
from octavo.kernels.launching.dependent_launch import PREFETCH_TOKENS, await_previous, prefetch, row_lines
from octavo.kernels.launching.launch import Launch, cdiv
from octavo.kernels.launching.numerics import dot, narrow

BLOCK = FP8_BLOCK


@triton.jit
def multiply(a, b, acc, PROMOTE: tl.constexpr):
    """acc + a @ b: exact in int32 for int8 codes; in float32, or in what the tensor core keeps, for e4m3."""
    if a.dtype == tl.int8:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif PROMOTE:
        acc += dot(a, b)
    else:
        acc = dot(a, b, acc)
    return acc


@triton.jit(do_not_specialize_on_alignment=["M", "x_scale_group"])
def _gemm_swap_ab(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    out,
    M,
    N,
    K,
    columns,
    x_scale_row,
    x_scale_group,
    w_scale_row,
    w_scale_group,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    first_n = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    first_m = tl.program_id(2) * BLOCK_M
    # What lies past the end repeats the last row: read from the cache, and never stored.
    n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)
    m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_m)
    k = tl.arange(0, BLOCK_K)
    w_at = w + first_n.to(tl.int64) * K + (n[:, None] * K + k[None, :])
    x_at = x + first_m.to(tl.int64) * K + (m[None, :] * K + k[:, None])
    x_scale += (first_m + m) * x_scale_row
    w_scale += (first_n + n if ROWS else first_n // BLOCKS) * w_scale_row
    first = part * columns
    if OVERLAPS and BLOCK_M <= PREFETCH_TOKENS:
        prefetch(row_lines(w, first, first_n, N, K, BLOCK_N))
        prefetch(w_scale)
    await_previous(OVERLAPS)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if w.dtype.element_ty == tl.int8 else tl.float32)
    for at in range(first, tl.minimum(K, first + columns), BLOCK_K):
        seen = k < K - at
        codes = tl.load(w_at + at, mask=seen[None, :], other=0.0)
        tokens = tl.load(x_at + at, mask=seen[:, None], other=0.0)
        if BLOCKS:
            group = at // BLOCKS
            scale = tl.load(x_scale + group * x_scale_group)
            own = tl.load(w_scale + group * w_scale_group)
            if ROWS:
                acc += dot(codes, tokens) * (scale[None, :] * own[:, None])
            else:
                scale = scale * own
                acc += dot(codes, tokens) * scale[None, :]
        else:
            acc = multiply(codes, tokens, acc, True)
    total = acc.to(tl.float32)
    if not BLOCKS:
        total = total * tl.load(w_scale)[:, None] * tl.load(x_scale)[None, :]
    if HAS_BIAS and part == 0:
        total += tl.load(bias + first_n + n).to(tl.float32)[:, None]
    store_transposed(total, out, part, first_m, first_n, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def store_transposed(total, out, part, first_m, first_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """total [BLOCK_N, BLOCK_M] into out [S, M, N]."""
    m = tl.arange(0, BLOCK_M)[None, :]
    n = tl.arange(0, BLOCK_N)[:, None]
    row = part.to(tl.int64) * M + first_m
    seen = (m < M - first_m) & (n < N - first_n)
    tl.store(out + row * N + first_n + (m * N + n), narrow(total, out.dtype.element_ty), mask=seen)


def scale_arguments(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, *, blocks: bool, block_n: int, block_k: int
) -> dict[str, Any]:
    """What a launch is told of the scales of x and w: where they are, how far the next row and the next group are."""
    if blocks and (BLOCK % block_n or BLOCK % block_k or x.dtype != torch.float8_e4m3fn):
        raise ValueError(f"{block_n} x {block_k} codes of {x.dtype} cross blocks of {BLOCK} e4m3 codes")
    m = x.shape[0]
    n, k = w.shape
    _expect_scale("x_scale", x_scale, m, cdiv(k, BLOCK) if blocks else 0)
    of_rows = not blocks or w_scale.shape[0] == n
    _expect_scale("w_scale", w_scale, n if of_rows else cdiv(n, BLOCK), cdiv(k, BLOCK) if blocks else 0)
    x_row, w_row = (0 if scale.numel() == 1 and not blocks else scale.stride(0) for scale in (x_scale, w_scale))
    x_group, w_group = (scale.stride(1) if blocks else 0 for scale in (x_scale, w_scale))
    return {
        "x_scale": x_scale,
        "w_scale": w_scale,
        "BLOCKS": BLOCK if blocks else 0,
        "ROWS": of_rows,
        "x_scale_row": x_row,
        "x_scale_group": x_group,
        "w_scale_row": w_row,
        "w_scale_group": w_group,
    }


def _expect_scale(name: str, scale: Tensor, rows: int, groups: int) -> None:
    """A scale for each row and group of columns; without groups (0) for each row, or one for all. In any order."""
    if groups:
        if scale.shape != (rows, groups):
            refuse(name, scale, (rows, groups))
    elif scale.numel() != 1 and scale.shape not in ((rows,), (rows, 1)):
        refuse(name, scale, (rows, 1))


def gemm_swap_ab(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    blocks: bool = False,
    block_m: int = 16,
    block_n: int = 64,
    block_k: int = 128,
    num_warps: int = 4,
    num_stages: int = 4,
) -> Launch:
    """x [M, K] @ w [N, K]^T, both e4m3 or both int8, times their scales.

    x_scale   float32 [1], [M] or [M, 1]; of blocks [M, ceil(K / 128)], in any order of memory
    w_scale   float32 [1], [N] or [N, 1]; of blocks [ceil(N / 128), ceil(K / 128)]
    out       [M, N] bf16, fp16 or float32; or [S, M, N] float32, sums over S parts of K
    blocks    128 x 128 blocks of an e4m3 weight, and each token's groups of 128, have a scale
    """
    m = x.shape[0]
    n, k = w.shape
    split_k = out.shape[0] if out.dim() == 3 else 1
    expect(x=(x, (m, k)), w=(w, (n, k)), bias=(bias, n), out=(out, (split_k, m, n) if out.dim() == 3 else (m, n)))
    scales = scale_arguments(x, w, x_scale, w_scale, blocks=blocks, block_n=block_n, block_k=block_k)
    return Launch(
        _gemm_swap_ab,
        (cdiv(n, block_n), split_k, cdiv(m, block_m)),
        {
            **scales,
            "x": x,
            "w": w,
            "bias": w_scale if bias is None else bias,
            "HAS_BIAS": bias is not None,
            "out": out,
            "M": m,
            "N": n,
            "K": k,
            "columns": cdiv(cdiv(k, block_k), split_k) * block_k,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )
