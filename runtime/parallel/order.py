"""What every rank is told about a step: the plan without its sequences, as int32 numbers in one buffer.

Only what has changed travels: a rank keeps the block tables of all slots and is told the new blocks alone. Token ids
that are still being sampled when the order is made stand in it as `last_token_of(slot)`. The driver puts them in when
the step begins (`fill_tokens`), so that no other rank samples.
"""

from __future__ import annotations

from itertools import chain
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from octavo.runtime.scheduling.plan import ScheduledSequence, SchedulerConfig, StepPlan

Int32s = NDArray[np.int32]

WantedLogits = Literal["nothing", "best", "logits"]
"""What a step shall bring of the logits that sequences want: each row's largest and its token, or all of them."""

_WANTS: tuple[WantedLogits, ...] = get_args(WantedLogits)
_HEADER = (
    "number",
    "wants",
    "num_groups",
    "num_sequences",
    "num_tokens",
    "num_new_blocks",
    "num_adapters",
    "num_saves",
    "num_image_rows",
    "image_width",
    "num_axes",
    "num_ahead",
)
_DIGEST = 8  # numbers of an adapter's digest
_COLUMNS = (
    "slots",
    "starts",
    "ends",
    "first_logits",
    "is_new",
    "first_new_blocks",
    "new_block_counts",
    "adapters",
    "sources",
)


_AHEAD = 6  # numbers of an `Ahead`


class StepImages(NamedTuple):
    """What images are to a step, but for their embeddings.

    rows   [N] its tokens whose embeddings are those of images
    width  numbers of each such embedding
    axes   [A, T] positions by which its tokens are rotated: in time, height and width, or one where these agree; A 0:
           those in the sequences
    ahead  [M, 6] the tokens that see some behind them, as `Ahead` has them
    """

    rows: Int32s
    width: int
    axes: Int32s
    ahead: Int32s


class StepOrder:
    """Views into one buffer of int32.

    With S sequences, T tokens, G groups of layers that share block tables, and B new blocks:

    number            how many steps were ordered before
    wants             of the rows of logits: see WantedLogits
    slots             [S] each sequence's row in the block tables
    starts, ends      [S] positions of its tokens in this step
    first_logits      [S] logits of positions first_logits .. ends are wanted
    is_new            [S] 1 where the slot was another sequence's before
    first_new_blocks  [S] place in the block tables of the first new entry
    new_block_counts  [S] entries that each table has been given
    adapters          [S] 1 + the slot of its adapter; 0: it has none
    sources           [S] the row of its state before the step, where layers have states; -1: zeros
    token_ids         [T]
    new_blocks        [G, B] the new entries of all sequences, in order
    digests           [A, 9] the slot of each adapter of the step, and its digest
    saves             [N, 2] a token of the batch, ascending, and the row that the state behind it is copied to
    images            None: none changes the step
    """

    __slots__ = (
        "adapters",
        "buffer",
        "digests",
        "ends",
        "first_logits",
        "first_new_blocks",
        "images",
        "is_new",
        "new_block_counts",
        "new_blocks",
        "number",
        "saves",
        "slots",
        "sources",
        "starts",
        "token_ids",
        "wants",
    )

    def __init__(self, buffer: Int32s) -> None:
        self.buffer = buffer
        self.number, wants, groups, sequences, tokens, blocks, adapters, saves, *images = buffer[
            : len(_HEADER)
        ].tolist()
        self.wants = _WANTS[wants]
        columns = buffer[len(_HEADER) :]
        parts = [columns[i * sequences : (i + 1) * sequences] for i in range(len(_COLUMNS))]
        self.slots, self.starts, self.ends, self.first_logits, self.is_new = parts[:5]
        self.first_new_blocks, self.new_block_counts, self.adapters, self.sources = parts[5:]
        begin = len(_COLUMNS) * sequences
        self.token_ids = columns[begin : begin + tokens]
        begin += tokens
        self.new_blocks = columns[begin : begin + groups * blocks].reshape(groups, blocks)
        begin += groups * blocks
        self.digests = columns[begin : begin + adapters * (1 + _DIGEST)].reshape(adapters, 1 + _DIGEST)
        begin += adapters * (1 + _DIGEST)
        self.saves = columns[begin : begin + 2 * saves].reshape(saves, 2)
        self.images = _images(columns[begin + 2 * saves :], tokens, *images) if any(images) else None

    def adapters_in_slots(self) -> list[tuple[int, str]]:
        """The slot and the digest of each adapter that the step uses."""
        return [(int(one[0]), one[1:].tobytes().hex()) for one in self.digests]

    def fill_tokens(self, last_tokens: Int32s) -> None:
        """Fill in the tokens that were being sampled when the order was made. last_tokens: the latest of each slot."""
        unknown = self.token_ids < 0
        self.token_ids[unknown] = last_tokens[-1 - self.token_ids[unknown]]


