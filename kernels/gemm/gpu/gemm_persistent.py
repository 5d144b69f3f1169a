"""Triton body of scaled GEMMs of 8-bit codes for many tokens: prefill. e4m3 and int8 alike.

out [M, N] = (x [M, K] * x_scale) @ (w [N, K] * w_scale)^T + bias. As many programs as the GPU has processors stay, and
take tile after tile of the output; GROUP_M tiles below each other come in turn, so that their weights are still in the
L2 cache. Two ways to bring the codes in: copies by the tensor memory accelerator, for what begins and goes on at
multiples of 16 bytes, and copies through pointers for every shape. The first hold no address in registers, so that the
largest tile fits.

Sums of e4m3 codes inside the tensor core keep some 14 bits; with `promote`, and always where blocks have scales, each
BLOCK_K columns are added to a float32 accumulator instead. Limit: 2 * M * N * K operations over 1979 T/s on an H100,
of which its power leaves some two thirds. Reference: as of `gemm_swap_ab`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.gemm.gpu.arguments import expect_sizes, scale_arguments
from octavo.kernels.gemm.gpu.gemm_swap_ab import multiply, scaled, tile_offsets
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv
from octavo.kernels.launching.numerics import dot, narrow


@triton.jit
def _rows(matrix, first, num_rows, K, at, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """ROWS x BLOCK_K codes. Past the last row come zeros, or the last row again: neither is stored."""
    if TMA:
        codes = matrix.load([first, at])
    else:
        row = tl.minimum(tl.arange(0, ROWS), num_rows - 1 - first)
        k = tl.arange(0, BLOCK_K)
        start = matrix + first.to(tl.int64) * K + at
        codes = tl.load(start + (row[:, None] * K + k[None, :]), mask=(k < K - at)[None, :], other=0.0)
    return codes


@triton.jit(do_not_specialize_on_alignment=["M", "x_scale_group"])
def _gemm_persistent(
    x,
    w,
    scales,
    bias,
    out,
    M,
    N,
    K,
    x_scale_group,
    PROGRAMS: tl.constexpr,
    TMA: tl.constexpr,
    INT8: tl.constexpr,
    SCALES: tl.constexpr,
    PROMOTE: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    rows = tl.cdiv(M, BLOCK_M)
    for index in tl.range(tl.program_id(0), rows * tl.cdiv(N, BLOCK_N), PROGRAMS, flatten=TMA):
        tile, n = tile_offsets(index, rows, N, BLOCK_N, GROUP_M)
        m = tile * BLOCK_M
        row = tl.minimum(m + tl.arange(0, BLOCK_M), M - 1)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INT8 else tl.float32)
        for at in range(0, K, BLOCK_K):
            a = _rows(x, m, M, K, at, BLOCK_M, BLOCK_K, TMA)
            b = _rows(w, n, N, K, at, BLOCK_N, BLOCK_K, TMA)
            if SCALES == "rows":
                acc = multiply(a, b.T, acc, PROMOTE)
            else:
                group = at // 128
                step = tl.load(scales.x_scale + row * scales.x_scale_row + group * x_scale_group)
                own = scales.w_scale + group * scales.w_scale_group
                if SCALES == "rows of blocks":
                    column = tl.minimum(n + tl.arange(0, BLOCK_N), N - 1)
                    own = tl.load(own + column * scales.w_scale_row)
                    acc += scaled(dot(a, b.T), step[:, None], own[None, :], True)
                else:
                    step *= tl.load(own + n // 128 * scales.w_scale_row)
                    acc += dot(a, b.T) * step[:, None]
        if SUBTILES == 2:
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            _store(left, scales, bias, out, m, n, M, N, SCALES)
            _store(right, scales, bias, out, m, n + BLOCK_N // 2, M, N, SCALES)
        else:
            _store(acc, scales, bias, out, m, n, M, N, SCALES)


@triton.jit
def _store(acc, scales, bias, out, first_m, first_n, M, N, SCALES: tl.constexpr):
    m = first_m + tl.arange(0, acc.shape[0])
    n = first_n + tl.arange(0, acc.shape[1])
    total = acc.to(tl.float32)
    if SCALES == "rows":
        rows = tl.load(scales.x_scale + m * scales.x_scale_row, mask=m < M, other=0.0)
        columns = tl.load(scales.w_scale + n * scales.w_scale_row, mask=n < N, other=0.0)
        total = scaled(total, columns[None, :], rows[:, None], False)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + at, narrow(total, out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def fits_tma(*matrices: Tensor) -> bool:
    """Whether each begins at a multiple of 16 bytes, and each of its rows too, whose columns lie side by side."""
    return all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 and t.stride(1) == 1 for t in matrices
    )


def gemm_persistent(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    blocks: bool = False,
    block_m: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    group_m: int = 8,
    subtiles: int = 1,
    tma: int = 1,
    promote: int = 0,
    programs: int = 132,
    num_warps: int = 8,
    num_stages: int = 4,
) -> Launch:
    """x [M, K] @ w [N, K]^T, both e4m3 or both int8, times their scales, into out [M, N] bf16, fp16 or float32.

    Scales and blocks are those of `gemm_swap_ab`. Where the memory accelerator can't read x or w, pointers do.
    """
    n, k = w.shape
    m, _ = expect_sizes(x, out, (1, n, k), bias, None)
    expect(x=(x, (m, k)), w=(w, (n, k)), out=(out, m * n))
    accelerated = bool(tma) and m > 0 and fits_tma(x, w)
    if accelerated and out.dtype == torch.float32 and block_n == 256:
        num_stages = min(num_stages, 3)  # on its way out a tile lies in shared memory beside them
    if k % 16:  # rows begin anywhere: codes come byte by byte through registers, of which large tiles have none left
        block_m = 64
        block_n = 64
        block_k = 64
        subtiles = 1
        num_warps = 4
    scales = scale_arguments(x, w, x_scale, w_scale, blocks=blocks, block_n=block_n, block_k=block_k)
    tiles = cdiv(m, block_m) * cdiv(n, block_n)
    return Launch(
        _gemm_persistent,
        (min(programs, tiles),),
        {
            "x": TensorDescriptor.from_tensor(x, [block_m, block_k]) if accelerated else x,
            "w": TensorDescriptor.from_tensor(w, [block_n, block_k]) if accelerated else w,
            **scales,
            "bias": bias,
            "out": out,
            "M": m,
            "N": n,
            "K": k,
            "PROGRAMS": programs,
            "TMA": accelerated,
            "INT8": x.dtype == torch.int8,
            "PROMOTE": bool(promote),
            "GROUP_M": group_m,
            "SUBTILES": subtiles,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )
