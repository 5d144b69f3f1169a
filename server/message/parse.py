"""Tokens to Parts: an answer's tokens are detokenized, cut at stop strings, and told apart by kind.

Parser knows text alone, and costs a chat without tools nothing. FormatParser has the same face and tells reasoning and
tool calls from text, as the model's formats say: one state machine for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from octavo.server.message.beginnings import bare_beginnings
from octavo.server.message.calls import CallReader
from octavo.server.message.channels import read_channels
from octavo.server.message.format import ReasoningFormat, Strictness, ToolFormat
from octavo.server.message.parts import Part
from octavo.server.message.scan import FIRST_MARK, CutError, Scanner, stops_for
from octavo.text.detokenizer import Detokenizer

_Format = TypeVar("_Format", ToolFormat, ReasoningFormat)


@dataclass(frozen=True)
class Formats:
    """A model's formats, bound to its tokenizer.

    marks: the character that stands for each special token of a marker, by id. shown: that token's text, by character;
    it is shown where it is no marker, and special tokens are. tools and reasoning have the marks in place of the text.
    """

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None
    marks: Mapping[int, str] = field(default_factory=dict)
    shown: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def bind(
        cls, tools: ToolFormat | None, reasoning: ReasoningFormat | None, special_tokens: Mapping[str, int]
    ) -> Formats:
        """The formats for a tokenizer with these special tokens, by text. With none, markers match as text."""
        markers = tools.markers() if tools is not None else []
        if reasoning is not None:
            markers += [reasoning.begin, reasoning.end]
        used = [text for text in special_tokens if text and any(text in marker for marker in markers)]
        used.sort(key=len, reverse=True)
        marks = {text: chr(FIRST_MARK + number) for number, text in enumerate(used[:256])}
        return cls(
            tools=None if tools is None else _marked(tools, marks),
            reasoning=None if reasoning is None else _marked(reasoning, marks),
            marks={special_tokens[text]: mark for text, mark in marks.items()},
            shown={mark: text for text, mark in marks.items()},
        )

    @property
    def is_empty(self) -> bool:
        """Whether all of an answer is text."""
        return self.tools is None and self.reasoning is None

    @property
    def has_channels(self) -> bool:
        """Whether an answer is messages, whose headers tell reasoning, calls and content apart."""
        return self.tools is not None and self.tools.kind == "channel"


def _marked(form: _Format, marks: Mapping[str, str]) -> _Format:
    changes: dict[str, Any] = {}
    for entry in dataclasses.fields(form):
        text = getattr(form, entry.name)
        if isinstance(text, str) and entry.name not in ("kind", "id_style", "switch"):
            for token, mark in marks.items():
                text = text.replace(token, mark)
            changes[entry.name] = text
    return dataclasses.replace(form, **changes)


class Parser:
    """One answer's parts: push the tokens of a step, take the parts that they complete. So far all parts are text.

    num_reasoning: tokens of the reasoning, without its markers; None where the model has none. length: characters so
    far, sent or not, which is where the next token's text begins. stopped_by: the stop string that has ended the
    answer. These are plain attributes, since they are read for each token.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._text = ""
        self.length = 0
        self.stopped_by: str | None = None
        self.num_malformed = 0
        self.num_reasoning: int | None = None

    def push(self, token_id: int, *, silent: bool) -> None:
        """Take one token. A `silent` token (an end token) says nothing itself."""
        detokenizer = self._detokenizer
        self._text += detokenizer.push(token_id, silent=silent)
        self.length = detokenizer.length
        self.stopped_by = detokenizer.stopped_by

    def finish(self, *, is_cut: bool = False) -> None:
        """Take the text that was held back, now that the tokens have ended."""
        del is_cut  # text is text, whatever has ended it
        self._text += self._detokenizer.finish()
        self.length = self._detokenizer.length
        self.stopped_by = self._detokenizer.stopped_by

    def take(self) -> list[Part]:
        """The parts since the last call; none while nothing can be said yet."""
        if not self._text:
            return []
        parts = [Part("text", self._text)]
        self._text = ""
        return parts


