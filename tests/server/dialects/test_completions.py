"""/v1/completions over a real socket: what comes is what transformers computes of the same checkpoint."""

from __future__ import annotations

from itertools import chain
from typing import Any

import httpx
import pytest
from octavo_server import stream
from tiny_oracle import Oracle

from octavo.server.encoding import PIECE_BYTES

PROMPTS = ["The capital of", "def f(x):\n", "日本", "naïve café “"]
GREEDY = {"temperature": 0, "ignore_eos": True}
NEAR = 2e-4  # two float32 computations of one log-probability


def complete(client: httpx.Client, prompt: Any, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"prompt": prompt} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def choice(client: httpx.Client, prompt: Any, **fields: Any) -> dict[str, Any]:
    (only,) = complete(client, prompt, **fields)["choices"]
    return only


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_transformers(client: httpx.Client, oracle: Oracle, prompt: str) -> None:
    ids = oracle.ids(prompt)
    expected = oracle.greedy(ids, 48)
    answer = complete(client, prompt, max_tokens=48, return_token_ids=True, **GREEDY)
    (only,) = answer["choices"]
    assert only["token_ids"] == expected
    assert only["prompt_token_ids"] == ids
    assert only["text"] == oracle.text(expected)
    assert (only["finish_reason"], only["stop_reason"], only["logprobs"]) == ("length", None, None)
    counts = (answer["usage"][f"{name}_tokens"] for name in ("prompt", "completion", "total"))
    assert tuple(counts) == (len(ids), 48, len(ids) + 48)
    assert (answer["object"], answer["model"], answer["id"][:5]) == ("text_completion", "tiny", "cmpl-")


def test_a_large_answer_comes_whole(client: httpx.Client) -> None:
    """In several pieces, whose size is told beforehand."""
    ids = [3 + i % 200 for i in range(400)]
    fields = {"max_tokens": 1, "prompt_logprobs": 20, "n": 2, "seed": 1}
    response = client.post("/v1/completions", json={"prompt": ids, **fields})
    assert len(response.content) > 2 * PIECE_BYTES
    assert response.headers["content-length"] == str(len(response.content))
    for one in response.json()["choices"]:
        first, *others = one["prompt_logprobs"]
        assert first is None
        assert [str(token) in of for token, of in zip(ids[1:], others, strict=True)] == [True] * 399


def test_special_tokens_are_shown_when_asked_for(client: httpx.Client, oracle: Oracle) -> None:
    expected = oracle.greedy(oracle.ids(PROMPTS[1]), 30)
    assert 0 in expected
    text = choice(client, PROMPTS[1], max_tokens=30, skip_special_tokens=False, **GREEDY)["text"]
    assert text == oracle.text(expected, skip_special_tokens=False)


def test_the_four_kinds_of_prompt(client: httpx.Client, oracle: Oracle) -> None:
    expected = [oracle.text(oracle.greedy(oracle.ids(prompt), 6)) for prompt in PROMPTS]
    lists = [oracle.ids(prompt) for prompt in PROMPTS]
    assert choice(client, PROMPTS[0], max_tokens=6, **GREEDY)["text"] == expected[0]
    assert choice(client, lists[0], max_tokens=6, **GREEDY)["text"] == expected[0]
    for prompts in (PROMPTS, lists):
        answer = complete(client, prompts, max_tokens=6, **GREEDY)
        assert [one["text"] for one in answer["choices"]] == expected
        assert [one["index"] for one in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, lists))
        assert answer["usage"]["completion_tokens"] == 24


def test_n_answers_to_each_of_several_prompts(client: httpx.Client) -> None:
    fields = {"max_tokens": 8, "temperature": 1.0, "seed": 7, "n": 3, "best_of": 3}
    answer = complete(client, PROMPTS[:2], **fields)
    texts = [one["text"] for one in answer["choices"]]
    assert [one["index"] for one in answer["choices"]] == list(range(6))
    assert len(set(texts[:3])) == 3
    assert len(set(texts[3:])) == 3
    assert answer["usage"]["completion_tokens"] == 48
    assert texts == [one["text"] for one in complete(client, PROMPTS[:2], **fields)["choices"]]
    assert texts[0] == choice(client, PROMPTS[0], **(fields | {"n": 1, "best_of": 1}))["text"]
    assert texts[1] == choice(client, PROMPTS[0], **(fields | {"n": 1, "best_of": 1, "seed": 8}))["text"]


def test_without_a_seed_answers_differ(client: httpx.Client) -> None:
    assert len({choice(client, "The", max_tokens=12, temperature=1.5)["text"] for _ in range(4)}) > 1


