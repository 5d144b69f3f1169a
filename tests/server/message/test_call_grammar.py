"""The grammar of calls, against the parser: whatever is written under its mask is read as calls whose arguments
jsonschema accepts, in every format; and what is no call is free."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest
from byte_grammar import ByteGrammar
from call_walks import CALL_SCHEMAS, FIRST_SPECIAL, Walker

from octavo.runtime.constraint import GrammarError
from octavo.runtime.messages import Constraint, Reasoning
from octavo.server.message.call_constraint import StrictLevel, WantedCalls, WantedTool, grammar_of_calls
from octavo.server.message.call_grammar import CallGrammar
from octavo.server.message.constrain import json_grammar
from octavo.server.message.grammars import JsonStyle, choice_grammar, regex_grammar, text_grammar
from octavo.server.message.layout import layout_of
from octavo.server.message.parse import Formats, Machine
from octavo.server.message.parts import Part, append_parts, calls_of, text_of
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


LIKE_A_CALL = {
    "type": "object",
    "properties": {"name": {"enum": ["get", "x"]}, "parameters": {"type": "object"}, "arguments": {"type": "object"}},
    "required": ["name"],
    "additionalProperties": False,
}
CONTENT_SCHEMAS: dict[str, Any] = {
    "like a call": LIKE_A_CALL,
    "like calls": {"type": "array", "items": LIKE_A_CALL, "minItems": 1, "maxItems": 2},
    "any object": {"type": "object"},
}
CHOICES = ["yes", '{"no"}', "[get"]
PATTERN = "[^a]{0,40}"
CONTENTS = {kind: json_grammar(schema, JsonStyle()) for kind, schema in CONTENT_SCHEMAS.items()}
CONTENTS |= {"choice": choice_grammar(CHOICES), "pattern": regex_grammar(PATTERN)}
CONTENT_BEGINNINGS = {
    "like a call": '{"name":"get"',
    "like calls": '[{"name":"x"',
    "any object": '{"nam',
    "pattern": "[get",
    "choice": "[g",
}
CALL_BEGINNINGS = {
    "hermes": "<tool_call>",
    "llama3_json": '{"name": "get"',
    "openai": "<|channel|>commentary to=functions.get",
    "functionary_v3_2": "get\n",
    "pythonic": "[get(",
    "llama4_pythonic": "[get_weather(",
    "xlam": '[{"name": "get"',
    "mistral": "[TOOL_CALLS]get",
    "granite": "<|tool_call|>",
}


def marked(formats: Formats, text: str) -> str:
    """A text whose special tokens are the format's marks."""
    for mark, token in formats.shown.items():
        text = text.replace(token, mark)
    return text


def check_content(kind: str, text: str) -> None:
    if kind in CONTENT_SCHEMAS:
        jsonschema.validate(json.loads(text), CONTENT_SCHEMAS[kind])
    elif kind == "choice":
        assert text in CHOICES
    else:
        assert re.fullmatch(PATTERN, text)


def said_beside_content(formats: Formats, found: CallGrammar, text: str, *, is_open: bool) -> list[Part]:
    """The parts, which are the same however the answer is cut."""
    said: list[list[Part]] = []
    for size in (len(text) + 1, 1):
        machine = Machine(formats, tools=found.schemas, strictness="marked", call_is_open=is_open)
        parts: list[Part] = []
        for start in range(0, len(text), size):
            machine.feed(text[start : start + size])
            append_parts(parts, machine.take())
        machine.finish()
        append_parts(parts, machine.take())
        assert machine.num_malformed == 0
        said.append(parts)
    whole, by_character = ([(part.kind, part.text) for part in parts] for parts in said)
    assert whole == by_character
    assert all(call.is_complete for call in calls_of(said[0]))
    return said[0]


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize("name", CALL_BEGINNINGS)
def test_content_or_calls(name: str, has_tokens: bool, kind: str) -> None:
    """Where the answer has a constraint, it obeys that, or it calls, and it is read as what it is."""
    formats = bound(name, has_tokens=has_tokens or name == "openai")
    is_open = bool(TOOL_PRESETS[name].content_name)
    found = grammar_of_calls(wanted(is_open=is_open), formats, Constraint(CONTENTS[kind]))
    assert found.triggers is None
    begun = marked(formats, CALL_BEGINNINGS[name])
    walker = walker_of(formats)
    for beginning, is_call in ((begun, True), (CONTENT_BEGINNINGS[kind], False)):
        beginning = f"all\n{beginning}" if is_open and not is_call else beginning
        if name == "openai" and not is_call:
            beginning = marked(formats, f"<|channel|>final<|message|>{beginning}")
        ended = 0
        for seed in range(2):
            text = walker.walk(Constraint(found.text), seed, beginning, limit=400)
            if text is not None:
                ended += 1
                parts = said_beside_content(formats, found, text, is_open=is_open)
                assert bool(check_calls(parts)) == is_call, text
                if is_call:
                    assert text_of(parts) == ""
                else:
                    check_content(kind, text_of(parts))
        assert ended


def test_content_that_begins_like_a_call_is_refused_where_it_can_not_be_told_from_one() -> None:
    formats = bound("llama3_json", has_tokens=False)
    for content, says in (
        (text_grammar('start: "{" /.*/', JsonStyle()), "must be a JSON Schema, a regular expression or a choice"),
        (json_grammar({"type": "object"}, JsonStyle(pattern=" ?")), 'may begin with \'{"name": "get'),
    ):
        with pytest.raises(GrammarError, match=says):
            grammar_of_calls(wanted(), formats, Constraint(content))
        assert grammar_of_calls(wanted(mode="required"), formats, Constraint(content)).triggers is None


