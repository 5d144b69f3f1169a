"""Tokens to text and back, the models' names, health, and metrics that count what was really asked."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from octavo_server import Samples, Server, samples, serving_anew, stream
from tiny_oracle import Oracle

from octavo.version import VERSION

TEXTS = ["The capital of France", " two  spaces\n", "naïve café “日本” 🙂", "<|im_start|>user\n<|im_end|>", ""]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
GREEDY = {"temperature": 0, "ignore_eos": True}


HINTS: dict[str, Any] = {
    "user": "me", "store": True, "metadata": {"a": [1, {"b": None}]}, "service_tier": "flex", "prompt_cache_key": "x",
    "session_id": "s", "chat_id": "c", "provider": {"order": ["x"]}, "keep_alive": "5m", "vllm_xargs": {"a": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "The"}),
        ("/v1/chat/completions", {"messages": CHAT[:1], "verbosity": "low"}),
    ],
)
def test_hints_change_nothing_and_are_counted(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    body |= {"max_tokens": 8, **GREEDY}
    hints = HINTS | {name: body.pop(name) for name in ("verbosity",) if name in body}
    before = samples(client)
    plain, hinted = (client.post(path, json=each).json()["choices"] for each in (body, body | hints))
    assert hinted == plain
    seen = {
        dict(labels)["field"]: value - before.get((name, labels), 0)
        for (name, labels), value in samples(client).items()
        if name == "octavo:ignored_hint_total"
    }
    seen = {name: value for name, value in seen.items() if value}
    assert seen == dict.fromkeys(hints, 1)
    (card, _) = client.get("/v1/models").json()["data"]
    assert set(hints) <= set(card["x_octavo"]["ignored_hints"])


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizing_is_transformers(client: httpx.Client, oracle: Oracle, text: str) -> None:
    ids = oracle.ids(text)
    answer = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert client.post("/v1/tokenize", json={"prompt": text, "return_token_strs": True}).json() == answer
    assert (answer["count"], answer["tokens"], answer["max_model_len"]) == (len(ids), ids, 512)
    assert answer["token_strs"] == oracle.tokenizer.convert_ids_to_tokens(ids)
    assert client.post("/tokenize", json={"prompt": text}).json()["token_strs"] is None
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}


def test_tokenizing_a_conversation(client: httpx.Client, oracle: Oracle) -> None:
    def count(**options: Any) -> list[int]:
        return client.post("/tokenize", json={"messages": CHAT} | options).json()["tokens"]

    template = oracle.tokenizer.apply_chat_template
    assert count() == oracle.ids(template(CHAT, tokenize=False, add_generation_prompt=True))
    assert count(add_generation_prompt=False) == oracle.ids(template(CHAT, tokenize=False))
    continued = template(CHAT, tokenize=False, continue_final_message=True)
    assert count(add_generation_prompt=False, continue_final_message=True) == oracle.ids(continued)


def test_detokenizing_anything(client: httpx.Client, oracle: Oracle) -> None:
    for ids in (list(range(1024)), [], [1, 2, 0]):
        expected = oracle.text(ids, skip_special_tokens=False)
        assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"] == expected


def test_models(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["tiny", "tiny-too"]
    for card in listed["data"]:
        assert (card["object"], card["max_model_len"], card["parent"]) == ("model", 512, None)
        assert client.get(f"/v1/models/{card['id']}").json() == card


def test_a_request_id_comes_back(client: httpx.Client) -> None:
    body = {"prompt": "The", "max_tokens": 1, "request_id": "body"}
    for given, shown in ({"X-Request-Id": "trace-1"}, "trace-1"), ({}, "body"):
        answer = client.post("/v1/completions", json=body, headers=given)
        assert answer.json()["id"] == f"cmpl-{shown}"
        assert answer.headers["x-request-id"] == given.get("X-Request-Id", answer.headers["x-request-id"])
    for path in ("/health", "/nowhere", "/v1/completions"):
        assert client.get(path, headers={"X-Request-Id": "t"}).headers.get_list("x-request-id") == ["t"]
    for bad in ("x" * 257, "caf\xe9", ""):
        made = client.get("/version", headers={"X-Request-Id": bad.encode("latin-1")}).headers["x-request-id"]
        assert len(made) == 32


def test_what_is_served_and_how_busy_it_is(client: httpx.Client) -> None:
    assert client.get("/load").json() == {"server_load": 0}
    [load] = client.get("/get_load").json()
    assert load == {"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}
    assert client.post("/ping").status_code == 200
    info = client.get("/server_info").json()
    assert (info["version"], info["models"], info["max_model_len"]) == (VERSION, ["tiny", "tiny-too"], 512)
    assert client.get("/tokenizer_info").json()["eos_token"] == "<|im_end|>"


def test_the_page_and_no_report(client: httpx.Client) -> None:
    assert "<h1" in client.get("/", headers={"Accept": "text/html"}).text
    assert client.get("/", headers={"Accept": "*/*"}).text == "Ollama is running"
    response = client.get("/quantization_report")
    assert response.status_code == 404
    assert "octavo quantize" in response.json()["error"]["message"]


def test_what_the_engine_has_loaded(client: httpx.Client, server: Server) -> None:
    info = client.get("/server_info").json()
    assert (info["can_chat"], info["reasoning"], info["quantization_report"]) == (True, False, False)
    engine = info["engine"]
    assert (engine["architecture"], engine["dtype"]) == ("llama", "float32")
    assert f"weights {engine['weight_bytes'] / 1e6:,.1f} MB" in server.said  # the report of the start
    assert f"KV cache {engine['kv_cache_bytes'] / 1e6:,.1f} MB in {engine['kv_cache_dtype']}" in server.said
    assert engine["layers"]
    assert all(part in server.said for row in engine["layers"] for part in row.values())


def test_the_prefix_cache_forgets(client: httpx.Client) -> None:
    body = {"prompt": [7] * 200, "max_tokens": 1}

    def cached() -> int:
        return client.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert (cached(), cached()) == (0, 192)
    assert client.post("/reset_prefix_cache").status_code == 200
    assert cached() == 0


def test_health_version_and_document(client: httpx.Client) -> None:
    for path in ("/health", "/ping"):
        answer = client.get(path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert client.get("/version").json() == {"version": VERSION}
    document = client.get("/openapi.json").json()
    assert document["info"]["version"] == VERSION
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/health", "/metrics"} <= set(document["paths"])


def test_the_server_s_process_is_without_torch() -> None:
    """It would take two seconds of the start and 200 MB; the tensors are the engine's."""
    with serving_anew() as server:
        assert "torch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "torch" in Path(f"/proc/{server.engine_pid}/maps").read_text()


