"""The CPU's kernel of low-rank adapters against its reference in float64, for rows of many adapters in any order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.kernels.lora.cpu import CpuSlots
from octavo.kernels.lora.reference import LayerAdapter, LowRank, adapted
from octavo.kernels.lora.rows import AdapterRows, sort_by_slot
from octavo.kernels.native import cpu_features

pytestmark = pytest.mark.skipif(not cpu_features.has_dot_products(), reason="needs AVX-512 BF16")

EPS = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float16: 2.0**-11}


def make(n: int, k: int, ranks: list[tuple[int, int, int]], generator: torch.Generator, *, gains: bool) -> LayerAdapter:
    """ranks: (first column, columns, rank) of each part. Values are bf16's, so that packing rounds nothing."""

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16().float()

    parts = [LowRank(first, random(r, k), random(size, r), 0.3 * r) for first, size, r in ranks]
    return LayerAdapter(tuple(parts), 1 + random(n) if gains else None, random(n) if gains else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "sizes", "k"), [(112, (64, 24, 24), 64), (576, (576,), 1536), (96, (96,), 62)])
@pytest.mark.parametrize("num_tokens", [1, 7, 40, 300])
def test_it_is_the_reference(num_tokens: int, n: int, sizes: tuple[int, ...], k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    firsts = np.cumsum([0, *sizes])[:-1].tolist()
    slots = CpuSlots(5, n, k, 48 * len(sizes), dtype)
    adapters: dict[int, LayerAdapter] = {}
    for slot, rank in ((0, 4), (1, 16), (3, 40)):
        which = slice(None) if slot else slice(-1, None)  # one adapter is of the last module alone
        ranks = [(first, size, rank) for first, size in zip(firsts, sizes, strict=True)][which]
        adapters[slot] = make(n, k, ranks, generator, gains=slot == 1)
        slots.put(slot, slots.pack(adapters[slot]))
    adapters[4] = make(n, k, [], generator, gains=True)  # a bias alone
    slots.put(4, slots.pack(adapters[4]))
    x = torch.randn(num_tokens, k, generator=generator).to(dtype)
    y = torch.randn(num_tokens, n, generator=generator).to(dtype)
    of_tokens = torch.randint(-1, 5, (num_tokens,), generator=generator).sort().values
    of_tokens = torch.cat([of_tokens[::2], of_tokens[1::2]])  # runs of rows, and rows apart
    found = y.clone()
    for _ in range(2):  # a launch leaves its counter as it was
        found = y.clone()
        slots.add(found, x, sort_by_slot(of_tokens.numpy(), 5))
    for token, slot in enumerate(of_tokens.tolist()):
        if slot not in adapters:  # no adapter, or an empty slot
            assert torch.equal(found[token], y[token])
            continue
        exact = adapted(y[token : token + 1].double(), x[token : token + 1].double(), adapters[slot])[0]
        error = (found[token].double() - exact).abs()
        assert bool((error <= bound(y[token], x[token], adapters[slot], exact, dtype)).all())


def bound(y: Tensor, x: Tensor, adapter: LayerAdapter, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """One rounding of the result, and float32's of each sum: its number of terms times eps times the terms' sizes."""
    sizes = adapted(y.abs().double()[None], x.abs().double()[None], absolute(adapter))[0]
    return EPS[dtype] * exact.abs() + (len(x) + 64) * EPS[torch.float32] * sizes


def absolute(adapter: LayerAdapter) -> LayerAdapter:
    parts = tuple(LowRank(p.first, p.a.abs(), p.b.abs(), abs(p.scale)) for p in adapter.parts)
    return LayerAdapter(parts, *(None if t is None else t.abs() for t in (adapter.gain, adapter.shift)))


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    slots = CpuSlots(2, 96, 64, 32, torch.bfloat16)
    for slot in range(2):
        slots.put(slot, slots.pack(make(96, 64, [(0, 96, 24)], generator, gains=True)))
    x = torch.randn(130, 64, generator=generator).bfloat16()
    y = torch.randn(130, 96, generator=generator).bfloat16()
    of_tokens = np.arange(130) % 3 - 1
    together = y.clone()
    slots.add(together, x, sort_by_slot(of_tokens, 2))
    for token in range(130):
        alone = y[token : token + 1].clone()
        slots.add(alone, x[token : token + 1], sort_by_slot(of_tokens[token : token + 1], 2))
        assert torch.equal(alone[0], together[token])


def test_an_adapter_that_is_taken_away_adds_nothing() -> None:
    generator = torch.Generator().manual_seed(4)
    slots = CpuSlots(1, 32, 16, 16, torch.float32)
    slots.put(0, slots.pack(make(32, 16, [(0, 32, 3)], generator, gains=False)))
    slots.put(0, None)
    y = torch.randn(2, 32, generator=generator)
    found = y.clone()
    slots.add(found, torch.randn(2, 16, generator=generator), sort_by_slot(np.zeros(2, int), 1))
    assert torch.equal(found, y)


def test_rows_of_some_tokens_are_numbered_anew() -> None:
    rows = sort_by_slot(np.array([1, -1, 0, 1, 2]), 3)
    assert rows.rows.tolist() == [2, 0, 3, 4, 1]
    assert rows.starts.tolist() == [0, 1, 3, 4]
    some = rows.among(torch.tensor([0, 1, 4]))
    assert some.rows.tolist() == [0, 2, 1]
    assert some.starts.tolist() == [0, 0, 1, 2]
    none: AdapterRows = rows.among(torch.tensor([1]))
    assert none.starts.tolist() == [0, 0, 0, 0]
