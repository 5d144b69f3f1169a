"""Steps over scattered blocks of random keys and values, and how far a GPU's attention may lie from the reference."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.step import StepInputs

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of a rounding


def make_step(new: list[int], lengths: list[int], block_size: int, device: torch.device) -> StepInputs:
    """Sequences in scattered blocks."""
    counts = [-(-length // block_size) for length in lengths]
    blocks = torch.randperm(sum(counts), dtype=torch.int32)
    tables = torch.zeros(len(new), max(counts), dtype=torch.int32)
    for s, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        tables[s, :count] = blocks[end - count : end]
    starts, nothing = torch.tensor([0, *accumulate(new)], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    lens = torch.tensor(lengths, dtype=torch.int32)
    made = (t.to(device) for t in (nothing, nothing, nothing, tables, lens, starts, nothing))
    return StepInputs(*made, max(new), max(lengths))


def make_cache(
    blocks: int, kv_heads: int, block_size: int, dim: int, key: torch.dtype, value: torch.dtype, device: torch.device
) -> LayerCache:
    made = []
    for dtype in (key, value):
        spread = {torch.int8: 40.0, torch.float8_e4m3fn: 30.0}.get(dtype, 1.0)
        scale = torch.ones(kv_heads) if spread == 1.0 else (torch.rand(kv_heads) + 0.5) / spread
        made.append(((torch.randn(blocks, kv_heads, block_size, dim) * spread).to(device, dtype), scale.to(device)))
    return LayerCache(made[0][0], made[1][0], made[0][1], made[1][1])


def bound(q: Tensor, cache: LayerCache, shape: AttentionShape, truth: Tensor) -> Tensor:
    """How far the kernels may lie from the reference, in float32, on the same codes.

    A score is a sum of D products: off by (D + 8) u sum |q k| scale, u = 2^-24, in each of the two computations; where
    keys are multiplied in fp16 and q is bf16 or wider, q's rounding adds a unit of fp16 (bf16 q fits; float32 does
    not). exp and the cap add 32 u of the score's size. Weights are off by that, relatively, and by a rounding to the
    values' type; fp16 weights below 2^-14 of the largest lie 2^-25 apart. An output is off by twice as much of the
    largest value, and by a rounding to q's type.
    """
    u = UNIT[torch.float32]
    k_most = (cache.key.float() * cache.key_scale.reshape(-1, 1, 1)).abs().amax()
    v_most = (cache.value.float() * cache.value_scale.reshape(-1, 1, 1)).abs().amax()
    mass = q.float().abs().sum(-1).amax() * k_most * shape.scale
    weights = 2 * (shape.head_dim + 40) * u * mass + 64 * u
    weights = weights + UNIT.get(cache.value.dtype, 2.0**-11) + 128 * 2.0**-25
    if q.dtype == torch.float32 and cache.key.dtype != torch.float32:
        weights = weights + UNIT.get(cache.key.dtype, 2.0**-11) * mass
    return 2 * weights * v_most + UNIT[q.dtype] * truth.abs()
