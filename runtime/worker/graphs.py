"""Steps as CUDA graphs: a step's kernels launched at once, one graph for each bucket of sizes.

A graph replays what was captured, with the same addresses and grids. So its inputs stand in buffers that a step is
copied into; a batch is filled up to its bucket with sequences of no tokens, whose slots are -1 (nothing is written)
and whose attention is over nothing; and grids are those of the longest sequence that there may be.

Decode steps have a graph up to 512 sequences. Steps with prompts in them have one up to MOST_TOKENS tokens, where an
H100 computes for less time than a host needs for some 300 launches. The first of the sequences that fill the batch up
owns the tokens that fill the step up. Larger steps run without a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.attention.step import GroupTables, StepInputs
from octavo.kernels.linear_attention.states import Cache, with_blocks
from octavo.runtime.model.model import Model
from octavo.runtime.worker.device import GraphCapture, Mark, give_back_unused

BUCKETS = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
PROMPT_BUCKETS = (16, 32, 64, 96, 128, 192, 256)
MOST_TOKENS = PROMPT_BUCKETS[-1]
FEW_SEQUENCES = 8  # of a step with prompts: it computes logits for as many rows as its bucket has sequences

TYPES = dict.fromkeys(("token_ids", "positions", "slot_mapping", "logits_index"), torch.int64)
TYPES |= dict.fromkeys(("seq_lens", "query_starts"), torch.int32)

Size = tuple[int, int]  # tokens, sequences; as many of both in a decode step


class StepGraphs:
    """`forward` of a model over its caches, through graphs where there is one."""

    def __init__(
        self,
        model: Model,
        caches: list[Cache],
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int = MOST_TOKENS,
    ) -> None:
        """Captures all buckets that a step can need, the largest first, so that they share memory."""
        self._model = model
        self._caches = caches
        self._sizes = sizes_for(max_num_seqs, max_num_batched_tokens)
        width = -(-max_model_len // with_blocks(caches)[0].block_size)
        most_tokens, most_seqs = (max(column) for column in zip(*self._sizes, strict=True))
        num_groups = 1 + max(cache.group for cache in caches)
        self._buffers = StepBuffers(most_tokens, most_seqs, width, model.device, num_groups)
        self._logits = torch.empty(most_seqs, model.vocab_size, device=model.device)  # of whichever ran last
        capture = GraphCapture(model.device)
        self._graphs = {size: self._capture(capture, size, max_model_len) for size in reversed(self._sizes)}
        give_back_unused(model.device)  # what each run before its capture took

    def forward(self, inputs: StepInputs) -> Tensor:
        """Logits as the model's own forward returns them, for inputs on the CPU; valid until the next call."""
        size = self._size_of(inputs)
        if size is None:
            return self._model.forward(inputs.to(self._model.device), self._caches)
        self._buffers.fill(inputs, size)
        self._graphs[size]()
        return self._logits[: inputs.logits_index.shape[0]]

    def _size_of(self, inputs: StepInputs) -> Size | None:
        """The least bucket that holds a step; one with prompts in it takes one sequence more, for what is left over."""
        if inputs.images is not None or inputs.axes is not None or inputs.ahead:
            return None
        tokens, seqs, rows = (x.shape[0] for x in (inputs.token_ids, inputs.seq_lens, inputs.logits_index))
        if inputs.max_query_len == 1:
            return next((size for size in self._sizes if size[0] == size[1] >= tokens and rows == seqs), None)
        least = max(seqs + 1, rows)
        return next((size for size in self._sizes if size[0] >= tokens and size[0] != size[1] >= least), None)

    def _capture(self, capture: GraphCapture, size: Size, max_model_len: int) -> Callable[[], object]:
        self._buffers.empty(size)
        inputs = self._buffers.view(size, max_model_len)
        logits = self._logits[: size[1]]
        return capture.capture(lambda: logits.copy_(self._model.forward(inputs, self._caches)))


def sizes_for(max_num_seqs: int, max_num_batched_tokens: int = MOST_TOKENS) -> list[Size]:
    """The sizes that have a graph, ascending: decode steps of up to max_num_seqs sequences, and steps with prompts."""

    def up_to(buckets: tuple[int, ...], most: int) -> list[int]:
        above = next((size for size in buckets if size >= most), buckets[-1])
        return [size for size in buckets if size <= above]

    decodes = [(size, size) for size in up_to(BUCKETS, max_num_seqs)]
    of_prompts = product(up_to(PROMPT_BUCKETS, max_num_batched_tokens), (FEW_SEQUENCES - 1, max_num_seqs))
    prompts = [(tokens, seqs + 1) for tokens, seqs in of_prompts]
    prompts = [(tokens, min(seqs, tokens + 1, max_num_seqs + 1)) for tokens, seqs in prompts]
    return sorted({*decodes, *(size for size in prompts if size[0] != size[1])})


