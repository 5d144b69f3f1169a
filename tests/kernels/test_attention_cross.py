"""Attention to an encoder's output against its reference, and that against float64."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.attention import reference
from octavo.kernels.attention.cross import Sources, cross_attention

HEADS = 3
DIM = 16
STARTS = [0, 1, 8, 9]
PLACES = [4, 0, 2]  # the sequences' own, in any order
LENGTHS = [37, 1, 20]
SOURCES = Sources(STARTS, PLACES, LENGTHS)


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    q = torch.randn(STARTS[-1], HEADS * DIM, generator=drawn)
    keys, values = (torch.randn(5, HEADS, 37, DIM, generator=drawn) for _ in range(2))
    return q.to(dtype), keys.to(dtype), values.to(dtype)


def test_the_reference_is_a_softmax_over_all_positions() -> None:
    q, keys, values = tensors(torch.float64)
    found = reference.cross_attention(q.float(), keys.float(), values.float(), SOURCES, 0.25)
    for token in range(len(q)):
        sequence = sum(token >= end for end in STARTS[1:])
        for head in range(HEADS):
            columns = slice(head * DIM, (head + 1) * DIM)
            seen = slice(LENGTHS[sequence])
            scores = keys[PLACES[sequence], head, seen] @ q[token, columns] * 0.25
            truth = scores.exp() @ values[PLACES[sequence], head, seen] / scores.exp().sum()
            torch.testing.assert_close(found[token, columns].double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_it_is_the_reference(dtype: torch.dtype, most: float) -> None:
    given = (*tensors(dtype), SOURCES, DIM**-0.5)
    torch.testing.assert_close(cross_attention(*given), reference.cross_attention(*given), atol=most, rtol=most)
