"""Mutated requests to SGLang's routes and OpenAI's older ones, with the fields that they have: answered or refused."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import httpx
import pytest
from mutated import mutated
from octavo_server import Server, num_in_flight, wait_until
from slow_cases import slow

Json = dict[str, Any]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
BODIES: dict[str, list[Json]] = {
    "/generate": [
        {
            "text": ["The capital", "x"],
            "sampling_params": [
                {"max_new_tokens": 3, "temperature": 0.5, "stop": ["zz"], "stop_regex": "q+z", "n": 2},
                {"max_new_tokens": 2, "min_new_tokens": 1, "sampling_seed": 3, "logit_bias": {"5": 1.0}},
            ],
            "return_logprob": [True, False],
            "logprob_start_len": [0, -1],
            "top_logprobs_num": [2, 0],
            "rid": ["a", "b"],
        },
        {
            "input_ids": [5, 6, 7],
            "sampling_params": {"max_new_tokens": 3, "top_k": 5, "top_p": 0.9, "stop_token_ids": [9]},
            "return_logprob": True,
            "token_ids_logprob": [5, 6],
            "logprob_start_len": 1,
            "top_logprobs_num": 1,
            "stream": True,
            "log_metrics": True,
        },
        {"text": "x", "sampling_params": {"max_new_tokens": 3, "beam_width": 3, "n": 2}},
        {"text": "x", "sampling_params": {"max_new_tokens": 9, "json_schema": json.dumps(SCHEMA)}, "rid": "c"},
        {
            "input_ids": [5, 6],
            "sampling_params": {"max_new_tokens": 2},
            "session_params": {"id": "mutated", "rid": None, "offset": -1, "replace": True},
        },
    ],
    "/open_session": [{"capacity_of_str_len": 5, "streaming": False, "timeout": 0.001}],
    "/v1/decisions": [
        {
            "input": ["x", {"y": 1}],
            "questions": [
                {"id": "a", "type": "choice", "question": "Which?", "options": [{"name": "n"}, {"name": "m"}]},
                {"id": "b", "type": "score", "question": {"how": "?"}, "levels": ["low", "high"]},
            ],
            "temperature": 0.5,
            "chat_template_kwargs": {"a": 1},
            "prompt_format_version": 1,
        }
    ],
    "/v1/systemone": [
        {
            "model": "tiny",
            "state": "x",
            "questions": {
                "a": {"type": "choice", "instructions": "Which?", "criteria": {"n": None, "m": "what"}},
                "b": {"type": "score", "instructions": "How?", "criteria": ["low", "high"]},
            },
        }
    ],
    "/v1/completions": [
        {
            "prompt": ["The capital", "x"],
            "max_tokens": 3,
            "n": 1,
            "best_of": 3,
            "bad_words": ["of", "The cap"],
            "logprobs": 1,
            "repetition_detection": {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 2},
            "stop_regex": ["q+z"],
            "truncate_prompt_tokens": 4,
            "truncation_side": "right",
        },
        {
            "prompt": [5, 6, 7],
            "max_tokens": 4,
            "stream": True,
            "stream_interval": 2,
            "logprobs": 0,
            "logprob_token_ids": [5, 6],
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        },
        {"prompt": "x", "max_tokens": 3, "use_beam_search": True, "length_penalty": 0.5, "n": 3, "temperature": 0},
        {"prompt": "x", "max_tokens": 1, "echo": True, "logprobs": 1, "prompt_logprobs": 1, "stream": True},
    ],
    "/v1/chat/completions": [
        {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                {"role": "user", "content": "Hi", "name": "u"},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "hm",
                    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "1"}]},
                {"role": "user", "content": "And now?"},
            ],
            "max_completion_tokens": 3,
            "logprobs": True,
            "top_logprobs": 2,
            "n": 2,
            "stop": ["zz"],
            "seed": 7,
            "frequency_penalty": 0.5,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": False},
        },
        {
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 9,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
            "chat_template_kwargs": {"a": 1},
            "temperature": 0.5,
            "top_p": 0.9,
            "logit_bias": {"5": 1.0},
            "user": "u",
            "metadata": {"a": "b"},
        },
        {
            "messages": [{"role": "assistant", "content": "The"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
            "structured_outputs": {"choice": ["a", "b"]},
            "max_tokens": 2,
            "prompt_logprobs": 1,
            "return_token_ids": True,
            "priority": 0,
            "cache_salt": "s",
        },
    ],
}


def check_good(client: httpx.Client, path: str) -> None:
    for body in BODIES[path]:
        response = client.post(path, json=body)
        assert response.status_code == 200, f"{response.text:.500}: {json.dumps(body)}"


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize(("count", "seed"), [(100, 1), slow(10_000, 2)])
def test_mutated_requests(server: Server, path: str, count: int, seed: int) -> None:
    with server.client() as client:
        client.post("/open_session", json={"session_id": "mutated"})
        check_good(client, path)
        statuses: Counter[int] = Counter()
        for body in mutated(BODIES[path], count, seed):
            response = client.post(path, json=body)
            shown = f"{path} {response.status_code} {response.text:.500}: {json.dumps(body):.2000}"
            assert response.status_code < 500, shown
            if response.status_code == 200:
                assert "internal error" not in response.text, shown
            else:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}, shown
            statuses[response.status_code] += 1
        assert statuses[200] > count / 20  # a mutated request may still be a right one
        assert statuses[400] > count / 4
        check_good(client, path)
        wait_until(lambda: num_in_flight(client) == 0)
        assert "Traceback" not in server.said
