"""Triton body of a decode step's router: logits, each token's experts, and the pairs sorted by expert, in one launch.

logits[t, e] = x[t] . router[e], in float32; then `route.choose`, then what `route.align` writes. A program multiplies
ROWS tokens, BLOCK_E experts and a part of the columns (experts are the tensor core's rows, tokens its columns) into
its place of partial [PARTS, T, E]. The last of a block of tokens adds the parts up in their order, chooses, and counts
each expert's pairs; the last of those adds up the counts and sorts all pairs by them. Nothing depends on who is last,
so that it is always the same, and no size on what is chosen.
Reference: `moe.reference.route`. Limit: E * H * 2 bytes over 3.0 TB/s on an H100 (Qwen3-30B-A3B 512 KB, Mixtral 64 KB):
less than the latency of what it does one after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous, prefetch
from octavo.kernels.launching.last_block import counters_for, last_block
from octavo.kernels.launching.launch import Launch, cdiv, power_of_two
from octavo.kernels.launching.numerics import dot
from octavo.kernels.moe.gpu.route import Aligned, align, choose, expect_aligned, experts_of, logits_of, route

ROWS = 16  # tokens of a program: the tensor core's least
MOST_EXPERTS = 512  # which a program has side by side when it chooses
COUNTED = 4096  # blocks of tokens times experts that the last program has in registers
SORTED = 1024  # and pairs


class Sizes(NamedTuple):
    """Constants of the kernel.

    ROWS     tokens of a program
    BLOCK_E  experts, and BLOCK_K columns, of a product; LINES of 128 bytes of the weight are prefetched
    CHOSEN   tokens, EXPERTS and CHOICES of each that are side by side when a program chooses
    BLOCKS   of tokens, and WIDTH experts, whose counts are side by side; SORTED pairs
    """

    ROWS: int
    BLOCK_E: int
    BLOCK_K: int
    LINES: int
    CHOSEN: int
    EXPERTS: int
    CHOICES: int
    BLOCKS: int
    WIDTH: int
    SORTED: int


@triton.jit
def _multiply(
    x,
    router,
    partial,
    first_t,
    first_e,
    part,
    num_tokens,
    num_logits,
    hidden,
    columns,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums over a part's columns for ROWS tokens and BLOCK_E logits, stored; past the end the last one again."""
    k = tl.arange(0, BLOCK_K)
    begin = part * columns
    t = first_t + tl.arange(0, ROWS)
    e = first_e + tl.arange(0, BLOCK_E)
    x_at = x + (tl.minimum(t, num_tokens - 1) * hidden)[:, None] + k[None, :]
    router_at = router + (tl.minimum(e, num_logits - 1) * hidden)[:, None] + k[None, :]
    acc = tl.zeros((BLOCK_E, ROWS), tl.float32)
    for at in range(begin, tl.minimum(begin + columns, hidden), BLOCK_K):
        seen = (k < hidden - at)[None, :]
        a = tl.load(router_at + at, mask=seen, other=0.0)
        b = tl.load(x_at + at, mask=seen, other=0.0)
        acc = dot(a, b.T, acc)
    to = (part * num_tokens + t)[:, None] * num_logits + e[None, :]
    tl.store(partial + to, acc.T, mask=(t < num_tokens)[:, None] & (e < num_logits)[None, :])


