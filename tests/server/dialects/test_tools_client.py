"""Tool calls of a real server through OpenAI's own client: whatever a random model says, its calls are valid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from octavo_server import serving

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
SCHEMAS: dict[str, dict[str, Any]] = {
    "book": {
        "type": "object",
        "properties": {"seat": {"enum": ["window", "aisle"]}, "rows": {"type": "array", "items": {"enum": [1, 2]}}},
        "required": ["seat"],
        "additionalProperties": False,
    },
    "pay": {"type": "object", "properties": {"cash": {"type": "boolean"}}, "additionalProperties": False},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    """The template shows no tools, as its prompt would fill a small model's context."""
    with (
        serving("--served-model-name", "tiny", "--chat-template", TEMPLATE, "--tool-call-parser", "hermes") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as found,
    ):
        yield found


def asked(client: openai.OpenAI, **fields: Any) -> Any:
    messages: list[Any] = [{"role": "user", "content": "Book two seats"}]
    everything = {"temperature": 1.5, "seed": 5, "max_tokens": 100, "tools": TOOLS} | fields
    return client.chat.completions.create(model="tiny", messages=messages, **everything)


def check(calls: list[tuple[str, str]], finish_reason: str) -> None:
    for number, (name, arguments) in enumerate(calls):
        if finish_reason != "length" or number < len(calls) - 1:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "pay"}}, "stop"), ("auto", None)],
    ids=["required", "named", "auto"],
)
def test_calls_are_always_valid(client: openai.OpenAI, choice: Any, expected: str | None) -> None:
    for one in (True, False):
        answer = asked(client, tool_choice=choice, n=6, parallel_tool_calls=not one)
        for found in answer.choices:
            calls = [(call.function.name, call.function.arguments) for call in found.message.tool_calls or ()]
            check(calls, found.finish_reason)
            if expected is not None:
                assert calls
                assert found.finish_reason in (expected, "length")
                assert len(calls) == 1 or (not one and choice == "required")


def test_a_stream_of_calls_is_the_whole_answer(client: openai.OpenAI) -> None:
    whole = asked(client, tool_choice="required").choices[0]
    streamed: list[list[str]] = []
    reason = None
    for chunk in asked(client, tool_choice="required", stream=True):
        [choice] = chunk.choices
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            if call.index == len(streamed):
                streamed.append([call.function.name, ""])
            streamed[call.index][1] += call.function.arguments or ""
    assert reason == whole.finish_reason
    assert [tuple(call) for call in streamed] == [
        (call.function.name, call.function.arguments) for call in whole.message.tool_calls
    ]


@pytest.mark.parametrize("stop", [None, "name"])
def test_a_cut_call_shows_no_markup(client: openai.OpenAI, stop: str | None) -> None:
    """Wherever a limit or a stop string cuts it: what there is of the call comes as one, and nothing as content."""
    named = []
    for max_tokens in range(1, 40, 3):
        fields = {"tool_choice": "required", "max_tokens": max_tokens, "stop": stop}
        [whole] = asked(client, **fields).choices
        said = [chunk.choices[0].delta for chunk in asked(client, stream=True, **fields)]
        assert not whole.message.content
        assert not any(delta.content for delta in said)
        assert whole.finish_reason in (("length", "stop") if stop else ("length", "tool_calls"))
        names = [call.function.name for delta in said for call in delta.tool_calls or () if call.function.name]
        assert names == [call.function.name for call in whole.message.tool_calls or ()]
        named.append(names[:1])
    assert [] in named
    assert all(not names for names in named) == (stop is not None)


def test_an_answer_obeys_its_schema_or_calls(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMAS["pay"]}}
    for found in asked(client, response_format=form, n=6).choices:
        calls = [(call.function.name, call.function.arguments) for call in found.message.tool_calls or ()]
        check(calls, found.finish_reason)
        if not calls and found.finish_reason != "length":
            jsonschema.validate(json.loads(found.message.content), SCHEMAS["pay"])


def test_a_custom_tool_s_input_is_of_its_grammar(client: openai.OpenAI) -> None:
    grammar = {"syntax": "lark", "definition": 'start: "go" (LF /[a-c"]/)+\n%import common.LF'}
    tool = {"type": "custom", "custom": {"name": "run", "format": {"type": "grammar", "grammar": grammar}}}
    for found in asked(client, tools=[tool], tool_choice="required", parallel_tool_calls=False, n=4).choices:
        [call] = found.message.tool_calls
        assert call.type == "custom"
        first, *lines = call.custom.input.split("\n")
        assert (first, set(lines) <= set('abc"')) == ("go", True)
