"""A short convolution between two gates against float64, however a sequence is cut into steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from octavo.kernels.attention.step import StateRows, StepInputs
from octavo.kernels.linear_attention.short_conv import ShortConv
from octavo.kernels.linear_attention.states import StateCache

CHANNELS, TAPS = 12, 4
LENGTHS = (30, 1, 17)


def made() -> tuple[ShortConv, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(TAPS, CHANNELS, generator=generator)
    return ShortConv(weight), [torch.randn(length, 3 * CHANNELS, generator=generator) for length in LENGTHS]


def truth(body: ShortConv, x: Tensor) -> Tensor:
    b, c, values = x.double().chunk(3, dim=1)
    padded = torch.cat((torch.zeros(TAPS - 1, CHANNELS, dtype=torch.float64), b * values))
    return torch.stack([c[t] * (padded[t : t + TAPS] * body.weight.double()).sum(0) for t in range(len(x))])


def step_of(sizes: list[int], dones: list[int], states: StateRows) -> StepInputs:
    lengths = [size + done for size, done in zip(sizes, dones, strict=True)]
    return dataclasses.replace(StepInputs.prefill(lengths, 64, sizes=sizes), states=states)


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_outputs_are_those_of_float64_in_steps_of_any_size(size: int) -> None:
    """Sums of four products of numbers near 1; rows of states move from step to step."""
    body, tokens = made()
    cache = StateCache(tuple(torch.full((8, *part), torch.nan) for part in body.state.parts))
    done = [0] * len(tokens)
    row = [-1] * len(tokens)
    outs: list[list[Tensor]] = [[] for _ in tokens]
    while live := [s for s, x in enumerate(tokens) if done[s] < len(x)]:
        sizes = [min(size, len(tokens[s]) - done[s]) for s in live]
        rows = [2 * s + (done[s] // size) % 2 for s in live]
        states = StateRows(torch.tensor(rows), torch.tensor([row[s] for s in live]))
        x = torch.cat([tokens[s][done[s] : done[s] + n] for s, n in zip(live, sizes, strict=True)])
        out = body.forward(x, step_of(sizes, [done[s] for s in live], states), cache)
        for s, n, part, place in zip(live, sizes, out.split(sizes), rows, strict=True):
            outs[s].append(part)
            done[s] += n
            row[s] = place
    for parts, x in zip(outs, tokens, strict=True):
        torch.testing.assert_close(torch.cat(parts).double(), truth(body, x), rtol=0, atol=2e-5)
        torch.testing.assert_close(body.whole(x[None])[0].double(), truth(body, x), rtol=0, atol=2e-5)


def test_copies_of_states_are_those_behind_their_tokens() -> None:
    """Behind a token that has fewer before it than the convolution has taps, too."""
    body, (x, *_) = made()
    cache = StateCache(tuple(torch.full((4, *part), torch.nan) for part in body.state.parts))
    states = StateRows(torch.tensor([0]), torch.tensor([-1]), torch.tensor([[0, 1], [9, 2]]))
    body.forward(x[:20], step_of([20], [0], states), cache)
    for source, begin in ((1, 1), (2, 10), (0, 20)):
        states = StateRows(torch.tensor([3]), torch.tensor([source]))
        found = body.forward(x[begin : begin + 7], step_of([7], [begin], states), cache)
        torch.testing.assert_close(found.double(), truth(body, x)[begin : begin + 7], rtol=0, atol=2e-5)