@triton.jit
def _fill(count, e, used, order, tile_expert, num_pairs, num_tiles, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Give WIDTH experts e their tiles, behind those that are used; returns the first of each, and how many are used.

    Of the rows of an expert's tiles those are filled up that none of its `count` pairs has.
    """
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    end = used + tl.cumsum(tiles, axis=0)
    tile = end - tiles
    filling = (tile * BLOCK_M + count)[None, :] + tl.arange(0, BLOCK_M)[:, None]
    filling = tl.where(filling < (end * BLOCK_M)[None, :], filling, num_tiles * BLOCK_M)
    tl.store(order + filling, tl.zeros((BLOCK_M, WIDTH), tl.int32) + num_pairs)
    for i in range(tl.max(tiles, axis=0)):
        tl.store(tile_expert + tile + i, e, mask=i < tiles)
    return tile, used + tl.sum(tiles, axis=0)


@triton.jit
def _places(marks, t, num_tokens, nowhere, PAIRS: tl.constexpr):
    """Of `route.choose`'s marks [TOKENS, EXPERTS]: the pair of each, nowhere if there is none; 1 where there is one.

    A token has an expert once, and PAIRS of them. What is stored nowhere, nothing reads: a mask would go through shared
    memory byte by byte, as would any truth that another layout needs. So of what is under -1, and of t under
    num_tokens, it is the sign that is looked at.
    """
    one = (((marks + 1) & (t - num_tokens)[:, None]) >> 31) & 1
    return nowhere + one * (t[:, None] * PAIRS - 2 - marks - nowhere), one


@triton.jit
def _begin(
    counts,
    begins,
    first,
    used,
    order,
    tile_expert,
    num_blocks,
    num_pairs,
    num_tiles,
    BLOCK_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Where the pairs of each block of tokens begin, of WIDTH experts from `first` on, out of how many there are.

    counts, begins  [blocks, EXPERTS]. Not one in the other's place: what is small each warp has all of, and one warp
    would store while another still loads. Returns how many tiles are used then.
    """
    b = tl.arange(0, BLOCKS)
    e = first + tl.arange(0, WIDTH)
    at = b[:, None] * EXPERTS + e[None, :]
    seen = (b < num_blocks)[:, None]
    of_block = tl.load(counts + at, mask=seen, other=0, cache_modifier=".cg")
    tile, used = _fill(tl.sum(of_block, axis=0), e, used, order, tile_expert, num_pairs, num_tiles, BLOCK_M, WIDTH)
    tl.store(begins + at, (tile * BLOCK_M)[None, :] + tl.cumsum(of_block, axis=0) - of_block, mask=seen)
    return used


@triton.jit
def _sort(
    chosen,
    ranks,
    counts,
    order,
    tile_expert,
    num_blocks,
    num_pairs,
    num_tiles,
    BLOCK_M: tl.constexpr,
    OF_BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    SORTED: tl.constexpr,
):
    """Put each pair behind its expert's pairs above it: those of the blocks before, and those of its own, its rank.

    A block has OF_BLOCK pairs. Returns how many tiles are used.
    """
    used = num_tiles * 0
    begins = counts + num_blocks * EXPERTS
    for first in range(0, EXPERTS, WIDTH):
        used = _begin(
            counts,
            begins,
            first,
            used,
            order,
            tile_expert,
            num_blocks,
            num_pairs,
            num_tiles,
            BLOCK_M,
            EXPERTS,
            BLOCKS,
            WIDTH,
        )
    tl.debug_barrier()  # other warps have stored where pairs begin
    for start in range(0, num_pairs, SORTED):
        i = start + tl.arange(0, SORTED)
        seen = i < num_pairs
        expert = tl.load(chosen + i, mask=seen, other=0, cache_modifier=".cg")
        rank = tl.load(ranks + i, mask=seen, other=0, cache_modifier=".cg")
        begin = tl.load(begins + i // OF_BLOCK * EXPERTS + expert, mask=seen, other=0, cache_modifier=".cg")
        tl.store(order + begin + rank, i, mask=seen)
    return used


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _router(
    x,
    router,
    partial,
    counts,
    ranks,
    counters,
    chosen,
    weights,
    order,
    tile_expert,
    num_tokens,
    num_experts,
    hidden,
    columns,
    num_tiles,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ALONE: tl.constexpr,
    sizes: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    ROWS: tl.constexpr = sizes.ROWS
    BLOCK_E: tl.constexpr = sizes.BLOCK_E
    CHOSEN: tl.constexpr = sizes.CHOSEN
    EXPERTS: tl.constexpr = sizes.EXPERTS
    num_logits = logits_of(num_experts, SHARED)
    PAIRS = TOP_K + SHARED
    block = tl.program_id(0)
    part = tl.program_id(1) % SPLIT_K
    first_e = tl.program_id(1) // SPLIT_K * BLOCK_E
    if OVERLAPS:
        row = tl.minimum(first_e + tl.arange(0, BLOCK_E), num_logits - 1)
        line = tl.minimum(part * columns + tl.arange(0, sizes.LINES) * 64, hidden - 1)
        prefetch(router + row[:, None] * hidden + line[None, :])
    await_previous(OVERLAPS)
    _multiply(
        x,
        router,
        partial,
        block * ROWS,
        first_e,
        part,
        num_tokens,
        num_logits,
        hidden,
        columns,
        BLOCK_E,
        sizes.BLOCK_K,
        ROWS,
    )
    if not last_block(counters + block, tl.num_programs(1)):
        return
    t = block * ROWS + tl.arange(0, CHOSEN)
    e = tl.arange(0, EXPERTS)
    at = t[:, None] * num_logits + e[None, :]
    seen = (t < num_tokens)[:, None] & (e < num_logits)[None, :]
    logits = tl.zeros((CHOSEN, EXPERTS), tl.float32)
    for n in tl.static_range(SPLIT_K):  # other SMs wrote them: past L1
        place = partial + n * num_tokens * num_logits + at
        logits += tl.load(place, mask=seen, other=0.0, cache_modifier=".cg")
    own = choose(
        logits, t, chosen, weights, num_tokens, num_experts, TOP_K, SHARED, NORMALIZE, CHOSEN, EXPERTS, sizes.CHOICES
    )
    num_pairs = num_tokens * PAIRS
    num_blocks = tl.num_programs(0)
    pair, one = _places(own, t, num_tokens, num_pairs, PAIRS)
    count = tl.sum(one, axis=0)
    rank = tl.cumsum(one, axis=0) - one
    if ALONE:
        tile, used = _fill(count, e, num_tiles * 0, order, tile_expert, num_pairs, num_tiles, BLOCK_M, EXPERTS)
        tl.store(order + tl.where(one > 0, (tile * BLOCK_M)[None, :] + rank, num_tiles * BLOCK_M), pair)
    else:
        tl.store(ranks + pair, rank)
        tl.store(counts + block * EXPERTS + e, count)
        if not last_block(counters + num_blocks, num_blocks):
            return
        used = _sort(
            chosen,
            ranks,
            counts,
            order,
            tile_expert,
            num_blocks,
            num_pairs,
            num_tiles,
            BLOCK_M,
            ROWS * PAIRS,
            EXPERTS,
            sizes.BLOCKS,
            sizes.WIDTH,
            sizes.SORTED,
        )
    for start in range(used, num_tiles, EXPERTS):  # what is left over is nobody's
        i = start + tl.arange(0, EXPERTS)
        tl.store(tile_expert + i, tl.full((EXPERTS,), -1, tl.int32), mask=i < num_tiles)


def router(
    x: Tensor,
    weight: Tensor,
    partial: Tensor,
    counts: Tensor,
    ranks: Tensor,
    counters: Tensor,
    chosen: Tensor,
    weights: Tensor,
    pairs: Aligned,
    *,
    normalize: bool,
    shared: int = 0,
    block_e: int,
    block_k: int,
    num_warps: int = 4,
    num_stages: int = 4,
) -> Launch:
    """Of x [T, H] and a router's weight [E, H], both bf16 or fp16: chosen, weights and pairs as `route` and `align` do.

    partial   [parts, T, E] float32: sums over a part of the columns; with T * H and E * H under 2^31 numbers
    counts    [2, ceil(T / 16), side_by_side(E, top_k)] int32: pairs of each block of tokens, and where they begin
    ranks     [T * top_k + 1] int32: how many pairs of its expert its block has above a pair; nothing reads the last
    counters  [ceil(T / 16) + 1 or more] int32, zeros before and after: see `counters_for`
    chosen    [T, top_k] int32; weights [T, top_k] float32
    shared    as of `route`: then weight [E + 1, H], partial [parts, T, E + 1], and the others are of E + shared experts
              and of top_k + shared of each token
    """
    num_tokens, hidden = x.shape
    num_logits = weight.shape[0]
    split_k = partial.shape[0]
    each = chosen.shape[1]
    num_experts = experts_of(num_logits, shared)
    top_k = each - shared
    blocks = cdiv(num_tokens, ROWS)
    experts = side_by_side(num_experts, top_k)
    expect(
        x=(x, (num_tokens, hidden)),
        router=(weight, (num_logits, hidden)),
        partial=(partial, (split_k, num_tokens, num_logits)),
        counts=(counts, (2, blocks, experts)),
        ranks=(ranks, num_tokens * each + 1),
        counters=(counters, max(counters.numel(), blocks + 1)),
        chosen=(chosen, (num_tokens, min(each, num_experts))),
        weights=(weights, (num_tokens, each)),
    )
    expect_aligned(pairs, num_tokens * each, num_experts)
    columns = cdiv(cdiv(hidden, block_k), split_k) * block_k
    side = power_of_two(max(blocks, 2))
    return Launch(
        _router,
        (blocks, cdiv(num_logits, block_e) * split_k),
        {
            "x": x,
            "router": weight,
            "partial": partial,
            "counts": counts,
            "ranks": ranks,
            "counters": counters,
            "chosen": chosen,
            "weights": weights,
            "order": pairs.order,
            "tile_expert": pairs.tile_expert,
            "num_tokens": num_tokens,
            "num_experts": num_experts,
            "hidden": hidden,
            "columns": columns,
            "num_tiles": len(pairs.tile_expert),
            "TOP_K": top_k,
            "SHARED": shared,
            "NORMALIZE": normalize,
            "BLOCK_M": pairs.block_m,
            "SPLIT_K": split_k,
            "ALONE": blocks == 1,
            "sizes": Sizes(
                ROWS=ROWS,
                BLOCK_E=block_e,
                BLOCK_K=block_k,
                LINES=power_of_two(cdiv(columns, 64)),
                CHOSEN=min(max(power_of_two(num_tokens), num_warps), ROWS),  # one's experts in one warp: no barriers
                EXPERTS=experts,
                CHOICES=power_of_two(each),
                BLOCKS=side,
                WIDTH=min(experts, max(COUNTED // side, 4)),
                SORTED=min(SORTED, power_of_two(num_tokens * each)),
            ),
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )


def side_by_side(num_experts: int, top_k: int) -> int:
    """Experts that a program has: a power of two. Triton 3.6 fails at few of which one is chosen."""
    return max(power_of_two(num_experts), 32 if top_k == 1 else 4)


def routing(
    x: Tensor, weight: Tensor, chosen: Tensor, weights: Tensor, pairs: Aligned, *, normalize: bool, shared: int = 0
) -> tuple[Launch, ...]:
    """The experts of x [T, H], chosen by a router's weight [E, H] of x's type or float32, and the pairs sorted.

    One launch for few tokens. Else, and where the weight is float32, two after torch's product, which is on its way
    when this returns. shared is as of `route`: the weight's last row is the shared expert's then.
    """
    num_tokens, hidden = x.shape
    num_logits = weight.shape[0]
    num_experts = experts_of(num_logits, shared)
    sizes = tuning.choose("moe router", num_tokens, num_experts, hidden, x.device)
    max_tokens = sizes.pop("max_tokens")
    split_k = sizes.pop("split_k")
    if num_tokens > max_tokens or num_experts > MOST_EXPERTS or weight.dtype != x.dtype or x.dtype == torch.float32:
        logits = _logits(x, weight)
        chooses = route(logits, chosen, weights, normalize=normalize, shared=shared)
        return chooses, align(chosen, num_experts, pairs)
    split_k = min(split_k, cdiv(hidden, sizes["block_k"]))
    partial = torch.empty(split_k, num_tokens, num_logits, device=x.device)
    blocks = cdiv(num_tokens, ROWS)
    width = side_by_side(num_experts, chosen.shape[1] - shared)
    counts = torch.empty(2, blocks, width, dtype=torch.int32, device=x.device)
    ranks = torch.empty(chosen.numel() + 1, dtype=torch.int32, device=x.device)
    counters = counters_for(blocks + 1, x.device)
    launch = router(
        x,
        weight,
        partial,
        counts,
        ranks,
        counters,
        chosen,
        weights,
        pairs,
        normalize=normalize,
        shared=shared,
        **sizes,
    )
    return (launch,)


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """Float32 sums of exact products."""
    if x.is_cuda and weight.dtype == x.dtype != torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())
