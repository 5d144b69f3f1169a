"""The grammar of calls, against the parser: whatever is written under its mask is read as calls whose arguments
jsonschema accepts, in every format; and what is no call is free."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest
from call_walks import CALL_SCHEMAS, FIRST_SPECIAL, Walker

from octavo.runtime.constraint import GrammarError
from octavo.runtime.messages import Constraint
from octavo.server.message.call_constraint import WantedCalls, WantedTool, grammar_of_calls
from octavo.server.message.call_grammar import CallGrammar
from octavo.server.message.calls import layout_of
from octavo.server.message.constrain import json_grammar
from octavo.server.message.grammars import JsonStyle
from octavo.server.message.parse import Formats, Machine
from octavo.server.message.parts import Part, calls_of, text_of
from octavo.server.message.presets import TOOL_PRESETS

DISTINCT = {form: name for name, form in reversed(TOOL_PRESETS.items())}
HEADS = {"{": '{"name": "get"', "[": '[{"name": "get_weather"'}


def bound(name: str, *, has_tokens: bool) -> Formats:
    """A format whose markers are tokens, or text."""
    form = TOOL_PRESETS[name]
    tokens = sorted(set(re.findall(r"<[^<>\s]+>|\[[A-Z_]+\]", "".join(form.markers())))) if has_tokens else []
    return Formats.bind(form, None, {token: FIRST_SPECIAL + number for number, token in enumerate(tokens)})


def wanted(schemas: Mapping[str, Any] = CALL_SCHEMAS, **settings: Any) -> WantedCalls:
    tools = [WantedTool(name, schema, f"tools.{name}") for name, schema in schemas.items()]
    return WantedCalls(tools, **settings)


def walker_of(formats: Formats) -> Walker:
    return Walker({mark: token_id for token_id, mark in formats.marks.items()})


def read(formats: Formats, found: CallGrammar, text: str, *, is_open: bool = False) -> list[Part]:
    machine = Machine(formats, tools=found.schemas, strictness="exact", call_is_open=is_open)
    machine.feed(text)
    machine.finish()
    assert machine.num_malformed == 0
    return machine.take()


def check_calls(parts: list[Part], schemas: Mapping[str, Any] = CALL_SCHEMAS) -> int:
    calls = calls_of(parts)
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])
    return len(calls)


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize("name", DISTINCT.values())
def test_required_calls(name: str, has_tokens: bool) -> None:
    formats = bound(name, has_tokens=has_tokens)
    form = TOOL_PRESETS[name]
    is_open = bool(form.content_name)
    walker = walker_of(formats)
    for several in (True, False):
        found = grammar_of_calls(wanted(mode="required", several=several, is_open=is_open), formats)
        assert found.triggers is None
        num_calls = []
        for seed in range(6):
            text = walker.walk(Constraint(found.text), seed)
            if text is not None:
                parts = read(formats, found, text, is_open=is_open)
                num_calls.append(check_calls(parts))
                assert text_of(parts) == "" or form.kind == "channel"
        assert min(num_calls) >= 1
        assert max(num_calls) == 1 or (several and form.may_repeat)


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize("name", DISTINCT.values())
def test_calls_from_their_trigger_on(name: str, has_tokens: bool) -> None:
    formats = bound(name, has_tokens=has_tokens)
    form = TOOL_PRESETS[name]
    found = grammar_of_calls(wanted(is_open=bool(form.content_name)), formats)
    walker = walker_of(formats)
    constraint = Constraint(found.text, triggers=found.triggers)
    beginnings = [""]
    if found.triggers is not None:
        beginnings = [formats.marks[token_id] for token_id in found.triggers.token_ids]
        beginnings += [f"text, and then {text}" for text in found.triggers.texts]
        if form.kind == "pythonic" and found.triggers.start:
            beginnings.append("[get_weather(")
        elif found.triggers.start:
            beginnings.append(HEADS[found.triggers.start])
    num_read = 0
    for begun in beginnings:
        for seed in range(6):
            text = walker.walk(constraint, seed, begun)
            if text is not None:
                num_calls = check_calls(read(formats, found, text, is_open=bool(form.content_name)))
                num_read += num_calls
                assert num_calls or found.triggers is None, text
    assert num_read


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "pythonic", "xlam"])
@pytest.mark.parametrize(
    "text", ["{", '{"name": "gex', '{"a": 1}', "[1, 2]", "[link](there)", "[get", '{"name": "get_weathe"}', "", "a < b"]
)
def test_what_only_looks_like_a_call_is_free(name: str, text: str) -> None:
    """The answer may end there, and the mask allows each of its characters."""
    formats = bound(name, has_tokens=False)
    found = grammar_of_calls(wanted(), formats)
    walker = walker_of(formats)
    progress = walker.start(Constraint(found.text, triggers=found.triggers))
    for token_id in walker.ids(text):
        if progress.holds:
            assert token_id in walker.allowed(progress)
        progress.accept(token_id)
    assert not progress.error
    assert not progress.holds or 256 in walker.allowed(progress)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "get", "arguments": [',
        '{"name": "get", "x',
        ' {"name" :"get_weather","arguments":{"u',
        'so <tool_call>{"name": "none", "arguments": {"',
        "so <tool_call> s",
        'so <tool_call>\n{"name": "gex',
    ],
)
def test_what_is_a_call_is_not_free(text: str) -> None:
    formats = bound("hermes", has_tokens=False)
    found = grammar_of_calls(wanted(), formats)
    walker = walker_of(formats)
    progress = walker.start(Constraint(found.text, triggers=found.triggers))
    *most, last = walker.ids(text)
    for token_id in most:
        if progress.holds:
            assert token_id in walker.allowed(progress)
        progress.accept(token_id)
    assert progress.holds
    assert last not in walker.allowed(progress)


def test_content_or_calls() -> None:
    """Where the answer has a constraint, it obeys that, or it calls; JSON that looks like a call is none."""
    schema = {"type": "object", "properties": {"name": {"enum": ["get", "x"]}}, "required": ["name"]}
    content = Constraint(json_grammar({**schema, "additionalProperties": False}, JsonStyle()))
    formats = bound("hermes", has_tokens=True)
    found = grammar_of_calls(wanted(), formats, content)
    assert found.triggers is None
    walker = walker_of(formats)
    kinds = set()
    for seed in range(24):
        text = walker.walk(Constraint(found.text), seed)
        assert text is not None
        machine = Machine(formats, tools=found.schemas, strictness="marked")
        machine.feed(text)
        machine.finish()
        parts = machine.take()
        kinds.add(bool(check_calls(parts)))
        if not calls_of(parts):
            jsonschema.validate(json.loads(text), schema)
    assert kinds == {True, False}
    for name in ("llama3_json", "openai", "functionary_v3_2", "pythonic"):
        with pytest.raises(GrammarError, match="can't be told from"):
            grammar_of_calls(wanted(), bound(name, has_tokens=False), content)


UNENFORCEABLE = {"type": "object", "properties": {"a": {"not": {"type": "string", "pattern": "x"}}}}


def test_a_strict_tool_that_can_not_be_enforced_is_refused_and_named() -> None:
    formats = bound("hermes", has_tokens=False)
    place = "tools.0.function.parameters"
    with pytest.raises(GrammarError, match=r"tools\.0\.function\.parameters: /properties/a/not"):
        grammar_of_calls(WantedCalls([WantedTool("f", UNENFORCEABLE, place, is_strict=True)]), formats)
    loose = grammar_of_calls(WantedCalls([WantedTool("f", UNENFORCEABLE, place)], "required"), formats)
    text = walker_of(formats).walk(Constraint(loose.text), 1)
    assert text is not None
    [call] = calls_of(read(formats, loose, text))[:1]
    assert isinstance(json.loads(call.arguments), dict)
    flat = {"anyOf": [{"type": "object", "properties": {"a": {"type": "string"}}}, {"type": "object"}]}
    tool = WantedTool("f", flat, place, is_strict=True)
    with pytest.raises(GrammarError, match=r"^tools\.0\.function\.parameters: this model writes arguments one by one"):
        grammar_of_calls(WantedCalls([tool]), bound("qwen3_coder", has_tokens=False))


@pytest.mark.parametrize("level", ["auto", "function", "parameter"])
@pytest.mark.parametrize("is_strict", [True, False])
def test_levels(level: Any, is_strict: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    calls = WantedCalls([WantedTool("f", schema, "tools.0", is_strict=is_strict)], level=level)
    assert calls.are_constrained == (level != "auto" or is_strict)
    formats = bound("hermes", has_tokens=False)
    found = grammar_of_calls(calls, formats)
    walker = walker_of(formats)
    progress = walker.start(Constraint(found.text, triggers=found.triggers), '<tool_call>{"name": "f", "arguments": {')
    may_be_empty = ord("}") in walker.allowed(progress)
    assert may_be_empty == (not is_strict and level != "parameter")


def test_layouts_that_are_read_exactly() -> None:
    form = TOOL_PRESETS["qwen3_coder"]
    assert layout_of(form).openers == ("<tool_call>", "<function=")
    assert layout_of(form, "exact").openers == ("<tool_call>",)
    assert layout_of(TOOL_PRESETS["hermes"], "marked").bare == ""
