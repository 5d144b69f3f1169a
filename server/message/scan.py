"""Text that arrives in pieces, read as if it were whole: generators that wait for more by yielding.

A reader written over a Scanner is straight-line code. `yield from scan.read(...)` returns when the text is there; each
bare `yield` inside means that more is needed. What may begin a marker is held back, everything else is said at once.

A marker that is a special token stands in the text as one character that no text has (a lone surrogate: see Marks),
so that it matches by its id alone.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass

from octavo.server.message.parts import Kind, Part

MAX_HEADER = 1024  # characters of a function's name or an argument's, and of what stands between markers
FIRST_MARK = 0xDC00
MARKS = r"\udc00-\udcff"  # in a character class of a pattern


class CutError(Exception):
    """The text has ended within what was being read."""


class MalformedError(Exception):
    """What was being read is no tool call after all."""


@dataclass(frozen=True)
class Stops:
    """Markers to look for; where several begin at one place, the longest counts."""

    full: re.Pattern[str]
    partial: re.Pattern[str]
    overlap: int

    def held_from(self, text: str) -> int:
        """Where the tail begins that may be the beginning of a marker; the text's length if there is none."""
        found = self.partial.search(text, max(0, len(text) - self.overlap))
        return found.start() if found else len(text)


@functools.lru_cache(maxsize=1024)
def stops_for(*markers: str) -> Stops:
    """The compiled search for these markers; empty ones are left out."""
    wanted = sorted({marker for marker in markers if marker}, key=len, reverse=True)
    prefixes = sorted({marker[:n] for marker in wanted for n in range(1, len(marker))}, key=len, reverse=True)
    nothing = "(?!)"
    full = re.compile("|".join(map(re.escape, wanted)) or nothing)
    partial = re.compile(f"(?:{'|'.join(map(re.escape, prefixes)) or nothing})\\Z")
    return Stops(full, partial, max(map(len, wanted), default=1) - 1)


class Scanner:
    """The unread text, and the parts said so far. `marks`: the text that each mark is shown as, where it is no marker.

    While a record is kept, what is read is remembered, so that it can be given back as content.

    ended: no more text comes. is_cut: a limit or a stop string has ended it, not the model. only_calls: the answer must
    be calls, so that no text that a cut leaves over is content.
    """

    def __init__(self, marks: Mapping[str, str] | None = None, *, only_calls: bool = False) -> None:
        self.buffer = ""
        self.ended = False
        self.is_cut = False
        self.parts: list[Part] = []
        self.is_thinking = False
        self.told: list[str] | None = None  # the arguments that were said, while somebody asks
        self.trimmed = ""  # the whitespace that `until` left out last
        self.skipped = ""  # the whitespace that `space` skipped last
        self.has_text = False  # whether content was said
        self._marks = {ord(mark): text for mark, text in (marks or {}).items()}
        self._record: str | None = None
        self._only_calls = only_calls

    def say(self, kind: Kind, text: str, call_id: str = "") -> None:
        """Add to the parts; neighbors of a kind are one."""
        if kind == "text" and self.is_cut and self._only_calls:
            return
        if self._marks and kind != "call":
            text = text.translate(self._marks)
        if not text and kind not in ("call", "call_end"):
            return
        self.has_text = self.has_text or kind == "text"
        if self.told is not None and kind == "arguments":
            self.told.append(text)
        last = self.parts[-1] if self.parts else None
        if last is not None and last.kind == kind and kind not in ("call", "call_end"):
            last.text += text
        else:
            self.parts.append(Part(kind, text, call_id))

    def record(self, already: str = "") -> None:
        """Remember from here on what is read, and what was read already."""
        self._record = already

    @property
    def recorded(self) -> str:
        """What was read since `record`."""
        return self._record or ""

    def forget(self) -> None:
        """What was read is understood."""
        self._record = None

    def give_back(self) -> None:
        """What was read since `record` is said as content."""
        text = self._record
        self._record = None
        if text:
            self.say("text", text)

    def give_back_all(self) -> None:
        """The same, where the text has ended: what is unread is content too."""
        if self._record is not None:
            self.drop(len(self.buffer))
            self.give_back()

    def drop(self, count: int) -> None:
        """The first `count` characters are read."""
        if self._record is not None:
            self._record += self.buffer[:count]
        self.buffer = self.buffer[count:]

    def unread(self, text: str) -> None:
        """What was read last, put back."""
        if self._record is not None:
            self._record = self._record.removesuffix(text)
        self.buffer = text + self.buffer

    def more(self) -> Generator[None, None, None]:
        """Wait for more text. Raises CutError when there is none."""
        if self.ended:
            raise CutError
        yield

    def space(self) -> Generator[None, None, str]:
        """Skip whitespace, up to a character that is none; returns that character."""
        self.skipped = ""
        while True:
            rest = self.buffer.lstrip()
            if len(rest) != len(self.buffer):
                count = len(self.buffer) - len(rest)
                self.skipped += self.buffer[:count]
                self.drop(count)
            if rest:
                return rest[0]
            yield from self.more()

    def next_is(self, *choices: str) -> Generator[None, None, str]:
        """Read one of these if it stands here, the longest that does; "" if none does. Raises CutError within one."""
        wanted = sorted([choice for choice in choices if choice], key=len, reverse=True)
        while any(choice.startswith(self.buffer) and len(choice) > len(self.buffer) for choice in wanted):
            if self.is_cut:
                raise CutError
            if self.ended:
                break
            yield
        for choice in wanted:
            if self.buffer.startswith(choice):
                self.drop(len(choice))
                return choice
        return ""

    def expect(self, text: str) -> Generator[None, None, None]:
        """Read this text, after whitespace. Raises MalformedError where something else stands."""
        yield from self.space()
        found = yield from self.next_is(text)
        if not found:
            raise MalformedError

    def expect_all(self, pieces: tuple[str, ...]) -> Generator[None, None, None]:
        """Read all of these, with whitespace between. Raises MalformedError where something else stands."""
        for piece in pieces:
            yield from self.expect(piece)

    def read(self, stops: Stops, limit: int | None = MAX_HEADER) -> Generator[None, None, tuple[str, str]]:
        """The text up to the first of these markers, and that marker. Raises MalformedError beyond the limit."""
        start = 0
        while True:
            found = stops.full.search(self.buffer, start)
            if found is not None:
                text = self.buffer[: found.start()]
                self.drop(found.end())
                return text, found[0]
            if limit is not None and len(self.buffer) > limit:
                raise MalformedError
            start = max(0, len(self.buffer) - stops.overlap)
            yield from self.more()

    def until(
        self, stops: Stops, kind: Kind | None, *, trim: bool = False, escape: bool = False
    ) -> Generator[None, None, str]:
        """Say the text up to the first of these markers as it comes; returns the marker.

        kind None says nothing. trim: whitespace in front of the marker is not said. escape: as a JSON string's inside.
        """
        while True:
            buffer = self.buffer
            found = stops.full.search(buffer)
            is_whole = self.ended and not (self.is_cut and kind == "arguments")  # a cut marker is no part of a value
            end = found.start() if found is not None else len(buffer) if is_whole else stops.held_from(buffer)
            if trim and (found is not None or not self.ended):
                trimmed_to = len(buffer[:end].rstrip())
                self.trimmed = buffer[trimmed_to:end]
                end = trimmed_to
            if end and kind is not None:
                said = buffer[:end]
                self.say(kind, escaped(said) if escape else said)
            if found is not None:
                self.drop(found.end())
                return found[0]
            self.drop(end)
            yield from self.more()


def escaped(text: str) -> str:
    """A text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
