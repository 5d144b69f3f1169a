"""What a request may change about the model's logits before a token is chosen, in vLLM's order and meaning.

allowed_token_ids, then min_tokens (stop tokens can't come yet), then logit_bias, then the penalties: repetition over
prompt and output, frequency and presence over the output. Temperature and truncation come later, in draw.py.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from octavo.runtime.penalties import TokenCounts
from octavo.runtime.sequence import Sequence


def change_logits(logits: Tensor, rows: Rows[int], sequences: Rows[Sequence]) -> None:
    """Change logits [L, vocab] in place: row rows[i] is the next token of sequences[i]."""
    for row, sequence in zip(rows, sequences, strict=True):
        params = sequence.params
        if params.allowed_token_ids is not None:
            _keep_only(logits[row], params.allowed_token_ids)
        if sequence.num_outputs < params.min_tokens:
            logits[row, [token for token in params.stop_token_ids if token < logits.shape[1]]] = float("-inf")
        if params.logit_bias:
            bias = torch.tensor(list(params.logit_bias.values()), device=logits.device)
            logits[row, list(params.logit_bias)] += bias
    punished = [(row, sequence) for row, sequence in zip(rows, sequences, strict=True) if sequence.params.has_penalties]
    if punished:
        _apply_penalties(logits, punished)


def _keep_only(row: Tensor, token_ids: Rows[int]) -> None:
    index = torch.tensor(token_ids, device=row.device)
    kept = row[index]
    row.fill_(float("-inf"))
    row[index] = kept


def _apply_penalties(logits: Tensor, punished: Rows[tuple[int, Sequence]]) -> None:
    """All rows at once, over the tokens that have occurred: the others have nothing to be punished for."""
    flat_index, counts, sizes = [], [], []
    for row, sequence in punished:
        if sequence.token_counts is None:
            sequence.token_counts = TokenCounts(sequence.num_prompt)
        sequence.token_counts.catch_up(sequence.token_ids)
        flat_index.append(sequence.token_counts.token_ids + row * logits.shape[1])
        counts.append(sequence.token_counts.output_counts)
        sizes.append(len(counts[-1]))
    params = [sequence.params for _, sequence in punished]
    of_token = np.array(
        [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params], dtype=np.float32
    ).repeat(sizes, axis=0)
    repetition, frequency, presence = torch.from_numpy(of_token).to(logits.device).unbind(dim=1)
    index = torch.from_numpy(np.concatenate(flat_index)).to(logits.device)
    count = torch.from_numpy(np.concatenate(counts)).to(logits.device)
    flat = logits.view(-1)
    values = flat[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    flat[index] = values - frequency * count - presence * (count > 0)
