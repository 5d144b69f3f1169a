"""The state cache of one layer: rows of fixed size, one for each sequence, and further ones for copies.

A layer whose memory doesn't grow with its sequence (linear attention, a short convolution) keeps it here, in place of a
`LayerCache`. It knows nothing of what the numbers mean. Which row is whose is decided by the scheduler: a sequence has
the row of its slot, and rows behind those of all slots hold copies for sequences with the same beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StateRows, StepInputs


class StateShape(NamedTuple):
    """What a layer keeps of each sequence: the sizes of its tensors, all float32."""

    parts: tuple[tuple[int, ...], ...]

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(part) for part in self.parts) * torch.float32.itemsize


@dataclass(frozen=True)
class StateCache:
    """States of one layer. parts: of each tensor of its `StateShape`, [rows, *size] float32.

    A row has a meaning only once a step has written it: none is cleared when its sequence has ended.
    """

    parts: tuple[Tensor, ...]
    group = 0  # of the step's groups of layers: states have no block tables, and any will do

    @property
    def num_rows(self) -> int:
        return len(self.parts[0])


Cache = LayerCache | StateCache


@dataclass(frozen=True)
class BothCaches:
    """Of a layer with attention and a state side by side."""

    keys: LayerCache
    state: StateCache

    @property
    def group(self) -> int:
        return self.keys.group


MixerCache = Cache | BothCaches
"""What one layer's mixer writes; a model's caches stand one by one."""


def with_blocks(caches: Sequence[Cache]) -> list[LayerCache]:
    """Those of keys and values."""
    return [cache for cache in caches if isinstance(cache, LayerCache)]


def rows_of(step: StepInputs) -> StateRows:
    """Where a step's states are; a step that doesn't say has whole sequences, sequence s in row s.

    Raises ValueError where one of them goes on from tokens before, which some row would have to hold.
    """
    if step.states is not None:
        return step.states
    starts = step.query_starts.long()
    sizes = starts[1:] - starts[:-1]
    if not torch.equal(sizes, step.seq_lens.long()):
        raise ValueError("a step of sequences that go on has to say where their states are")
    rows = torch.arange(len(sizes))
    return StateRows(rows, torch.full_like(rows, -1))


def is_one_token_each(step: StepInputs, num_tokens: int) -> bool:
    """Whether each of a step's sequences has one of its tokens, and no state is copied: all of them go on at once."""
    states = rows_of(step)
    return step.max_query_len == 1 and num_tokens == len(states.rows) and not len(states.saves)


class Piece(NamedTuple):
    """Tokens begin .. end (not included) of one sequence, and the rows that the state behind them goes to."""

    sequence: int
    begin: int
    end: int
    rows: tuple[int, ...]


def pieces(step: StepInputs) -> Iterator[Piece]:
    """A step's sequences in order, cut behind the tokens whose states are copied; those without a token left out."""
    states = rows_of(step)
    copies: dict[int, list[int]] = {}
    for token, row in states.saves.tolist():
        copies.setdefault(token, []).append(row)
    starts = step.query_starts.tolist()
    for s, row in enumerate(states.rows.tolist()):
        begin = starts[s]
        end = starts[s + 1]
        for last in sorted({*(token for token in copies if begin <= token < end), end - 1}):
            if last >= begin:
                own = [row] if last == end - 1 else []
                yield Piece(s, begin, last + 1, (*own, *copies.get(last, ())))
            begin = last + 1


def taken(cache: StateCache, step: StepInputs) -> tuple[Tensor, ...]:
    """Copies of the states of a step's sequences before it, [S, *size] of each tensor; zeros where one begins."""
    sources = rows_of(step).sources
    begins = sources < 0
    parts = tuple(part[sources.clamp(min=0)] for part in cache.parts)
    if begins.any():
        for part in parts:
            part[begins] = 0
    return parts
