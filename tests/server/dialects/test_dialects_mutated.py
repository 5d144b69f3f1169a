"""Mutated requests to Anthropic's and Ollama's API are answered or refused, and clients that leave leave nothing."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from calling_template import TEMPLATE
from mutated import mutated
from octavo_server import Server, num_in_flight, serving, value, wait_until
from slow_cases import slow

Json = dict[str, Any]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CACHED = {"cache_control": {"type": "ephemeral"}}
USED = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Bern"}}
TOOL = {"name": "get_weather", "description": "d", "input_schema": SCHEMA}
MESSAGES: list[Json] = [
    {
        "model": "tiny",
        "max_tokens": 2,
        "system": [{"type": "text", "text": "x-anthropic-billing-header: a\nBe brief.", **CACHED}],
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is"}],
        "stop_sequences": ["zzz"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "metadata": {"user_id": "u"},
        "stream": True,
    },
    {
        "model": "tiny",
        "max_tokens": 2,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Weather?", **CACHED}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "x"},
                    USED,
                ],
            },
            {"role": "system", "content": "In a hurry.", "clear_at": "never"},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "rain"}]},
                    {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "d"}},
                ],
            },
        ],
        "tools": [TOOL, TOOL | {"name": "other", "defer_loading": True}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "adaptive"},
    },
    {
        "model": "tiny",
        "max_tokens": 2,
        "messages": [{"role": "user", "content": "Hi"}],
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
        "thinking": {"type": "disabled"},
        "context_management": {"edits": []},
    },
    {
        "model": "tiny",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [TOOL | {"strict": True}],
        "tool_choice": {"type": "tool", "name": "get_weather"},
        "stream": True,
    },
]
CHATS: list[Json] = [
    {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?", "images": []},
            {
                "role": "assistant",
                "content": "",
                "thinking": "hm",
                "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Bern"}}}],
            },
            {"role": "tool", "tool_name": "get_weather", "content": "rain"},
        ],
        "tools": [{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": SCHEMA}}],
        "options": {"num_predict": 2, "temperature": 0.5, "top_k": 3, "seed": 1, "stop": ["x"], "num_ctx": 99},
        "keep_alive": "5m",
        "think": False,
    },
    {
        "model": "tiny:latest",
        "messages": [{"role": "user", "content": "Hi"}],
        "format": SCHEMA,
        "options": {"num_predict": 2, "repeat_penalty": 1.1, "min_p": 0.1},
        "logprobs": True,
        "top_logprobs": 2,
        "stream": False,
    },
]
PROMPTS: list[Json] = [
    {
        "model": "tiny",
        "prompt": "Hi",
        "system": "Be brief.",
        "format": "json",
        "options": {"num_predict": 2, "top_p": 0.9},
        "stream": False,
    },
    {"model": "tiny", "prompt": "Hi", "raw": True, "suffix": "", "options": {"num_predict": 2, "stop": "x"}},
]
KEPT = ("options", "max_tokens")  # without these an answer may be as long as the context
ANTHROPIC = ["/v1/messages", "/v1/messages/count_tokens"]
OLLAMA = ["/api/chat", "/api/generate", "/api/show"]
COUNTED = ("model", "messages", "system", "tools", "tool_choice", "thinking", "output_config")
BODIES = {
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": [
        {name: field for name, field in body.items() if name in COUNTED} for body in MESSAGES
    ],
    "/api/chat": CHATS,
    "/api/generate": PROMPTS,
    "/api/show": [{"model": "tiny", "verbose": True, "name": "tiny"}],
}


@pytest.fixture(scope="module")
def calling() -> Iterator[Server]:
    """A server whose template knows tools."""
    with serving("--served-model-name", "tiny", "--chat-template", TEMPLATE) as server:
        yield server


def check(path: str, response: httpx.Response, body: Json) -> None:
    """An answer, or a refusal in the dialect's shape."""
    shown = f"{path} {response.status_code} {response.text:.500}: {json.dumps(body):.2000}"
    assert response.status_code < 500, shown
    if response.status_code == 200:
        assert "internal error" not in response.text, shown
    elif path.startswith("/v1/messages"):
        error = response.json()
        assert list(error) == ["type", "error"], shown
        assert set(error["error"]) == {"type", "message"}, shown
        assert response.headers["request-id"], shown
    else:
        assert list(response.json()) == ["error"], shown


def check_good(client: httpx.Client) -> None:
    """What is right is answered."""
    for path, bodies in BODIES.items():
        for body in bodies:
            response = client.post(path, json=body)
            assert response.status_code == 200, f"{path} {response.text:.500}: {json.dumps(body)}"


@pytest.mark.parametrize("paths", [ANTHROPIC, OLLAMA], ids=["anthropic", "ollama"])
@pytest.mark.parametrize(("count", "seed"), [(150, 1), slow(10_000, 2)])
def test_mutated_requests(calling: Server, paths: list[str], count: int, seed: int) -> None:
    with calling.client() as client:
        check_good(client)
        streams = {path: mutated(BODIES[path], count, seed, keep=KEPT) for path in paths}
        statuses: Counter[int] = Counter()
        for number in range(count):
            path = paths[number % len(paths)]
            body = next(streams[path])
            response = client.post(path, json=body)
            check(path, response, body)
            statuses[response.status_code] += 1
        assert statuses[200] > count / 20  # a mutated request may still be a right one
        assert statuses[400] > count / 3
        check_good(client)
        wait_until(lambda: num_in_flight(client) == 0)
        assert value(client, "vllm:kv_cache_usage_perc") == 0
        assert "Traceback" not in calling.said


@pytest.mark.parametrize(("count", "seed"), [(20, 1), slow(1_000, 2)])
def test_clients_that_leave_leave_nothing(calling: Server, count: int, seed: int) -> None:
    draw = random.Random(seed)
    hi = [{"role": "user", "content": "Hi"}]
    asked: list[tuple[str, Json]] = [
        ("/v1/messages", {"model": "tiny", "max_tokens": 300, "messages": hi, "stream": True, "ignore_eos": True}),
        ("/api/chat", {"model": "tiny", "messages": hi, "options": {"num_predict": 300}}),
        ("/api/generate", {"model": "tiny", "prompt": "Hi", "raw": True, "options": {"num_predict": 300}}),
    ]
    with calling.client() as client:
        for _ in range(count):
            path, body = draw.choice(asked)
            with client.stream("POST", path, json=body) as response:
                assert response.status_code == 200
                lines = response.iter_lines()
                for _ in range(draw.randrange(6)):
                    next(lines, None)
        wait_until(lambda: num_in_flight(client) == 0)
        assert value(client, "vllm:kv_cache_usage_perc") == 0
        assert client.post("/v1/messages", json=MESSAGES[0]).status_code == 200
        assert "Traceback" not in calling.said
