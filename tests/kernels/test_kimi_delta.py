"""Kimi's delta attention against a computation token by token in float64, however a sequence is cut into steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from state_steps import in_steps, step_of
from torch import Tensor

from octavo.kernels.attention.step import StateRows, StepInputs
from octavo.kernels.linear_attention.kimi_delta import KimiDelta, KimiDeltaShape, KimiDeltaWeights
from octavo.kernels.linear_attention.states import StateCache

SHAPE = KimiDeltaShape(num_heads=3, head_dim=8, taps=3)
LENGTHS = (70, 1, 33)
EPS = 1e-5


def body() -> KimiDelta:
    generator = torch.Generator().manual_seed(3)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    inner = SHAPE.inner
    weights = KimiDeltaWeights(
        conv=random(SHAPE.taps, 3 * inner) / SHAPE.taps**0.5,
        rate=-torch.exp(random(SHAPE.num_heads)),
        dt_bias=random(inner) - 1,
        forget=random(inner, SHAPE.head_dim) / SHAPE.head_dim**0.5,
        gate=random(inner, SHAPE.head_dim) / SHAPE.head_dim**0.5,
        norm=1 + random(SHAPE.head_dim) * 0.1,
    )
    return KimiDelta(SHAPE, weights, EPS)


def tokens_of() -> list[Tensor]:
    """Of each sequence [T, 3 H * D + H + 2 D]: what the linear layer gives, and the gates beside it."""
    generator = torch.Generator().manual_seed(4)
    width = 3 * SHAPE.inner + sum(SHAPE.gates)
    return [torch.randn(length, width, generator=generator) for length in LENGTHS]


def run(x: Tensor, step: StepInputs, cache: StateCache) -> Tensor:
    return body().forward(x[:, : 3 * SHAPE.inner], x[:, 3 * SHAPE.inner :], step, cache)


def truth(x: Tensor) -> Tensor:
    """As the module's text says it, with loops over heads, in float64: [T, H * D]."""
    weights = body().weights
    w = {field.name: getattr(weights, field.name).double() for field in dataclasses.fields(weights)}
    mixed, b, f, g = x.double().split((3 * SHAPE.inner, *SHAPE.gates), dim=1)
    padded = torch.cat((torch.zeros(SHAPE.taps - 1, 3 * SHAPE.inner, dtype=torch.float64), mixed))
    d = SHAPE.head_dim
    states = [torch.zeros(d, d, dtype=torch.float64) for _ in range(SHAPE.num_heads)]
    rows = []
    for t in range(len(x)):
        convolved = (padded[t : t + SHAPE.taps] * w["conv"]).sum(0)
        q, k, v = (convolved * torch.sigmoid(convolved)).split(SHAPE.inner)
        grown = torch.log1p(torch.exp(w["forget"] @ f[t] + w["dt_bias"]))
        z = torch.sigmoid(w["gate"] @ g[t])
        for h in range(SHAPE.num_heads):
            own = slice(h * d, (h + 1) * d)
            key = k[own] / (k[own].square().sum() + 1e-6).sqrt()
            query = q[own] / (q[own].square().sum() + 1e-6).sqrt() / d**0.5
            state = states[h] * torch.exp(w["rate"][h] * grown[own])
            state = state + torch.sigmoid(b[t, h]) * torch.outer(v[own] - state @ key, key)
            states[h] = state
            out = state @ query
            rows.append(out / (out.square().mean() + EPS).sqrt() * w["norm"] * z[own])
    return torch.cat(rows).view(len(x), -1)


def empty(rows: int) -> StateCache:
    return StateCache(tuple(torch.full((rows, *part), torch.nan) for part in SHAPE.state.parts))


@pytest.mark.parametrize("size", [1, 7, 16, 17, 100])
def test_outputs_are_those_of_float64_in_steps_of_any_size(size: int) -> None:
    """Sums of some hundred numbers near 1 in float32, of which decays forget all but the latest."""
    tokens = tokens_of()
    for found, x in zip(in_steps(run, tokens, size, empty(6)), tokens, strict=True):
        expected = truth(x)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_copies_of_states_are_those_behind_their_tokens() -> None:
    """A sequence that goes on from a copy, whose own row has gone on meanwhile; another begins in the same step."""
    first, _, second = tokens_of()
    cache = empty(6)
    saves = torch.tensor([[21, 3], [49, 4], [59, 5]])
    states = StateRows(torch.tensor([0, 1]), torch.tensor([-1, -1]), saves)
    run(torch.cat((first[:50], second[:20])), step_of([50, 20], [0, 0], states), cache)
    for source, begin, x in ((3, 22, first), (4, 50, first), (0, 50, first), (5, 10, second), (1, 20, second)):
        end = begin + 12
        states = StateRows(torch.tensor([2]), torch.tensor([source]))
        found = run(x[begin:end], step_of([12], [begin], states), cache)
        expected = truth(x[:end])[begin:]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_decays_that_forget_all_leave_no_infinity() -> None:
    """What earlier tokens of a chunk would have to be multiplied by to be seen again is beyond float32."""
    one = body()
    forgetting = dataclasses.replace(one, weights=dataclasses.replace(one.weights, rate=one.weights.rate * 1e4))
    (x, *_) = tokens_of()
    step = step_of([len(x)], [0], StateRows(torch.tensor([0]), torch.tensor([-1])))
    found = forgetting.forward(x[:, : 3 * SHAPE.inner], x[:, 3 * SHAPE.inner :], step, empty(1))
    assert found.isfinite().all()
