"""Triton body of grouped GEMMs with 4-bit weights and tokens of bf16, fp16 or e4m3, and the layout of experts' weights.

out[pair] = x[pair // divisor] @ ((codes - zero) * scale)^T (* router[pair]), for pairs as `route.align` sorts them. As
in `int4.gpu`: the weight's rows are the tensor core's (acc [N, M], however many pairs), so that its numbers go from
registers into the instruction; a tile of 128 columns is four slices of 32, each one field of all words; the sums of
exact integers over a group are scaled once. Scales, and zero points, are read a tile ahead of their use: as so few
bytes for a thread they aren't what the compiler copies ahead of the loop.
Reference: `int4.reference.linear` for each expert. Limit: the bytes of the experts that are hit, 4.25 bits a weight in
groups of 128 with float32 scales, over 3.0 TB/s on an H100; from some 70 pairs an expert, the tensor core's bf16 rate.
e4m3 tokens have a scale for each row; sums of them inside the tensor core keep some 14 bits, of a group at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.int4.gpu import packing
from octavo.kernels.int4.gpu.decode import E4M3_ONE, decode_field
from octavo.kernels.launching.checks import expect, refuse
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv
from octavo.kernels.launching.numerics import dot
from octavo.kernels.moe.gpu.grouped import pair_arguments, store, tile_offsets, tokens_of
from octavo.kernels.moe.gpu.permute_columns import expect_order, in_order, put_back
from octavo.kernels.moe.gpu.route import Aligned
from octavo.kernels.packed_weight import PackedWeight, present


@dataclass(frozen=True)
class PackedExperts(PackedWeight):
    """Weights [E, N, K] of 4 bits, as `int4.gpu.packing` lays out one.

    words  [E, tiles, N, 32] int16
    scale  [E, groups, N] float32; after the last group zeros up to whole tiles
    zero   None when symmetric, else [E, groups, N] float32: the zero points as fields, 0..16
    group_size  columns that share a scale: 32, 64 or a multiple of 128
    k      columns
    fp8    tokens are to be rounded to e4m3, by rows
    order  None, or which column of the weight, and so of a token, is where (act-order): as `expect_order` has it
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int
    k: int
    order: Tensor | None = None
    fp8: bool = False

    def __post_init__(self) -> None:
        e, n, _ = self.shape
        tiles = cdiv(self.k, packing.TILE)
        groups = (
            tiles * (packing.TILE // self.group_size)
            if self.group_size < packing.TILE
            else cdiv(self.k, self.group_size)
        )
        expect(
            words=(self.words, (e, tiles, n, 32)),
            scale=(self.scale, (e, groups, n)),
            zero=(self.zero, (e, groups, n)),
        )
        expect_order(self.order, e, self.k)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K) of the weights."""
        return self.words.shape[0], self.words.shape[2], self.k

    def tensors(self) -> tuple[Tensor, ...]:
        return present(self.words, self.scale, self.zero, self.order)

    def unpack(self) -> Tensor:
        slices = [(self.words >> (4 * j)) & 15 for j in range(4)]
        fields = torch.stack(slices, 3).permute(0, 2, 1, 3, 4).flatten(2)[:, :, : self.k].float()  # [E, N, K]
        group = torch.arange(self.k, device=fields.device) // self.group_size
        zero = 8.0 if self.zero is None else self.zero[:, group].mT
        return put_back((fields - zero) * self.scale[:, group].mT, self.order)


def pack(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    g_idx: Tensor | None = None,
    *,
    fp8: bool = False,
) -> PackedExperts:
    """Lay out codes [E, N, K] int8, -8..7, with scale and zero_point [E, N, G] of groups of group_size columns.

    group_size  32, 64 or a multiple of 128, or K; the last group may be short
    g_idx       [E, K]: the group of each column, if they aren't in order; each group has group_size columns, as above
    """
    num_experts, n, k = codes.shape
    groups = (num_experts, n, cdiv(k, group_size))
    for name, values in (("scale", scale), ("zero_point", zero_point)):
        if values is not None and values.shape != groups:
            refuse(name, values, groups)
    group_size = cdiv(k, packing.TILE) * packing.TILE if group_size >= k else group_size
    if group_size not in (32, 64) and group_size % packing.TILE:
        raise ValueError(f"groups of {group_size} columns cross tiles of {packing.TILE}")
    codes, order = in_order(codes, g_idx, group_size)
    one = codes.new_zeros(k, dtype=torch.int64)
    words = [packing.pack(e, scale.new_ones(e.shape[0], 1), None, one).words for e in codes]
    tiles = cdiv(k, packing.TILE)
    rows = max(tiles * packing.TILE // group_size, 1) if group_size < packing.TILE else scale.shape[2]

    def by_group(values: Tensor) -> Tensor:
        out = values.new_zeros(num_experts, rows, values.shape[1], dtype=torch.float32)
        out[:, : values.shape[2]] = values.mT
        return out

    zero = None if zero_point is None else by_group(zero_point.float() + 8)
    return PackedExperts(torch.stack(words), by_group(scale), zero, group_size, k, order, fp8)


@triton.jit
def _of_tile(table, tile, N, GROUP_SIZE: tl.constexpr):
    """What a table [groups, N] holds for the groups of a tile of 128 columns."""
    found = ()
    for g in tl.static_range(128 // GROUP_SIZE if GROUP_SIZE < 128 else 1):
        group = tile * (128 // GROUP_SIZE) + g if GROUP_SIZE < 128 else tile // (GROUP_SIZE // 128)
        found += (tl.load(table + group * N),)  # type: ignore[assignment]
    return found


@triton.jit
def _add_tile(
    acc, words, x_at, columns, scales, zeros, HAS_ZERO: tl.constexpr, GROUP_SIZE: tl.constexpr, EVEN: tl.constexpr
):
    """acc + a tile of 128 columns."""
    GROUPS: tl.constexpr = 128 // GROUP_SIZE if GROUP_SIZE < 128 else 1
    i = tl.arange(0, 32)
    for g in tl.static_range(GROUPS):
        total = tl.zeros_like(acc)
        for s in tl.static_range(g * (4 // GROUPS), (g + 1) * (4 // GROUPS)):
            if EVEN:
                tokens = tl.load(x_at + s * 32)
            else:
                tokens = tl.load(x_at + s * 32, mask=(i < columns - s * 32)[None, :], other=0.0)
            zero = zeros[g][:, None] if HAS_ZERO else None
            total = dot(decode_field(words, zero, s, 4, tokens.dtype), tokens.T, total)
        acc += total * scales[g][:, None]
    return acc


@triton.jit(do_not_specialize_on_alignment=["num_pairs", "num_tiles"])
def _grouped_int4(
    x,
    words,
    scale,
    zero,
    x_scale,
    router,
    order,
    tile_expert,
    out,
    num_pairs,
    num_tiles,
    N,
    K,
    tiles,
    groups,
    DIVISOR: tl.constexpr,
    HAS_ROUTER: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    tile, first_n = tile_offsets(num_tiles, N, BLOCK_N, GROUP_M)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    pair, real, row = tokens_of(order, tile, num_pairs, DIVISOR, BLOCK_M)
    i = tl.arange(0, 32)
    n = first_n + tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)  # past the end the last row again, never stored
    x_at = x + row[:, None] * K + i[None, :]
    words_at = words + expert * tiles * N * 32 + (n[:, None] * 32 + i[None, :])
    scale += expert * groups * N + n
    zero += expert * groups * N + n
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    scales = _of_tile(scale, 0, N, GROUP_SIZE)
    zeros = _of_tile(zero, 0, N, GROUP_SIZE) if HAS_ZERO else scales
    for at in range(tiles):
        coming = tl.minimum(at + 1, tiles - 1)
        next_scales = _of_tile(scale, coming, N, GROUP_SIZE)
        next_zeros = _of_tile(zero, coming, N, GROUP_SIZE) if HAS_ZERO else next_scales
        acc = _add_tile(
            acc, tl.load(words_at), x_at + at * 128, K - at * 128, scales, zeros, HAS_ZERO, GROUP_SIZE, EVEN
        )
        words_at += N * 32
        scales = next_scales
        zeros = next_zeros
    if x.dtype.element_ty == tl.float8e4nv:
        acc *= tl.load(x_scale + row)[None, :] * E4M3_ONE
    if HAS_ROUTER:
        acc *= tl.load(router + pair, mask=real, other=0.0)[None, :]
    store(acc, out, pair, real, first_n, N, True, BLOCK_N)


def grouped_int4(
    x: Tensor,
    packed: PackedExperts,
    pairs: Aligned,
    out: Tensor,
    *,
    divisor: int,
    router: Tensor | None = None,
    x_scale: Tensor | None = None,
    block_n: int = 64,
    group_m: int = 8,
    num_warps: int = 4,
    num_stages: int = 4,
) -> Launch:
    """x [tokens or pairs, K] bf16, fp16 or e4m3 @ the weight of each pair's expert, transposed, into out [pairs, N].

    divisor  pairs for each row of x
    router   float32, a number for each pair, multiplied to its row
    x_scale  float32 [tokens or pairs, 1], where x is e4m3
    """
    if (x_scale is None) != (x.dtype != torch.float8_e4m3fn):
        raise ValueError(f"a grouped GEMM of {x.dtype} with{'out' if x_scale is None else ''} x_scale")
    expect(x_scale=(x_scale, (x.shape[0], 1)))
    arguments = pair_arguments(x, packed.shape, pairs, out, divisor, router)
    _, n, k = packed.shape
    if (
        packed.group_size < 128 and pairs.block_m > 64
    ):  # each tile has several groups' scales in registers: 128 rows spill
        block_n = min(block_n, 64)
    return Launch(
        _grouped_int4,
        (len(pairs.tile_expert) * cdiv(n, block_n),),
        {
            **arguments,
            "words": packed.words,
            "scale": packed.scale,
            "zero": packed.scale if packed.zero is None else packed.zero,
            "x_scale": out if x_scale is None else x_scale,
            "tiles": packed.words.shape[1],
            "groups": packed.scale.shape[1],
            "HAS_ZERO": packed.zero is not None,
            "GROUP_SIZE": packed.group_size,
            "EVEN": k % packing.TILE == 0,
            "GROUP_M": group_m,
            "BLOCK_N": block_n,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )
