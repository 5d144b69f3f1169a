"""How often each token has occurred in one sequence, kept so that a step costs what the step added."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """The distinct tokens of a prompt and its output, and how often each stands in the output.

    Sparse, since a dense count per request is vocab_size integers; grows with the sequence and never shrinks.
    """

    def __init__(self, num_prompt: int) -> None:
        self._num_prompt = num_prompt
        self.num_counted = 0
        self._index: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.empty(64, dtype=np.int64)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Count the next tokens of the sequence."""
        for position, token in enumerate(token_ids, start=self.num_counted):
            index = self._index.get(token)
            if index is None:
                index = self._append(token)
            if position >= self._num_prompt:
                self._counts[index] += 1
        self.num_counted += len(token_ids)

    def _append(self, token: int) -> int:
        index = len(self._index)
        if index == len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.empty_like(self._counts)))
        self._index[token] = index
        self._ids[index] = token
        self._counts[index] = 0
        return index

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The distinct tokens of prompt and output."""
        return self._ids[: len(self._index)]

    @property
    def output_counts(self) -> NDArray[np.int64]:
        """How often each of `token_ids` stands in the output; 0 for a token of the prompt alone."""
        return self._counts[: len(self._index)]
