"""How far answers are in their reasoning and their grammars, token by token, and what may come next in each.

An answer's tokens are those of its reasoning, if there is any, then those of its content. A grammar is about the
content. One with triggers sleeps until one of them comes, and again when what it describes is complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from octavo.runtime.constraint import Grammar, first_line
from octavo.runtime.messages import Constraint, Marker, Reasoning, Triggers

if TYPE_CHECKING:  # imported where it is used: a start must not wait for it
    from llguidance import LLMatcher


_SPACES = " \t\n\r"


class _Thoughts:
    """How far the reasoning is: not begun, under way, or over.

    What was said is text here, of which each byte is a character; a token that is a piece of a marker is one beyond
    these, so that it matches by its id alone.
    """

    __slots__ = ("_begin", "_end", "_ids", "_reasoning", "_tail", "_tokens", "_told", "is_over", "is_under_way")

    def __init__(self, reasoning: Reasoning, tokens: Sequence[bytes]) -> None:
        self._reasoning = reasoning
        self._tokens = tokens
        pieces = [piece for piece in (*reasoning.begin, *reasoning.end) if isinstance(piece, int)]
        self._ids = {token_id: chr(0x100 + number) for number, token_id in enumerate(pieces)}
        self._begin = self._text_of(reasoning.begin)
        self._end = self._text_of(reasoning.end)
        self._tail = ""  # what was said last, as far as a marker may have begun in it
        self._told = 0
        self.is_under_way = reasoning.is_open
        self.is_over = not reasoning.is_open and not reasoning.begin

    def _text_of(self, marker: Marker) -> str:
        said = [self._ids[piece] if isinstance(piece, int) else piece.encode().decode("latin-1") for piece in marker]
        return "".join(said)

    def _said(self, token_id: int) -> str:
        if token_id in self._ids:
            return self._ids[token_id]
        return self._tokens[token_id].decode("latin-1") if token_id < len(self._tokens) else ""

    @property
    def may_begin(self) -> bool:
        """Whether it has not begun, and still may."""
        return not self.is_under_way and not self.is_over

    @property
    def first(self) -> int | None:
        """The token that would begin it now, where one token does."""
        begin = self._reasoning.begin
        return begin[0] if self.may_begin and len(begin) == 1 and isinstance(begin[0], int) else None

    @property
    def forced(self) -> int | None:
        """The token that must come next, where the budget is spent."""
        budget = self._reasoning.budget
        if not self.is_under_way or budget is None or self._told < budget:
            return None
        return self._reasoning.closing[self._told - budget]

    def accept(self, token_id: int) -> bool:
        """Go on by one token; whether it belongs to the reasoning."""
        self._tail += self._said(token_id)
        if self.is_under_way:
            self._told += 1
        else:
            self._tail = self._tail.lstrip(_SPACES)
            if not self._tail.startswith(self._begin):
                self.is_over = not self._begin.startswith(self._tail)
                return False
            self._tail = self._tail[len(self._begin) :]
        is_spent = self._told == (self._reasoning.budget or 0) + len(self._reasoning.closing)
        self.is_over = self._end in self._tail or (self._reasoning.budget is not None and is_spent)
        self.is_under_way = not self.is_over
        self._tail = self._tail[-(len(self._end) - 1) :] if len(self._end) > 1 else ""
        return True


class _Watch:
    """Looks for the triggers of a grammar that sleeps. `tail`: the last tokens, as far as a trigger may be in them."""

    __slots__ = ("_firsts", "_has_begun", "_longest", "_markers", "_tokens", "_triggers", "tail")

    def __init__(self, triggers: Triggers, tokens: Sequence[bytes]) -> None:
        self._triggers = triggers
        self._tokens = tokens
        self._markers = [text.encode() for text in triggers.texts]
        self._firsts = {marker[:1] for marker in self._markers}
        self._longest = max(map(len, self._markers), default=0)
        self._has_begun = not triggers.start
        self.tail: list[int] = []

    def accept(self, token_id: int) -> bool | None:
        """Whether the grammar must hold from the tail on; None where that depends on the next token."""
        if token_id in self._triggers.token_ids:
            self.tail = [token_id]
            return True
        text = self._bytes(token_id)
        if not self._has_begun and (visible := text.lstrip()):
            self._has_begun = True
            if visible.startswith(self._triggers.start.encode()):
                self.tail = [token_id]
                return True
        if not self.tail and not any(first in text for first in self._firsts):  # nearly always
            return False
        self.tail.append(token_id)
        return self._look()

    def _look(self) -> bool | None:
        """Cut the tail to the tokens that a text's beginning, or all of it, stands in."""
        text = b"".join(map(self._bytes, self.tail))
        found = min((place for marker in self._markers if (place := text.find(marker)) >= 0), default=-1)
        start = found
        if found < 0:
            ends = range(max(0, len(text) - self._longest + 1), len(text))
            start = next((place for place in ends if any(m.startswith(text[place:]) for m in self._markers)), len(text))
        while self.tail and start >= (size := len(self._bytes(self.tail[0]))):
            start -= size
            del self.tail[0]
        return True if found >= 0 else None if self.tail else False

    def _bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id] if token_id < len(self._tokens) else b""


