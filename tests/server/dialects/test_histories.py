"""Conversations as clients keep them, octavo's own answers among them: each makes the prompt of its plainest form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from calling_template import TEMPLATE
from octavo_server import serving

CHAT, TOKENIZE = "/v1/chat/completions", "/tokenize"
ASK = {"role": "user", "content": "How is it?"}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def called(arguments: Any) -> dict[str, Any]:
    """An assistant's message with one call."""
    function = {"name": "look", "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }


def said(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", **fields}


def result(content: Any) -> dict[str, Any]:
    return RESULT | {"content": content}


TEXT = {"type": "text", "text": "rain"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Of a model whose template shows calls."""
    with serving("--served-model-name", "tiny", "--chat-template", TEMPLATE) as server, server.client() as client:
        yield client


def tokens_of(client: httpx.Client, messages: list[Any], **fields: Any) -> list[int]:
    response = client.post(TOKENIZE, json={"messages": messages} | fields)
    assert response.status_code == 200, response.text
    return response.json()["tokens"]


@pytest.mark.parametrize(
    ("form", "plain"),
    [
        (said(content=None), said(content="")),
        (said(), said(content="")),
        (said(content=None, tool_calls=[]), said(content="")),
        (said(content=None, reasoning_content="hmm", refusal=None), said(content="", reasoning_content="hmm")),
        (said(content=[]), said(content="")),
        (said(content=["rain"]), said(content=[TEXT])),
        (said(content=[TEXT | {"id": "x", "cache_control": 5}]), said(content=[TEXT])),
        (said(content=[TEXT, {"type": "reasoning", "text": "hmm"}]), said(content=[TEXT], reasoning_content="hmm")),
        (said(content=[{"type": "refusal", "refusal": "rain", "id": "x"}]), said(content=[TEXT])),
        (said(content="rain", name=None, tool_calls=None), said(content="rain")),
    ],
)
def test_an_assistants_message_in_all_its_forms(client: httpx.Client, form: Any, plain: Any) -> None:
    assert tokens_of(client, [ASK, form, ASK]) == tokens_of(client, [ASK, plain, ASK])
    response = client.post(CHAT, json={"messages": [ASK, form, ASK], "max_tokens": 1})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("content", "plain"), [(None, ""), ([], ""), (["rain"], [TEXT]), ([TEXT | {"id": "x"}], [TEXT])]
)
def test_a_result_in_all_its_forms(client: httpx.Client, content: Any, plain: Any) -> None:
    turns = [ASK, called("{}")]
    assert tokens_of(client, [*turns, result(content)]) == tokens_of(client, [*turns, result(plain)])


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [({"city": "Zürich", "n": [1, None]}, '{"city":"Zürich","n":[1,null]}'), ({}, "{}"), (None, "{}")],
)
def test_arguments_are_text_or_an_object(client: httpx.Client, arguments: Any, plain: str) -> None:
    expected = tokens_of(client, [ASK, called(plain), RESULT])
    assert tokens_of(client, [ASK, called(arguments), RESULT]) == expected
    assert expected != tokens_of(client, [ASK, called('{"city":"Bern"}'), RESULT])


def test_a_call_without_arguments(client: httpx.Client) -> None:
    call = called("{}")
    del call["tool_calls"][0]["function"]["arguments"]
    assert tokens_of(client, [ASK, call, RESULT]) == tokens_of(client, [ASK, called("{}"), RESULT])


@pytest.mark.parametrize("role", ["user", "system"])
@pytest.mark.parametrize("content", [None, []])
def test_others_must_say_something(client: httpx.Client, role: str, content: Any) -> None:
    response = client.post(CHAT, json={"messages": [{"role": role, "content": content}]})
    assert response.status_code == 400
    assert "content is missing" in response.json()["error"]["message"]


def test_hints_on_a_tool(client: httpx.Client) -> None:
    tool = TOOL | {"cache_control": {"type": "ephemeral"}, "eager_input_streaming": True, "input_examples": [{}]}
    assert tokens_of(client, [ASK], tools=[tool]) == tokens_of(client, [ASK], tools=[TOOL])
    response = client.post(CHAT, json={"messages": [ASK], "tools": [tool], "max_tokens": 1})
    assert response.status_code == 200, response.text
    refused = client.post(CHAT, json={"messages": [ASK], "tools": [TOOL | {"strict": True}]})
    assert refused.status_code == 400  # it would ask for something, where it isn't looked for
