"""Values of arguments, read as they stream: JSON as it stands, literals of other notations turned into JSON.

JSON passes byte for byte. Two things that a model does wrong are mended on the way, since they'd make all of it
unreadable: a raw control character within a string, and brackets left open where the call's end marker stands.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Generator, Mapping
from typing import Any

from octavo.server.message.scan import MARKS, CutError, MalformedError, Scanner, escaped, stops_for

Say = Callable[[str], None]

_IN_STRING = re.compile(rf'["\\\x00-\x1f{MARKS}]')
_STRUCTURE = re.compile(r"[^\s\w:,.+\-]")  # quotes and brackets, and what can't stand outside of a string
_SCALAR = re.compile(r"[-+.\w]+")
_CLOSER = {"{": "}", "[": "]"}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0", "\n": ""}
_STRING = frozenset({"string"})
_SURROGATE = re.compile("[\ud800-\udfff]")
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


def raw_json(scan: Scanner, say: Say) -> Generator[None, None, None]:
    """One JSON value, said as it stands. Raises MalformedError where none begins."""
    first = yield from scan.space()
    if first == '"':
        yield from _raw_string(scan, say)
    elif first in _CLOSER:
        yield from _raw_container(scan, say)
    else:
        say((yield from _word(scan)))


def json_string(scan: Scanner) -> Generator[None, None, str]:
    """The text of a JSON string that stands here. Raises MalformedError where something else does."""
    first = yield from scan.space()
    if first != '"':
        raise MalformedError
    pieces: list[str] = []
    yield from _raw_string(scan, pieces.append)
    try:
        text: str = json.loads("".join(pieces))
    except ValueError:
        raise MalformedError from None
    return text


def _said_until(scan: Scanner, pattern: re.Pattern[str], say: Say) -> Generator[None, None, re.Match[str]]:
    """Say all that stands before the next match, which is then the buffer's beginning, and return it."""
    while True:
        buffer = scan.buffer
        found = pattern.search(buffer)
        end = len(buffer) if found is None else found.start()
        if end:
            say(buffer[:end])
            scan.drop(end)
        if found is not None:
            return found
        yield from scan.more()


def _raw_string(scan: Scanner, say: Say) -> Generator[None, None, None]:
    scan.drop(1)
    say('"')
    while True:
        found = yield from _said_until(scan, _IN_STRING, say)
        if found[0] == '"':
            scan.drop(1)
            say('"')
            return
        elif found[0] == "\\":
            while len(scan.buffer) < 2:
                yield from scan.more()
            say(scan.buffer[:2])
            scan.drop(2)
        elif found[0] < " ":
            scan.drop(1)
            say(escaped(found[0]))
        else:  # a special token: the string was never closed
            say('"')
            return


def _raw_container(scan: Scanner, say: Say) -> Generator[None, None, None]:
    open_brackets: list[str] = []
    while True:
        found = yield from _said_until(scan, _STRUCTURE, say)
        if found[0] == '"':
            yield from _raw_string(scan, say)
        elif found[0] in _CLOSER:
            open_brackets.append(found[0])
            say(found[0])
            scan.drop(1)
        elif open_brackets and found[0] == _CLOSER[open_brackets[-1]]:
            open_brackets.pop()
            say(found[0])
            scan.drop(1)
            if not open_brackets:
                return
        else:
            say("".join(_CLOSER[bracket] for bracket in reversed(open_brackets)))
            return


def _word(scan: Scanner) -> Generator[None, None, str]:
    """A number or a name. Raises MalformedError where none begins."""
    while True:
        found = _SCALAR.match(scan.buffer)
        if found is None:
            raise MalformedError
        if scan.is_cut and found.end() == len(scan.buffer):
            raise CutError
        if found.end() < len(scan.buffer) or scan.ended:
            scan.drop(found.end())
            return found[0]
        yield


def literal(scan: Scanner, say: Say, quote: str) -> Generator[None, None, None]:
    """One literal, said as JSON: Python's, or with strings between `quote` and names as keys (Gemma 4)."""
    first = yield from scan.space()
    if first in "[(":
        yield from _sequence(scan, say, quote, "]" if first == "[" else ")")
        return
    if first == "{":
        yield from _mapping(scan, say, quote)
        return
    found = yield from scan.next_is(quote, '"', "'")
    if found:
        say('"')
        yield from _quoted(scan, say, found, has_escapes=found != quote)
        say('"')
        return
    word = yield from _word(scan)
    say(_WORDS.get(word) or (word if is_json(word) else json.dumps(word, ensure_ascii=False)))


