"""From a plan to tensors: the StepInputs of one step, built in numpy, in the host's memory.

The block tables of running sequences stand in one array, a row each, that grows with them; a step gathers its rows.
"""

from __future__ import annotations

import numpy as np
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
        seq_lens = np.array([work.end for work in works], dtype=np.int32)
        sizes = seq_lens - np.array([work.start for work in works], dtype=np.int32)
        width = -(-int(seq_lens.max()) // self._block_size)
        return StepInputs.prefill(
            seq_lens,
            self._block_size,
            sizes=sizes,
            token_ids=_token_ids(works),
            tables=self._tables[rows, :width],
            logits_index=_logits_index(works),
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


def _logits_index(works: list[Work]) -> NDArray[np.int64]:
    index: list[int] = []
    begin = 0  # of the sequence's tokens in the step
    for work in works:
        end = begin + work.end - work.start
        if work.samples and work.first_logit == work.end - 1:
            index.append(end - 1)
        else:
            index += range(begin + work.first_logit - work.start, end)
        begin = end
    return np.array(index, dtype=np.int64)
