"""How an answer begins that is calls, where another answer has a constraint: by its first characters the two differ.

A call without a marker begins as the template writes it, to the space. An answer with a constraint can't begin so: its
JSON is written without whitespace where it could, and a pattern doesn't match such texts.

llguidance's lexer never goes back. So what two answers may both begin with is made of the same lexemes in both: of
JSON's beside JSON, of one lexeme beside a pattern; beside other grammars, whose lexemes are unknown, there is no way.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from llguidance import LLMatcher, LLTokenizer

from octavo.runtime.constraint import GrammarError
from octavo.server.message.format import ToolFormat
from octavo.server.message.grammars import LIMITS
from octavo.server.message.lark_rules import Rules, quoted
from octavo.server.message.layout import layout_of
from octavo.server.message.patterns import literal
from octavo.server.message.scan import MARKS

_PATTERN = re.compile(r"start: (/.*/)", re.DOTALL)  # a grammar of one regular expression
_LEXEME = re.compile(r'"[^"]*"|[{}\[\],:]|\s+|[^\s"{}\[\],:]+')
_SPACES = ("", " ", "\n")  # that may stand in front


def bare_beginning(form: ToolFormat, name: str) -> str:
    """How a call of this tool begins without a marker."""
    bracket = "[" if layout_of(form, "marked").bare == "[" else ""
    if form.kind == "pythonic":
        return bracket + form.call_begin + name + form.name_to_arguments.strip()
    return bracket + form.call_begin[form.call_begin.index("{") :] + name + '"'


def bare_beginnings(form: ToolFormat, names: Iterable[str]) -> tuple[str, ...]:
    """The same for all tools, longest first; none where every call has a marker."""
    has_bare = bool(layout_of(form, "marked").bare)
    return tuple(sorted((bare_beginning(form, name) for name in names), key=len, reverse=True)) if has_bare else ()


def told_from_calls(
    grammars: Sequence[Mapping[str, Any]], form: ToolFormat, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Grammars of which the first is that of a content, so that none begins like calls. Raises GrammarError."""
    first = dict(grammars[0])
    bare = bare_beginnings(form, names)
    if bare and "json_schema" not in first and _PATTERN.fullmatch(first["lark_grammar"]) is None:
        raise GrammarError(
            "beside tools a constraint must be a JSON Schema, a regular expression or a choice, as calls of this model "
            "have no marker; choose a tool, or leave out one of both"
        )
    texts = [*layout_of(form, "marked").openers[:1], *bare]
    texts = [text for text in texts if not re.search(f"[{MARKS}]", text)]  # no text has a special token
    if begun := _begun(first, grammars, texts):
        first = _narrowed(first, texts)
        if first == grammars[0]:
            raise GrammarError(f"what the constraint allows may begin with {begun!r}, as this model's calls do")
    return [first, *map(dict, grammars[1:])]


def _begun(first: Mapping[str, Any], grammars: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> str:
    """The first of these texts that what the grammar describes can begin with, if it can.

    JSON: one of which the first character may be the same, since its whitespace could stand in the calls then too.
    """
    if not texts:
        return ""
    whole = msgspec.json.encode({"grammars": [first, *grammars[1:]]}).decode()
    matcher = LLMatcher(_bytes(), whole, log_level=0, limits=LIMITS)
    if matcher.is_error():  # it names special tokens
        return texts[0]
    for text in texts:
        compared = text[:1] if "json_schema" in first else text
        for space in _SPACES:
            written = list((space + compared).encode())
            if matcher.validate_tokens(written) == len(written):
                return text
    return ""


def _narrowed(grammar: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """A grammar of fewer texts, if it is one of those that can be narrowed."""
    schema = grammar.get("json_schema")
    options = schema.get("x-guidance", {}) if isinstance(schema, dict) else {}
    if isinstance(schema, dict) and "whitespace_pattern" not in options:
        return {**grammar, "json_schema": {**schema, "x-guidance": {**options, "whitespace_flexible": False}}}
    found = _PATTERN.fullmatch(grammar.get("lark_grammar", ""))
    if found is None:
        return grammar
    excluded = rf"~/\s*(?s:(?:{'|'.join(map(literal, texts))}).*)/"
    return {**grammar, "lark_grammar": f"start: TEXT\nTEXT: {found[1]} & {excluded}"}


def in_lexemes(text: str, content: Mapping[str, Any], rules: Rules) -> str:
    """How calls begin, beside this content, as an expression."""
    if "json_schema" in content:
        return " ".join(map(quoted, _LEXEME.findall(text)))
    return rules(quoted(text), lazy=True)


@functools.cache
def _bytes() -> LLTokenizer:
    """A vocabulary of single bytes."""
    return LLTokenizer("byte")
