"""The gated delta rule: its definition in float64, the CPU's body, and the form that has gradients.

A step's division into tokens, sequences and copies must not change a bit of what the CPU computes.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.attention.step import StateRows, StepInputs
from octavo.kernels.linear_attention import gated_delta_cpu
from octavo.kernels.linear_attention.gated_delta import (
    GatedDeltaShape,
    GatedDeltaWeights,
    gated_delta,
    split,
    whole_sequences,
)
from octavo.kernels.linear_attention.states import StateCache

SHAPES = {
    "interleaved": GatedDeltaShape(2, 4, 16, 24, 4, interleaved=True),
    "apart": GatedDeltaShape(3, 3, 40, 8, 2, interleaved=False),
}
EPS = 1e-6
FLOAT32_ERROR = 2.0**-24
SUMS = 64  # an output is made of three products in a row of at most 40 terms, each rounded, and grows by decays below 1


def make_weights(shape: GatedDeltaShape, seed: int = 0) -> GatedDeltaWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    heads = shape.num_value_heads
    return GatedDeltaWeights(
        draw(shape.taps, shape.channels), -draw(heads).exp() * 0.3, draw(heads), 1 + 0.3 * draw(shape.value_dim)
    )


def make_inputs(shape: GatedDeltaShape, tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 2 * shape.keys + 2 * shape.values, generator=generator)
    return x, torch.randn(tokens, 2 * shape.num_value_heads, generator=generator)


def make_cache(shape: GatedDeltaShape, rows: int) -> StateCache:
    """Full of what mustn't be read."""
    return StateCache(tuple(torch.full((rows, *part), torch.nan) for part in shape.state.parts))


def by_definition(x: Tensor, gates: Tensor, shape: GatedDeltaShape, weights: GatedDeltaWeights) -> Tensor:
    """One sequence in float64: each token's state as the paper's product of matrices, (1 - beta k k^T) S decayed."""
    mixed, z, b, a = split(x.double(), gates.double(), shape)
    padded = F.pad(mixed, (0, 0, shape.taps - 1, 0))
    taps = weights.conv.double()
    convolved = F.silu(sum(padded[i : i + len(x)] * taps[i] for i in range(shape.taps)))
    q, k, v = torch.split(convolved, [shape.keys, shape.keys, shape.values], dim=1)
    out = torch.empty_like(z)
    for head in range(shape.num_value_heads):
        owner = head // shape.repeats
        of_key = slice(owner * shape.key_dim, (owner + 1) * shape.key_dim)
        state = torch.zeros(shape.key_dim, shape.value_dim, dtype=torch.float64)
        for t in range(len(x)):
            key = k[t, of_key] / (k[t, of_key].square().sum() + 1e-6).sqrt()
            query = q[t, of_key] / (q[t, of_key].square().sum() + 1e-6).sqrt() / shape.key_dim**0.5
            beta = torch.sigmoid(b[t, head])
            decay = torch.exp(weights.rate[head].double() * F.softplus(a[t, head] + weights.dt_bias[head].double()))
            value = v[t, head * shape.value_dim : (head + 1) * shape.value_dim]
            erase = torch.eye(shape.key_dim, dtype=torch.float64) - beta * torch.outer(key, key)
            state = erase @ (decay * state) + beta * torch.outer(key, value)
            out[t, head] = state.T @ query
    normed = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + EPS) * weights.norm.double()
    return (normed * F.silu(z)).flatten(1)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool(((found - expected).abs() <= SUMS * FLOAT32_ERROR * (1 + expected.abs().max())).all())


