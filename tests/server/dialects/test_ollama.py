"""Ollama's /api over a real socket, through the official client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest
from jsonschema import validate
from octavo_server import TINY, Server, num_in_flight, value, wait_until
from tiny_oracle import Oracle

ASK = [{"role": "user", "content": "What is a naïve café?"}]
CHAT = [{"role": "system", "content": "Be brief."}, *ASK]
GREEDY = {"temperature": 0, "num_predict": 12}
CONTEXT = json.loads((TINY / "config.json").read_text())["max_position_embeddings"]


@pytest.fixture
def official(server: Server) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url) as client:
        yield client


def until_end(oracle: Oracle, ids: list[int], count: int) -> str:
    """The greedy answer, up to its end token where it has one."""
    found = oracle.greedy(ids, count)
    end = found.index(oracle.tokenizer.eos_token_id) if oracle.tokenizer.eos_token_id in found else count
    return oracle.text(found[:end])


def test_the_official_client_gets_transformers_text(official: ollama.Client, oracle: Oracle) -> None:
    ids = oracle.chat_ids(CHAT)
    answer = official.chat("tiny", messages=CHAT, options=GREEDY)
    assert answer.message.role == "assistant"
    assert answer.message.content == until_end(oracle, ids, 12)
    assert (answer.model, answer.done) == ("tiny", True)
    assert (answer.prompt_eval_count, answer.load_duration) == (len(ids), 0)
    assert answer.total_duration is not None
    assert answer.eval_duration is not None
    assert answer.total_duration >= answer.eval_duration > 0


def test_the_official_client_streams_it(official: ollama.Client, oracle: Oracle) -> None:
    pieces = list(official.chat("tiny:latest", messages=CHAT, options=GREEDY, stream=True))
    text = "".join(piece.message.content or "" for piece in pieces)
    assert text == until_end(oracle, oracle.chat_ids(CHAT), 12)
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 2


def test_a_prompt_alone(official: ollama.Client, oracle: Oracle) -> None:
    whole = official.generate("tiny", prompt=ASK[0]["content"], system="Be brief.", options=GREEDY)
    assert whole.response == until_end(oracle, oracle.chat_ids(CHAT), 12)
    pieces = list(official.generate("tiny", prompt=ASK[0]["content"], system="Be brief.", options=GREEDY, stream=True))
    assert "".join(piece.response or "" for piece in pieces) == whole.response


def test_a_raw_prompt(official: ollama.Client, oracle: Oracle) -> None:
    ids = oracle.ids("The café is")
    whole = official.generate("tiny", prompt="The café is", raw=True, options=GREEDY)
    assert whole.response == until_end(oracle, ids, 12)
    assert whole.prompt_eval_count == len(ids)
    endless = official.generate("tiny", prompt="The café is", raw=True, options={"seed": 3, "num_predict": -1})
    assert endless.eval_count is not None
    assert endless.done_reason == "stop" or endless.eval_count == CONTEXT - len(ids)


def test_log_probabilities(official: ollama.Client, oracle: Oracle) -> None:
    whole = official.chat("tiny", messages=ASK, options=GREEDY, logprobs=True, top_logprobs=2)
    pieces = list(official.chat("tiny", messages=ASK, options=GREEDY, logprobs=True, top_logprobs=2, stream=True))
    entries = [entry for piece in pieces for entry in piece.logprobs or ()]
    assert whole.logprobs is not None
    assert [entry.token for entry in entries] == [entry.token for entry in whole.logprobs]
    ids = oracle.chat_ids(ASK)
    first = float(oracle.logprobs([*ids, *oracle.greedy(ids, 1)])[len(ids) - 1].max())
    assert whole.logprobs[0].logprob == pytest.approx(first, abs=2e-4)
    assert [len(entry.top_logprobs or ()) for entry in whole.logprobs] == [2] * len(whole.logprobs)


def test_a_format_is_kept(official: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    answer = official.chat("tiny", messages=ASK, format=schema, options={"seed": 1, "num_predict": 100})
    validate(json.loads(answer.message.content or ""), schema)
    raw = official.generate("tiny", prompt="x", raw=True, format=schema, options={"seed": 1, "num_predict": 100})
    validate(json.loads(raw.response or ""), schema)


def test_the_model_is_told_of(official: ollama.Client, server: Server) -> None:
    assert [model.model for model in official.list().models] == ["tiny", "tiny-too"]
    [first, *_] = official.list().models
    assert first.size is not None
    assert first.size > 0
    assert first.details is not None
    assert first.details.family == "llama"
    [loaded] = official.ps().models
    assert (loaded.name, loaded.context_length, loaded.size_vram) == ("tiny", CONTEXT, 0)
    shown = official.show("tiny-too")
    assert shown.capabilities == ["completion"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == CONTEXT
    assert shown.template is not None
    assert "im_start" in shown.template
    with server.client() as client:
        assert client.get("/api/version").json()["version"].count(".") == 2
        assert [client.head(path).status_code for path in ("/", "/api/version", "/api/tags")] == [200] * 3
        assert client.get("/").text == "Ollama is running"


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/show"])
def test_a_body_needs_no_content_type_unless_a_web_page_sends_it(client: httpx.Client, path: str) -> None:
    """curl -d and LiteLLM send none that fits. Without an Origin it isn't a browser's."""
    body = {"model": "tiny", "messages": ASK} if path == "/api/chat" else {"model": "tiny"}
    content = json.dumps(body | {"stream": False, "options": {"num_predict": 2}} if path != "/api/show" else body)
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post(path, content=content).status_code == 200
    assert client.post(path, content=content, headers=form).status_code == 200
    for origin in ("http://elsewhere", "null"):
        assert client.post(path, content=content, headers=form | {"Origin": origin}).status_code == 400


def test_a_model_is_loaded_already(official: ollama.Client) -> None:
    assert official.chat("tiny", messages=[]).done_reason == "load"
    assert official.generate("tiny", keep_alive="5m").done_reason == "load"
    assert official.generate("tiny", keep_alive=0).done_reason == "unload"
    assert official.chat("tiny", messages=[], keep_alive="0s").done_reason == "unload"


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda client: client.pull("x"), "octavo serve OWNER/MODEL"),
        (lambda client: client.push("x"), "hf upload"),
        (lambda client: client.create("x", from_="y"), "octavo quantize"),
        (lambda client: client.delete("x"), "hf cache rm"),
        (lambda client: client.copy("x", "y"), "--model-aliases"),
    ],
)
def test_what_a_server_of_one_model_can_not_do(official: ollama.Client, ask: Any, words: str) -> None:
    with pytest.raises(ollama.ResponseError) as caught:
        ask(official)
    assert caught.value.status_code == 501
    assert words in caught.value.error


def test_the_official_client_understands_errors(official: ollama.Client, client: httpx.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="the model 'gpt' is not served here") as missing:
        official.chat("gpt", messages=ASK)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match=r"options\.mirostat") as wrong:
        list(official.chat("tiny", messages=ASK, options={"mirostat": 1}, stream=True))
    assert wrong.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="not known"):
        official.chat("tiny", messages=ASK, tools=[{"type": "function", "function": {"name": "f"}}])
    assert client.get("/api/nothing").json() == {"error": "Not Found"}


def test_who_leaves_in_mid_stream_leaves_nothing_behind(client: httpx.Client) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": "x", "raw": True, "options": {"seed": 5}}
    with client.stream("POST", "/api/generate", json=body) as response:
        assert json.loads(next(response.iter_lines()))["done"] is False
        assert response.headers["content-type"] == "application/x-ndjson"
    wait_until(lambda: num_in_flight(client) == 0)
    assert value(client, "vllm:kv_cache_usage_perc") == 0


def test_hints_are_counted(client: httpx.Client) -> None:
    body = {"model": "tiny", "messages": ASK, "keep_alive": "5m", "options": {"num_ctx": 2048, "num_predict": 1}}
    assert client.post("/api/chat", json=body).status_code == 200
    assert value(client, "octavo:ignored_hint_total", field="keep_alive") >= 1
    assert value(client, "octavo:ignored_hint_total", field="options.num_ctx") == 1
    hints = client.get("/v1/models").json()["data"][0]["x_octavo"]["ignored_hints"]
    assert {"keep_alive", "options.num_ctx"} <= set(hints)
    assert "num_gpu" not in hints
