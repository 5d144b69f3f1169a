"""vLLM's and SGLang's own fields of completions and chat, each against a truth that is computed anew here."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from octavo_server import serving, stream
from tiny_oracle import Oracle

PATH = "/v1/completions"
CHAT = "/v1/chat/completions"
PROMPT = "The capital of"
NEAR = 2e-4  # two float32 computations of one log-probability
GREEDY = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def post(client: httpx.Client, path: str = PATH, **fields: Any) -> dict[str, Any]:
    response = client.post(path, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def only(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    (choice,) = post(client, **GREEDY | fields)["choices"]
    return choice


def greedy_without(oracle: Oracle, ids: list[int], count: int, words: set[tuple[int, ...]]) -> list[int]:
    """Greedy decoding in which no token may complete one of these sequences."""
    found: list[int] = []
    for _ in range(count):
        row = oracle.logprobs(ids + found)[-1].clone()
        for word in words:
            if len(word) == 1 or tuple(found[-len(word) + 1 :]) == word[:-1]:
                row[word[-1]] = float("-inf")
        found.append(int(row.argmax()))
    return found


def test_bad_words_never_come(client: httpx.Client, oracle: Oracle) -> None:
    ids = oracle.ids(PROMPT)
    plain = oracle.greedy(ids, 40)
    words = [oracle.text(plain[:1]), oracle.text(plain[3:6]), oracle.text(plain[10:12]), "not of this text"]
    forms = {tuple(oracle.ids(form)) for word in words for form in (word.lstrip(), " " + word.lstrip())}
    assert {1, 2} <= {len(form) for form in forms}
    choice = only(client, max_tokens=40, bad_words=words)
    assert choice["token_ids"] == greedy_without(oracle, ids, 40, forms)
    assert choice["token_ids"] != plain
    for seed in range(5):
        tokens = only(client, max_tokens=60, bad_words=words, temperature=1.5, seed=seed)["token_ids"]
        for form in forms:
            assert not any(tuple(tokens[at : at + len(form)]) == form for at in range(60))


def test_bad_words_of_several_answers_at_once(client: httpx.Client, oracle: Oracle) -> None:
    """Beside others, and n times from one prompt, each with its own tokens behind it."""
    ids = oracle.ids(PROMPT)
    word = oracle.text(oracle.greedy(ids, 4)[2:4])
    forms = {tuple(oracle.ids(form)) for form in (word.lstrip(), " " + word.lstrip())}
    answer = post(client, **GREEDY | {"temperature": 1, "seed": 3, "n": 8, "max_tokens": 80, "bad_words": [word]})
    for choice in answer["choices"]:
        tokens = choice["token_ids"]
        assert not any(tuple(tokens[at : at + len(form)]) == form for form in forms for at in range(80))


def test_the_best_of_several(client: httpx.Client) -> None:
    fields = {"temperature": 1.0, "seed": 11, "max_tokens": 12}
    all_of_them = post(client, **GREEDY | fields | {"n": 6, "logprobs": 0})["choices"]
    means = [sum(choice["logprobs"]["token_logprobs"]) / 12 for choice in all_of_them]
    ranked = sorted(range(6), key=lambda index: -means[index])
    best = post(client, **GREEDY | fields | {"n": 2, "best_of": 6})
    assert [choice["token_ids"] for choice in best["choices"]] == [
        all_of_them[index]["token_ids"] for index in ranked[:2]
    ]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in best["choices"])
    assert best["usage"]["completion_tokens"] == 6 * 12  # all were computed
    two = post(client, **GREEDY | fields | {"prompt": [PROMPT, "x"], "n": 1, "best_of": 3, "echo": True, "logprobs": 1})
    assert [choice["text"][:1] for choice in two["choices"]] == ["T", "x"]
    assert [choice["index"] for choice in two["choices"]] == [0, 1]


@pytest.mark.parametrize(("side", "kept"), [("left", slice(-5, None)), ("right", slice(0, 5)), (None, slice(-5, None))])
def test_the_side_that_is_cut(client: httpx.Client, oracle: Oracle, side: str | None, kept: slice) -> None:
    text = "one two three four five six seven eight"
    ids = oracle.ids(text)
    choice = only(client, prompt=text, truncate_prompt_tokens=5, truncation_side=side, max_tokens=1)
    assert choice["prompt_token_ids"] == ids[kept]
    most = only(client, prompt=[17] * 100 + [18] * 600, truncate_prompt_tokens=-1, truncation_side=side, max_tokens=2)
    assert (17 in most["prompt_token_ids"]) is (side == "right")
    assert len(most["prompt_token_ids"]) == 510


def test_tokens_by_their_ids(client: httpx.Client) -> None:
    choice = only(client, max_tokens=6, logprobs=2, return_tokens_as_token_ids=True)
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    tops = choice["logprobs"]["top_logprobs"]
    assert all(re.fullmatch(r"token_id:\d+", name) for top in tops for name in top)
    assert all(f"token_id:{token}" in top for token, top in zip(choice["token_ids"], tops, strict=True))
    plain = only(client, max_tokens=6, logprobs=2)
    assert plain["logprobs"]["token_logprobs"] == choice["logprobs"]["token_logprobs"]
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    (chat,) = post(client, CHAT, **asked, return_tokens_as_token_ids=True, return_token_ids=True)["choices"]
    content = chat["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{token}" for token in chat["token_ids"]]
    assert all(top["token"].startswith("token_id:") for entry in content for top in entry["top_logprobs"])


def test_log_probabilities_of_named_tokens(client: httpx.Client, oracle: Oracle) -> None:
    named = [900, 5, 263, 41]
    choice = only(client, max_tokens=5, logprobs=1, logprob_token_ids=named, return_tokens_as_token_ids=True)
    ids = oracle.ids(PROMPT)
    rows = oracle.logprobs(ids + choice["token_ids"])[len(ids) - 1 : -1]
    for row, token, top in zip(rows, choice["token_ids"], choice["logprobs"]["top_logprobs"], strict=True):
        assert set(top) == {f"token_id:{each}" for each in (*named, token)}
        for name, logprob in top.items():
            assert logprob == pytest.approx(float(row[int(name[9:])]), abs=NEAR)
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "logprobs": True}
    chat_ids = oracle.chat_ids(asked["messages"])
    (chat,) = post(client, CHAT, **asked, logprob_token_ids=named, return_token_ids=True)["choices"]
    rows = oracle.logprobs(chat_ids + chat["token_ids"])[len(chat_ids) - 1 : -1]
    for row, entry in zip(rows, chat["logprobs"]["content"], strict=True):
        found = [top["logprob"] for top in entry["top_logprobs"]]
        assert found == pytest.approx([float(row[token]) for token in named], abs=NEAR)


def first_repetition(tokens: list[int], most: int, least: int, count: int) -> int | None:
    """How many tokens there are when their end is a pattern `count` times; None where it never comes so."""
    for length in range(1, len(tokens) + 1):
        for size in range(max(1, least), most + 1):
            end = tokens[max(0, length - size * count) : length]
            if len(end) == size * count and end == end[:size] * count:
                return length
    return None


@pytest.mark.parametrize(("most", "least", "count"), [(8, 0, 2), (3, 2, 2), (4, 1, 3), (1, 1, 50)])
def test_an_answer_that_repeats_itself_ends(client: httpx.Client, most: int, least: int, count: int) -> None:
    rule = {"max_pattern_size": most, "min_pattern_size": least, "min_count": count}
    for allowed in ([263, 284], [263, 284, 750], [263]):
        fields = {"temperature": 1.0, "seed": 5, "allowed_token_ids": allowed, "max_tokens": 60}
        whole = only(client, **fields)["token_ids"]
        choice = only(client, **fields, repetition_detection=rule)
        expected = first_repetition(whole, most, least, count)
        assert choice["token_ids"] == whole[:expected]
        reasons = ("length", None) if expected in (None, 60) else ("repetition", "repetition_detected")
        assert (choice["finish_reason"], choice["stop_reason"]) == reasons
        later = only(client, **fields, repetition_detection=rule, min_tokens=40)
        assert len(later["token_ids"]) >= 40
    assert only(client, max_tokens=3, repetition_detection={"max_pattern_size": 0})["finish_reason"] == "length"


@pytest.mark.parametrize("path", [PATH, CHAT])
def test_events_that_wait_for_several_tokens(client: httpx.Client, path: str) -> None:
    fields: dict[str, Any] = {"max_tokens": 23, "temperature": 0, "ignore_eos": True, "return_token_ids": True, "n": 2}
    fields |= {"prompt": PROMPT} if path == PATH else {"messages": [{"role": "user", "content": "x"}]}
    one_by_one = [choice for event in stream(client, path, fields) for choice in event["choices"]]
    joined = [choice for event in stream(client, path, fields | {"stream_interval": 7}) for choice in event["choices"]]
    for index in (0, 1):
        sizes = [len(choice["token_ids"]) for choice in joined if choice["index"] == index and "token_ids" in choice]
        assert sizes == [1, 7, 7, 7, 1]
        for choices in (one_by_one, joined):
            own = [choice for choice in choices if choice["index"] == index]
            texts = [choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in own]
            tokens = [token for choice in own for token in choice.get("token_ids", ())]
            assert len(tokens) == 23
            assert own[-1]["finish_reason"] == "length"
            if choices is one_by_one:
                expected = "".join(texts)
            else:
                assert "".join(texts) == expected


@pytest.mark.parametrize("patterns", [r"[.]\w+", ["zzz", r"(?i)THE\b.{3}"], r"p[a-z]+", r"\n|public.+of"])
def test_a_text_ends_where_a_pattern_matches(client: httpx.Client, oracle: Oracle, patterns: str | list[str]) -> None:
    text = oracle.text(oracle.greedy(oracle.ids(PROMPT), 50))
    listed = [patterns] if isinstance(patterns, str) else patterns
    ends = (end for end in range(1, len(text) + 1) if any(re.search(each, text[:end]) for each in listed))
    end = next(ends)
    choice = only(client, max_tokens=50, stop_regex=patterns)
    assert choice["text"] == text[:end]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] in listed
    events = stream(client, PATH, GREEDY | {"max_tokens": 50, "stop_regex": patterns})
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == text[:end]
    sooner = text[end - 3 : end - 1]
    cut = only(client, max_tokens=50, stop_regex=patterns, stop=[sooner])
    assert cut["text"] == text[: text.index(sooner)]
    assert cut["stop_reason"] == sooner


def test_the_text_of_the_prompt(client: httpx.Client, oracle: Oracle) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    fields = {"messages": messages, "max_tokens": 2, "return_prompt_text": True}
    text = oracle.text(oracle.chat_ids(messages), skip_special_tokens=False)
    assert post(client, CHAT, **fields)["prompt_text"] == text
    first, *others = stream(client, CHAT, fields)
    assert first["prompt_text"] == text
    assert not any("prompt_text" in event for event in others)
    assert only(client, max_tokens=1, return_prompt_text=True)["prompt_text"].strip() == PROMPT


@pytest.mark.parametrize("path", [PATH, CHAT])
def test_a_stream_brings_the_prompt_s_log_probabilities(client: httpx.Client, path: str) -> None:
    fields: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "prompt_logprobs": 2}
    fields |= {"prompt": PROMPT} if path == PATH else {"messages": [{"role": "user", "content": "x"}]}
    whole = post(client, path, **fields)
    first, *others = stream(client, path, fields)
    if path == PATH:
        assert first["choices"][0]["prompt_logprobs"] == whole["choices"][0]["prompt_logprobs"]
    else:
        assert first["prompt_logprobs"] == whole["prompt_logprobs"]
    assert not any("prompt_logprobs" in str(event) for event in others)


def test_spaces_between_special_tokens_are_the_tokens_own(client: httpx.Client, oracle: Oracle) -> None:
    """There is nothing to leave out: a text is its tokens' bytes."""
    fields = {"allowed_token_ids": [0, 1], "temperature": 1, "seed": 1, "skip_special_tokens": False, "max_tokens": 6}
    for value in (True, False, None):
        choice = only(client, **fields, spaces_between_special_tokens=value)
        assert choice["text"] == oracle.text(choice["token_ids"], skip_special_tokens=False)
        assert " " not in choice["text"]


