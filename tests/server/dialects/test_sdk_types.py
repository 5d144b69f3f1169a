"""Every answer is what the SDKs' own types say, validated strictly: the SDKs themselves take anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic.types
import httpx
import ollama
import openai.types
import openai.types.chat
import openai.types.responses
import openai.types.shared
import pytest
from anthropic.pagination import SyncPage
from calling_template import TEMPLATE
from octavo_server import serving
from openai.pagination import SyncCursorPage
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from openai.types.responses.response_item import ResponseItem
from pydantic import BaseModel, TypeAdapter

from octavo.server.errors import ApiError

Json = dict[str, Any]
MESSAGES = [{"role": "user", "content": "abc"}]
FUNCTION: Json = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOL: Json = {"type": "function", "function": FUNCTION}
CALLED: Json = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60}
LIMIT: Json = {"max_tokens": 5}
CHAT_EVENTS: TypeAdapter[Any] = TypeAdapter(openai.types.chat.ChatCompletionChunk)
RESPONSE_EVENTS: TypeAdapter[Any] = TypeAdapter(openai.types.responses.ResponseStreamEvent)
MESSAGE_EVENTS: TypeAdapter[Any] = TypeAdapter(anthropic.types.RawMessageStreamEvent)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    flags = ("--tool-call-parser", "hermes", "--chat-template", TEMPLATE, "--served-model-name", "tiny")
    with serving(*flags) as server, server.client() as client:
        yield client


def asked(client: httpx.Client, method: str, path: str, body: Json | None = None, **options: Any) -> str:
    response = client.request(method, path, json=body, **options)
    assert response.status_code == 200, response.text
    return response.text


def strict(kind: type[BaseModel], text: str) -> Any:
    """The answer in the SDK's type, of which no field is missing, null where it may not be, or of another type."""
    return kind.model_validate_json(text, strict=True)


