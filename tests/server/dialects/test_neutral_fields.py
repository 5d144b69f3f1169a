"""Fields of other servers' requests that ask for nothing, or for what has another name here."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from octavo.server.hints import ALL_HINTS

HI = [{"role": "user", "content": "Hi"}]
CHAT: dict[str, Any] = {"messages": HI, "max_tokens": 1}
GENERATE: dict[str, Any] = {"text": "The", "sampling_params": {"max_new_tokens": 1}}
RESPONSES: dict[str, Any] = {"input": "Hi", "max_output_tokens": 1}
MESSAGES: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 1}
OLLAMA: dict[str, Any] = {"model": "tiny", "messages": HI, "stream": False, "options": {"num_predict": 1}}
NOTHING = {"lora_path": None, "session_params": None, "custom_logit_processor": None, "return_routed_experts": False}
SGLANG = {
    "background": False,
    "no_logs": False,
    "return_entropy": False,
    "require_reasoning": False,
    "bootstrap_host": None,
    "http_worker_ipc": None,
    "data_parallel_rank": 0,
    "conversation_id": "c",
}


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("/v1/chat/completions", CHAT, NOTHING),
        ("/v1/completions", {"prompt": "The", "max_tokens": 1}, NOTHING | {"rid": "abc"}),
        ("/generate", GENERATE, SGLANG),
        ("/v1/responses", RESPONSES, {"request_id": "abc", "enable_response_messages": False}),
        ("/v1/messages", MESSAGES, {"container": None}),
        ("/v1/messages/count_tokens", {"messages": HI}, {"max_tokens": 5, "stream": True}),
        ("/v1/chat/completions", CHAT, {"stream": True, "stream_options": {"include_obfuscation": True}}),
        ("/parse_function_call", {"text": "x", "tool_call_parser": "hermes"}, {"tools": []}),
        ("/api/chat", OLLAMA, {"truncate": True, "shift": True, "options": {"repeat_last_n": 64}}),
        ("/api/chat", OLLAMA, {"options": {"repeat_last_n": 64, "repeat_penalty": 1.0}}),
    ],
)
def test_they_change_no_status(client: httpx.Client, path: str, body: dict[str, Any], fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        response = client.post(path, json=body | {name: value} | ({"stream": True} if "stream" in fields else {}))
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(("name", "value"), [(name, True) for name in ("lora_path", "return_routed_experts")])
def test_what_they_would_ask_for_is_refused(client: httpx.Client, name: str, value: object) -> None:
    response = client.post("/v1/chat/completions", json=CHAT | {name: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name


def test_sglangs_name_of_a_request(client: httpx.Client) -> None:
    assert client.post("/v1/chat/completions", json=CHAT | {"rid": "abc"}).json()["id"] == "chatcmpl-abc"
    named = client.post("/v1/chat/completions", json=CHAT | {"rid": "abc"}, headers={"x-request-id": "own"})
    assert named.json()["id"] == "chatcmpl-own"


def test_sglangs_cache_salt(client: httpx.Client) -> None:
    """A prompt's blocks are found again under the same key alone."""

    def cached(**fields: Any) -> list[int]:
        body = {"input_ids": [[17] * 70, [18] * 70], "sampling_params": {"max_new_tokens": 1}} | fields
        answers = client.post("/generate", json=body)
        assert answers.status_code == 200, answers.text
        return [answer["meta_info"]["cached_tokens"] for answer in answers.json()]

    assert cached(extra_key="histories") == [0, 0]
    first, second = cached(extra_key=["histories", "others"])
    assert (first > 0, second) == (True, 0)
    wrong = client.post("/generate", json=GENERATE | {"extra_key": "x" * 2000}).json()["error"]
    assert wrong["param"] == "extra_key"


def test_an_empty_answer_to_go_on_with(client: httpx.Client) -> None:
    """Nothing is continued: the prompt is that of the turns before."""

    def tokens(messages: list[Any]) -> int:
        return client.post("/v1/messages/count_tokens", json={"messages": messages}).json()["input_tokens"]

    empty = [*HI, {"role": "assistant", "content": []}]
    assert tokens(empty) == tokens(HI)
    assert client.post("/v1/messages", json=MESSAGES | {"messages": empty}).status_code == 200


def test_the_hints_are_listed() -> None:
    assert {"conversation_id", "request_id", "rid", "shift", "truncate"} <= set(ALL_HINTS)
