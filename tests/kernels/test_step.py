"""StepInputs' constructors against a walk over the tokens, one by one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo.kernels.attention.step import StepInputs

# (tokens that are cached already, new tokens) of each sequence
SEQUENCES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=6)


def scattered(lengths: list[int], block_size: int) -> Tensor:
    """Block tables [S, B] in which no block is owned twice and neighbors aren't in order."""
    width = max(-(-length // block_size) for length in lengths)
    return torch.arange(len(lengths) * width).flip(0).reshape(len(lengths), width).int()


@given(SEQUENCES, st.sampled_from([1, 4, 16]))
def test_prefill_lays_out_every_token(sequences: list[tuple[int, int]], block_size: int) -> None:
    lengths = [cached + new for cached, new in sequences]
    sizes = [new for _, new in sequences]
    tables = scattered(lengths, block_size)
    token_ids = list(range(100, 100 + sum(sizes)))
    step = StepInputs.prefill(lengths, block_size, sizes=sizes, token_ids=token_ids, tables=tables)
    positions = [cached + i for cached, new in sequences for i in range(new)]
    owners = [s for s, new in enumerate(sizes) for _ in range(new)]
    slots = [
        int(tables[s, p // block_size]) * block_size + p % block_size for s, p in zip(owners, positions, strict=True)
    ]
    assert step.token_ids.tolist() == token_ids
    assert step.positions.tolist() == positions
    assert step.slot_mapping.tolist() == slots
    assert torch.equal(step.block_tables, tables)
    assert step.seq_lens.tolist() == lengths
    for s, n in enumerate(sizes):
        begin, end = step.query_starts[s : s + 2].tolist()
        assert owners[begin:end] == [s] * n
        assert step.logits_index[s] == end - 1
    assert (step.max_query_len, step.max_seq_len) == (max(sizes), max(lengths))
    types = (torch.int64, torch.int64, torch.int64, torch.int32, torch.int32, torch.int32, torch.int64)
    tensors = [value for value in vars(step).values() if isinstance(value, Tensor)]
    assert tuple(t.dtype for t in tensors) == types


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_decode_is_a_prefill_of_each_last_token(lengths: list[int]) -> None:
    """Without tables, blocks are consecutive and nobody's twice."""
    step = StepInputs.decode(lengths, 4)
    assert step.positions.tolist() == [length - 1 for length in lengths]
    assert step.max_query_len == 1
    width = -(-max(lengths) // 4)
    assert step.slot_mapping.tolist() == [s * width * 4 + length - 1 for s, length in enumerate(lengths)]
    assert step.logits_index.tolist() == list(range(len(lengths)))


def test_a_whole_prompt_needs_no_sizes() -> None:
    step = StepInputs.prefill([5], 8, logits_index=range(5))
    assert step.positions.tolist() == step.slot_mapping.tolist() == step.logits_index.tolist() == [0, 1, 2, 3, 4]


def test_an_empty_step_writes_nowhere_and_sees_nothing() -> None:
    step = StepInputs.empty([3, 1], max_seq_len=40, block_size=16)
    assert step.slot_mapping.tolist() == [-1] * 4
    assert step.seq_lens.tolist() == [0, 0]
    assert step.block_tables.shape == (2, 3)
    assert step.logits_index.tolist() == [2, 3]
