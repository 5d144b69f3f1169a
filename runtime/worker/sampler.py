"""From logits to tokens: the next token of each sequence, and the log-probabilities that requests ask for.

Log-probabilities are those of the model itself, before any change to the logits (vLLM's `raw_logprobs`).

Drafts are checked by drawing (runtime/speculation): the token behind the known ones is drawn as always; where it is the
first draft, the next row's logits are about the token behind it, which is drawn as always, and so on up to the first
draw that differs. All that a draw depends on (uniform number, counts of penalties, grammar) is what it would be in a
step of its own, since nothing is done for a token before the tokens in front of it are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.sampling.best import Best, best_of
from octavo.runtime.messages import Logprobs
from octavo.runtime.scheduling.plan import ScheduledSequence, StepPlan, StepResult
from octavo.runtime.scheduling.sequence import Sequence, is_stop
from octavo.runtime.worker.grammar_masks import Constrained, GrammarMasks
from octavo.runtime.worker.logits_processors import ChangedSequence, ChangesCache, change_logits
from octavo.runtime.worker.sampling_ops import GREEDY_BELOW, draw_rows, select_sampling

BAD_LOGITS = "the model's logits for this request are not finite numbers (NaN or infinity): its answer would be noise"
NOTHING_ALLOWED = "no token may be sampled: allowed_token_ids, bad_words, logit_bias and min_tokens exclude all of them"


class Sampler:
    """The driver's. Plans come in the order of their steps, each when its logits are there.

    It runs ahead of the scheduler's `commit`, so what a token depends on beside logits and parameters is here: the
    token sampled last in each slot, which the next step goes on from, the counts that penalties need, and how far
    answers are in their grammars.
    """

    def __init__(
        self, seed: int, device: torch.device, max_num_seqs: int, *, jumps: bool = False, batch_invariant: bool = False
    ) -> None:
        self.last_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self._seed = seed
        self._ops = select_sampling(device, batch_invariant=batch_invariant)
        self._changes = ChangesCache(device)
        self._grammars = GrammarMasks(device, jumps=jumps)
        self._changed: dict[int, tuple[Sequence, ChangedSequence]] = {}  # by slot

    def sample(self, logits: Tensor | Best, plan: StepPlan) -> StepResult:
        """logits [L, vocab] float32, of which L = the plan's wanted rows; they may be overwritten.

        Or their Best, where the step's order wants no more.
        """
        those = _those_that_sample(plan)
        if isinstance(logits, Best):
            result = self._take_best(logits, plan, those)
        else:
            vocab = logits.shape[1]
            constrained = self._grammars.before(those.scheduled, those.rows, vocab)  # beside a GPU's forward pass
            best = best_of(logits)
            num_rows = len(those.rows) + sum(it.num_drafts for it in those.scheduled)
            if num_rows == len(logits) and all(it.sequence.is_plain_greedy for it in those.scheduled):
                result = self._take_best(best, plan, those)
            else:
                result = self._sample_each(logits, plan, best, those, constrained)
        last = {plan.scheduled[place].slot: result.tokens[place][-1] for place in those.places if result.tokens[place]}
        self.last_tokens[list(last)] = list(last.values())
        return result

    def has_ended(self, it: ScheduledSequence) -> bool:
        """Whether the token that was sampled last ended this sequence, which the scheduler learns a step later."""
        if it.sequence.params.constraint is not None and self._grammars.is_over(it):
            return True
        return is_stop(it.sequence.params, int(self.last_tokens[it.slot]), it.num_outputs)

    def _take_best(self, best: Best, plan: StepPlan, those: _Sampling) -> StepResult:
        """As `_sample_each`, where every row of logits is a plainly greedy sequence's."""
        ids: list[int] = best.ids.tolist()
        tokens: list[list[int]] = [[] for _ in plan.scheduled]
        for place, row, it in zip(those.places, those.rows, those.scheduled, strict=True):
            tokens[place] = [ids[row]]
            for draft in _drafts(it):
                row += 1
                if tokens[place][-1] != draft or not np.isfinite(best.logits[row]):
                    break
                tokens[place].append(ids[row])
        return StepResult(tokens, errors=_find_bad(plan, best.logits))

    def _sample_each(
        self, logits: Tensor, plan: StepPlan, best: Best, those: _Sampling, constrained: Constrained
    ) -> StepResult:
        """The step's result: a draw for each sequence, then one for each whose draw was its first draft, and so on."""
        errors = _find_bad(plan, best.logits)
        prompt_logprobs = self._prompt_logprobs(logits, plan, errors)
        brought = _Brought([[] for _ in plan.scheduled])
        self._sample_rows(logits, best, those, constrained, brought)
        while (those := _next_rows(plan, those, brought, best.logits)).places:
            constrained = self._grammars.before(those.scheduled, those.rows, logits.shape[1])
            self._sample_rows(logits, best, those, constrained, brought)
        return StepResult(
            brought.tokens,
            self._listed(brought),
            prompt_logprobs,
            brought.refused | errors,
            ended=frozenset(brought.ended),
            refused=frozenset(brought.refused) - frozenset(errors),
        )

    def _sample_rows(
        self, logits: Tensor, best: Best, those: _Sampling, constrained: Constrained, brought: _Brought
    ) -> None:
        """Draw one token for each sequence, and add what that brings."""
        wanting = [i for i, it in enumerate(those.scheduled) if it.sequence.params.logprobs is not None]
        raw = logits[[those.rows[i] for i in wanting]]  # a copy: _choose changes logits
        chosen, stuck = self._choose(logits, best, those, constrained)
        ends = self._grammars.after(constrained, those.scheduled, chosen, stuck)
        for i, tokens in ends.jumped.items():
            state = self._state(those.scheduled[i], logits.shape[1])
            for token in tokens:
                state.sampled(token)
        failed = dict.fromkeys(stuck, NOTHING_ALLOWED) | ends.errors
        for i, (place, token) in enumerate(zip(those.places, chosen, strict=True)):
            if i in ends.complete:
                brought.ended.add(place)
            if i in failed and i not in ends.without_token:
                brought.fail(place, failed[i])
            if i not in ends.without_token and not (i in failed and brought.tokens[place]):
                brought.tokens[place] += [token, *ends.jumped.get(i, ())]
        if wanting:
            brought.raw.append(raw)
            brought.drawn += [(those.places[i], chosen[i], those.scheduled[i].sequence) for i in wanting]

    def _listed(self, brought: _Brought) -> dict[int, list[Logprobs]]:
        """By place, the log-probabilities of what was drawn, each out of its row of the model's logits."""
        drawn = brought.drawn
        if not drawn:
            return {}
        rows = brought.raw[0] if len(brought.raw) == 1 else torch.cat(brought.raw)
        counts = [sequence.params.logprobs or 0 for *_, sequence in drawn]
        entries = self._logprobs(rows, [token for _, token, _ in drawn], counts)
        listed: dict[int, list[Logprobs]] = {}
        for (place, _, sequence), row, entry in zip(drawn, rows, entries, strict=True):
            named = sequence.params.logprob_token_ids
            whole = _with_tokens([entry], named, row[None])[0] if named else entry
            listed.setdefault(place, []).append(whole)
        return listed

    def _choose(
        self, logits: Tensor, best: Best, those: _Sampling, constrained: Constrained
    ) -> tuple[list[int], list[int]]:
        """The next token of each, and which of them may have none (theirs is a stand-in).

        Where the model's logits are not finite the sequence ends with an error, a step later: its stand-in is a token.
        """
        rows = those.rows
        sampling = those.scheduled
        chosen: list[int] = best.ids[rows].tolist()
        stuck: list[int] = []
        changed = [i for i, it in enumerate(sampling) if it.sequence.params.changes_logits]
        states = [self._state(sampling[i], logits.shape[1]) for i in changed]
        if constrained.mask is not None:
            self._ops.forbid(logits, *constrained.mask)
        if changed:
            at = [rows[i] for i in changed]
            change_logits(logits, at, [sampling[i] for i in changed], states, self._ops)
            found = best_of(logits if len(at) == len(logits) else logits[at])
            for i, token, peak in zip(changed, found.ids.tolist(), found.logits, strict=True):
                chosen[i] = token
                if peak == float("-inf"):
                    stuck.append(i)
        drawable = np.isfinite(best.logits[rows])
        drawable[stuck] = False
        random = [
            i for i in np.flatnonzero(drawable).tolist() if sampling[i].sequence.params.temperature >= GREEDY_BELOW
        ]
        if random:
            drawing = [sampling[i] for i in random]
            drawn = draw_rows(
                self._ops,
                self._seed,
                logits,
                [rows[i] for i in random],
                [it.sequence for it in drawing],
                [it.num_outputs for it in drawing],
            )
            for i, token in zip(random, drawn, strict=True):
                chosen[i] = token
        for i, state in zip(changed, states, strict=True):
            state.sampled(chosen[i])
        return chosen, stuck

    def _state(self, it: ScheduledSequence, vocab: int) -> ChangedSequence:
        """What changes the logits of the sequence in a slot, which may have come there in this step."""
        sequence, state = self._changed.get(it.slot, (None, None))
        if state is None or sequence is not it.sequence:
            state = ChangedSequence(self._changes.get(it.sequence.params, vocab))
            self._changed[it.slot] = (it.sequence, state)
        return state

    def _prompt_logprobs(self, logits: Tensor, plan: StepPlan, errors: dict[int, str]) -> dict[int, list[Logprobs]]:
        """The logits at position p are about prompt token p + 1; the last position's are for sampling."""
        found: dict[int, list[Logprobs]] = {}
        begin = 0
        for place, it in enumerate(plan.scheduled):
            last = min(it.end, it.sequence.num_prompt - 1)
            params = it.sequence.params
            count = params.prompt_logprobs
            if count is not None and last > it.first_logit and place not in errors:
                targets = it.sequence.token_ids[it.first_logit + 1 : last + 1]
                rows = logits[begin : begin + len(targets)]
                found[place] = self._logprobs(rows, targets, [count] * len(targets))
                if params.prompt_logprob_token_ids:
                    found[place] = _with_tokens(found[place], params.prompt_logprob_token_ids, rows)
            begin += it.end - it.first_logit
        return found

    def _logprobs(self, logits: Tensor, chosen: list[int], counts: list[int]) -> list[Logprobs]:
        """For each row: the chosen token's log-probability and rank, and those of the `counts` most likely tokens."""
        if not chosen:
            return []
        most = min(max(counts), logits.shape[1])
        columns = self._ops.logprobs(logits, torch.tensor(chosen, device=logits.device), most)
        return [
            Logprobs(token, logprob, rank, ids[:count], values[:count])
            for token, count, logprob, rank, ids, values in zip(
                chosen, counts, *(column.tolist() for column in columns), strict=True
            )
        ]


