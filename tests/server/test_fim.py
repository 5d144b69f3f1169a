"""`suffix`: the prompt that each family of code models was trained to fill in the middle with, and a server of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fim_tokenizer import write_tokenizer
from octavo_server import TINY, serving
from tiny_oracle import Oracle

from octavo.server.fim import fim_of, suffix_ids
from octavo.server.served_model import ServedModel
from octavo.server.template_renderer import TemplateRenderer
from octavo.text.chat_template import ChatTemplate
from octavo.text.tokenizer import Tokenizer

QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
SPELLINGS: dict[str, tuple[tuple[str, ...], str]] = {  # special tokens; P and S stand for the texts
    "Qwen2.5-Coder": (QWEN, "<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>"),
    "StarCoder": (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "<fim_prefix>P<fim_suffix>S<fim_middle>"),
    "SantaCoder": (("<fim-prefix>", "<fim-suffix>", "<fim-middle>"), "<fim-prefix>P<fim-suffix>S<fim-middle>"),
    "CodeLlama": (("▁<PRE>", "▁<SUF>", "▁<MID>"), "▁<PRE>P▁<SUF>S▁<MID>"),
    "DeepSeek-Coder": (
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
        "<｜fim▁begin｜>P<｜fim▁hole｜>S<｜fim▁end｜>",
    ),
    "Codestral": (("[PREFIX]", "[SUFFIX]"), "[SUFFIX]S[PREFIX]P"),
}


def model_of(directory: Path) -> ServedModel:
    tokenizer = Tokenizer.open(directory)
    renderer = TemplateRenderer(ChatTemplate.open(TINY, tokenizer.special_tokens, None))
    return ServedModel(("m",), "m", tokenizer, renderer, frozenset({0}), {}, 512, 1024, 4)


@pytest.mark.parametrize("name", SPELLINGS)
def test_each_family_s_prompt(name: str, tmp_path: Path) -> None:
    special, form = SPELLINGS[name]
    write_tokenizer(tmp_path, special)
    model = model_of(tmp_path)
    before, after = "def f(x):\n    ", "\n    return y\n"
    fim = fim_of(model)
    assert fim is not None
    ids = fim.prompt(model.tokenizer.encode(before), suffix_ids(after, model), [])
    assert ids == model.tokenizer.encode(form.replace("P", "\0").replace("S", after, 1).replace("\0", before)) or (
        model.tokenizer.decode(ids) == _spelled(form, special, before, after)
    )
    assert {model.tokenizer.token_id(token) for token in special} <= set(fim.end_ids)
    assert fim.prompt([7], [8], [1])[0] == 1


def _spelled(form: str, special: tuple[str, ...], before: str, after: str) -> str:
    pieces = form
    for number, token in enumerate(special):
        pieces = pieces.replace(token, chr(1 + number))
    pieces = pieces.replace("P", before).replace("S", after)
    for number, token in enumerate(special):
        pieces = pieces.replace(chr(1 + number), token)
    return pieces


def test_without_such_tokens_there_is_no_way() -> None:
    assert fim_of(model_of(TINY)) is None


@pytest.fixture(scope="module")
def ids_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("tokenizer")
    return {"directory": directory, **write_tokenizer(directory, QWEN)}


@pytest.fixture(scope="module")
def coder(ids_of: dict[str, Any]) -> Iterator[httpx.Client]:
    flags = ("--stream-interval", "4", "--return-tokens-as-token-ids")
    with serving("--tokenizer", str(ids_of["directory"]), *flags) as server, server.client() as client:
        yield client


def test_a_suffix_is_answered_by_what_stands_before_it(
    coder: httpx.Client, ids_of: dict[str, Any], oracle: Oracle
) -> None:
    body = {
        "prompt": "The capital of",
        "suffix": " is here",
        "max_tokens": 8,
        "temperature": 0,
        "return_token_ids": True,
    }
    (choice,) = coder.post("/v1/completions", json=body).json()["choices"]
    before, after = oracle.ids("The capital of"), oracle.ids(" is here")
    prefix, hole, middle = (ids_of[token] for token in QWEN)
    assert choice["prompt_token_ids"] == [prefix, *before, hole, *after, middle]
    expected = oracle.greedy(choice["prompt_token_ids"], 8)
    ends = {0, 2, prefix, hole, middle}
    length = next((n for n, token in enumerate(expected, start=1) if token in ends), 8)
    assert choice["token_ids"] == expected[:length]
    (same,) = coder.post("/v1/completions", json=body | {"prompt": before}).json()["choices"]
    assert same == choice
    (plain,) = coder.post("/v1/completions", json=body | {"suffix": ""}).json()["choices"]
    assert plain["prompt_token_ids"] == before


def test_ollama_s_suffix_is_the_same_request(coder: httpx.Client) -> None:
    texts = {"prompt": "The capital of", "suffix": " is here"}
    (choice,) = coder.post("/v1/completions", json=texts | {"max_tokens": 8, "temperature": 0}).json()["choices"]
    (name, *_) = (model["name"] for model in coder.get("/api/tags").json()["models"])
    body = texts | {"model": name, "stream": False, "options": {"num_predict": 8, "temperature": 0}}
    answer = coder.post("/api/generate", json=body).json()
    assert (answer["response"], answer["done_reason"]) == (choice["text"], choice["finish_reason"])
    assert coder.post("/api/show", json={"model": name}).json()["capabilities"] == ["completion", "insert"]


def test_what_the_server_does_where_a_request_does_not_say(coder: httpx.Client) -> None:
    from octavo_server import stream

    body = {
        "prompt": "The",
        "max_tokens": 10,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
    }
    events = stream(coder, "/v1/completions", body)
    choices = [choice for event in events for choice in event["choices"]]
    assert [len(choice["token_ids"]) for choice in choices] == [1, 4, 4, 1]
    for choice in choices:
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    (whole,) = coder.post("/v1/completions", json=body | {"return_tokens_as_token_ids": False}).json()["choices"]
    assert not any(token.startswith("token_id:") for token in whole["logprobs"]["tokens"])
