"""Triton body of grouped GEMMs: each pair of token and expert times its expert's weight, in bf16, fp16, e4m3 or int8.

out[pair] = x[pair // divisor] @ w[expert]^T (* x_scale * w_scale) (* router[pair]), for pairs as `route.align` sorts
them: x has a row for each token (divisor: its pairs) or for each pair (1: as behind the first GEMM). A program has
BLOCK_M sorted pairs of one expert and BLOCK_N of its rows. Up to 32 pairs an expert's rows are the tensor core's rows
and the pairs its columns (acc [N, M]), as in `gemm.gpu.gemm_swap_ab`: 64 rows is the least it multiplies.

Programs are fixed in number, and one whose tile isn't used ends at once: an expert without tokens is never read. Tiles
of sorted pairs go through the weight GROUP_M at a time, so that both stay in the L2 cache.

Codes have a scale for each row of x and of the weight, or, of e4m3, for each 1 x 128 of x and each 128 x 128 of the
weight: 1 x 128, where parts that are one weight ended within a block. Sums of e4m3 are added to a float32 accumulator
each BLOCK_K columns, as the tensor core's own keeps some 14 bits; those of int8 are exact in int32. Reference:
`moe.reference.grouped`. Limit: the bytes of the experts that are hit, over 3.0 TB/s on an H100; with many tokens
2 * pairs * N * K operations over 989 T/s (bf16) or 1979 T/s (8 bits).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gemm.gpu.gemm_swap_ab import multiply
from octavo.kernels.gemm.limits import FP8_BLOCK
from octavo.kernels.int8.gpu.linear import MAX_COLUMNS
from octavo.kernels.launching.checks import expect, refuse
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv
from octavo.kernels.launching.numerics import dot, narrow
from octavo.kernels.moe.gpu.route import Aligned, expect_aligned

NARROW = 64  # rows of the weight in a program where each has scales of its own: of 128, registers spill
BLOCK = FP8_BLOCK
SWAPPED = 32  # pairs in a tile at the most for which the weight's rows are the tensor core's


@triton.jit
def tile_offsets(num_tiles, N, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """A program's tile of sorted pairs and first row of the weight, down GROUP_M tiles before it goes right."""
    program = tl.program_id(0)
    columns = tl.cdiv(N, BLOCK_N)
    above = program // (GROUP_M * columns) * GROUP_M
    height = tl.minimum(num_tiles - above, GROUP_M)
    inside = program % (GROUP_M * columns)
    return above + inside % height, inside // height * BLOCK_N


