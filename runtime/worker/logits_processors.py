"""What a request may change about the model's logits before a token is chosen, in vLLM's order and meaning.

allowed_token_ids, then min_tokens (stop tokens can't come yet), then logit_bias, then the penalties: repetition over
prompt and output, frequency and presence over the output. Temperature and truncation come later, in draw.py.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from octavo.runtime.scheduling.penalties import TokenCounts
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.worker.sampling_ops import SamplingOps


def change_logits(logits: Tensor, rows: Rows[int], sequences: Rows[Sequence], ops: SamplingOps) -> None:
    """Change logits [L, vocab] in place: row rows[i] is the next token of sequences[i]."""
    for row, sequence in zip(rows, sequences, strict=True):
        if sequence.params.allowed_token_ids is not None:
            _keep_only(logits[row], sequence.params.allowed_token_ids)
    biased = [(row, _biases(sequence, logits.shape[1])) for row, sequence in zip(rows, sequences, strict=True)]
    entries = [(row, token, bias) for row, biases in biased for token, bias in biases.items()]
    if entries:
        at_rows, tokens, biases = (torch.tensor(column, device=logits.device) for column in zip(*entries, strict=True))
        ops.add_biases(logits, at_rows, tokens, biases)
    punished = [(row, sequence) for row, sequence in zip(rows, sequences, strict=True) if sequence.params.has_penalties]
    if punished:
        _punish(logits, punished, ops)


def _keep_only(row: Tensor, token_ids: Rows[int]) -> None:
    index = torch.tensor(token_ids, device=row.device)
    kept = row[index]
    row.fill_(float("-inf"))
    row[index] = kept


def _biases(sequence: Sequence, vocab: int) -> dict[int, float]:
    """What is added to which token; -inf to those that would end the answer too early."""
    params = sequence.params
    biases = dict(params.logit_bias or {})
    if sequence.num_outputs < params.min_tokens:
        biases |= {token: float("-inf") for token in params.stop_token_ids if token < vocab}
    return biases


def _punish(logits: Tensor, punished: Rows[tuple[int, Sequence]], ops: SamplingOps) -> None:
    """All rows at once, over the tokens that have occurred: the others have nothing to be punished for."""
    tokens = []
    counts = []
    sizes = []
    penalties = np.zeros((3, len(logits)), dtype=np.float32)
    for row, sequence in punished:
        if sequence.token_counts is None:
            sequence.token_counts = TokenCounts(sequence.num_prompt)
        sequence.token_counts.catch_up(sequence.token_ids)
        tokens.append(sequence.token_counts.token_ids)
        counts.append(sequence.token_counts.output_counts)
        sizes.append(len(tokens[-1]))
        params = sequence.params
        penalties[:, row] = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
    rows = np.array([row for row, _ in punished]).repeat(sizes)
    entries = np.stack((rows, np.concatenate(tokens), np.concatenate(counts)))
    of_entry, of_row = (torch.from_numpy(array).to(logits.device) for array in (entries, penalties))
    ops.punish(logits, *of_entry.unbind(), *of_row.unbind())