def _sequence(scan: Scanner, say: Say, quote: str, closer: str) -> Generator[None, None, None]:
    scan.drop(1)
    say("[")
    separator = ""
    while (yield from scan.space()) != closer:
        say(separator)
        separator = ", "
        yield from literal(scan, say, quote)
        if (yield from scan.space()) == ",":
            scan.drop(1)
        elif scan.buffer[0] != closer:
            raise MalformedError
    scan.drop(1)
    say("]")


def _mapping(scan: Scanner, say: Say, quote: str) -> Generator[None, None, None]:
    scan.drop(1)
    say("{")
    separator = ""
    while (yield from scan.space()) != "}":
        say(separator + '"')
        separator = ", "
        found = yield from scan.next_is(quote, '"', "'")
        if found:
            yield from _quoted(scan, say, found, has_escapes=found != quote)
            yield from scan.expect(":")
        else:
            key, _ = yield from scan.read(stops_for(":"))
            say(escaped(key.strip()))
        say('": ')
        yield from literal(scan, say, quote)
        if (yield from scan.space()) == ",":
            scan.drop(1)
        elif scan.buffer[0] != "}":
            raise MalformedError
    scan.drop(1)
    say("}")


def _quoted(scan: Scanner, say: Say, quote: str, *, has_escapes: bool) -> Generator[None, None, None]:
    """A string's inside, up to its closing quote."""
    stops = stops_for(quote, "\\") if has_escapes else stops_for(quote)
    while True:
        buffer = scan.buffer
        found = stops.full.search(buffer)
        end = found.start() if found is not None else stops.held_from(buffer)
        if end:
            say(escaped(buffer[:end]))
            scan.drop(end)
        if found is None:
            yield from scan.more()
        elif found[0] == quote:
            scan.drop(len(quote))
            return
        else:
            scan.drop(1)
            say((yield from _escape(scan)))


def _escape(scan: Scanner) -> Generator[None, None, str]:
    """One of Python's escapes, whose backslash has been read, as it stands in a JSON string."""
    while not scan.buffer:
        yield from scan.more()
    letter = scan.buffer[0]
    count = _HEX_DIGITS.get(letter, 0)
    while len(scan.buffer) < 1 + count:
        yield from scan.more()
    if count:
        try:
            character = chr(int(scan.buffer[1 : 1 + count], 16))
        except ValueError:
            return "\\\\"  # no escape: what follows stands for itself
        scan.drop(1 + count)
        return without_surrogates(escaped(character))
    scan.drop(1)
    return escaped(_ESCAPES.get(letter, letter if letter in "\\'\"" else "\\" + letter))


def without_surrogates(text: str) -> str:
    """JSON with halves of surrogate pairs, which are no text, as escapes."""
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def is_json(text: str) -> bool:
    """Whether a text is a whole value of JSON."""
    try:
        json.loads(text, parse_constant=_refuse)
    except ValueError:
        return False
    return True


def _refuse(word: str) -> None:
    """NaN and Infinity are Python's words, not JSON's."""
    raise ValueError(word)


def types_of(schema: object, root: Mapping[str, Any], depth: int = 8) -> frozenset[str] | None:
    """The JSON types that a schema allows, as far as it says so plainly; None where it doesn't."""
    if not isinstance(schema, dict) or depth == 0:
        return None
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for key in reference[2:].split("/"):
            target = target.get(key) if isinstance(target, dict) else None
        return types_of(target, root, depth - 1)
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset((named,))
    if isinstance(named, list):
        return frozenset(name for name in named if isinstance(name, str))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return frozenset(_type_name(value) for value in values)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            found = [types_of(choice, root, depth - 1) for choice in schema[key]]
            known = [types for types in found if types is not None]
            return frozenset().union(*known) if len(known) == len(found) else None
    return None


def _type_name(value: object) -> str:
    match value:
        case str():
            return "string"
        case bool():
            return "boolean"
        case None:
            return "null"
        case int() | float():
            return "number"
        case list():
            return "array"
        case _:
            return "object"


def as_json(text: str, types: frozenset[str] | None) -> str:
    """An argument written without quotes, as JSON: of one of these types where it can be, else of the one it looks
    like; what is no JSON value is a string.
    """
    stripped = text.strip()
    candidate = _WORDS.get(stripped, stripped)
    try:
        found = _type_name(json.loads(candidate, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return _python_as_json(stripped) if stripped[:1] in "[{(" and types != _STRING else _string(text)
    accepted = types is None or found in types or (found == "number" and "integer" in types)
    if not accepted and "string" in (types or ()):
        return _string(text)
    return candidate


def _python_as_json(text: str) -> str:
    """A list or a dict as Python writes it; what is none is a string."""
    try:
        return json.dumps(ast.literal_eval(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return _string(text)


def _string(text: str) -> str:
    return f'"{escaped(text)}"'