def test_an_answer_with_channels_obeys_in_its_last_one() -> None:
    """gpt-oss thinks freely, then says what the constraint allows, and nothing beside it."""
    formats = bound("openai", has_tokens=True)
    found = grammar_of_calls(WantedCalls(()), formats, Constraint(choice_grammar(["yes", "no"])))
    walker = walker_of(formats)
    said = set()
    for seed in range(12):
        text = walker.walk(Constraint(found.text), seed)
        if text is not None:
            said.add(text_of(said_beside_content(formats, found, text, is_open=False)))
    assert said == {"yes", "no"}
    progress = walker.start(Constraint(found.text))
    thought = "<|channel|>analysis<|message|>I say: maybe<|end|><|start|>assistant<|channel|>"
    for token_id in walker.ids(marked(formats, thought)):
        assert token_id in walker.allowed(progress)
        progress.accept(token_id)
    assert {chr(token_id) for token_id in walker.allowed(progress)} == {"a", "f"}
    with pytest.raises(GrammarError, match="no tokens for the ends of this model's messages"):
        grammar_of_calls(WantedCalls(()), bound("openai", has_tokens=False), Constraint(choice_grammar(["yes"])))


def test_nothing_stands_behind_a_call_but_another_message() -> None:
    """Functionary's text has a header of its own."""
    formats = bound("functionary_v3_2", has_tokens=False)
    found = grammar_of_calls(wanted(is_open=True), formats)
    walker = walker_of(formats)
    behind = walker.allowed(walker.start(Constraint(found.text), "get\n{}"))
    assert {chr(token_id) for token_id in behind} == {" ", "\t", "\n", "\r", ">", chr(256)}
    text = "all\nI look. >>\n>>>get\n{}\n>>>all\nSo >>> it is"
    progress = walker.start(Constraint(found.text))
    for token_id in walker.ids(text[: text.index(" it is")]):
        assert token_id in walker.allowed(progress)
        progress.accept(token_id)


@pytest.mark.parametrize("content", [None, "yes"])
@pytest.mark.parametrize("mode", ["auto", "required"])
def test_a_budget_of_an_answer_with_channels(mode: Any, content: str | None) -> None:
    """It thinks once, and no longer than it may; then it calls, or says what it must."""
    formats = bound("openai", has_tokens=True)
    constraint = None if content is None else Constraint(choice_grammar([content]))
    found = grammar_of_calls(wanted(mode=mode), formats, constraint, "once")
    ids = {token: token_id for token_id, mark in formats.marks.items() for token in [formats.shown[mark]]}
    end = ids["<|end|>"]
    begin = (ids["<|channel|>"], "analysis", ids["<|message|>"])
    reasoning = Reasoning((end,), begin=begin, budget=5, closing=(end,), in_grammar=True)
    walker = walker_of(formats)
    for seed in range(6):
        begun = marked(formats, "<|channel|>analysis<|message|>")
        text = walker.walk(Constraint(found.text, reasoning), seed, begun, limit=400)
        if text is not None:
            thought, _, rest = text.removeprefix(begun).partition(formats.marks[end])
            assert len(thought.encode()) <= 5
            assert "analysis" not in rest
            machine = Machine(formats, tools=found.schemas, strictness="exact")
            machine.feed(text)
            machine.finish()
            parts = machine.take()
            num_calls = check_calls(parts)
            assert num_calls or mode == "auto"
            assert num_calls or content is None or text_of(parts) == content


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


@pytest.mark.parametrize(
    ("name", "none", "some"),
    [
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', ("{}", '{"a": 1}')),
        (
            "qwen3_coder",
            "<tool_call>\n<function=now>\n</function>\n</tool_call>",
            ("w>\n", "w>\n<parameter=a>\n1\n</parameter>\n"),
        ),
        ("olmo3", "<function_calls>now()</function_calls>", ("()", "(a=1)")),
    ],
)
def test_a_function_without_parameters_takes_none(name: str, none: str, some: tuple[str, str]) -> None:
    tools = [WantedTool("now", None, "tools.0")]
    grammar = ByteGrammar(grammar_of_calls(WantedCalls(tools, "required"), bound(name, has_tokens=False)).text)
    assert grammar.accepts(none)
    assert not grammar.accepts(none.replace(*some))


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "foo"}, "/type: must be one or several of"),
        (
            {"type": "object", "properties": {"a": {"not": {}, "anyOf": [{"type": "text"}]}}},
            "/properties/a/anyOf/0/type",
        ),
        ({"properties": {"a": {"type": "string", "required": True}}}, "/properties/a/required: must be a list"),
        ({"properties": {"a": "string"}}, "/properties/a: a schema must be an object"),
    ],
)
def test_parameters_that_are_no_schema_are_refused(schema: dict[str, Any], place: str) -> None:
    """What can't be enforced is left out where a tool isn't strict; what is wrong by the meta-schema is an error."""
    with pytest.raises(jsonschema.SchemaError):
        jsonschema.Draft202012Validator.check_schema(schema)
    tools = [WantedTool("f", schema, "tools.0.function.parameters")]
    levels: tuple[StrictLevel, ...] = ("parameter", "function", "auto")
    for level in levels:
        asked = WantedCalls(tools, "required", level=level)
        with pytest.raises(GrammarError, match=re.escape(f"tools.0.function.parameters: {place}")):
            grammar_of_calls(asked, bound("hermes", has_tokens=False))


def test_parameters_that_can_not_be_enforced_are_loosened() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}, "required": ["a"]}
    tools = [WantedTool("f", schema, "tools.0")]
    grammar = ByteGrammar(grammar_of_calls(WantedCalls(tools, "required"), bound("hermes", has_tokens=False)).text)
    assert grammar.accepts('<tool_call>\n{"name": "f", "arguments": {"a": "y"}}\n</tool_call>')
    assert not grammar.accepts('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>')