@pytest.mark.parametrize("name", SHAPES)
def test_all_forms_are_the_definition(name: str) -> None:
    shape = SHAPES[name]
    weights = make_weights(shape)
    x, gates = make_inputs(shape, 90)
    expected = by_definition(x, gates, shape, weights)
    step = StepInputs.prefill([90], 16)
    for body in (gated_delta, gated_delta_cpu.gated_delta):
        assert close(body(x, gates, step, make_cache(shape, 1), shape, weights, EPS), expected)
    assert close(whole_sequences(x, gates, 1, shape, weights, EPS), expected)
    twice = whole_sequences(torch.cat([x, x.flip(0)]), torch.cat([gates, gates]), 2, shape, weights, EPS)
    assert close(twice[:90], expected)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_differences(name: str) -> None:
    shape = SHAPES[name]
    weights = make_weights(shape)
    x, gates = make_inputs(shape, 70)
    x.requires_grad_()
    toward = torch.randn(70, shape.values, generator=torch.Generator().manual_seed(2))
    (whole_sequences(x, gates, 1, shape, weights, EPS) * toward).sum().backward()
    assert x.grad is not None
    change = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double() * 1e-5
    with torch.no_grad():
        plus, minus = (by_definition(x.double() + sign * change, gates, shape, weights) for sign in (1, -1))
    expected = ((plus - minus) / 2 * toward).sum()
    assert abs(float((x.grad.double() * change).sum() - expected)) < 1e-3 * abs(float(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_a_cut_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    """Sequences in pieces and in company, from a copy of a state that another step has made, or their own."""
    shape = SHAPES[name]
    weights = make_weights(shape)
    lengths = (90, 41, 70)
    given = [make_inputs(shape, length, seed) for seed, length in enumerate(lengths, 5)]
    given = [(x.to(dtype), gates) for x, gates in given]
    alone = []
    for x, gates in given:
        cache = make_cache(shape, 1)
        out = gated_delta_cpu.gated_delta(x, gates, StepInputs.prefill([len(x)], 16), cache, shape, weights, EPS)
        assert bool(out.isfinite().all())
        alone.append((out, [part[0].clone() for part in cache.parts]))
    rng = random.Random(0)
    cache = make_cache(shape, 12)
    free = list(range(12))
    rows = [free.pop(rng.randrange(len(free))) for _ in lengths]
    sources = [-1] * len(lengths)
    done = [0] * len(lengths)
    found: list[list[Tensor]] = [[] for _ in lengths]
    while any(count < length for count, length in zip(done, lengths, strict=True)):
        sizes = [min(length - count, rng.choice([0, 1, 1, 5, 20])) for count, length in zip(done, lengths, strict=True)]
        starts = [sum(sizes[:s]) for s in range(len(sizes))]
        saves, moves = [], {}
        for s, size in enumerate(sizes):
            if size > 2 and rng.random() < 0.5:  # go on from a copy in the middle, and compute the rest once more
                at = rng.randrange(1, size)
                moves[s] = at, free.pop()
                saves.append([starts[s] + at - 1, moves[s][1]])
        step = StepInputs.prefill([c + n for c, n in zip(done, sizes, strict=True)], 16, sizes=sizes)
        states = StateRows(
            torch.tensor(rows), torch.tensor(sources), torch.tensor(saves, dtype=torch.int64).view(-1, 2)
        )
        x, gates = (
            torch.cat([both[part][c : c + n] for both, c, n in zip(given, done, sizes, strict=True)]) for part in (0, 1)
        )
        step = replace(step, states=states)
        out = gated_delta_cpu.gated_delta(x, gates, step, cache, shape, weights, EPS)
        for s, size in enumerate(sizes):
            kept, source = moves.get(s, (size, rows[s]))
            found[s].append(out[starts[s] : starts[s] + kept])
            done[s] += kept
            sources[s] = source if kept else sources[s]
            if source != rows[s]:
                free.append(rows[s])  # where later copies are made; the sequence goes on in its copy's row
                rows[s] = source
    for s, (out, parts) in enumerate(alone):
        assert torch.equal(torch.cat(found[s]), out)
        assert all(torch.equal(part[rows[s]], expected) for part, expected in zip(cache.parts, parts, strict=True))


def test_a_step_without_rows_has_whole_sequences() -> None:
    shape = SHAPES["apart"]
    x, gates = make_inputs(shape, 3)
    step = StepInputs.prefill([5], 16, sizes=[3])
    for body in (gated_delta, gated_delta_cpu.gated_delta):
        with pytest.raises(ValueError, match="has to say where their states are"):
            body(x, gates, step, make_cache(shape, 1), shape, make_weights(shape), EPS)
