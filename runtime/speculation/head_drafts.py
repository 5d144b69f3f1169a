"""Drafts of a head (heads.py), whose keys and values lie beside the model's: at the same places in the same blocks.

So a prefix that is found in the cache is there for the head, too, and who loses its blocks is read again by both. What
a head reads of a token is only known while the model computes it: it is kept until enough of it is there for a pass, or
drafts are asked for. Drafts behind the last known token go into the sequence's last block, and where that ends into
blocks of the head's own: they are computed again when it is known what the model says of them.

A few entries of a prefix may be another request's: the last one of a cached block was made of the token that came
behind it there, and of an answer's end what was not read before it ended is missing. No more than a draft is worse.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.kernels.attention.cache import LayerCache
from octavo.runtime.scheduling.drafts import num_right
from octavo.runtime.scheduling.plan import ScheduledSequence, StepPlan
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.speculation.draft_choice import DraftChoice
from octavo.runtime.speculation.draft_step import draft_step
from octavo.runtime.speculation.heads import Head, Said
from octavo.runtime.worker.hidden_states import HiddenStates

MOST_KEPT = 64  # tokens of a sequence, for which a pass is made: it costs little more than one of a single token
MOST_IN_ALL = 2048  # of all sequences from step to step: these take some 50 MB with a model of 8B


@dataclass(frozen=True, slots=True)
class OwnBlocks:
    """Blocks of the cache that are no sequence's: `each` of them for each of those that are asked about at once."""

    first: int
    each: int

    @classmethod
    def behind(cls, num_blocks: int, block_size: int, most_drafts: int) -> OwnBlocks:
        """Behind the model's blocks: enough for so many drafts of a sequence."""
        return cls(num_blocks, -(-most_drafts // block_size) + 1)

    def of(self, place: int) -> range:
        begin = self.first + place * self.each
        return range(begin, begin + self.each)


@dataclass(slots=True)
class _Read:
    """How far the head has read a sequence.

    num_computed: positions whose keys and values are in the cache. kept: what the model has said of those behind.
    """

    num_computed: int
    kept: list[Tensor] = field(default_factory=list)
    num_kept: int = 0

    @property
    def end(self) -> int:
        return self.num_computed + self.num_kept

    def go_back(self, position: int) -> None:
        """Forget what is at this position and behind it."""
        if position <= self.num_computed:
            self.num_computed = position
            self.kept = []
        else:
            self.kept = [torch.cat(self.kept)[: position - self.num_computed].clone()]
        self.num_kept = position - self.num_computed


class HeadDrafts:
    """Drafts of sequences; each call says what follows all that is known of them."""

    is_settled = True

    def __init__(
        self, head: Head, states: HiddenStates, cache: LayerCache, choice: DraftChoice, own: OwnBlocks, longest: int
    ) -> None:
        """longest: no drafts reach beyond it."""
        self.head = head
        self._states = states
        self._cache = cache
        self._choice = choice
        self._own = own
        self._longest = longest
        self._read: dict[Sequence, _Read] = {}

    @property
    def weight_bytes(self) -> int:
        return self.head.weight_bytes

    @torch.inference_mode()
    def read(self, plan: StepPlan) -> None:
        """Keep what the model has said of the tokens of a step, as far as the token behind each is known."""
        begin = 0
        said = self._states.rows(plan.num_tokens)
        full: list[Sequence] = []
        for it in plan.scheduled:
            sequence = it.sequence
            rows = begin
            begin += it.end - it.start
            if sequence.has_ended or sequence.slot < 0:
                self._read.pop(sequence, None)
                continue
            read = self._read.get(sequence)
            if read is None or it.is_new or it.start > read.end:
                read = self._read[sequence] = _Read(it.start)
            elif it.start < read.end:  # it is computed once more
                read.go_back(it.start)
            count = _num_valid(it)
            if count > 0:
                read.kept.append(said[rows : rows + count].clone())
                read.num_kept += count
            if read.num_kept >= MOST_KEPT:
                full.append(sequence)
        num_kept = sum(read.num_kept for read in self._read.values() if read.num_kept < MOST_KEPT)  # others: read now
        if num_kept >= MOST_IN_ALL or len(self._read) > 2 * len(plan.scheduled):
            self._read = {it: read for it, read in self._read.items() if not it.has_ended and it.slot >= 0}
        if num_kept >= MOST_IN_ALL:
            full = [sequence for sequence, read in self._read.items() if read.num_kept]
        if full:
            self._catch_up(full)

    @torch.inference_mode()
    def drafts(self, sequences: Rows[Sequence], count: int) -> list[list[int]]:
        """`count` tokens that may follow each; none for one that has no room. All of its tokens are known."""
        batch = [sequence for sequence in sequences if self._is_ready(sequence, count)]
        found: dict[Sequence, list[int]] = {sequence: [] for sequence in batch}
        if not batch:
            return [[] for _ in sequences]
        said = self._catch_up(batch)
        for place in range(count):
            logits = self.head.logits(said.normed)
            for sequence, token in zip(batch, self._choice.choose(logits, batch, place), strict=True):
                found[sequence].append(token)
            if place + 1 < count:
                ends = [len(sequence.token_ids) + place for sequence in batch]
                said = self._forward(batch, ends, [found[sequence][-1:] for sequence in batch], said.hidden)
        return [found.get(sequence, []) for sequence in sequences]

    def _is_ready(self, sequence: Sequence, count: int) -> bool:
        read = self._read.get(sequence)
        known = len(sequence.token_ids)
        return read is not None and read.num_kept > 0 and read.end == known - 1 and known + count <= self._longest

    def _catch_up(self, batch: list[Sequence]) -> Said:
        """Read what is kept of each; what is said of the last position of each."""
        reads = [self._read[sequence] for sequence in batch]
        hidden = self.head.hidden_of(torch.cat([rows for read in reads for rows in read.kept]))
        tokens = [it.token_ids[read.num_computed + 1 : read.end + 1] for it, read in zip(batch, reads, strict=True)]
        said = self._forward(batch, [read.end for read in reads], tokens, hidden)
        for read in reads:
            read.num_computed = read.end
            read.kept = []
            read.num_kept = 0
        return said

    def _forward(self, batch: list[Sequence], ends: list[int], tokens: list[list[int]], hidden: Tensor) -> Said:
        """What is said of the last one of each sequence's new positions, which end there; tokens: behind them."""
        blocks = [[*sequence.blocks.tables[0], *self._own.of(place)] for place, sequence in enumerate(batch)]
        step = draft_step(ends, tokens, blocks, self._cache.block_size)
        return self.head.forward(hidden, step, self._cache)


def _num_valid(it: ScheduledSequence) -> int:
    """How many of a step's tokens turned out to be the sequence's, and have one behind them that is known."""
    sequence = it.sequence
    known = it.end - it.num_drafts
    right = num_right(sequence.token_ids[known : it.end], it.tokens[known - it.start :])
    return min(known + right, len(sequence.token_ids) - 1) - it.start