GAUGES = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"]
COUNTERS = ["prompt_tokens", "generation_tokens", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits"]
HISTOGRAMS = """
    time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds
    e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds
    request_inference_time_seconds request_prompt_tokens request_generation_tokens request_params_n
    request_params_max_tokens request_max_num_generation_tokens iteration_tokens_total
""".split()  # noqa: SIM905


def test_all_names_are_there_before_the_first_request(client: httpx.Client) -> None:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = {name for name, _ in samples(client)}
    assert {f"vllm:{name}" for name in GAUGES} <= found
    assert {f"vllm:{name}_total" for name in COUNTERS} <= found
    for name in HISTOGRAMS:
        assert {f"vllm:{name}_{part}" for part in ("bucket", "sum", "count")} <= found
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"} ' in answer.text
    (config,) = (dict(labels) for name, labels in samples(client) if name == "vllm:cache_config_info")
    assert (config["num_gpu_blocks"], config["block_size"], config["cache_dtype"]) == ("512", "16", "float32")
    reasons = {
        dict(labels)["finished_reason"] for name, labels in samples(client) if name == "vllm:request_success_total"
    }
    assert reasons == {"stop", "length", "repetition", "abort", "error"}


def changes(before: Samples, after: Samples) -> dict[str, float]:
    """Samples without labels, and request_success by its reason, that have changed."""
    found = {}
    for (name, labels), now in after.items():
        reason = dict(labels).get("finished_reason", "")
        if now != before.get((name, labels)) and (not labels or reason):
            found[f"{name.removeprefix('vllm:')} {reason}".strip()] = now - before.get((name, labels), 0)
    return found


def test_metrics_count_what_was_asked(client: httpx.Client, oracle: Oracle) -> None:
    prompt = "counted once and only once, in this very test: " + "and so on " * 8
    num_prompt = len(oracle.ids(prompt))
    num_cached = (num_prompt - 1) // 16 * 16
    before = samples(client)
    client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 5} | GREEDY)
    seen = changes(before, samples(client))
    expected = {
        "prompt_tokens_total": num_prompt,
        "generation_tokens_total": 5,
        "prefix_cache_queries_total": num_prompt,
        "request_success_total length": 1,
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 4,
        "request_time_per_output_token_seconds_count": 1,
        "e2e_request_latency_seconds_count": 1,
        "request_queue_time_seconds_count": 1,
        "request_prefill_time_seconds_count": 1,
        "request_decode_time_seconds_count": 1,
        "request_inference_time_seconds_count": 1,
        "request_prompt_tokens_sum": num_prompt,
        "request_generation_tokens_sum": 5,
        "request_params_n_sum": 1,
        "request_params_max_tokens_sum": 5,
        "request_max_num_generation_tokens_sum": 5,
        "iteration_tokens_total_sum": num_prompt + 4,
        "iteration_tokens_total_count": 5,
    }
    assert {name: seen.get(name) for name in expected} == expected
    assert 0 <= seen["time_to_first_token_seconds_sum"] <= seen["e2e_request_latency_seconds_sum"]
    assert "prefix_cache_hits_total" not in seen
    assert not {f"request_success_total {reason}" for reason in ("stop", "abort", "error")} & set(seen)

    before = samples(client)
    stop = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 5} | GREEDY).json()["choices"][0][
        "text"
    ][-2:]
    client.post("/v1/completions", json={"prompt": prompt, "n": 3, "max_tokens": 9, "stop": stop, "temperature": 0})
    seen = changes(before, samples(client))
    assert (seen["request_success_total length"], seen["request_success_total stop"]) == (1, 3)
    assert (seen["prompt_tokens_total"], seen["prefix_cache_queries_total"]) == (4 * num_prompt, 4 * num_prompt)
    assert seen["prefix_cache_hits_total"] == 4 * num_cached
    assert (seen["request_params_n_sum"], seen["request_params_max_tokens_sum"]) == (4, 14)
    assert seen["generation_tokens_total"] == seen["request_generation_tokens_sum"] <= 20


