"""Triton body of GEMMs with weights of 2 to 4 bits (`packing`) and tokens of bf16, fp16 or e4m3.

out [M, N] = x [M, K] * x_scale @ ((codes [N, K] - zero point) * scale)^T + bias: `int4.reference.linear`.

Hopper's tensor core takes its first factor from registers, so the weight is the first: acc [N, M] += w [N, K] @ x^T,
stored transposed, and decoded weights never go through shared memory. What is multiplied are exact integers; a group's
sum is then scaled in float32. Scaling before would cost more instructions and round, and makes the assembler serialize
the products. A slice of 32 columns (16 with 2 bits) is one product, so groups of 32 and 64 fit into tiles of 128 and
have sums of their own.

K may be split: float32 sums [S, M, N], each with the scales, split 0 with the bias, which the next kernel or
`norm.gpu.split_k_sum` adds up. Sums of e4m3 inside the tensor core keep some 14 bits, of a group at most.

Limit on an H100: N * K / 2 bytes over 3.0 TB/s up to some 64 tokens (112 of e4m3), then 2 * M * N * K operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gemm.gpu.gemm_swap_ab import store_transposed
from octavo.kernels.int4.gpu.decode import E4M3_ONE, decode_field, integers, scale_type, scales, split
from octavo.kernels.int4.gpu.packing import TILE, PackedInt4
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import PREFETCH_TOKENS, await_previous, group_lines, prefetch, tile_lines
from octavo.kernels.launching.launch import Launch, cdiv
from octavo.kernels.launching.numerics import dot


@triton.jit(do_not_specialize_on_alignment=["M"])
def _w4a16_gemm(
    x,
    words,
    scale,
    x_scale,
    bias,
    out,
    M,
    N,
    K,
    x_row,
    tiles,
    tiles_of_part,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    first_m, first_n = tile_offsets(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    part = tl.program_id(1)
    WIDTH: tl.constexpr = 8 * BITS
    first = part * tiles_of_part
    if OVERLAPS and BLOCK_M <= PREFETCH_TOKENS:
        prefetch(tile_lines(words, first, tiles, first_n, N, WIDTH, BLOCK_N))
        prefetch(group_lines(scale, first, tiles, first_n, N, 128, GROUP_SIZE, BLOCK_N))
    await_previous(OVERLAPS)
    # Rows of the weight past the end repeat the last one, and are never stored; tokens past the end aren't read.
    n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)
    m = tl.arange(0, BLOCK_M)
    i = tl.arange(0, WIDTH)
    words_at = words + first_n.to(tl.int64) * WIDTH + (n[:, None] * WIDTH + i[None, :])
    x_at = x + first_m.to(tl.int64) * x_row + (m[:, None] * x_row + i[None, :])
    scale += first_n + n
    all_rows = tl.cast(N, tl.int64)
    end = tl.minimum(first + tiles_of_part, tiles)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    coming = scales(scale, tl.minimum(first, tiles - 1), all_rows, GROUP_SIZE)
    for tile in range(first, end):
        w = tl.load(words_at + tile * (all_rows * WIDTH))
        if SCALE is None:  # no product hangs on them, so the compiler doesn't copy them ahead: here, by one tile
            current = coming
            coming = scales(scale, tl.minimum(tile + 1, tiles - 1), all_rows, GROUP_SIZE)
        else:
            current = scales(scale, tile, all_rows, GROUP_SIZE)
        acc = _tile(
            acc, w, x_at + tile * 128, m[:, None] < M - first_m, K - tile * 128, current, BITS, GROUP_SIZE, SCALE, EVEN
        )
    if HAS_X_SCALE:
        unit: tl.constexpr = E4M3_ONE if x.dtype.element_ty == tl.float8e4nv else 1.0
        acc *= unit * tl.load(x_scale + first_m + m, mask=m < M - first_m, other=0.0)[None, :]
    if HAS_BIAS and part == 0:
        acc += tl.load(bias + first_n + n).to(tl.float32)[:, None]
    store_transposed(acc, out, part, first_m, first_n, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def tile_offsets(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The first token and row of a program's tile; GROUP_M tiles of tokens go through the weight together."""
    program = tl.program_id(0)
    if GROUP_M == 1:
        row = tl.program_id(2)
        column = program
    else:
        columns = tl.cdiv(N, BLOCK_N)
        group = program // (GROUP_M * columns)
        height = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
        inside = program - group * GROUP_M * columns
        row = group * GROUP_M + inside % height
        column = inside // height
    return row * BLOCK_M, column * BLOCK_N


