"""Mamba 2's state space against a computation token by token in float64, however a sequence is cut into steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from state_steps import in_steps, step_of
from torch import Tensor

from octavo.kernels.attention.step import StateRows, StepInputs
from octavo.kernels.linear_attention import mamba2, mamba2_cpu
from octavo.kernels.linear_attention.mamba2 import Mamba2Body, Mamba2Shape, Mamba2Weights
from octavo.kernels.linear_attention.mamba2_decode_cpu import mamba2_decode
from octavo.kernels.linear_attention.states import StateCache


def in_torch(
    x: Tensor, step: StepInputs, cache: StateCache, shape: Mamba2Shape, weights: Mamba2Weights, eps: float
) -> Tensor:
    return mamba2_cpu.Mamba2(shape, weights, eps).forward(x, step, cache)


def on_cpu(
    x: Tensor, step: StepInputs, cache: StateCache, shape: Mamba2Shape, weights: Mamba2Weights, eps: float
) -> Tensor:
    return mamba2_cpu.Mamba2(shape, weights, eps, mamba2_decode).forward(x, step, cache)


BODIES: dict[str, Mamba2Body] = {"reference": mamba2.mamba2, "torch": in_torch, "cpu": on_cpu}
SHAPES = {
    "one group": Mamba2Shape(num_heads=4, head_dim=8, num_groups=1, state_dim=16, taps=4),
    "two groups": Mamba2Shape(num_heads=6, head_dim=4, num_groups=2, state_dim=8, taps=3),
    "limits": Mamba2Shape(4, 8, 1, 16, taps=4, dt_limits=(0.3, 0.6)),
    "gate behind the norm": Mamba2Shape(6, 4, 2, 8, taps=4, norms_first=True),
    "many channels": Mamba2Shape(3, 200, 1, 20, taps=2),
}
LENGTHS = (150, 1, 67)
EPS = 1e-5


def weights_of(shape: Mamba2Shape) -> Mamba2Weights:
    generator = torch.Generator().manual_seed(3)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    heads = shape.num_heads
    return Mamba2Weights(
        conv=random(shape.taps, shape.channels) / shape.taps**0.5,
        conv_bias=random(shape.channels) * 0.1,
        rate=-torch.exp(random(heads)),
        dt_bias=random(heads) - 1,
        skip=random(heads),
        norm=1 + random(shape.inner) * 0.1,
    )


def tokens_of(shape: Mamba2Shape) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(length, sum(shape.columns), generator=generator) for length in LENGTHS]


def truth(x: Tensor, shape: Mamba2Shape, weights: Mamba2Weights) -> Tensor:
    """As the module's text says it, with loops over heads, in float64: [T, inner]."""
    given = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    w = {name: tensor.double() for name, tensor in given.items() if tensor is not None}
    z, mixed, dt = (x.double() * w.get("factors", 1.0)).split(shape.columns, dim=1)
    padded = torch.cat((torch.zeros(shape.taps - 1, shape.channels, dtype=torch.float64), mixed))
    states = [torch.zeros(shape.head_dim, shape.state_dim, dtype=torch.float64) for _ in range(shape.num_heads)]
    rows = []
    for t in range(len(x)):
        convolved = (padded[t : t + shape.taps] * w["conv"]).sum(0) + w["conv_bias"]
        convolved = convolved * torch.sigmoid(convolved)
        x_t, b_t, c_t = convolved.split((shape.inner, *[shape.num_groups * shape.state_dim] * 2))
        y = []
        for h in range(shape.num_heads):
            group = h * shape.num_groups // shape.num_heads
            b, c = (each[group * shape.state_dim :][: shape.state_dim] for each in (b_t, c_t))
            step = torch.log1p(torch.exp(dt[t, h] + w["dt_bias"][h])).clamp(*shape.dt_limits)
            value = x_t[h * shape.head_dim :][: shape.head_dim]
            states[h] = torch.exp(w["rate"][h] * step) * states[h] + step * torch.outer(value, b)
            y.append(states[h] @ c + w["skip"][h] * value)
        gate = z[t] * torch.sigmoid(z[t])
        if "norm" not in w:
            rows.append(torch.cat(y) * gate)
        elif shape.norms_first:
            rows.append(normed(torch.cat(y), shape) * w["norm"] * gate)
        else:
            rows.append(normed(torch.cat(y) * gate, shape) * w["norm"])
    return torch.stack(rows)