def test_each_prompt_of_a_request_counts_as_one(client: httpx.Client) -> None:
    """As in vLLM, for which it is a request of its own."""
    before = samples(client)
    client.post(
        "/v1/completions", json={"prompt": ["one", "two", "three"], "n": 2, "max_tokens": 3, "ignore_eos": True}
    )
    seen = changes(before, samples(client))
    assert (seen["request_params_n_count"], seen["request_params_n_sum"]) == (3, 6)
    assert (seen["request_params_max_tokens_sum"], seen["request_max_num_generation_tokens_sum"]) == (9, 9)
    assert seen["request_success_total length"] == 6


def test_a_scored_prompt_generates_nothing(client: httpx.Client) -> None:
    before = samples(client)
    client.post("/v1/completions", json={"prompt": "scored", "max_tokens": 0, "echo": True, "logprobs": 0})
    seen = changes(before, samples(client))
    assert "generation_tokens_total" not in seen
    assert seen["request_success_total length"] == 1


def test_names_of_clients_are_no_labels(client: httpx.Client) -> None:
    """The number of time series does not grow with what clients send."""
    client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "model": "tiny-too", "user": "me"})
    client.post("/v1/completions", json={"model": "nobody's"})
    client.get("/nowhere")
    number = len(samples(client))
    client.get("/nowhere/else")
    for name in ("tiny-too", "other"):
        client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "model": name, "user": name})
    assert len(samples(client)) == number


