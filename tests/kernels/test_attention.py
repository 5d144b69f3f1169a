"""The CPU bodies of attention, rope and the cache's writes against their references, over shapes and cache types."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from octavo.kernels.attention import cpu, reference, rope_cpu
from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.runtime.model.operators import RopeAndCache

HEADS = [(9, 3, 64), (8, 1, 80), (4, 4, 96), (14, 2, 128), (2, 1, 256), (4, 2, 24)]
NUM_BLOCKS = 24
MIXED = (
    [1, 5, 33, 1, 20],
    [40, 5, 50, 17, 20],
)  # decode, a short and a long chunk on a prefix, a block's first, prefill
DECODE = ([1, 1, 1], [1, 16, 33])
MANY = ([1] * 20, list(range(1, 21)))


def make_step(new: list[int], lengths: list[int], block_size: int) -> StepInputs:
    """Sequences in scattered blocks."""
    counts = [-(-length // block_size) for length in lengths]
    blocks = torch.randperm(NUM_BLOCKS, dtype=torch.int32)
    tables = torch.zeros(len(new), max(counts), dtype=torch.int32)
    for s, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        tables[s, :count] = blocks[end - count : end]
    return StepInputs.prefill(lengths, block_size, sizes=new, tables=tables)


def make_cache(kv_heads: int, block_size: int, dim: int, dtype: torch.dtype) -> LayerCache:
    spread = {torch.int8: 40.0, torch.float8_e4m3fn: 2.0}.get(dtype, 1.0)
    key, value = ((torch.randn(NUM_BLOCKS, kv_heads, block_size, dim) * spread).to(dtype) for _ in range(2))
    if dtype in (torch.int8, torch.float8_e4m3fn):
        return LayerCache(key, value, torch.rand(kv_heads) / spread, torch.rand(kv_heads) / spread)
    return LayerCache(key, value, torch.ones(kv_heads), torch.ones(kv_heads))


def bound(q: Tensor, cache: LayerCache, shape: AttentionShape, truth: Tensor, chunked: bool) -> Tensor:
    """How far one body's output may lie from the reference's.

    A float32 score is off by (D + 2) u sum |q k| scale at most, u = 2**-24, in each of the two computations; weights
    are then off by that, relatively, and by the 4 u of exp and of the sum; outputs by twice as much of the largest
    value. Rounding to q's type adds half a unit in the last place for each. torch's attention on chunks also rounds
    keys and values that it gets from 8-bit caches, and the weights, to q's type.
    """
    u = 2.0**-24
    k_max = (cache.key.float() * cache.key_scale.reshape(-1, 1, 1)).abs().amax()
    v_max = (cache.value.float() * cache.value_scale.reshape(-1, 1, 1)).abs().amax()
    mass = q.float().abs().sum(-1).amax() * k_max * shape.scale
    unit = {torch.float32: u, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[q.dtype]
    weights = 2 * (shape.head_dim + 2) * u * mass + 64 * u
    if chunked and unit > u:
        weights = weights + unit * (2 + mass)
    return 2 * weights * v_max + 2 * unit * truth.float().abs() + unit * v_max * (unit > u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [None, torch.float8_e4m3fn, torch.int8], ids=["same", "fp8", "int8"])
@pytest.mark.parametrize(
    ("span", "soft_cap", "has_sinks"),
    [
        *((0, None, False), (7, None, False), (0, 20.0, False), (18, 5.0, False), (0, None, True), (7, 5.0, True)),
        *((-7, None, False), (-18, 5.0, True)),
    ],
)
def test_attention(
    dtype: torch.dtype, stored: torch.dtype | None, span: int, soft_cap: float | None, has_sinks: bool
) -> None:
    """Below 0 are windows that don't slide."""
    torch.manual_seed(0)
    for heads, kv_heads, dim in HEADS:
        sinks = torch.randn(heads) * 3 if has_sinks else None
        window = abs(span) or None
        shape = AttentionShape(heads, kv_heads, dim, dim**-0.5, window, soft_cap, sinks, is_chunked=span < 0)
        for (new, lengths), block_size in ((MIXED, 16), (DECODE, 8), (MANY, 32)):
            inputs = make_step(new, lengths, block_size)
            cache = make_cache(kv_heads, block_size, dim, stored or dtype)
            q = torch.randn(sum(new), heads, dim).to(dtype)
            truth = reference.paged_attention(q, inputs, cache, shape)
            got = cpu.paged_attention(q, inputs, cache, shape)
            limit = bound(q, cache, shape, truth, chunked=max(new) > 1)
            assert ((got - truth).float().abs() <= limit).all(), (heads, kv_heads, dim, new)


