"""The Triton body of GEMMs of a linear layer or of a mixture's experts, for every way in which a weight is stored.

out [M, N] = (x [M, K] * x_scale) @ w [N, K]^T + bias; of experts out[pair] = router[pair] * x[pair // divisor] @
w[expert]^T, for pairs sorted by expert (`moe.gpu.route.align`). STORAGE says what w is:

    codes            numbers that the tensor core takes as they are, of x's type: e4m3 or int8, with scales of rows or
                     blocks, or bf16 or fp16 without
    2 bits, 4 bits   fields of words (`packing`), decoded in registers to x's type by `int4.gpu.decode`
    int8, e4m3       bytes of words, likewise by `int8.gpu.decode`

The tensor core multiplies at least 64 rows, and takes its first factor from registers. So the weight's rows are its
rows and the tokens its columns (at least 16): acc [N, M] += w [N, K] @ x [M, K]^T, stored transposed. The other way
round 16 tokens would be widened to fp16 and run on Ampere's instructions, and decoded weights would go through shared
memory. Codes of more than SWAPPED pairs an expert alone are multiplied the other way round.

Decoded weights are exact integers, and a group's sum is scaled in float32: scaling before would cost more instructions,
round, and make the assembler serialize the products. Sums of e4m3 inside the tensor core keep some 14 bits, so each
tile of codes, and each group of decoded ones, is added to a float32 accumulator; those of int8 are exact in int32.

K may be split, for a matrix whose rows alone don't fill the GPU. Each split stores float32 sums [S, M, N] that include
the scales (and in split 0 the bias): the next kernel adds them up (`norm.gpu.norm`), or `norm.gpu.split_k_sum` does,
always in the same order. A mixture's programs are fixed in number; one whose tile isn't used ends at once, so that an
expert without tokens is never read.

References: the product of what codes stand for (`fp8.reference`, `int8.reference`), `int4.reference.linear`, for each
expert as `moe.reference.grouped` has it. Limit on an H100: bytes of the weight, of experts those that are hit, over
3.0 TB/s for few tokens; for many 2 * M * N * K operations over 989 T/s, 1979 of 8-bit codes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gemm.gpu.arguments import Experts, Pairs, Scales, expect_sizes, scale_arguments
from octavo.kernels.gemm.gpu.packing import PackedWords
from octavo.kernels.int4.gpu.decode import E4M3_ONE, decode_field, integers, scale_type, scales_of_tile, split
from octavo.kernels.int8.gpu.decode import decode_byte
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import (
    PREFETCH_TOKENS,
    await_previous,
    group_lines,
    prefetch,
    row_lines,
    tile_lines,
)
from octavo.kernels.launching.launch import Launch, cdiv
from octavo.kernels.launching.numerics import dot, narrow

NARROW = 64  # rows of the weight in a program where each has scales of its own: of 128, registers spill
SWAPPED = 32  # pairs in a tile at the most for which the weight's rows are the tensor core's


@triton.jit
def multiply(a, b, acc, PROMOTE: tl.constexpr):
    """acc + a @ b: exact in int32 for int8 codes; in float32, or in what the tensor core keeps, for floats."""
    if a.dtype == tl.int8:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif PROMOTE:
        acc += dot(a, b)
    else:
        acc = dot(a, b, acc)
    return acc


@triton.jit
def scaled(total, row, column, TOGETHER: tl.constexpr):
    """total * row * column, rounded twice: TOGETHER, the product of both scales first."""
    return total * (row * column) if TOGETHER else total * row * column


@triton.jit
def along(values, FIRST: tl.constexpr):
    """A vector along the first axis of a matrix, or along the second one."""
    return values[:, None] if FIRST else values[None, :]


@triton.jit
def tile_offsets(index, rows, N, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Which tile of tokens, of so many, and which first row of the weight: down GROUP_M tiles before it goes right."""
    columns = tl.cdiv(N, BLOCK_N)
    above = index // (GROUP_M * columns) * GROUP_M
    height = tl.minimum(rows - above, GROUP_M)
    inside = index % (GROUP_M * columns)
    return above + inside % height, inside // height * BLOCK_N


