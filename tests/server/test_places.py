"""Errors name places of the client's own body: no option of a union, no class and no function of octavo's."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from octavo.server.bodies import validated
from octavo.server.dialects.anthropic_request import MessagesRequest
from octavo.server.dialects.chat_request import ChatCompletionRequest
from octavo.server.dialects.completions import CompletionRequest
from octavo.server.dialects.fields import RequestObject
from octavo.server.dialects.native_request import GenerateRequest
from octavo.server.dialects.ollama_request import ChatRequest
from octavo.server.dialects.responses_request import ResponsesRequest
from octavo.server.dialects.tokens import TokenizeRequest
from octavo.server.errors import ApiError

Json = dict[str, Any]
HI = {"role": "user", "content": [{"type": "text", "text": "Hi"}, "there"]}
FUNCTION = {"name": "look", "parameters": {"type": "object"}}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
TOOLS: list[Json] = [
    {"type": "function", "function": FUNCTION},
    {
        "type": "custom",
        "custom": {"name": "f", "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": "x"}}},
    },
]
CHOICE = {"type": "function", "function": {"name": "look"}}
USED = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "rain"}]}
BODIES: list[tuple[Any, Json]] = [
    (
        ChatCompletionRequest,
        {
            "messages": [HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
            "tools": TOOLS,
            "tool_choice": CHOICE,
            "stop": ["a"],
            "logit_bias": {"5": 1},
            "stream": True,
            "stream_options": {"include_usage": True},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
        },
    ),
    (CompletionRequest, {"prompt": [[5, 6], [7]], "stop": "a", "logit_bias": {"5": 1}}),
    (CompletionRequest, {"prompt": ["a", "b"], "structured_outputs": {"choice": ["a"]}}),
    (
        GenerateRequest,
        {
            "input_ids": [[5], [6]],
            "sampling_params": [{"n": 1, "stop": ["a"]}, {"stop": "a"}],
            "top_logprobs_num": [1, 2],
            "return_logprob": [True, False],
            "token_ids_logprob": [[1], [2]],
            "logprob_start_len": 0,
            "rid": ["a", "b"],
        },
    ),
    (GenerateRequest, {"text": "a", "sampling_params": {"stop": "a"}, "top_logprobs_num": 1, "rid": "a"}),
    (
        MessagesRequest,
        {
            "max_tokens": 2,
            "system": [{"type": "text", "text": "s"}],
            "messages": [HI, {"role": "assistant", "content": [USED]}, {"role": "user", "content": [RESULT]}],
            "tools": [{"name": "look", "input_schema": {}}],
            "tool_choice": {"type": "tool", "name": "look"},
        },
    ),
    (
        ResponsesRequest,
        {
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "rain"},
            ],
            "tools": [
                {"type": "function", **FUNCTION},
                {"type": "namespace", "name": "s", "tools": [{"type": "custom", "name": "f"}]},
            ],
            "tool_choice": {"type": "function", "name": "look"},
            "text": {"format": {"type": "text"}},
        },
    ),
    (ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "options": {"stop": ["a"]}}),
    (TokenizeRequest, {"prompt": "a"}),
    (TokenizeRequest, {"messages": [HI], "tools": TOOLS}),
]
WRONG: list[Any] = [5, -7, 1.5, "x", True, [], {}, {"foo": 1}, [1, "a"], [["a"], 2], [{"foo": 1}], "x" * 70000]


def changed(body: Any) -> Iterator[Any]:
    """The body with one value replaced, or one more field, at each of its places."""
    if isinstance(body, dict | list):
        for key in body if isinstance(body, dict) else range(len(body)):
            for inner in changed(body[key]):
                other = copy.copy(body)
                other[key] = inner
                yield other
    if isinstance(body, dict):
        yield body | {"zz": 1}
        yield from ({name: value for name, value in body.items() if name != left_out} for left_out in body)
    yield from WRONG


def refusal(adapter: TypeAdapter[Any], body: Any) -> str:
    """What a client is told of this body; nothing, where it is right."""
    try:
        validated(json.dumps(body).encode(), adapter)
    except ApiError as error:
        return error.message
    return ""


def classes(kind: type[Any]) -> set[str]:
    return {kind.__name__}.union(*map(classes, kind.__subclasses__()))


def leads_through(place: str, body: Any) -> bool:
    """Whether these are names and numbers of the body; the last one may be a field that is missing."""
    *names, last = place.split(".")
    for name in names:
        inside = body.get(name) if isinstance(body, dict) else None
        if isinstance(body, list) and name.isdigit():
            inside = dict(enumerate(body)).get(int(name))
        if inside is None:
            return False
        body = inside
    return isinstance(body, dict) or (isinstance(body, list) and last.isdigit() and int(last) < len(body))


@pytest.mark.parametrize(("kind", "body"), BODIES)
def test_each_place_is_one_of_the_body(kind: Any, body: Json) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    inner_words = re.compile(rf"function-|0x[0-9a-f]{{6}}|<function|\b(?:{'|'.join(classes(RequestObject))})\b")
    refused = [(other, message) for other in changed(body) if (message := refusal(adapter, other))]
    assert len(refused) > 10
    for other, message in refused:
        place, colon, _ = message.partition(": ")
        assert not inner_words.search(message), (other, message)
        if colon and re.fullmatch(r"[\w.<>\[\]-]+", place):
            assert leads_through(place, other), (other, message)


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        (
            "/v1/chat/completions",
            {"messages": [HI], "tools": [{"type": "function", "function": {}}]},
            "tools.0.function.name",
        ),
        ("/v1/chat/completions", {"messages": [HI | {"content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ("/generate", {"text": "a", "top_logprobs_num": "x"}, "top_logprobs_num"),
        ("/generate", {"text": "a", "sampling_params": {"foo": 1}}, "sampling_params.foo"),
        ("/generate", {"text": "a", "sampling_params": [{"foo": 1}]}, "sampling_params.0.foo"),
        ("/generate", {"text": ""}, "text"),
        ("/generate", {"input_ids": [99999]}, "input_ids"),
        ("/pause_generation", {"mode": "x"}, "mode"),
        ("/pause?mode=x", {}, "mode"),
    ],
)
def test_places_that_clients_see(client: httpx.Client, path: str, body: Json, place: str) -> None:
    error = client.post(path, json=body).json()["error"]
    assert error["message"].partition(":")[0] == place, error
    assert error["param"] == place.partition(".")[0]
