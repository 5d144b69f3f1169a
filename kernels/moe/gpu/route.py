"""Triton bodies of routing: the experts of each token, and the pairs of token and expert sorted by expert.

route   softmax over all experts in float32, its top_k largest, the lowest expert first among equals: what
        `moe.reference.route` does after its GEMM. A token with a NaN has NaN weights, and different experts even so.
        Behind those experts there may be some that every token goes to, the slices of a shared expert: all have the
        same weight, the sigmoid of the logit behind the experts'.
align   pair t * top_k + j goes to expert chosen[t, j]. Each expert's pairs lie together in ascending order, filled up
        to a multiple of BLOCK_M rows, which is what a program of a grouped GEMM has. Everything stays on the device
        and all sizes come from the number of pairs, so that a CUDA graph holds it; no atomics, so that it is always
        the same. A program for each expert counts all pairs and places its own: 8 bytes a pair and expert out of L2.
Limit: launches; a step of decoding has a few hundred pairs, and one for all of it: see `router`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv, power_of_two
from octavo.kernels.launching.numerics import divided, sigmoid


@triton.jit
def logits_of(num_experts, SHARED: tl.constexpr):
    """How many logits a token has: one for all slices of a shared expert."""
    return num_experts - (SHARED - 1 if SHARED > 1 else 0)


@triton.jit
def choose(
    logits,
    t,
    chosen,
    weights,
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """Store what `_route` does of tokens t [ROWS], out of their logits [ROWS, EXPERTS] in float32.

    SHARED of the experts, the last, are everyone's. Returns marks [ROWS, EXPERTS]: -2 - j for a token's j-th expert,
    which are all different, more for the others. Shares are compared by their bits: of integers a warp finds the
    largest in one instruction, of floats in ten.
    """
    e = tl.arange(0, EXPERTS)
    j = tl.arange(0, CHOICES)
    routed = num_experts - SHARED
    real = (e < routed)[None, :]
    top = tl.max(tl.where(real, logits, float("-inf")), axis=1)
    share = tl.exp(tl.where(real, logits - top[:, None], float("-inf")))
    whole = tl.sum(share, axis=1)
    share = tl.where((whole == whole)[:, None], share, 0.0)  # a maximum passes over a NaN
    marks = tl.where(real, share.to(tl.int32, bitcast=True), -1)
    best = tl.zeros((ROWS, CHOICES), tl.int32)
    experts = tl.zeros((ROWS, CHOICES), tl.int32)
    for i in tl.static_range(TOP_K):
        largest = tl.max(marks, axis=1)
        where = tl.min(tl.where(marks == largest[:, None], e[None, :], routed - 1), axis=1)
        best = tl.where((j == i)[None, :], largest[:, None], best)
        experts = tl.where((j == i)[None, :], where[:, None], experts)
        marks = tl.where(e[None, :] == where[:, None], -2 - i, marks)
    best = divided(best.to(tl.float32, bitcast=True), whole[:, None])
    if NORMALIZE:
        best = divided(best, tl.sum(best, axis=1)[:, None])
    if SHARED > 0:
        gate = sigmoid(tl.sum(tl.where((e == routed)[None, :], logits, 0.0), axis=1))
        best = tl.where((j < TOP_K)[None, :], best, gate[:, None])
        experts = tl.where((j < TOP_K)[None, :], experts, (routed - TOP_K + j)[None, :])
        marks = tl.where(((e >= routed) & (e < num_experts))[None, :], (routed - TOP_K - 2 - e)[None, :], marks)
    to = t.to(tl.int64)[:, None] * (TOP_K + SHARED) + j[None, :]
    seen = (t < num_tokens)[:, None] & (j < TOP_K + SHARED)[None, :]
    tl.store(chosen + to, experts, mask=seen)
    tl.store(weights + to, best, mask=seen)
    return marks


@triton.jit(do_not_specialize=["num_tokens"])
def _route(
    logits,
    chosen,
    weights,
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EXPERTS)
    num_logits = logits_of(num_experts, SHARED)
    at = t.to(tl.int64)[:, None] * num_logits + e[None, :]
    seen = (e < num_logits)[None, :] & (t < num_tokens)[:, None]
    x = tl.load(logits + at, mask=seen, other=0.0).to(tl.float32)
    choose(x, t, chosen, weights, num_tokens, num_experts, TOP_K, SHARED, NORMALIZE, ROWS, EXPERTS, CHOICES)


@triton.jit(do_not_specialize=["num_tiles"])
def _align(
    chosen,
    order,
    tile_expert,
    num_pairs,
    num_experts,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, num_pairs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        counts += tl.histogram(tl.load(chosen + i, mask=i < num_pairs, other=num_experts), BINS)
    tiles = tl.where(bins < num_experts, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    first = tl.sum(tl.where(bins < expert, tiles, 0))
    own = tl.sum(tl.where(bins == expert, tiles, 0))
    if expert == num_experts - 1:  # what is left over is nobody's
        for start in range(first + own, num_tiles, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(tile_expert + i, tl.full((BLOCK,), -1, tl.int32), mask=i < num_tiles)
    if own > 0:
        for start in range(first, first + own, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(tile_expert + i, tl.zeros((BLOCK,), tl.int32) + expert, mask=i < first + own)
        to = first * BLOCK_M
        for start in range(0, num_pairs, BLOCK):
            i = start + tl.arange(0, BLOCK)
            mine = tl.load(chosen + i, mask=i < num_pairs, other=-1) == expert
            # the others' go to a place that nothing reads: a mask would go through shared memory byte by byte
            place = tl.where(mine, to + tl.cumsum(mine.to(tl.int32), axis=0) - 1, num_tiles * BLOCK_M)
            tl.store(order + place, i)
            to += tl.sum(mine.to(tl.int32))
        filling = to + tl.arange(0, BLOCK_M)
        tl.store(order + filling, tl.zeros((BLOCK_M,), tl.int32) + num_pairs, mask=filling < (first + own) * BLOCK_M)


@dataclass(frozen=True)
class Aligned:
    """Pairs sorted by expert, in tiles of block_m rows.

    order        [tiles * block_m + 1] int32: the pair of each row; the number of pairs where a tile is filled up
    tile_expert  [tiles] int32: whose rows a tile has; -1: the tile isn't used, and order is not written there
    """

    order: Tensor
    tile_expert: Tensor
    block_m: int


def experts_of(num_logits: int, shared: int) -> int:
    """How many experts there are, with the slices of a shared one, which have one logit."""
    return num_logits + max(shared - 1, 0)


def route(logits: Tensor, chosen: Tensor, weights: Tensor, *, normalize: bool, shared: int = 0) -> Launch:
    """The top_k experts of logits [T, E], the likeliest first: chosen [T, top_k] int32, weights [T, top_k] float32.

    shared  experts behind these E that all tokens go to, weighted by the sigmoid of another logit: logits [T, E + 1],
            chosen and weights [T, top_k + shared]
    """
    num_tokens, num_logits = logits.shape
    each = chosen.shape[1]
    num_experts = experts_of(num_logits, shared)
    expect(logits=(logits, (num_tokens, num_logits)))
    expect(chosen=(chosen, (num_tokens, min(each, num_experts))), weights=(weights, (num_tokens, each)))
    block = max(power_of_two(num_experts), 4)
    sizes = tuning.choose("moe route", num_tokens, num_experts, each, logits.device)
    rows = max(1, min(power_of_two(num_tokens), sizes.pop("block") // block))
    arguments = {
        "logits": logits,
        "chosen": chosen,
        "weights": weights,
        "num_tokens": num_tokens,
        "num_experts": num_experts,
        "TOP_K": each - shared,
        "SHARED": shared,
        "NORMALIZE": normalize,
        "ROWS": rows,
        "EXPERTS": block,
        "CHOICES": power_of_two(each),
    }
    return Launch(_route, (cdiv(num_tokens, rows),), arguments, **sizes, num_stages=1)


def _tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Tiles that are enough however the pairs fall."""
    return cdiv(num_pairs + min(num_pairs, num_experts) * (block_m - 1), block_m)


