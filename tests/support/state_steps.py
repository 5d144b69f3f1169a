"""Steps of layers that keep states: sequences are computed some tokens at a time, in rows that change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from octavo.kernels.attention.step import StateRows, StepInputs
from octavo.kernels.linear_attention.states import StateCache

BLOCK_SIZE = 256


def step_of(sizes: list[int], dones: list[int], states: StateRows) -> StepInputs:
    """sizes, dones: of each sequence its tokens in the step, and those before it."""
    lengths = [size + done for size, done in zip(sizes, dones, strict=True)]
    return dataclasses.replace(StepInputs.prefill(lengths, BLOCK_SIZE, sizes=sizes), states=states)


def in_steps(
    run: Callable[[Tensor, StepInputs, StateCache], Tensor], tokens: Sequence[Tensor], size: int, cache: StateCache
) -> list[Tensor]:
    """Every sequence's output, computed so many tokens at a time, with states in rows that move from step to step.

    cache: of two rows for each sequence.
    """
    done = [0] * len(tokens)
    row = [-1] * len(tokens)
    outs: list[list[Tensor]] = [[] for _ in tokens]
    turn = 0
    while live := [s for s, x in enumerate(tokens) if done[s] < len(x)]:
        sizes = [min(size, len(tokens[s]) - done[s]) for s in live]
        rows = [2 * s + turn % 2 for s in live]
        states = StateRows(torch.tensor(rows), torch.tensor([row[s] for s in live]))
        x = torch.cat([tokens[s][done[s] : done[s] + n] for s, n in zip(live, sizes, strict=True)])
        out = run(x, step_of(sizes, [done[s] for s in live], states), cache)
        for s, n, part, place in zip(live, sizes, out.split(sizes), rows, strict=True):
            outs[s].append(part)
            done[s] += n
            row[s] = place
        turn += 1
    return [torch.cat(parts) for parts in outs]
