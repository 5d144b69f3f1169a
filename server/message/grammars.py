"""Grammars as the engine takes them: llguidance's JSON, made of schemas, regular expressions, choices, EBNF and Lark.

Each is checked here, without a tokenizer, before anything is queued; a warning counts as an error. Limits are counts
and not times, so that a verdict is the same on every machine: the engine compiles with the same LIMITS.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import msgspec
from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from octavo.runtime.constraint import GrammarError, parser_limits
from octavo.server.message.endless import endless_rule
from octavo.server.message.patterns import PatternError, literal, rust_pattern
from octavo.server.message.schema import MAX_BYTES, Normalizer, check_nesting, normalizer_of
from octavo.server.message.schema_logic import Schema
from octavo.server.message.schema_places import InvalidSchemaError, SchemaError

LIMITS = parser_limits()
MAX_RULES = 500  # of a client's grammar: the translation of EBNF takes the square, and llguidance a piece of the stack
MAX_TRIED = 1 << 20  # bytes of the parts of a schema that are compiled alone, to find the one to blame
MAX_CHOSEN = 1 << 18
MAX_TEXT = 1 << 16  # characters of a client's grammar, each of which costs some microseconds
SHORTEST = 1000  # characters of llguidance's messages
NEEDS_TOKENIZER = "no tokenizer - can't validate <"
OPTIONS = {"lenient": bool, "whitespace_flexible": bool, "whitespace_pattern": str}
RULE = re.compile(r"^[ \t]*[!?]?[A-Za-z_][^\s:\[({]*[^:\n]*:", re.MULTILINE)
WHITESPACE = re.compile(r"(?:[ \t\n\r]|\\[ntrs]|\\x(?:20|0[aAdD9])|[\[\](){}*+?|,]|(?<=[{,0-9])[0-9])*")
BLAME = (
    ("patternProperty", ("patternProperties",)),
    ("min/maxProperties", ("minProperties", "maxProperties")),
    ("regex", ("pattern", "patternProperties", "minLength", "maxLength")),
    ("lookaround", ("pattern", "patternProperties")),
    ("circular", ("$ref",)),
)


class NoSchemaError(GrammarError):
    """What should be a JSON Schema is none, so that leaving out what can't be enforced doesn't help."""


@dataclass(frozen=True, slots=True)
class JsonStyle:
    """How JSON is written. any_whitespace: where the standard allows some; pattern: only what it matches.

    closed: objects that list properties have no others, unless their schema says so.
    """

    any_whitespace: bool = True
    pattern: str | None = None
    closed: bool = False


def json_grammar(schema: Any, style: JsonStyle) -> str:
    """A grammar of a JSON Schema's instances. Raises GrammarError."""
    inner = inner_schema(schema, style)
    return msgspec.json.encode({"grammars": [{"json_schema": inner}]}).decode()


def inner_schema(schema: Any, style: JsonStyle) -> dict[str, Any]:
    """A schema that llguidance enforces exactly, with how to write it under "x-guidance". Raises GrammarError."""
    try:
        check_nesting(schema)
        _check_size(schema)
        options = _options(schema, style)
        lenient = bool(options.get("lenient"))
        normalizer, found = normalizer_of(schema, closed=style.closed, lenient=lenient)
        if found is False:
            raise SchemaError("", "", "no value is valid for it")
        whole = {**({} if isinstance(found, bool) else found), "x-guidance": options}
        error = _problem(_of_schema(whole), lenient=lenient)
        if error is not None:
            raise _blamed(normalizer, error)
    except InvalidSchemaError as invalid:
        raise NoSchemaError(str(invalid)) from None
    except SchemaError as refused:
        raise GrammarError(str(refused)) from None
    return whole


def _check_size(schema: Any) -> None:
    size = len(msgspec.json.encode(schema))
    if size > MAX_BYTES:
        raise SchemaError("", "", f"it has {size} bytes; {MAX_BYTES} is the most")


def _options(schema: Any, style: JsonStyle) -> dict[str, Any]:
    """What "x-guidance" says, or else the request's own fields."""
    options: dict[str, Any] = {"whitespace_flexible": style.any_whitespace}
    if style.pattern is not None:
        options["whitespace_pattern"] = style.pattern
    given = schema.get("x-guidance", {}) if isinstance(schema, dict) else {}
    if not isinstance(given, dict):
        raise SchemaError("x-guidance", "", "must be an object")
    for name, value in given.items():
        if name not in OPTIONS or not isinstance(value, OPTIONS[name]):
            raise SchemaError(
                "x-guidance",
                "",
                f"{name[:40]!r} can't be set to this; lenient, whitespace_flexible (true or false) and "
                "whitespace_pattern are known",
            )
        options[name] = value
    if "whitespace_pattern" in options:
        options["whitespace_pattern"] = whitespace(options["whitespace_pattern"])
    return options


def whitespace(pattern: str) -> str:
    """A pattern of whitespace, which must match nothing that isn't JSON's."""
    if not WHITESPACE.fullmatch(pattern) or len(pattern) > 200:
        raise SchemaError(
            "",
            "",
            f"the whitespace pattern {pattern[:80]!r} is made of more than blanks, \\n, \\t, \\r, \\s and quantifiers",
        )
    return pattern.replace(r"\s", r"\x20\n\r\t" if "[" in pattern else r"[\x20\n\r\t]")


def _of_schema(schema: Schema) -> str:
    return msgspec.json.encode({"grammars": [{"json_schema": schema}]}).decode()