def normed(x: Tensor, shape: Mamba2Shape) -> Tensor:
    groups = x.view(shape.num_groups, -1)
    return (groups / (groups.square().mean(1, keepdim=True) + EPS).sqrt()).flatten()


@pytest.mark.parametrize("size", [1, 7, 64, 65, 200])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("body", BODIES)
def test_outputs_are_those_of_float64_in_steps_of_any_size(body: str, name: str, size: int) -> None:
    """Sums of some hundred numbers near 1 in float32, of which decays forget all but the latest."""
    shape = SHAPES[name]
    weights = weights_of(shape)
    tokens = tokens_of(shape)
    cache = StateCache(tuple(torch.full((8, *part), torch.nan) for part in shape.state.parts))
    outs = in_steps(lambda x, step, cache: BODIES[body](x, step, cache, shape, weights, EPS), tokens, size, cache)
    for found, x in zip(outs, tokens, strict=True):
        expected = truth(x, shape, weights)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("body", BODIES)
def test_outputs_of_the_linear_layer_are_multiplied_and_a_norm_may_be_missing(body: str) -> None:
    shape = SHAPES["two groups"]
    factors = 0.5 + torch.rand(sum(shape.columns), generator=torch.Generator().manual_seed(5))
    weights = dataclasses.replace(weights_of(shape), norm=None, factors=factors)
    (x, *_) = tokens_of(shape)
    cache = StateCache(tuple(torch.zeros(2, *part) for part in shape.state.parts))
    expected = truth(x, shape, weights)
    for size in (70, 1):
        (found,) = in_steps(lambda x, step, cache: BODIES[body](x, step, cache, shape, weights, EPS), [x], size, cache)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("body", BODIES)
def test_copies_of_states_are_those_behind_their_tokens(body: str) -> None:
    """A sequence that goes on from a copy, whose own row has gone on meanwhile; another begins in the same step."""
    shape = SHAPES["two groups"]
    weights = weights_of(shape)
    first, _, second = tokens_of(shape)
    cache = StateCache(tuple(torch.full((6, *part), torch.nan) for part in shape.state.parts))
    both = torch.cat((first[:100], second[:20]))
    saves = torch.tensor([[31, 3], [99, 4], [109, 5]])
    states = StateRows(torch.tensor([0, 1]), torch.tensor([-1, -1]), saves)
    BODIES[body](both, step_of([100, 20], [0, 0], states), cache, shape, weights, EPS)
    for source, begin, x in ((3, 32, first), (4, 100, first), (0, 100, first), (5, 10, second), (1, 20, second)):
        expected = truth(x[: begin + 17], shape, weights)[begin:]
        for count in (17, 1):
            states = StateRows(torch.tensor([2]), torch.tensor([source]))
            step = step_of([count], [begin], states)
            found = BODIES[body](x[begin : begin + count], step, cache, shape, weights, EPS)
            bound = 2e-5 * float(expected.abs().max())
            torch.testing.assert_close(found.double(), expected[:count], rtol=0, atol=bound)


@pytest.mark.parametrize("size", [200, 1])
def test_half_types_are_computed_in_float32(size: int) -> None:
    shape = SHAPES["one group"]
    weights = weights_of(shape)
    x = tokens_of(shape)[0].bfloat16()
    cache = StateCache(tuple(torch.zeros(2, *part) for part in shape.state.parts))
    (found,) = in_steps(lambda x, step, cache: on_cpu(x, step, cache, shape, weights, EPS), [x], size, cache)
    assert found.dtype == torch.bfloat16
    expected = truth(x, shape, weights)
    unit = 2.0**-8  # of rounding what comes out
    assert bool(((found.double() - expected).abs() <= unit * expected.abs() + 2e-5 * expected.abs().max()).all())
