"""The router of a decode step in one launch: experts and weights against float64, sorting against `route.align`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from backwards import backwards
from chosen_experts import clear, errors, routed
from slow_cases import slow_if
from torch import Tensor

from octavo.kernels.launching import tuning
from octavo.kernels.launching.launch import Launch
from octavo.kernels.moe.gpu import router
from octavo.kernels.moe.gpu.route import Aligned, align, unaligned

# Tokens, experts, top_k, H: a block of tokens and a part of one, several blocks and a short one; a last part, and a
# last step of it, that are short; fewer experts than a program's. More blocks and experts than are counted at a time,
# and more pairs than are sorted.
SHAPES = [
    (1, 8, 2, 64), (1, 128, 8, 2000), (2, 60, 4, 1040), (16, 8, 1, 300), (17, 8, 2, 4096), (17, 512, 8, 520),
    (33, 5, 3, 136), (64, 128, 8, 640), (64, 60, 1, 129), (64, 512, 10, 64), (144, 512, 8, 48), (512, 12, 2, 40),
]  # fmt: skip
WAYS = [(torch.bfloat16, True, 16), (torch.float16, False, 64)]  # type of x, whether weights add up to 1, tile of pairs


@dataclass(frozen=True)
class Routed:
    """What a launch has written."""

    chosen: Tensor
    weights: Tensor
    pairs: Aligned

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.chosen, self.weights, self.pairs.order, self.pairs.tile_expert


def inputs(
    num_tokens: int, num_experts: int, top_k: int, hidden: int, dtype: torch.dtype, device: torch.device, more: int = 0
) -> tuple[Tensor, Tensor]:
    """x [T, H], and a router [E + more, H], whose logits are of some size 2; it is clear whom of E tokens choose."""
    generator = torch.Generator().manual_seed(num_tokens + 1000 * num_experts)
    x, router = (torch.randn(rows, hidden, generator=generator) for rows in (8 * num_tokens, num_experts + more))
    x, router = x.to(dtype).to(device), (router * 2 / hidden**0.5).to(dtype).to(device)
    x = x[clear(x, router[:num_experts], top_k)][:num_tokens].contiguous()
    assert len(x) == num_tokens
    return x, router


def room(num_tokens: int, num_experts: int, top_k: int, block_m: int, device: torch.device) -> Routed:
    """Poisoned."""
    chosen = torch.full((num_tokens, top_k), -7, dtype=torch.int32, device=device)
    pairs = unaligned(chosen.numel(), num_experts, block_m, device)
    pairs.order.fill_(-7)
    pairs.tile_expert.fill_(-7)
    return Routed(chosen, torch.full(chosen.shape, torch.nan, device=device), pairs)


def launched(
    x: Tensor, weight: Tensor, top_k: int, *, normalize: bool = True, block_m: int = 16, shared: int = 0
) -> Routed:
    """By one launch, whose scratch holds what is wrong and whose counters are zeros again."""
    found = room(len(x), len(weight) + max(shared - 1, 0), top_k + shared, block_m, x.device)
    how = {"normalize": normalize, "shared": shared}
    (launch,) = router.routing(x, weight, found.chosen, found.weights, found.pairs, **how)
    launch.arguments["partial"].fill_(torch.nan)
    launch.arguments["counts"].fill_(1 << 20)
    launch.arguments["ranks"].fill_(1 << 20)
    launch()
    assert not launch.arguments["counters"].any()
    return found


def assert_sorted(found: Routed, num_experts: int) -> None:
    """As `align` sorts the very same choice, and what it leaves alone."""
    expected = room(*(len(found.chosen), num_experts, found.chosen.shape[1]), found.pairs.block_m, found.chosen.device)
    align(found.chosen, num_experts, expected.pairs)()
    assert torch.equal(found.pairs.tile_expert, expected.pairs.tile_expert)
    assert torch.equal(found.pairs.order[:-1], expected.pairs.order[:-1])  # nothing reads the last


def is_large_and_second(shape: tuple[int, int, int, int], dtype: torch.dtype, *_: object) -> bool:
    """How much there is to sort has nothing to do with the type: smaller shapes show the second way by default."""
    return shape[0] * shape[1] > 1000 and dtype == torch.float16


@pytest.mark.parametrize(
    ("shape", "dtype", "normalize", "block_m"),
    slow_if(((shape, *way) for shape in SHAPES for way in WAYS), is_large_and_second),
    ids=str,
)
def test_experts_weights_and_order(
    shape: tuple[int, int, int, int], dtype: torch.dtype, normalize: bool, block_m: int, device: torch.device
) -> None:
    num_tokens, num_experts, top_k, hidden = shape
    x, weight = inputs(num_tokens, num_experts, top_k, hidden, dtype, device)
    found = launched(x, weight, top_k, normalize=normalize, block_m=block_m)
    chosen, weights, share = routed(x, weight, top_k, normalize=normalize)
    assert torch.equal(found.chosen.long(), chosen)
    torch.testing.assert_close(found.weights.double(), weights, rtol=share, atol=0)
    assert_sorted(found, num_experts)


@pytest.mark.parametrize(
    "shape", [(1, 60, 4, 4, 256), (16, 5, 1, 1, 96), (33, 6, 3, 2, 136), (64, 61, 4, 3, 64), (3, 5, 4, 8, 64)], ids=str
)
@pytest.mark.parametrize("normalize", [True, False])
def test_all_tokens_go_to_the_slices_of_a_shared_expert(
    shape: tuple[int, int, int, int, int], normalize: bool, device: torch.device
) -> None:
    """Experts behind those that are chosen, with the sigmoid of the last logit; what is chosen knows nothing of it."""
    num_tokens, num_experts, top_k, shared, hidden = shape
    x, weight = inputs(num_tokens, num_experts, top_k, hidden, torch.bfloat16, device, more=1)
    found = launched(x, weight, top_k, normalize=normalize, shared=shared)
    chosen, weights, share = routed(x, weight[:-1], top_k, normalize=normalize)
    assert torch.equal(found.chosen[:, :top_k].long(), chosen)
    torch.testing.assert_close(found.weights[:, :top_k].double(), weights, rtol=share, atol=0)
    assert found.chosen[:, top_k:].tolist() == [list(range(num_experts, num_experts + shared))] * num_tokens
    gate = (x.double() @ weight[-1].double()).sigmoid()[:, None].expand(-1, shared)
    off = math.expm1(errors(x, weight)) + 4 * 2**-24  # 1 / (1 + exp) of what `errors` says; a sum and a reciprocal
    torch.testing.assert_close(found.weights[:, top_k:].double(), gate, rtol=off, atol=0)
    assert_sorted(found, num_experts + shared)
    x[-1, 5] = torch.nan
    other = launched(x, weight, top_k, normalize=normalize, shared=shared)
    assert other.weights.isnan().all(1).nonzero().flatten().tolist() == [num_tokens - 1]
    assert_sorted(other, num_experts + shared)


def test_more_experts_than_a_program_has_take_more_launches(device: torch.device) -> None:
    """Slices of a shared one count: 505 and 8 have 506 logits."""
    for num_experts, shared, launches in ((504, 8, 1), (505, 8, 2), (512, 0, 1), (513, 0, 2)):
        x, weight = inputs(1, num_experts, 2, 64, torch.bfloat16, device, more=min(shared, 1))
        found = room(1, num_experts + shared, 2 + shared, 16, device)
        steps = router.routing(x, weight, found.chosen, found.weights, found.pairs, normalize=True, shared=shared)
        assert len(steps) == launches
        for step in steps:
            step()
        assert torch.equal(found.chosen[:, :2].long(), routed(x, weight[:num_experts], 2, normalize=True)[0])
        assert_sorted(found, num_experts + shared)


@pytest.mark.parametrize("num_tokens", [3, 40])
def test_two_launches_give_the_same_bits(num_tokens: int, device: torch.device) -> None:
    """Whichever of their programs is the last."""
    x, weight = inputs(num_tokens, 60, 4, 400, torch.bfloat16, device)
    first = launched(x, weight, 4)
    with backwards():
        second = launched(x, weight, 4)
    for one, other in zip(first.tensors, second.tensors, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("num_tokens", [2, 20])
def test_of_equal_experts_the_first_are_chosen(num_tokens: int, device: torch.device) -> None:
    """Two rows of the router are the same, or all are; then the last token has a NaN, which no other token sees."""
    x, weight = inputs(num_tokens, 6, 5, 96, torch.bfloat16, device)
    weight[4] = weight[1]
    found = launched(x, weight, 6)
    place = found.chosen.argsort(1)
    assert torch.equal(place[:, 4], place[:, 1] + 1)
    same = launched(x, weight[:1].expand(6, -1).contiguous(), 3)
    assert same.chosen.tolist() == [[0, 1, 2]] * num_tokens
    x[-1, 5] = torch.nan
    other = launched(x, weight, 6)
    assert other.weights[-1].isnan().all()
    assert sorted(other.chosen[-1].tolist()) == [0, 1, 2, 3, 4, 5]
    assert torch.equal(other.chosen[:-1], found.chosen[:-1])
    assert torch.equal(other.weights[:-1], found.weights[:-1])
    for each in (found, same, other):
        assert_sorted(each, 6)


@pytest.mark.parametrize("to", ["one", "all"])
@pytest.mark.parametrize("num_experts", [8, 128])
def test_one_expert_is_hit_by_all_and_all_are_hit(num_experts: int, to: str, device: torch.device) -> None:
    """Token t has a one in column t; the router has one there for the expert that it is to have."""
    experts = torch.arange(64, device=device) * 2 % num_experts if to == "all" else torch.full((64,), 3, device=device)
    weight = torch.zeros(num_experts, 64, dtype=torch.bfloat16, device=device)
    weight[experts, torch.arange(64, device=device)] = 1.0
    found = launched(torch.eye(64, dtype=torch.bfloat16, device=device), weight, 1)
    assert torch.equal(found.chosen[:, 0].long(), experts)
    assert_sorted(found, num_experts)


def launches(x: Tensor, weight: Tensor) -> tuple[Launch, ...]:
    found = room(len(x), len(weight), 2, 16, x.device)
    return router.routing(x, weight, found.chosen, found.weights, found.pairs, normalize=True)


def test_many_tokens_or_a_wide_router_have_two_launches(device: torch.device) -> None:
    """After a product of torch's, that is; they choose the same."""
    x, weight = inputs(512, 8, 2, 96, torch.bfloat16, device)
    assert [len(launches(x[:n], weight)) for n in (1, 512)] == [1, 1]
    assert len(launches(torch.cat([x, x[:1]]), weight)) == 2
    assert len(launches(x, weight.repeat(65, 1))) == 2
    assert len(launches(x.float(), weight.float())) == 2
    gemm_swap_ab, apart = launched(x, weight, 2), room(512, 8, 2, 16, device)
    steps = router.routing(x, weight.float(), apart.chosen, apart.weights, apart.pairs, normalize=True)
    assert len(steps) == 2
    for step in steps:
        step()
    assert torch.equal(gemm_swap_ab.chosen, apart.chosen)
    assert torch.equal(gemm_swap_ab.pairs.tile_expert, apart.pairs.tile_expert)


