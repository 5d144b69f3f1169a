"""use_beam_search over a real socket: transformers' own beam search on the same weights, and vLLM's rules for ends."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fim_tokenizer import write_tokenizer
from octavo_server import num_in_flight, serving, stream, value, wait_until
from tiny_oracle import Oracle

PROMPTS = ["The capital of", "def f(x):\n", "日本"]
NEAR = 2e-4  # of a float32 sum of some log-probabilities


def search(client: httpx.Client, prompt: Any, width: int, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "n": width, "use_beam_search": True, "return_token_ids": True, "temperature": 0} | fields
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def reference(
    oracle: Oracle, ids: list[int], width: int, count: int, penalty: float, ends: set[int]
) -> list[tuple[float, list[int], bool]]:
    """vLLM's search, written anew over transformers' log-probabilities: (score, tokens, whether it ended), sorted.

    Of several end tokens behind one beam the likeliest counts: the answer is the same.
    """
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for _ in range(count):
        behind: list[tuple[float, list[int]]] = []
        for total, tokens in beams:
            row = oracle.logprobs(ids + tokens)[-1]
            values, tops = row.topk(2 * width)
            found = [(total + p, [*tokens, token]) for p, token in zip(values.tolist(), tops.tolist(), strict=True)]
            behind += [beam for beam in found if beam[1][-1] not in ends]
            ended += [beam for beam in found if beam[1][-1] in ends][:1]
        beams = sorted(behind, reverse=True)[:width]
    scored = [(total / (len(ids) + len(tokens) - 1) ** penalty, tokens, True) for total, tokens in ended]
    scored += [(total / (len(ids) + len(tokens)) ** penalty, tokens, False) for total, tokens in beams]
    return sorted(scored, reverse=True)[:width]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("width", [1, 3, 6])
def test_beams_are_transformers(client: httpx.Client, oracle: Oracle, prompt: str, width: int) -> None:
    ids = oracle.ids(prompt)
    expected = oracle.beams(ids, width, 9)
    answer = search(client, prompt, width, max_tokens=9, ignore_eos=True)
    assert [choice["token_ids"] for choice in answer["choices"]] == expected
    assert [choice["text"] for choice in answer["choices"]] == [oracle.text(tokens) for tokens in expected]
    assert [choice["index"] for choice in answer["choices"]] == list(range(width))
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 9 * width
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_several_prompts_and_the_log_probabilities_of_a_beam(client: httpx.Client, oracle: Oracle) -> None:
    answer = search(client, PROMPTS, 2, max_tokens=5, ignore_eos=True, logprobs=3)
    for index, choice in enumerate(answer["choices"]):
        ids = oracle.ids(PROMPTS[index // 2])
        assert choice["token_ids"] == oracle.beams(ids, 2, 5)[index % 2]
        rows = oracle.logprobs(ids + choice["token_ids"])[len(ids) - 1 : -1]
        expected = [float(row[token]) for row, token in zip(rows, choice["token_ids"], strict=True)]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=NEAR)
        assert all(3 <= len(top) <= 4 for top in choice["logprobs"]["top_logprobs"])


def test_a_stream_has_all_of_it_at_once(client: httpx.Client) -> None:
    fields = {"n": 3, "max_tokens": 6, "use_beam_search": True, "ignore_eos": True, "prompt": PROMPTS[0]}
    whole = client.post("/v1/completions", json=fields).json()["choices"]
    events = stream(client, "/v1/completions", fields)
    assert [choice for event in events for choice in event["choices"]] == whole


def test_a_conversation_is_searched_too(client: httpx.Client, oracle: Oracle) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    fields = {"n": 2, "max_tokens": 6, "use_beam_search": True, "ignore_eos": True, "return_token_ids": True}
    answer = client.post("/v1/chat/completions", json={"messages": messages} | fields).json()
    expected = oracle.beams(oracle.chat_ids(messages), 2, 6)
    assert [choice["token_ids"] for choice in answer["choices"]] == expected
    assert [choice["message"]["content"] for choice in answer["choices"]] == [oracle.text(ids) for ids in expected]


def test_more_beams_than_answers(client: httpx.Client, oracle: Oracle) -> None:
    answer = search(client, PROMPTS[0], 2, best_of=5, max_tokens=6, ignore_eos=True)
    assert [choice["token_ids"] for choice in answer["choices"]] == oracle.beams(oracle.ids(PROMPTS[0]), 5, 6)[:2]


def test_a_client_that_leaves_ends_the_search(client: httpx.Client) -> None:
    before = value(client, "vllm:request_success_total", finished_reason="abort")
    body = {"prompt": PROMPTS[0], "n": 4, "max_tokens": 480, "use_beam_search": True, "ignore_eos": True}
    request = client.build_request("POST", "/v1/completions", json=body)
    head = b"".join([b"%b: %b\r\n" % pair for pair in request.headers.raw])
    with socket.create_connection((request.url.host, request.url.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head + b"\r\n" + request.content)
        wait_until(lambda: num_in_flight(client) > 0)
    wait_until(lambda: value(client, "vllm:request_success_total", finished_reason="abort") == before + 4)
    wait_until(lambda: num_in_flight(client) == 0)


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server for which token 0, a likely one, ends an answer too."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, [])
    with serving("--tokenizer", str(directory)) as server, server.client() as client:
        yield client


@pytest.mark.parametrize("penalty", [0.0, 1.0, -2.0, 3.0])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_beams_that_end_are_ranked_as_in_vllm(
    ending: httpx.Client, oracle: Oracle, prompt: str, penalty: float
) -> None:
    ids = oracle.ids(prompt)
    expected = reference(oracle, ids, 4, 6, penalty, {0, 2})
    answer = search(ending, prompt, 4, max_tokens=6, length_penalty=penalty)
    assert [choice["token_ids"] for choice in answer["choices"]] == [tokens for _, tokens, _ in expected]
    reasons = ["stop" if has_ended else "length" for _, _, has_ended in expected]
    assert [choice["finish_reason"] for choice in answer["choices"]] == reasons
    texts = [oracle.text(tokens[:-1] if has_ended else tokens) for _, tokens, has_ended in expected]
    assert [choice["text"] for choice in answer["choices"]] == texts
    if prompt == PROMPTS[1]:
        assert "stop" in reasons


def test_calls_that_can_not_be_read_are_counted(tmp_path: Path, oracle: Oracle) -> None:
    """The token that a beam begins with is made the marker of a call, and what follows is none."""
    messages = [{"role": "user", "content": "abc"}]
    best = oracle.beams(oracle.chat_ids(messages), 2, 4)
    write_tokenizer(tmp_path, ["<tool_call>"], [best[0][0]])
    flags = ("--tokenizer", str(tmp_path), "--tool-call-parser", "hermes", "--tool-strict-level", "auto")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    body = {"messages": messages, "tools": [tool], "use_beam_search": True, "n": 2, "max_tokens": 4, "temperature": 0}
    with serving(*flags) as server, server.client() as client:
        response = client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        assert all(choice["message"]["content"] for choice in response.json()["choices"])
        count = sum(beam[0] == best[0][0] for beam in best)
        assert value(client, "octavo:tool_call_unparsed_total") == count
