"""Drawing against a straightforward reference in float64: which tokens may come, and how often they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.runtime.draw import draw, least_weight, uniform


def truncated(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The distribution that is to be drawn from, [vocab] float64: sort, cut, normalize, as the papers say it."""
    probs = (logits.double() / temperature).softmax(0)
    probs = torch.where(probs >= min_p * probs.max(), probs, 0)
    if 0 < top_k < len(probs):
        probs = torch.where(probs >= probs.sort(descending=True).values[top_k - 1], probs, 0)
    probs = probs / probs.sum()
    if top_p < 1:
        ordered = probs.sort(descending=True).values
        before = ordered.cumsum(0) - ordered
        last = int((before < top_p).sum().clamp(min=1)) - 1
        probs = torch.where(probs >= ordered[last], probs, 0)
    return probs / probs.sum()


def draw_many(logits: Tensor, count: int, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Draws at evenly spaced uniform numbers, which makes frequencies exact up to 1 / count per token."""
    full = torch.full((count,), 1.0)
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    rows = logits.expand(count, -1).clone()
    return draw(rows, full * temperature, (full * top_k).long(), full * top_p, full * min_p, uniforms)


CASES = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 0.9, 0.0),
    (1.3, 20, 1.0, 0.0),
    (1.0, 20, 0.8, 0.0),
    (1.0, 0, 1.0, 0.05),
    (2.0, 100, 0.95, 0.01),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 0.0, 0.0),
    (5.0, 0, 0.999, 0.0),
    (1.0, 10_000, 0.5, 1.0),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocab", [7, 256, 1000])
def test_frequencies_are_the_truncated_distribution(case: tuple[float, int, float, float], vocab: int) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    expected = truncated(logits, *case)
    count = 4000
    found = torch.bincount(draw_many(logits, count, *case), minlength=vocab).double() / count
    assert not found[expected == 0].any(), "a token was drawn that had been cut off"
    # Each token owns an interval of evenly spaced points: one point more or less at each end. Weights are float32.
    torch.testing.assert_close(found, expected, rtol=0, atol=1 / count + 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_what_may_be_drawn_does_not_depend_on_how_many_candidates_were_looked_at(
    case: tuple[float, int, float, float],
) -> None:
    """A flat distribution needs all of the vocabulary sorted, a steep one only the best 64; ties stay together."""
    _, top_k, top_p, min_p = case
    generator = torch.Generator().manual_seed(1)
    for spread in (0.0, 0.01, 1.0, 10.0):
        logits = (torch.randn(1500, generator=generator) * spread).bfloat16().float()  # many equal ones
        weights = (logits - logits.max()).exp().unsqueeze(0)
        one = torch.ones(1)
        least = least_weight(weights, torch.tensor([top_k]), one * top_p, one * min_p)
        kept = weights[0] >= least
        assert torch.equal(kept, truncated(logits, 1.0, top_k, top_p, min_p) > 0)


def test_rows_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = len(CASES) * 4
    logits = torch.randn(rows, 1000, generator=generator) * 3
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*(CASES * 4), strict=True))
    uniforms = torch.rand(rows, dtype=torch.float64, generator=generator)
    together = draw(logits.clone(), temperature, top_k, top_p, min_p, uniforms)
    for i in range(rows):
        own = slice(i, i + 1)
        alone = draw(logits[own].clone(), temperature[own], top_k[own], top_p[own], min_p[own], uniforms[own])
        assert alone.item() == together[i].item()


@pytest.mark.parametrize("value", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_give_tokens_that_may_be_drawn(value: float) -> None:
    logits = torch.full((3, 700), float("-inf"))
    logits[0, 300] = logits[0, 301] = logits[1, 0] = logits[2, 699] = 1.5
    one = torch.ones(3)
    tokens = draw(logits, one, torch.zeros(3, dtype=torch.long), one, one * 0, torch.full((3,), value).double())
    assert tokens.tolist() == [300 if value == 0 else 301, 0, 699]


def test_uniform_is_uniform_and_depends_on_key_and_position() -> None:
    numbers = np.array([uniform(f"seed {key}", position) for key in range(40) for position in range(500)])
    assert len(set(numbers.tolist())) == len(numbers)
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    expected = len(numbers) / 50
    assert ((counts - expected) ** 2 / expected).sum() < 85.4  # chi-square, 49 degrees of freedom, p = 0.001
    assert uniform("seed 1", 2) == uniform("seed 1", 2)
