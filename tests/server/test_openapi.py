"""/openapi.json tells the truth: real answers of every route, right ones and errors, are what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from octavo_server import Server, serving

Json = dict[str, Any]
MESSAGES = [{"role": "user", "content": "abc"}]
QUESTION = {"id": "a", "type": "score", "question": "How?", "levels": ["low", "high"]}
RIGHT: dict[str, Json | None] = {  # a body that each route takes
    "POST /v1/completions": {"prompt": "abc", "max_tokens": 1},
    "POST /v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "POST /v1/messages": {"model": "tiny", "messages": MESSAGES, "max_tokens": 1},
    "POST /v1/messages/count_tokens": {"model": "tiny", "messages": MESSAGES},
    "POST /api/chat": {"model": "tiny", "messages": MESSAGES, "stream": False, "options": {"num_predict": 1}},
    "POST /generative_scoring": {"query": "abc", "items": ["d"], "label_token_ids": [1, 2]},
    "POST /api/generate": {"model": "tiny", "prompt": "abc", "options": {"num_predict": 1}},
    "POST /api/show": {"model": "tiny"},
    "POST /invocations": {"prompt": "abc", "max_tokens": 1},
    "POST /v1/decisions": {"input": "abc", "questions": [QUESTION]},
    "POST /v1/systemone": {"model": "tiny", "state": "abc", "questions": {"a": {"type": "score", "criteria": ["b"]}}},
    "POST /tokenize": {"prompt": "abc", "return_token_strs": True},
    "POST /detokenize": {"tokens": [5]},
    "POST /parse_function_call": {"text": "abc", "tools": [{"type": "function", "function": {"name": "f"}}]},
    "POST /separate_reasoning": {"text": "abc"},
    "PUT /generate": {"text": "abc", "sampling_params": {"max_new_tokens": 1}},
    "POST /generate": {"text": "abc", "sampling_params": {"max_new_tokens": 1}, "stream": True},
    "POST /open_session": {"session_id": "s"},
    "POST /close_session": {"session_id": "s"},
    "POST /abort_request": {"rid": "x"},
    "POST /abort_requests": {"request_ids": ["x"]},
    "POST /v1/responses": {"input": "abc", "max_output_tokens": 1},
    "POST /v1/responses/input_tokens": {"input": "abc"},
    "POST /pause_generation": {"mode": "in_place"},
    "POST /continue_generation": {},
}
NEVER_RIGHT = {
    **dict.fromkeys(
        ("POST /v1/embeddings", "POST /v2/embed", "POST /encode", "POST /pooling", "POST /classify"),
        "the model generates text",
    ),
    **dict.fromkeys(
        ("POST /score", "POST /rerank", "POST /api/embed", "POST /api/embeddings"), "the model generates text"
    ),
    **dict.fromkeys(("POST /v1/audio/transcriptions", "POST /v1/audio/translations"), "the model hears nothing"),
    "POST /v1/load_lora_adapter": "the server was started without --enable-runtime-lora",
    "POST /v1/unload_lora_adapter": "the same",
    "POST /load_lora_adapter": "the same",
    "POST /unload_lora_adapter": "the same",
    "POST /sleep": "the server was started without --enable-sleep-mode",
    "POST /wake_up": "the same",
    "POST /release_memory_occupation": "the same",
    "POST /resume_memory_occupation": "the same",
    "POST /update_weights_from_disk": "the server was started without --enable-weight-updates",
    "POST /update_weight_version": "the same",
    "POST /init_weight_transfer_engine": "the same",
    "POST /start_weight_update": "the same",
    "POST /update_weights": "the same",
    "POST /finish_weight_update": "the same",
    "POST /engines/{index}/drain": "it ends the engine",
    "POST /v1/responses/{response_id}/cancel": "what is made at once can't be cancelled",
    "POST /v1/batches/{batch_id}/cancel": "the batch has ended",
}
OPEN = {"GET /health"}  # needs no key
THINKING = Path(__file__).parents[1] / "fixtures" / "templates" / "Qwen-Qwen3-0.6B.jinja"
KEY = {"authorization": "Bearer k"}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Server]:
    flags = ("--api-key", "k", "--protect-all", "--chat-template", str(THINKING))
    with serving(*flags, "--served-model-name", "tiny") as server:
        yield server


@pytest.fixture(scope="module")
def client(keyed: Server) -> Iterator[httpx.Client]:
    with keyed.client(headers=KEY) as client:
        yield client


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> Json:
    return client.get("/openapi.json").json()


@pytest.fixture(scope="module")
def ids(client: httpx.Client) -> dict[str, str]:
    """What stands in paths."""
    response = client.post("/v1/responses", json=RIGHT["POST /v1/responses"]).json()
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": RIGHT["POST /v1/completions"]}
    content = json.dumps(line).encode()
    file = client.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"}).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = client.post("/v1/batches", json=asked).json()
    return {
        "name": "tiny",
        "response_id": response["id"],
        "file_id": file["id"],
        "batch_id": batch["id"],
        "index": "99",
    }


def routes(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            yield method.upper(), path, route


def check(document: Json, route: Json, response: httpx.Response) -> None:
    """Whether the document says so of this answer."""
    said = route["responses"].get(str(response.status_code)) or route["responses"]["default"]
    kinds = said.get("content", {})
    kind = response.headers.get("content-type", "").partition(";")[0]
    if not response.content:
        assert not kinds or response.request.method == "HEAD", (response.request.url, kinds)
        return
    assert kind in kinds, (response.request.url, response.status_code, kind, kinds)
    schema = kinds[kind].get("schema", {})
    if kind == "application/json":
        resolved = {**schema, "components": document["components"]}
        jsonschema.Draft202012Validator(resolved).validate(response.json())


def test_all_right_answers(client: httpx.Client, document: Json, ids: dict[str, str]) -> None:
    deleting = [each for each in routes(document) if each[0] == "DELETE"]
    for method, path, route in [*(each for each in routes(document) if each not in deleting), *deleting]:
        name = f"{method} {path}"
        if name in NEVER_RIGHT or name in ("POST /v1/files", "POST /v1/batches"):
            continue
        assert ("requestBody" in route) == (name in RIGHT), f"{name}: give it a right body here"
        body = {"json": RIGHT[name]} if name in RIGHT else {}
        response = client.request(method, path.format_map(ids), **body)
        assert response.status_code == 200, (name, response.text)
        check(document, route, response)


def test_all_errors(keyed: Server, client: httpx.Client, document: Json, ids: dict[str, str]) -> None:
    with keyed.client() as stranger:
        for method, path, route in routes(document):
            name = f"{method} {path}"
            assert "422" not in route["responses"], f"{name}: such an error is a 400 here"
            if name not in OPEN:
                refused = stranger.request(method, path.format_map(ids))
                assert refused.status_code == 401, (name, refused.text)
                check(document, route, refused)
            if name in RIGHT:
                wrong = client.request(method, path.format_map(ids), json={"no_such_field": 1})
                assert wrong.status_code == 400, (name, wrong.text)
                check(document, route, wrong)
            if name in NEVER_RIGHT:
                refused = client.request(method, path.format_map(ids))
                assert refused.status_code >= 400, (name, refused.text)
                check(document, route, refused)


def test_each_dialect_has_errors_and_requests_of_its_own(document: Json) -> None:
    def shapes(path: str) -> set[str]:
        route = document["paths"][path]["post"]
        errors = [said["content"] for status, said in route["responses"].items() if status != "200"]
        return {content["application/json"]["schema"]["$ref"].rpartition("/")[2] for content in errors}

    assert shapes("/v1/messages") == shapes("/v1/messages/count_tokens") == {"AnthropicErrorResponse"}
    assert shapes("/api/chat") == shapes("/api/show") == {"OllamaErrorResponse"}
    assert shapes("/v1/chat/completions") == shapes("/generate") == {"ErrorResponse"}
    body = document["paths"]["/v1/messages"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = {**body, "components": document["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(RIGHT["POST /v1/messages"])
    assert not validator.is_valid({"model": "tiny", "messages": MESSAGES})  # max_tokens is missing
    assert not validator.is_valid({**RIGHT["POST /v1/messages"], "no_such_field": 1})
