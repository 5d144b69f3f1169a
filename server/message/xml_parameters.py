"""Objects whose properties are written as XML-like parameters, as several families of models call tools.

A property that is a string is written raw, up to the end of its parameter; anything else is JSON.
"""

from __future__ import annotations

import json
import re
from typing import Any, Protocol

import msgspec
from llguidance import regex_to_lark

from octavo.server.message.patterns import literal

ANCHOR = re.compile(r"[|^$]|\\\Z")  # what may bind an anchor to a part of the pattern only
BLANK = "/[ \\n\\t]*/"
XML_STYLES = {  # in front of the name, behind it (of raw text, of JSON), behind the value
    "qwen_xml": ("<parameter=", ">", ">", "</parameter>"),
    "minimax_xml": ('<parameter name="', '">', '">', "</parameter>"),
    "deepseek_xml": ('<｜DSML｜parameter name="', '" string="true">', '" string="false">', "</｜DSML｜parameter>"),
    "glm_xml": ("<arg_key>", "</arg_key><arg_value>", "</arg_key><arg_value>", "</arg_value>"),
}


class AddRule(Protocol):
    """Adds a rule to a Lark grammar and gives its name."""

    def __call__(self, body: str, *, terminal: bool = False, lazy: bool = False) -> str: ...


def xml_parameters(schema: dict[str, Any], style: str, rule: AddRule) -> str | None:
    """An expression for an object's parameters, in the order of its normalized schema; None where that isn't plain.

    Properties that the schema doesn't list are not written, even where it allows them.
    """
    known = {"type", "properties", "required", "additionalProperties", "$defs", "x-guidance"}
    if set(schema) - known or schema.get("type") != "object":
        return None
    beside: dict[str, Any] = {name: schema[name] for name in ("$defs", "x-guidance") if name in schema}
    properties = {name: part for name, part in schema.get("properties", {}).items() if part is not False}
    required = schema.get("required", [])
    if not set(required) <= set(properties):
        return None
    out = [BLANK]
    for name, part in properties.items():
        parameter = f"{_parameter(name, part, beside, style, rule)} {BLANK}"
        out.append(f"({parameter})" if name in required else f"({parameter})?")
    return f"({' '.join(out)})"


def _parameter(name: str, part: Any, beside: dict[str, Any], style: str, rule: AddRule) -> str:
    before, of_text, of_json, after = XML_STYLES[style]
    if isinstance(part, dict) and part.get("type") == "string" and is_plain(part):
        return f"{_quoted(before + name + of_text)} {_raw(part, after, rule)}"
    whole = {**({} if isinstance(part, bool) else part), **beside}
    value = rule(f"%json {msgspec.json.encode(whole).decode()}")
    return f"{_quoted(before + name + of_json)} {BLANK} {value} {BLANK} {_quoted(after)}"


def is_plain(part: dict[str, Any]) -> bool:
    """Whether a string's schema can be enforced on the raw text: what else it has is written as JSON."""
    if set(part) & {"$ref", "allOf", "anyOf", "format"}:
        return False
    pattern = part.get("pattern")
    return pattern is None or (pattern[:1] == "^" and pattern[-1:] == "$" and not ANCHOR.search(pattern[1:-1]))


def _raw(part: dict[str, Any], after: str, rule: AddRule) -> str:
    """A string as it is, and the end of its parameter."""
    terms = [rf"~/(?s:.*){literal(after)}(?s:.*)/", *raw_terms(part)]
    text = rule(" & ".join([r"/(?s:.*)/", *terms]), terminal=True)
    return rule(f"{text} {_quoted(after)}", lazy=True)


def raw_terms(part: dict[str, Any]) -> list[str]:
    """What a plain string's schema says, as terminals that the text itself must match."""
    terms = []
    values = [part["const"]] if "const" in part else part.get("enum")
    if values is not None:
        terms.append(f"/{'|'.join(literal(value) for value in values if isinstance(value, str))}/")
    if "minLength" in part or "maxLength" in part:
        terms.append(f"/(?s:.{{{part.get('minLength', 0)},{part.get('maxLength', '')}}})/")
    if "pattern" in part:
        terms.append(f"/{regex_to_lark(part['pattern'][1:-1], 'dw')}/")
    return terms


def _quoted(text: str) -> str:
    return json.dumps(text)
