"""Tools that are called with text: what of it is enforced, in every kind of format, and how calls are sent."""

from __future__ import annotations

import json
from typing import Any

import lark
import pytest
from call_walks import FIRST_SPECIAL, Walker
from openai.types.chat import ChatCompletion
from spoken import FIXTURES, TOKENIZER, answer_to, constrained, deltas, request, whole
from spoken import FOUND as HERMES

from octavo.runtime.constraint import GrammarError
from octavo.runtime.messages import Constraint
from octavo.server.dialects.conversation import ToolCall
from octavo.server.dialects.custom_input import input_schema
from octavo.server.errors import ApiError
from octavo.server.message.call_constraint import WantedCalls, WantedTool, grammar_of_calls
from octavo.server.message.input_grammar import InputGrammar
from octavo.server.message.parse import Formats, Machine
from octavo.server.message.parts import calls_of
from octavo.server.message.presets import TOOL_PRESETS

PATCH = (FIXTURES / "apply_patch.lark").read_text()
EXPRESSION = r"""
start: term (("+" | "-"i) term)*
term: NAME | "\"" /[^"\n]{0,3}/ "\"" | "\t"
NAME: "a".."c" INT?
%import common.INT
"""
TEXT = '*** Begin Patch\n*** Add File: a "b"\\c\n+x\tü\n*** End Patch'
KINDS = ["hermes", "mistral", "deepseek_v31", "qwen3_coder", "glm45", "deepseek_v32", "pythonic", "gemma4", "openai"]


def custom(grammar: str | None = PATCH, syntax: str = "lark") -> dict[str, Any]:
    format_: dict[str, Any] = {"type": "text"}
    if grammar is not None:
        format_ = {"type": "grammar", "grammar": {"syntax": syntax, "definition": grammar}}
    return {"type": "custom", "custom": {"name": "apply_patch", "description": "Edits files.", "format": format_}}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("grammar", [PATCH, EXPRESSION])
def test_the_input_obeys_its_grammar(name: str, grammar: str) -> None:
    """The judge is Lark itself: what is read back from random answers under the mask is of the grammar."""
    form = TOOL_PRESETS[name]
    special = {
        text: FIRST_SPECIAL + number for number, text in enumerate(["<tool_call>", "<|message|>", "<|channel|>"])
    }
    formats = Formats.bind(form, None, special)
    wanted = WantedCalls([WantedTool("apply_patch", input_schema(None), "tools.0", True, grammar)], "required", False)
    found = grammar_of_calls(wanted, formats)
    same = grammar.replace("(.*)/", "(.+)/?").replace("{0,3}/", "{1,3}/?")  # Lark wants patterns of some width
    judge = lark.Lark(same, parser="earley", lexer="dynamic_complete", keep_all_tokens=True)
    walker = Walker({mark: token_id for token_id, mark in formats.marks.items()})
    num_read = 0
    for seed in range(6):
        text = walker.walk(Constraint(found.text), seed, likely=b"\\n\n*E<|")
        if text is not None:
            machine = Machine(formats, tools=found.schemas, strictness="exact")
            machine.feed(text)
            machine.finish()
            [call] = calls_of(machine.take())
            arguments = json.loads(call.arguments)
            assert list(arguments) == ["input"]
            judge.parse(arguments["input"])
            num_read += 1
    assert num_read


def test_a_text_inside_json_has_its_escapes() -> None:
    grammar = InputGrammar('start: "a\\n" /[^x]/ /./s', "I", in_json=True)
    assert grammar.start == "I_L_START"
    assert grammar.lines[0].startswith(r'I_L_START: "a\\n" /')


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ('start: "(" start ")" | "a"', "'start' refers to itself"),
        ("start: missing", "'missing' is missing"),
        ('begin: "a"', "'start' is missing"),
        ('start: %json {"type": "object"}', "'%' can't stand"),
        ("start: /(?=a)b/", "can't be enforced"),
        ("start: /[/", "in the regular expression"),
        ("%import common.ESCAPED_STRING\nstart: ESCAPED_STRING", "ESCAPED_STRING: not known"),
    ],
)
def test_what_can_not_be_enforced_is_refused(grammar: str, says: str) -> None:
    with pytest.raises(GrammarError, match=says):
        InputGrammar(grammar, "I", in_json=True)
    with pytest.raises(ApiError, match=r"^tools\.0\.custom\.format: ") as caught:
        constrained(HERMES, "x", response_format=None, tools=[custom(grammar)])
    assert (caught.value.status, caught.value.param) == (400, "tools")


def test_calls_with_text_are_sent_as_such() -> None:
    said = f'So <tool_call>\n{{"name": "apply_patch", "arguments": {json.dumps({"input": TEXT})}}}\n</tool_call>'
    for tool in (custom(), custom(None), custom(r"[\s\S]*", "regex")):
        answer = answer_to(request(stream=False, tools=[tool]))
        first, *later = deltas(answer, said)
        for delta in later:
            first.extend(delta)
        body = answer.whole([first])
        body["choices"] = list(body["choices"])
        [choice] = ChatCompletion.model_validate(body).choices
        assert choice.finish_reason == "tool_calls"
        [call] = choice.message.tool_calls or []
        assert call.type == "custom"
        assert (call.custom.name, call.custom.input) == ("apply_patch", TEXT)
    streaming = answer_to(request(tools=[custom()]))
    pieces = [
        call
        for delta in deltas(streaming, said)
        for chunk in streaming.chunks(delta)
        for call in chunk["choices"][0]["delta"].get("tool_calls", ())
    ]
    assert (pieces[0]["type"], pieces[0]["custom"]) == ("custom", {"name": "apply_patch", "input": ""})
    assert len(pieces) > 5
    assert "".join(piece["custom"]["input"] for piece in pieces) == TEXT


def test_past_calls_with_text_are_calls_of_a_function() -> None:
    call = ToolCall.model_validate({"id": "1", "type": "custom", "custom": {"name": "apply_patch", "input": TEXT}})
    assert (call.function.name, json.loads(call.function.arguments)) == ("apply_patch", {"input": TEXT})


def test_a_tool_with_text_can_be_chosen() -> None:
    choice = {"type": "custom", "custom": {"name": "apply_patch"}}
    asked = request(tools=[custom()], tool_choice=choice)
    assert (asked.is_named, asked.must_call) == (True, True)
    assert asked.all_tools[0].function.parameters == input_schema(None)
    assert "hunk+" in str(asked.all_tools[0].function.description)
    assert TOKENIZER.encode("x")
    assert whole("hm", tools=[custom()], tool_choice="none")[0]["content"] == "hm"