def test_log_probabilities_are_transformers(client: httpx.Client, oracle: Oracle) -> None:
    ids = oracle.ids(PROMPTS[0])
    only = choice(client, PROMPTS[0], max_tokens=12, logprobs=3, return_token_ids=True, **GREEDY)
    rows = oracle.logprobs(ids + only["token_ids"])[len(ids) - 1 : -1]
    found = only["logprobs"]
    for row, token_id, logprob, top, name in zip(
        rows, only["token_ids"], found["token_logprobs"], found["top_logprobs"], found["tokens"], strict=True
    ):
        assert name == oracle.text([token_id], skip_special_tokens=False)
        assert logprob == pytest.approx(float(row[token_id]), abs=NEAR)
        best = row.topk(3)
        assert list(top.values()) == pytest.approx(best.values.tolist(), abs=NEAR)
        assert list(top) == [oracle.text([i], skip_special_tokens=False) for i in best.indices.tolist()]


def test_zero_logprobs_are_those_of_the_tokens_alone(client: httpx.Client) -> None:
    found = choice(client, "The", max_tokens=4, logprobs=0, **GREEDY)["logprobs"]
    assert found["top_logprobs"] == [
        {name: logprob} for name, logprob in zip(found["tokens"], found["token_logprobs"], strict=True)
    ]


def test_offsets_lead_to_the_tokens_in_the_text(client: httpx.Client) -> None:
    for echo in (False, True):
        only = choice(client, PROMPTS[3], max_tokens=20, logprobs=0, echo=echo, skip_special_tokens=False, **GREEDY)
        text, found = only["text"], only["logprobs"]
        assert found["text_offset"][0] == 0
        for name, start in zip(found["tokens"], found["text_offset"], strict=True):
            if not name.startswith("bytes:"):
                assert text[start : start + len(name)] == name


def test_echo_gives_the_prompt_and_its_log_probabilities(client: httpx.Client, oracle: Oracle) -> None:
    prompt = PROMPTS[3]
    ids = oracle.ids(prompt)
    only = choice(client, prompt, max_tokens=5, echo=True, logprobs=2, return_token_ids=True, **GREEDY)
    assert only["text"] == prompt + oracle.text(only["token_ids"])
    rows, found = oracle.logprobs(ids + only["token_ids"]), only["logprobs"]
    assert len(found["tokens"]) == len(ids) + 5
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    following = (ids + only["token_ids"])[1:]
    expected = [float(row[token_id]) for row, token_id in zip(rows, following, strict=False)]
    assert found["token_logprobs"][1:] == pytest.approx(expected, abs=NEAR)
    plain = choice(client, prompt, max_tokens=5, echo=True, **GREEDY)
    assert (plain["text"], plain["logprobs"]) == (only["text"], None)


