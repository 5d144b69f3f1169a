"""From a draft model's or a head's logits to drafts: each with the number that the token itself will be drawn with."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.sampling.best import best_of
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.worker.sampling_ops import GREEDY_BELOW, draw_rows, select_sampling


class DraftChoice:
    """Chooses as the model that is served will: greedily, or by the same uniform numbers.

    So of distributions that nearly agree nearly all drafts are right, at any temperature.
    """

    def __init__(self, vocab_size: int, seed: int, device: torch.device, token_ids: Tensor | None = None) -> None:
        """vocab_size: of the model that is served. seed: the engine's.

        token_ids: [draft vocabulary] int64, the token that each column of logits is about; None: that of its number.
        """
        self._vocab_size = vocab_size
        self._seed = seed
        self._token_ids = token_ids
        self._ops = select_sampling(device)

    def choose(self, logits: Tensor, batch: Rows[Sequence], place: int) -> list[int]:
        """The draft of each sequence behind `place` others. logits: [S, V] float32, of the draft vocabulary.

        Of logits that are no finite numbers it is the first token: any is as good, and none must be out of range.
        """
        ids = self._token_ids
        if ids is None:
            logits = logits[:, : self._vocab_size].contiguous()
        best = best_of(logits)
        are_finite = np.isfinite(best.logits)
        columns = torch.from_numpy(np.where(are_finite, best.ids, 0).astype(np.int64))
        chosen: list[int] = (columns if ids is None else ids[columns]).tolist()
        rows = [row for row, it in enumerate(batch) if it.params.temperature >= GREEDY_BELOW and are_finite[row]]
        if rows:
            drawing = [batch[row] for row in rows]
            positions = [len(sequence.token_ids) - sequence.num_prompt + place for sequence in drawing]
            drawn = draw_rows(self._ops, self._seed, self._over_vocabulary(logits), rows, drawing, positions)
            for row, token in zip(rows, drawn, strict=True):
                chosen[row] = token
        return chosen

    def _over_vocabulary(self, logits: Tensor) -> Tensor:
        """[S, vocab_size], where a number is drawn for a token by its place; -inf of what is in no draft vocabulary."""
        if self._token_ids is None:
            return logits
        spread = logits.new_full((len(logits), self._vocab_size), float("-inf"))
        spread[:, self._token_ids] = logits
        return spread
