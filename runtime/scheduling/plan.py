"""One step as the scheduler sees it: what is computed, and what that brought. Pure Python, no tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from octavo.runtime.config import Policy
from octavo.runtime.messages import Logprobs, Pooled, PoolingParams
from octavo.runtime.scheduling.kv_groups import Windows
from octavo.runtime.scheduling.sequence import Sequence

MAX_PROMPT_LOGITS = 256
MAX_SOURCE_TOKENS = 2048  # of texts that an encoder reads in one step, but for one that is longer by itself

Wants = Literal["token", "pooled", "nothing"]
"""What a step shall bring for a sequence: its next token, its pooled hidden state, or keys and values alone."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step and of one sequence.

    windows            of each group of layers that share block tables: how many of the latest tokens they see
    max_prompt_logits  rows of logits that one step may spend on prompt_logprobs: each is vocab_size floats
    max_drafts         drafts that one step may check: each is a row of logits, too
    policy             who is admitted first: who came first, by priority, or by the longest cached prefix
    priority_aging     seconds of waiting that weigh as much as one step of priority; None: waiting counts among equals
    shared_tokens      of a step, at most, that the prompts of the owner with most requests get while others ask too:
                       their first tokens may have to wait so long
    jumps_forward      whether a step may bring the tokens that a grammar forces behind the one that was sampled
    stages             how many the model's layers are divided into. With several, a sequence whose token is being
                       sampled is in no other step, and a step takes its share of those that lack a token alone, so
                       that each stage has some of them
    pools_all          pooled requests want the hidden states of all of their tokens, and not of the last one alone
    whole_prompts      a prompt is computed in one step, or waits for one that holds it
    max_loras          adapters that sequences which run may use at once
    has_states         layers have states (kernels/linear_attention/states.py), whose rows are the sequences' slots
    num_snapshots      rows behind those, for copies of states that requests may begin with
    snapshot_tokens    there is a snapshot of each prompt behind its last full block, and one every so many tokens
    tells_kv_events    whether `Scheduler.take_kv_events` returns what the prefix cache remembers and forgets
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    max_prompt_logits: int = MAX_PROMPT_LOGITS
    max_drafts: int = MAX_PROMPT_LOGITS
    windows: Windows = (None,)
    policy: Policy = "fcfs"
    priority_aging: float | None = None
    shared_tokens: int = 512
    jumps_forward: bool = False
    stages: int = 1
    tells_kv_events: bool = False
    max_loras: int = 0
    pools_all: bool = False
    whole_prompts: bool = False
    has_states: bool = False
    num_snapshots: int = 0
    snapshot_tokens: int = 512

    def pools_all_of(self, pooling: PoolingParams | None) -> bool:
        """Whether a request wants the hidden states of all of its tokens, which no cache has."""
        return pooling is not None and (self.pools_all or pooling.task.startswith("token_"))


class ScheduledSequence(NamedTuple):
    """One sequence's share of a step: the tokens at positions start .. end are computed.

    What may change before the step has run is copied here: the scheduler goes on planning meanwhile.

    slot             the sequence's row in the block tables of each rank
    tokens           ids of positions start .. end; a negative one is being sampled by a step under way: `last_token_of`
    first_logit      logits of positions first_logit .. end are wanted: the last one's for the next token where `wants`
                     is "token", all others for prompt_logprobs or to confirm drafts; of a pooled request hidden states
    is_new           admitted in this step: the slot was another sequence's
    first_new_block  place in the sequence's block tables of the first of `new_blocks`
    new_blocks       what the sequence was given in this step, for each group of layers; in a group with a window the
                     first ones of a cached prefix may be void
    num_outputs      tokens of the answer before those that this step brings
    num_drafts       how many of the last tokens are guesses: the result says how many of them were right
    source           the row of the state before these tokens, where layers have states; -1: zeros
    saves            (position, row) where the state behind so many tokens is copied to
    """

    sequence: Sequence
    slot: int
    start: int
    end: int
    tokens: list[int]
    first_logit: int
    wants: Wants
    is_new: bool
    first_new_block: int
    new_blocks: list[list[int]]
    num_outputs: int
    num_drafts: int = 0
    source: int = -1
    saves: tuple[tuple[int, int], ...] = ()


def last_token_of(slot: int) -> int:
    """In place of a token id: the token that was sampled last for the sequence in this slot. Its own inverse."""
    return -1 - slot


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The scheduler's decision: the sequences of one step, in the order in which their tokens stand in the batch.

    num_prompt_logits  rows of logits that are spent on prompt_logprobs
    is_starved         a prompt under way lacked blocks, or tokens for an image, so that no request may be admitted
    num_released       how many times sequences had given their blocks back when this was planned
    """

    scheduled: list[ScheduledSequence]
    num_tokens: int
    num_prompt_logits: int = 0
    is_starved: bool = False
    num_released: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step brought. tokens: none, one or several for each scheduled sequence; the rest by its index.

    ended: those whose answers are complete with these tokens, as their grammars allow nothing more. refused: those
    whose error is about what the request asks for. pooled: what pooled requests asked for.
    """

    tokens: list[list[int]]
    logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    ended: frozenset[int] = frozenset()
    refused: frozenset[int] = frozenset()
    pooled: dict[int, Pooled] = field(default_factory=dict)


@dataclass(slots=True)
class Step:
    """A plan while it is being made: what it holds, and what is left of its budgets.

    limits: what is left to the prompts of some owners; the others are bound by tokens_left alone. image_waits: one that
    no step may divide has too few tokens left in this one.
    """

    tokens_left: int
    prompt_logits_left: int
    drafts_left: int = 0
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    limits: dict[str, int] = field(default_factory=dict)
    image_waits: bool = False

    def count(self, owner: str, num_tokens: int) -> None:
        """So many tokens of a prompt of this owner are in the plan."""
        if owner in self.limits:
            self.limits[owner] = max(0, self.limits[owner] - num_tokens)

    def is_full_for(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence can't begin in it.

        An encoder's input is read in the step in which its sequence begins, which answers under way wait for: so one
        with audio begins at a time, and of texts as many as are short together. Answers to one text share it.
        """
        if not self.tokens_left:
            return True
        if sequence.features:
            return any(it.is_new for it in self.scheduled)
        if not sequence.source_ids:
            return False
        begun = {id(it.sequence.source_ids): len(it.sequence.source_ids) for it in self.scheduled if it.is_new}
        is_new = bool(begun) and id(sequence.source_ids) not in begun
        return is_new and sum(begun.values()) + len(sequence.source_ids) > MAX_SOURCE_TOKENS

    def as_plan(self, config: SchedulerConfig, num_released: int, *, is_starved: bool) -> StepPlan:
        """The plan as it is now. The other arguments are StepPlan's."""
        return StepPlan(
            self.scheduled,
            num_tokens=config.max_num_batched_tokens - self.tokens_left,
            num_prompt_logits=config.max_prompt_logits - self.prompt_logits_left,
            is_starved=is_starved or self.image_waits,
            num_released=num_released,
        )
