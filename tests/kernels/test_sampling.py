"""Drawing against a straightforward reference in float64: which tokens may come, and how often they do.

The specification (plain torch) and the CPU body are both held to it.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from octavo.kernels.sampling import cpu, reference


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


BODIES = [reference, cpu]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
def test_what_a_grammar_forbids(body: ModuleType, vocab: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, vocab, generator=generator)
    rows = torch.tensor([4, 0, 5, 2])
    allowed = torch.rand(4, vocab, generator=generator) < 0.5
    allowed[1] = False
    allowed[2] = True
    bits = torch.zeros(4, -(-vocab // 32), dtype=torch.int64)
    for row, token in allowed.nonzero().tolist():
        bits[row, token // 32] |= 1 << token % 32
    expected = logits.tolist()
    for place, row in enumerate(rows.tolist()):
        expected[row] = [x if ok else -torch.inf for x, ok in zip(expected[row], allowed[place].tolist(), strict=True)]
    body.forbid(logits, rows, bits.to(torch.int32))
    assert logits.tolist() == expected


def draw_many(
    body: ModuleType, logits: Tensor, count: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """Draws at evenly spaced uniform numbers, which makes frequencies exact up to 1 / count per token."""
    full = torch.full((count,), 1.0)
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    rows = logits.expand(count, -1).clone()
    return body.draw(rows, full * temperature, (full * top_k).long(), full * top_p, full * min_p, uniforms)


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
@pytest.mark.parametrize("body", BODIES)
def test_frequencies_are_the_truncated_distribution(
    body: ModuleType, case: tuple[float, int, float, float], vocab: int
) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    expected = truncated(logits, *case)
    count = 4000
    found = torch.bincount(draw_many(body, logits, count, *case), minlength=vocab).double() / count
    assert not found[expected == 0].any(), "a token was drawn that had been cut off"
    # Each token owns an interval of evenly spaced points: one point more or less at each end. Weights are float32.
    torch.testing.assert_close(found, expected, rtol=0, atol=1 / count + 1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("body", BODIES)
def test_ties_stay_together(body: ModuleType, case: tuple[float, int, float, float]) -> None:
    """Logits as bfloat16 makes them, many equal; flat ones keep all of the vocabulary, steep ones a few tokens."""
    _, top_k, top_p, min_p = case
    generator = torch.Generator().manual_seed(1)
    for spread in (0.0, 0.05, 1.0, 10.0):
        logits = (torch.randn(600, generator=generator) * spread).bfloat16().float()
        expected = truncated(logits, 1.0, top_k, top_p, min_p)
        count = 2000
        found = torch.bincount(draw_many(body, logits, count, 1.0, top_k, top_p, min_p), minlength=600) / count
        assert not found[expected == 0].any()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1 / count + 1e-6)


@pytest.mark.parametrize("body", BODIES)
def test_rows_do_not_see_each_other(body: ModuleType) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = len(CASES) * 4
    logits = torch.randn(rows, 1000, generator=generator) * 3
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*(CASES * 4), strict=True))
    uniforms = torch.rand(rows, dtype=torch.float64, generator=generator)
    together = body.draw(logits.clone(), temperature, top_k, top_p, min_p, uniforms)
    for i in range(rows):
        own = slice(i, i + 1)
        alone = body.draw(logits[own].clone(), temperature[own], top_k[own], top_p[own], min_p[own], uniforms[own])
        assert alone.item() == together[i].item()


@pytest.mark.parametrize("value", [0.0, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("body", BODIES)
def test_the_ends_of_the_unit_interval_give_tokens_that_may_be_drawn(body: ModuleType, value: float) -> None:
    logits = torch.full((3, 700), float("-inf"))
    logits[0, 300] = logits[0, 301] = logits[1, 0] = logits[2, 699] = 1.5
    one = torch.ones(3)
    tokens = body.draw(
        logits, one, torch.zeros(3, dtype=torch.long), one, one * 0, torch.full((3,), value, dtype=torch.float64)
    )
    assert tokens.tolist() == [300 if value == 0 else 301, 0, 699]


def test_the_cpu_body_draws_what_the_specification_draws() -> None:
    """The same token, unless a uniform number falls between the two roundings of a boundary: none of these does."""
    generator = torch.Generator().manual_seed(6)
    for trial in range(60):
        vocab = (7, 64, 300, 5000)[trial % 4]
        logits = torch.randn(8, vocab, generator=generator) * (1 + trial % 5)
        if trial % 3 == 0:
            logits[:, ::3] = float("-inf")
        draws = torch.rand(6, 8, generator=generator)
        top_k = torch.where(draws[0] < 0.5, (draws[1] * 60).long(), 0)
        top_p, min_p = torch.where(draws[2] < 0.5, draws[3], 1.0), torch.where(draws[4] < 0.3, draws[5], 0.0)
        uniforms = torch.rand(8, dtype=torch.float64, generator=generator)
        args = (draws[3] + 0.3, top_k, top_p, min_p, uniforms)
        assert torch.equal(cpu.draw(logits, *args), reference.draw(logits.clone(), *args))


@pytest.mark.parametrize("count", [0, 1, 5, 64, 100])
@pytest.mark.parametrize("body", BODIES)
def test_logprobs_and_ranks(body: ModuleType, count: int) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(6, 1000, generator=generator) * 3
    logits[2] = logits[2].bfloat16().float()  # ties
    logits[3, 1:] = float("-inf") if count <= 1 else -80.0
    chosen = torch.randint(0, 1000, (6,), generator=generator)
    truth = logits.double().log_softmax(-1)
    found, ranks, top_ids, top = body.logprobs(logits, chosen, count)
    rows = torch.arange(6)
    # float32 numbers under 128 and a sum of 1000: some units of 2^-17
    torch.testing.assert_close(found.double(), truth[rows, chosen], rtol=0, atol=3e-5)
    assert torch.equal(ranks, (truth > truth[rows, chosen].unsqueeze(1)).sum(-1) + 1)
    torch.testing.assert_close(top.double(), truth.topk(count).values, rtol=0, atol=3e-5)
    assert torch.equal(logits.gather(1, top_ids), logits.topk(count).values)