@pytest.mark.parametrize("body", [reference.rope_and_cache, rope_cpu.rope_and_cache])
def test_neighbors_rotate_as_complex_numbers(body: RopeAndCache) -> None:
    """Two neighbors are one number, which is multiplied by exp(i angle); what follows behind them stays."""
    torch.manual_seed(0)
    inputs = make_step(*MIXED, 16)
    cache = make_cache(2, 16, 24, torch.float32)
    qkv = torch.randn(sum(MIXED[0]), 8 * 24)
    angle = torch.rand(64, 8) * 6
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1)
    shape = AttentionShape(4, 2, 24, 1.0, interleaved=True)
    q = body(qkv, inputs, cache, shape, cos_sin, None, None, 1e-6)
    heads = qkv.view(-1, 8, 24)[:, :6].double()
    turns = torch.polar(torch.ones(64, 8, dtype=torch.float64), angle.double())[inputs.positions].unsqueeze(1)
    turned = torch.view_as_real(torch.view_as_complex(heads[..., :16].unflatten(-1, (8, 2)).contiguous()) * turns)
    truth = torch.cat((turned.flatten(2), heads[..., 16:]), dim=-1).float()
    keys = cache.key.transpose(1, 2).flatten(0, 1)[inputs.slot_mapping]
    # A sum of two products of numbers below 5, each rounded to float32.
    torch.testing.assert_close(torch.cat((q, keys), dim=1), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [None, torch.float8_e4m3fn, torch.int8], ids=["same", "fp8", "int8"])
@pytest.mark.parametrize("norm", [None, "head", "all"])
@pytest.mark.parametrize("kv_parts", [2, 1, 0])
def test_rope_and_cache(dtype: torch.dtype, stored: torch.dtype | None, norm: str | None, kv_parts: int) -> None:
    """Queries within two roundings to their type; stored numbers at most one step of the cache's type apart.

    The reference rounds between norm and rotation, the kernel does not; a value near a tie then falls either way.
    """
    torch.manual_seed(0)
    unit = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}[dtype]
    for heads, kv_heads, dim in HEADS:
        shape = AttentionShape(heads, kv_heads, dim, 1.0, kv_parts=kv_parts, norms_values=kv_parts < 2)
        inputs = make_step(*MIXED, 16)
        caches = [make_cache(kv_heads, 16, dim, stored or dtype)]
        caches.append(
            LayerCache(
                *(t.clone() for t in (caches[0].key, caches[0].value)), caches[0].key_scale, caches[0].value_scale
            )
        )
        qkv = torch.randn(sum(MIXED[0]), (heads + kv_parts * kv_heads) * dim).to(dtype)
        angle = torch.rand(64, dim // 4) * 6  # half of each head rotates
        cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1)
        sizes = {None: (0, 0), "head": (dim, dim), "all": (heads * dim, kv_heads * dim)}[norm]
        weights = [torch.rand(size) if size else None for size in sizes]
        q = [
            body(qkv, inputs, cache, shape, cos_sin, weights[0], weights[1], 1e-6)
            for body, cache in ((reference.rope_and_cache, caches[0]), (rope_cpu.rope_and_cache, caches[1]))
        ]
        largest = qkv.float().abs().amax()  # a rotation mixes two numbers of at most this size
        assert ((q[0] - q[1]).float().abs() <= 4 * unit * largest).all()
        for name in ("key", "value"):
            a, b = (getattr(cache, name).float() for cache in caches)
            scale = getattr(caches[0], f"{name}_scale").reshape(-1, 1, 1)
            spacing = {torch.int8: torch.ones_like(a), torch.float8_e4m3fn: a.abs() / 8 + 2.0**-9}
            step = spacing.get(stored or dtype, torch.zeros_like(a))
            assert ((a - b).abs() * scale <= step * scale + 4 * unit * largest).all()
