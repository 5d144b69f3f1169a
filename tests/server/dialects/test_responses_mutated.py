"""Mutated requests to /v1/responses are answered or refused, never a failure of the server."""

from __future__ import annotations

from typing import Any

import pytest
from calling_template import TEMPLATE
from mutated import mutated
from octavo_server import num_in_flight, serving, wait_until
from slow_cases import slow

Json = dict[str, Any]
PATH = "/v1/responses"
SHORT: Json = {"max_output_tokens": 1}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
BODIES: list[Json] = [
    SHORT | {"input": "Hi", "instructions": "Be brief.", "temperature": 0, "metadata": {"a": "b"}, "top_logprobs": 1},
    SHORT
    | {
        "input": [
            {"role": "developer", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "message", "role": "user", "content": "Hi"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            CALL | {"namespace": "n"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "9"}]},
            {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "x"},
            {"type": "custom_tool_call_output", "call_id": "d", "output": "y"},
        ],
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"summary": "auto"},
        "truncation": "auto",
    },
    SHORT
    | {
        "input": [{"role": "user", "content": "Hi"}, {"type": "item_reference", "id": "msg_" + "0" * 32 + "0000"}],
        "previous_response_id": "resp_" + "0" * 32,
        "store": True,
        "background": True,
        "stream": True,
    },
    SHORT
    | {
        "input": "Hi",
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}, "verbosity": "low"},
        "tools": [
            {"type": "web_search"},
            {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True},
            {"type": "namespace", "name": "n", "description": "d", "tools": [{"type": "function", "name": "g"}]},
            {
                "type": "custom",
                "name": "c",
                "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"},
            },
        ],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    },
]


@pytest.mark.parametrize(("count", "seed"), [(150, 1), slow(10_000, 2)])
def test_mutated_requests(count: int, seed: int) -> None:
    with serving("--served-model-name", "tiny", "--chat-template", TEMPLATE) as server, server.client() as client:
        statuses: dict[int, int] = {}
        for body in mutated(BODIES, count, seed, keep=tuple(SHORT)):
            response = client.post(PATH, json=body)
            assert response.status_code < 500, f"{response.text}: {body!r:.2000}"
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert min(statuses) == 200  # a mutated request may still be a right one
        assert statuses[400] > count / 3
        answer = client.post(PATH, json=BODIES[0]).json()
        assert answer["status"] == "incomplete"
        wait_until(lambda: num_in_flight(client) == 0)
        assert "Traceback" not in server.said
