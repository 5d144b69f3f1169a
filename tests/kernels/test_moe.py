"""Routing and the grouped forward against a loop over tokens in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.moe import reference as moe

NUM_EXPERTS, HIDDEN, TOP_K = 5, 16, 3


def inputs(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, H], a router [E, H], and one matrix [H, H] per expert."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((num_tokens, HIDDEN), (NUM_EXPERTS, HIDDEN), (NUM_EXPERTS, HIDDEN, HIDDEN))
    x, router, experts = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, router, experts / HIDDEN**0.5


def softmax(router: Tensor, *, normalize: bool) -> moe.Router:
    return moe.Router(router, moe.Routing(TOP_K, normalize))


def by_tokens(x: Tensor, router: Tensor, experts: Tensor, normalize: bool) -> Tensor:
    """What the block's formula says, one token and one expert at a time."""
    x, router, experts = x.double(), router.double(), experts.double()
    out = torch.zeros_like(x)
    for t, token in enumerate(x):
        scores = [float(torch.exp(token @ row)) for row in router]
        shares = [score / sum(scores) for score in scores]
        best = sorted(range(NUM_EXPERTS), key=lambda e: -shares[e])[:TOP_K]
        total = sum(shares[e] for e in best) if normalize else 1.0
        for e in best:
            out[t] += shares[e] / total * (experts[e] @ token)
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 40])
def test_tokens_go_through_their_experts_and_back(num_tokens: int, normalize: bool) -> None:
    x, router, experts = inputs(num_tokens)
    rows: list[int] = []

    def run(expert: int, group: Tensor, tokens: Tensor) -> Tensor:
        assert torch.equal(group, x[tokens])
        rows.append(group.shape[0])
        return group @ experts[expert].t()

    chosen, weights = moe.route(x, softmax(router, normalize=normalize))
    out = moe.grouped(x, chosen, weights, NUM_EXPERTS, run)
    # Sums of 16 products of numbers near 1 in float32.
    torch.testing.assert_close(out.double(), by_tokens(x, router, experts, normalize), rtol=1e-5, atol=1e-5)
    assert sum(rows) == num_tokens * TOP_K
    assert 0 not in rows
    assert len(rows) <= max(NUM_EXPERTS, TOP_K)
    assert moe.tokens_per_expert(chosen, NUM_EXPERTS).sum() == num_tokens * TOP_K


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 40])
def test_weights_may_be_of_inputs(num_tokens: int) -> None:
    """By sigmoids, as Llama 4 has it; an expert isn't linear. Two ranks add up to all."""
    x, router, experts = inputs(num_tokens)
    routing = moe.Routing(TOP_K, normalize=False, scores="sigmoid", weighs="inputs")
    chosen, weights = moe.route(x, moe.Router(router, routing))
    total = torch.zeros(num_tokens, HIDDEN, dtype=torch.float64)
    for first, count in ((0, 2), (2, 3)):

        def run(expert: int, group: Tensor, _: Tensor, first: int = first) -> Tensor:
            return (group @ experts[first + expert].t()).square()

        total += moe.grouped(x, chosen, weights, count, run, first, weighs="inputs")
    truth = torch.zeros(num_tokens, HIDDEN, dtype=torch.float64)
    for t, token in enumerate(x.double()):
        scores = router.double() @ token
        for e in scores.argsort(descending=True)[:TOP_K]:
            truth[t] += (experts[e].double() @ (torch.sigmoid(scores[e]) * token)).square()
    torch.testing.assert_close(total, truth, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_tie() -> None:
    """Their sigmoids are 1 in float32."""
    routing = moe.Routing(1, normalize=False, scores="sigmoid", weighs="inputs")
    chosen, weights = moe.route(torch.tensor([[1.0]]), moe.Router(torch.tensor([[30.0], [40.0], [35.0]]), routing))
    assert (chosen.tolist(), weights.tolist()) == ([[1]], [[1.0]])


def test_a_token_gets_the_same_bits_in_any_batch() -> None:
    """With experts that only multiply, so that no GEMM's split of its sums is in the way."""
    x, router, _ = inputs(40)
    chosen, weights = moe.route(x, softmax(router, normalize=True))

    def block(rows: slice) -> Tensor:
        def run(expert: int, group: Tensor, _: Tensor) -> Tensor:
            return group * (expert + 1.5)

        return moe.grouped(x[rows], chosen[rows], weights[rows], NUM_EXPERTS, run)

    whole = block(slice(None))
    for part in (slice(7, 8), slice(7, 20)):
        assert torch.equal(block(part), whole[part])


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 40])
def test_ranks_with_some_of_the_experts_add_up_to_all(num_tokens: int) -> None:
    """Pairs of experts elsewhere are dropped before anything runs; a rank that no token goes to adds zeros."""
    x, router, experts = inputs(num_tokens)
    chosen, weights = moe.route(x, softmax(router, normalize=True))
    total = torch.zeros(num_tokens, HIDDEN, dtype=torch.float64)
    ran: list[tuple[int, int]] = []
    for first, count in ((0, 2), (2, 2), (4, 1)):

        def run(expert: int, group: Tensor, tokens: Tensor, first: int = first) -> Tensor:
            assert torch.equal(group, x[tokens])
            ran.extend((first + expert, index) for index in range(group.shape[0]))
            return group @ experts[first + expert].t()

        total += moe.grouped(x, chosen, weights, count, run, first)
    torch.testing.assert_close(total, by_tokens(x, router, experts, True), rtol=1e-5, atol=1e-5)
    counts = moe.tokens_per_expert(chosen, NUM_EXPERTS).tolist()
    assert sorted(ran) == [(expert, index) for expert, count in enumerate(counts) for index in range(count)]


def test_no_token_for_this_rank_runs_nothing() -> None:
    x = inputs(3)[0]
    for rows in (1, 3):
        chosen = torch.tensor([[0, 3], [3, 0], [0, 3]])[:rows]
        weights = torch.full((rows, 2), 0.5)
        out = moe.grouped(x[:rows], chosen, weights, 2, lambda *_: pytest.fail("ran"), 1)
        assert torch.equal(out, torch.zeros(rows, HIDDEN))


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_sums_that_others_are_added_to_stay_as_wide_as_the_experts_make_them(num_tokens: int) -> None:
    """A rank's experts give float32 for bfloat16 tokens: a sum that was rounded before the ranks' sum loses 16 bits."""
    x, router, experts = inputs(num_tokens)
    chosen, weights = moe.route(x, softmax(router, normalize=False))
    out = moe.grouped(x.bfloat16(), chosen, weights, NUM_EXPERTS, lambda e, rows, _: rows.float() @ experts[e].t())
    expected = moe.grouped(x.bfloat16().float(), chosen, weights, NUM_EXPERTS, lambda e, rows, _: rows @ experts[e].t())
    assert torch.equal(out, expected)


def test_logits_of_bf16_tokens_are_not_rounded() -> None:
    """Two experts whose logits differ by less than bf16 tells apart are still told apart."""
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    router = torch.tensor([[64.0, 0.0], [64.0, 0.01], [0.0, 0.0]])
    assert moe.route(x, moe.Router(router, moe.Routing(1, normalize=True)))[0].tolist() == [[1]]
