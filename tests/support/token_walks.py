"""Random answers to requests under their masks, over a real tokenizer: the tiny model's, with a model's markers added.

All of the server's way is walked, from the request's fields to the constraint; the engine's part is Progress and Masks.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from spoken import model
from templates import FIXTURES
from tokenizers import Tokenizer as Backend

from octavo.runtime.constraint import Grammar, compiled, ll_tokenizer
from octavo.runtime.following import Masks, Progress
from octavo.runtime.messages import Constraint
from octavo.server.dialects.chat_request import ChatCompletionRequest
from octavo.server.dialects.tools import reading_of
from octavo.server.message.infer import Inference
from octavo.server.message.model_formats import ModelFormats
from octavo.server.message.parse import Machine
from octavo.server.message.parts import Part, append_parts
from octavo.server.reading import Reading, constrained
from octavo.server.served_model import ServedModel, vocabulary_of
from octavo.text.detokenizer import MarkingDecoder
from octavo.text.tokenizer import Tokenizer

MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_ ]+\]")
CLOSING = set('"}])>,:/`*') | {"\n"}
LIMIT = 400


@dataclass(frozen=True)
class Answer:
    """One answer: its text with marks, what was read of it whole and by character, and the calls that were none."""

    text: str
    whole: list[Part]
    by_character: list[Part]
    num_malformed: int


class TokenWalker:
    """Walks for one model. has_tokens: its markers are special tokens of the tokenizer, or text."""

    def __init__(self, found: Inference, *, has_tokens: bool) -> None:
        backend = Backend.from_file(str(FIXTURES / "tiny" / "tokenizer.json"))
        if has_tokens:
            texts = found.tools.markers() if found.tools is not None else []
            if found.reasoning is not None:
                texts += [found.reasoning.begin, found.reasoning.end]
            backend.add_special_tokens(sorted(set(MARKER.findall("".join(texts)))))
        self.tokenizer = Tokenizer(backend, {})
        special = {self.tokenizer.token_name(token_id): token_id for token_id in self.tokenizer.special_ids}
        self._found = found
        self._formats = ModelFormats.bound(found, special)
        self._end = special["<|endoftext|>"]
        self._masks = Masks(self.tokenizer.num_tokens)

    @cached_property
    def _model(self) -> ServedModel:
        return dataclasses.replace(model(self._found), tokenizer=self.tokenizer, formats=self._formats)

    @cached_property
    def _vocabulary(self) -> Any:
        return vocabulary_of(self.tokenizer, [self._end])

    @cached_property
    def _ll_tokenizer(self) -> Any:
        return ll_tokenizer(self._vocabulary, self.tokenizer.num_tokens)

    @cached_property
    def _closes(self) -> Any:
        tokens = self._vocabulary.tokens
        return np.array([bool(CLOSING & set(token.decode(errors="replace"))) for token in tokens])

    def asked(self, body: ChatCompletionRequest, prompt: str) -> tuple[Constraint, Reading]:
        """What the engine is told, and how the answer is read."""
        reading = reading_of(prompt, body, body.messages, self._model)
        constraint, reading = constrained(body, self._model, reading)
        assert constraint is not None
        assert reading is not None
        return constraint, reading

    def answer(
        self, constraint: Constraint, reading: Reading, seed: int, begun: str = "", limit: int = LIMIT
    ) -> Answer | None:
        """A random answer from `begun` on. None: it gets too long."""
        ids = self._walk(constraint, random.Random(seed), self.tokenizer.encode(begun), limit)
        if ids is None:
            return None
        decoder = MarkingDecoder(self.tokenizer, marks=reading.formats.marks)
        text = decoder.push(ids) + decoder.finish()
        whole, num_malformed = self._read(reading, text, len(text) + 1)
        by_character, _ = self._read(reading, text, 1)
        return Answer(text, whole, by_character, num_malformed)

    def _walk(
        self, constraint: Constraint, choose: random.Random, begun: Sequence[int], limit: int
    ) -> list[int] | None:
        grammar: Grammar = compiled(self._ll_tokenizer, constraint.grammar, self._vocabulary.tokens)
        progress = Progress(constraint, grammar, begun)
        answer = list(begun)
        thought = None if self._found.reasoning is None else self.tokenizer.encode(f"hm{self._found.reasoning.end}")
        while len(answer) < limit:
            if not (progress.holds or progress.is_over) and thought is not None and constraint.triggers is None:
                for token_id in thought:
                    progress.accept(token_id)
                answer += thought
                thought = None
            if not progress.holds:
                return answer
            row = self._masks.fill([progress])[0]
            progress.allow_ends(row, [self._end])
            allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")[: len(self._closes)])
            assert allowed.size, "nothing is allowed"
            may_end = self._end in allowed
            if may_end and (allowed.size == 1 or choose.random() < 0.5):
                return answer
            closing = allowed[self._closes[allowed]]
            good = closing if closing.size and choose.random() < 0.7 else allowed
            token_id = int(choose.choice(good[good != self._end] if (good != self._end).any() else allowed))
            progress.accept(token_id)
            assert not progress.error, progress.error
            answer.append(token_id)
        return None

    def _read(self, reading: Reading, text: str, size: int) -> tuple[list[Part], int]:
        machine = Machine(
            reading.formats,
            reasoning_is_open=reading.reasoning_is_open,
            call_is_open=reading.call_is_open,
            tools=reading.tools,
            strictness=reading.strictness,
            trims=reading.trims,
        )
        parts: list[Part] = []
        for start in range(0, len(text), size):
            machine.feed(text[start : start + size])
            append_parts(parts, machine.take())
        machine.finish()
        append_parts(parts, machine.take())
        return parts, machine.num_malformed