class Machine:
    """Text to parts: feed the text as it comes, in pieces of any size, and take the parts that it completes.

    reasoning_is_open, call_is_open: what the prompt has opened (the formats' `opened_by`). goes_on: the client has
    begun the answer, so that whitespace at the beginning is part of an open reasoning. tools: the schemas of the
    functions' parameters by name, of which params formats take their types. num_before: earlier calls of the
    conversation. strictness: of reading calls. must_call: the answer's constraint allows nothing but calls. trims:
    whitespace in front of the content is dropped.
    """

    def __init__(
        self,
        formats: Formats,
        *,
        reasoning_is_open: bool = False,
        call_is_open: bool = False,
        goes_on: bool = False,
        tools: Mapping[str, Any] | None = None,
        num_before: int = 0,
        strictness: Strictness = "loose",
        must_call: bool = False,
        skip_special_tokens: bool = True,
        trims: bool = False,
    ) -> None:
        shown = dict.fromkeys(formats.shown, "") if skip_special_tokens else formats.shown
        self._scan = Scanner(shown, only_calls=must_call)
        self._tools = formats.tools
        self._reasoning = formats.reasoning
        self._reasoning_is_open = reasoning_is_open
        self._call_is_open = call_is_open
        self._goes_on = goes_on
        self._trims = trims
        form = formats.tools
        self._calls = None if form is None else CallReader(form, self._scan, tools or {}, num_before, strictness)
        self._is_beside_content = strictness == "marked"
        self._bare_beginnings: tuple[str, ...] = ()
        if form is not None and self._is_beside_content:
            self._bare_beginnings = bare_beginnings(form, tools or ())
        self._reading = self._answer()
        next(self._reading, None)

    @property
    def num_malformed(self) -> int:
        """Calls that were none, and are content."""
        return 0 if self._calls is None else self._calls.num_malformed

    @property
    def is_thinking(self) -> bool:
        """Whether the text has come to stand within the reasoning."""
        return self._scan.is_thinking

    def feed(self, text: str) -> None:
        """More of the answer's text."""
        self._scan.buffer += text
        next(self._reading, None)

    def finish(self, *, is_cut: bool = False) -> None:
        """The answer has ended: what was held back is said. is_cut: a limit or a stop string has ended it."""
        if not self._scan.ended:
            self._scan.ended = True
            self._scan.is_cut = is_cut
            for _ in self._reading:
                raise AssertionError("a reader waits for text after the end")

    def take(self) -> list[Part]:
        """The parts since the last call."""
        parts = self._scan.parts
        self._scan.parts = []  # even where it is empty: the caller adds to what it got
        return parts

    def _answer(self) -> Generator[None, None, None]:
        try:
            if self._calls is not None and self._tools is not None and self._tools.kind == "channel":
                yield from read_channels(self._scan, self._tools, self._calls)
            yield from self._think()
            yield from self._say()
        except CutError:
            pass

    def _think(self) -> Generator[None, None, None]:
        """The reasoning at the answer's beginning, if there is any."""
        form = self._reasoning
        if form is None:
            return
        scan = self._scan
        while not self._reasoning_is_open:
            rest = scan.buffer.lstrip()
            if rest.startswith(form.begin) and form.begin:
                scan.drop(len(scan.buffer) - len(rest) + len(form.begin))
                break
            if rest.startswith(form.end):  # some templates close what they haven't opened, and some models follow
                scan.drop(len(scan.buffer) - len(rest) + len(form.end))
                yield from scan.space()
                return
            if scan.ended or (rest and not form.begin.startswith(rest) and not form.end.startswith(rest)):
                if self._trims:
                    scan.buffer = rest
                return
            yield
        scan.is_thinking = True
        if not (self._reasoning_is_open and self._goes_on):
            yield from scan.space()
        yield from scan.until(stops_for(form.end), "reasoning", trim=True)
        scan.is_thinking = False
        yield from scan.space()

    def _say(self) -> Generator[None, None, None]:
        """The content, and the calls within it."""
        scan = self._scan
        calls = self._calls
        if calls is None:
            yield from self._say_all()
            return
        if self._call_is_open:
            yield from calls.call_after_header()
        if self._is_beside_content:
            yield from self._calls_or_content(calls)
            yield from self._say_all()
        layout = calls.layout
        stops = stops_for(*layout.openers)
        may_be_bare = bool(layout.bare)
        while True:
            if may_be_bare:
                while not scan.buffer.strip():
                    yield from self._more_space()
                if scan.buffer.lstrip().startswith((layout.bare, ";") if calls.num_calls else layout.bare):
                    scan.buffer = scan.buffer.lstrip().removeprefix(";").lstrip()
                    before = calls.num_calls
                    yield from calls.bare()
                    may_be_bare = calls.num_calls > before
                    continue
                may_be_bare = False
            opener = yield from scan.until(stops, "text", trim=True)
            space = scan.trimmed
            scan.record(space + opener)
            before = calls.num_calls
            yield from calls.section(opener)
            if calls.num_calls > before:
                yield from scan.space()
                if scan.has_text:  # then it parts this text from what follows, unless that is a call too
                    scan.unread(space or scan.skipped)

    def _say_all(self) -> Generator[None, None, None]:
        """What follows is content, whatever it looks like."""
        scan = self._scan
        while True:
            scan.say("text", scan.buffer)
            scan.buffer = ""
            yield from scan.more()

    def _calls_or_content(self, calls: CallReader) -> Generator[None, None, None]:
        """The calls of an answer that begins like them; it returns where what follows is content."""
        scan = self._scan
        openers = calls.layout.openers[:1]
        is_over = self._call_is_open and not calls.num_calls  # by a header that says so
        while not is_over:
            bare = ("{", ";") if calls.num_calls else self._bare_beginnings
            beginnings = (*openers, *(bare if self._bare_beginnings else ()))
            rest = scan.buffer.lstrip()
            while not scan.ended and any(text.startswith(rest) and text != rest for text in beginnings):
                yield
                rest = scan.buffer.lstrip()
            found = max((text for text in beginnings if rest.startswith(text)), key=len, default="")
            if not found:
                return
            before = calls.num_calls
            scan.buffer = rest
            if found == ";":
                scan.drop(1)
                yield from scan.space()
                continue
            if found in openers:
                scan.drop(len(found))
                scan.record(found)
                yield from calls.section(found)
            else:
                yield from calls.bare()
            is_over = calls.num_calls == before
            if not is_over:
                yield from scan.space()

    def _more_space(self) -> Generator[None, None, None]:
        if self._scan.ended and self._calls is not None and not self._calls.num_calls:
            self._scan.say("text", self._scan.buffer)
        yield from self._scan.more()


class FormatParser:
    """What Parser does, for a model whose formats are known: reasoning and tool calls are parts of their own."""

    def __init__(self, detokenizer: Detokenizer, machine: Machine, *, only_one: bool = False) -> None:
        self._detokenizer = detokenizer
        self._machine = machine
        self._only_one = only_one
        self._has_call = False
        self._is_over = False
        self.length = 0
        self.stopped_by: str | None = None
        self.num_reasoning = 0

    @property
    def num_malformed(self) -> int:
        """Calls that were none, and are content."""
        return self._machine.num_malformed

    def push(self, token_id: int, *, silent: bool) -> None:
        """Take one token. A `silent` token (an end token) says nothing itself."""
        detokenizer = self._detokenizer
        was_thinking = self._machine.is_thinking
        text = detokenizer.push(token_id, silent=silent)
        if text:
            self._machine.feed(text)
        self.num_reasoning += was_thinking and self._machine.is_thinking
        self.length = detokenizer.length
        self.stopped_by = detokenizer.stopped_by
        if self.stopped_by is not None:
            self._machine.finish(is_cut=True)

    def finish(self, *, is_cut: bool = False) -> None:
        """The tokens have ended: what was held back is said. is_cut: not by the model's own end."""
        text = self._detokenizer.finish()
        if text:
            self._machine.feed(text)
        self.length = self._detokenizer.length
        self.stopped_by = self._detokenizer.stopped_by
        self._machine.finish(is_cut=is_cut or self.stopped_by is not None)

    def take(self) -> list[Part]:
        """The parts since the last call; none while nothing can be said yet. only_one: none after the first call."""
        parts = self._machine.take()
        return self._first_call(parts) if self._only_one else parts

    def _first_call(self, parts: list[Part]) -> list[Part]:
        kept: list[Part] = []
        for part in parts:
            self._is_over = self._is_over or (part.kind == "call" and self._has_call)
            self._has_call = self._has_call or part.kind == "call"
            if not self._is_over:
                kept.append(part)
        return kept