@triton.jit
def _tile(
    acc,
    words,
    x_at,
    present,
    columns,
    current,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """acc + a tile of 128 columns, whose groups' sums of exact integers are scaled one after the other.

    x [BLOCK_M, 128] is read a slice at a time: nothing cuts a tile in registers.
    """
    WIDTH: tl.constexpr = 8 * BITS
    GROUPS: tl.constexpr = 128 // GROUP_SIZE if GROUP_SIZE < 128 else 1
    SLICES: tl.constexpr = 128 // WIDTH // GROUPS
    i = tl.arange(0, WIDTH)
    for g in tl.static_range(GROUPS):
        total = tl.zeros_like(acc)
        if SCALE is None:
            step = current[g].to(tl.float32)
            zero = None
        else:
            step, zero = split(current[g], SCALE)
            zero = zero[:, None]
        for s in tl.static_range(SLICES):
            at = (g * SLICES + s) * WIDTH
            tokens = tl.load(x_at + at, mask=present if EVEN else present & (i < columns - at)[None, :], other=0.0)
            total = dot(decode_field(words, zero, g * SLICES + s, BITS, tokens.dtype), tokens.T, total)
        acc += total * step[:, None]
    return acc


def w4a16_gemm(
    x: Tensor,
    packed: PackedInt4,
    out: Tensor,
    x_scale: Tensor | None = None,
    *,
    block_m: int = 16,
    block_n: int = 64,
    group_m: int = 1,
    num_warps: int = 4,
    num_stages: int = 4,
) -> Launch:
    """x [M, columns], as the packed weight has ordered them, times the weight.

    x        bf16 or fp16; or, for 4 bits, e4m3 with x_scale [M] or [M, 1] float32
    out      [M, N] bf16, fp16 or float32; or [S, M, N] float32, sums over S parts of K
    group_m  tiles of tokens that go through the weight together: 1 where there is only one
    """
    m, k = x.shape
    n = packed.shape[0]
    if k != packed.columns or x.stride(1) != 1:
        raise ValueError(f"x has {k} columns of stride {x.stride(1)}, not {packed.columns} side by side")
    fp8 = x.dtype == torch.float8_e4m3fn
    if x.dtype not in (torch.bfloat16, torch.float16) and not (fp8 and x_scale is not None and packed.bits == 4):
        raise ValueError(f"x of {x.dtype} {'with' if x_scale is not None else 'without'} scales, {packed.bits} bits")
    split_k = out.shape[0] if out.dim() == 3 else 1
    expect(x_scale=(x_scale, m), out=(out, (split_k, m, n) if out.dim() == 3 else (m, n)))
    tiles = packed.words.shape[0]
    rows = cdiv(m, block_m)
    columns = cdiv(n, block_n)
    return Launch(
        _w4a16_gemm,
        (columns, split_k, rows) if group_m == 1 else (rows * columns, split_k),
        {
            "x": x,
            "words": packed.words,
            "scale": integers(packed.scale),
            "x_scale": packed.scale if x_scale is None else x_scale,
            "bias": packed.scale if packed.bias is None else packed.bias,
            "out": out,
            "M": m,
            "N": n,
            "K": k,
            "x_row": x.stride(0),
            "tiles": tiles,
            "tiles_of_part": cdiv(tiles, split_k),
            "BITS": packed.bits,
            "GROUP_SIZE": packed.group_size,
            "SCALE": scale_type(packed.scale),
            "HAS_X_SCALE": x_scale is not None,
            "HAS_BIAS": packed.bias is not None,
            "EVEN": k % TILE == 0,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "GROUP_M": group_m,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )
