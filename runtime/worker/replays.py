"""Decode steps of few tokens on a CPU, by launches that were recorded: what CUDA graphs (graphs.py) are on a GPU.

There is a recording for each number of tokens, drafts among them, and each power of two up to which sequences are long.
It is made once there have been a few such steps, and used once it has given, in the next one, the same bits as the
model's layers: tokens, positions and lengths differ by then. How the tokens are divided among sequences may differ,
too, and among how many: a step of drafts is recorded with room for as many as it can have, and those that are missing
have no tokens. Ranks of an engine record and compare in the same steps, since both take part in their sums, and find
the same: all of them have the same bits. Recordings begin behind the embedding: what stands in its place in a later
stage waits for the stage before, and gets each step once.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.kernels.attention.step import QUERY_CLASSES, GroupTables, StateRows, StepInputs
from octavo.kernels.linear_attention.states import Cache, StateCache
from octavo.kernels.lora.rows import AdapterRows
from octavo.kernels.native.recording import Memory, NotRecordableError, Recording
from octavo.runtime.model.model import Model, Tap

log = logging.getLogger(__name__)

MOST_SEQUENCES = 32  # what Python takes of a step of more is little
MOST_TOKENS = 64  # the same, where some of them are drafts
FEW_STEPS = 5  # of a size; for fewer a recording doesn't pay, which takes about as long as a step
MOST_REPLAYS = 256  # of which those are kept that were used last: each takes some 100 KB


class Size(NamedTuple):
    """Steps that are alike. query_class: of QUERY_CLASSES, the first that no sequence has more new tokens than."""

    tokens: int
    bits_of_length: int
    query_class: int
    uses_adapters: bool


class StepReplays:
    """`hidden` of a model over its caches, by recordings where there are some.

    mark: is called behind each layer. keep: the same, with what that layer says. is_settled: the last step was not one
    of those before a recording is proven.
    """

    def __init__(self, model: Model, caches: list[Cache], max_model_len: int, block_size: int) -> None:
        from octavo.kernels.native.thread_pool import pool

        pool()  # made now, and not in the step that is recorded first
        self._model = model
        self._caches = caches
        self._max_model_len = max_model_len
        self._block_size = block_size
        self._records_adapters = model.adapters is not None and model.adapters.recordable
        self._state_parts = [part for cache in caches if isinstance(cache, StateCache) for part in cache.parts]
        self._memory = Memory()
        self._num_steps: Counter[Size] = Counter()
        self._replays: OrderedDict[Size, _Replay] = OrderedDict()
        self.mark: Callable[[], None] | None = None
        self.keep: Tap | None = None
        self.is_settled = True

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
        entering = self._model.entering(inputs)
        size = self._size_of(inputs)
        self.is_settled = True
        if size is None:
            return self._directly(inputs, entering)
        replay = self._replays.get(size)
        if replay is not None:
            self._replays.move_to_end(size)
            proven = replay.is_proven
            self.is_settled = proven
            return replay.hidden(inputs, entering) if proven else self._prove(size, replay, inputs, entering)
        self._num_steps[size] += 1
        self.is_settled = self._num_steps[size] > FEW_STEPS
        if self._num_steps[size] == FEW_STEPS:
            return self._record(size, inputs, entering)
        return self._directly(inputs, entering)

    def _size_of(self, inputs: StepInputs) -> Size | None:
        """None: such steps are not recorded."""
        seqs = inputs.seq_lens.shape[0]
        tokens = inputs.positions.shape[0]
        if inputs.logits_index.shape[0] != tokens or seqs > MOST_SEQUENCES or tokens > max(seqs, MOST_TOKENS):
            return None
        if inputs.max_query_len > QUERY_CLASSES[-1]:
            return None
        if inputs.adapters is not None and not self._records_adapters:
            return None
        if inputs.images is not None or inputs.axes is not None or inputs.ahead:
            return None
        if inputs.states is not None and not inputs.states.goes_on:
            return None
        query_class = QUERY_CLASSES[bisect_left(QUERY_CLASSES, inputs.max_query_len)]
        return Size(tokens, inputs.max_seq_len.bit_length(), query_class, inputs.adapters is not None)

    def _record(self, size: Size, inputs: StepInputs, entering: Tensor) -> Tensor:
        longest = min((1 << size.bits_of_length) - 1, self._max_model_len)
        recording = Recording(self._memory)
        before = self._states(inputs)
        try:
            held = _held(inputs, size, longest, -(-longest // self._block_size))
            mark = self.mark
            again = None if mark is None else lambda: recording.call(mark)
            tap = tap_of(again, self.keep)
            replay = _Replay(self._model, self._caches, inputs, held, entering, recording, tap)
        except NotRecordableError as error:
            log.warning("steps of %d tokens can't be recorded: %s", size.tokens, error)
            self._set_states(inputs, before)  # some layers have changed them
            return self._directly(inputs, entering)
        self._replays[size] = replay
        if len(self._replays) > MOST_REPLAYS:
            evicted, _ = self._replays.popitem(last=False)
            del self._num_steps[evicted]  # it may be recorded again
        return replay.result

    def _prove(self, size: Size, replay: _Replay, inputs: StepInputs, entering: Tensor) -> Tensor:
        """Do the step both ways, from the same states, which are those of the layers afterwards."""
        before = self._states(inputs)
        found = [replay.hidden(inputs, entering).clone(), *self._states(inputs)]
        self._set_states(inputs, before)
        expected = self._directly(inputs, entering)
        replay.is_proven = all(map(torch.equal, found, [expected, *self._states(inputs)]))
        if not replay.is_proven:
            log.warning("a recorded step of %d tokens differs from the layers' own, and isn't used", size.tokens)
            del self._replays[size]
        return expected

    def _states(self, inputs: StepInputs) -> list[Tensor]:
        """Copies of those of the step's sequences."""
        return [part[inputs.states.rows] for part in self._state_parts] if inputs.states is not None else []

    def _set_states(self, inputs: StepInputs, states: list[Tensor]) -> None:
        if inputs.states is not None:
            for part, values in zip(self._state_parts, states, strict=True):
                part[inputs.states.rows] = values

    def _directly(self, inputs: StepInputs, entering: Tensor) -> Tensor:
        return self._model.hidden(inputs, self._caches, tap_of(self.mark, self.keep), entering)


