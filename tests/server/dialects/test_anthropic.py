"""/v1/messages over a real socket, through the official client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from octavo_server import TINY, Server, num_in_flight, said_at_once, samples, serving, value, wait_until
from tiny_oracle import Oracle

from octavo.server.hints import AnthropicHints

ASK = [{"role": "user", "content": "What is a naïve café?"}]
CHAT = [{"role": "system", "content": "Be brief."}, *ASK]
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0, "ignore_eos": True}}
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "messages": ASK}
PATH = "/v1/messages"
CONTEXT = json.loads((TINY / "config.json").read_text())["max_position_embeddings"]


@pytest.fixture
def official(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def said(message: anthropic.types.Message) -> str:
    [block] = message.content
    assert block.type == "text"
    return block.text


def test_the_official_client_gets_transformers_text(official: anthropic.Anthropic, oracle: Oracle) -> None:
    ids = oracle.chat_ids(CHAT)
    answer = official.messages.create(model="tiny-too", max_tokens=40, system="Be brief.", messages=ASK, **GREEDY)
    assert said(answer) == oracle.text(oracle.greedy(ids, 40))
    assert (answer.type, answer.role, answer.model, answer.id[:4]) == ("message", "assistant", "tiny-too", "msg_")
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    usage = answer.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == len(ids)
    assert usage.output_tokens == 40
    assert answer._request_id == answer.id.removeprefix("msg_")


def test_the_official_client_streams_it(official: anthropic.Anthropic) -> None:
    fields = {"model": "tiny", "max_tokens": 40, "system": "Be brief.", "messages": ASK, "stop_sequences": ["zzzz"]}
    whole = official.messages.create(**fields, **GREEDY)
    with official.messages.stream(**fields, **GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == said(final) == said(whole)
    assert (final.stop_reason, final.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert total(final.usage) == total(whole.usage)


def total(usage: anthropic.types.Usage) -> int:
    """The prompt's tokens, cached or not."""
    return usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_cached_prompt_is_counted_once(official: anthropic.Anthropic, oracle: Oracle) -> None:
    chat = [{"role": "user", "content": "count me, " * 20}]
    first = official.messages.create(model="tiny", max_tokens=1, messages=chat)
    again = official.messages.create(model="tiny", max_tokens=1, messages=chat)
    assert first.usage.cache_read_input_tokens == 0
    assert again.usage.cache_read_input_tokens
    assert total(again.usage) == total(first.usage) == len(oracle.chat_ids(chat))


def test_the_count_is_that_of_the_answer(official: anthropic.Anthropic) -> None:
    conversation = [
        *ASK,
        {"role": "assistant", "content": [{"type": "text", "text": "It is"}, {"type": "text", "text": "a place."}]},
        {"role": "user", "content": [{"type": "text", "text": "Where?", "cache_control": {"type": "ephemeral"}}]},
    ]
    counted = official.messages.count_tokens(model="tiny", system="Be brief.", messages=conversation)
    answer = official.messages.create(model="tiny", max_tokens=1, system="Be brief.", messages=conversation)
    assert counted.input_tokens == total(answer.usage)
    long = [{"role": "user", "content": "word " * 2000}]
    assert official.messages.count_tokens(model="tiny", messages=long).input_tokens > 512


def test_a_limit_above_the_room_is_the_room(official: anthropic.Anthropic) -> None:
    answer = official.messages.create(model="tiny", max_tokens=8192, messages=ASK, **GREEDY)
    assert answer.stop_reason == "model_context_window_exceeded"
    assert total(answer.usage) + answer.usage.output_tokens == CONTEXT


def test_an_answer_that_was_begun_goes_on(official: anthropic.Anthropic, oracle: Oracle) -> None:
    begun = [*ASK, {"role": "assistant", "content": "It is"}]
    answer = official.messages.create(model="tiny", max_tokens=10, messages=begun, **GREEDY)
    ids = oracle.ids(oracle.tokenizer.apply_chat_template(begun, tokenize=False, continue_final_message=True))
    assert said(answer) == oracle.text(oracle.greedy(ids, 10))


def test_a_stop_sequence_ends_the_answer(official: anthropic.Anthropic) -> None:
    text = said(official.messages.create(model="tiny", max_tokens=20, messages=ASK, **GREEDY))
    stop = text[5:8]
    answer = official.messages.create(model="tiny", max_tokens=20, messages=ASK, stop_sequences=[stop], **GREEDY)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert said(answer) == text[: text.index(stop)]