def test_a_row_of_the_table_gives_the_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, and warps; no more parts than there are steps of columns."""
    x, weight = inputs(20, 40, 4, 1000, torch.bfloat16, device)
    chosen, _, _ = routed(x, weight, 4, normalize=True)
    row = {"max_tokens": 20, "block_e": 32, "block_k": 64, "num_warps": 32, "num_stages": 3}
    for parts in (1, 3, 99):
        monkeypatch.setitem(tuning.rows_of(tuning.card_of(device)), "moe router", [{**row, "split_k": parts}])
        tuning.row_of.cache_clear()
        (launch,) = launches(x, weight)
        assert launch.grid == (2, 2 * min(parts, 16))
        assert launch.arguments["sizes"].CHOSEN == router.ROWS  # a block's tokens, and none of the next one's
        found = launched(x, weight, 4)
        assert torch.equal(found.chosen.long(), chosen)
        assert_sorted(found, 40)
    tuning.row_of.cache_clear()


def test_a_launch_takes_what_lies_elsewhere(device: torch.device) -> None:
    """Counters may be more than it needs."""
    x, weight = inputs(3, 8, 2, 64, torch.bfloat16, device)
    found, other = launched(x, weight, 2), room(3, 8, 2, 16, device)
    (launch,) = router.routing(x, weight, other.chosen, other.weights, other.pairs, normalize=True)
    counters = torch.zeros(9, dtype=torch.int32, device=device)
    replace(launch, arguments={**launch.arguments, "counters": counters})()
    assert not counters.any()
    assert torch.equal(other.chosen, found.chosen)