def test_metrics_of_the_prompt_and_of_http(client: httpx.Client) -> None:
    prompt = [7 + number % 90 for number in range(64)]
    body = {"prompt": prompt, "max_tokens": 2, "ignore_eos": True, "cache_salt": "test_metrics_of_the_prompt"}
    before = samples(client)
    for _ in range(2):
        assert client.post("/v1/completions", json=body).status_code == 200
    assert client.post("/v1/completions", json={}).status_code == 400
    assert client.get("/v1/models/tiny").status_code == 200
    assert client.get("/nothing/there").status_code == 404
    found = samples(client)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return found[key] - before.get(key, 0)

    assert grown("vllm:prompt_tokens_cached_total") == 48  # all full blocks before the last token
    assert grown("vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 48
    assert grown("vllm:prompt_tokens_by_source_total", source="local_compute") == 64 + 16
    assert grown("vllm:prompt_tokens_total") == 128
    assert grown("vllm:request_prefill_kv_computed_tokens_sum") == 64 + 16
    assert grown("vllm:request_num_preemptions_count") == 2
    assert grown("vllm:request_num_preemptions_sum") == 0
    assert found["vllm:num_requests_waiting_by_reason", (("reason", "capacity"),)] == 0
    assert found["vllm:num_requests_waiting_by_reason", (("reason", "deferred"),)] == 0
    posts = {"handler": "/v1/completions", "method": "POST"}
    assert grown("http_requests_total", **posts, status="2xx") == 2
    assert grown("http_requests_total", **posts, status="4xx") == 1
    assert grown("http_requests_total", handler="/v1/models/{name:path}", method="GET", status="2xx") == 1
    assert grown("http_requests_total", handler="none", method="GET", status="4xx") == 1
    assert grown("http_request_duration_seconds_count", **posts) == 3
    (info,) = [dict(labels) for name, labels in found if name == "vllm:cache_config_info"]
    assert info["kv_cache_size_tokens"] == str(512 * 16)
    assert info["kv_cache_max_concurrency"] == "16"


def test_a_balancer_gets_the_load_it_asks_for(client: httpx.Client) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    text = client.post("/v1/completions", json=body, headers={"endpoint-load-metrics-format": "text"})
    kind, *values = text.headers["endpoint-load-metrics"].replace(",", "").split()
    assert kind == "TEXT"
    named = dict(value.split("=") for value in values)
    assert set(named) == {"named_metrics.kv_cache_usage_perc", "named_metrics.num_requests_waiting"}
    assert all(float(value) >= 0 for value in named.values())
    whole = client.post("/v1/completions", json=body, headers={"endpoint-load-metrics-format": "JSON"})
    report = json.loads(whole.headers["endpoint-load-metrics"].removeprefix("JSON "))
    assert set(report["named_metrics"]) == {"kv_cache_usage_perc", "num_requests_waiting"}
    assert "endpoint-load-metrics" not in client.post("/v1/completions", json=body).headers


def test_sagemaker_s_invocations(client: httpx.Client) -> None:
    fields = {"max_tokens": 4, "temperature": 0}
    messages = [{"role": "user", "content": "Hello"}]
    for path, body in (
        ("/v1/completions", {"prompt": "The capital of"} | fields),
        ("/v1/chat/completions", {"messages": messages} | fields),
    ):
        expected = client.post(path, json=body).json()
        found = client.post("/invocations", json=body)
        assert found.status_code == 200, found.text
        assert found.json()["choices"] == expected["choices"]
        assert found.json()["object"] == expected["object"]
    adapter = {"X-Amzn-SageMaker-Adapter-Identifier": "tiny-too"}
    assert client.post("/invocations", json=body, headers=adapter).json()["model"] == "tiny-too"
    adapter = {"X-Amzn-SageMaker-Adapter-Identifier": "other"}
    assert client.post("/invocations", json=body, headers=adapter).status_code == 404
    assert stream(client, "/invocations", body)[-1]["choices"][0]["finish_reason"] == "length"
    for wrong in ({}, {"input": "x"}, {"prompt": "x", "messages": messages}):
        assert client.post("/invocations", json=wrong).status_code == 400


def test_sagemaker_s_sessions(client: httpx.Client) -> None:
    """A session is open from its beginning to its end, and no other is."""
    body = {"prompt": "The capital of", "max_tokens": 2}

    def status(name: str, asked: dict[str, Any] = body) -> int:
        return client.post("/invocations", json=asked, headers={"X-Amzn-SageMaker-Session-Id": name}).status_code

    before = datetime.now(UTC).replace(microsecond=0)
    begun = client.post("/invocations", json={"requestType": "NEW_SESSION"})
    assert begun.status_code == 200, begun.text
    name, expires = begun.headers["x-amzn-sagemaker-new-session-id"].split("; Expires=")
    hour = timedelta(hours=1)
    assert before + hour <= datetime.fromisoformat(expires) <= datetime.now(UTC) + hour
    assert status(name) == 200
    assert status("another") == 400
    assert status("another", {"requestType": "CLOSE"}) == 400
    assert client.post("/invocations", json={"requestType": "CLOSE"}).status_code == 400
    closing = {"X-Amzn-SageMaker-Session-Id": name}
    closed = client.post("/invocations", json={"requestType": "CLOSE"}, headers=closing)
    assert (closed.status_code, closed.headers["x-amzn-sagemaker-closed-session-id"]) == (200, name)
    assert status(name) == 400
    wrong = client.post("/invocations", json={"requestType": "OPEN"}).json()["error"]["message"]
    assert wrong == "requestType: octavo does not support the value 'OPEN'; supported: 'NEW_SESSION' or 'CLOSE'"