def events(text: str) -> list[str]:
    """The data of server-sent events."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line for line in lines if line != "[DONE]"]


@pytest.mark.parametrize(
    "fields",
    [
        LIMIT,
        LIMIT | {"n": 2, "logprobs": True, "top_logprobs": 2, "seed": 5},
        CALLED,
        CALLED | {"max_tokens": 12},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}, "max_tokens": 60},
        {"functions": [FUNCTION], "function_call": {"name": "f"}, "max_tokens": 60},
        {"response_format": {"type": "json_object"}, "max_tokens": 20},
        LIMIT | {"stop": ["a", "e", " "]},
    ],
)
def test_chat(client: httpx.Client, fields: Json) -> None:
    body = {"messages": MESSAGES, "model": "tiny", **fields}
    answer = strict(openai.types.chat.ChatCompletion, asked(client, "POST", "/v1/chat/completions", body))
    assert answer.usage is not None
    chunks = events(
        asked(
            client, "POST", "/v1/chat/completions", body | {"stream": True, "stream_options": {"include_usage": True}}
        )
    )
    found = [CHAT_EVENTS.validate_json(chunk, strict=True) for chunk in chunks]
    assert found[-1].usage is not None
    assert found[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in found}) == 1


@pytest.mark.parametrize("fields", [LIMIT, LIMIT | {"logprobs": 2, "echo": True, "n": 2}, LIMIT | {"stop": ["a", "e"]}])
def test_completions(client: httpx.Client, fields: Json) -> None:
    body = {"prompt": "abc", "model": "tiny", **fields}
    strict(openai.types.Completion, typed(asked(client, "POST", "/v1/completions", body)))
    for chunk in events(asked(client, "POST", "/v1/completions", body | {"stream": True})):
        strict(openai.types.Completion, typed(chunk))


def typed(text: str) -> str:
    """A completion without the nulls that OpenAI's own API sends, against the type of its SDK.

    They stand where an answer has not ended, and where nothing predicts an echoed prompt's first token.
    """
    content = json.loads(text)
    for choice in content["choices"]:
        if choice["finish_reason"] is None:
            choice["finish_reason"] = "stop"
        for name, value in (("token_logprobs", 0.0), ("top_logprobs", {})):
            if choice["logprobs"] and choice["logprobs"][name][:1] == [None]:
                choice["logprobs"][name][0] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_output_tokens": 5},
        {"max_output_tokens": 5, "include": ["message.output_text.logprobs"], "top_logprobs": 1},
        {"tools": [{"type": "function", **FUNCTION, "strict": True}], "tool_choice": "required"},
        {"tools": [{"type": "custom", "name": "c"}], "tool_choice": "required", "max_output_tokens": 40},
        {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 20},
        {"instructions": "be brief", "metadata": {"a": "b"}, "truncation": "auto", "max_output_tokens": 5},
    ],
)
def test_responses(client: httpx.Client, fields: Json) -> None:
    body = {"input": "abc", "model": "tiny", "temperature": 0, **fields}
    response = strict(openai.types.responses.Response, asked(client, "POST", "/v1/responses", body))
    path = f"/v1/responses/{response.id}"
    assert strict(openai.types.responses.Response, asked(client, "GET", path)) == response
    strict(SyncCursorPage[ResponseItem], asked(client, "GET", f"{path}/input_items"))
    stream = events(asked(client, "POST", "/v1/responses", body | {"stream": True}))
    found = [RESPONSE_EVENTS.validate_json(event, strict=True) for event in stream]
    assert [event.sequence_number for event in found] == list(range(len(found)))
    assert found[-1].response.usage.total_tokens == response.usage.total_tokens
    background = asked(client, "POST", "/v1/responses", body | {"background": True})
    strict(openai.types.responses.Response, background)


def test_what_goes_with_responses(client: httpx.Client) -> None:
    strict(InputTokenCountResponse, asked(client, "POST", "/v1/responses/input_tokens", {"input": "abc"}))


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 5},
        {"max_tokens": 5, "stop_sequences": ["a", "e", " "]},
        {
            "max_tokens": 60,
            "tools": [{"name": "f", "input_schema": FUNCTION["parameters"]}],
            "tool_choice": {"type": "any"},
        },
    ],
)
def test_messages(client: httpx.Client, fields: Json) -> None:
    body = {"messages": MESSAGES, "model": "tiny", **fields}
    message = strict(anthropic.types.Message, asked(client, "POST", "/v1/messages", body))
    stream = [json.loads(event) for event in events(asked(client, "POST", "/v1/messages", body | {"stream": True}))]
    found = [
        MESSAGE_EVENTS.validate_json(json.dumps(event), strict=True) for event in stream if event["type"] != "ping"
    ]
    assert (found[0].type, found[-2].type, found[-1].type) == ("message_start", "message_delta", "message_stop")
    assert found[-2].delta.stop_reason == message.stop_reason
    counted = asked(client, "POST", "/v1/messages/count_tokens", {"messages": MESSAGES, "model": "tiny"})
    strict(anthropic.types.MessageTokensCount, counted)


def test_ollama(client: httpx.Client) -> None:
    options = {"options": {"num_predict": 5}}
    chat: Json = {"model": "tiny", "messages": MESSAGES, **options}
    generate: Json = {"model": "tiny", "prompt": "abc", **options}
    for path, body, kind in (("chat", chat, ollama.ChatResponse), ("generate", generate, ollama.GenerateResponse)):
        answer = strict(kind, asked(client, "POST", f"/api/{path}", body | {"stream": False, "logprobs": True}))
        assert answer.done
        lines = asked(client, "POST", f"/api/{path}", body).splitlines()
        assert [strict(kind, line).done for line in lines] == [False] * (len(lines) - 1) + [True]
    strict(ollama.ListResponse, asked(client, "GET", "/api/tags"))
    strict(ollama.ProcessResponse, asked(client, "GET", "/api/ps"))
    ollama.ShowResponse.model_validate_json(asked(client, "POST", "/api/show", {"model": "tiny"}))


def test_models(client: httpx.Client) -> None:
    page = asked(client, "GET", "/v1/models")
    strict(SyncPage[anthropic.types.ModelInfo], page)
    for model in json.loads(page)["data"]:
        strict(openai.types.Model, json.dumps(model))
    one = asked(client, "GET", "/v1/models/tiny")
    strict(anthropic.types.ModelInfo, one)


def test_files_and_batches(client: httpx.Client) -> None:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 1}}
    uploaded = client.post("/v1/files", files={"file": ("a.jsonl", json.dumps(line))}, data={"purpose": "batch"}).text
    file = strict(openai.types.FileObject, uploaded)
    asks = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = strict(openai.types.Batch, asked(client, "POST", "/v1/batches", asks))
    strict(openai.types.Batch, asked(client, "GET", f"/v1/batches/{batch.id}"))
    strict(SyncCursorPage[openai.types.Batch], asked(client, "GET", "/v1/batches"))
    strict(SyncCursorPage[openai.types.FileObject], asked(client, "GET", "/v1/files"))
    strict(openai.types.FileDeleted, asked(client, "DELETE", f"/v1/files/{file.id}"))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 429, 500, 503])
def test_errors(status: int) -> None:
    """Without 413: Anthropic documents request_too_large, and its SDK's type lacks it."""
    body = json.dumps(ApiError(status, "why").body("/v1/messages"))
    error = strict(anthropic.types.ErrorResponse, body)
    assert error.error.message == "why"
    strict(openai.types.shared.ErrorObject, json.dumps(ApiError(status, "why", code="c").body()["error"]))