@triton.jit(do_not_specialize_on_alignment=["M", "num_tiles", "x_scale_group"])
def _gemm_swap_ab(
    x,
    w,
    scales,
    bias,
    experts,
    out,
    M,
    N,
    K,
    x_row,
    num_tiles,
    columns,
    x_scale_group,
    STORAGE: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    DIVISOR: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if GROUP_M == 1:
        tile_m = tl.program_id(2)
        first_n = tl.program_id(0) * BLOCK_N
    else:
        rows = tl.cdiv(M, BLOCK_M) if num_tiles is None else num_tiles
        tile_m, first_n = tile_offsets(tl.program_id(0), rows, N, BLOCK_N, GROUP_M)
    part = tl.program_id(1)
    first = part * columns
    BITS: tl.constexpr = 2 if STORAGE == "2 bits" else 4 if STORAGE == "4 bits" else 8
    WIDTH: tl.constexpr = TILE if STORAGE == "codes" else TILE * BITS // 16
    w_row = K if STORAGE == "codes" else WIDTH
    # Rows and tokens past the end repeat the last one: read from the cache, and never stored.
    n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)
    w_scale = scales.w_scale
    if SCALES != "none":
        w_scale += (first_n // 128 if SCALES == "blocks" else first_n + n) * scales.w_scale_row
    if OVERLAPS and BLOCK_M <= PREFETCH_TOKENS and experts.order is None:
        if STORAGE == "codes":
            prefetch(row_lines(w, first, first_n, N, K, BLOCK_N))
            prefetch(w_scale)
        else:
            tiles = tl.cdiv(K, TILE)
            prefetch(tile_lines(w, first // TILE, tiles, first_n, N, WIDTH, BLOCK_N))
            prefetch(group_lines(scales.w_scale, first // TILE, tiles, first_n, N, TILE, GROUP, BLOCK_N))
    await_previous(OVERLAPS)
    first_m = tile_m * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    if experts.order is None:
        real = m < M - first_m
        row = tl.minimum(m, M - 1 - first_m)
        token = first_m + row
        x += first_m.to(tl.int64) * x_row
        out += (part.to(tl.int64) * M + first_m) * N
        to = m
    else:
        expert = tl.load(experts.tile_expert + tile_m).to(tl.int64)
        if expert < 0:
            return
        pair = tl.load(experts.order + first_m + m)
        real = pair < M
        row = tl.where(real, pair // DIVISOR, 0).to(tl.int64)
        token = row
        w += expert * experts.expert_stride
        if SCALES != "none":
            w_scale += expert * experts.scale_stride
        to = pair.to(tl.int64)
    i = tl.arange(0, WIDTH)
    w_at = w + first_n.to(tl.int64) * w_row + (n[:, None] * w_row + i[None, :])
    x_at = x + (row[:, None] * x_row + i[None, :])
    end = tl.minimum(K, first + columns)
    if STORAGE == "codes":
        x_scale = scales.x_scale
        if SCALES != "none":
            x_scale += token * scales.x_scale_row
        TOGETHER: tl.constexpr = experts.order is not None
        total = _sum_of_codes(
            x_at, w_at, x_scale, w_scale, first, end, K, x_scale_group, scales.w_scale_group, SCALES, SWAP, TOGETHER
        )
        if SCALES == "rows":
            total = scaled(total, along(tl.load(w_scale), SWAP), along(tl.load(x_scale), not SWAP), TOGETHER)
    else:
        total = _sum_of_words(x_at, w_at, w_scale, first, end, N, K, STORAGE, SCALE, GROUP, EVEN, TILE)
        if scales.x_scale is not None:
            unit: tl.constexpr = E4M3_ONE if x.dtype.element_ty == tl.float8e4nv else 1.0
            total *= unit * tl.load(scales.x_scale + token * scales.x_scale_row)[None, :]
    if bias is not None and part == 0:
        total += tl.load(bias + first_n + n).to(tl.float32)[:, None]
    if experts.router is not None:
        total *= along(tl.load(experts.router + to, mask=real, other=0.0), not SWAP)
    at = along(to * N, not SWAP) + along(first_n + tl.arange(0, BLOCK_N), SWAP)
    seen = along(real, not SWAP) & along(tl.arange(0, BLOCK_N) < N - first_n, SWAP)
    tl.store(out + at, narrow(total, out.dtype.element_ty), mask=seen)


@triton.jit
def _sum_of_codes(
    x_at,
    w_at,
    x_scale,
    w_scale,
    first,
    end,
    K,
    x_scale_group,
    w_scale_group,
    SCALES: tl.constexpr,
    SWAP: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The product of columns first .. end of x [BLOCK_M, K] and w [BLOCK_N, K], with scales but those of rows."""
    TILE: tl.constexpr = x_at.shape[1]
    k = tl.arange(0, TILE)
    sums: tl.constexpr = tl.int32 if w_at.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros((w_at.shape[0], x_at.shape[0]) if SWAP else (x_at.shape[0], w_at.shape[0]), sums)
    for at in range(first, end, TILE):
        seen = (k < K - at)[None, :]
        a = tl.load(w_at + at, mask=seen, other=0.0)
        b = tl.load(x_at + at, mask=seen, other=0.0)
        if not SWAP:
            a, b = b, a
        if SCALES == "blocks":
            step = tl.load(x_scale + at // 128 * x_scale_group) * tl.load(w_scale + at // 128 * w_scale_group)
            acc += dot(a, b.T) * along(step, not SWAP)
        elif SCALES == "rows of blocks":
            step = tl.load(x_scale + at // 128 * x_scale_group)
            own = tl.load(w_scale + at // 128 * w_scale_group)
            acc += scaled(dot(a, b.T), along(own, SWAP), along(step, not SWAP), not TOGETHER)
        else:
            acc = multiply(a, b.T, acc, SCALES == "rows")
    return acc.to(tl.float32)


@triton.jit
def _sum_of_words(
    x_at,
    w_at,
    scale,
    first,
    end,
    N,
    K,
    STORAGE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    TILE: tl.constexpr,
):
    """The product of columns first .. end of x [BLOCK_M, K] and the weight that words stand for, scales included."""
    acc = tl.zeros((w_at.shape[0], x_at.shape[0]), tl.float32)
    # Of e4m3, pointers that move spill in tiles of 128 x 128; of 16 bits, those that stay beside an offset that moves.
    MOVES: tl.constexpr = x_at.dtype.element_ty != tl.float8e4nv
    ahead = (first // TILE).to(tl.int64) * N * w_at.shape[1]
    if MOVES:
        w_at += ahead
    last = (K - 1) // TILE * TILE
    coming = scales_of_tile(scale, tl.minimum(first, last), N, GROUP, TILE)
    for at in range(first, end, TILE):
        if GROUP == 0:
            current = coming
        elif SCALE is None:  # no product hangs on them, so the compiler doesn't copy them ahead: here, by one tile
            current = coming
            coming = scales_of_tile(scale, tl.minimum(at + TILE, last), N, GROUP, TILE)
        else:
            current = scales_of_tile(scale, at, N, GROUP, TILE)
        acc = _add_words(
            acc, tl.load(w_at if MOVES else w_at + ahead), x_at + at, K - at, current, STORAGE, SCALE, GROUP, EVEN
        )
        if MOVES:
            w_at += N * w_at.shape[1]
        else:
            ahead += N * w_at.shape[1]
    if GROUP == 0:
        acc *= (coming[0].to(tl.float32) if SCALE is None else split(coming[0], SCALE)[0])[:, None]
    return acc


@triton.jit
def _add_words(
    acc,
    words,
    x_at,
    columns,
    current,
    STORAGE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """acc + a tile of words, whose groups' sums of exact integers are scaled one after the other.

    x [BLOCK_M, TILE] is read a slice at a time: nothing cuts a tile in registers.
    """
    WIDTH: tl.constexpr = words.shape[1]
    BITS: tl.constexpr = 2 if STORAGE == "2 bits" else 4 if STORAGE == "4 bits" else 8
    FIELDS: tl.constexpr = 16 // BITS
    GROUPS: tl.constexpr = FIELDS * WIDTH // GROUP if GROUP > 0 and GROUP < FIELDS * WIDTH else 1
    SLICES: tl.constexpr = FIELDS // GROUPS
    i = tl.arange(0, WIDTH)
    for g in tl.static_range(GROUPS):
        if SCALE is None:
            step = current[g].to(tl.float32)
            zero = None
        else:
            step, zero = split(current[g], SCALE)
            zero = zero[:, None]
        total = tl.zeros_like(acc)
        for s in tl.static_range(SLICES):
            at = (g * SLICES + s) * WIDTH
            seen = None if EVEN else (i < columns - at)[None, :]
            tokens = tl.load(x_at + at, mask=seen, other=None if EVEN else 0.0)
            if BITS == 8:
                numbers = decode_byte(words, zero, g * SLICES + s, STORAGE == "e4m3", tokens.dtype)
            else:
                numbers = decode_field(words, zero, g * SLICES + s, BITS, tokens.dtype)
            total = dot(numbers, tokens.T, total)
        acc += total if GROUP == 0 else total * step[:, None]
    return acc


def _launch(
    arguments: dict[str, Any],
    sizes: tuple[int, int, int],
    split_k: int,
    pairs: Pairs | None,
    *,
    tile: int,
    block_m: int,
    block_n: int,
    group_m: int,
    num_warps: int,
    num_stages: int,
) -> Launch:
    """What both launchers say alike: sizes (M, N, K), tiles of K, and how programs go through the output."""
    m, n, k = sizes
    block_m = block_m if pairs is None else pairs.aligned.block_m
    rows = cdiv(m, block_m) if pairs is None else len(pairs.aligned.tile_expert)
    columns = cdiv(n, block_n)
    return Launch(
        _gemm_swap_ab,
        (columns, split_k, rows) if group_m == 1 else (columns * rows, split_k),
        {
            **arguments,
            "M": m,
            "N": n,
            "K": k,
            "num_tiles": None if pairs is None else rows,
            "columns": cdiv(cdiv(k, tile), split_k) * tile,
            "DIVISOR": 1 if pairs is None else pairs.divisor,
            "EVEN": k % tile == 0,
            "GROUP_M": group_m,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "TILE": tile,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _experts(w: Tensor, scale: Tensor | None, pairs: Pairs | None) -> Experts:
    if pairs is None:
        return Experts()
    strides = w.stride(0), None if scale is None else scale.stride(0)
    return Experts(pairs.aligned.order, pairs.aligned.tile_expert, pairs.router, *strides)


def gemm_swap_ab(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    pairs: Pairs | None = None,
    blocks: bool = False,
    block_m: int = 16,
    block_n: int = 64,
    block_k: int = 128,
    group_m: int = 1,
    num_warps: int = 4,
    num_stages: int = 4,
) -> Launch:
    """x [M, K] @ w [N, K]^T, or of pairs with experts [E, N, K]: both e4m3 or int8, times scales, both bf16, or fp16.

    x_scale   float32 [1], [M] or [M, 1]; of blocks [M, ceil(K / 128)], in any order of memory
    w_scale   float32 [1], [N] or [N, 1]; of blocks [ceil(N / 128), ceil(K / 128)], or of their rows
              [N, ceil(K / 128)]; of experts [E, ...]
    out       [M, N] bf16, fp16 or float32; or [S, M, N] float32, sums over S parts of K; of pairs [pairs, N]
    blocks    128 x 128 blocks of an e4m3 weight, or their rows, and each token's groups of 128, have a scale
    block_m   of pairs, as they are aligned
    """
    if w.dim() != (2 if pairs is None else 3):
        raise ValueError(f"w has the shape {list(w.shape)}: [N, K] of a layer or, with pairs, [E, N, K] works")
    n, k = w.shape[-2:]
    m, split_k = expect_sizes(x, out, (1 if pairs is None else w.shape[0], n, k), bias, pairs)
    expect(x=(x, tuple(x.shape)), w=(w, tuple(w.shape)))
    arguments = scale_arguments(x, w, x_scale, w_scale, blocks=blocks, block_n=block_n, block_k=block_k)
    if pairs is not None and arguments["SCALES"] == "rows of blocks":
        block_n = min(block_n, NARROW)
    return _launch(
        {
            **arguments,
            "x": x,
            "w": w,
            "bias": bias,
            "experts": _experts(w, w_scale, pairs),
            "out": out,
            "x_row": k,
            "STORAGE": "codes",
            "SCALE": None,
            "GROUP": 0,
            "SWAP": pairs is None or pairs.aligned.block_m <= SWAPPED,
        },
        (m, n, k),
        split_k,
        pairs,
        tile=block_k,
        block_m=block_m,
        block_n=block_n,
        group_m=group_m,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def gemm_packed(
    x: Tensor,
    packed: PackedWords,
    out: Tensor,
    x_scale: Tensor | None = None,
    *,
    pairs: Pairs | None = None,
    block_m: int = 16,
    block_n: int = 64,
    group_m: int = 1,
    num_warps: int = 4,
    num_stages: int = 4,
) -> Launch:
    """x [M, columns], as the packed weight has ordered them, times the weight; of pairs, each its expert's.

    x        bf16 or fp16; or, for 4 bits, e4m3 with x_scale float32, a number for each row
    out      [M, N] bf16, fp16 or float32; or [S, M, N] float32, sums over S parts of K; of pairs [pairs, N]
    group_m  tiles of tokens that go through the weight together: 1 where there is only one
    """
    num_experts, n, _ = packed.shape
    k = packed.columns
    if x.shape[1] != k or x.stride(1) != 1:
        raise ValueError(f"x has {x.shape[1]} columns of stride {x.stride(1)}, not {k} side by side")
    is_e4m3 = x.dtype == torch.float8_e4m3fn
    takes = is_e4m3 and x_scale is not None and packed.storage == "4 bits"
    if not (takes or x.dtype in (torch.bfloat16, torch.float16)):
        raise ValueError(
            f"x of {x.dtype} {'with' if x_scale is not None else 'without'} scales, weights of {packed.storage}"
        )
    m, split_k = expect_sizes(x, out, (num_experts, n, k), None, pairs)
    expect(x_scale=(x_scale, x.shape[0]))
    scale = integers(packed.scale)
    if pairs is not None and packed.group_size in (32, 64) and packed.bits < 8 and pairs.aligned.block_m > 64:
        block_n = min(block_n, 64)  # each tile has several groups' scales in registers: 128 rows spill
    return _launch(
        {
            "x": x,
            "w": packed.words,
            "scales": Scales(x_scale, scale, None if x_scale is None else 1, 1, None),
            "bias": packed.bias,
            "experts": _experts(packed.words, scale, pairs),
            "out": out,
            "x_row": x.stride(0),
            "x_scale_group": 0,
            "STORAGE": packed.storage,
            "SCALES": "rows",
            "SCALE": scale_type(packed.scale),
            "GROUP": packed.group_size,
            "SWAP": True,
        },
        (m, n, k),
        split_k,
        pairs,
        tile=packed.tile,
        block_m=block_m,
        block_n=block_n,
        group_m=group_m,
        num_warps=num_warps,
        num_stages=num_stages,
    )
