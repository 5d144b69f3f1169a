"""What a request may change about the model's logits before a token is chosen, in vLLM's order and meaning.

allowed_token_ids, then bad_words (what would complete one can't come), then min_tokens (nor can stop tokens yet), then
logit_bias, then the penalties: repetition over prompt and output, frequency and presence over the output, and last a
model's own rules. Temperature and truncation come later, in sampling_ops.py.

What a request names is turned into arrays once (`LogitChanges`), whatever the number of its answers and steps.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.runtime.messages import SamplingParams
from octavo.runtime.scheduling.plan import ScheduledSequence
from octavo.runtime.worker.answer_rules import keep_rules
from octavo.runtime.worker.sampling_ops import SamplingOps
from octavo.runtime.worker.token_counts import TokenCounts

_NO_BIASES = (np.empty(0, np.int64), np.empty(0, np.float32))


class LogitChanges:
    """What the parameters of a request say about single tokens, as arrays.

    allowed       None, or the only tokens that may be sampled, on the logits' device
    biases        tokens and what is added to the logit of each
    early_biases  the same before min_tokens: -inf for the tokens that would end the answer
    last_of       bad words of several tokens: what may not follow, by the tokens before it
    """

    def __init__(self, params: SamplingParams, vocab: int, device: torch.device) -> None:
        self._params = params
        self.allowed: Tensor | None = None
        if params.allowed_token_ids is not None:
            self.allowed = torch.tensor(params.allowed_token_ids, device=device)
        never = {word[0]: float("-inf") for word in params.forbidden if len(word) == 1}
        self.biases = _arrays(params.logit_bias | never)
        self.early_biases = self.biases
        if params.min_tokens:
            stops = {token: float("-inf") for token in params.stop_token_ids if token < vocab}
            self.early_biases = _arrays(params.logit_bias | never | stops)
        self.last_of: dict[tuple[int, ...], list[int]] = {}
        for word in params.forbidden:
            if len(word) > 1:
                self.last_of.setdefault(word[:-1], []).append(word[-1])
        self._lengths = {len(before) for before in self.last_of}

    def biases_of(self, num_outputs: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(tokens, biases) for the token that follows so many of the answer."""
        return self.early_biases if num_outputs < self._params.min_tokens else self.biases

    def completing(self, output: Rows[int]) -> set[int]:
        """The tokens that would complete a bad word behind these of the answer."""
        ends = [tuple(output[-length:]) for length in self._lengths if length <= len(output)]
        return {token for end in ends for token in self.last_of.get(end, ())}


