"""Rope and the writes into the cache in Triton against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from octavo.kernels.attention import reference
from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.rope import rope, rope_and_cache
from octavo.kernels.attention.step import StepInputs

EPS = 1e-6
TOKENS, BLOCKS, BLOCK_SIZE = 3, 4, 4
HEADS = [(9, 3, 64, 64), (4, 4, 80, 32), (2, 1, 24, 24)]  # query and KV heads, dimension, how much of it rotates
STORED = [None, torch.float8_e4m3fn, torch.int8]


def make_inputs(device: torch.device, slots: list[int]) -> StepInputs:
    """Tokens at positions 5, 0 and 63, each of a sequence of its own; slots say where their keys and values go."""
    step = StepInputs.decode([6, 1, 64], BLOCK_SIZE)
    return replace(step, slot_mapping=torch.tensor(slots)).to(device)


def make_cache(kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
    """Two caches' worth of zeros, with scales under which 8-bit numbers both fit and saturate."""
    key, value = (torch.zeros(BLOCKS, kv_heads, BLOCK_SIZE, dim, device=device, dtype=dtype) for _ in range(2))
    most = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}.get(dtype)
    scale = torch.linspace(1.5, 3.0, kv_heads, device=device) / most if most else torch.ones(kv_heads, device=device)
    return LayerCache(key, value, scale, scale.flip(0))


def bound(a: Tensor, scale: Tensor, largest: Tensor, unit: float) -> Tensor:
    """How far two bodies may lie apart that norm and rotate numbers up to `largest`, in what is stored.

    The reference rounds to its type after the norm and after the rotation, the kernel once, at the end: each rounding
    is half a unit of at most sqrt(2) largest. A value near a tie of 8-bit codes then falls either way: one step.
    """
    step = torch.zeros_like(a, dtype=torch.float32)
    if a.dtype == torch.int8:
        step += 1
    elif a.dtype == torch.float8_e4m3fn:
        step += a.float().abs() / 8 + 2.0**-9
    return step * scale.reshape(-1, 1, 1) + 4 * unit * largest


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("stored", STORED, ids=["same", "fp8", "int8"])
@pytest.mark.parametrize("norm", ["", "head", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope(
    heads: tuple[int, int, int, int], stored: torch.dtype | None, norm: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    hq, hkv, dim, rotary = heads
    shape = AttentionShape(hq, hkv, dim, 1.0)
    qkv = torch.randn(TOKENS, (hq + 2 * hkv) * dim).to(device, dtype)
    angle = torch.rand(64, rotary // 2) * 6
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1).to(device)
    sizes = {"": (0, 0), "head": (dim, dim), "all": (hq * dim, hkv * dim)}[norm]
    weights = [torch.rand(size).to(device) if size else None for size in sizes]
    inputs = make_inputs(device, [5, 0, 15])
    caches = [make_cache(hkv, dim, stored or dtype, device) for _ in range(2)]
    expected = reference.rope_and_cache(qkv, inputs, caches[0], shape, cos_sin, *weights, EPS)
    q = torch.full_like(expected, torch.nan)
    rope(qkv, inputs, caches[1], shape, cos_sin, *weights, EPS, q)()
    unit = torch.finfo(dtype).eps
    largest = qkv.float().abs().max() * (1.5 if norm else 1.0)  # weights below 1 over a root mean square near 1
    assert bool(((q.float() - expected.float()).abs() <= 4 * unit * largest).all())
    for name in ("key", "value"):
        a, b = (getattr(cache, name) for cache in caches)
        scale = getattr(caches[0], f"{name}_scale")
        off = (a.float() - b.float()).abs() * scale.reshape(-1, 1, 1)
        assert bool((off <= bound(a, scale, largest, unit)).all())
        if dtype == torch.float32:  # codes differ only where the last bits of float32 cross a tie
            assert bool((off > 4 * unit * largest).float().mean() < 2e-3)


def test_partial_sums_are_rounded_as_the_gemm_would(device: torch.device) -> None:
    torch.manual_seed(0)
    shape, inputs = AttentionShape(4, 2, 64, 1.0), make_inputs(device, [3, 9, 2])
    parts = torch.randn(3, TOKENS, 8 * 64).to(device)
    caches = [make_cache(2, 64, torch.int8, device) for _ in range(2)]
    args = (shape, None, None, None, EPS)
    q = rope_and_cache(parts, inputs, caches[0], *args, dtype=torch.bfloat16)
    whole = (parts[0] + parts[1] + parts[2]).bfloat16()
    assert torch.equal(q, rope_and_cache(whole, inputs, caches[1], *args))
    assert torch.equal(q, whole[:, : 4 * 64].reshape(TOKENS, 4, 64))
    assert torch.equal(caches[0].key, caches[1].key)
    assert torch.equal(caches[0].value, caches[1].value)
    reference.rope_and_cache(whole, inputs, caches[1], *args)
    assert torch.equal(caches[0].key, caches[1].key)  # nothing but a division and a rounding: bit for bit


def test_a_slot_of_minus_one_writes_nothing(device: torch.device) -> None:
    shape, cache = AttentionShape(2, 1, 64, 1.0), make_cache(1, 64, torch.float32, device)
    qkv = torch.ones(TOKENS, 4 * 64, device=device)
    q = rope_and_cache(qkv, make_inputs(device, [-1, 6, -1]), cache, shape, None, None, None, EPS)
    assert bool((q == 1).all())
    for store in (cache.key, cache.value):
        assert bool((store[1, 0, 2] == 1).all())
        assert store.sum() == 64


def test_int8_codes_reach_127_on_both_sides(device: torch.device) -> None:
    shape, cache = AttentionShape(1, 1, 64, 1.0), make_cache(1, 64, torch.int8, device)
    qkv = torch.tensor([-50.0, 50.0, 0.0]).reshape(3, 1).expand(3, 3 * 64).contiguous().to(device)
    rope_and_cache(qkv, make_inputs(device, [0, 1, 2]), cache, shape, None, None, None, EPS)
    assert cache.key[0, 0, :3, 0].tolist() == [-127, 127, 0]
