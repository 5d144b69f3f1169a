"""From a plan to tensors: the StepInputs of one step, built in numpy, in the host's memory.

The block tables of running sequences stand in one array, a row each, that grows with them; a step gathers its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.kernels.attention.step import StepInputs
from octavo.runtime.scheduling.scheduler import SchedulerConfig, StepPlan, Work


class InputBuilder:
    """Owns the block tables as arrays: row r belongs to the running sequence whose `row` is r."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._block_size = config.block_size
        width = -(-config.max_model_len // config.block_size)
        self._tables = np.zeros((config.max_num_seqs, width), dtype=np.int32)
        self._num_filled = [0] * config.max_num_seqs

    def build(self, plan: StepPlan) -> StepInputs:
        """The tensors of this step, in the order of the plan's works. Call once for each plan, in turn."""
        works = plan.works
        rows = np.array([self._update_row(work) for work in works], dtype=np.int64)
        starts = np.array([work.start for work in works], dtype=np.int64)
        seq_lens = np.array([work.end for work in works], dtype=np.int32)
        sizes = seq_lens - starts
        query_starts = np.zeros(len(works) + 1, dtype=np.int64)
        np.cumsum(sizes, out=query_starts[1:])
        if plan.num_tokens == len(works):  # one token each: a decode step
            positions = starts
            token_rows = rows
        else:
            positions = np.arange(plan.num_tokens) + np.repeat(starts - query_starts[:-1], sizes)
            token_rows = np.repeat(rows, sizes)
        blocks, offsets = np.divmod(positions, self._block_size)
        slots = self._tables[token_rows, blocks] * np.int64(self._block_size) + offsets
        max_seq_len = int(seq_lens.max())
        return StepInputs(
            token_ids=torch.from_numpy(_token_ids(works)),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(slots),
            block_tables=torch.from_numpy(self._tables[rows, : -(-max_seq_len // self._block_size)]),
            seq_lens=torch.from_numpy(seq_lens),
            query_starts=torch.from_numpy(query_starts.astype(np.int32)),
            logits_index=torch.from_numpy(_logits_index(works, query_starts)),
            max_query_len=int(sizes.max()),
            max_seq_len=max_seq_len,
        )

    def _update_row(self, work: Work) -> int:
        """Copy the blocks that this sequence got since its last step into its row."""
        sequence = work.sequence
        row = sequence.row
        if work.is_new:
            self._tables[row] = 0
            self._num_filled[row] = 0
        filled = self._num_filled[row]
        held = len(sequence.blocks)
        if filled < held:
            self._tables[row, filled:held] = sequence.blocks[filled:]
            self._num_filled[row] = held
        return row


def _token_ids(works: list[Work]) -> NDArray[np.int64]:
    tokens: list[int] = []
    for work in works:
        if work.end - work.start == 1:
            tokens.append(work.sequence.token_ids[work.start])
        else:
            tokens += work.sequence.token_ids[work.start : work.end]
    return np.array(tokens, dtype=np.int64)


def _logits_index(works: list[Work], query_starts: NDArray[np.int64]) -> NDArray[np.int64]:
    index: list[int] = []
    for work, begin in zip(works, query_starts.tolist(), strict=False):
        if work.samples and work.first_logit == work.end - 1:
            index.append(begin + work.end - 1 - work.start)
        else:
            index += range(begin + work.first_logit - work.start, begin + work.end - work.start)
    return np.array(index, dtype=np.int64)


def empty_step(sizes: Sequence[int], max_seq_len: int, block_size: int, device: torch.device) -> StepInputs:
    """A step of sequences with so many tokens each that go nowhere: nothing is written, and attention is over nothing.

    max_seq_len  how long the longest is said to be: kernels are given the room that this takes
    """
    starts = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
    tokens = torch.zeros(sum(sizes), dtype=torch.int64)
    return StepInputs(
        token_ids=tokens,
        positions=tokens,
        slot_mapping=tokens - 1,
        block_tables=torch.zeros(len(sizes), -(-max_seq_len // block_size), dtype=torch.int32),
        seq_lens=torch.zeros(len(sizes), dtype=torch.int32),
        query_starts=starts,
        logits_index=starts[1:].long() - 1,
        max_query_len=max(sizes),
        max_seq_len=max_seq_len,
    ).to(device)
