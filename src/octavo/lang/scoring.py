"""The log-probabilities that `select` asks for: which tokens, behind which others, and what they are for each choice.

One row of a batch is a sequence of tokens, and the tokens that one wants to see behind it. The model computes one step
behind each row; rows share the prompt, which it computes once and takes from its prefix cache. Log-probabilities of a
prompt's own tokens would tell the same, and would need logits of the whole vocabulary for each of them, uncached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from octavo.lang.choices import TokenLogprobs

MAX_NAMED = 128  # tokens that one row can ask for
MAX_ROWS = 1024  # of one request
MAX_TOKENS = 1 << 20

Ids = tuple[int, ...]


@dataclass(slots=True)
class Scores:
    """What is asked, and what came. asked: the tokens to see behind each sequence of tokens, in order."""

    asked: dict[Ids, dict[int, None]] = field(default_factory=dict)
    _found: dict[tuple[Ids, int], tuple[float, str | None]] = field(default_factory=dict)

    def ask(self, before: Sequence[int], tokens: Sequence[int]) -> None:
        """Each of the tokens, behind `before` and those of them that precede it. The first one has to follow some."""
        for place, token in enumerate(tokens):
            key = (*before, *tokens[:place])
            if key:
                self.asked.setdefault(key, {})[token] = None

    def batches(self) -> Iterator[list[tuple[Ids, list[int]]]]:
        """Rows in as few requests as take them."""
        batch: list[tuple[Ids, list[int]]] = []
        total = 0
        for key, wanted in self.asked.items():
            tokens = list(wanted)
            for begin in range(0, len(tokens), MAX_NAMED):
                if batch and (len(batch) == MAX_ROWS or total + len(key) > MAX_TOKENS):
                    yield batch
                    batch = []
                    total = 0
                batch.append((key, tokens[begin : begin + MAX_NAMED]))
                total += len(key)
        yield batch

    def take(self, before: Ids, token: int, logprob: float, text: str | None) -> None:
        """An answer."""
        self._found[before, token] = (logprob, text)

    def of(self, before: Sequence[int], tokens: Sequence[int]) -> TokenLogprobs:
        """The log-probability of each token; None of one that nothing precedes."""
        entries: TokenLogprobs = []
        for place, token in enumerate(tokens):
            key = (*before, *tokens[:place])
            logprob, text = self._found[key, token] if key else (None, None)
            entries.append([logprob, token, text])
        return entries
