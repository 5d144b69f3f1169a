"""A server that speculates says what another one says, whole and streamed, and counts what it guessed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from octavo_server import Server, events, samples, serving, stream

WORDS = "one two three one two three one two three one two"
COMPLETION = {"prompt": WORDS, "max_tokens": 60, "ignore_eos": True, "return_token_ids": True}
CHAT = {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 40}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("/v1/completions", COMPLETION | {"temperature": 0}),
    "drawn": ("/v1/completions", COMPLETION | {"temperature": 0.5, "seed": 4, "n": 3}),
    "penalties": ("/v1/completions", COMPLETION | {"temperature": 0, "frequency_penalty": 0.1}),
    "stopped": ("/v1/completions", COMPLETION | {"temperature": 0, "stop": ["e", "o"], "min_tokens": 4}),
    "chat": ("/v1/chat/completions", CHAT | {"temperature": 0}),
    "a grammar": (
        "/v1/chat/completions",
        CHAT | {"temperature": 1, "seed": 1, "structured_outputs": {"regex": "(one|two|three)( (one|two|three)){9}"}},
    ),
}


@pytest.fixture(scope="module", params=["ngram", "suffix"])
def speculating(request: pytest.FixtureRequest) -> Iterator[Server]:
    config = f'{{"method": "{request.param}", "num_speculative_tokens": 5}}'
    told = ("--per-request-spec-decode-metrics", "detailed")
    with serving("--served-model-name", "tiny", "--speculative-config", config, *told) as server:
        assert f"speculation: {request.param}, up to 5 drafts" in server.said
        yield server


def answers(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def streamed(client: httpx.Client, path: str, body: dict[str, Any]) -> str:
    said = ""
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        for event in events(response.iter_lines()):
            for choice in event["choices"]:
                said += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return said


def test_answers_are_those_of_a_server_without(client: httpx.Client, speculating: Server) -> None:
    with speculating.client() as another:
        for path, body in BODIES.values():
            expected = answers(client, path, body)
            assert answers(another, path, body) == expected
            if len(expected) == 1:
                told = expected[0].get("text") or expected[0].get("message", {}).get("content")
                assert streamed(another, path, body) == told
        counted = {(name, labels): value for (name, labels), value in samples(another).items() if "spec_decode" in name}
    drafts, tokens, right = (
        counted[f"vllm:spec_decode_num_{what}_total", ()] for what in ("drafts", "draft_tokens", "accepted_tokens")
    )
    by_position = {
        int(dict(labels)["position"]): value
        for (name, labels), value in counted.items()
        if name == "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    }
    assert 0 < right == sum(by_position.values()) <= tokens <= 5 * drafts
    assert list(by_position) == list(range(len(by_position)))
    assert list(by_position.values()) == sorted(by_position.values(), reverse=True)


def counters(client: httpx.Client) -> list[float]:
    """Steps that checked drafts, these drafts, and those that were right, of all requests."""
    found = samples(client)
    names = ("drafts", "draft_tokens", "accepted_tokens")
    return [found[f"vllm:spec_decode_num_{name}_total", ()] for name in names]


def told_by(body: dict[str, Any]) -> dict[str, Any]:
    """What an answer tells of its drafts, after a look at whether it agrees with itself."""
    told: dict[str, Any] = body["metrics"]["speculative_decoding"]
    drafted, right = told.get("per_step_drafted", []), told.get("per_step_accepted", [])  # none where none paid
    assert told["num_spec_steps"] == len(drafted) == len(right)
    assert (told["num_draft_tokens"], told["num_accepted_draft_tokens"]) == (sum(drafted), sum(right))
    assert told["acceptance_histogram"] == [right.count(number) for number in range(6)]
    assert told["num_spec_tokens"] == 5
    return told


def test_each_answer_tells_how_its_drafts_fared(client: httpx.Client, speculating: Server) -> None:
    """As much as the server's counters grow with it, whole and streamed, in each dialect that has a place for it."""
    names = ("num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens")
    body = COMPLETION | {"temperature": 0}
    chat = CHAT | {"temperature": 0}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    response = {"input": WORDS, "max_output_tokens": 40, "temperature": 0}
    with speculating.client() as another:
        for path, asked in {"/v1/completions": body, "/v1/chat/completions": chat, "/v1/responses": response}.items():
            before = counters(another)
            told = told_by(another.post(path, json=asked).json())
            after = counters(another)
            assert [told[name] for name in names] == [one - other for one, other in zip(after, before, strict=True)]
        *_, last = stream(another, "/v1/chat/completions", chat | streamed)
        assert last["usage"]
        told_by(last)
        *_, last = another.post("/v1/responses", json=response | {"stream": True}).text.split("\ndata: ")
        told_by(json.loads(last)["response"])
        before = counters(another)
        asked = {"text": WORDS, "sampling_params": {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True}}
        about = another.post("/generate", json=asked).json()["meta_info"]
        names = ("spec_verify_ct", "spec_draft_token_num", "spec_accept_token_num")
        assert [about[name] for name in names] == [
            one - other for one, other in zip(counters(another), before, strict=True)
        ]
        assert about["spec_accept_length"] == 1 + about["spec_accept_token_num"] / max(1, about["spec_verify_ct"])
        assert sum(counters(another)) > 0
        assert another.post("/v1/completions", json=body | {"n": 2}).json()["metrics"] is None
    assert "metrics" not in client.post("/v1/completions", json=body).json()


def test_log_probabilities_are_those_without(client: httpx.Client, speculating: Server) -> None:
    body = {"prompt": WORDS, "max_tokens": 40, "temperature": 0, "logprobs": 3, "ignore_eos": True}
    with speculating.client() as another:
        expected, found = (answers(it, "/v1/completions", body)[0]["logprobs"] for it in (client, another))
    assert found["tokens"] == expected["tokens"]
    assert len(found["token_logprobs"]) == 40
    assert found["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-4)  # float32, other GEMM shapes
    for one, other in zip(found["top_logprobs"], expected["top_logprobs"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
