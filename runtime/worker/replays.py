"""Decode steps of few sequences on a CPU, by launches that were recorded: what CUDA graphs (graphs.py) are on a GPU.

There is a recording for each number of sequences and each power of two up to which they are long. It is made once there
have been a few such steps, and used once it has given, in the next one, the same bits as the model's layers: tokens,
positions and lengths differ by then. Ranks of an engine record and compare in the same steps, since both take part in
their sums, and find the same: all of them have the same bits. Recordings begin behind the embedding: what stands in its
place in a later stage waits for the stage before, and gets each step once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import GroupTables, StepInputs
from octavo.kernels.lora.rows import AdapterRows
from octavo.kernels.native.recording import Memory, NotRecordableError, Recording
from octavo.runtime.model.model import Model

log = logging.getLogger(__name__)

MOST_SEQUENCES = 32  # what Python takes of a step of more is little
FEW_STEPS = 5  # of a size; for fewer a recording doesn't pay, which takes about as long as a step

Size = tuple[int, int, bool]  # sequences, the bits that the longest one's length has, whether adapters are used


class StepReplays:
    """`hidden` of a model over its caches, by recordings where there are some.

    mark: is called behind each layer.
    """

    def __init__(self, model: Model, caches: list[LayerCache], max_model_len: int) -> None:
        from octavo.kernels.native.thread_pool import pool

        pool()  # made now, and not in the step that is recorded first
        self._model = model
        self._caches = caches
        self._max_model_len = max_model_len
        self._records_adapters = model.adapters is not None and model.adapters.recordable
        self._memory = Memory()
        self._num_steps: Counter[Size] = Counter()
        self._replays: dict[Size, _Replay] = {}
        self.mark: Callable[[], None] | None = None

    def begin(self) -> None:
        """Count steps from now on: all ranks of an engine record the same ones."""
        self._num_steps.clear()
        self._replays.clear()

    @property
    def proven(self) -> list[Size]:
        """The sizes of steps that are replayed."""
        return [size for size, replay in self._replays.items() if replay.is_proven]

    def hidden(self, inputs: StepInputs) -> Tensor:
        """What the model's own `hidden` returns; valid until the next call."""
        seqs = inputs.seq_lens.shape[0]
        entering = self._model.entering(inputs)
        if inputs.max_query_len > 1 or seqs > MOST_SEQUENCES or inputs.logits_index.shape[0] != seqs:
            return self._directly(inputs, entering)
        if inputs.adapters is not None and not self._records_adapters:
            return self._directly(inputs, entering)
        size = (seqs, inputs.max_seq_len.bit_length(), inputs.adapters is not None)
        replay = self._replays.get(size)
        if replay is not None:
            proven = replay.is_proven
            return replay.hidden(inputs, entering) if proven else self._prove(size, replay, inputs, entering)
        self._num_steps[size] += 1
        if self._num_steps[size] == FEW_STEPS:
            return self._record(size, inputs, entering)
        return self._directly(inputs, entering)

    def _record(self, size: Size, inputs: StepInputs, entering: Tensor) -> Tensor:
        longest = min((1 << size[1]) - 1, self._max_model_len)
        recording = Recording(self._memory)
        try:
            replay = _Replay(self._model, self._caches, inputs, entering, longest, recording, self.mark)
        except NotRecordableError as error:
            log.warning("steps of %d sequences can't be recorded: %s", size[0], error)
            return self._directly(inputs, entering)
        self._replays[size] = replay
        return replay.result

    def _prove(self, size: Size, replay: _Replay, inputs: StepInputs, entering: Tensor) -> Tensor:
        expected = self._directly(inputs, entering)
        replay.is_proven = torch.equal(replay.hidden(inputs, entering), expected)
        if not replay.is_proven:
            log.warning("a recorded step of %d sequences differs from the layers' own, and isn't used", size[0])
            del self._replays[size]
        return expected

    def _directly(self, inputs: StepInputs, entering: Tensor) -> Tensor:
        mark = self.mark
        tap = None if mark is None else lambda _layer, _residual: mark()
        return self._model.hidden(inputs, self._caches, tap, entering)


class _Replay:
    """The steps of one size. result: of the last one."""

    def __init__(
        self,
        model: Model,
        caches: list[LayerCache],
        inputs: StepInputs,
        entering: Tensor,
        longest: int,
        recording: Recording,
        mark: Callable[[], None] | None,
    ) -> None:
        self.is_proven = False
        self._inputs = _held(inputs, longest, -(-longest // caches[0].block_size))
        self._entering = entering.clone()
        self._recording = recording
        tap = None if mark is None else lambda _layer, _residual: recording.call(mark)
        self._fill(inputs)
        with recording:
            self.result = model.hidden(self._inputs, caches, tap, self._entering)

    def hidden(self, inputs: StepInputs, entering: Tensor) -> Tensor:
        self._fill(inputs)
        self._entering.copy_(entering)
        self._recording.run()
        return self.result

    def _fill(self, inputs: StepInputs) -> None:
        for held, given in zip(_tensors(self._inputs), _tensors(inputs), strict=True):
            held[..., : given.shape[-1]] = given


def _held(inputs: StepInputs, longest: int, width: int) -> StepInputs:
    """Memory for steps of this size whose sequences are so long at most, with tables so wide."""

    def tables(group: StepInputs | GroupTables) -> GroupTables:
        seqs = group.block_tables.shape[0]
        return GroupTables(group.slot_mapping.clone(), group.block_tables.new_zeros(seqs, width))

    return replace(
        inputs,
        **{name: getattr(inputs, name).clone() for name in ("positions", "query_starts", "logits_index")},
        seq_lens=inputs.seq_lens.clone(),
        **tables(inputs)._asdict(),
        max_seq_len=longest,
        more_groups=tuple(tables(group) for group in inputs.more_groups),
        adapters=None if inputs.adapters is None else AdapterRows(*(values.clone() for values in inputs.adapters)),
    )


def _tensors(inputs: StepInputs) -> Iterator[Tensor]:
    """What layers read of a step, and differs from the next one's."""
    yield from (inputs.positions, inputs.seq_lens, *(inputs.adapters or ()))
    for group in inputs.by_group():
        yield from (group.slot_mapping, group.block_tables)