def _images(numbers: Int32s, num_tokens: int, num_rows: int, width: int, num_axes: int, num_ahead: int) -> StepImages:
    rows, axes, ahead = np.split(numbers, [num_rows, num_rows + num_axes * num_tokens])
    return StepImages(rows, width, axes.reshape(num_axes, num_tokens), ahead.reshape(num_ahead, _AHEAD))


def make_order(plan: StepPlan, number: int, images: StepImages | None = None) -> StepOrder:
    """The order of a plan, whose sequences may have images."""
    scheduled = plan.scheduled
    growing = [it for it in scheduled if it.new_blocks[0]]
    num_groups = len(scheduled[0].new_blocks)
    num_new_blocks = sum(len(it.new_blocks[0]) for it in growing)
    adapters = dict.fromkeys(it.sequence.adapter for it in scheduled if it.sequence.adapter is not None)
    saves = _saves_of(scheduled)
    counts = (num_groups, len(scheduled), plan.num_tokens, num_new_blocks, len(adapters), len(saves))
    of_images = (
        (0, 0, 0, 0) if images is None else (len(images.rows), images.width, len(images.axes), len(images.ahead))
    )
    numbers = chain(
        (number, _WANTS.index(_wanted(scheduled)), *counts, *of_images),
        [it.slot for it in scheduled],
        [it.start for it in scheduled],
        [it.end for it in scheduled],
        [it.first_logit for it in scheduled],
        [it.is_new for it in scheduled],
        [it.first_new_block for it in scheduled],
        [len(it.new_blocks[0]) for it in scheduled],
        [0 if it.sequence.adapter is None else 1 + it.sequence.adapter.slot for it in scheduled],
        [it.source for it in scheduled],
        chain.from_iterable([it.tokens for it in scheduled]),
        *(it.new_blocks[group] for group in range(num_groups) for it in growing),
        *((adapter.slot, *np.frombuffer(bytes.fromhex(adapter.digest), np.int32)) for adapter in adapters),
        *saves,
        *(() if images is None else (images.rows, images.axes.flat, images.ahead.flat)),
    )
    return StepOrder(np.array(list(numbers), dtype=np.int32))


def _saves_of(scheduled: list[ScheduledSequence]) -> list[tuple[int, int]]:
    """As StepOrder.saves."""
    saves = []
    begin = 0
    for it in scheduled:
        saves += [(begin + position - it.start - 1, row) for position, row in it.saves]
        begin += it.end - it.start
    return saves


def _wanted(scheduled: list[ScheduledSequence]) -> WantedLogits:
    wanting = [it.sequence for it in scheduled if it.first_logit < it.end]
    if not wanting:
        return "nothing"
    return "best" if all(sequence.is_plain_greedy for sequence in wanting) else "logits"


def largest_order(limits: SchedulerConfig) -> int:
    """How many numbers an order can have: a sequence may be given a whole cached prefix in one step."""
    blocks = -(-limits.max_model_len // limits.block_size)
    per_sequence = len(_COLUMNS) + len(limits.windows) * blocks
    adapters = limits.max_loras * (1 + _DIGEST)
    saves = 2 * limits.num_snapshots
    per_token = 1 + 1 + 3 + _AHEAD  # with images, of which each has a token in the step
    tokens = per_token * limits.max_num_batched_tokens
    return len(_HEADER) + per_sequence * limits.max_num_seqs + tokens + adapters + saves
