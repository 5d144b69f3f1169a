"""A second, smaller model that reads along, and what it would say next.

It has a cache of its own, in which each sequence has blocks as long as it lives. What the model that is served has
refused of its drafts is computed anew: nothing else is kept of a guess.

A draft is drawn as the token itself will be (draft_choice.py). Of what changes logits (penalties, biases, grammars), it
knows nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.linear_attention.states import Cache, with_blocks
from octavo.runtime.model.model import Model
from octavo.runtime.scheduling.block_pool import BlockPool
from octavo.runtime.scheduling.drafts import num_right
from octavo.runtime.scheduling.plan import StepPlan
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.speculation.draft_choice import DraftChoice
from octavo.runtime.speculation.draft_step import draft_step
from octavo.runtime.worker.replays import MOST_TOKENS, StepReplays

CHUNK = 512  # tokens that are read at once


@dataclass(slots=True)
class _Read:
    """How far a sequence is in the cache.

    num_computed: of its tokens, whose keys and values are there. guessed: drafts behind these, which are there, too.
    num_checked: of its tokens, which are known to be the draft model's own.
    """

    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    guessed: list[int] = field(default_factory=list)
    num_checked: int = 0
    is_foreign: bool = False


class DraftModel:
    """Drafts of sequences; each call says what follows all that is known of them."""

    def __init__(
        self,
        model: Model,
        caches: list[Cache],
        vocab_size: int,
        max_model_len: int,
        seed: int,
        *,
        records: bool = True,
    ) -> None:
        """vocab_size: of the model that is served. max_model_len: no drafts reach beyond it. seed: the engine's.

        records: short steps are recorded, and replayed.
        """
        self.model = model
        self.caches = caches
        (first, *_) = with_blocks(caches)
        self._block_size = first.block_size
        self._longest = min(max_model_len, model.max_position)
        self._pool = BlockPool(first.key.shape[0])
        self._read: OrderedDict[Sequence, _Read] = OrderedDict()  # who was asked about last is the last one
        records = records and model.recordable
        self._replays = StepReplays(model, caches, self._longest, self._block_size) if records else None
        self._choice = DraftChoice(vocab_size, seed, model.device)

    @property
    def weight_bytes(self) -> int:
        """What a draft reads of it."""
        return self.model.weight_bytes

    def read(self, plan: StepPlan) -> None:
        """A step has been committed: what it says of a sequence is read when drafts of that one are asked for."""

    @property
    def is_settled(self) -> bool:
        """Whether the last step was computed as later ones of its size will be."""
        return self._replays is None or self._replays.is_settled

    @torch.inference_mode()
    def drafts(self, sequences: Rows[Sequence], count: int) -> list[list[int]]:
        """`count` tokens that may follow each; none for one that has no room, or tokens that are not in the vocabulary.

        All tokens of a sequence are known: none of them is being sampled.
        """
        self._forget_ended()
        batch = [sequence for sequence in sequences if self._make_room(sequence, count, sequences)]
        found: dict[Sequence, list[int]] = {sequence: [] for sequence in batch}
        if not batch:
            return [[] for _ in sequences]
        logits = self._catch_up(batch)
        for place in range(count):
            for sequence, token in zip(batch, self._choice.choose(logits, batch, place), strict=True):
                found[sequence].append(token)
            if place + 1 == count:
                break
            lengths = [len(sequence.token_ids) + place + 1 for sequence in batch]
            logits = self._forward(batch, lengths, [found[sequence][-1:] for sequence in batch])
        for sequence, tokens in found.items():
            read = self._read[sequence]
            read.num_computed = len(sequence.token_ids)
            read.guessed = tokens[:-1]
        return [found.get(sequence, []) for sequence in sequences]

    def _forget_ended(self) -> None:
        for sequence in [sequence for sequence in self._read if sequence.has_ended]:
            self._pool.release(self._read.pop(sequence).blocks)

    def _make_room(self, sequence: Sequence, count: int, others: Rows[Sequence]) -> bool:
        """Give a sequence the blocks that it needs; of those that are not among the others, who waits longest loses."""
        read = self._read.setdefault(sequence, _Read())
        self._read.move_to_end(sequence)
        known = sequence.token_ids
        read.is_foreign = read.is_foreign or max(known[read.num_checked :], default=0) >= self.model.vocab_size
        read.num_checked = len(known)
        if read.is_foreign or len(known) + count > self._longest:
            return False
        missing = -(-(len(known) + count) // self._block_size) - len(read.blocks)
        while missing > self._pool.num_free:
            loser = next((it for it, kept in self._read.items() if kept.blocks and it not in others), None)
            if loser is None:
                return False
            self._pool.release(self._read.pop(loser).blocks)
        read.blocks += self._pool.allocate(max(0, missing))
        right = num_right(known[read.num_computed :], read.guessed)
        read.num_computed = min(read.num_computed + right, len(known) - 1)
        read.guessed = []
        return True

    def _catch_up(self, batch: list[Sequence]) -> Tensor:
        """Compute what is missing of each; the logits behind its last token, [S, V]."""
        few = max(1, CHUNK // len(batch))  # of each, at last, in one step
        for sequence in batch:
            read = self._read[sequence]
            while (count := len(sequence.token_ids) - read.num_computed) > few:
                end = read.num_computed + min(CHUNK, count - 1)
                self._forward([sequence], [end], [sequence.token_ids[read.num_computed : end]])
                read.num_computed = end
        missing = [sequence.token_ids[self._read[sequence].num_computed :] for sequence in batch]
        return self._forward(batch, [len(sequence.token_ids) for sequence in batch], missing)

    def _forward(self, batch: list[Sequence], lengths: list[int], tokens: list[list[int]]) -> Tensor:
        """The logits behind the last one of each sequence's new tokens; lengths: with these."""
        ends = list(accumulate(len(new) for new in tokens))
        last = np.array(ends) - 1
        is_short = self._replays is not None and ends[-1] <= MOST_TOKENS  # steps of all tokens' logits are recorded
        blocks = [self._read[sequence].blocks for sequence in batch]
        inputs = draft_step(lengths, tokens, blocks, self._block_size, np.arange(ends[-1]) if is_short else last)
        if self._replays is None:
            return self.model.forward(inputs.to(self.model.device), self.caches)
        hidden = self._replays.hidden(inputs)
        return self.model.logits(hidden[torch.from_numpy(last)] if is_short and len(last) < len(hidden) else hidden)
