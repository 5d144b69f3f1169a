"""--default-chat-template-kwargs: variables of the chat template, in every dialect that renders one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from octavo_server import serving

TEMPLATE = "{{ mood }}, {{ place }}: {% for message in messages %}{{ message.content }}{% endfor %}"
DEFAULT = "in no hurry at all, here: abc"
OWN = "cross, here: abc"
MESSAGES = [{"role": "user", "content": "abc"}]
VARIABLES = {"mood": "cross"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    kwargs = '{"mood": "in no hurry at all", "place": "here"}'
    flags = ("--chat-template", TEMPLATE, "--default-chat-template-kwargs", kwargs, "--served-model-name", "tiny")
    with serving(*flags) as server, server.client() as client:
        yield client


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def tokens(client: httpx.Client, text: str) -> list[int]:
    return post(client, "/tokenize", prompt=text)["tokens"]


def test_a_request_s_own_win(client: httpx.Client) -> None:
    chat = {"messages": MESSAGES, "max_tokens": 1, "return_prompt_text": True}
    assert post(client, "/v1/chat/completions", **chat)["prompt_text"] == DEFAULT
    assert post(client, "/v1/chat/completions", **chat, chat_template_kwargs=VARIABLES)["prompt_text"] == OWN
    assert post(client, "/tokenize", messages=MESSAGES)["tokens"] == tokens(client, DEFAULT)
    assert post(client, "/tokenize", messages=MESSAGES, chat_template_kwargs=VARIABLES)["tokens"] == tokens(client, OWN)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/responses/input_tokens", {"input": "abc"}, "input_tokens"),
        ("/v1/messages/count_tokens", {"messages": MESSAGES}, "input_tokens"),
        ("/api/chat", {"messages": MESSAGES}, "prompt_eval_count"),
        ("/api/generate", {"prompt": "abc"}, "prompt_eval_count"),
    ],
)
def test_every_dialect_has_them(client: httpx.Client, path: str, body: dict[str, Any], field: str) -> None:
    asked = body | {"model": "tiny"}
    if path.startswith("/api/"):
        asked |= {"stream": False, "options": {"num_predict": 1}}
    assert post(client, path, **asked)[field] == len(tokens(client, DEFAULT))
    if path.startswith("/v1/"):
        assert post(client, path, **asked, chat_template_kwargs=VARIABLES)[field] == len(tokens(client, OWN))


def test_decisions_have_them_too(client: httpx.Client) -> None:
    question = {"id": "a", "type": "score", "question": "How?", "levels": ["low", "high"]}
    body = {"input": "abc", "questions": [question], "return_prompt_token_ids": True}
    asked = "abc\n\nQuestion: How?\n0: low\n1: high\nAnswer with the number of one level only."
    for variables, prompt in (({}, DEFAULT), (VARIABLES, OWN)):
        found = post(client, "/v1/decisions", **body, chat_template_kwargs=variables)["answers"]["a"]
        assert found["prompt_token_ids"] == tokens(client, prompt.replace("abc", asked))