def test_a_prompt_is_scored_without_an_answer(client: httpx.Client, oracle: Oracle) -> None:
    """What lm-eval's log-likelihood tasks ask for: max_tokens 0 with echo and logprobs; token ids too."""
    ids = oracle.ids(PROMPTS[0])
    expected = [float(row[token_id]) for row, token_id in zip(oracle.logprobs(ids), ids[1:], strict=False)]
    for prompt in (PROMPTS[0], ids, [PROMPTS[0], PROMPTS[2]], [ids, ids[:3]]):
        answer = complete(client, prompt, max_tokens=0, echo=True, logprobs=1)
        first = answer["choices"][0]
        assert (first["text"], first["finish_reason"]) == (PROMPTS[0], "length")
        assert first["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=NEAR)
        assert answer["usage"]["completion_tokens"] == 0
    assert complete(client, ids, max_tokens=0, echo=True)["choices"][0]["text"] == PROMPTS[0]


def test_prompt_logprobs_name_each_token_and_the_best(client: httpx.Client, oracle: Oracle) -> None:
    ids = oracle.ids(PROMPTS[0])
    found = choice(client, PROMPTS[0], max_tokens=1, prompt_logprobs=2)["prompt_logprobs"]
    rows = oracle.logprobs(ids)
    assert found[0] is None
    for position, entry in enumerate(found[1:]):
        row, token_id = rows[position], ids[position + 1]
        best = row.topk(2)
        assert set(entry) == {str(token_id), *map(str, best.indices.tolist())}
        own = entry[str(token_id)]
        assert own["logprob"] == pytest.approx(float(row[token_id]), abs=NEAR)
        assert own["rank"] == int((row > row[token_id]).sum()) + 1
        assert own["decoded_token"] == oracle.text([token_id], skip_special_tokens=False)


def test_a_repeated_prompt_comes_out_of_the_cache(client: httpx.Client, oracle: Oracle) -> None:
    prompt = "cached: " + "one two three four " * 10
    ids = oracle.ids(prompt)
    first, second = (complete(client, prompt, max_tokens=2, **GREEDY) for _ in range(2))
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": (len(ids) - 1) // 16 * 16}
    assert first["choices"] == second["choices"]


def test_a_cache_salt_keeps_others_from_learning_what_was_asked(client: httpx.Client) -> None:
    def num_cached(**salt: str) -> int:
        answer = complete(client, "salted: " + "one two three four " * 10, max_tokens=2, **GREEDY, **salt)
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert num_cached(cache_salt="mine") == 0
    assert num_cached(cache_salt="mine") > 0
    assert [num_cached(), num_cached(cache_salt="yours")] == [0, 0]


def test_a_prompt_is_cut_where_the_request_says_so(client: httpx.Client, oracle: Oracle) -> None:
    ids = oracle.ids("one two three four five six seven")
    cut = choice(client, ids, max_tokens=4, truncate_prompt_tokens=5, return_token_ids=True, **GREEDY)
    assert cut["prompt_token_ids"] == ids[-5:]
    assert cut["token_ids"] == oracle.greedy(ids[-5:], 4)
    long = choice(client, [5] * 2000, max_tokens=4, truncate_prompt_tokens=-1, return_token_ids=True)
    assert len(long["prompt_token_ids"]) == 508


def test_max_tokens_null_is_as_if_it_were_absent(client: httpx.Client) -> None:
    for fields in ({"max_tokens": None}, {}):
        answer = complete(client, [5] * 480, **fields, **GREEDY)
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (16, "length")


def test_what_is_sampled_obeys_the_request(client: httpx.Client, oracle: Oracle) -> None:
    allowed = [100, 200, 300]
    fields = {"max_tokens": 30, "temperature": 1.5, "seed": 3, "return_token_ids": True}
    ids = choice(client, "The", allowed_token_ids=allowed, **fields)["token_ids"]
    assert {200, 300} <= set(ids) <= set(allowed)
    assert set(choice(client, "The", logit_bias={"200": 100}, **fields)["token_ids"]) == {200}
    greedy = oracle.greedy(oracle.ids("The"), 8)
    for near_greedy in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert choice(client, "The", **(fields | {"max_tokens": 8} | near_greedy))["token_ids"] == greedy
    penalized = {"temperature": 0, "repetition_penalty": 10.0, "presence_penalty": 2, "frequency_penalty": 2}
    ids = choice(client, "The", **(fields | penalized))["token_ids"]
    assert len(set(ids)) == 30


def test_streaming_gives_what_a_whole_answer_has(client: httpx.Client) -> None:
    fields = {"max_tokens": 20, "temperature": 0.9, "seed": 5, "n": 2, "logprobs": 2, "echo": True}
    fields |= {"return_token_ids": True, "skip_special_tokens": False}
    whole = complete(client, PROMPTS[2:], **fields)
    chunks = stream(
        client, "/v1/completions", {"prompt": PROMPTS[2:], "stream_options": {"include_usage": True}} | fields
    )
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    for index, expected in enumerate(whole["choices"]):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in own) == expected["text"]
        assert list(chain.from_iterable(c["token_ids"] for c in own)) == expected["token_ids"]
        assert own[0]["prompt_token_ids"] == expected["prompt_token_ids"]
        joined = {name: list(chain.from_iterable(c["logprobs"][name] for c in own)) for name in expected["logprobs"]}
        for exact in ("tokens", "text_offset"):
            assert joined[exact] == expected["logprobs"][exact]
        for position, (top, wanted) in enumerate(
            zip(joined["top_logprobs"], expected["logprobs"]["top_logprobs"], strict=True)
        ):
            assert top == pytest.approx(wanted, abs=NEAR), position
        assert joined["token_logprobs"][1:] == pytest.approx(expected["logprobs"]["token_logprobs"][1:], abs=NEAR)
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]


def test_any_bytes_come_as_transformers_decodes_them(client: httpx.Client, oracle: Oracle) -> None:
    """Tokens that are single bytes of characters, valid and not, in pieces and whole."""
    bytes_ = oracle.ids("é日🙂ñ")
    fields = {"max_tokens": 120, "temperature": 2, "allowed_token_ids": bytes_, "return_token_ids": True}
    for seed in range(4):
        body = {"prompt": "x"} | fields | {"seed": seed}
        chunks = [chunk["choices"][0] for chunk in stream(client, "/v1/completions", body)]
        ids = list(chain.from_iterable(chunk["token_ids"] for chunk in chunks))
        assert "".join(chunk["text"] for chunk in chunks) == oracle.text(ids)
        assert choice(client, "x", **(fields | {"seed": seed}))["text"] == oracle.text(ids)
