"""Decode steps as CUDA graphs: a step's kernels launched at once, one graph for each bucket of batch sizes.

A graph replays what was captured, with the same addresses and grids. So its inputs stand in buffers that a step is
copied into; a batch is filled up to its bucket with sequences of no tokens, whose slots are -1 (nothing is written)
and whose attention is over nothing; and grids are those of the longest sequence that there may be. Steps that are not
pure decodes, or larger than the largest bucket, run as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.runtime.device import capture
from octavo.runtime.model.model import Model

BUCKETS = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))


@dataclass(frozen=True)
class Graph:
    """A captured step: its inputs' buffers, what replays it, and where its logits are afterwards."""

    inputs: StepInputs
    replay: Callable[[], None]
    logits: Tensor


class DecodeGraphs:
    """`forward` of a model over its caches, through graphs where there is one."""

    def __init__(self, model: Model, caches: list[LayerCache], max_num_seqs: int, max_model_len: int) -> None:
        """Captures all buckets that max_num_seqs sequences can need, the largest first, so that they share memory."""
        self._model, self._caches = model, caches
        block_size = caches[0].block_size
        self._sizes = buckets_for(max_num_seqs)
        self._graphs = {
            size: self._capture(empty_inputs(size, max_model_len, block_size, model.device))
            for size in reversed(self._sizes)
        }

    def forward(self, inputs: StepInputs) -> Tensor:
        """Logits as the model's own forward returns them; valid until the next call."""
        num_seqs = inputs.seq_lens.shape[0]
        size = next((s for s in self._sizes if s >= num_seqs), None)
        is_decode = inputs.max_query_len == 1 and inputs.logits_index.shape[0] == num_seqs
        if size is None or not is_decode:
            return self._model.forward(inputs, self._caches)
        graph = self._graphs[size]
        fill(graph.inputs, inputs)
        graph.replay()
        return graph.logits[:num_seqs]

    def _capture(self, inputs: StepInputs) -> Graph:
        replay, logits = capture(lambda: self._model.forward(inputs, self._caches), self._model.device)
        return Graph(inputs, replay, logits)


def buckets_for(max_num_seqs: int) -> list[int]:
    """The batch sizes that have a graph: those below, and the least that holds all."""
    held = [size for size in BUCKETS if size < max_num_seqs]
    above = next((size for size in BUCKETS if size >= max_num_seqs), None)
    return held if above is None else [*held, above]


def empty_inputs(num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> StepInputs:
    """A decode step of sequences that have no token."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return StepInputs(
        token_ids=zeros(num_seqs),
        positions=zeros(num_seqs),
        slot_mapping=zeros(num_seqs) - 1,
        block_tables=zeros(num_seqs, -(-max_model_len // block_size), dtype=torch.int32),
        seq_lens=zeros(num_seqs, dtype=torch.int32),
        query_starts=torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
        logits_index=torch.arange(num_seqs, device=device),
        max_query_len=1,
        max_seq_len=max_model_len,
    )


def fill(buffers: StepInputs, inputs: StepInputs) -> None:
    """Copy a decode step into buffers of at least its size, and empty the sequences behind it."""
    n = inputs.seq_lens.shape[0]
    for name in ("token_ids", "positions", "slot_mapping", "seq_lens"):
        getattr(buffers, name)[:n].copy_(getattr(inputs, name), non_blocking=True)
    buffers.block_tables[:n, : inputs.block_tables.shape[1]].copy_(inputs.block_tables, non_blocking=True)
    buffers.slot_mapping[n:].fill_(-1)
    for name in ("token_ids", "positions", "seq_lens"):
        getattr(buffers, name)[n:].zero_()
