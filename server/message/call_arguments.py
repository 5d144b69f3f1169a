"""A call's arguments in a grammar: JSON, or as formats write them whose arguments stand apart from each other.

There, a string is written as it is, up to the end of its marker; anything else is JSON. A parameter that may be a
string and something else is JSON too, in quotes: the parser reads it back as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.runtime.constraint import GrammarError
from octavo.server.message.format import ToolFormat
from octavo.server.message.input_grammar import InputGrammar
from octavo.server.message.lark_rules import Rules, either, quoted, without
from octavo.server.message.xml_parameters import is_plain, raw_terms

KNOWN = {"type", "properties", "required", "additionalProperties", "$defs", "x-guidance"}
KEY = "/[A-Za-z_][A-Za-z0-9_.-]{0,63}/"  # of a parameter that no schema lists
INPUT = "input"  # the argument of a custom tool
Verbatim = Callable[[str], list[str]]


@dataclass(frozen=True)
class Arguments:
    """An expression for a call's arguments, and the schema by which the parser reads them back."""

    text: str
    schema: Mapping[str, Any]


def arguments_of(
    form: ToolFormat, schema: dict[str, Any], rules: Rules, verbatim: Verbatim, lark: str = ""
) -> Arguments:
    """The arguments that a schema allows, which `inner_schema` has made. Raises GrammarError.

    verbatim gives the pieces of a text of the format. lark: a grammar of the only argument, `input`, which is text.
    """
    if lark:
        return _Params(form, rules, verbatim, {}).input_of(lark)
    if form.kind not in ("params", "pythonic"):
        return Arguments(rules(json_rule(schema)), schema)
    properties, required, is_open = _listed(schema)
    beside: dict[str, Any] = {name: schema[name] for name in ("$defs", "x-guidance") if name in schema}
    writer = _Params(form, rules, verbatim, beside)
    written = {name: writer.parameter(name, part) for name, part in properties.items()}
    read = {"properties": {name: each.schema for name, each in written.items()}}
    if not properties and is_open:
        return Arguments(writer.any_parameters(), read)
    if form.kind == "pythonic":
        return Arguments(_separated({name: each.text for name, each in written.items()}, required, rules), read)
    parts = [f"({each.text})" if name in required else f"({each.text})?" for name, each in written.items()]
    return Arguments(f"({' '.join([rules.space, *parts])})", read)


def json_rule(schema: Any) -> str:
    """The body of a rule for a schema's instances."""
    return f"%json {msgspec.json.encode(schema).decode()}"


def _listed(schema: dict[str, Any]) -> tuple[dict[str, Any], list[str], bool]:
    """The properties of an object, which of them must be there, and whether it may have others."""
    if set(schema) - KNOWN or schema.get("type", "object") != "object":
        raise GrammarError(
            "this model writes arguments one by one, so the schema must be an object that lists its properties, "
            f"without {', '.join(sorted(set(schema) - KNOWN)) or 'another type'} beside them"
        )
    properties = {name: part for name, part in schema.get("properties", {}).items() if part is not False}
    required = schema.get("required", [])
    missing = sorted(set(required) - set(properties))
    if missing:
        raise GrammarError(f"/required: {missing[0]!r} is required, and /properties doesn't list it")
    return properties, required, schema.get("additionalProperties") is not False


