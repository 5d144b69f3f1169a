"""A short convolution between two gates against float64, however a sequence is cut into steps."""

from __future__ import annotations

import pytest
import torch
from state_steps import in_steps, step_of
from torch import Tensor

from octavo.kernels.attention.step import StateRows
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


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_outputs_are_those_of_float64_in_steps_of_any_size(size: int) -> None:
    """Sums of four products of numbers near 1; rows of states move from step to step."""
    body, tokens = made()
    cache = StateCache(tuple(torch.full((8, *part), torch.nan) for part in body.state.parts))
    for found, x in zip(in_steps(body.forward, tokens, size, cache), tokens, strict=True):
        torch.testing.assert_close(found.double(), truth(body, x), rtol=0, atol=2e-5)
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
