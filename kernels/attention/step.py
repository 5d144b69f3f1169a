"""One step as a value: the tensors that a forward pass over a batch needs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepInputs:
    """Everything that a forward pass over a mixed batch of prefill chunks and decodes needs.

    The tokens of all sequences stand one after another, sequence by sequence. With T tokens, S sequences, B blocks
    in the longest table and L rows of logits wanted:

    token_ids      [T] int64
    positions      [T] int64      position of each token in its sequence
    slot_mapping   [T] int64      where its key and value go: block id * block_size + offset in the block; -1, nowhere:
                                  a token that only fills a batch up (on a GPU; CPUs are given none)
    block_tables   [S, B] int32   block ids of each sequence in order; entries past its length are 0 and never read
    seq_lens       [S] int32      tokens in the cache once this step has written its own
    query_starts   [S + 1] int32  sequence s owns tokens query_starts[s] .. query_starts[s + 1]
    logits_index   [L] int64      tokens whose logits are wanted, ascending
    max_query_len  1 when every sequence has one token: a pure decode step
    max_seq_len    largest of seq_lens
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_starts: Tensor
    logits_index: Tensor
    max_query_len: int
    max_seq_len: int

    def to(self, device: torch.device) -> StepInputs:
        """The same on a device."""
        if self.token_ids.device == device:
            return self
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device, non_blocking=True)
        return StepInputs(**values)