@triton.jit
def tokens_of(order, tile, num_pairs, DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr):
    """The pairs of a tile, which of them are any, and their rows of x; filling reads the first token."""
    pair = tl.load(order + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    real = pair < num_pairs
    return pair, real, tl.where(real, pair // DIVISOR, 0).to(tl.int64)


@triton.jit
def store(total, out, pair, real, first_n, N, SWAP: tl.constexpr, BLOCK_N: tl.constexpr):
    """total [BLOCK_M, BLOCK_N], or transposed, into the rows of out that pairs have."""
    n = first_n + tl.arange(0, BLOCK_N)
    row = pair.to(tl.int64) * N
    if SWAP:
        at = row[None, :] + n[:, None]
        seen = real[None, :] & (n < N)[:, None]
    else:
        at = row[:, None] + n[None, :]
        seen = real[:, None] & (n < N)[None, :]
    tl.store(out + at, narrow(total, out.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize_on_alignment=["num_pairs", "num_tiles", "x_scale_group"])
def _grouped(
    x,
    w,
    x_scale,
    w_scale,
    router,
    order,
    tile_expert,
    out,
    num_pairs,
    num_tiles,
    N,
    K,
    x_scale_row,
    x_scale_group,
    DIVISOR: tl.constexpr,
    HAS_ROUTER: tl.constexpr,
    SCALES: tl.constexpr,
    SWAP: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    tile, first_n = tile_offsets(num_tiles, N, BLOCK_N, GROUP_M)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    pair, real, row = tokens_of(order, tile, num_pairs, DIVISOR, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    n = first_n + tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)  # past the end the last row again, never stored
    x_at = x + row[:, None] * K + k[None, :]
    w_at = w + expert * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    x_scale += row * x_scale_row
    groups = tl.cdiv(K, BLOCK_K)
    if SCALES == "blocks":
        w_scale += (expert * tl.cdiv(N, 128) + first_n // 128) * groups
    elif SCALES == "rows of blocks":
        w_scale += expert * N * groups
    sums: tl.constexpr = tl.int32 if w.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), sums)
    for at in range(0, K, BLOCK_K):
        seen = (k < K - at)[None, :]
        a = tl.load(x_at + at, mask=seen, other=0.0)
        b = tl.load(w_at + at, mask=seen, other=0.0)
        if SCALES == "blocks":
            step = tl.load(x_scale + at // BLOCK_K * x_scale_group) * tl.load(w_scale + at // BLOCK_K)
            acc += dot(b, a.T) * step[None, :] if SWAP else dot(a, b.T) * step[:, None]
        elif SCALES == "rows of blocks":
            step = tl.load(x_scale + at // BLOCK_K * x_scale_group)
            own = tl.load(w_scale + n * groups + at // BLOCK_K)
            acc += dot(b, a.T) * own[:, None] * step[None, :] if SWAP else dot(a, b.T) * own[None, :] * step[:, None]
        elif SCALES == "rows":
            acc = multiply(b, a.T, acc, True) if SWAP else multiply(a, b.T, acc, True)
        else:
            acc = dot(b, a.T, acc) if SWAP else dot(a, b.T, acc)
    total = acc.to(tl.float32)
    if SCALES == "rows":
        step = tl.load(x_scale)
        rows = tl.load(w_scale + expert * N + n)
        total *= rows[:, None] * step[None, :] if SWAP else rows[None, :] * step[:, None]
    if HAS_ROUTER:
        weight = tl.load(router + pair, mask=real, other=0.0)
        total *= weight[None, :] if SWAP else weight[:, None]
    store(total, out, pair, real, first_n, N, SWAP, BLOCK_N)


def pair_arguments(
    x: Tensor, weight: tuple[int, ...], pairs: Aligned, out: Tensor, divisor: int, router: Tensor | None
) -> dict[str, Any]:
    """Kernel arguments that describe the sorted pairs of a weight [E, N, K]; checks all sizes."""
    num_experts, n, k = weight
    num_pairs = out.shape[0]
    expect(x=(x, (cdiv(num_pairs, divisor), k)), router=(router, num_pairs), out=(out, (num_pairs, n)))
    expect_aligned(pairs, num_pairs, num_experts)
    return {
        "x": x,
        "router": out if router is None else router,
        "order": pairs.order,
        "tile_expert": pairs.tile_expert,
        "out": out,
        "num_pairs": num_pairs,
        "num_tiles": len(pairs.tile_expert),
        "N": n,
        "K": k,
        "DIVISOR": divisor,
        "HAS_ROUTER": router is not None,
        "BLOCK_M": pairs.block_m,
    }


def _expect_weight(x: Tensor, w: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, scales: str) -> None:
    e, n, k = w.shape
    groups = cdiv(k, BLOCK) if "blocks" in scales else 1
    wanted = {"rows": (e, n), "blocks": (e, cdiv(n, BLOCK), groups), "rows of blocks": (e, n, groups)}
    expect(w=(w, (e, n, k)), w_scale=(w_scale, wanted.get(scales, ())))
    if x_scale is not None and x_scale.shape != (x.shape[0], groups):  # in any order of memory
        refuse("x_scale", x_scale, (x.shape[0], groups))


def _scales(w: Tensor, w_scale: Tensor | None, blocks: bool) -> str:
    """What of the weight has a scale."""
    if w_scale is None:
        return "none"
    if not blocks:
        return "rows"
    return "rows of blocks" if w_scale.shape[1] == w.shape[1] else "blocks"


def grouped(
    x: Tensor,
    w: Tensor,
    pairs: Aligned,
    out: Tensor,
    *,
    divisor: int,
    router: Tensor | None = None,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    blocks: bool = False,
    block_n: int = 64,
    block_k: int = 128,
    group_m: int = 8,
    num_warps: int = 4,
    num_stages: int = 4,
) -> Launch:
    """x [tokens or pairs, K] @ w [E, N, K]^T of each pair's expert into out [pairs, N] bf16, fp16 or float32.

    divisor  pairs for each row of x
    router   float32, a number for each pair, multiplied to its row
    x_scale  where x and w are e4m3 or int8: float32 [rows, 1]; of blocks [rows, ceil(K / 128)], in any order of memory
    w_scale  float32 [E, N]; of blocks [E, ceil(N / 128), ceil(K / 128)], or of their rows [E, N, ceil(K / 128)]
    """
    arguments = pair_arguments(x, w.shape, pairs, out, divisor, router)
    _, n, k = w.shape
    if x.dtype == torch.int8 and k > MAX_COLUMNS:
        raise ValueError(f"an int32 sum holds {MAX_COLUMNS} columns, not {k}")
    if x.dtype != w.dtype or (x_scale is None) != (w_scale is None) or (x_scale is None) == (x.element_size() == 1):
        raise ValueError(f"a grouped GEMM of {x.dtype} with{'out' if x_scale is None else ''} scales")
    if blocks and (BLOCK % block_n or block_k != BLOCK or x.dtype != torch.float8_e4m3fn):
        raise ValueError(f"{block_n} x {block_k} codes cross blocks of {BLOCK}")
    scales = _scales(w, w_scale, blocks)
    _expect_weight(x, w, x_scale, w_scale, scales)
    if scales == "rows of blocks":
        block_n = min(block_n, NARROW)
    return Launch(
        _grouped,
        (len(pairs.tile_expert) * cdiv(n, block_n),),
        {
            **arguments,
            "w": w,
            "x_scale": out if x_scale is None else x_scale,
            "w_scale": out if w_scale is None else w_scale,
            "x_scale_row": 0 if x_scale is None else x_scale.stride(0),
            "x_scale_group": 0 if x_scale is None else x_scale.stride(1),
            "SCALES": scales,
            "SWAP": pairs.block_m <= SWAPPED,
            "GROUP_M": group_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )
