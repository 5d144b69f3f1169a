"""Steps over scattered blocks of random keys and values, and how far a GPU's attention may lie from the exact one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.step import StepInputs

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of a rounding
CHANCE = 1e-6  # of a false alarm, of each sum of signed errors


def make_step(new: list[int], lengths: list[int], block_size: int, device: torch.device) -> StepInputs:
    """Sequences in scattered blocks."""
    counts = [-(-length // block_size) for length in lengths]
    blocks = torch.randperm(sum(counts), dtype=torch.int32)
    tables = torch.zeros(len(new), max(counts), dtype=torch.int32)
    for s, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        tables[s, :count] = blocks[end - count : end]
    return StepInputs.prefill(lengths, block_size, sizes=new, tables=tables).to(device)


def make_cache(
    blocks: int, kv_heads: int, block_size: int, dim: int, key: torch.dtype, value: torch.dtype, device: torch.device
) -> LayerCache:
    made = []
    for dtype in (key, value):
        spread = {torch.int8: 40.0, torch.float8_e4m3fn: 30.0}.get(dtype, 1.0)
        scale = torch.ones(kv_heads) if spread == 1.0 else (torch.rand(kv_heads) + 0.5) / spread
        made.append(((torch.randn(blocks, kv_heads, block_size, dim) * spread).to(device, dtype), scale.to(device)))
    return LayerCache(made[0][0], made[1][0], made[0][1], made[1][1])


@dataclass(frozen=True)
class Exact:
    """Attention of one sequence's n queries on L cached tokens, in float64, and how far a kernel's steps may lead."""

    rows: slice  # of q
    values: Tensor  # [Hq, L, D]
    out: Tensor  # [Hq, n, D]
    drift: Tensor  # [Hq, n, D], of out, by what may add up: float32's arithmetic, queries that were off
    lost: Tensor  # [Hq, n, L], of a weight, where it is narrowed to the type of values
    slopes: tuple[Tensor, ...]  # of out, in the logarithms of a factor on all of it, of the scale, of the cap


def _gathered(store: Tensor, scale: Tensor, table: Tensor, length: int, group: int) -> Tensor:
    heads = store[table.long()].double().transpose(0, 1).flatten(1, 2)[:, :length] * scale.double()[:, None, None]
    return heads.repeat_interleave(group, dim=0)


def _visible(new: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Which tokens [L] each of the last `new` sees."""
    token = torch.arange(length, device=device)
    behind = token[length - new :, None] - token
    return (behind >= 0) & (behind < (window or length))


def _attended(q: Tensor, off: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape) -> Iterator[Exact]:
    """What `check` asks of each sequence that has queries and tokens."""
    starts, group = inputs.query_starts.tolist(), shape.num_heads // shape.num_kv_heads
    for s, length in enumerate(inputs.seq_lens.tolist()):
        rows = slice(starts[s], starts[s + 1])
        if length == 0 or rows.start == rows.stop:
            continue
        table = inputs.block_tables[s, : -(-length // cache.block_size)]
        k = _gathered(cache.key, cache.key_scale, table, length, group)
        v = _gathered(cache.value, cache.value_scale, table, length, group)
        seen = _visible(rows.stop - rows.start, length, shape.window, q.device)
        each, each_off = (t[rows].double().transpose(0, 1) * shape.scale for t in (q, off))
        plain, turned = each @ k.mT, each_off @ k.abs().mT
        cap = shape.soft_cap or math.inf
        scores = plain if shape.soft_cap is None else cap * (plain / cap).tanh()
        by_scale = plain * (1 - (scores / cap) ** 2)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        out = weights @ v

        count, largest = seen.sum(-1, keepdim=True), (scores.abs() * seen).amax(-1, keepdim=True)
        summed = 2.0**-23 * (1.125 * shape.head_dim + 16) * (each.abs() @ k.abs().mT + plain.abs()) / 2
        capped = 0.0 if shape.soft_cap is None else 2.0**-23 * cap
        error = (summed + turned + capped + 2.0**-22 * (count / 4 + 8 + 1.25 * largest)).expm1() * seen
        more = 1 + 4 * error.amax(-1, keepdim=True)
        mixed = ((weights * error).unsqueeze(-1) * (v.unsqueeze(1) - out.unsqueeze(2)).abs()).sum(2)
        mixed += 2.0**-23 * (1.25 * count + 12) * (weights @ v.abs() + 2 * out.abs()) / 2
        top, unit = weights.amax(-1, keepdim=True), UNIT.get(cache.value.dtype, 2.0**-11)
        lost = torch.minimum(unit * weights, top - weights + error * weights) + 2.0**-25 * top * seen
        slopes = (by * weights for by in (by_scale, scores - by_scale))
        turns = (by @ v - by.sum(-1, keepdim=True) * out for by in slopes)
        yield Exact(rows, v, out, mixed * more, lost * more, tuple((count > 1) * by for by in (out, *turns)))


def check(
    got: Tensor, q: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape, off: Tensor | None = None
) -> None:
    """That a kernel's attention of q [T, Hq, D], which its own queries may be `off`, is as exact as its steps are.

    A sum of terms, in any order and truncated as on a tensor core, is off by 2^-23 for each term, and for each eighth
    (a product's accumulator, a tile's shrinking), of the sum of its positive or its negative terms, whichever is more.
    A score adds D terms; 16 more are for its product, factor, and cap, whose exp2 adds 2^-23 of the cap. A weight's
    exp2 is off by 2^-22, as is each of those that shrink it, for every tile and share (16 tokens at least), and log2
    of a share's sum by that of log n; differences of scores add 5 roundings of the largest. Such an error e of a weight
    moves out by w e (v - out). The weights' sum is taken before they are narrowed: what they lose there moves out by
    w v, but that of the largest is 1, and one close to 1 is moved no farther than to it.

    Then every element lies within the sum of all that. And as roundings are uniform and know nothing of each other,
    sums of signed errors, along what a wrong factor, scale or cap would do, are random walks: sub-Gaussian, with a
    third of the steps' squares for a variance. What isn't random of float32's arithmetic may add to them.
    (Not of a row that sees one token: its value is rounded to itself.)
    """
    off = torch.zeros_like(q, dtype=torch.float64) if off is None else off
    if cache.key.element_size() == 1:  # fp16's subnormals, in a row divided by the power of two of its largest
        off = off + 2.0**-25 * q.abs().amax(-1, keepdim=True)
    unit, sums = UNIT[got.dtype], torch.zeros(3, 3, dtype=torch.float64, device=q.device)
    for exact in _attended(q, off, inputs, cache, shape):
        error = got[exact.rows].double().transpose(0, 1) - exact.out
        limit = exact.drift + exact.lost @ exact.values.abs()
        rounded = unit * (exact.out.abs() + limit).log2().floor().exp2()
        assert bool((error.abs() <= limit + rounded).all()), (error.abs() / (limit + rounded)).max()
        for i, slope in enumerate(exact.slopes):
            sign = slope.sign()
            steps = (exact.lost * (sign @ exact.values.mT)).square().sum() + (sign * rounded).square().sum()
            sums[i] += torch.stack([(sign * error).sum(), (sign.abs() * exact.drift).sum(), steps])
    signed, drift, steps = sums.unbind(1)
    assert bool((signed.abs() <= drift + (2 * math.log(2 / CHANCE) * steps / 3).sqrt()).all()), sums
