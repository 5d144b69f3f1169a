"""From logits to tokens: the next token of each sequence, and the log-probabilities that requests ask for.

Log-probabilities are those of the model itself, before any change to the logits (vLLM's `raw_logprobs`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from octavo.runtime.messages import Logprobs
from octavo.runtime.scheduling.scheduler import Sampled, StepPlan
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.worker.logits_processors import change_logits
from octavo.runtime.worker.sampling_ops import GREEDY_BELOW, select_sampling, uniform

BAD_LOGITS = "the model's logits for this request are not finite numbers (NaN or infinity): its answer would be noise"
NOTHING_ALLOWED = "no token may be sampled: allowed_token_ids, logit_bias and min_tokens together exclude all of them"


class Sampler:
    """Holds no state of a request: what a token depends on besides its logits is in the sequence."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._ops = select_sampling(device)

    def sample(self, logits: Tensor, plan: StepPlan) -> Sampled:
        """logits [L, vocab] float32, of which L = the plan's wanted rows; they may be overwritten."""
        best, peaks = _argmax(logits)
        rows: list[int] = []  # the row of each work that samples
        end = 0
        for work in plan.works:
            end += work.end - work.first_logit
            if work.samples:
                rows.append(end - 1)
        errors = {} if np.isfinite(peaks).all() else _find_bad(plan, peaks)
        sequences = [work.sequence for work in plan.works if work.samples]
        if all(sequence.is_plain_greedy for sequence in sequences) and end == len(rows):
            return Sampled(best.tolist(), errors=errors)
        sampling = [index for index, work in enumerate(plan.works) if work.samples]
        wanting = [place for place, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
        raw = logits[[rows[place] for place in wanting]]  # a copy: _choose changes logits
        prompt_logprobs = self._prompt_logprobs(logits, plan, errors)
        token_ids, stuck = self._choose(logits, best, rows, sequences)
        counts = [sequences[place].params.logprobs or 0 for place in wanting]
        found = self._logprobs(raw, [token_ids[place] for place in wanting], counts)
        logprobs = dict(zip([sampling[place] for place in wanting], found, strict=True))
        errors = {sampling[place]: NOTHING_ALLOWED for place in stuck} | errors
        return Sampled(token_ids, logprobs, prompt_logprobs, errors)

    def _choose(
        self, logits: Tensor, best: np.ndarray, rows: list[int], sequences: list[Sequence]
    ) -> tuple[list[int], list[int]]:
        """The next token of each sequence, and the places of sequences that may have none (theirs is a stand-in)."""
        token_ids: list[int] = best[rows].tolist()
        stuck: list[int] = []
        changed = [i for i, sequence in enumerate(sequences) if sequence.params.changes_logits]
        if changed:
            change_logits(logits, [rows[i] for i in changed], [sequences[i] for i in changed], self._ops)
            best, peaks = _argmax(logits)
            for i in changed:
                token_ids[i] = int(best[rows[i]])
                if peaks[rows[i]] == float("-inf"):
                    stuck.append(i)
        random = [
            i for i, sequence in enumerate(sequences) if sequence.params.temperature >= GREEDY_BELOW and i not in stuck
        ]
        if random:
            drawn = self._draw(logits, [rows[i] for i in random], [sequences[i] for i in random])
            for i, token in zip(random, drawn, strict=True):
                token_ids[i] = token
        return token_ids, stuck

    def _draw(self, logits: Tensor, rows: list[int], sequences: list[Sequence]) -> list[int]:
        params = [sequence.params for sequence in sequences]
        columns = zip(*((p.temperature, p.top_p, p.min_p) for p in params), strict=True)
        floats = torch.tensor(tuple(columns), dtype=torch.float32, device=logits.device)
        temperature, top_p, min_p = floats  # rows of it: a kernel reads each as lying side by side
        top_k = torch.tensor([p.top_k for p in params], device=logits.device)
        uniforms = [uniform(self._key(sequence), sequence.num_outputs) for sequence in sequences]
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
        for index, work in enumerate(plan.works):
            sequence = work.sequence
            last = min(work.end, work.sequence.num_prompt - 1)
            if sequence.wants_prompt_logprobs and last > work.first_logit and index not in errors:
                targets = sequence.token_ids[work.first_logit + 1 : last + 1]
                count = sequence.params.prompt_logprobs or 0
                found[index] = self._logprobs(logits[begin : begin + len(targets)], targets, [count] * len(targets))
            begin += work.end - work.first_logit
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


def _argmax(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The best token of each row and its logit; a row with a NaN has NaN. numpy's takes a fifth of torch's time."""
    if logits.device.type == "cpu":
        array = logits.numpy()
        best = array.argmax(axis=-1)
        return best, array[np.arange(len(array)), best]
    values, indices = logits.max(dim=-1)
    return indices.cpu().numpy(), values.cpu().numpy()


def _find_bad(plan: StepPlan, peaks: np.ndarray) -> dict[int, str]:
    """Which works have a row without a finite largest logit."""
    errors: dict[int, str] = {}
    begin = 0
    for index, work in enumerate(plan.works):
        end = begin + work.end - work.first_logit
        if not np.isfinite(peaks[begin:end]).all():
            errors[index] = BAD_LOGITS
        begin = end
    return errors