def test_the_official_client_understands_errors(official: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not served here") as missing:
        official.messages.create(model="claude", max_tokens=1, messages=ASK)
    assert missing.value.body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "the model 'claude' is not served here; tiny, tiny-too is"},
    }
    assert missing.value.request_id == missing.value.response.headers["x-request-id"]
    image = {"type": "image", "source": {"type": "url", "url": "http://x"}}
    with pytest.raises(anthropic.BadRequestError, match="messages: image 1: this model reads text alone"):
        official.messages.create(model="tiny", max_tokens=1, messages=[{"role": "user", "content": [image]}])
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: ") as long:
        official.messages.create(model="tiny", max_tokens=1, messages=[{"role": "user", "content": "word " * 5000}])
    assert long.value.type == "invalid_request_error"
    tool = {"name": "f", "input_schema": {"type": "object"}}
    with pytest.raises(anthropic.BadRequestError, match="tools: how this model writes tool calls is not known"):
        official.messages.create(model="tiny", max_tokens=1, messages=ASK, tools=[tool])
    with pytest.raises(anthropic.NotFoundError):
        official.messages.batches.list()


def test_hints_are_taken_and_counted(client: httpx.Client, official: anthropic.Anthropic) -> None:
    given = {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    }
    names = (*given, "anthropic-beta", "output_config.effort")
    before = samples(client)
    official.beta.messages.create(
        **BODY, betas=["context-management-2025-06-27"], output_config={"effort": "high"}, extra_body=given
    )
    for name in names:
        counter = ("octavo:ignored_hint_total", (("field", name),))
        assert samples(client)[counter] == before.get(counter, 0) + 1, name
    hints = client.get("/v1/models").json()["data"][0]["x_octavo"]["ignored_hints"]
    assert {*AnthropicHints.model_fields, "anthropic-beta", "output_config.effort"} <= set(hints)


def test_the_models_are_listed(official: anthropic.Anthropic) -> None:
    page = official.models.list()
    assert [(model.id, model.type, model.display_name) for model in page.data] == [
        ("tiny", "model", "tiny"),
        ("tiny-too", "model", "tiny-too"),
    ]
    assert (page.has_more, page.first_id, page.last_id) == (False, "tiny", "tiny-too")
    assert official.models.retrieve("tiny-too").created_at.year > 2000


def test_who_leaves_in_mid_stream_leaves_nothing_behind(client: httpx.Client) -> None:
    body = BODY | {"max_tokens": 400, "stream": True, "ignore_eos": True}
    with client.stream("POST", PATH, json=body) as response:
        assert next(response.iter_lines()) == "event: message_start"
    wait_until(lambda: num_in_flight(client) == 0)
    assert value(client, "vllm:kv_cache_usage_perc") == 0
    assert client.post(PATH, json=BODY).status_code == 200


@pytest.fixture(scope="module")
def any_name() -> Iterator[Server]:
    aliases = '{"claude-haiku-4-5": "tiny"}'
    with serving("--served-model-name", "tiny", "*", "--model-aliases", aliases, "--api-key", "secret") as server:
        yield server


def test_a_key_in_either_header(any_name: Server) -> None:
    with any_name.client() as client:
        for headers, status in (
            ({"x-api-key": "secret"}, 200),
            ({"authorization": "Bearer secret"}, 200),
            ({"x-api-key": "secre"}, 401),
            ({"x-api-key": ""}, 401),
            ({"authorization": "secret"}, 401),
        ):
            assert client.post(PATH, json=BODY, headers=headers).status_code == status
    with anthropic.Anthropic(base_url=any_name.url, api_key="wrong", max_retries=0) as official:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            official.messages.create(**BODY)
        assert caught.value.type == "authentication_error"
        assert caught.value.request_id


def test_any_name_is_served_where_the_server_says_so(any_name: Server) -> None:
    with anthropic.Anthropic(base_url=any_name.url, api_key="secret", max_retries=0) as official:
        for name in ("claude-opus-4-8", "claude-haiku-4-5", "tiny"):
            assert official.messages.create(**BODY | {"model": name}).model == name
        assert [model.id for model in official.models.list()] == ["tiny", "claude-haiku-4-5"]
    with openai.OpenAI(base_url=f"{any_name.url}/v1", api_key="secret", max_retries=0) as other:
        assert other.chat.completions.create(model="gpt-5", messages=ASK, max_tokens=1).model == "gpt-5"
        assert other.models.retrieve("gpt-5").model_dump()["x_octavo"]["serves_any_name"] is True
    assert "model name: tiny, and any other" in any_name.said
    assert "model name: claude-haiku-4-5 is tiny" in any_name.said


def test_an_alias_of_nothing_is_refused_at_start() -> None:
    flags = ("--served-model-name", "tiny", "--model-aliases", '{"a": "b"}')
    assert "--model-aliases: 'b' is not served here; tiny is" in said_at_once(str(TINY), *flags)


def test_errors_name_the_fields_of_this_api(client: httpx.Client) -> None:
    """What is found out behind the dialect is told in its words."""
    schema = {"type": "string", "pattern": "(?=a)"}
    output = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    message = client.post(PATH, json=BODY | output).json()["error"]["message"]
    assert message.startswith("output_config.format.schema: /pattern: ")
    own = {"model": "tiny", "prompt": "x", "format": schema}
    for body in (own, own | {"raw": True}):
        assert client.post("/api/generate", json=body).json()["error"].startswith("format: /pattern: ")
