"""SGLang's /v1/score and vLLM's /generative_scoring: probabilities are those that transformers computes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from octavo_server import Server
from tiny_oracle import Oracle

Json = dict[str, Any]
NEAR = 2e-4  # two float32 computations of one probability, relatively
QUERY = "Is this a city? "
ITEMS = ["Paris", "the red cat", "Rome and Paris"]
LABELS = [300, 7, 300, 42]


def posted(client: httpx.Client, path: str = "/v1/score", **body: Any) -> Json:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def truth(oracle: Oracle, ids: list[int], *, softmax: bool) -> list[float]:
    """The labels' probabilities behind a prompt, each for itself or among them."""
    found = oracle.logprobs(ids)[-1].double()[LABELS]
    return (found.softmax(-1) if softmax else found.exp()).tolist()


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("item_first", [False, True])
def test_scores_of_texts_and_of_ids(client: httpx.Client, oracle: Oracle, *, softmax: bool, item_first: bool) -> None:
    how = {"label_token_ids": LABELS, "apply_softmax": softmax, "item_first": item_first}
    found = posted(client, query=QUERY, items=ITEMS, **how)
    assert (found["object"], found["model"], len(found["scores"])) == ("scoring", "tiny", len(ITEMS))
    prompts = [oracle.ids(item + QUERY if item_first else QUERY + item) for item in ITEMS]
    for scores, ids in zip(found["scores"], prompts, strict=True):
        assert scores == pytest.approx(truth(oracle, ids, softmax=softmax), rel=NEAR)
    total = sum(map(len, prompts))
    assert found["usage"] == {"prompt_tokens": total, "completion_tokens": 0, "total_tokens": total}
    query = [5, 6, 7]
    items = [[8, 9], [10]]
    by_ids = posted(client, query=query, items=items, **how)["scores"]
    for scores, item in zip(by_ids, items, strict=True):
        ids = item + query if item_first else query + item
        assert scores == pytest.approx(truth(oracle, ids, softmax=softmax), rel=NEAR)


def test_one_item_and_no_query(client: httpx.Client, oracle: Oracle) -> None:
    found = posted(client, query="", items="Paris", label_token_ids=LABELS, model="tiny-too")
    assert found["model"] == "tiny-too"
    (scores,) = found["scores"]
    assert scores == pytest.approx(truth(oracle, oracle.ids("Paris"), softmax=False), rel=NEAR)
    (by_ids,) = posted(client, query=[], items=[[5, 6]], label_token_ids=LABELS)["scores"]
    assert by_ids == pytest.approx(truth(oracle, [5, 6], softmax=False), rel=NEAR)


def test_vllms_tokens_are_those_of_query_and_item_apart(client: httpx.Client, oracle: Oracle) -> None:
    found = posted(client, "/generative_scoring", query=QUERY, items=ITEMS, label_token_ids=LABELS, cache_salt="s")
    plain = oracle.tokenizer
    for number, item in enumerate(ITEMS):
        ids = oracle.ids(QUERY) + plain(item, add_special_tokens=False)["input_ids"]
        told = found["data"][number]
        assert (told["index"], told["object"]) == (number, "score")
        assert told["score"] == pytest.approx(truth(oracle, ids, softmax=True)[0], rel=NEAR)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"query": "a", "items": ["b"]}, "label_token_ids: this field is missing"),
        ({"query": "a", "items": ["b"], "label_token_ids": []}, "at least 1 item"),
        ({"query": "a", "items": ["b"], "label_token_ids": [5] * 129}, "at most 128 items"),
        ({"query": "a", "items": ["b"], "label_token_ids": [2**30]}, "not below the vocabulary size"),
        ({"query": "a", "items": ["b"], "label_token_ids": [-1]}, "greater than or equal to 0"),
        ({"query": "a", "items": [], "label_token_ids": [5]}, "at least 1 item"),
        ({"query": "a", "items": [[5]], "label_token_ids": [5]}, "both are text, or both are token ids"),
        ({"query": [5], "items": "b", "label_token_ids": [5]}, "both are text, or both are token ids"),
        ({"query": [], "items": [[]], "label_token_ids": [5]}, "at least 1 item"),
        ({"query": [2**30], "items": [[5]], "label_token_ids": [5]}, "not below the vocabulary size"),
        ({"query": "a", "items": ["b"], "label_token_ids": [5], "top_k": 3}, "top_k: octavo does not support"),
        ({"query": [5] * 100_000, "items": [[5]], "label_token_ids": [5]}, "and a label is to follow"),
        ({"query": "a" * (1 << 16), "items": ["b"] * 300, "label_token_ids": [5]}, "in front of each of 300 texts"),
    ],
)
def test_what_can_not_be_is_refused(client: httpx.Client, body: Json, said: str) -> None:
    response = client.post("/v1/score", json=body)
    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]


def test_both_kinds_of_scores_are_told_apart(server: Server) -> None:
    with server.client() as client:
        response = client.post("/v1/score", json={"queries": "a", "documents": "b"})
        assert "generates text" in response.json()["error"]["message"]