def _with_tokens(entries: list[Logprobs], token_ids: tuple[int, ...], logits: Tensor) -> list[Logprobs]:
    """The entries of these rows of logits, with the log-probabilities of these tokens behind the most likely ones."""
    values = logits.log_softmax(-1)[:, torch.tensor(token_ids, device=logits.device)].tolist()
    return [
        msgspec.structs.replace(entry, top_ids=[*entry.top_ids, *token_ids], top_logprobs=[*entry.top_logprobs, *row])
        for entry, row in zip(entries, values, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Sampling:
    """The sequences of a step that get a token: their places in its plan, and their rows of logits.

    scheduled: as the plan has them, but that num_outputs counts the tokens which the step has brought before.
    """

    places: list[int]
    rows: list[int]
    scheduled: list[ScheduledSequence]


@dataclass(slots=True)
class _Brought:
    """What a step has brought so far. tokens: of each of the plan's sequences. The rest is by place in the plan.

    drawn: of sequences that want log-probabilities, in the order of the draws: place, token, and whose it is.
    raw: the model's logits of those before any change, [rows, vocab] of each draw.
    """

    tokens: list[list[int]]
    ended: set[int] = field(default_factory=set)
    refused: dict[int, str] = field(default_factory=dict)
    drawn: list[tuple[int, int, Sequence]] = field(default_factory=list)
    raw: list[Tensor] = field(default_factory=list)

    def fail(self, place: int, error: str) -> None:
        """No token could be drawn. Behind others, the run ends in front of it: the next step says the same."""
        if not self.tokens[place]:
            self.refused[place] = error


def _those_that_sample(plan: StepPlan) -> _Sampling:
    places: list[int] = []
    rows: list[int] = []
    end = 0
    for place, it in enumerate(plan.scheduled):
        end += it.end - it.first_logit
        if it.wants == "token":
            places.append(place)
            rows.append(end - 1 - it.num_drafts)
    return _Sampling(places, rows, [plan.scheduled[place] for place in places])


def _next_rows(plan: StepPlan, those: _Sampling, brought: _Brought, peaks: np.ndarray) -> _Sampling:
    """The sequences all of whose tokens so far are drafts, and their rows of logits behind those."""
    next_ones = _Sampling([], [], [])
    for place, row, it in zip(those.places, those.rows, those.scheduled, strict=True):
        if not it.num_drafts or place in brought.ended or place in brought.refused:
            continue
        tokens = brought.tokens[place]
        num_new = plan.scheduled[place].num_outputs + len(tokens) - it.num_outputs
        if num_new == 0 or tokens != _drafts(it)[: len(tokens)]:  # nothing could be drawn, or no draft, or none is left
            continue
        ends = (is_stop(it.sequence.params, token, it.num_outputs + i) for i, token in enumerate(tokens[-num_new:], 1))
        if not any(ends) and np.isfinite(peaks[row + num_new]):
            next_ones.places.append(place)
            next_ones.rows.append(row + num_new)
            next_ones.scheduled.append(it._replace(num_outputs=it.num_outputs + num_new))
    return next_ones


def _drafts(it: ScheduledSequence) -> list[int]:
    return it.tokens[len(it.tokens) - it.num_drafts :]


def _find_bad(plan: StepPlan, peaks: np.ndarray) -> dict[int, str]:
    """Which sequences have a row without a finite largest logit, those behind drafts left out: they may be wrong."""
    errors: dict[int, str] = {}
    if np.isfinite(peaks).all():
        return errors
    begin = 0
    for place, it in enumerate(plan.scheduled):
        end = begin + it.end - it.first_logit
        if not np.isfinite(peaks[begin : end - it.num_drafts]).all():
            errors[place] = BAD_LOGITS
        begin = end
    return errors
