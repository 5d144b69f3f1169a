"""Which tokens of which sequences the next step computes. Pure Python: knows counts and block numbers, no tensor.

First come, first served. A step holds, within a budget of tokens: the next token of every running sequence, then the
rest of prompts that are being prefilled, in chunks, then new arrivals. When blocks run out, the sequence that came
last gives all of its own back and starts again later (recomputation, mostly out of the prefix cache). `running` is
always in order of arrival and all of `waiting` came later, so the victim is `running[-1]`, and a preempted sequence
waits at the front.

Blocks that a chunk fills are offered to the prefix cache when it is planned, not when it is computed: every layer
writes the keys and values of such a step before it attends, so a sequence may share a block with one of the same step
(that is what makes n answers to one prompt cheap). For that to be sound, what has been planned is never taken out of
the plan. In a step of single tokens a GPU attends while it writes: a block that one token fills is offered afterwards.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from octavo.runtime.messages import AddRequest, EngineStats, FinishReason, Logprobs, TokenOutput
from octavo.runtime.scheduling.block_pool import BlockPool
from octavo.runtime.scheduling.sequence import Sequence

MAX_PROMPT_LOGITS = 256


class Work(NamedTuple):
    """One sequence's share of a step: its tokens start .. end are computed, and logits of first_logit .. end wanted.

    With `samples`, the logits of the last one give the sequence's next token; all others are for prompt_logprobs.
    is_new says that the sequence has been admitted in this step: its row of the block tables is another's.
    """

    sequence: Sequence
    start: int
    end: int
    first_logit: int
    samples: bool
    is_new: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The scheduler's decision: the works of one step, in the order in which their tokens stand in the batch."""

    works: list[Work]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the sampler made of a step. token_ids: one for each work that samples, in order; the rest by work index."""

    token_ids: list[int]
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step and of one sequence.

    max_prompt_logits  rows of logits that one step may spend on prompt_logprobs: each is vocab_size floats
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    max_prompt_logits: int = MAX_PROMPT_LOGITS


class Scheduler:
    """Sequences from arrival to their last token. One `plan`, then one `commit` of that plan, in turns."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.time) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        self.running: list[Sequence] = []
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self._live: dict[str, Sequence] = {}
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._clock = clock
        self._num_added = 0
        self._num_preemptions = 0
        self._num_queries = 0
        self._num_hits = 0
        self._step_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def add(self, request: AddRequest) -> TokenOutput | None:
        """Queue a request, or return the output that says why it can't ever run."""
        problem = self._refusal(request)
        if request.request_id in self._live:
            self.abort([request.request_id])
            problem = f"request id {request.request_id!r} is in use; both requests are ended"
        if problem is not None:
            return TokenOutput(request.request_id, [], finish_reason="error", error=problem)
        sequence = Sequence(request, self._num_added)
        self._num_added += 1
        self._live[request.request_id] = sequence
        self.waiting[request.request_id] = sequence
        return None

    def _refusal(self, request: AddRequest) -> str | None:
        config = self.config
        num_prompt = len(request.token_ids)
        if num_prompt == 0:
            return "the prompt is empty: at least one token is needed"
        if num_prompt >= config.max_model_len:
            return (
                f"the prompt has {num_prompt} tokens; with max_model_len {config.max_model_len} it may have "
                f"{config.max_model_len - 1} at most, so that one can follow"
            )
        most = min(num_prompt + request.params.max_tokens, config.max_model_len) - 1  # the last one is never computed
        needed = -(-most // config.block_size)
        if needed > config.num_blocks:
            return (
                f"the request may need {most} tokens of KV cache, {needed} blocks of {config.block_size}; the cache "
                f"has {config.num_blocks} blocks: ask for fewer tokens or serve with a larger cache"
            )
        return None

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop these requests, waiting or running; unknown ids are ignored. Not between a plan and its commit."""
        for request_id in request_ids:
            sequence = self._live.get(request_id)
            if sequence is not None:
                self._drop(sequence)

    def reset_prefix_cache(self) -> None:
        self.pool.forget_unheld()

    def plan(self) -> StepPlan:
        """Choose the tokens of the next step and give them blocks. Never empty while `has_work`."""
        step = _Step(self.config.max_num_batched_tokens, self.config.max_prompt_logits)
        self._plan_decodes(step)
        starved = self._plan_prefills(step)
        while starved and not step.works:
            self._preempt(self.running[-1])
            starved = self._plan_prefills(step)
        if not starved:
            self._admit(step)
        self._step_tokens = self.config.max_num_batched_tokens - step.tokens_left
        return StepPlan(step.works, self._step_tokens)

    def _plan_decodes(self, step: _Step) -> None:
        """One token for each sequence that lacks only its newest; those that came last make room for the others."""
        block_size = self.config.block_size
        for sequence in tuple(self.running):
            length = len(sequence.token_ids)
            if sequence.num_computed != length - 1 or step.tokens_left == 0 or sequence.row < 0:
                continue
            if length > len(sequence.blocks) * block_size:
                while self.pool.num_free == 0 and sequence.row >= 0:
                    self._preempt(self.running[-1])
                if sequence.row < 0:  # it was itself the last to come
                    continue
                sequence.blocks += self.pool.allocate(1)
            self._put(step, sequence, length)

    def _plan_prefills(self, step: _Step) -> bool:
        """A chunk for each prompt under way, as far as tokens and free blocks go; whether one lacked blocks."""
        for sequence in self.running:
            remaining = len(sequence.token_ids) - sequence.num_computed
            size = self._chunk(step, sequence, remaining)
            if remaining == 1 or size == 0:
                continue
            room = (len(sequence.blocks) + self.pool.num_free) * self.config.block_size - sequence.num_computed
            if room <= 0:
                return True
            self._extend(step, sequence, min(size, room))
        return False

    def _admit(self, step: _Step) -> None:
        """Start waiting sequences in order, while a step has room and the cache could hold all of their tokens."""
        block_size = self.config.block_size
        while self.waiting and self._free_rows and step.tokens_left:
            sequence = next(iter(self.waiting.values()))
            blocks = self._cached_prefix(sequence)
            size = self._chunk(step, sequence, len(sequence.token_ids) - len(blocks) * block_size)
            needed = -(-len(sequence.token_ids) // block_size) - len(blocks) + self.pool.num_unheld(blocks)
            headroom = len(self.running)  # a block of growth each, or the next step would preempt what this admits
            if size == 0 or needed + headroom > self.pool.num_free:
                return
            self.waiting.popitem(last=False)
            self.running.append(sequence)
            sequence.row = self._free_rows.pop()
            self.pool.hold(blocks)
            sequence.blocks = blocks
            sequence.num_computed = len(blocks) * block_size
            if sequence.num_cached is None:
                sequence.num_cached = sequence.num_computed
                sequence.scheduled_time = self._clock()
                self._num_queries += sequence.num_prompt
                self._num_hits += sequence.num_cached
            self._extend(step, sequence, size, is_new=True)

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """The blocks of the longest remembered prefix; the last token is always left to be computed, for its logits."""
        if not self.config.enable_prefix_caching or sequence.wants_prompt_logprobs:
            return []
        count = (len(sequence.token_ids) - 1) // self.config.block_size
        return self.pool.find_prefix(sequence.name_blocks(count, self.config.block_size))

    def _chunk(self, step: _Step, sequence: Sequence, remaining: int) -> int:
        size = min(remaining, step.tokens_left)
        return min(size, step.prompt_logits_left) if sequence.wants_prompt_logprobs else size

    def _extend(self, step: _Step, sequence: Sequence, size: int, is_new: bool = False) -> None:
        end = sequence.num_computed + size
        missing = -(-end // self.config.block_size) - len(sequence.blocks)
        sequence.blocks += self.pool.allocate(missing)
        self._put(step, sequence, end, is_new)

    def _put(self, step: _Step, sequence: Sequence, end: int, is_new: bool = False) -> None:
        """Add tokens num_computed .. end to the step; their blocks are there."""
        start = sequence.num_computed
        samples = end == len(sequence.token_ids)
        first_logit = end - 1 if samples else end
        if sequence.wants_prompt_logprobs:
            assert sequence.prompt_logprobs is not None
            first_logit = min(first_logit, max(start, len(sequence.prompt_logprobs) - 1))
            step.prompt_logits_left -= end - first_logit
        step.works.append(Work(sequence, start, end, first_logit, samples, is_new))
        step.tokens_left -= end - start
        if end - start > 1:
            self._offer(sequence, start, end)

    def _offer(self, sequence: Sequence, start: int, end: int) -> None:
        """Let later sequences find the blocks that tokens start .. end fill."""
        full = end // self.config.block_size
        if self.config.enable_prefix_caching and full > start // self.config.block_size:
            names = sequence.name_blocks(full, self.config.block_size)
            for index in range(start // self.config.block_size, full):
                self.pool.remember(sequence.blocks[index], names[index])

    def commit(self, plan: StepPlan, sampled: Sampled) -> list[TokenOutput]:
        """Record what the step computed: extend sequences by their tokens, end those that are done."""
        outputs: list[TokenOutput] = []
        tokens = iter(sampled.token_ids)
        now = self._clock()
        for index, (sequence, start, end, _, samples, _) in enumerate(plan.works):
            sequence.num_computed = end
            if end - start == 1:
                self._offer(sequence, start, end)
            token = next(tokens) if samples else None
            if index in sampled.prompt_logprobs:
                assert sequence.prompt_logprobs is not None
                sequence.prompt_logprobs += sampled.prompt_logprobs[index]
            if index in sampled.errors:
                outputs.append(self._end_with_error(sequence, sampled.errors[index]))
            elif token is not None:
                outputs.append(self._append(sequence, token, sampled.logprobs.get(index), now))
        return outputs

    def _append(self, sequence: Sequence, token: int, logprobs: Logprobs | None, now: float) -> TokenOutput:
        sequence.token_ids.append(token)
        finish_reason = self._finish_reason(sequence, token)
        if finish_reason is not None:
            self._drop(sequence)
        listed = None if logprobs is None else [logprobs]
        stop_token_id = token if finish_reason == "stop" else None
        if sequence.first_token_time is not None:
            return TokenOutput(sequence.request_id, [token], finish_reason, stop_token_id, logprobs=listed)
        sequence.first_token_time = now
        return TokenOutput(
            sequence.request_id,
            [token],
            finish_reason,
            stop_token_id,
            logprobs=listed,
            prompt_logprobs=sequence.prompt_logprobs,
            num_cached_tokens=sequence.num_cached,
            scheduled_time=sequence.scheduled_time,
            first_token_time=now,
        )

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.params
        length = len(sequence.token_ids)
        num_outputs = length - sequence.num_prompt
        if token in params.stop_token_ids and num_outputs > params.min_tokens:
            return "stop"
        if num_outputs >= params.max_tokens or length >= self.config.max_model_len:
            return "length"
        return None

    def _end_with_error(self, sequence: Sequence, error: str) -> TokenOutput:
        self.pool.forget(sequence.blocks)  # whatever made its logits unusable may stand in its keys and values
        self._drop(sequence)
        return TokenOutput(sequence.request_id, [], finish_reason="error", error=error)

    def _drop(self, sequence: Sequence) -> None:
        del self._live[sequence.request_id]
        if self.waiting.pop(sequence.request_id, None) is None:
            self.running.remove(sequence)
            self._release(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting[sequence.request_id] = sequence
        self.waiting.move_to_end(sequence.request_id, last=False)
        self._num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        self._free_rows.append(sequence.row)
        sequence.blocks = []
        sequence.row = -1
        sequence.num_computed = 0

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_cache_usage=1 - self.pool.num_free / self.config.num_blocks,
            num_preemptions=self._num_preemptions,
            prefix_cache_queries=self._num_queries,
            prefix_cache_hits=self._num_hits,
            step_tokens=self._step_tokens,
        )


@dataclass(slots=True)
class _Step:
    """A plan while it is being made: what it holds, and what is left of its budgets."""

    tokens_left: int
    prompt_logits_left: int
    works: list[Work] = field(default_factory=list)
