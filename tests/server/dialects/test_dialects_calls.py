"""Calls and their results through the official clients, from a real engine whose calls are constrained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import ollama
import pytest
from calling_template import TEMPLATE
from jsonschema import validate
from octavo_server import Server, serving

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Basel"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA},
    {"name": "get_time", "description": "The time.", "input_schema": {"type": "object", "additionalProperties": False}},
]
ASK = [{"role": "user", "content": "How is the weather?"}]
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 200, "messages": ASK, "tools": TOOLS}


@pytest.fixture(scope="module")
def calling() -> Iterator[Server]:
    """A server of a model that writes calls, if it is made to."""
    strict = '{"disable_any_whitespace": true}'
    with serving(
        "--served-model-name", "tiny", "--chat-template", TEMPLATE, "--structured-outputs-config", strict
    ) as server:
        yield server


@pytest.fixture
def official(calling: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=calling.url, api_key="none", max_retries=0) as client:
        yield client


def blocks(message: anthropic.types.Message) -> list[dict[str, Any]]:
    """The blocks, without the ids of the calls."""
    return [block.model_dump(exclude={"id", "parsed_output"}, exclude_none=True) for block in message.content]


def test_a_tool_that_must_be_called_is_called_and_its_result_is_read(official: anthropic.Anthropic) -> None:
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    fields = BODY | {"tool_choice": choice, "extra_body": {"seed": 7}}
    answer = official.messages.create(**fields)
    [call] = answer.content
    assert call.type == "tool_use"
    assert (answer.stop_reason, call.name) == ("tool_use", "get_weather")
    validate(call.input, SCHEMA)
    with official.messages.stream(**fields) as stream:
        final = stream.get_final_message()
    assert blocks(final) == blocks(answer)
    assert final.stop_reason == answer.stop_reason
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    said = [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    after = official.messages.create(**BODY | {"messages": [*ASK, *said], "tool_choice": {"type": "none"}})
    counted = official.messages.count_tokens(
        model="tiny", messages=[*ASK, *said], tools=TOOLS, tool_choice={"type": "none"}
    )
    assert after.usage.input_tokens + (after.usage.cache_read_input_tokens or 0) == counted.input_tokens
    assert after.stop_reason in ("end_turn", "max_tokens", "model_context_window_exceeded")


@pytest.mark.parametrize("seed", range(4))
def test_any_tool_that_is_called_is_called_as_it_was_declared(official: anthropic.Anthropic, seed: int) -> None:
    fields = BODY | {"tool_choice": {"type": "any"}, "extra_body": {"seed": seed}}
    answer = official.messages.create(**fields)
    schemas = {tool["name"]: tool["input_schema"] for tool in TOOLS}
    calls = [block for block in answer.content if block.type == "tool_use"]
    assert calls
    if answer.stop_reason != "tool_use":  # a model without sense may call until the limit
        assert answer.stop_reason in ("max_tokens", "model_context_window_exceeded")
        calls.pop()
    for call in calls:
        validate(call.input, schemas[call.name])
    with official.messages.stream(**fields) as stream:
        assert blocks(stream.get_final_message()) == blocks(answer)


def test_a_schema_that_can_not_be_enforced_is_blamed_by_its_own_name(official: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)"}}}
    tool = {"name": "f", "input_schema": schema, "strict": True}
    with pytest.raises(anthropic.BadRequestError, match=r"tools\.1\.input_schema: "):
        official.messages.create(**BODY | {"tools": [TOOLS[0], tool], "tool_choice": {"type": "any"}})


def test_ollama_s_calls_are_objects(calling: Server) -> None:
    """Ollama's API can't require a call; the history's calls and results are read all the same."""
    call = {"function": {"name": "get_weather", "arguments": {"city": "Bern", "days": 2}}}
    messages = [
        *ASK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_name": "get_weather", "content": "rain"},
    ]
    tools = [{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": SCHEMA}}]
    options = {"num_predict": 4, "temperature": 0}
    with ollama.Client(host=calling.url) as client:
        answer = client.chat("tiny", messages=messages, tools=tools, options=options)
        pieces = list(client.chat("tiny", messages=messages, tools=tools, options=options, stream=True))
        alone = client.chat("tiny", messages=ASK, tools=tools, options=options)
    assert answer.message.content == "".join(piece.message.content or "" for piece in pieces)
    assert answer.prompt_eval_count is not None
    assert alone.prompt_eval_count is not None
    assert answer.prompt_eval_count > alone.prompt_eval_count
    with calling.client() as http:
        assert http.post("/api/show", json={"model": "tiny"}).json()["capabilities"] == ["completion", "tools"]
