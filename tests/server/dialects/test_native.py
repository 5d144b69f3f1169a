"""SGLang's /generate over a real socket: what transformers computes of the same checkpoint, in SGLang's shapes."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from octavo_server import Server, events, serving, wait_until
from tiny_oracle import Oracle

TEXT = "The capital of"
NEAR = 2e-4  # two float32 computations of one log-probability
GREEDY = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 12}


def generate(client: httpx.Client, **fields: Any) -> Any:
    response = client.post("/generate", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/generate", json=fields)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_one_prompt(client: httpx.Client, oracle: Oracle) -> None:
    ids = oracle.ids(TEXT)
    expected = oracle.greedy(ids, 12)
    answer = generate(client, text=TEXT, sampling_params=GREEDY, rid="mine")
    assert answer["text"] == oracle.text(expected)
    assert answer["output_ids"] == expected
    about = answer["meta_info"]
    assert (about["id"], about["prompt_tokens"], about["completion_tokens"]) == ("mine", len(ids), 12)
    assert about["finish_reason"] == {"type": "length", "length": 12}
    assert about["e2e_latency"] > 0
    same = generate(client, input_ids=ids, sampling_params=GREEDY)
    assert (same["text"], same["output_ids"]) == (answer["text"], expected)
    assert client.put("/generate", json={"text": TEXT, "sampling_params": GREEDY}).json()["output_ids"] == expected


def test_several_prompts_with_their_own_parameters(client: httpx.Client, oracle: Oracle) -> None:
    texts = [TEXT, "x", "日本"]
    params = [GREEDY, GREEDY | {"max_new_tokens": 3}, GREEDY | {"n": 2}]
    answers = generate(client, text=texts, sampling_params=params, rid=["a", "b", "c"])
    lengths = [(0, 12), (1, 3), (2, 12), (2, 12)]
    assert [answer["index"] for answer in answers] == [0, 1, 2, 3]
    for answer, (index, length) in zip(answers, lengths, strict=True):
        assert answer["output_ids"] == oracle.greedy(oracle.ids(texts[index]), length)
        assert answer["meta_info"]["id"] == "abc"[index]
    (only,) = generate(client, input_ids=[oracle.ids(TEXT)], sampling_params=GREEDY)
    assert only["output_ids"] == answers[0]["output_ids"]
    two = generate(client, text=TEXT, sampling_params={"n": 2, "sampling_seed": 4, "max_new_tokens": 9})
    openai = client.post("/v1/completions", json={"prompt": TEXT, "n": 2, "seed": 4, "max_tokens": 9}).json()
    assert [answer["text"] for answer in two] == [choice["text"] for choice in openai["choices"]]


def stream(client: httpx.Client, **fields: Any) -> list[Any]:
    with client.stream("POST", "/generate", json=fields | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        return list(events(response.iter_lines()))


def test_a_stream_says_all_of_it_each_time(client: httpx.Client) -> None:
    whole = generate(client, text=TEXT, sampling_params=GREEDY)
    found = stream(client, text=TEXT, sampling_params=GREEDY)
    assert [len(event["output_ids"]) for event in found] == list(range(1, 13))
    assert all(later["text"].startswith(event["text"]) for event, later in itertools.pairwise(found))
    assert found[-1]["text"] == whole["text"]
    assert found[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    assert all(event["meta_info"]["finish_reason"] is None for event in found[:-1])
    rarer = stream(client, text=TEXT, sampling_params=GREEDY | {"stream_interval": 5})
    assert [len(event["output_ids"]) for event in rarer] == [1, 6, 11, 12]
    both = stream(client, text=[TEXT, "x"], sampling_params=GREEDY)
    last = {event["index"]: event for event in both}
    assert last[0]["text"] == whole["text"]
    assert sorted(last) == [0, 1]


def test_log_probabilities(client: httpx.Client, oracle: Oracle) -> None:
    ids = oracle.ids(TEXT)
    fields = {"text": TEXT, "sampling_params": GREEDY, "return_logprob": True, "return_text_in_logprobs": True}
    answer = generate(client, **fields, logprob_start_len=2, top_logprobs_num=2)
    about = answer["meta_info"]
    rows = oracle.logprobs(ids + answer["output_ids"])
    inputs = about["input_token_logprobs"]
    assert inputs[0] == [None, ids[2], oracle.text([ids[2]])]
    assert [entry[1] for entry in inputs] == ids[2:]
    for position, (logprob, token, _) in enumerate(inputs[1:], start=3):
        assert logprob == pytest.approx(float(rows[position - 1][token]), abs=NEAR)
    outputs = about["output_token_logprobs"]
    assert [entry[1] for entry in outputs] == answer["output_ids"]
    for position, (logprob, token, _) in enumerate(outputs, start=len(ids)):
        assert logprob == pytest.approx(float(rows[position - 1][token]), abs=NEAR)
    for position, top in enumerate(about["output_top_logprobs"], start=len(ids)):
        assert [entry[1] for entry in top] == rows[position - 1].topk(2).indices.tolist()
    assert about["input_top_logprobs"][0] is None
    for position, top in enumerate(about["input_top_logprobs"][1:], start=3):
        assert [entry[1] for entry in top] == rows[position - 1].topk(2).indices.tolist()
    named = generate(client, **fields, token_ids_logprob=[9, 263])["meta_info"]
    assert (named["input_token_logprobs"], named["input_token_ids_logprobs"]) == ([], [])
    assert_named(named["output_token_ids_logprobs"], rows, len(ids))
    scored = generate(
        client, text=TEXT, sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0
    )
    assert len(scored["meta_info"]["input_token_logprobs"]) == len(ids)
    assert scored["output_ids"] == []
    assert scored["meta_info"]["input_token_logprobs"][1][2] is None


NAMED = [9, 263]


def assert_named(found: list[Any], rows: Any, first: int) -> None:
    """`found` are the log-probabilities of NAMED at the positions from `first` on."""
    for position, entries in enumerate(found, start=first):
        assert [entry[1] for entry in entries] == NAMED
        expected = [float(rows[position - 1][token]) for token in NAMED]
        assert [entry[0] for entry in entries] == pytest.approx(expected, abs=NEAR)


def test_log_probabilities_of_named_tokens_for_the_prompt_too(client: httpx.Client, oracle: Oracle) -> None:
    ids = oracle.ids(TEXT)
    fields = {"text": TEXT, "sampling_params": GREEDY, "return_logprob": True, "token_ids_logprob": NAMED}
    answer = generate(client, **fields, logprob_start_len=1, top_logprobs_num=2)
    about = answer["meta_info"]
    rows = oracle.logprobs(ids + answer["output_ids"])
    first, *others = about["input_token_ids_logprobs"]
    assert first is None
    assert len(others) == len(ids) - 2
    assert_named(others, rows, 2)
    assert len(about["output_token_ids_logprobs"]) == 12
    assert_named(about["output_token_ids_logprobs"], rows, len(ids))
    for name, begin in (("input_top_logprobs", 1), ("output_top_logprobs", len(ids))):
        for position, top in enumerate(about[name], start=begin):
            if top is not None:
                assert [entry[1] for entry in top] == rows[position - 1].topk(2).indices.tolist()
    alone = generate(client, **fields, logprob_start_len=0)["meta_info"]
    assert len(alone["input_token_ids_logprobs"]) == len(ids)
    assert_named(alone["input_token_ids_logprobs"][1:], rows, 1)
    assert "input_top_logprobs" not in alone
    batch = fields | {"text": [TEXT, "x"], "token_ids_logprob": [NAMED, [7]], "logprob_start_len": [1, -1]}
    one, two = (each["meta_info"] for each in generate(client, **batch))
    assert one["input_token_ids_logprobs"] == about["input_token_ids_logprobs"]
    assert two["input_token_ids_logprobs"] == []
    assert {entry[1] for (entry,) in two["output_token_ids_logprobs"]} == {7}


def test_what_the_sampling_parameters_mean(client: httpx.Client, oracle: Oracle) -> None:
    def text(**params: Any) -> str:
        return generate(client, text=TEXT, sampling_params={"temperature": 0, "ignore_eos": True} | params)["text"]

    plain = oracle.text(oracle.greedy(oracle.ids(TEXT), 128))
    assert text() == plain  # 128 new tokens
    stop = plain[20:23]
    assert text(stop=stop) == plain[: plain.index(stop)]
    assert text(stop=[stop], no_stop_trim=True) == plain[: plain.index(stop) + 3]
    pattern = r"p[a-z]+"
    assert text(stop_regex=pattern) == plain[: min(end for end in range(1, 99) if re.search(pattern, plain[:end]))]
    assert re.fullmatch(r"[0-9]{3}", text(regex="[0-9]{3}", max_new_tokens=9))
    assert json.loads(text(json_schema='{"type": "boolean"}', max_new_tokens=20)) in (True, False)
    assert text(ebnf='root ::= "yes" | "no"', max_new_tokens=9) in ("yes", "no")
    answer = generate(client, text=TEXT, sampling_params={"temperature": 0, "stop": stop})
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    tokens = oracle.greedy(oracle.ids(TEXT), 5)
    ended = generate(client, text=TEXT, sampling_params={"temperature": 0, "stop_token_ids": tokens[4:]})
    assert ended["meta_info"]["finish_reason"] == {"type": "stop", "matched": tokens[4]}
    most = generate(client, input_ids=[5] * 500, sampling_params={"max_new_tokens": 10_000, "ignore_eos": True})
    assert most["meta_info"]["completion_tokens"] == 12  # what the context leaves
    beams = generate(client, text=TEXT, sampling_params=GREEDY | {"beam_width": 4, "n": 2, "max_new_tokens": 6})
    assert [beam["output_ids"] for beam in beams] == oracle.beams(oracle.ids(TEXT), 4, 6)[:2]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "text"),
        ({"text": "x", "input_ids": [1]}, "text"),
        ({"text": []}, "text"),
        ({"input_ids": [5000]}, "input_ids"),
        ({"text": "x", "unknown": 1}, "unknown"),
        ({"text": "x", "image_data": "x"}, "image_data"),
        ({"text": "x", "image_data": {"url": "x"}}, "image_data"),
        ({"text": "x", "lora_path": "x"}, "lora_path"),
        ({"text": "x", "session_params": {"id": "x"}}, "session_params"),
        ({"text": "x", "return_hidden_states": True}, "return_hidden_states"),
        ({"text": "x", "sampling_params": {"unknown": 1}}, "unknown"),
        ({"text": "x", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"text": "x", "sampling_params": {"max_new_tokens": 3, "min_new_tokens": 4}}, "min_new_tokens"),
        ({"text": "x", "sampling_params": {"stop_regex": "("}}, "stop_regex"),
        ({"text": "x", "sampling_params": {"regex": "("}}, "regex"),
        ({"text": ["x", "y"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": ["x", "y"], "rid": ["a"]}, "rid"),
        ({"text": "x", "return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
        ({"text": "x", "return_logprob": True, "token_ids_logprob": [5000]}, "token_ids_logprob"),
        ({"text": "x", "return_logprob": True, "logprob_start_len": 400}, "logprob_start_len"),
        ({"text": "x", "logprob_start_len": -2}, "logprob_start_len"),
        ({"text": ["x", "y"], "session_params": {"id": "x"}}, "session_params"),
        ({"text": "x", "session_params": {"rid": "x"}}, "session_params"),
        ({"text": "x", "session_params": {"id": "x"}, "sampling_params": {"n": 2}}, "session_params"),
        ({"text": "x", "session_params": {"id": "x"}, "sampling_params": {"beam_width": 2}}, "session_params"),
        ({"text": ["x", "y"], "sampling_params": [{}, {"beam_width": 2}]}, "beam_width"),
        ({"input_ids": [5] * 512}, "prompt"),
    ],
)
def test_what_can_t_be_done_is_refused_by_name(client: httpx.Client, fields: dict[str, Any], name: str) -> None:
    error = refused(client, **fields)
    assert name in error["message"] or error["param"] == name, error


def test_the_routes_beside_it(client: httpx.Client) -> None:
    for path in ("/get_model_info", "/model_info"):
        about = client.get(path).json()
        assert (about["served_model_name"], about["is_generation"]) == ("tiny", True)
    assert client.get("/get_server_info").json()["context_length"] == 512
    assert client.get("/health_generate").status_code == 200
    ids = [11 + number % 50 for number in range(40)]
    generate(client, input_ids=ids, sampling_params=GREEDY)
    cached = generate(client, input_ids=ids, sampling_params=GREEDY)["meta_info"]["cached_tokens"]
    assert cached == 32
    assert client.post("/flush_cache").text == "Cache flushed.\n"
    assert generate(client, input_ids=ids, sampling_params=GREEDY)["meta_info"]["cached_tokens"] == 0
    assert client.get("/flush_cache").status_code == 200


def test_a_request_is_ended_by_its_rid(server: Server, client: httpx.Client) -> None:
    long = {"max_new_tokens": 480, "ignore_eos": True, "temperature": 0}
    begun = threading.Event()

    def read() -> list[Any]:
        found = []
        fields = {"text": TEXT, "sampling_params": long, "rid": "long-1", "stream": True}
        with server.client() as own, own.stream("POST", "/generate", json=fields) as response:
            for event in events(response.iter_lines()):
                found.append(event)
                begun.set()
        return found

    with ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(read)
        assert begun.wait(300)
        assert client.post("/abort_request", json={"rid": "another"}).status_code == 200
        assert client.post("/abort_request", json={"rid": "long-"}).status_code == 200
        last = streamed.result(300)[-1]["meta_info"]
        assert last["finish_reason"]["type"] in ("abort", "length")
        whole = pool.submit(generate, client, text=TEXT, sampling_params=long)
        with server.client() as other:
            wait_until(lambda: whole.done() or other.get("/load").json()["server_load"] > 0)
            other.post("/abort_request", json={"abort_all": True})
        assert whole.result(300)["meta_info"]["finish_reason"]["type"] in ("abort", "length")
    assert client.post("/abort_request", json={}).status_code == 400


@pytest.fixture(scope="module")
def reader() -> Iterator[httpx.Client]:
    with serving("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3") as server, server.client() as client:
        yield client


def test_reasoning_and_calls_are_told_apart(reader: httpx.Client) -> None:
    for text in ("<think>\nWhy not\n</think>\n\nYes.", "Why not\n</think>\n\nYes."):
        found = reader.post("/separate_reasoning", json={"text": text}).json()
        assert {key: value.strip() for key, value in found.items()} == {"reasoning_text": "Why not", "text": "Yes."}
    assert reader.post("/separate_reasoning", json={"text": "Yes."}).json() == {"reasoning_text": "", "text": "Yes."}
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    found = reader.post("/parse_function_call", json={"text": "So: " + call + "\n" + call, "tools": tools}).json()
    assert found["normal_text"].strip() == "So:"
    assert [(each["tool_index"], each["name"]) for each in found["calls"]] == [(0, "f"), (1, "f")]
    assert [json.loads(each["parameters"]) for each in found["calls"]] == [{"a": 1}, {"a": 1}]