class _Params:
    """Writes single parameters."""

    def __init__(self, form: ToolFormat, rules: Rules, verbatim: Verbatim, beside: dict[str, Any]) -> None:
        self._form = form
        self._rules = rules
        self._verbatim = verbatim
        self._beside = beside
        self._tail = form.value_end[: len(form.value_end) - len(form.value_end.lstrip())]
        self._end = form.value_end.strip()

    def input_of(self, lark: str) -> Arguments:
        """The argument of a custom tool, by its grammar."""
        form = self._form
        rules = self._rules
        is_raw = form.kind == "params" or (form.kind == "pythonic" and bool(form.string_quote))
        grammar = InputGrammar(lark, f"I{len(rules.lines)}", in_json=not is_raw)
        rules.lines += grammar.lines
        if is_raw:
            text = f"{rules.space} {self._head(INPUT, is_string=True)} {self._raw([grammar.start])}"
            return Arguments(text, {"properties": {INPUT: {"type": "string"}}})
        value = rules(f'"\\"" {grammar.start} "\\""', terminal=True)
        if form.kind == "pythonic":
            return Arguments(f"{self._head(INPUT, is_string=False)} {value}", {"properties": {INPUT: {}}})
        pieces = [quoted("{"), quoted(f'"{INPUT}"'), quoted(":"), value, quoted("}")]
        return Arguments(f" {rules.space} ".join(pieces), {})

    def parameter(self, name: str, part: Any) -> Arguments:
        """One parameter with its name."""
        is_string = isinstance(part, dict) and part.get("type") == "string"
        if is_string and is_plain(part) and (self._form.kind == "params" or self._form.string_quote):
            return Arguments(f"{self._head(name, is_string=True)} {self._raw(raw_terms(part))}", {"type": "string"})
        whole = {**({} if isinstance(part, bool) else part), **self._beside}
        value = self._rules(json_rule(whole))
        return Arguments(f"{self._head(name, is_string=False)} {self._spaced(value)}", {})

    def any_parameters(self) -> str:
        """Any number of parameters with any names."""
        if self._form.kind == "pythonic":
            value = self._rules(json_rule({}))
            each = self._rules(f"{KEY} {quoted(self._form.key_to_value)} {value}")
            return f'({each} ({self._rules.space} "," {self._rules.space} {each})*)?'
        begin = " ".join(self._verbatim(self._form.key_begin))
        to_value = " ".join(self._verbatim(self._form.key_to_value.replace("{is_string}", "true")))
        return f"({self._rules.space} ({begin} {KEY} {to_value} {self._raw([])})*)"

    def _head(self, name: str, *, is_string: bool) -> str:
        form = self._form
        text = form.key_begin + name + form.key_to_value.replace("{is_string}", "true" if is_string else "false")
        return " ".join(self._verbatim(text))

    def _spaced(self, value: str) -> str:
        """A value as JSON, and its end."""
        if self._form.kind == "pythonic":
            return value
        end = " ".join(self._verbatim(self._end))
        return f"{self._rules.space} {value} {self._rules.space} {end} {self._rules.space}"

    def _raw(self, terms: list[str]) -> str:
        """A string as it is, and its end."""
        form = self._form
        rules = self._rules
        if form.kind == "pythonic":
            quote = self._verbatim(form.string_quote)
            ends_in_text = quote[0].startswith('"')
            text = without([form.string_quote] if ends_in_text else [])
            inner = rules(" & ".join([text, *terms]), terminal=True)
            closing = rules(f"{inner} {quote[0]}", lazy=True) if ends_in_text else f"{inner} {quote[0]}"
            return f"{quote[0]} {closing}"
        end = self._verbatim(self._end)
        if len(end) == 1 and end[0].startswith('"'):
            inner = rules(" & ".join([without([self._end]), *terms]), terminal=True)
            return f"{rules(f'{inner} {quoted(self._tail + self._end)}', lazy=True)} {rules.space}"
        text = rules(" & ".join([without(_beginning(end)), *terms]), terminal=True)
        if self._tail:
            text = rules(f"{text} {quoted(self._tail)}", terminal=True)
        return f"{text} {' '.join(end)} {rules.space}"


def _beginning(end: list[str]) -> list[str]:
    """The text in front of an end's first token, which the string must not have."""
    return [msgspec.json.decode(end[0])] if end[0].startswith('"') else []


def _separated(written: dict[str, str], required: list[str], rules: Rules) -> str:
    """Arguments with commas between them, in the schema's order."""
    first = later = '""'
    comma = f'{rules.space} "," {rules.space}'
    for name, text in reversed(written.items()):
        with_this = f"{text} {later}"
        if name in required:
            first = rules(with_this)
            later = rules(f"{comma} {with_this}")
        else:
            first = rules(either([with_this, first]))
            later = rules(either([f"{comma} {with_this}", later]))
    return f"{rules.space} {first} {rules.space}"
