"""/v1/chat/completions over a real socket, through the official client and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import httpx
import openai
import pytest
from octavo_server import Server, stream
from tiny_oracle import Oracle

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a naïve café?"}]
GREEDY = {"temperature": 0, "ignore_eos": True}
NEAR = 2e-4
PATH = "/v1/chat/completions"


@pytest.fixture
def official(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def choice(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"messages": CHAT} | fields)
    assert response.status_code == 200, response.text
    (only,) = response.json()["choices"]
    return only


def chunks_of(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    return [chunk["choices"][0] for chunk in stream(client, PATH, {"messages": CHAT} | fields)]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["delta"].get("content", "") for chunk in chunks)


def test_the_official_client_gets_transformers_text(official: openai.OpenAI, oracle: Oracle) -> None:
    expected = oracle.greedy(oracle.chat_ids(CHAT), 40)
    answer = official.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=40, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].message.content == oracle.text(expected)
    assert (answer.choices[0].message.role, answer.choices[0].finish_reason) == ("assistant", "length")
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "tiny", "chatcmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(oracle.chat_ids(CHAT)), 40)


def test_the_official_client_streams_it(official: openai.OpenAI, oracle: Oracle) -> None:
    expected = oracle.text(oracle.greedy(oracle.chat_ids(CHAT), 40))
    chunks = list(
        official.chat.completions.create(
            model="tiny-too",
            messages=CHAT,
            max_completion_tokens=40,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert {(chunk.model, chunk.object) for chunk in chunks} == {("tiny-too", "chat.completion.chunk")}
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 40


def test_the_official_client_understands_errors(official: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt"):
        official.chat.completions.create(model="gpt", messages=CHAT)
    with pytest.raises(openai.BadRequestError) as caught:
        official.chat.completions.create(model="tiny", messages=CHAT, tools=[{"type": "function"}])
    assert (caught.value.param, caught.value.type) == ("tools", "invalid_request_error")
    assert [model.id for model in official.models.list()] == ["tiny", "tiny-too"]
    assert official.models.retrieve("tiny-too").id == "tiny-too"


def test_log_probabilities_with_their_bytes(client: httpx.Client, oracle: Oracle) -> None:
    ids = oracle.chat_ids(CHAT)
    fields = {"max_tokens": 10, "logprobs": True, "top_logprobs": 3} | GREEDY
    whole = choice(client, return_token_ids=True, **fields)
    rows = oracle.logprobs(ids + whole["token_ids"])[len(ids) - 1 : -1]
    for row, token_id, entry in zip(rows, whole["token_ids"], whole["logprobs"]["content"], strict=True):
        assert entry["token"] == oracle.text([token_id], skip_special_tokens=False)
        assert bytes(entry["bytes"]) == entry["token"].encode()
        assert entry["logprob"] == pytest.approx(float(row[token_id]), abs=NEAR)
        best = row.topk(3)
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(best.values.tolist(), abs=NEAR)
        names = [oracle.text([i], skip_special_tokens=False) for i in best.indices.tolist()]
        assert [top["token"] for top in entry["top_logprobs"]] == names
    streamed = chunks_of(client, **fields)
    found = list(chain.from_iterable(chunk["logprobs"]["content"] for chunk in streamed if chunk["logprobs"]))
    assert [entry["token"] for entry in found] == [entry["token"] for entry in whole["logprobs"]["content"]]
    alone = choice(client, max_tokens=2, logprobs=True, **GREEDY)["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in alone] == [[], []]


def test_a_token_that_is_no_whole_character_shows_its_bytes(client: httpx.Client, oracle: Oracle) -> None:
    first, *_ = oracle.ids("日")
    (entry,) = choice(client, max_tokens=1, logprobs=True, allowed_token_ids=[first])["logprobs"]["content"]
    assert entry["bytes"] == list("日".encode())[: len(entry["bytes"])]
    assert entry["token"] == "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry["bytes"])


def test_n_streams_in_one(client: httpx.Client) -> None:
    fields = {"messages": CHAT, "n": 3, "max_tokens": 12, "temperature": 1.2, "seed": 11}
    whole = client.post(PATH, json=fields).json()["choices"]
    chunks = list(chain.from_iterable(chunk["choices"] for chunk in stream(client, PATH, fields)))
    for index, expected in enumerate(whole):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert text_of(own) == expected["message"]["content"]
    assert len({expected["message"]["content"] for expected in whole}) == 3


def test_usage_in_every_chunk(client: httpx.Client, oracle: Oracle) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(client, PATH, {"messages": CHAT, "max_tokens": 9, "stream_options": options} | GREEDY)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 9
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {len(oracle.chat_ids(CHAT))}
    for options in (None, {"continuous_usage_stats": True}, {"include_usage": None}):
        body = {"messages": CHAT, "max_tokens": 2, "stream_options": options}
        assert all("usage" not in chunk for chunk in stream(client, PATH, body))


def greedy_text(oracle: Oracle, count: int = 40) -> str:
    return oracle.text(oracle.greedy(oracle.chat_ids(CHAT), count))


@pytest.mark.parametrize("start", [3, 10, 21])
@pytest.mark.parametrize("length", [1, 5, 12])
def test_a_stop_string_ends_the_text_wherever_tokens_meet(
    client: httpx.Client, oracle: Oracle, start: int, length: int
) -> None:
    text = greedy_text(oracle)
    stop = text[start : start + length]
    at = text.index(stop)
    fields = {"max_tokens": 40, "stop": [stop, "never this"]} | GREEDY
    for found in (choice(client, **fields), choice(client, **(fields | {"stop": stop}))):
        assert found["message"]["content"] == text[:at]
        assert (found["finish_reason"], found["stop_reason"]) == ("stop", stop)
    shown = choice(client, include_stop_str_in_output=True, **fields)
    assert shown["message"]["content"] == text[: at + length]
    streamed = chunks_of(client, **fields)
    assert text_of(streamed) == text[:at]
    assert (streamed[-1]["finish_reason"], streamed[-1]["stop_reason"]) == ("stop", stop)


def test_what_only_begins_like_a_stop_string_is_sent(client: httpx.Client, oracle: Oracle) -> None:
    text = greedy_text(oracle)
    stops = [text[5:9] + "\0", text[-4:] + "\0"]
    assert text_of(chunks_of(client, max_tokens=40, stop=stops, **GREEDY)) == text


def test_a_stop_string_of_several_bytes_each(client: httpx.Client, oracle: Oracle) -> None:
    ids = {"max_tokens": 200, "temperature": 2, "allowed_token_ids": oracle.ids("日é")}
    for seed in range(20):
        text = choice(client, seed=seed, **ids)["message"]["content"]
        if "é" not in text or "日" not in text:
            continue
        cut = choice(client, seed=seed, stop=["日", "é"], **ids)
        at = min(text.index("日"), text.index("é"))
        assert (cut["message"]["content"], cut["stop_reason"]) == (text[:at], text[at])
        assert text_of(chunks_of(client, seed=seed, stop=["日", "é"], **ids)) == text[:at]
        return
    raise AssertionError("no seed gave both characters")


def test_counts_end_where_the_text_does(client: httpx.Client, oracle: Oracle) -> None:
    """The engine may be tokens ahead when a stop string is found; they are nobody's."""
    ids = oracle.greedy(oracle.chat_ids(CHAT), 40)
    stop = oracle.text(ids[4:6])
    response = client.post(
        PATH, json={"messages": CHAT, "max_tokens": 40, "stop": stop, "return_token_ids": True} | GREEDY
    )
    answer = response.json()
    assert answer["choices"][0]["token_ids"] == ids[:6]
    assert answer["usage"]["completion_tokens"] == 6


