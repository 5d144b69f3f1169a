"""Drafts in a step: how many of a sequence's can be checked, and how many turned out right. Knows nobody who drafts."""

from __future__ import annotations

from octavo.runtime.scheduling.kv_groups import KVGroups
from octavo.runtime.scheduling.plan import ScheduledSequence, SchedulerConfig, Step
from octavo.runtime.scheduling.sequence import Sequence


def room_for_drafts(step: Step, sequence: Sequence, groups: KVGroups, config: SchedulerConfig, num_behind: int) -> int:
    """How many of its drafts the next step can check; the sequence is given the blocks that they need.

    No answer gets too long, and of the running sequences that may follow in this step, num_behind, none goes without
    its own token or gives way for them.
    """
    known = len(sequence.token_ids)
    most = min(sequence.num_prompt + sequence.params.max_tokens, config.max_model_len) - 1
    count = min(len(sequence.drafts), step.tokens_left - 1 - num_behind, step.drafts_left, most - known)
    if sequence.num_sampling or count <= 0:
        return 0
    missing = -(-(known + count) // config.block_size) - len(sequence.blocks)
    if missing > 0:
        groups.give_back_unseen(sequence.blocks, sequence.first_uncertain)
        groups.grow(sequence.blocks, min(missing, groups.num_free_columns - num_behind))
    return min(count, len(sequence.blocks) * config.block_size - known)


def num_right(tokens: list[int], drafts: list[int]) -> int:
    """How many of the drafts are what has come, from the first one on."""
    count = 0
    for token, draft in zip(tokens, drafts, strict=False):
        if token != draft:
            break
        count += 1
    return count


class DraftCounts:
    """Totals since start, as EngineStats has them."""

    def __init__(self) -> None:
        self.num_drafts = 0
        self.num_tokens = 0
        self.accepted_per_pos: list[int] = []

    def count(self, scheduled: ScheduledSequence, tokens: list[int]) -> tuple[int, int] | None:
        """Count what a step has brought for a sequence: (its drafts that were checked, how many of them were right).

        None where none were: a step that brought no token has checked nothing.
        """
        if not scheduled.num_drafts or not tokens:
            return None
        drafts = scheduled.tokens[-scheduled.num_drafts :]
        right = num_right(tokens, drafts)
        self.num_drafts += 1
        self.num_tokens += len(drafts)
        self.accepted_per_pos += [0] * (len(drafts) - len(self.accepted_per_pos))
        for position in range(right):
            self.accepted_per_pos[position] += 1
        return len(drafts), right
