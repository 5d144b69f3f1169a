"""From logits to tokens: the next token of each sequence, and the log-probabilities that requests ask for.

Log-probabilities are those of the model itself, before any change to the logits (vLLM's `raw_logprobs`).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass

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
from octavo.runtime.worker.sampling_ops import GREEDY_BELOW, select_sampling, uniform

BAD_LOGITS = "the model's logits for this request are not finite numbers (NaN or infinity): its answer would be noise"
NONE_JUMPED: Mapping[int, list[int]] = {}
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
            chosen, result = self._take_best(logits, plan, those)
        else:
            vocab = logits.shape[1]
            constrained = self._grammars.before(those.scheduled, those.rows, vocab)  # beside a GPU's forward pass
            best = best_of(logits)
            if len(those.rows) == len(logits) and all(it.sequence.is_plain_greedy for it in those.scheduled):
                chosen, result = self._take_best(best, plan, those)
            else:
                errors = _find_bad(plan, best.logits)
                chosen, result = self._sample_each(logits, plan, best.ids, those, constrained, errors)
        self.last_tokens[[it.slot for it in those.scheduled]] = chosen
        return result

    def has_ended(self, it: ScheduledSequence) -> bool:
        """Whether the token that was sampled last ended this sequence, which the scheduler learns a step later."""
        if it.sequence.params.constraint is not None and self._grammars.is_over(it):
            return True
        return is_stop(it.sequence.params, int(self.last_tokens[it.slot]), it.num_outputs)

    def _take_best(self, best: Best, plan: StepPlan, those: _Sampling) -> tuple[list[int], StepResult]:
        """As `_sample_each`, where every row of logits is a plainly greedy sequence's."""
        chosen: list[int] = best.ids.tolist()
        return chosen, StepResult(those.tokens(plan, chosen), errors=_find_bad(plan, best.logits))

    def _sample_each(
        self,
        logits: Tensor,
        plan: StepPlan,
        best: np.ndarray,
        those: _Sampling,
        constrained: Constrained,
        errors: dict[int, str],
    ) -> tuple[list[int], StepResult]:
        """(the tokens of those that sample, the step's result)."""
        wanting = [i for i, it in enumerate(those.scheduled) if it.sequence.params.logprobs is not None]
        raw = logits[[those.rows[i] for i in wanting]]  # a copy: _choose changes logits
        prompt_logprobs = self._prompt_logprobs(logits, plan, errors)
        chosen, stuck = self._choose(logits, best, those, constrained)
        ends = self._grammars.after(constrained, those.scheduled, chosen, stuck)
        for i, tokens in ends.jumped.items():
            state = self._state(those.scheduled[i], logits.shape[1])
            for token in tokens:
                state.sampled(token)
        counts = [those.scheduled[i].sequence.params.logprobs or 0 for i in wanting]
        found = self._logprobs(raw, [chosen[i] for i in wanting], counts)
        named = [those.scheduled[i].sequence.params.logprob_token_ids for i in wanting]
        found = [
            entry if not ids else _with_tokens([entry], ids, row[None])[0]
            for entry, ids, row in zip(found, named, raw, strict=True)
        ]
        places = those.places
        logprobs = {places[i]: [entry] for i, entry in zip(wanting, found, strict=True)}
        failed = dict.fromkeys(stuck, NOTHING_ALLOWED) | ends.errors
        refused = {places[i]: text for i, text in failed.items() if i not in ends.without_token}
        result = StepResult(
            those.tokens(plan, chosen, ends.without_token, ends.jumped),
            logprobs,
            prompt_logprobs,
            refused | errors,
            ended=frozenset(places[i] for i in ends.complete),
            refused=frozenset(refused) - frozenset(errors),
        )
        return chosen, result

    def _choose(
        self, logits: Tensor, best: np.ndarray, those: _Sampling, constrained: Constrained
    ) -> tuple[list[int], list[int]]:
        """The next token of each, and which of them may have none (theirs is a stand-in)."""
        rows = those.rows
        sampling = those.scheduled
        chosen: list[int] = best[rows].tolist()
        stuck: list[int] = []
        changed = [i for i, it in enumerate(sampling) if it.sequence.params.changes_logits]
        states = [self._state(sampling[i], logits.shape[1]) for i in changed]
        if constrained.mask is not None:
            self._ops.forbid(logits, *constrained.mask)
        if changed:
            change_logits(logits, [rows[i] for i in changed], [sampling[i] for i in changed], states, self._ops)
            found = best_of(logits)
            for i in changed:
                chosen[i] = int(found.ids[rows[i]])
                if found.logits[rows[i]] == float("-inf"):
                    stuck.append(i)
        random = [
            i for i, it in enumerate(sampling) if it.sequence.params.temperature >= GREEDY_BELOW and i not in stuck
        ]
        if random:
            drawn = self._draw(logits, [rows[i] for i in random], [sampling[i] for i in random])
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

    def _draw(self, logits: Tensor, rows: list[int], drawing: list[ScheduledSequence]) -> list[int]:
        params = [it.sequence.params for it in drawing]
        columns = zip(*((p.temperature, p.top_p, p.min_p) for p in params), strict=True)
        floats = torch.tensor(tuple(columns), dtype=torch.float32, device=logits.device)
        temperature, top_p, min_p = floats  # rows of it: a kernel reads each as lying side by side
        top_k = torch.tensor([p.top_k for p in params], device=logits.device)
        uniforms = [uniform(self._key(it.sequence), it.num_outputs) for it in drawing]
        uniforms_of = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
        chosen = logits if len(rows) == logits.shape[0] else logits[rows]
        tokens: list[int] = self._ops.draw(chosen, temperature, top_k, top_p, min_p, uniforms_of).tolist()
        return tokens

    def _key(self, sequence: Sequence) -> str:
        """A request's own seed, or one for each request that came without."""
        seed = sequence.params.seed
        return f"seed {seed}" if seed is not None else f"engine {self._seed} request {sequence.number}"

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
    """The sequences of a step that get a token: their places in its plan, and their rows of logits."""

    places: list[int]
    rows: list[int]
    scheduled: list[ScheduledSequence]

    def tokens(
        self,
        plan: StepPlan,
        chosen: Rows[int],
        without: Container[int] = (),
        jumped: Mapping[int, list[int]] = NONE_JUMPED,
    ) -> list[list[int]]:
        """For each of the plan's sequences its token, in a list, with those that follow; none for those `without`."""
        tokens: list[list[int]] = [[] for _ in plan.scheduled]
        for i, (place, token) in enumerate(zip(self.places, chosen, strict=True)):
            if i not in without:
                tokens[place] += [token, *jumped.get(i, ())]
        return tokens


def _those_that_sample(plan: StepPlan) -> _Sampling:
    places: list[int] = []
    rows: list[int] = []
    end = 0
    for place, it in enumerate(plan.scheduled):
        end += it.end - it.first_logit
        if it.wants == "token":
            if it.num_drafts:
                raise ValueError("a plan has drafts, and this sampler checks none: it chooses one token a sequence")
            places.append(place)
            rows.append(end - 1)
    return _Sampling(places, rows, [plan.scheduled[place] for place in places])


def _find_bad(plan: StepPlan, peaks: np.ndarray) -> dict[int, str]:
    """Which sequences have a row without a finite largest logit."""
    errors: dict[int, str] = {}
    if np.isfinite(peaks).all():
        return errors
    begin = 0
    for place, it in enumerate(plan.scheduled):
        end = begin + it.end - it.first_logit
        if not np.isfinite(peaks[begin:end]).all():
            errors[place] = BAD_LOGITS
        begin = end
    return errors
