"""A short convolution between two gates against float64, however a sequence is cut into steps."""

from __future__ import annotations

import pytest
import torch
from state_steps import in_steps, step_of
from torch import Tensor

from octavo.kernels.attention.step import StateRows
from octavo.kernels.linear_attention.short_conv import ShortConv, ShortConvDecode
from octavo.kernels.linear_attention.short_conv_decode_cpu import short_conv_decode
from octavo.kernels.linear_attention.states import StateCache

CHANNELS, TAPS = 600, 4
LENGTHS = (30, 1, 17)
BODIES = {"torch": None, "cpu": short_conv_decode}


def made(decode: ShortConvDecode | None = None) -> tuple[ShortConv, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(TAPS, CHANNELS, generator=generator)
    return ShortConv(weight, decode), [torch.randn(length, 3 * CHANNELS, generator=generator) for length in LENGTHS]


def truth(body: ShortConv, x: Tensor) -> Tensor:
    b, c, values = x.double().chunk(3, dim=1)
    padded = torch.cat((torch.zeros(TAPS - 1, CHANNELS, dtype=torch.float64), b * values))
    return torch.stack([c[t] * (padded[t : t + TAPS] * body.weight.double()).sum(0) for t in range(len(x))])


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_outputs_are_those_of_float64_in_steps_of_any_size(size: int, name: str) -> None:
    """Sums of four products of numbers near 1; rows of states move from step to step."""
    body, tokens = made(BODIES[name])
    cache = StateCache(tuple(torch.full((8, *part), torch.nan) for part in body.state.parts))
    for found, x in zip(in_steps(body.forward, tokens, size, cache), tokens, strict=True):
        torch.testing.assert_close(found.double(), truth(body, x), rtol=0, atol=2e-5)
        torch.testing.assert_close(body.whole(x[None])[0].double(), truth(body, x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", BODIES)
def test_copies_of_states_are_those_behind_their_tokens(name: str) -> None:
    """Behind a token that has fewer before it than the convolution has taps, too."""
    body, (x, *_) = made(BODIES[name])
    cache = StateCache(tuple(torch.full((4, *part), torch.nan) for part in body.state.parts))
    states = StateRows(torch.tensor([0]), torch.tensor([-1]), torch.tensor([[0, 1], [9, 2]]))
    body.forward(x[:20], step_of([20], [0], states), cache)
    for source, begin in ((1, 1), (2, 10), (0, 20)):
        for end in (begin + 7, begin + 1):
            states = StateRows(torch.tensor([3]), torch.tensor([source]))
            found = body.forward(x[begin:end], step_of([end - begin], [begin], states), cache)
            torch.testing.assert_close(found.double(), truth(body, x)[begin:end], rtol=0, atol=2e-5)


def test_half_types_are_computed_in_float32() -> None:
    body, (x, *_) = made(short_conv_decode)
    x = x.bfloat16()
    cache = StateCache(tuple(torch.full((2, *part), torch.nan) for part in body.state.parts))
    (found,) = in_steps(body.forward, [x], 1, cache)
    assert found.dtype == torch.bfloat16
    expected = truth(body, x)
    assert bool(((found.double() - expected).abs() <= 2.0**-8 * expected.abs() + 2e-5).all())
