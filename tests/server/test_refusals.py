"""What is not honoured is refused, with a status, OpenAI's shape and the name of the field; the server lives on."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest
from octavo_server import PATIENCE, Server

from octavo.server.connection import MAX_HEAD

COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
VALID: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "The", "max_tokens": 2},
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    TOKENIZE: {"prompt": "The"},
    DETOKENIZE: {"tokens": [5, 6]},
}
JSON = {"content-type": "application/json"}


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text[:500]
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def refused(client: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    return error_of(client.post(path, json=VALID[path] | fields))


@pytest.mark.parametrize("path", VALID)
@pytest.mark.parametrize("name", ["temprature", "Model", "body", "query", "<text>", "", "regexp", "__proto__"])
def test_an_unknown_field_is_named(client: httpx.Client, path: str, name: str) -> None:
    error = refused(client, path, **{name: 1})
    assert error["param"] == name
    assert error["message"].startswith(f"{name}: octavo does not support this field")


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (COMPLETIONS, "suffix", "x"),
        (COMPLETIONS, "n", 129),
        (COMPLETIONS, "n", 0),
        (COMPLETIONS, "use_beam_search", 1),
        (COMPLETIONS, "response_format", {"type": "json"}),
        (COMPLETIONS, "structured_outputs", {}),
        (COMPLETIONS, "structured_outputs", {"regex": "(?=a)"}),
        (COMPLETIONS, "cache_salt", ""),
        (COMPLETIONS, "cache_salt", "x" * 1025),
        (COMPLETIONS, "no_stop_trim", True),
        (COMPLETIONS, "return_hidden_states", True),
        (COMPLETIONS, "separate_reasoning", False),
        (COMPLETIONS, "stream_reasoning", False),
        (COMPLETIONS, "include_reasoning", False),
        (COMPLETIONS, "priority", 1),
        (COMPLETIONS, "priority", "high"),
        (COMPLETIONS, "bad_words", [""]),
        (COMPLETIONS, "best_of", 0),
        (COMPLETIONS, "logprob_token_ids", [5]),
        (COMPLETIONS, "repetition_detection", {"max_pattern_size": 2, "min_count": 1}),
        (COMPLETIONS, "repetition_detection", {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}),
        (COMPLETIONS, "stream_interval", 0),
        (COMPLETIONS, "truncation_side", "middle"),
        (COMPLETIONS, "stop_regex", "("),
        (COMPLETIONS, "stop_regex", "(?=x)"),
        (COMPLETIONS, "stop_regex", "a{1000}{1000}"),
        (CHAT, "best_of", 2),
        (CHAT, "suffix", "x"),
        (COMPLETIONS, "length_penalty", 2),
        (COMPLETIONS, "max_tokens", 0),
        (COMPLETIONS, "max_tokens", -1),
        (COMPLETIONS, "max_tokens", 1.5),
        (COMPLETIONS, "max_tokens", 10**30),
        (COMPLETIONS, "max_tokens", 512),
        (COMPLETIONS, "min_tokens", 3),
        (COMPLETIONS, "temperature", 2.1),
        (COMPLETIONS, "temperature", "0"),
        (COMPLETIONS, "temperature", True),
        (COMPLETIONS, "top_p", 0),
        (COMPLETIONS, "top_k", -2),
        (COMPLETIONS, "min_p", 1.1),
        (COMPLETIONS, "repetition_penalty", 1e-300),
        (COMPLETIONS, "presence_penalty", -2.5),
        (COMPLETIONS, "seed", 2**63),
        (COMPLETIONS, "logprobs", 21),
        (COMPLETIONS, "prompt_logprobs", 21),
        (COMPLETIONS, "logit_bias", {"1": 101}),
        (COMPLETIONS, "logit_bias", {"9999": 1}),
        (COMPLETIONS, "logit_bias", {"+1": 1}),
        (COMPLETIONS, "logit_bias", {str(number): 1 for number in range(2000)}),
        (COMPLETIONS, "stop", ""),
        (COMPLETIONS, "stop", [1]),
        (COMPLETIONS, "stop", ["x"] * 33),
        (COMPLETIONS, "stop", "x" * 1025),
        (COMPLETIONS, "stop_token_ids", [1024]),
        (COMPLETIONS, "allowed_token_ids", []),
        (COMPLETIONS, "allowed_token_ids", [5000]),
        (COMPLETIONS, "truncate_prompt_tokens", 0),
        (COMPLETIONS, "truncate_prompt_tokens", 513),
        (COMPLETIONS, "stream", "true"),
        (COMPLETIONS, "stream_options", {"include_usage": True}),
        (COMPLETIONS, "prompt", ""),
        (COMPLETIONS, "prompt", []),
        (COMPLETIONS, "prompt", [[]]),
        (COMPLETIONS, "prompt", [5, "a"]),
        (COMPLETIONS, "prompt", ["a", 5]),
        (COMPLETIONS, "prompt", [1024]),
        (COMPLETIONS, "prompt", [True]),
        (COMPLETIONS, "prompt", [5] * 512),
        (COMPLETIONS, "prompt", "word " * 5000),
        (COMPLETIONS, "prompt", {"a": 1}),
        (CHAT, "tools", [{"type": "function"}]),
        (CHAT, "tools", []),
        (CHAT, "tool_choice", "required"),
        (CHAT, "tool_choice", "auto"),
        (CHAT, "functions", [{}]),
        (CHAT, "top_logprobs", 2),
        (CHAT, "max_tokens", 0),
        (CHAT, "max_completion_tokens", 600),
        (CHAT, "modalities", ["audio"]),
        (CHAT, "reasoning_effort", "very high"),
        (CHAT, "thinking_token_budget", -1),
        (CHAT, "chat_template", "{{ messages }}"),
        (CHAT, "continue_final_message", True),
        (CHAT, "messages", []),
        (CHAT, "messages", [{"role": "user"}]),
        (CHAT, "messages", [{"role": "user", "content": "x", "extra": "x" * (1 << 20)}]),
        (CHAT, "messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        (CHAT, "messages", [{"role": "user", "content": "word " * 5000}]),
        (DETOKENIZE, "tokens", [1024]),
        (DETOKENIZE, "tokens", ["1"]),
        (TOKENIZE, "prompt", ["a"]),
    ],
)
def test_a_value_that_is_not_honoured_is_refused_by_name(
    client: httpx.Client, path: str, name: str, value: object
) -> None:
    error = refused(client, path, **{name: value})
    assert error["param"] == name
    assert name.split("_")[-1] in error["message"]
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"prompt": [5] * 600}),
        (COMPLETIONS, {"prompt": [5] * 500, "max_tokens": 100}),
        (COMPLETIONS, {"prompt": "word " * 50_000}),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 5000}]}),
        (CHAT, {"max_completion_tokens": 600}),
    ],
)
def test_a_full_context_is_what_clients_look_for(client: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    error = refused(client, path, **fields)
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is 512 tokens.")


@pytest.mark.parametrize("value", [4, 4.0])
def test_a_whole_number_is_an_integer(client: httpx.Client, value: float) -> None:
    fields = {"max_tokens": value, "n": value, "seed": value, "top_k": value, "min_tokens": value, "logprobs": value}
    answer = client.post(COMPLETIONS, json=VALID[COMPLETIONS] | fields | {"truncate_prompt_tokens": value})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 4
    assert [len(each["logprobs"]["tokens"]) for each in answer.json()["choices"]] == [4] * 4


def test_a_refusal_says_what_is_supported(client: httpx.Client) -> None:
    message = refused(client, COMPLETIONS, return_hidden_states=True)["message"]
    assert message == "return_hidden_states: octavo does not support the value True; supported: false"
    message = refused(client, CHAT, modalities=["audio"])["message"]
    assert message == "modalities.0: octavo does not support the value 'audio'; supported: 'text'"
    part = {"type": "image_url", "image_url": {"url": "x"}}
    message = refused(client, CHAT, messages=[{"role": "user", "content": [part]}])["message"]
    assert message == "messages: image 1: this model reads text alone: leave images out, or serve a model that sees"
    message = refused(client, CHAT, messages=[{"role": "user", "content": [{"type": "input_audio"}]}])["message"]
    assert "'input_audio'" in message
    assert "'text', 'input_text', 'output_text', 'image_url', 'input_image', 'refusal', 'thinking'" in message


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        (
            "/v1/responses",
            {"input": [{"type": "sound"}]},
            "input.0.type: octavo does not support the value 'sound'; supported: 'message', 'function_call', "
            "'custom_tool_call', 'function_call_output', 'custom_tool_call_output', 'reasoning', 'item_reference'",
        ),
        ("/v1/responses", {"input": [3]}, "input.0: Input should be an object (got 3)"),
        (
            "/v1/responses",
            {"input": "x", "tools": [{"type": 5}]},
            "tools.0.type: octavo does not support the value 5; supported: 'function', 'custom', 'namespace'",
        ),
        (
            "/v1/responses",
            {"input": "x", "tools": [{"name": "f"}]},
            "tools.0.type: this field is missing; supported: 'function', 'custom', 'namespace'",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
            "messages.0.content.0.type: this field is missing",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "code"}]},
            "tools.0.type: octavo does not support the value 'code'; supported: 'function', 'custom'",
        ),
    ],
)
def test_an_object_of_an_unknown_kind(client: httpx.Client, path: str, fields: dict[str, Any], message: str) -> None:
    answer = client.post(path, json=fields)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
    assert answer.json()["error"]["param"] == message.partition(".")[0]


def test_combinations_that_contradict_each_other(client: httpx.Client) -> None:
    assert refused(client, COMPLETIONS, stream=True, best_of=2)["param"] == "best_of"
    assert refused(client, COMPLETIONS, n=3, best_of=2)["param"] == "best_of"
    assert refused(client, COMPLETIONS, echo=True, suffix="x")["param"] == "suffix"
    named = {"logprobs": 1, "logprob_token_ids": [5]}
    assert refused(client, COMPLETIONS, echo=True, **named)["param"] == "logprob_token_ids"
    assert refused(client, COMPLETIONS, logprobs=1, logprob_token_ids=[5000])["param"] == "logprob_token_ids"
    assert refused(client, COMPLETIONS, logprobs=1, logprob_token_ids=[5] * 129)["param"] == "logprob_token_ids"
    for name, value in {
        "stop": "x",
        "top_p": 0.5,
        "bad_words": ["x"],
        "min_tokens": 1,
        "logprob_token_ids": [5],
    }.items():
        error = refused(client, COMPLETIONS, use_beam_search=True, logprobs=1, **{name: value})
        assert error["param"] == name
    error = refused(client, COMPLETIONS, use_beam_search=True, regex="a+")
    assert "use_beam_search" in error["message"]
    error = refused(client, COMPLETIONS, allowed_token_ids=[2], min_tokens=1)
    assert "min_tokens" in error["message"]
    assert refused(client, CHAT, logprobs=True, top_logprobs=21)["param"] == "top_logprobs"
    assert refused(client, COMPLETIONS, prompt=["a"] * 100, n=100)["param"] == "n"
    error = refused(client, COMPLETIONS, prompt=[[5] * 500] * 32, n=128, allowed_token_ids=[5] * 1000)
    assert "6144000 tokens" in error["message"]


def test_values_that_ask_for_nothing_are_taken(client: httpx.Client) -> None:
    nothing = {
        "user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "priority": 0, "best_of": 1,
        "use_beam_search": False, "length_penalty": 1.0, "response_format": {"type": "text"}, "bad_words": [],
        "structured_outputs": None, "cache_salt": None, "logit_bias": None, "stop": None, "n": None,
        "stop_token_ids": [], "temperature": None, "top_p": 1, "top_k": -1, "min_p": 0, "presence_penalty": 0,
        "request_id": "mine", "no_stop_trim": False, "separate_reasoning": True, "stream_reasoning": True,
        "return_hidden_states": False, "include_reasoning": True,
    }  # fmt: skip
    answer = client.post(COMPLETIONS, json=VALID[COMPLETIONS] | nothing | {"suffix": None})
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == "cmpl-mine"
    chat = {"tools": None, "tool_choice": "none", "parallel_tool_calls": True, "modalities": ["text"], "audio": None}
    chat |= {"functions": None, "reasoning_effort": None, "prediction": None}
    answer = client.post(CHAT, json=VALID[CHAT] | nothing | chat)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE])
def test_another_model_is_not_found(client: httpx.Client, path: str) -> None:
    error = error_of(client.post(path, json=VALID[path] | {"model": "gpt\n\x1b[31m"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "\n" not in error["message"]
    assert "tiny, tiny-too" in error["message"]


BODIES = {
    "empty": b"",
    "no object": b"[]",
    "null": b"null",
    "cut": b'{"prompt": "a',
    "two": b'{"prompt": "a"}{}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinite": b'{"prompt": "a", "temperature": 1e999}',
    "huge integer": b'{"prompt": "a", "seed": 1' + b"0" * 6000 + b"}",
    "UTF-16": '\ufeff{"prompt": "a"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "Latin-1": b'{"prompt": "caf\xe9"}',
    "surrogate bytes": b'{"prompt": "\xed\xa0\x80"}',
    "surrogate in a prompt": b'{"prompt": "\\ud800x"}',
    "surrogate in a name": b'{"prompt": "a", "\\udfff": 1}',
    "surrogate in a stop string": b'{"prompt": "a", "stop": ["\\ud800"]}',
    "deep": b'{"prompt": ' + b"[" * 100_000,
    "deep and whole": b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
}


@pytest.mark.parametrize("name", BODIES)
def test_what_is_no_json_object_is_refused(client: httpx.Client, name: str) -> None:
    for path in (COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE):
        error_of(client.post(path, content=BODIES[name], headers=JSON))


@pytest.mark.parametrize(
    "extra",
    [
        '"chat_template_kwargs": {"a": ["\\ud800"]}',
        '"documents": [{"title": "\\udc00"}]',
        '"user": "\\ud800"',
        '"tools": ["\\ud800"]',
        '"messages": [{"role": "user", "content": "\\ud800"}]',
        '"messages": [{"role": "\\ud800", "content": "x"}]',
    ],
)
def test_lone_surrogates_anywhere(client: httpx.Client, extra: str) -> None:
    body = json.dumps(VALID[CHAT])[:-1] + f", {extra}}}"
    assert "JSON" in error_of(client.post(CHAT, content=body, headers=JSON))["message"]


def test_arguments_of_a_call_that_was_cut_are_shown_as_they_are(client: httpx.Client) -> None:
    for arguments in ("", "{", "[" * 5000, "NaN", "1" * 6000, '{"path": "a.py", "text": "de'):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        body = {
            "messages": [{"role": "assistant", "tool_calls": [call]}],
            "truncate_prompt_tokens": -1,
            "max_tokens": 1,
        }
        answer = client.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text
    call["function"]["arguments"] = "[" * 900 + "]" * 900
    assert "nested" in error_of(client.post(CHAT, json=body))["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "/", ""])
def test_another_content_type_is_refused(client: httpx.Client, kind: str) -> None:
    for path, body in VALID.items():
        error = error_of(client.post(path, content=json.dumps(body), headers={"content-type": kind}))
        assert "application/json" in error["message"]


def test_large_lists_of_errors_cost_no_more_than_their_first(client: httpx.Client) -> None:
    """Pydantic would make an error of each: gigabytes out of a body of megabytes."""
    numbers = "1," * 500_000
    for body in (
        f'{{"prompt": [{numbers}"a"]}}',
        f'{{"prompt": ["a", {numbers}1]}}',
        f'{{"prompt": "a", "stop": [{numbers}1]}}',
        '{"prompt": "a", "logit_bias": {' + ",".join(f'"{i}": "x"' for i in range(100_000)) + "}}",
        '{"prompt": "a",' + ",".join(f'"a{i}": 1' for i in range(100_000)) + "}",
    ):
        error = error_of(client.post(COMPLETIONS, content=body, headers=JSON))
        assert len(error["message"]) < 400
    many = '{"messages": [' + "{}," * 10_000 + "{}]}"
    assert "messages.0" in error_of(client.post(CHAT, content=many, headers=JSON))["message"]


def test_a_body_above_the_limit(client: httpx.Client) -> None:
    large = b'{"prompt": "' + b"a" * (33 << 20) + b'"}'
    assert "--max-body-bytes" in error_of(client.post(TOKENIZE, content=large, headers=JSON), 413)["message"]
    chunked = (large[start : start + (1 << 20)] for start in range(0, len(large), 1 << 20))
    assert error_of(client.post(TOKENIZE, content=chunked, headers=JSON), 413)["code"] == 413
    text = b'{"prompt": "' + b"a" * (5 << 20) + b'"}'
    assert "most that is tokenized" in error_of(client.post(TOKENIZE, content=text, headers=JSON))["message"]


def test_paths_and_methods(client: httpx.Client) -> None:
    assert error_of(client.get("/nothing"), 404)["type"] == "not_found_error"
    assert error_of(client.post("/v1/completions/", json=VALID[COMPLETIONS]), 404)["code"] == 404
    assert error_of(client.get(COMPLETIONS), 405)["code"] == 405
    assert error_of(client.get("/v1/models/gpt"), 404)["code"] == "model_not_found"


def raw(server: Server, data: bytes) -> bytes:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        try:
            connection.sendall(data)
            answer = b""
            while piece := connection.recv(1 << 16):
                answer += piece
        except ConnectionError:
            pass
    return answer


def test_heads_that_are_no_http(server: Server) -> None:
    start = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    for data in (b"nonsense\r\n\r\n", start + b"Content-Length: abc\r\n\r\n", start + b"Bad Header: x\r\n\r\n"):
        answer = raw(server, data)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b'"invalid_request_error"' in answer
    endless = start + b"X: "
    answer = raw(server, endless + b"a" * (MAX_HEAD + 1 - len(endless)))  # not a byte behind what it reads
    assert answer.startswith(b"HTTP/1.1 431 ")


def test_an_upgrade_that_is_not_offered_is_passed_over(server: Server) -> None:
    """Java's client asks for HTTP/2 with its first request."""
    body = json.dumps(VALID[COMPLETIONS]).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    head += f"HTTP2-Settings: AAE\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + body)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_the_server_still_answers(client: httpx.Client, server: Server) -> None:
    for path, body in VALID.items():
        assert client.post(path, json=body).status_code == 200
    assert "Traceback" not in server.said