class _Replay:
    """The steps of one size. held: what they read. result: of the last one."""

    def __init__(
        self,
        model: Model,
        caches: list[Cache],
        inputs: StepInputs,
        held: StepInputs,
        entering: Tensor,
        recording: Recording,
        tap: Tap | None,
    ) -> None:
        self.is_proven = False
        self._inputs = held
        self._entering = entering.clone()
        self._recording = recording
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
            held[tuple(map(slice, given.shape))] = given
        if inputs.max_query_len > 1:
            seqs = len(inputs.seq_lens)
            self._inputs.seq_lens[seqs:] = 0
            self._inputs.query_starts[seqs + 1 :] = len(inputs.positions)


def tap_of(mark: Callable[[], None] | None, keep: Tap | None) -> Tap | None:
    """One tap for both: for who watches that layers are got through, and for who keeps what they say."""
    if mark is None:
        return keep
    if keep is None:
        return lambda _layer, _residual: mark()

    def both(layer: int, residual: Tensor) -> None:
        mark()
        keep(layer, residual)

    return both


def _held(inputs: StepInputs, size: Size, longest: int, width: int) -> StepInputs:
    """Memory for steps of this size whose sequences are so long at most, with tables so wide."""
    seqs = min(size.tokens, MOST_SEQUENCES)  # as many as there are tokens where none is a draft

    def tables(group: StepInputs | GroupTables) -> GroupTables:
        return GroupTables(group.slot_mapping.clone(), group.block_tables.new_zeros(seqs, width))

    return replace(
        inputs,
        positions=inputs.positions.clone(),
        query_starts=torch.arange(seqs + 1, dtype=torch.int32),
        logits_index=inputs.logits_index.clone(),
        seq_lens=inputs.seq_lens.new_zeros(seqs),
        **tables(inputs)._asdict(),
        max_seq_len=longest,
        max_query_len=size.query_class,
        more_groups=tuple(tables(group) for group in inputs.more_groups),
        states=None if inputs.states is None else _held_states(inputs.states.rows.new_zeros(seqs)),
        adapters=None if inputs.adapters is None else AdapterRows(*(values.clone() for values in inputs.adapters)),
    )


def _held_states(rows: Tensor) -> StateRows:
    return StateRows(rows, rows)


def _tensors(inputs: StepInputs) -> Iterator[Tensor]:
    """What layers read of a step, and differs from the next one's."""
    yield from (inputs.positions, inputs.seq_lens, *(inputs.adapters or ()))
    if inputs.states is not None:
        yield inputs.states.rows
    if inputs.max_query_len > 1:
        yield inputs.query_starts
    for group in inputs.by_group():
        yield from (group.slot_mapping, group.block_tables)