def test_stop_tokens(client: httpx.Client, oracle: Oracle) -> None:
    ids = oracle.greedy(oracle.chat_ids(CHAT), 40)
    end = ids[7]
    at = ids.index(end)
    cut = choice(client, max_tokens=40, stop_token_ids=[end], return_token_ids=True, **GREEDY)
    assert (cut["message"]["content"], cut["token_ids"]) == (oracle.text(ids[:at]), ids[: at + 1])
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", end)
    shown = choice(client, max_tokens=40, stop_token_ids=[end], include_stop_str_in_output=True, **GREEDY)
    assert shown["message"]["content"] == oracle.text(ids[: at + 1])


def test_the_model_s_own_end(client: httpx.Client) -> None:
    ends = {"allowed_token_ids": [2, 100], "logit_bias": {"2": 100}, "max_tokens": 6, "temperature": 0}
    found = choice(client, return_token_ids=True, **ends)
    assert (found["message"]["content"], found["token_ids"]) == ("", [2])
    assert (found["finish_reason"], found["stop_reason"]) == ("stop", None)
    later = choice(client, min_tokens=3, return_token_ids=True, **ends)
    assert later["token_ids"] == [100, 100, 100, 2]
    ignored = choice(client, ignore_eos=True, return_token_ids=True, **ends)
    assert (ignored["token_ids"], ignored["finish_reason"]) == ([2] * 6, "length")