class Progress:
    """How far one answer is. Its tokens are told one by one, as they are sampled."""

    __slots__ = ("_constraint", "_grammar", "_is_sure", "_matcher", "_thoughts", "_watch", "num_tokens")

    def __init__(self, constraint: Constraint, grammar: Grammar | None, token_ids: Sequence[int]) -> None:
        """grammar: None where nothing is known of the tokens either. token_ids: of the answer so far."""
        self._grammar = grammar or Grammar(None, [], ())
        self._constraint = constraint
        reasoning = constraint.reasoning
        self._thoughts = None if reasoning is None else _Thoughts(reasoning, self._grammar.tokens)
        self._begin_content()
        self.num_tokens = 0
        for token_id in token_ids:
            self.accept(token_id)

    def _begin_content(self) -> None:
        """Nothing of what the grammar is about has been said."""
        triggers = self._constraint.triggers
        matcher = self._grammar.matcher
        self._watch: _Watch | None = None
        if matcher is not None and triggers is not None:
            self._watch = _Watch(triggers, self._grammar.tokens)
        self._matcher = None if matcher is None or triggers is not None else matcher.deep_copy()
        self._is_sure = True  # that what has woken the matcher is a trigger, and not only its beginning

    @property
    def _is_thinking(self) -> bool:
        """Whether what is said is free."""
        return self._thoughts is not None and self._thoughts.is_under_way and not self._describes_reasoning

    @property
    def _describes_reasoning(self) -> bool:
        reasoning = self._constraint.reasoning
        return reasoning is not None and reasoning.in_grammar

    @property
    def forced(self) -> int | None:
        """The token that must come next whatever the grammar says, where there is one."""
        return None if self._thoughts is None else self._thoughts.forced

    @property
    def holds(self) -> bool:
        """Whether the next token has to obey; else it is free."""
        if self._is_thinking:
            return self.forced is not None
        return self.forced is not None or (self._matcher is not None and not self._matcher.is_stopped())

    @property
    def is_complete(self) -> bool:
        """Whether the answer obeys its grammar as it is, so that it may end here."""
        return not self._is_thinking and self._matcher is not None and self._is_sure and self._matcher.is_accepting()

    @property
    def is_over(self) -> bool:
        """Whether nothing may follow."""
        return not self._is_thinking and self._matcher is not None and self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why the grammar can't be followed any further; empty while it can."""
        if self._matcher is None or not self._matcher.is_error():
            return ""
        return first_line(self._matcher.get_error())

    def fill(self, bits: NDArray[np.int32]) -> None:
        """Write one row of masks: which tokens may come, the ends of the answer not among them."""
        forced = self.forced
        if forced is not None:
            bits.view(np.uint32)[forced // 32] = np.uint32(1 << forced % 32)
        elif self._matcher is not None:
            self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)

    def allow_ends(self, bits: NDArray[np.int32], stop_token_ids: Iterable[int]) -> None:
        """In one row of masks: stop tokens may come where the answer is complete, the model's others never.

        Where the reasoning may still begin, so may its first token, and one of whitespace in front of it.
        """
        if self.forced is not None or self._grammar.matcher is None:
            return
        words = bits.view(np.uint32)
        for token_id in self._grammar.end_ids:
            words[token_id // 32] &= np.uint32(~(1 << token_id % 32) & 0xFFFFFFFF)
        also: list[int] = []
        if self._thoughts is not None and self._thoughts.first is not None and self._watch is None:
            also = [self._thoughts.first, *(() if self.num_tokens else self._grammar.spaces)]
        if self.is_complete or not self._is_sure:
            also += stop_token_ids
        for token_id in also:
            if token_id // 32 < len(words):
                words[token_id // 32] |= np.uint32(1 << token_id % 32)

    def accept(self, token_id: int) -> None:
        """Go on by one token of the answer."""
        self.num_tokens += 1
        thoughts = self._thoughts
        if thoughts is not None and not thoughts.is_over and not self._describes_reasoning:
            may_begin = thoughts.may_begin
            if thoughts.accept(token_id):
                if may_begin:
                    self._begin_content()  # what came before it was whitespace
                return
            if self._is_left_out(token_id):
                return
        elif thoughts is not None and not thoughts.is_over:
            thoughts.accept(token_id)
        if self._matcher is not None and self._is_sure:
            self._matcher.consume_token(token_id)
            if self._watch is not None and not self.error and self._matcher.is_stopped() and not self._ends_once:
                self._matcher = None
        elif self._watch is not None:
            self._look_for_triggers(self._watch, token_id)

    def _is_left_out(self, token_id: int) -> bool:
        """Whether this is whitespace in front of reasoning that may begin, and none of the grammar's."""
        if self._matcher is None or self._watch is not None or token_id not in self._grammar.spaces:
            return False
        waits = self._thoughts is not None and self._thoughts.may_begin
        return waits and self._matcher.validate_tokens([token_id]) == 0

    def jump(self, most: int) -> list[int]:
        """Go on by the tokens that must come now, `most` of them at the most, and return them."""
        jumped: list[int] = []
        while len(jumped) < most and (forced := self._all_forced()):
            forced = forced[: most - len(jumped)]
            for token_id in forced:
                self.accept(token_id)
            jumped += forced
        return jumped

    def _all_forced(self) -> list[int]:
        """The tokens that must come now, as far as they are known; none where there is a choice, or an end may come."""
        if self.forced is not None:
            return [self.forced]
        if self._matcher is None or self._is_thinking or not self._is_sure or self._matcher.is_stopped():
            return []
        if self._thoughts is not None and self._thoughts.first is not None:
            return []
        ends = self._grammar.end_ids
        return list(takewhile(lambda token_id: token_id not in ends, self._matcher.compute_ff_tokens()))

    @property
    def _ends_once(self) -> bool:
        triggers = self._constraint.triggers
        return triggers is not None and triggers.once

    def _look_for_triggers(self, watch: _Watch, token_id: int) -> None:
        """Let the grammar wake where a trigger may have begun; it goes back to sleep where it turns out to be none."""
        found = watch.accept(token_id)
        if found is False:
            self._matcher = None
            return
        if self._matcher is not None:
            self._matcher.consume_token(token_id)
        else:
            assert self._grammar.matcher is not None
            self._matcher = self._grammar.matcher.deep_copy()
            self._matcher.consume_tokens(watch.tail)
            if self._matcher.is_error():  # one token holds the trigger, and what is no call
                self._matcher = None
        self._is_sure = bool(found)
        if found:
            watch.tail = []


class Masks:
    """Fills in which tokens may come next, for several answers at a time."""

    def __init__(self, vocab_size: int) -> None:
        from llguidance import LLExecutor

        self._num_words = -(-vocab_size // 32)
        self._executor = LLExecutor()

    def fill(self, following: Sequence[Progress]) -> NDArray[np.int32]:
        """[len(following), ceil(vocab / 32)]: bit j of word i is 1 where token 32 i + j may come."""
        bits = np.zeros((len(following), self._num_words), np.int32)
        matchers: list[tuple[LLMatcher, int]] = []
        for row, progress in enumerate(following):
            matcher = progress._matcher
            if len(following) == 1 or progress.forced is not None or matcher is None:
                progress.fill(bits[row])
            else:
                matchers.append((matcher, row))
        if matchers:
            self._executor.unsafe_compute_mask_ptr(matchers, bits.ctypes.data, bits.strides[0], len(bits))
        return bits
