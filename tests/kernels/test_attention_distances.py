"""Attention with biases by distance against its reference, and that against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from octavo.kernels.attention import reference
from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.distances import biases_of, distance_attention
from octavo.kernels.attention.step import StepInputs

HEADS = 3
DIM = 16
BLOCK = 4
LENGTHS = [11, 6, 9]
SHAPE = AttentionShape(HEADS, HEADS, DIM, 0.25)


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(qkv of all tokens, sequence by sequence, the table)."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(LENGTHS), 3 * HEADS * DIM, generator=generator)
    return qkv.to(dtype), torch.randn(HEADS, 16, generator=generator).to(dtype)


def empty_cache(dtype: torch.dtype) -> LayerCache:
    ones = torch.ones(HEADS)
    key, value = (torch.zeros(12, HEADS, BLOCK, DIM, dtype=dtype) for _ in range(2))
    return LayerCache(key, value, ones, ones)


def steps(qkv: Tensor) -> list[tuple[StepInputs, Tensor, Tensor]]:
    """Each step, its rows of qkv, and which of all tokens these are: chunks, then single tokens and a chunk of one."""
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)[:-1].tolist()
    done = [0, 0, 0]
    found = []
    tables = torch.arange(9).reshape(3, 3)
    for sizes in ([9, 3, 8], [1, 2, 1], [1, 1, 0]):
        rows = [torch.arange(start + d, start + d + size) for start, d, size in zip(starts, done, sizes, strict=True)]
        done = [d + size for d, size in zip(done, sizes, strict=True)]
        kept = [s for s, size in enumerate(sizes) if size]
        step = StepInputs.prefill(
            [done[s] for s in kept], BLOCK, sizes=[sizes[s] for s in kept], tables=tables[kept].numpy()
        )
        which = torch.cat(rows)
        found.append((step, qkv[which], which))
    return found


def test_the_reference_adds_the_number_of_each_distance() -> None:
    qkv, table = drawn(torch.float32)
    cache = empty_cache(torch.float32)
    out = torch.zeros(len(qkv), HEADS * DIM)
    for step, rows, which in steps(qkv):
        q = reference.rope_and_cache(rows, step, cache, SHAPE, None, None, None, 0.0)
        out[which] = reference.distance_attention(q, step, cache, SHAPE, table)
    q, k, v = qkv.double().view(-1, 3, HEADS, DIM).unbind(1)
    begin = 0
    for length in LENGTHS:
        for place in range(length):
            seen = slice(begin, begin + place + 1)
            bias = table[:, : place + 1].flip(1).double()
            scores = torch.einsum("hd,khd->hk", q[begin + place], k[seen]) * SHAPE.scale + bias
            truth = torch.einsum("hk,khd->hd", scores.softmax(-1), v[seen]).flatten()
            torch.testing.assert_close(out[begin + place].double(), truth, atol=1e-5, rtol=1e-5)
        begin += length


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_it_is_the_reference(dtype: torch.dtype, most: float) -> None:
    qkv, table = drawn(dtype)
    cache = empty_cache(dtype)
    other = replace(cache, key=cache.key.clone(), value=cache.value.clone())
    for step, rows, _ in steps(qkv):
        found = distance_attention(rows, step, cache, SHAPE, biases_of(table, step))
        q = reference.rope_and_cache(rows, step, other, SHAPE, None, None, None, 0.0)
        expected = reference.distance_attention(q, step, other, SHAPE, table)
        torch.testing.assert_close(found, expected, atol=most, rtol=most)
    assert torch.equal(cache.key, other.key)