class StepBuffers:
    """The inputs of all graphs on the device, and once more in the host's memory, where a step is put together.

    All but the block tables lie one behind another, so that one copy brings them over.
    """

    def __init__(self, most_tokens: int, most_seqs: int, width: int, device: torch.device, num_groups: int = 1) -> None:
        self._slots = tuple(f"slots of group {group}" for group in range(1, num_groups))
        lengths = self._lengths(most_tokens, most_seqs)
        types = TYPES | dict.fromkeys(self._slots, torch.int64)
        self._tables = [torch.zeros(most_seqs, width, dtype=torch.int32, device=device) for _ in range(num_groups)]
        ends = list(accumulate(-(-n * types[name].itemsize // 16) * 16 for name, n in lengths.items()))
        self._packed_host = torch.zeros(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._packed = self._packed_host.to(device, copy=True)
        self._copied = Mark(device)

        def parts(packed: Tensor) -> dict[str, Tensor]:
            """Each begins at a multiple of 16 bytes, as kernels may have been told."""
            begins = zip(lengths.items(), [0, *ends], strict=False)
            return {
                name: packed[begin : begin + n * types[name].itemsize].view(types[name]) for (name, n), begin in begins
            }

        self._host = parts(self._packed_host)
        self._device = parts(self._packed)

    def view(self, size: Size, max_seq_len: int) -> StepInputs:
        """What a graph of that size is captured with: always the same memory."""
        tokens, seqs = size
        tensors: dict[str, Any] = {name: self._device[name][:n] for name, n in self._lengths(tokens, seqs).items()}
        groups = [
            GroupTables(tensors.pop(name), tables[:seqs])
            for name, tables in zip(self._slots, self._tables[1:], strict=True)
        ]
        return StepInputs(
            **tensors,
            block_tables=self._tables[0][:seqs],
            max_query_len=1 if tokens == seqs else tokens,
            max_seq_len=max_seq_len,
            more_groups=tuple(groups),
        )

    def empty(self, size: Size) -> None:
        """A step of sequences that have no token in the cache."""
        for values in self._host.values():
            values.zero_()
        self._fill_up(0, 0, size)
        self._packed.copy_(self._packed_host)

    def fill(self, inputs: StepInputs, size: Size) -> None:
        """Copy a step on the CPU to the device, filled up to a size."""
        self._copied.wait()  # the last step's copy may still run: nobody waits for a step that samples nothing
        slots = {name: group.slot_mapping for name, group in zip(self._slots, inputs.more_groups, strict=True)}
        for name, held in self._host.items():
            given = slots[name] if name in slots else getattr(inputs, name)
            held[: given.shape[0]] = given
            held[given.shape[0] :] = 0
        tokens = inputs.token_ids.shape[0]
        seqs = inputs.seq_lens.shape[0]
        self._fill_up(tokens, seqs, size)
        self._packed.copy_(self._packed_host, non_blocking=True)
        self._copied.set()
        for held, group in zip(self._tables, inputs.by_group(), strict=True):
            tables = group.block_tables.to(held.device, non_blocking=True)
            held[:seqs, : tables.shape[1]] = tables

    def _fill_up(self, tokens: int, seqs: int, size: Size) -> None:
        """Fill up a step of so many tokens and sequences with tokens whose slot is -1.

        In a decode step each belongs to a sequence of its own, otherwise all belong to the first one that is left over.
        """
        for name in ("slot_mapping", *self._slots):
            self._host[name][tokens:] = -1
        starts = self._host["query_starts"][seqs + 1 :]
        starts[:] = torch.arange(seqs + 1, seqs + 1 + len(starts)) if size[0] == size[1] else size[0]

    def _lengths(self, tokens: int, seqs: int) -> dict[str, int]:
        """How long each tensor of a step is; block tables aside."""
        of_tokens = dict.fromkeys(("token_ids", "positions", "slot_mapping", *self._slots), tokens)
        return of_tokens | {"logits_index": seqs, "seq_lens": seqs, "query_starts": seqs + 1}
