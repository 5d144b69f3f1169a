"""Which tokens of which sequences the next step computes. Pure Python: knows counts and block numbers, no tensor.

First come, first served, unless requests have ranks (waiting.py) or several owners (fairness.py). A step holds,
within a budget of tokens: the next token of every running sequence, then the rest of prompts that are being
prefilled, in chunks, then new arrivals. When blocks run out, the sequence that is last in order gives all of its own
back and starts again later (recomputation, mostly out of the prefix cache): `running[-1]`. `waiting` is in order, and
so is `running`, but that each owner's first sequence stands before anybody's second: who has most gives blocks back. A
sequence that is not ready is passed over.

Steps run in the order in which they are planned, and a step may be planned while earlier ones are under way. A sequence
whose token is still being sampled goes on from it by reference (`last_token_of`); what a step under way computes for a
sequence that has ended is dropped. Blocks may be given away while a step under way writes to them: whoever gets them
writes later. Only a preempted sequence waits for its steps before it is admitted again.

The prefix cache is offered the blocks that a step has filled when its result is there, as far as drafts were right. A
chunk of a prompt is the exception: its tokens are known, every layer writes the keys and values of such a step before
it attends, and what has been planned is never taken out of a plan. So its blocks are offered when it is planned, and a
sequence may share a block with one of the same step: that is what makes n answers to one prompt cheap. (In a step of
single tokens a GPU attends while it writes: those blocks are offered afterwards. So is the block of the token that is
sampled from, which is computed once more where that brings none.)
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterable
from itertools import chain
from math import inf, nextafter

from octavo.runtime.messages import AddRequest, EngineStats, Logprobs, TokenOutput
from octavo.runtime.scheduling.adapter_slots import Adapter, AdapterSlots, Admission
from octavo.runtime.scheduling.drafts import DraftCounts, room_for_drafts
from octavo.runtime.scheduling.fairness import FairShares
from octavo.runtime.scheduling.kv_events import KVCacheEvent
from octavo.runtime.scheduling.kv_groups import BlockTables
from octavo.runtime.scheduling.limits import refusal_of
from octavo.runtime.scheduling.plan import ScheduledSequence, SchedulerConfig, Step, StepPlan, StepResult, last_token_of
from octavo.runtime.scheduling.prefix_cache import Fetch, PrefixCache
from octavo.runtime.scheduling.sequence import Sequence, append_tokens, images_wait, is_full
from octavo.runtime.scheduling.waiting import Waiting, by_cached_prefix, place_of, rank_of, running_order


class Scheduler:
    """Sequences from arrival to their last token. Each `plan` has one `commit`, in the same order."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.time) -> None:
        self.config = config
        self.prefixes = PrefixCache(config)
        self.pool = self.prefixes.pool
        self._groups = self.prefixes.groups
        self.running: list[Sequence] = []
        self.waiting = Waiting()
        self.adapters = AdapterSlots(config.max_loras)
        self._shares = FairShares()
        self._live: dict[str, Sequence] = {}
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._clock = clock
        self._num_added = 0
        self._num_preemptions = 0
        self._num_released = 0
        self._step_tokens = 0
        self._drafted = DraftCounts()

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence that runs or may be admitted."""
        return bool(self.running) or any(sequence.may_begin for sequence in self.waiting.values())

    def add(self, request: AddRequest, *, is_ready: bool = True, adapter: Adapter | None = None) -> TokenOutput | None:
        """Queue a request, or return the output that says why it can't ever run.

        Without is_ready it is passed over until `set_ready`, and while its adapter is not up.
        """
        problem = refusal_of(request, self.config, self._groups.most_blocks)
        if request.request_id in self._live:
            self.abort([request.request_id])
            problem = f"request id {request.request_id!r} is in use; both requests are ended"
        if problem is not None:
            return TokenOutput(request.request_id, [], finish_reason="error", error=problem)
        sequence = Sequence(request, self._num_added, self._groups.empty(), is_ready=is_ready, adapter=adapter)
        self._num_added += 1
        self._live[request.request_id] = sequence
        sequence.tag = self._shares.tag(request)
        sequence.rank = rank_of(request, self.config.policy, self.config.priority_aging)
        self.waiting.add(sequence)
        return None

    def set_ready(self, request_id: str, grammar: object = None) -> None:
        """Let this request be admitted: what it waited for is there. Unknown ids are ignored."""
        sequence = self._live.get(request_id)
        if sequence is not None:
            sequence.grammar = grammar
            sequence.is_ready = True
            self.waiting.deferred.discard(request_id)

    def refuse(self, request_id: str, error: str) -> TokenOutput | None:
        """End a request that waits, for its own fault; None where it is gone."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return None
        self._drop(sequence)
        return TokenOutput(request_id, [], finish_reason="error", error=error, is_refused=True)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop these requests, waiting or running; unknown ids are ignored."""
        for request_id in request_ids:
            sequence = self._live.get(request_id)
            if sequence is not None:
                self._drop(sequence)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes that no running sequence holds."""
        self.prefixes.reset()

    def take_kv_events(self) -> list[KVCacheEvent]:
        """What the prefix cache has remembered and forgotten since the last call, where the config asks for it."""
        return self.prefixes.take_events()

    def end_fetch(self, fetch: Fetch, are_right: list[bool]) -> None:
        """Blocks that a sequence waits for have been read: let it be admitted. are_right: whether each may be used."""
        self.prefixes.end_fetch(fetch, are_right)
        if self._live.get(fetch.sequence.request_id) is fetch.sequence:
            self.waiting.deferred.discard(fetch.sequence.request_id)

    def plan(self) -> StepPlan:
        """Choose the tokens of the next step and give them blocks.

        Empty only where all that there is to do waits for the results of steps under way.
        """
        self._step_tokens = 0  # until a step is committed
        self.prefixes.begin_step()
        step = Step(self.config.max_num_batched_tokens, self.config.max_prompt_logits, self.config.max_drafts)
        step.limits = self._shares.limits(self.config.shared_tokens)
        if self._shares.has_several:
            self.running = running_order(self.running)
        due = self._make_way()
        self._plan_decodes(step)
        tokens_kept, columns_kept = self._room_for(step, due)
        step.tokens_left -= tokens_kept
        starved = self._plan_prefills(step, columns_kept)
        while starved and not (step.scheduled or columns_kept or images_wait(self.running)):
            self._preempt(self.running[-1])
            starved = self._plan_prefills(step, columns_kept)
        step.tokens_left += tokens_kept
        self._admit(step, due, due_alone=starved or step.image_waits)  # others would take the room that it waits for
        return step.as_plan(self.config, self._num_released, is_starved=starved)

    def extend(self, plan: StepPlan) -> StepPlan:
        """The last plan once more, with requests that have come since, as far as it has room.

        Blocks and slots that were given back since are still used by the plan as it is: then it stays so.
        """
        if plan.is_starved or plan.num_released != self._num_released:
            return plan
        step = Step(
            self.config.max_num_batched_tokens - plan.num_tokens,
            self.config.max_prompt_logits - plan.num_prompt_logits,
            scheduled=list(plan.scheduled),
        )
        step.limits = self._shares.limits(self.config.shared_tokens)
        for scheduled in plan.scheduled:
            step.count(scheduled.sequence.owner, scheduled.end - scheduled.start)
        self._admit(step, self._due())
        return step.as_plan(self.config, self._num_released, is_starved=False)

    def _due(self) -> Sequence | None:
        """Whose turn it is whatever waits before it; None: requests go in order."""
        if not self.waiting or not self._shares.has_several:
            return None
        return self._shares.whose_turn(self.waiting.heads(), self.running)

    def _make_way(self) -> Sequence | None:
        """Preempt what has more than its fair share, for one that waits and has no room otherwise.

        Returns whose turn it is, as `_due` does.
        """
        if not self._shares.has_several:
            return None
        due = self._due()
        first = due or next((sequence for sequence in self.waiting.values() if sequence.may_begin), None)
        if first is None or first.num_steps:
            return None
        if first.adapter is not None and not self.adapters.has_room(first.adapter, [it.adapter for it in self.running]):
            return due
        while not self._free_slots or not self._fits(first, self.prefixes.find(first)):
            greedy = self._shares.one_to_give_way(first, self.running)
            if greedy is None:
                return due
            if due is None:
                greedy.tag = nextafter(first.tag, inf)  # behind it
            self._preempt(greedy)
        return due

    def _plan_decodes(self, step: Step) -> None:
        """One token for each sequence that lacks only its newest; those that came last make room for the others."""
        block_size = self.config.block_size
        share = -(-len(self.running) // self.config.stages)
        for place, sequence in enumerate(tuple(self.running), 1):
            if len(step.scheduled) == share:
                return
            length = sequence.length
            if sequence.num_planned != length - 1 or step.tokens_left == 0 or sequence.slot < 0:
                continue
            if sequence.checks_drafts or (sequence.num_sampling and not self._goes_on(sequence, length)):
                continue
            num_held = len(sequence.blocks)
            if length > num_held * block_size:
                self._groups.give_back_unseen(sequence.blocks, sequence.first_uncertain)
                while not self._groups.num_free_columns and sequence.slot >= 0:
                    self._preempt(self.running[-1])
                if sequence.slot < 0:  # it was itself the last to come
                    continue
                self._groups.grow(sequence.blocks, 1)
            num_drafts = 0
            if sequence.drafts:
                num_drafts = room_for_drafts(step, sequence, self._groups, self.config, len(self.running) - place)
            self._put(step, sequence, length + num_drafts, num_held, num_drafts=num_drafts)

    def _goes_on(self, sequence: Sequence, length: int) -> bool:
        """Whether a sequence may go on from a token that is being sampled: it surely needs the next, and no more.

        One with drafts may not: they can be checked once the token in front of them is known.
        """
        jumps = self.config.jumps_forward and sequence.params.may_jump
        waits = jumps or self.config.stages > 1 or bool(sequence.drafts)
        return not waits and not is_full(sequence, length, self.config.max_model_len)

    def _room_for(self, step: Step, due: Sequence | None) -> tuple[int, int]:
        """The tokens and columns that prompts under way leave to the one whose turn it is: none if it can't begin."""
        if due is None or not self._free_slots:
            return 0, 0
        cached = self.prefixes.find(due)
        needed = self._groups.num_needed(cached, len(due.token_ids), due.at_once)
        if needed > self.pool.num_free:
            return 0, 0
        left = len(due.token_ids) - len(cached) * self.config.block_size
        return min(left, step.tokens_left, self.config.shared_tokens), -(-needed // len(self.config.windows))

    def _plan_prefills(self, step: Step, columns_kept: int) -> bool:
        """A chunk for each prompt under way, as far as tokens and free blocks go; whether one lacked blocks."""
        for sequence in self.running:
            remaining = sequence.length - sequence.num_planned
            size = self._chunk(step, sequence, remaining)
            if remaining == 1 or size == 0:
                step.image_waits |= remaining > 1 and step.tokens_left < sequence.at_once
                continue
            self._groups.give_back_unseen(sequence.blocks, sequence.first_uncertain)
            columns = len(sequence.blocks) + max(0, self._groups.num_free_columns - columns_kept)
            size = sequence.uncut(min(size, columns * self.config.block_size - sequence.num_planned))
            if size <= 0:
                return True
            self._extend(step, sequence, size)
        return False

    def _admit(self, step: Step, due: Sequence | None, *, due_alone: bool = False) -> None:
        """Start waiting sequences, while a step has room and the cache could hold all of their tokens.

        They come in order, behind the one whose turn it is; those of an owner who has all that it may have of this step
        are passed over, and those whose adapter has no slot.
        """
        block_size = self.config.block_size
        admitted: list[Sequence] = []
        adapters: Admission | None = None
        others = [] if due_alone else self._candidates()
        for sequence in others if due is None else chain([due], (it for it in others if it is not due)):
            if not self._free_slots or step.is_full_for(sequence):
                break
            if not sequence.is_ready or step.limits.get(sequence.owner) == 0:
                continue
            if sequence.num_steps:  # preempted a moment ago
                break
            if sequence.adapter is not None:
                adapters = adapters or self.adapters.admission(it.adapter for it in self.running)
                if not adapters.admits(sequence.adapter):
                    continue
            blocks = self.prefixes.find(sequence)
            if self.prefixes.awaits(sequence, blocks):
                continue
            size = self._chunk(step, sequence, sequence.length - len(blocks) * block_size)
            if size == 0 and self.config.whole_prompts and sequence.length <= step.tokens_left:
                continue
            columns = self._groups.num_columns_beside(blocks) if sequence.at_once else size
            size = sequence.uncut(min(size, columns * block_size), len(blocks) * block_size)
            if size == 0 or not self._fits(sequence, blocks, spare=sequence is not due):
                break
            if self.prefixes.begin_fetch(sequence, blocks):
                self.waiting.deferred.add(sequence.request_id)
                continue
            admitted.append(sequence)
            self._start(sequence, blocks)
            self._extend(step, sequence, min(size, self._groups.num_free_columns * block_size), is_new=True)
        for sequence in admitted:
            self.waiting.remove(sequence)

    def _candidates(self) -> list[Sequence]:
        """Waiting sequences in the order in which they are admitted."""
        waiting = self.waiting.values()
        if self.config.policy != "lpm" or not self._free_slots:
            return waiting
        return by_cached_prefix(waiting, self.prefixes.find)

    def _fits(self, sequence: Sequence, cached: BlockTables, *, spare: bool = True) -> bool:
        """Whether the cache can hold all tokens of a sequence, of which these are cached. spare: and a column for each
        running one's growth, or the next step would preempt what this one admits.
        """
        headroom = len(self.running) * len(self.config.windows) if spare else 0
        return self._groups.num_needed(cached, sequence.length, sequence.at_once) + headroom <= self.pool.num_free

    def _start(self, sequence: Sequence, blocks: BlockTables) -> None:
        """Let a waiting sequence run, with the blocks of a cached prefix."""
        insort(self.running, sequence, key=place_of)
        self._shares.serve(sequence)
        sequence.slot = self._free_slots.pop()
        self._groups.hold(blocks)
        sequence.blocks = blocks
        sequence.num_planned = len(blocks) * self.config.block_size
        if sequence.num_cached is None:
            self.prefixes.count(sequence)
            sequence.scheduled_time = self._clock()

    def _chunk(self, step: Step, sequence: Sequence, remaining: int) -> int:
        """How many of the remaining tokens a step computes. Whole prompts: all or none, but an owner's first always."""
        limit = step.limits.get(sequence.owner, remaining)
        if self.config.whole_prompts:
            is_first = limit == self.config.shared_tokens
            return remaining if remaining <= step.tokens_left and (is_first or remaining <= limit) else 0
        most = step.prompt_logits_left if sequence.wants_prompt_logprobs else limit
        return sequence.uncut(min(remaining, step.tokens_left, limit, most), sequence.length - remaining)

    def _extend(self, step: Step, sequence: Sequence, size: int, is_new: bool = False) -> None:
        end = sequence.num_planned + size
        num_held = 0 if is_new else len(sequence.blocks)
        missing = -(-end // self.config.block_size) - len(sequence.blocks)
        self._groups.grow(sequence.blocks, missing)
        step.count(sequence.owner, size)
        self._put(step, sequence, end, num_held, is_new)

    def _put(
        self, step: Step, sequence: Sequence, end: int, num_held: int, is_new: bool = False, num_drafts: int = 0
    ) -> None:
        """Add tokens num_planned .. end to the step. Their blocks are there; the first num_held are not new."""
        start = sequence.num_planned
        known = end - num_drafts
        samples = known == sequence.length
        first_logit = known - 1 if samples else end
        if sequence.wants_prompt_logprobs:
            first_logit = min(first_logit, max(start, sequence.num_listed - 1))
            step.prompt_logits_left -= end - first_logit
            sequence.num_listed = max(sequence.num_listed, min(end + 1, sequence.num_prompt))
        if self.config.pools_all_of(sequence.pooling):
            first_logit = start
        if samples and sequence.num_sampling:
            tokens = [last_token_of(sequence.slot)]
        else:
            tokens = sequence.token_ids[start:known] + sequence.drafts[:num_drafts]
        step.scheduled.append(
            ScheduledSequence(
                sequence=sequence,
                slot=sequence.slot,
                start=start,
                end=end,
                tokens=tokens,
                first_logit=first_logit,
                wants=sequence.wants if samples else "nothing",
                is_new=is_new,
                first_new_block=num_held,
                new_blocks=[table[num_held:] for table in sequence.blocks.tables],
                num_outputs=sequence.length - sequence.num_prompt,
                num_drafts=num_drafts,
                source=self.prefixes.source(sequence, start) if is_new else sequence.slot,
                saves=self.prefixes.saves(sequence, start, min(end, len(sequence.token_ids))),
            )
        )
        step.tokens_left -= end - start
        step.drafts_left -= num_drafts
        sequence.num_planned = known
        sequence.num_sampling += samples
        sequence.num_steps += 1
        if num_drafts:
            sequence.checks_drafts = True
        if samples:
            sequence.drafts = []
        if end - start > 1:
            begin = max(0, start - sequence.num_steps)  # where a step under way is of one token, it wasn't offered
            self.prefixes.offer(sequence, begin, min(known - samples, sequence.num_prompt))

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        """Record what a step brought: extend sequences by their tokens, end those that are done."""
        outputs: list[TokenOutput] = []
        now = self._clock()
        self._step_tokens = plan.num_tokens
        for index, (scheduled, tokens) in enumerate(zip(plan.scheduled, result.tokens, strict=True)):
            sequence = scheduled.sequence
            sequence.num_steps -= 1
            if sequence.has_ended:
                continue
            if sequence.num_void_steps:
                sequence.num_void_steps -= 1
                continue
            if index in result.prompt_logprobs:
                assert sequence.prompt_logprobs is not None
                sequence.prompt_logprobs += result.prompt_logprobs[index]
            if index in result.errors:
                is_refused = index in result.refused
                outputs.append(self._end_with_error(sequence, result.errors[index], is_refused=is_refused))
                continue
            if index in result.pooled:
                self._drop(sequence)
                outputs.append(sequence.output([], "stop", None, now, pooled=result.pooled[index]))
                continue
            is_ended = index in result.ended
            output = self._take(scheduled, tokens, result.logprobs.get(index), now, is_ended=is_ended)
            if output is not None:
                outputs.append(output)
        return outputs

    def _take(
        self,
        scheduled: ScheduledSequence,
        tokens: list[int],
        logprobs: list[Logprobs] | None,
        now: float,
        *,
        is_ended: bool,
    ) -> TokenOutput | None:
        """One sequence's share of a result: its new tokens up to one that ends it, and the blocks that are full now."""
        sequence = scheduled.sequence
        if scheduled.wants == "token":
            sequence.num_sampling -= 1
            sequence.checks_drafts = False
            if not tokens and not is_ended:
                sequence.go_back()
                if self.config.has_states and sequence.slot >= 0:
                    self._preempt(sequence)  # its states are past that position
        num_known = len(sequence.token_ids)
        finish_reason = append_tokens(sequence, tokens, self.config.max_model_len)
        if is_ended and len(sequence.token_ids) - num_known == len(tokens):  # whole, be it at its last token
            finish_reason = "stop"
        checked = None
        if sequence.slot >= 0:
            # The last token is computed in the next step, which its logits are wanted of, be it a draft or not.
            checked = self._drafted.count(scheduled, tokens)
            num_right = 0 if checked is None else max(0, min(checked[1], len(tokens) - 1))
            sequence.num_planned += num_right
            end = scheduled.end - scheduled.num_drafts + num_right
            self.prefixes.offer(sequence, scheduled.start, min(end, sequence.num_planned, len(sequence.token_ids)))
        if finish_reason is not None:
            self._drop(sequence)
        taken = sequence.token_ids[num_known:]
        if not taken and finish_reason is None:
            return None
        return sequence.output(taken, finish_reason, logprobs, now, checked)

    def _end_with_error(self, sequence: Sequence, error: str, *, is_refused: bool) -> TokenOutput:
        self.prefixes.forget(sequence)
        self._drop(sequence)
        return TokenOutput(sequence.request_id, [], finish_reason="error", error=error, is_refused=is_refused)

    def _drop(self, sequence: Sequence) -> None:
        sequence.has_ended = True
        del self._live[sequence.request_id]
        self._shares.end(sequence)
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._release(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.add(sequence)
        sequence.num_preemptions += 1
        self._num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._num_released += 1
        self.prefixes.used(sequence)
        self._groups.release(sequence.blocks)
        self._free_slots.append(sequence.slot)
        sequence.blocks = self._groups.empty()
        sequence.slot = -1
        sequence.num_planned = 0

    def stats(self) -> EngineStats:
        """Gauges and counters as they are now."""
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_cache_usage=1 - self.pool.num_free / self.config.num_blocks,
            num_preemptions=self._num_preemptions,
            prefix_cache_queries=self.prefixes.num_queries,
            prefix_cache_hits=self.prefixes.num_hits,
            step_tokens=self._step_tokens,
            num_deferred=len(self.waiting.deferred),
            num_drafts=self._drafted.num_drafts,
            num_draft_tokens=self._drafted.num_tokens,
            accepted_per_pos=list(self._drafted.accepted_per_pos),
        )