def _arrays(biases: dict[int, float]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    if not biases:
        return _NO_BIASES
    return np.fromiter(biases, np.int64, len(biases)), np.fromiter(biases.values(), np.float32, len(biases))


class ChangesCache:
    """The LogitChanges of all live requests; answers to one prompt share them, as they do what it names."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._found: WeakValueDictionary[tuple[int, ...], LogitChanges] = WeakValueDictionary()

    def get(self, params: SamplingParams, vocab: int) -> LogitChanges:
        """They hold on to the parameters, so that an id here is never another object's."""
        named = (params.logit_bias, params.allowed_token_ids, params.stop_token_ids, params.forbidden)
        key = (*map(id, named), params.min_tokens)
        changes = self._found.get(key)
        if changes is None:
            changes = LogitChanges(params, vocab, self._device)
            self._found[key] = changes
        return changes


@dataclass(slots=True)
class ChangedSequence:
    """A sequence whose logits are changed: the changes, and its tokens so far if something depends on them.

    counts: of prompt and answer, for penalties. output: the answer's tokens, for bad words and rules.
    """

    changes: LogitChanges
    counts: TokenCounts | None = None
    output: list[int] | None = None

    def sampled(self, token: int) -> None:
        """The next token is there, which the scheduler will learn of."""
        if self.counts is not None:
            self.counts.extend([token])
        if self.output is not None:
            self.output.append(token)


def change_logits(
    logits: Tensor,
    rows: Rows[int],
    scheduled: Rows[ScheduledSequence],
    states: Rows[ChangedSequence],
    ops: SamplingOps,
) -> None:
    """Change logits [L, vocab] in place: row rows[i] is the next token of scheduled[i], whose state is states[i]."""
    _keep_allowed(logits, rows, states)
    biases = [state.changes.biases_of(it.num_outputs) for it, state in zip(scheduled, states, strict=True)]
    sizes = [len(tokens) for tokens, _ in biases]
    if any(sizes):
        entries = (
            np.repeat(np.array(rows, np.int64), sizes),
            np.concatenate([tokens for tokens, _ in biases]),
            np.concatenate([values for _, values in biases]),
        )
        ops.add_biases(logits, *(torch.from_numpy(column).to(logits.device) for column in entries))
    _forbid_bad_words(logits, rows, scheduled, states, ops)
    punished = [
        (row, it, state)
        for row, it, state in zip(rows, scheduled, states, strict=True)
        if it.sequence.params.has_penalties
    ]
    if punished:
        _punish(logits, punished, ops)
    for row, it, state in zip(rows, scheduled, states, strict=True):
        if (rules := it.sequence.params.rules) is not None:
            keep_rules(logits[row], _output(it, state), rules, it.sequence.params.max_tokens)


def _keep_allowed(logits: Tensor, rows: Rows[int], states: Rows[ChangedSequence]) -> None:
    """Set all but the allowed tokens to -inf; rows that allow the same ones go together."""
    rows_of: dict[int, list[int]] = {}
    allowed_of: dict[int, Tensor] = {}
    for row, state in zip(rows, states, strict=True):
        allowed = state.changes.allowed
        if allowed is not None:
            rows_of.setdefault(id(allowed), []).append(row)
            allowed_of[id(allowed)] = allowed
    for key, same in rows_of.items():
        row_index = torch.tensor(same, device=logits.device)
        places = (row_index.unsqueeze(1), allowed_of[key].unsqueeze(0))
        kept = logits[places]
        logits.index_fill_(0, row_index, float("-inf"))
        logits[places] = kept


def _forbid_bad_words(
    logits: Tensor,
    rows: Rows[int],
    scheduled: Rows[ScheduledSequence],
    states: Rows[ChangedSequence],
    ops: SamplingOps,
) -> None:
    """Set what would complete a bad word of several tokens to -inf; those of one token are among the biases."""
    found = [
        (row, token)
        for row, it, state in zip(rows, scheduled, states, strict=True)
        if state.changes.last_of
        for token in state.changes.completing(_output(it, state))
    ]
    if found:
        at_rows, tokens = torch.tensor(found, device=logits.device).T.contiguous().unbind()
        ops.add_biases(logits, at_rows, tokens, torch.full((len(found),), float("-inf"), device=logits.device))


def _output(it: ScheduledSequence, state: ChangedSequence) -> list[int]:
    """The answer before the token that is sampled now; see _counts."""
    if state.output is None or len(state.output) != it.num_outputs:
        begin = it.sequence.num_prompt
        state.output = list(it.sequence.token_ids[begin : begin + it.num_outputs])
    return state.output


def _punish(logits: Tensor, punished: Rows[tuple[int, ScheduledSequence, ChangedSequence]], ops: SamplingOps) -> None:
    """Apply the penalties of all rows at once to the tokens that have occurred; the others have none."""
    tokens = []
    counts = []
    sizes = []
    penalties = np.zeros((3, len(logits)), dtype=np.float32)
    for row, it, state in punished:
        counted = _counts(it, state)
        tokens.append(counted.token_ids)
        counts.append(counted.output_counts)
        sizes.append(len(tokens[-1]))
        params = it.sequence.params
        penalties[:, row] = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
    rows = np.array([row for row, _, _ in punished]).repeat(sizes)
    entries = np.stack((rows, np.concatenate(tokens), np.concatenate(counts)))
    of_entry, of_row = (torch.from_numpy(array).to(logits.device) for array in (entries, penalties))
    ops.punish(logits, *of_entry.unbind(), *of_row.unbind())


def _counts(it: ScheduledSequence, state: ChangedSequence) -> TokenCounts:
    """Counts of all tokens before the one that is sampled now.

    The sampler adds each token that it samples. Where that does not lead to here (the sequence is new in its slot, or
    a token was taken back), all of them are known to the sequence.
    """
    length = it.sequence.num_prompt + it.num_outputs
    if state.counts is None or state.counts.num_counted != length:
        state.counts = TokenCounts(it.sequence.num_prompt)
        state.counts.extend(it.sequence.token_ids[:length])
    return state.counts