def test_min_tokens_before_a_stop_string(client: httpx.Client, oracle: Oracle) -> None:
    text = greedy_text(oracle)
    found = choice(client, max_tokens=40, min_tokens=40, stop=[text[3:6]], **GREEDY)
    assert found["message"]["content"] == text


def test_an_unfinished_message_is_continued(client: httpx.Client, oracle: Oracle) -> None:
    messages = [*CHAT, {"role": "assistant", "content": "It is a kind of"}]
    prompt = oracle.tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    expected = oracle.text(oracle.greedy(oracle.ids(prompt), 10))
    fields = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    fields |= {"max_tokens": 10} | GREEDY
    assert choice(client, **fields)["message"]["content"] == expected
    assert choice(client, echo=True, **fields)["message"]["content"] == "It is a kind of" + expected
    assert text_of(chunks_of(client, echo=True, **fields)) == "It is a kind of" + expected


def test_content_in_parts(client: httpx.Client, oracle: Oracle) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert prompt_ids(client, [{"role": "user", "content": parts}]) == oracle.chat_ids(
        [{"role": "user", "content": "one\ntwo"}]
    )


def prompt_ids(client: httpx.Client, messages: list[dict[str, Any]]) -> list[int]:
    response = client.post(PATH, json={"messages": messages, "max_tokens": 1, "return_token_ids": True})
    assert response.status_code == 200, response.text
    return response.json()["prompt_token_ids"]


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"content": "No.", "refusal": None, "annotations": [], "audio": None}, {"content": "No."}),
        ({"content": None, "refusal": "I can't."}, {"content": "I can't."}),
        ({"content": [{"type": "refusal", "refusal": "I can't."}]}, {"content": "I can't."}),
        ({"content": [{"type": "output_text", "text": "Yes.", "annotations": []}]}, {"content": "Yes."}),
        ({"content": [{"type": "text", "text": "A", "cache_control": {"type": "ephemeral"}}]}, {"content": "A"}),
        (
            {"content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "A"}]},
            {"content": "A"},
        ),
        (
            {"content": "A", "cache_control": {"type": "ephemeral"}, "provider_specific_fields": {"x": [1]}},
            {"content": "A"},
        ),
    ],
)
def test_a_history_is_taken_as_clients_keep_it(
    client: httpx.Client, oracle: Oracle, sent: dict[str, Any], meant: dict[str, Any]
) -> None:
    def around(said: dict[str, Any]) -> list[dict[str, Any]]:
        return [CHAT[1], {"role": "assistant"} | said, {"role": "user", "content": "Go on."}]

    assert prompt_ids(client, around(sent)) == oracle.chat_ids(around(meant))


def test_a_stream_s_first_chunk_has_the_prompt(client: httpx.Client, oracle: Oracle) -> None:
    first, *others = stream(client, PATH, {"messages": CHAT, "max_tokens": 2, "return_token_ids": True} | GREEDY)
    assert first["prompt_token_ids"] == oracle.chat_ids(CHAT)
    assert all("prompt_token_ids" not in chunk for chunk in others)
    answer = chain.from_iterable(chunk["choices"][0].get("token_ids", []) for chunk in others)
    assert list(answer) == oracle.greedy(oracle.chat_ids(CHAT), 2)


def test_prompt_logprobs(client: httpx.Client, oracle: Oracle) -> None:
    ids = oracle.chat_ids(CHAT)
    response = client.post(PATH, json={"messages": CHAT, "max_tokens": 1, "prompt_logprobs": 0, "n": 2})
    assert [set(each) & {"prompt_logprobs", "prompt_token_ids"} for each in response.json()["choices"]] == [set()] * 2
    found = response.json()["prompt_logprobs"]
    rows = oracle.logprobs(ids)
    assert found[0] is None
    own = [entry[str(token_id)]["logprob"] for entry, token_id in zip(found[1:], ids[1:], strict=True)]
    assert own == pytest.approx([float(row[i]) for row, i in zip(rows, ids[1:], strict=False)], abs=NEAR)
