"""Text from tokens that arrive one by one: split characters, leading spaces, skipped tokens and stop strings.

Tokens become bytes, and one incremental UTF-8 decoder turns the bytes into text, so that the pieces always join to the
text decoded as a whole. (Decoding a window of tokens twice, as others do, costs two calls per token and is wrong at
invalid bytes.) One case differs from transformers: there, one invalid byte in a run of byte-fallback tokens spoils the
whole run; here, the valid characters of the run stay, since they may have been sent already.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Protocol

from octavo.text.tokenizer import Tokenizer

MAX_MATCH = 4096  # characters in which a stop pattern is looked for
_PROMPT_TAIL = 4  # tokens; a character has at most four bytes, and a token at least one


class Pattern(Protocol):
    """A compiled regular expression."""

    @property
    def pattern(self) -> str: ...

    def search(self, text: str, /) -> object: ...


class IncrementalDecoder:
    """Turns tokens into text. After a prompt, the prompt's text plus the new text is the text of both together."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._leading = tokenizer.strip_left
        if prompt:
            shown = [token_id for token_id in prompt[-64:] if token_id not in self._skipped]
            if shown or len(prompt) > 64:
                self._leading = 0
            self.push(shown[-_PROMPT_TAIL:])

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete; an unfinished character waits for its remaining bytes."""
        if len(token_ids) == 1:  # as nearly always
            raw = b"" if token_ids[0] in self._skipped else self._token_bytes(token_ids[0])
        else:
            raw = b"".join(self._token_bytes(token_id) for token_id in token_ids if token_id not in self._skipped)
        return self._strip(self._utf8.decode(raw)) if raw else ""

    def finish(self) -> str:
        """Return the replacement character for an unfinished character at the end, if there is one."""
        return self._utf8.decode(b"", final=True)

    def _strip(self, text: str) -> str:
        while self._leading and text:
            if not text.startswith(" "):
                self._leading = 0
            else:
                text = text[1:]
                self._leading -= 1
        return text


class MarkingDecoder(IncrementalDecoder):
    """An IncrementalDecoder that gives each token in `marks` as its mark, a character that no text has.

    That is how a parser tells a special token from the same characters spelled out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        marks: Mapping[int, str],
        skip_special_tokens: bool = True,
    ) -> None:
        self._marks: Mapping[int, str] = {}  # a prompt's tokens are none
        super().__init__(tokenizer, prompt, skip_special_tokens=skip_special_tokens)
        self._marks = marks

    def push(self, token_ids: Sequence[int]) -> str:
        """As IncrementalDecoder's; a character that is unfinished where a mark stands is a replacement character."""
        if len(token_ids) == 1 and token_ids[0] not in self._marks:
            return super().push(token_ids)
        pieces: list[str] = []
        for token_id in token_ids:
            mark = self._marks.get(token_id)
            pieces.append(super().push((token_id,)) if mark is None else super().finish() + mark)
        return "".join(pieces)


class StopStrings:
    """Finds where a text ends: at the first place where any stop string is complete.

    That place does not depend on how the text was cut into pieces. If several end there, the longest one counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._overlap = len(self._stops[0]) - 1 if stops else 0

    def find(self, text: str, start: int) -> tuple[int, str] | None:
        """Return (begin, stop string) of the first stop string completed at or after `start`, or None."""
        best: tuple[int, str] | None = None
        for stop in self._stops:
            at = text.find(stop, max(0, start - len(stop) + 1))
            if at >= 0 and (best is None or at + len(stop) < best[0] + len(best[1])):
                best = (at, stop)
        return best

    def held_back(self, text: str) -> int:
        """Return how many characters at the end may begin a stop string, and so can't be sent yet."""
        for length in range(min(self._overlap, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) and len(stop) > length for stop in self._stops):
                return length
        return 0


class StopPatterns:
    """Finds where a text ends: at the first place where any of these regular expressions matches.

    The match is part of the text: whether one has begun can't be told before it is complete. Matches of up to
    MAX_MATCH characters are found.
    """

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._patterns = patterns
        self._tail = ""

    def forget(self) -> None:
        """Begin anew: what matched does not count."""
        self._tail = ""

    def find(self, text: str) -> tuple[int, str] | None:
        """(where it ends in this new text, the pattern that matched there), or None."""
        known = len(self._tail)
        whole = self._tail + text
        self._tail = whole[-MAX_MATCH:]
        if not any(pattern.search(whole) for pattern in self._patterns):
            return None
        for end in range(known + 1, len(whole) + 1):
            for pattern in self._patterns:
                if pattern.search(whole[:end]):
                    return end - known, pattern.pattern
        return None


class Detokenizer:
    """One sequence's text: push tokens, get the text that may be sent. `stopped_by` is what ended it, as it was given.

    min_tokens: stop strings and patterns that are complete before this many tokens don't count.
    """

    def __init__(
        self,
        decoder: IncrementalDecoder,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        patterns: Sequence[Pattern] = (),
    ) -> None:
        self._decoder = decoder
        self._patterns = StopPatterns(patterns) if patterns else None
        self._stops = StopStrings(stops) if stops else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._unsent = ""
        self._num_searched = 0  # characters of `_unsent` that no stop string can end in anymore
        self.num_tokens = 0
        self.length = 0  # characters decoded so far, sent or not
        self.stopped_by: str | None = None

    def push(self, token_id: int, *, silent: bool = False) -> str:
        """Take one token, and return the text that may be sent now. A `silent` token (an end token) adds no text."""
        self.num_tokens += 1
        if silent:
            return ""
        text = self._decoder.push((token_id,))
        if self._patterns is not None:
            return self._until_pattern(text, self._patterns)
        return self._pass_on(text)

    def finish(self) -> str:
        """Return the text that is left when the tokens have ended; none after a stop string."""
        if self.stopped_by is not None:
            return ""
        text = self._pass_on(self._decoder.finish())
        return text + self._rest()

    def _pass_on(self, text: str) -> str:
        self.length += len(text)
        if self._stops is None:
            return text
        self._unsent += text
        return self._release(self._stops)

    def _until_pattern(self, text: str, patterns: StopPatterns) -> str:
        """What may be sent of a text in which a pattern may end the answer, unless a stop string does so before."""
        found = patterns.find(text) if text else None
        if found is None:
            return self._pass_on(text)
        if self.num_tokens < self._min_tokens:
            patterns.forget()
            return self._pass_on(text)
        end, pattern = found
        released = self._pass_on(text[:end]) + self._rest()
        self.stopped_by = self.stopped_by or pattern
        return released

    def _rest(self) -> str:
        """What was held back, now that nothing follows."""
        rest = self._unsent if self.stopped_by is None else ""
        self._unsent = ""
        return rest

    def _release(self, stops: StopStrings) -> str:
        text = self._unsent
        if self.num_tokens >= self._min_tokens:
            found = stops.find(text, self._num_searched)
            if found is not None:
                at, self.stopped_by = found
                end = at + len(self.stopped_by) if self._include_stop else at
                self.length -= len(text) - end
                self._unsent = ""
                return text[:end]
        held = stops.held_back(text)
        sent = text[: len(text) - held]
        self._unsent = text[len(text) - held :]
        self._num_searched = held
        return sent
