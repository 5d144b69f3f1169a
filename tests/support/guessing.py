"""Drafters that know the answers: always right, always wrong, or as many and right as far as chance has it."""

from __future__ import annotations

import random
from typing import Literal

from octavo.runtime.speculation.speculation import Speculation

Style = Literal["right", "wrong", "mixed"]


class Guessing:
    """texts: what each request's prompt and answer will be; of others nothing is guessed."""

    def __init__(self, texts: dict[str, list[int]], style: Style, vocab: int) -> None:
        self.texts = texts
        self.style = style
        self.vocab = vocab
        self.rng = random.Random(1)

    def speculation(self, most: int) -> Speculation:
        """All guesses are checked."""
        return Speculation(lambda sequence: _Text(self, self.texts.get(sequence.request_id, []), most), most)

    def guess(self, text: list[int], num_read: int, count: int) -> list[int]:
        if not text:
            return []
        tokens = text[num_read : num_read + count]
        tokens += [self.rng.randrange(self.vocab) for _ in range(count - len(tokens))]
        if self.style == "mixed":
            tokens = tokens[: self.rng.randrange(1, count + 1)]
        num_right = {"right": count, "wrong": 0, "mixed": self.rng.randrange(count + 1)}[self.style]
        return [token if i < num_right else (token + 1) % self.vocab for i, token in enumerate(tokens)]


class _Text:
    kind = 1

    def __init__(self, guessing: Guessing, text: list[int], most: int) -> None:
        self.guessing = guessing
        self.text = text
        self.most = most
        self.num_read = 0

    def read(self, new: list[int]) -> None:
        self.num_read += len(new)

    def drafts(self) -> list[int]:
        return self.guessing.guess(self.text, self.num_read, self.most)

    def end(self) -> None:
        pass
