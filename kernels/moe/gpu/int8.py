"""Triton body of grouped GEMMs with int8 or e4m3 weights and bf16 or fp16 tokens, and the experts' layout.

out[pair] = x[pair // divisor] @ ((codes - zero) * scale)^T (* router[pair]), for pairs as `route.align` sorts them. As
in `gemm.gpu.w8a16_gemm`, the weight's rows are the tensor core's (acc [N, M], however many pairs), words of two bytes
are decoded in registers, and the sums of exact integers over a group are scaled once.
Reference: `int4.reference.linear` for each expert. Limit: the bytes of the experts that are hit over 3.0 TB/s on an
H100; from some 130 pairs an expert, the tensor core's bf16 rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gemm.gpu import w8a16_gemm as one_layer
from octavo.kernels.gemm.gpu.w8a16_gemm import dequantize, subtract_zero_point
from octavo.kernels.launching.checks import expect, refuse
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv
from octavo.kernels.launching.numerics import dot
from octavo.kernels.moe.gpu.grouped import pair_arguments, store, tile_offsets, tokens_of
from octavo.kernels.moe.gpu.permute_columns import expect_order, in_order, put_back
from octavo.kernels.moe.gpu.route import Aligned
from octavo.kernels.packed_weight import PackedWeight, present


@dataclass(frozen=True)
class ByteExperts(PackedWeight):
    """Weights [E, N, K] of 8 bits, as `gemm.gpu.w8a16_gemm` lays out one.

    words       [E, tiles, N, TILE / 2] int16
    scale       [E, groups, N] float32
    zero        None when symmetric, else [E, groups, N] int8
    k           columns
    group_size  columns that share a scale, a multiple of TILE; 0: all of a row
    order       None, or which column of the weight, and so of a token, is where: as `expect_order` has it
    is_e4m3     what the bytes of words are; else they are int8
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    k: int
    group_size: int
    order: Tensor | None = None
    is_e4m3: bool = False

    def __post_init__(self) -> None:
        e, n, _ = self.shape
        tiles = cdiv(self.k, 2 * self.words.shape[3])
        half = self.words.shape[3]
        groups = cdiv(self.k, self.group_size) if self.group_size else 1
        expect(
            words=(self.words, (e, tiles, n, half)),
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
        tables = [None] * len(self.words) if self.zero is None else self.zero
        rows = zip(self.words, self.scale, tables, strict=True)
        layers = [one_layer.Packed(w, s, z, None, self.k, self.group_size, self.is_e4m3) for w, s, z in rows]
        return put_back(torch.stack([layer.unpack() for layer in layers]), self.order)


def pack(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, g_idx: Tensor | None = None
) -> ByteExperts:
    """Lay out codes [E, N, K] int8 or e4m3 with scale and zero_point [E, N, G] of groups of group_size columns.

    group_size  a multiple of 32, or K; the last group may be short
    g_idx       [E, K]: the group of each column, if they aren't in order; each group has group_size columns, as above
    """
    num_experts, n, k = codes.shape
    groups = (num_experts, n, cdiv(k, group_size))
    for name, values in (("scale", scale), ("zero_point", zero_point)):
        if values is not None and values.shape != groups:
            refuse(name, values, groups)
    codes, order = in_order(codes, g_idx, group_size)
    size = -1 if group_size >= k else group_size
    layers = [one_layer.pack(e, s, size) for e, s in zip(codes, scale.float(), strict=True)]
    zero = None if zero_point is None else zero_point.to(torch.int8).mT.contiguous()
    words, scales = (torch.stack(tensors) for tensors in zip(*((x.words, x.scale) for x in layers), strict=True))
    return ByteExperts(words, scales, zero, k, layers[0].group_size, order, layers[0].is_e4m3)


@triton.jit(do_not_specialize_on_alignment=["num_pairs", "num_tiles"])
def _grouped_int8(
    x,
    words,
    scale,
    zero,
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
    E4M3: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
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
    dtype: tl.constexpr = x.dtype.element_ty
    HALF: tl.constexpr = TILE // 2
    pair, real, row = tokens_of(order, tile, num_pairs, DIVISOR, BLOCK_M)
    k = tl.arange(0, HALF)
    n = first_n + tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)  # past the end the last row again, never stored
    x_at = x + row[None, :] * K + k[:, None]
    words_at = words + expert * tiles * N * HALF + (n[:, None] * HALF + k[None, :])
    scale += expert * groups * N + n
    zero += expert * groups * N + n
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for each in range(tiles):
        at = each * TILE
        group = at // GROUP * N if GROUP else 0
        low, high = dequantize(tl.load(words_at), dtype, E4M3)
        if HAS_ZERO:
            low, high = subtract_zero_point(low, high, tl.load(zero + group), dtype)
        total = dot(low, tl.load(x_at + at, mask=(k < K - at)[:, None], other=0.0))
        total = dot(high, tl.load(x_at + at + HALF, mask=(k < K - at - HALF)[:, None], other=0.0), total)
        if GROUP:
            total *= tl.load(scale + group)[:, None]
        acc += total
        words_at += N * HALF
    if not GROUP:
        acc *= tl.load(scale)[:, None]
    if HAS_ROUTER:
        acc *= tl.load(router + pair, mask=real, other=0.0)[None, :]
    store(acc, out, pair, real, first_n, N, True, BLOCK_N)


def grouped_int8(
    x: Tensor,
    packed: ByteExperts,
    pairs: Aligned,
    out: Tensor,
    *,
    divisor: int,
    router: Tensor | None = None,
    block_n: int = 64,
    group_m: int = 8,
    num_warps: int = 4,
    num_stages: int = 4,
) -> Launch:
    """x [tokens or pairs, K] bf16 or fp16 @ the weight of each pair's expert, transposed, into out [pairs, N].

    divisor  pairs for each row of x
    router   float32, a number for each pair, multiplied to its row
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"weights of 8 bits times {x.dtype}: bfloat16 and float16 work")
    arguments = pair_arguments(x, packed.shape, pairs, out, divisor, router)
    return Launch(
        _grouped_int8,
        (len(pairs.tile_expert) * cdiv(packed.shape[1], block_n),),
        {
            **arguments,
            "words": packed.words,
            "scale": packed.scale,
            "zero": packed.words if packed.zero is None else packed.zero,
            "tiles": packed.words.shape[1],
            "groups": packed.scale.shape[1],
            "E4M3": packed.is_e4m3,
            "HAS_ZERO": packed.zero is not None,
            "GROUP": packed.group_size,
            "TILE": 2 * packed.words.shape[3],
            "GROUP_M": group_m,
            "BLOCK_N": block_n,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )
