"""The grammar of a model's tool calls, written from the same ToolFormat that the parser reads them by.

A grammar is Lark, for llguidance: the envelope as the format writes it, with whitespace free at its seams, the names of
the tools, and arguments that each tool's schema allows (`call_arguments`). In an answer that may call tools or not, it
sleeps until a call's first marker has come; one that must call tools obeys from its beginning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from octavo.runtime.constraint import GrammarError
from octavo.runtime.messages import Triggers
from octavo.server.message.beginnings import bare_beginning, in_lexemes, told_from_calls
from octavo.server.message.call_arguments import Arguments, arguments_of
from octavo.server.message.format import ToolFormat
from octavo.server.message.grammars import checked
from octavo.server.message.lark_rules import Rules, either, quoted, without
from octavo.server.message.layout import Layout, layout_of
from octavo.server.message.patterns import literal

# How many of the messages of an answer with channels may be reasoning; once: before all others.
Thinks = Literal["freely", "once", "never"]

_ARGUMENTS = "\x01"  # stands in a format's texts for a call's arguments
_JSON_TOKEN = re.compile(r'"\{id\}"|"[^"]*"|[{}\[\],:]|\x01|[^\s"{}\[\],:\x01]+')
_PIECE = re.compile(r"(\{index\}|\{id\}|\{any\}|\{is_string\}|[\udc00-\udcff]|\s+)")
_IDS = {"mistral": "/[A-Za-z0-9]{9}/", "kimi": "/functions\\.[A-Za-z0-9_.-]{1,128}:[0-9]{1,4}/"}
_HEX_ID = "/[A-Za-z0-9_-]{1,64}/"


@dataclass(frozen=True)
class Callable:
    """A tool as a call of it is constrained. schema: what inner_schema makes of that of its arguments.

    place: where the tool stands in the request. lark: a grammar of its only argument.
    """

    name: str
    schema: dict[str, Any]
    place: str = ""
    lark: str = ""


@dataclass(frozen=True)
class CallGrammar:
    """triggers: None where the grammar holds from the content's first token on.

    schemas: of the tools' parameters by name, as the parser has to read what this grammar lets a model write.
    """

    text: str
    triggers: Triggers | None
    schemas: Mapping[str, Any]


def call_grammar(
    form: ToolFormat,
    mark_ids: Mapping[str, int],
    tools: Sequence[Callable],
    mode: Literal["auto", "required"],
    *,
    several: bool = True,
    is_open: bool = False,
    content: Sequence[Mapping[str, Any]] = (),
    thinks: Thinks = "freely",
) -> CallGrammar:
    """The grammar of calls of these tools. Raises GrammarError.

    mark_ids: the token of each mark in the format's texts. several: more than one call may be made. is_open: the
    prompt has begun a call's header. content: named grammars, of which the first is what the answer must be where it
    isn't calls. thinks: how many of an answer's messages may be reasoning, where they have channels: once before all
    others, never, or any.
    """
    writer = _Writer(form, mark_ids, tools, several=several and form.may_repeat)
    triggers = None
    told = f"@{content[0]['name']}" if content else ""
    has_headers = form.kind == "channel" or bool(form.content_name)
    if content:
        own = list(content) if has_headers else told_from_calls(content, form, list(writer.schemas))
        writer.rules.grammars += map(dict, own)
    if form.kind == "channel":
        start = writer.messages(must_call=mode == "required", content=told, thinks=thinks)
    elif form.content_name:
        start = writer.headed(is_open=is_open, must_call=mode == "required", content=told)
    elif mode == "required":
        start = writer.required()
    elif content:
        start = writer.beside(told, writer.rules.grammars[0])
    else:
        start = writer.waking()
        triggers = writer.triggers()
    writer.rules.lines.insert(0, f"start: {start}")
    grammars = [{"lark_grammar": "\n".join(writer.rules.lines)}, *writer.rules.grammars]
    text = checked(msgspec.json.encode({"grammars": grammars}).decode(), knows_tokens=True)
    return CallGrammar(text, triggers, writer.schemas)


class _Writer:
    """Writes one grammar. Its methods return expressions."""

    def __init__(
        self, form: ToolFormat, mark_ids: Mapping[str, int], tools: Sequence[Callable], *, several: bool
    ) -> None:
        self.rules = Rules()
        self.schemas: dict[str, Any] = {}
        self._form = form
        self._layout: Layout = layout_of(form, "exact")
        self._ids = mark_ids
        self._several = several
        self._arguments: list[tuple[str, Arguments]] = []
        for tool in tools:
            try:
                arguments = arguments_of(form, tool.schema, self.rules, self._verbatim, tool.lark)
            except GrammarError as error:
                raise GrammarError(f"{tool.place}: {error}") from None
            self._arguments.append((tool.name, arguments))
            self.schemas[tool.name] = arguments.schema

    # texts of the format

    def _seam(self, text: str) -> list[str]:
        """A text's pieces, with free whitespace where it has some."""
        return [self._piece(piece) for piece in _PIECE.split(text) if piece]

    def _piece(self, piece: str) -> str:
        if piece.isspace():
            return self.rules.space
        if piece in self._ids:
            return f"<[{self._ids[piece]}]>"
        match piece:
            case "{index}":
                return "/[0-9]{1,4}/"
            case "{id}":
                return _IDS.get(self._form.id_style, _HEX_ID)
            case "{any}":
                return "/[A-Za-z0-9_-]{0,40}/"
        return quoted(piece)

    def _verbatim(self, text: str) -> list[str]:
        """A text's pieces, with its whitespace as it is."""
        pieces = [piece for piece in re.split(r"([\udc00-\udcff])", text) if piece]
        return [self._piece(piece) if piece in self._ids else quoted(piece) for piece in pieces]

    def _json(self, text: str, arguments: str) -> list[str]:
        """The tokens of a part of JSON, with free whitespace between them."""
        found: list[str] = []
        for token in _JSON_TOKEN.findall(text):
            if found:
                found.append(self.rules.space)
            if token == _ARGUMENTS:
                found.append(arguments)
            else:
                found.append('/"[A-Za-z0-9_-]{1,64}"/' if token == '"{id}"' else quoted(token))
        return found

    # one call

    def _object(self, name: str, arguments: str) -> tuple[list[str], list[str], str]:
        """A call as a JSON object: what stands in front of it, the object, and what stands behind it."""
        form = self._form
        text = form.call_begin + name + form.name_to_arguments + _ARGUMENTS + form.call_end
        begin = text.index("{")
        end = text.rindex("}") + 1
        return self._seam(text[:begin]), self._json(text[begin:end], arguments), text[end:]

    def _call(self, *, without_opener: bool) -> str:
        """A call of any tool; without_opener: its first marker has been written."""
        form = self._form
        opener = "".join(self._layout.openers[:1]) if without_opener and not self._layout.in_section else ""
        call_begin = form.call_begin[form.call_begin.index(opener) + len(opener) :]
        calls = []
        for name, arguments in self._arguments:
            if form.keys is not None:
                before, body, after = self._object(name, arguments.text)
                before = self._seam(call_begin[: call_begin.index("{")])
                parts = [*before, *body, *self._seam(after)]
            else:
                parts = [*self._seam(call_begin), quoted(name), *self._after_name(arguments.text)]
            calls.append(" ".join(parts))
        return self.rules(either(calls))

    def _after_name(self, arguments: str) -> list[str]:
        form = self._form
        to_arguments = form.name_to_arguments
        between = self._verbatim(to_arguments) if to_arguments.isspace() else self._seam(to_arguments)
        return [*between, arguments, *self._seam(form.call_end.rstrip())]

    def _named(self, name: str, arguments: str) -> str:
        return " ".join([quoted(name), *self._after_name(arguments)])

    # several calls

    def _calls(self, *, without_opener: bool) -> str:
        """One call or several, without what surrounds them."""
        first = self._call(without_opener=without_opener and not self._layout.in_section)
        if not self._several:
            return first
        each = self._call(without_opener=False)
        between = " ".join(self._seam(self._form.between)) or self.rules.space
        if not self._form.between.isspace() and self._form.between:
            between = f"{self.rules.space} {' '.join(self._seam(self._form.between.strip()))} {self.rules.space}"
        return f"{first} ({between} {each})*"

    def _section(self, opener: str, *, repeats: bool) -> str:
        """The calls with all that surrounds them, behind the opener, which is an expression already."""
        form = self._form
        space = self.rules.space
        if not self._layout.in_section and not self._layout.is_list:
            calls = self._calls(without_opener=True) if repeats else self._call(without_opener=True)
            return f"{opener} {calls}"
        begin = form.section_begin.strip()
        rest = begin[len(self._layout.openers[0]) :] if self._layout.openers else begin
        parts = [opener, *self._seam(rest), space, self._calls(without_opener=False)]
        if form.section_end.strip():
            parts += [space, *self._seam(form.section_end.strip())]
        return " ".join(part for part in parts if part)

    def _opening(self) -> str:
        """The opener as an expression, all of it."""
        return " ".join(self._verbatim(self._layout.openers[0])) if self._layout.openers else ""

    def required(self) -> str:
        """Calls, and nothing else."""
        space = self.rules.space
        ways = [self._section(self._opening(), repeats=True)]
        if self._form.may_be_bare and self._layout.in_section:
            calls = self._calls(without_opener=False)
            ways.append(f'"[" {space} {calls} {space} "]"' if self._layout.is_list else calls)
        return f"{space} {either(ways)}"

    def beside(self, content: str, grammar: Mapping[str, Any]) -> str:
        """Calls, or the content and nothing else: the answer's beginning tells which (see beginnings.py)."""
        ways = []
        if self._layout.openers:
            mark = self._first_mark()
            opener = self._opening() if mark else in_lexemes(self._layout.openers[0], grammar, self.rules)
            ways.append(f"{self.rules.space} {self._section(opener, repeats=True)}")
        if layout_of(self._form, "marked").bare:
            for name, arguments in self._arguments:
                head = in_lexemes(bare_beginning(self._form, name), grammar, self.rules)
                ways.append(self._bare(head, name, arguments))
        return either([*ways, content])

    # an answer that may call tools

    def triggers(self) -> Triggers:
        """What wakes the grammar that `waking` writes."""
        layout = self._layout
        mark = self._first_mark()
        return Triggers(
            token_ids=() if mark is None else (self._ids[mark],),
            texts=layout.openers[:1] if mark is None else (),
            start=layout.bare,
            once=not self._several,
        )

    def _first_mark(self) -> str | None:
        opener = self._layout.openers[0] if self._layout.openers else ""
        return next((character for character in opener if character in self._ids), None)

    def waking(self) -> str:
        """What may come from a trigger on, which is the first thing here."""
        ways = []
        if self._layout.openers:
            ways.append(self._section(self._trigger(), repeats=False))
        if self._layout.bare:
            for name, arguments in self._arguments:
                head = self.rules(f"/{''.join(self._bare_head(name))}/", terminal=True)
                ways.append(self._bare(head, name, arguments))
            ways += self._text_that_begins_like_a_call()
        return either(ways)

    def _trigger(self) -> str:
        """The opener's end as it wakes the grammar: from its token on, or behind any text."""
        opener = self._layout.openers[0]
        mark = self._first_mark()
        if mark is not None:
            return " ".join(self._verbatim(opener[opener.index(mark) :]))
        terms = [without([]), *([self._no_bare_call] if self._layout.bare else [])]
        return self.rules(f"{self.rules(' & '.join(terms), terminal=True)} {quoted(opener)}", lazy=True)

    @property
    def _no_bare_call(self) -> str:
        """A terminal of the texts that don't begin with a bare call."""
        heads = "|".join("".join(self._bare_head(name)) for name, _ in self._arguments)
        return rf"~/(?s:(?:{heads}).*)/"

    def _bare_head(self, name: str) -> list[str]:
        """The characters, as patterns, of what makes a text at the content's beginning a call of this tool."""
        form = self._form
        tokens = ["["] if self._layout.bare == "[" else []
        if form.kind == "pythonic":
            tokens += [form.call_begin + name, form.name_to_arguments.strip()]
        else:
            text = form.call_begin + name + '"'
            tokens += _JSON_TOKEN.findall(text[text.index("{") :])
        return [atom for token in tokens for atom in (r"\s*", *map(literal, token))]

    def _bare(self, head: str, name: str, arguments: Arguments) -> str:
        """A call without its marker, from behind its name on, and the calls that may follow it."""
        form = self._form
        space = self.rules.space
        if form.kind == "pythonic":
            parts = [head, *self._seam(form.name_to_arguments.strip())[1:], arguments.text, quoted(form.call_end[:1])]
        else:
            text = form.call_begin + name + form.name_to_arguments + _ARGUMENTS + form.call_end
            text = text[text.index("{") : text.rindex("}") + 1]
            tokens = self._json(text, arguments.text)
            known = 2 * len(_JSON_TOKEN.findall(text[: text.index(name) + len(name)] + '"'))
            parts = [head, *tokens[known - 1 :]]
        if self._several:
            separator = form.between.strip() or ","
            if self._layout.bare == "[" or form.may_be_bare:
                parts.append(f"({space} {quoted(separator)} {space} {self._bodies()})*")
        if self._layout.bare == "[":
            parts += [space, quoted("]")]
        return " ".join(parts)

    def _bodies(self) -> str:
        """A further call behind a bare one."""
        if self._form.kind == "pythonic":
            return self._call(without_opener=False)
        bodies = [" ".join(self._object(name, arguments.text)[1]) for name, arguments in self._arguments]
        return self.rules(either(bodies))

    def _text_that_begins_like_a_call(self) -> list[str]:
        """The beginning of a text that may become a bare call, and what shows that it does not."""
        beginnings = "|".join(_beginnings(self._bare_head(name)[:-1]) for name, _ in self._arguments)
        opener = self._layout.openers[0] if self._layout.openers else ""
        terms = [rf"/\s*{literal(self._layout.bare)}(?s:.*)/", rf"~/{beginnings}/", self._no_bare_call]
        if opener and self._first_mark() is None:  # whose beginning may stand at the text's end
            terms.append(rf"~/(?s:.*){_beginnings([*map(literal, opener)][:-1])}/")
        other = self.rules(" & ".join(terms), terminal=True)
        return [self.rules(f"/{beginnings}/", terminal=True), self.rules(other, lazy=True)]

    def headed(self, *, is_open: bool, must_call: bool, content: str) -> str:
        """A format whose every message has a header: all of the answer. content: what must stand behind its name."""
        form = self._form
        begin = quoted(form.call_begin)
        named = self.rules(either([self._named(name, arguments.text) for name, arguments in self._arguments]))
        calls = f"{named} ({self.rules.space} {begin} {named})*" if self._several else named
        if must_call:
            return f"{'' if is_open else begin} {calls}"
        header_of_content = f"{quoted(form.content_name)} {quoted(form.name_to_arguments)}"
        if content:
            return f"{'' if is_open else begin} {either([f'{header_of_content} {content}', calls])}"
        text = self.rules(without([form.call_begin]), terminal=True)
        up_to_next = self.rules(f"{self.rules(without([]), terminal=True)} {begin}", lazy=True)
        message = f"{header_of_content} ({text} | {up_to_next} more) | {named} {self.rules.space} ({begin} more)?"
        self.rules.lines.append(f"more: {message}")
        return "more" if is_open else f"({text} | {up_to_next} more)"

    def messages(self, *, must_call: bool, content: str, thinks: Thinks) -> str:
        """Harmony: every message of an answer, of which the last may be a call. The prompt has begun the first.

        content: what the final message must be; then nothing else may be told to the user.
        """
        form = self._form
        start = form.section_begin.split("assistant")[0]
        channel = " ".join(self._verbatim(form.key_begin))
        message = " ".join(self._verbatim(form.name_to_arguments))
        end = " ".join(self._verbatim(form.section_end))
        marks = [form.section_end, start, form.call_end, form.value_end]
        if content and not all(mark in self._ids for mark in marks):
            raise GrammarError("this tokenizer has no tokens for the ends of this model's messages")
        text = self.rules(without([t for t in (form.section_end, start) if t not in self._ids]), terminal=True)
        thought = f'{channel} "analysis" {message} {text}'
        kinds = [] if content else ['"commentary"'] if must_call else ['"commentary"', '"final"']
        said = [f"{channel} {either(kinds)} {message} {text}"] if kinds else []
        as_json = f'({self.rules.space} {" ".join(self._verbatim(form.between))} "json")?'
        calls = []
        for name, arguments in self._arguments:
            to = quoted(form.call_begin + name)
            headers = (f'{channel} "commentary" {to}', f'{to} {channel} "commentary"')
            calls += [f"{header} {as_json} {message} {arguments.text}" for header in headers]
        opening = " ".join([*self._verbatim(start), quoted("assistant")])
        spoken = [*said, *([thought] if thinks == "freely" else [])]
        earlier = [f"({either(spoken)} {end} {opening})*"] if spoken else []
        if thinks == "once":
            earlier.insert(0, f"({thought} {end} {opening})?")
        last = f'{channel} "final" {as_json} {message} {content}' if content else either(spoken)
        lasts = calls if must_call else [*calls, f"{last} ({end})?"]
        return " ".join([*earlier, either(lasts)])


def _beginnings(atoms: Sequence[str]) -> str:
    """A pattern of the beginnings of a text, which has at least one character."""
    pattern = ""
    for atom in reversed(atoms):
        pattern = f"(?:{atom}{pattern})?" if pattern else f"(?:{atom})?"
    return pattern[:-1] if pattern else "(?:)"
