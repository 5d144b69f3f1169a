"""Tool calls out of text: one reader for each kind of ToolFormat, over a Scanner.

A call is opened (a part `call`) once its name is known and its arguments begin, and not before: until then all of it
can be given back as content. From there on what the model writes is the call's, even where it is cut or broken.

A limit or a stop string may cut the answer within a call. The call is opened then if its name is complete, and what was
written of it is dropped if not, since a marker without its call is no content.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from typing import Any

from octavo.server.message.format import Strictness, ToolFormat, is_call_id, literals, new_call_id
from octavo.server.message.layout import layout_of
from octavo.server.message.scan import CutError, MalformedError, Scanner, Stops, escaped, stops_for
from octavo.server.message.values import as_json, is_json, json_string, literal, raw_json, types_of, without_surrogates

Reading = Generator[None, None, None]

_STRING = frozenset({"string"})
_NAME_KEYS = ("name", "tool_name", "function_name")
_BARE_NAME = re.compile(rf"""^[\[{{][\s\[{{]*(?:"(?:{"|".join(_NAME_KEYS)})"\s*:\s*"?|(?<=\[)(?=\w))([^"]*)\Z""")
_ARGUMENT_KEYS = ("arguments", "parameters", "args")


class CallReader:
    """Reads the calls of one answer. `tools`: the request's functions by name, with the schemas of their parameters.

    num_before: calls that the conversation had before this answer.
    """

    def __init__(
        self,
        form: ToolFormat,
        scan: Scanner,
        tools: Mapping[str, Any],
        num_before: int = 0,
        strictness: Strictness = "loose",
    ) -> None:
        self.layout = layout_of(form, strictness)
        self._is_exact = strictness != "loose"
        self._form = form
        self._scan = scan
        self._tools = tools
        self._num_before = num_before
        self.num_calls = 0
        self.num_malformed = 0
        self._is_open = False
        self._next_id = ""
        self._name = ""  # of a call that isn't open yet
        self._held: list[str] = []  # its arguments, where they stand in front of the name

    def section(self, opener: str) -> Reading:
        """The calls behind this opener, which has been read; then the content goes on. What is no call is content."""
        try:
            if self.layout.is_list:
                yield from self._array()
            elif self.layout.in_section and opener == self.layout.openers[0]:
                yield from self._calls_of_section()
            else:
                yield from self._one_call(opener)
            yield from self._end_of_section()
        except MalformedError:
            self.num_malformed += 1
            self._give_back()
        except CutError:
            self._cut()
            raise

    def bare(self) -> Reading:
        """A call without a marker, of which `{` or `[` stands here: it must name one of the tools."""
        scan = self._scan
        scan.record()
        try:
            if self.layout.bare == "[":
                yield from self._array(is_bare=True)
            else:
                yield from self._object(is_bare=True)
                yield from self._rest(self.layout.ends)
        except MalformedError:
            self._give_back()
        except CutError:
            self._cut(is_bare=True)
            raise

    def call_after_header(self) -> Reading:
        """A call whose call_begin the prompt has written already."""
        self._scan.record()
        yield from self._guarded(self._named_json())

    def channel_call(self, name: str, ends: Stops) -> Reading:
        """A call whose message follows: all of it is the arguments. A name that is none makes it content."""
        scan = self._scan
        if not self._valid(name):
            yield from scan.until(ends, "text")
            return
        self._open(name)
        scan.told = []
        try:
            yield from scan.until(ends, "arguments", trim=True)
        except CutError:  # the token that ends the answer says nothing: whole arguments tell that it came
            if is_json("".join(scan.told)):
                self._close()
            raise
        finally:
            scan.told = None
        self._close()

    def cut_call(self, name: str) -> None:
        """A call of which a cut has left the name."""
        self._name = name
        self._cut()

    def _guarded(self, reading: Reading) -> Reading:
        try:
            yield from reading
        except MalformedError:
            self.num_malformed += 1
            self._give_back()
        except CutError:
            self._cut()
            raise

    def _give_back(self) -> None:
        """What was read is no call, but content."""
        self._is_open = False
        self._name = ""
        self._scan.give_back()

    def _cut(self, *, is_bare: bool = False) -> None:
        """The answer has ended within a call, or where one may begin."""
        scan = self._scan
        if scan.is_cut and self._valid(self._name):
            self._open(self._name)
            scan.say("arguments", "".join(self._held))
        elif scan.is_cut and (not is_bare or self._begins_bare(scan.recorded + scan.buffer)):
            scan.forget()
        else:
            scan.give_back_all()

    def _begins_bare(self, text: str) -> bool:
        """Whether a text without a marker has come to the name of one of the tools, so that it must be a call."""
        found = _BARE_NAME.search(text)
        return found is not None and any(name.startswith(found[1]) for name in self._tools)

    def _calls_of_section(self) -> Reading:
        layout = self.layout
        while True:
            yield from self._scan.space()
            if layout.section_end and (yield from self._scan.next_is(layout.section_stop)):
                yield from self._rest(layout.section_end[1:])
                return
            yield from self._rest(self._separators)
            yield from self._scan.expect_all(layout.call)
            yield from self._body()
            self._scan.record()

    @property
    def _separators(self) -> tuple[str, ...]:
        """What may stand between the calls of a section."""
        return literals(self._form.between) if self.num_calls else ()

    def _one_call(self, opener: str) -> Reading:
        """The call whose first marker was the opener."""
        call = self.layout.call
        if call:
            yield from self._scan.expect_all(call[call.index(opener) + 1 :])
        yield from self._body()

    def _end_of_section(self) -> Reading:
        """What stands behind the calls, where it is there: a model may end without it."""
        layout = self.layout
        if self.layout.is_list or not layout.in_section:
            self._scan.record()
            yield from self._rest(layout.section_end)
        self._scan.forget()

    def _rest(self, pieces: tuple[str, ...]) -> Reading:
        for piece in pieces:
            yield from self._scan.space()
            space = self._scan.skipped
            if not (yield from self._scan.next_is(piece)):
                self._scan.unread(space)
                return

    def _body(self) -> Reading:
        """A call from its name, or its object, to its end."""
        if self._form.keys is not None:
            yield from self._object()
            yield from self._ends()
        elif self._form.kind == "params":
            yield from self._params()
        elif self._form.kind == "pythonic":
            yield from self._function()
        else:
            yield from self._named_json()

    def _array(self, *, is_bare: bool = False) -> Reading:
        """Calls between brackets, or a single one without."""
        scan = self._scan
        first = yield from scan.space()
        if first != "[":
            if self._form.kind == "json_array" and first != "{":
                raise MalformedError
            yield from self._elements("")
            return
        scan.drop(1)
        yield from self._elements("]", is_bare=is_bare)

    def _elements(self, closer: str, *, is_bare: bool = False) -> Reading:
        scan = self._scan
        layout = self.layout
        while True:
            first = yield from scan.space()
            if closer and first == closer:
                scan.drop(1)
                scan.forget()
                return
            if (
                not closer
                and self.num_calls
                and layout.section_stop
                and scan.buffer.startswith(layout.section_stop[:1])
            ):
                return
            if (first == "," and not (is_bare and self._is_exact and not self.num_calls)) or (
                first == ";" and self.num_calls
            ):
                scan.drop(1)
                continue
            if self._form.kind == "pythonic":
                yield from scan.expect_all(layout.call)
                yield from self._function(is_bare=is_bare)
            else:
                yield from self._object(is_bare=is_bare)
                if not closer:
                    return
            scan.record()

    def _object(self, *, is_bare: bool = False) -> Reading:
        """A call as a JSON object with its name and its arguments."""
        scan = self._scan
        keys = self._form.keys or ("name", "arguments")
        name: str | None = None
        self._held = []
        yield from scan.expect("{")
        is_exact = is_bare and self._is_exact
        while (first := (yield from scan.space())) != "}":
            if first == "," and not (is_exact and name is None):
                scan.drop(1)
                continue
            if first != '"' and self._is_open:
                break  # the object was never closed
            key = yield from self._key(is_plain=is_exact and name is None)
            if is_exact and name is None and keys[0] not in ("", key):
                raise MalformedError
            yield from scan.expect(":")
            if keys == ("", ""):
                name = key
                yield from self._arguments(key)
            elif key == keys[0] or key in _NAME_KEYS:
                name = yield from self._key(is_plain=is_exact)
                if is_bare and name not in self._tools:
                    raise MalformedError
                self._name = name
            elif (key == keys[1] or key in _ARGUMENT_KEYS) and name is not None:
                yield from self._arguments(name)
            elif key == keys[1] or key in _ARGUMENT_KEYS:
                self._held = []
                yield from raw_json(scan, self._held.append)
            else:
                yield from raw_json(scan, lambda _: None)
        if first == "}":
            scan.drop(1)
        if name is None:
            raise MalformedError
        if not self._is_open:
            self._open(name)
            scan.say("arguments", "".join(self._held) or "{}")
        self._close()

    def _key(self, *, is_plain: bool) -> Generator[None, None, str]:
        """A JSON string. is_plain: one without escapes, as the grammar of a bare call writes it."""
        if not is_plain:
            return (yield from json_string(self._scan))
        yield from self._scan.expect('"')
        text, _ = yield from self._scan.read(stops_for('"'))
        return text

    def _arguments(self, name: str) -> Reading:
        """The arguments as JSON, passed on as they stand. Some models write them as a string that holds JSON."""
        scan = self._scan
        first = yield from scan.space()
        if first == '"':
            text = yield from json_string(scan)
            if not text.lstrip().startswith("{"):
                raise MalformedError
            self._open(name)
            scan.say("arguments", without_surrogates(text))
        elif first == "{":
            self._open(name)
            yield from raw_json(scan, lambda text: scan.say("arguments", text))
        else:
            pieces: list[str] = []
            yield from raw_json(scan, pieces.append)
            if pieces != ["null"]:
                raise MalformedError
            self._open(name)
            scan.say("arguments", "{}")

    def _named_json(self) -> Reading:
        """A call with its name and its JSON side by side."""
        scan = self._scan
        layout = self.layout
        first_end = layout.name_ends[0] if layout.name_ends else "\n" if self._form.name_to_arguments else "{"
        last_end = layout.name_ends[-1] if layout.name_ends else first_end
        name, stop = yield from scan.read(stops_for(first_end, last_end))
        header = name + stop
        if self._form.content_name and name.strip() == self._form.content_name:
            scan.forget()
            return
        self._name = name.strip()
        for piece in layout.name_ends[1:] if stop == first_end else ():
            text, _ = yield from scan.read(stops_for(piece))
            header += text
        name = name.strip()
        call_id = next((word for word in self._ids_in(header) if is_call_id(self._form.id_style, word)), "")
        if first_end == "{":
            scan.buffer = "{" + scan.buffer
        yield from self._arguments_or_none(name, call_id)
        self._close()
        yield from self._ends()

    def _ids_in(self, header: str) -> tuple[str, ...]:
        return (f"functions.{header.rstrip(':')}", header[-9:])

    def _arguments_or_none(self, name: str, call_id: str) -> Reading:
        scan = self._scan
        layout = self.layout
        self._next_id = call_id
        try:
            first = yield from scan.space()
        except CutError:
            if scan.is_cut:
                raise
            first = ""
        if not first or any(end and scan.buffer.startswith(end) for end in layout.ends[:1]):
            if not self._valid(name):
                raise MalformedError
            self._open(name)
            scan.say("arguments", "{}")
        else:
            yield from self._arguments(name)

    def _params(self) -> Reading:
        """A call whose arguments stand between markers of their own."""
        scan = self._scan
        layout = self.layout
        key_begin = literals(self._form.key_begin)
        end = layout.ends[0]
        first_end = layout.name_ends[0] if layout.name_ends else ""
        name, stop = yield from scan.read(stops_for(first_end, key_begin[0], end))
        self._open(name.strip())
        separator = "{"
        while stop != end:
            if stop == key_begin[0]:
                yield from self._rest(key_begin[1:])
                yield from self._param(name.strip(), separator)
                separator = ", "
            yield from scan.space()
            stop = yield from scan.next_is(key_begin[0], end)
            if not stop:
                stop = yield from scan.until(stops_for(key_begin[0], end), None)
        scan.say("arguments", "{}" if separator == "{" else "}")
        self._close()
        yield from self._rest(layout.ends[1:])

    def _param(self, name: str, separator: str) -> Reading:
        """One argument; its type is said by its marker, or by the tool's schema."""
        scan = self._scan
        form = self._form
        key_end, *pieces = literals(form.key_to_value)
        key, _ = yield from scan.read(stops_for(key_end))
        said = ""
        for piece in pieces:
            said, _ = yield from scan.read(stops_for(piece))
        schema = self._tools.get(name)
        root = schema if isinstance(schema, dict) else {}
        properties = root.get("properties")
        types = types_of(properties.get(key) if isinstance(properties, dict) else None, root)
        if "{is_string}" in form.key_to_value:
            types = _STRING if said.strip() == "true" else types if types != _STRING else None
        scan.say("arguments", f'{separator}"{escaped(key)}": ')
        lead = form.key_to_value[len(form.key_to_value.rstrip()) :]
        if lead:
            yield from scan.next_is(lead)
        end = literals(form.value_end)[0]
        tail = form.value_end[: len(form.value_end) - len(form.value_end.lstrip())]
        if types == _STRING:
            scan.say("arguments", '"')
            yield from scan.until(stops_for(tail + end, end), "arguments", escape=True)
            scan.say("arguments", '"')
        else:
            text, _ = yield from scan.read(stops_for(tail + end, end), limit=None)
            scan.say("arguments", as_json(text, types))

    def _function(self, *, is_bare: bool = False) -> Reading:
        """A call as name(key=value, ...)."""
        scan = self._scan
        form = self._form
        opening = form.name_to_arguments.strip() or "("
        closing = self.layout.ends[0]
        equals = form.key_to_value.strip() or "="
        name, _ = yield from scan.read(stops_for(opening))
        name = name.strip()
        if is_bare and name not in self._tools:
            raise MalformedError
        self._open(name)
        separator = "{"
        try:
            while (yield from scan.space()) != closing:
                if scan.buffer[0] == ",":
                    scan.drop(1)
                    continue
                key, _ = yield from scan.read(stops_for(equals))
                scan.say("arguments", f'{separator}"{escaped(key.strip())}": ')
                separator = ", "
                yield from literal(scan, lambda text: scan.say("arguments", text), form.string_quote)
        except MalformedError:
            yield from scan.until(stops_for(closing), None)
            scan.buffer = closing + scan.buffer
        scan.say("arguments", "{}" if separator == "{" else "}")
        self._close()
        yield from self._rest((closing, *self.layout.ends[1:]))

    def _ends(self) -> Reading:
        """What closes a call; text in front of it belongs to nothing, and is dropped."""
        ends = self.layout.ends
        if not ends:
            return
        openers = self.layout.openers
        found = yield from self._scan.until(stops_for(ends[0], *openers), None)
        if found in openers:  # the next call begins where this one's end is missing
            self._scan.buffer = found + self._scan.buffer
        else:
            yield from self._rest(ends[1:])

    def _valid(self, name: str) -> bool:
        return bool(name) and name.isprintable() and not any(character in " \"'{}[]()<>" for character in name)

    def _open(self, name: str) -> None:
        if not self._valid(name):
            raise MalformedError
        self._scan.forget()
        style = self._form.id_style
        call_id = self._next_id or new_call_id(style, name, self._num_before + self.num_calls)
        self._next_id = ""
        self._name = ""
        self._scan.say("call", name, call_id)
        self.num_calls += 1
        self._is_open = True

    def _close(self) -> None:
        self._scan.say("call_end", "")
        self._is_open = False