def expect_aligned(pairs: Aligned, num_pairs: int, num_experts: int) -> None:
    """They have the memory of so many pairs."""
    tiles = _tiles(num_pairs, num_experts, pairs.block_m)
    expect(tile_expert=(pairs.tile_expert, tiles), order=(pairs.order, tiles * pairs.block_m + 1))


def unaligned(num_pairs: int, num_experts: int, block_m: int, device: torch.device | str) -> Aligned:
    """Memory for `align`."""
    tiles = _tiles(num_pairs, num_experts, block_m)
    order, tile_expert = (torch.empty(n, dtype=torch.int32, device=device) for n in (tiles * block_m + 1, tiles))
    return Aligned(order, tile_expert, block_m)


def align(chosen: Tensor, num_experts: int, out: Aligned) -> Launch:
    """Sort the pairs of chosen [T, top_k] int32, in 0..num_experts-1."""
    num_pairs = chosen.numel()
    expect(chosen=(chosen, num_pairs))
    expect_aligned(out, num_pairs, num_experts)
    sizes = tuning.choose("moe align", num_pairs, num_experts, out.block_m, chosen.device)
    arguments = {
        "chosen": chosen,
        "order": out.order,
        "tile_expert": out.tile_expert,
        "num_pairs": num_pairs,
        "num_experts": num_experts,
        "num_tiles": len(out.tile_expert),
        "BLOCK_M": out.block_m,
        "BINS": power_of_two(num_experts + 1),
        "BLOCK": min(max(power_of_two(num_pairs), 128), sizes.pop("block")),
    }
    return Launch(_align, (num_experts if num_pairs else 0,), arguments, **sizes, num_stages=1)