def test_the_log_probabilities_of_the_whole_vocabulary(oracle: Oracle) -> None:
    """-1 asks for all of them, of the answer and of the prompt, whole and streamed."""
    ids = oracle.ids(PROMPT)
    answered = oracle.greedy(ids, 2)
    rows = oracle.logprobs(ids + answered)
    truth = {at: dict(enumerate(rows[at].tolist())) for at in range(len(ids) + 1)}
    wanted = {"max_tokens": 2, "prompt_logprobs": -1}
    with serving("--max-logprobs", "-1") as server, server.client() as client:
        choice = only(client, logprobs=-1, return_tokens_as_token_ids=True, **wanted)
        body = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        body |= {"logprobs": True, "top_logprobs": -1, "return_tokens_as_token_ids": True}
        (said,) = post(client, CHAT, **body)["choices"]
        streamed = stream(client, CHAT, body)
        echoed = only(client, max_tokens=1, logprobs=-1, echo=True, return_tokens_as_token_ids=True)
    for at, found in enumerate(choice["logprobs"]["top_logprobs"]):
        named = {int(name.removeprefix("token_id:")): logprob for name, logprob in found.items()}
        assert named == pytest.approx(truth[len(ids) - 1 + at], abs=NEAR)
    for at, entry in enumerate(choice["prompt_logprobs"][1:]):
        assert {int(name): one["logprob"] for name, one in entry.items()} == pytest.approx(truth[at], abs=NEAR)
    assert [found and len(found) for found in echoed["logprobs"]["top_logprobs"]] == [None] + [1024] * len(ids)
    chat = oracle.logprobs(oracle.chat_ids(body["messages"]))[-1]
    (entry,) = said["logprobs"]["content"]
    tops = {int(top["token"].removeprefix("token_id:")): top["logprob"] for top in entry["top_logprobs"]}
    assert tops == pytest.approx(dict(enumerate(chat.tolist())), abs=NEAR)
    choices = [choice for event in streamed for choice in event["choices"] if choice["logprobs"]]
    assert [choice["logprobs"]["content"] for choice in choices] == [[entry]]


@pytest.mark.parametrize(("path", "name"), [(PATH, "logprobs"), (PATH, "prompt_logprobs"), (CHAT, "top_logprobs")])
def test_the_whole_vocabulary_is_more_than_a_server_allows_by_itself(
    client: httpx.Client, path: str, name: str
) -> None:
    body = {"prompt": PROMPT} if path == PATH else {"messages": [{"role": "user", "content": "a"}], "logprobs": True}
    refused = client.post(path, json=body | {name: -1})
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"] == name
    assert error["message"].startswith(f"{name} -1, the whole vocabulary of 1024, is above this server's limit, 20")
    assert client.post(path, json=body | {name: -2}).status_code == 400
