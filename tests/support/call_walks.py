"""Random answers under a grammar of calls, over a vocabulary of single bytes and the marks of a format's tokens."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from octavo.runtime.constraint import Grammar
from octavo.runtime.following import Masks, Progress
from octavo.runtime.messages import Constraint
from octavo.server.message.grammars import LIMITS

END = 256
FIRST_SPECIAL = 257
CLOSING = b'"}],:<>/'

CALL_SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "minLength": 1, "maxLength": 6},
            "unit": {"type": "string", "enum": ["c", "f"]},
            "days": {"type": "integer", "minimum": 0, "maximum": 20},
            "on": {"type": ["boolean", "null"]},
            "either": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "integer"}]},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "get": {
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "maxItems": 2},
            "free": {"type": "string", "maxLength": 5},
        },
        "additionalProperties": False,
        "$defs": {
            "item": {
                "type": "object",
                "properties": {"n": {"type": "number"}, "s": {"type": "string", "maxLength": 4}},
                "required": ["n"],
                "additionalProperties": False,
            }
        },
    },
    "none": {"type": "object", "properties": {}, "additionalProperties": False},
}


class Walker:
    """Walks through constrained answers. special: the ids of the tokens that have no bytes, by their marks."""

    def __init__(self, marks: Mapping[str, int]) -> None:
        self._marks = {token_id: mark for mark, token_id in marks.items()}
        size = max(marks.values(), default=END) + 1

        class Vocabulary:
            eos_token_id = END
            bos_token_id = None
            tokens = [*(bytes([value]) for value in range(256)), *(b"<%d>" % number for number in range(256, size))]  # noqa: RUF012
            special_token_ids = list(range(256, size))  # noqa: RUF012

            def __call__(self, text: str | bytes) -> list[int]:
                return list(text if isinstance(text, bytes) else text.encode())

        self.tokens = Vocabulary.tokens
        self._tokenizer = LLTokenizer(TokenizerWrapper(Vocabulary()), slices=[])
        self._size = size
        self._masks = Masks(size)
        self._compiled: dict[str, LLMatcher] = {}

    def start(self, constraint: Constraint, begun: str = "") -> Progress:
        if constraint.grammar not in self._compiled:
            matcher = LLMatcher(self._tokenizer, constraint.grammar, limits=LIMITS, log_level=0)
            assert not matcher.is_error(), matcher.get_error()
            self._compiled[constraint.grammar] = matcher
        grammar = Grammar(self._compiled[constraint.grammar], [END], self.tokens)
        return Progress(constraint, grammar, self.ids(begun))

    def allowed(self, progress: Progress) -> list[int]:
        """The tokens that may come next."""
        bits = self._masks.fill([progress])
        progress.allow_ends(bits[0], [END])
        is_allowed = np.unpackbits(bits[0].view(np.uint8), count=self._size, bitorder="little")
        allowed: list[int] = is_allowed.nonzero()[0].tolist()
        return allowed

    def ids(self, text: str) -> list[int]:
        """A text, with marks in it, as tokens."""
        of_mark = {mark: token_id for token_id, mark in self._marks.items()}
        return [token_id for c in text for token_id in ([of_mark[c]] if c in of_mark else c.encode())]

    def walk(
        self, constraint: Constraint, seed: int, begun: str = "", limit: int = 1500, likely: bytes = CLOSING
    ) -> str | None:
        """A random answer from `begun` on, free where the grammar sleeps: there it ends. None: it gets too long.

        likely: characters of which one is taken rather than others.
        """
        choose = random.Random(seed)
        progress = self.start(constraint, begun)
        answer = self.ids(begun)
        assert progress.holds, "the grammar sleeps"
        while progress.holds and len(answer) < limit:
            allowed = self.allowed(progress)
            assert allowed, f"nothing is allowed behind {self.text(answer)!r}"
            if END in allowed and (len(allowed) == 1 or choose.random() < 0.5):
                return self.text(answer)
            good = [t for t in allowed if t > END or (t < 256 and t in likely)]
            token = choose.choice(good if good and choose.random() < 0.6 else [t for t in allowed if t != END])
            progress.accept(token)
            assert not progress.error, (progress.error, self.text(answer))
            answer.append(token)
        return None if progress.holds else self.text(answer)

    def text(self, token_ids: list[int]) -> str:
        """The text of these tokens, with marks in it."""
        out = bytearray()
        for token_id in token_ids:
            out += (
                self._marks[token_id].encode("utf-8", "surrogatepass")
                if token_id in self._marks
                else self.tokens[token_id]
            )
        return out.decode("utf-8", "surrogatepass")
