"""From an order to tensors: the StepInputs of one step, built in numpy, in the host's memory.

The block tables of running sequences stand in one array, a row for each slot, that grows with them; a step gathers its
rows. Every rank builds its inputs so, from the same orders.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.kernels.attention.step import StateRows, StepInputs
from octavo.kernels.lora.rows import sort_by_slot
from octavo.runtime.parallel.order import StepOrder
from octavo.runtime.scheduling.plan import SchedulerConfig


class InputBuilder:
    """Owns the block tables as arrays [group, slot, block]."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._block_size = config.block_size
        self._max_loras = config.max_loras
        self._has_states = config.has_states
        width = -(-config.max_model_len // config.block_size)
        self._tables = np.zeros((len(config.windows), config.max_num_seqs, width), dtype=np.int32)

    def build(self, order: StepOrder) -> StepInputs:
        """The tensors of this step, its tokens in the sequence that the order has. Call for each order in turn.

        token_ids are the order's as they are now: `with_tokens` takes them once all of them are known.
        """
        self._update_tables(order)
        width = -(-int(order.ends.max()) // self._block_size)
        # Copies: rows without gaps, at an address that kernels may have been told to be aligned.
        tables, *more_tables = (table[order.slots, :width] for table in self._tables)
        inputs = StepInputs.prefill(
            order.ends.copy(),  # which begins at a multiple of 16 bytes, as kernels may have been told
            self._block_size,
            sizes=order.ends - order.starts,
            token_ids=order.token_ids,
            tables=tables,
            more_tables=more_tables,
            logits_index=_logits_index(order),
        )
        if self._has_states:
            inputs = replace(inputs, states=_states_of(order))
        if not order.adapters.any():
            return inputs
        slots = np.repeat(order.adapters - 1, order.ends - order.starts)
        return replace(inputs, adapters=sort_by_slot(slots, self._max_loras))

    def _update_tables(self, order: StepOrder) -> None:
        """Clear the rows of slots that changed hands, and write the blocks that sequences were given in this step.

        An order that was withdrawn and made again may come twice.
        """
        if order.is_new.any():
            self._tables[:, order.slots[order.is_new != 0]] = 0
        begin = 0
        for place in order.new_block_counts.nonzero()[0]:
            count = order.new_block_counts[place]
            first = order.first_new_blocks[place]
            rows = self._tables[:, order.slots[place]]
            rows[:, first : first + count] = order.new_blocks[:, begin : begin + count]
            begin += count


def with_tokens(inputs: StepInputs, order: StepOrder) -> StepInputs:
    """The same inputs with the order's token ids, all of which are known now."""
    return replace(inputs, token_ids=torch.from_numpy(order.token_ids.astype(np.int64)))


def _states_of(order: StepOrder) -> StateRows:
    """The rows of its sequences' states, which are their slots."""
    rows = torch.from_numpy(order.slots.astype(np.int64))
    if not len(order.saves) and np.array_equal(order.sources, order.slots):
        return StateRows(rows, rows)
    saves = torch.from_numpy(order.saves.astype(np.int64))
    return StateRows(rows, torch.from_numpy(order.sources.astype(np.int64)), saves)


def _logits_index(order: StepOrder) -> NDArray[np.int64]:
    """Where tokens of positions first_logits .. ends stand in the batch."""
    counts = (order.ends - order.first_logits).astype(np.int64)
    ends = np.cumsum(order.ends - order.starts, dtype=np.int64)
    first = ends - counts - (np.cumsum(counts) - counts)  # of each sequence, less those that stand before it
    index: NDArray[np.int64] = np.arange(counts.sum()) + np.repeat(first, counts)
    return index