def _problem(grammar: str, *, lenient: bool = False, knows_tokens: bool = False) -> str | None:
    """What is wrong with a grammar. knows_tokens: the token ids in it are those of the model."""
    try:
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a panic in Rust is no Exception
            raise
        return "the grammar compiler failed on it"
    if not failed:
        messages = [] if lenient else [text for text in messages if not (knows_tokens and NEEDS_TOKENIZER in text)]
    if messages and NEEDS_TOKENIZER in messages[0]:
        return "tokens can't be named in a grammar; a structural_tag can name them"
    return messages[0].strip()[:SHORTEST] if messages else None


def _blamed(normalizer: Normalizer, error: str) -> SchemaError:
    """Which part of a schema the compiler's error is about: the innermost one that fails alone in the same way."""
    first_line = error.partition("\n")[0]
    parts = sorted(normalizer.written, key=lambda part: -part[0].pointer.count("/"))
    num_tried = 0
    for place, schema in parts:
        if isinstance(schema, dict):
            alone = _of_schema(normalizer.with_definitions(schema))
            num_tried += len(alone) + 1000
            if num_tried > MAX_TRIED:
                break
            found = _problem(alone)
            if found is not None and found.partition("\n")[0] == first_line:
                named = [name for word, names in BLAME if word in first_line for name in names if name in schema]
                return SchemaError(named[0] if named else "", place.pointer, _on_one_line(error))
    return SchemaError("", "", _on_one_line(error))


def _on_one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def checked(grammar: str, *, knows_tokens: bool = False) -> str:
    """The grammar itself, if it compiles without a warning. Raises GrammarError."""
    error = _problem(grammar, knows_tokens=knows_tokens)
    if error is not None:
        raise GrammarError(error)
    return grammar


def lark_grammar(text: str) -> str:
    """A grammar in llguidance's Lark syntax. Raises GrammarError."""
    return checked(msgspec.json.encode({"grammars": [{"lark_grammar": text}]}).decode())


def regex_terminal(pattern: str) -> str:
    """A regular expression between slashes, as Lark takes it. Raises GrammarError."""
    if len(pattern) > MAX_TEXT:
        raise GrammarError(f"the regular expression has {len(pattern)} characters; {MAX_TEXT} is the most")
    try:
        return f"/{regex_to_lark(rust_pattern(pattern), 'dw')}/"
    except PatternError as error:
        raise GrammarError(f"in the regular expression {pattern[:80]!r} {error}") from None


def regex_grammar(pattern: str) -> str:
    """A grammar of the texts that a regular expression matches in whole. Raises GrammarError."""
    return lark_grammar(f"start: {regex_terminal(pattern)}")


def choice_grammar(choices: list[str]) -> str:
    """A grammar of a few texts. Raises GrammarError."""
    total = sum(map(len, choices))
    if total > MAX_CHOSEN:
        raise GrammarError(f"the choices have {total} characters; {MAX_CHOSEN} is the most")
    return lark_grammar(f"start: /{'|'.join(map(literal, choices))}/")


def is_lark(text: str) -> bool:
    """Whether a grammar is in Lark's syntax, as vLLM tells: EBNF has `::=` outside comments."""
    return not any("::=" in re.sub(r"(?:#|//).*$", "", line) for line in text.splitlines())


def lark_of(text: str, style: JsonStyle) -> str:
    """A client's grammar in Lark's syntax, out of that or EBNF. Raises GrammarError."""
    if len(text) > MAX_TEXT:
        raise GrammarError(f"it has {len(text)} characters; {MAX_TEXT} is the most")
    in_lark = is_lark(text)
    count = len(RULE.findall(text)) if in_lark else text.count("::=")
    if count > MAX_RULES:
        raise GrammarError(f"it has {count} rules; {MAX_RULES} is the most")
    if in_lark:
        return _with_exact_schemas(text, style)
    try:
        return gbnf_to_lark(_without_escapes(text))
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except Exception as error:  # the translator raises nothing more definite
        raise GrammarError(f"it is no EBNF: {str(error)[:300]}") from None


def _with_exact_schemas(text: str, style: JsonStyle) -> str:
    """A grammar whose `%json {...}` are schemas that llguidance enforces exactly."""
    out = []
    for number, piece in enumerate(text.split("%json")):
        if number == 0:
            out.append(piece)
            continue
        rest = piece.lstrip()
        try:
            schema, end = json.JSONDecoder(parse_constant=_refused_number).raw_decode(rest)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"behind %json stands no JSON: {error}") from None
        out.append(f" {msgspec.json.encode(inner_schema(schema, style)).decode()}{rest[end:]}")
    return "%json".join(out)


def _refused_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def _without_escapes(text: str) -> str:
    r"""EBNF whose \xHH, \uHHHH and \UHHHHHHHH are the characters themselves, where these are plain letters."""

    def character(found: re.Match[str]) -> str:
        digits = found[1] or found[2] or found[3]
        if digits is None:  # an escaped backslash
            return found[0]
        value = int(digits, 16)
        if value < 0x20:
            return rf"\x{value:02x}"
        if value > 0x10FFFF or 0xD800 <= value < 0xE000:
            raise GrammarError(f"{found[0]} is no character")
        return "\\" + chr(value) if chr(value) in '"\\[]' else chr(value)

    return re.sub(r"\\\\|\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})", character, text)


def text_grammar(text: str, style: JsonStyle) -> str:
    """A grammar that a client wrote, in EBNF or Lark. Raises GrammarError."""
    lark = lark_of(text, style)
    if rule := endless_rule(lark):
        shown = "root" if rule == "start" and not is_lark(text) else rule
        raise GrammarError(
            f"the rule {shown!r} never ends, since each of its alternatives leads to it again; "
            "it needs an alternative that doesn't"
        )
    return lark_grammar(lark)
