"""An encoder-decoder over a real socket, in every dialect, against transformers on the same tiny weights."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest
import tiny_encdec
import tokenizers
import torch
from octavo_server import Server, events, serving
from tiny_encdec import END, LONGEST, PAD

from octavo.text.tokenizer import Tokenizer

TEXTS = ["the cat sat.", "translate to German: a dog is 7", "x", "Is a (cat) to sit, or the dog?"]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}</s>"


@dataclass
class Truth:
    """What transformers says."""

    directory: Path
    model: Any

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizers.Tokenizer.from_file(str(self.directory / "tokenizer.json"))

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text).ids
        return found

    def answer(self, text: str, max_tokens: int = 16, **how: Any) -> list[int]:
        return tiny_encdec.generated(self.model, self.ids(text), max_tokens, **how)

    def text(self, text: str, max_tokens: int = 16) -> str:
        return self.written(self.answer(text, max_tokens))

    def written(self, token_ids: list[int]) -> str:
        found: str = self.tokenizer.decode(token_ids)
        return found


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    directory = tmp_path_factory.mktemp("flan")
    return Truth(directory, tiny_encdec.make("t5, FLAN's", directory))


@pytest.fixture(scope="module")
def reading(truth: Truth) -> Iterator[Server]:
    with serving("--served-model-name", "tiny", "--max-num-seqs", "3", model=truth.directory) as running:
        yield running


@pytest.fixture(scope="module")
def official(reading: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{reading.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(reading: Server) -> Iterator[httpx.Client]:
    with reading.client() as client:
        yield client


def test_completions_are_what_transformers_generates(official: openai.OpenAI, truth: Truth) -> None:
    """Several prompts at once, and more requests than places: each is what it is alone."""
    found = official.completions.create(model="tiny", prompt=TEXTS, max_tokens=16, temperature=0)
    assert [choice.text for choice in found.choices] == [truth.text(text) for text in TEXTS]
    assert len({choice.text for choice in found.choices}) > 2
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(len(truth.ids(text)) for text in TEXTS)
    assert found.usage.completion_tokens == sum(len(truth.answer(text)) for text in TEXTS)
    with ThreadPoolExecutor(8) as pool:
        asked = [TEXTS[number % len(TEXTS)] for number in range(8)]
        answers = pool.map(
            lambda text: official.completions.create(model="tiny", prompt=text, max_tokens=9, temperature=0), asked
        )
        assert [answer.choices[0].text for answer in answers] == [truth.text(text, 9) for text in asked]


def test_a_stream_says_the_same(official: openai.OpenAI, truth: Truth) -> None:
    for text in TEXTS[:2]:
        stream = official.completions.create(model="tiny", prompt=text, max_tokens=16, temperature=0, stream=True)
        pieces = list(stream)
        assert "".join(piece.choices[0].text for piece in pieces) == truth.text(text)
        assert len(pieces) > 3
        ends = truth.answer(text)[-1] == END
        assert pieces[-1].choices[0].finish_reason == ("stop" if ends else "length")


def test_log_probabilities_are_those_of_transformers(http: httpx.Client, truth: Truth) -> None:
    body = {"model": "tiny", "prompt": TEXTS[1], "max_tokens": 5, "temperature": 0, "logprobs": 2}
    answer = http.post("/v1/completions", json=body | {"return_token_ids": True}).json()["choices"][0]
    said = answer["token_ids"]
    assert said == truth.answer(TEXTS[1], 5)
    assert answer["prompt_token_ids"] == truth.ids(TEXTS[1])
    logits = tiny_encdec.logits(truth.model, truth.ids(TEXTS[1]), [PAD, *said[:-1]])
    expected = torch.log_softmax(logits, dim=-1)[range(len(said)), said].tolist()
    assert answer["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)


def test_several_answers_stop_strings_and_limits(http: httpx.Client, truth: Truth) -> None:
    body = {"model": "tiny", "prompt": TEXTS[0], "max_tokens": 12}
    both = http.post("/v1/completions", json=body | {"n": 2, "seed": 5, "temperature": 1.5}).json()
    one = http.post("/v1/completions", json=body | {"seed": 6, "temperature": 1.5}).json()
    assert both["choices"][1]["text"] == one["choices"][0]["text"]
    assert both["choices"][0]["text"] != both["choices"][1]["text"]
    assert both["usage"]["prompt_tokens"] == len(truth.ids(TEXTS[0]))
    whole = truth.text(TEXTS[0], 12)
    stop = whole[4:6]
    cut = http.post("/v1/completions", json=body | {"temperature": 0, "stop": stop}).json()["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    chosen = http.post("/v1/completions", json=body | {"structured_outputs": {"choice": ["cat", "dog"]}}).json()
    assert chosen["choices"][0]["text"] in ("cat", "dog")
    beams = http.post("/v1/completions", json=body | {"use_beam_search": True, "n": 2, "max_tokens": 4}).json()
    assert len({choice["text"] for choice in beams["choices"]}) == 2


def test_beams_are_those_of_transformers_where_lengths_count_nothing(http: httpx.Client, truth: Truth) -> None:
    body = {"model": "tiny", "prompt": TEXTS[1], "max_tokens": 4, "n": 3, "ignore_eos": True, "length_penalty": 0}
    found = http.post("/v1/completions", json=body | {"use_beam_search": True}).json()["choices"]
    ids = torch.tensor([truth.ids(TEXTS[1])])
    how = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "max_new_tokens": 4, "min_new_tokens": 4}
    theirs = truth.model.generate(input_ids=ids, do_sample=False, **how)
    assert [choice["text"] for choice in found] == [truth.written(beam.tolist()) for beam in theirs]


def test_lengths_have_errors_of_their_own(http: httpx.Client) -> None:
    body: dict[str, Any] = {"model": "tiny", "temperature": 0}
    long = http.post("/v1/completions", json=body | {"prompt": [5] * (LONGEST + 1), "max_tokens": 4})
    assert long.status_code == 400
    assert f"prompt has {LONGEST + 1} tokens, which its encoder can't read" in long.json()["error"]["message"]
    assert long.json()["error"]["code"] == "context_length_exceeded"
    full = http.post("/v1/completions", json=body | {"prompt": [5] * LONGEST, "max_tokens": LONGEST - 1})
    assert full.json()["usage"]["prompt_tokens"] == LONGEST
    much = http.post("/v1/completions", json=body | {"prompt": "x", "max_tokens": LONGEST})
    assert much.status_code == 400
    assert f"max_tokens is {LONGEST}, and its decoder writes {LONGEST - 1}" in much.json()["error"]["message"]
    cut = http.post("/v1/completions", json=body | {"prompt": [5] * 200, "max_tokens": 4, "truncate_prompt_tokens": -1})
    assert cut.json()["usage"]["prompt_tokens"] == LONGEST
    empty = http.post("/v1/completions", json=body | {"prompt": "", "add_special_tokens": False})
    assert "prompt is empty" in empty.json()["error"]["message"]


def test_a_request_says_what_the_decoder_begins_with(http: httpx.Client, truth: Truth) -> None:
    begin = truth.tokenizer.encode("a cat", add_special_tokens=False).ids
    body = {"model": "tiny", "prompt": TEXTS[1], "temperature": 0, "max_tokens": 9, "return_token_ids": True}
    for given in ("a cat", begin, [PAD, *begin]):
        found = http.post("/v1/completions", json=body | {"decoder_prompt": given}).json()["choices"][0]
        assert found["token_ids"] == truth.answer(TEXTS[1], 9, begin=[PAD, *begin])
    long = http.post("/v1/completions", json=body | {"decoder_prompt": [5] * (LONGEST - 1)})
    assert f"decoder_prompt has {LONGEST} tokens" in long.json()["error"]["message"]
    room = LONGEST - 1 - len(begin)
    much = http.post("/v1/completions", json=body | {"decoder_prompt": begin, "max_tokens": room + 1})
    assert f"max_tokens is {room + 1}, and its decoder writes {room}" in much.json()["error"]["message"]


REFUSED = [
    ({"echo": True}, "echo: answers of this model, an encoder-decoder, don't continue their prompts"),
    ({"prompt_logprobs": 1}, "prompt_logprobs: this model's encoder reads the prompt, and predicts none"),
    ({"suffix": "x"}, "suffix"),
]


@pytest.mark.parametrize(("field", "why"), REFUSED)
def test_what_means_nothing_here_is_refused(http: httpx.Client, field: dict[str, Any], why: str) -> None:
    refused = http.post("/v1/completions", json={"model": "tiny", "prompt": "x"} | field)
    assert refused.status_code == 400
    assert why in refused.json()["error"]["message"]


def test_the_other_dialects_read_with_the_encoder_too(http: httpx.Client, reading: Server, truth: Truth) -> None:
    text = TEXTS[1]
    greedy = {"temperature": 0, "max_new_tokens": 12}
    native = http.post("/generate", json={"text": text, "sampling_params": greedy}).json()
    assert native["text"] == truth.text(text, 12)
    assert native["meta_info"]["prompt_tokens"] == len(truth.ids(text))
    session = http.post("/generate", json={"text": text, "session_params": {"id": "a"}})
    assert "session_params: answers of this model" in session.json()["error"]["message"]
    with ollama.Client(host=reading.url) as client:
        said = client.generate(model="tiny", prompt=text, options={"temperature": 0, "num_predict": 12})
    assert said.response == truth.text(text, 12)
    assert said.prompt_eval_count == len(truth.ids(text))
    assert http.get("/health_generate").status_code == 200
    assert http.post("/tokenize", json={"prompt": text}).json()["tokens"] == truth.ids(text)
    card = http.get("/v1/models").json()["data"][0]
    assert (card["max_model_len"], card["max_input_tokens"]) == (LONGEST, LONGEST)


def test_marian_s_own_tokenizer_and_its_padding_that_is_never_said(tmp_path: Path) -> None:
    """Greedy answers and beams of transformers, which forbids the padding as generation_config.json has it."""
    theirs = tiny_encdec.save_marian(tmp_path)
    tokenizer = Tokenizer.open(tmp_path)
    body: dict[str, Any] = {"model": "marian", "max_tokens": 8, "temperature": 0}
    with serving("--served-model-name", "marian", model=tmp_path) as running, running.client() as client:
        for text in ("The house is small.", ">>deu<< Is it a good day? 7"):
            ids = tokenizer.encode(text)
            found = client.post("/v1/completions", json=body | {"prompt": text, "return_token_ids": True}).json()
            (choice,) = found["choices"]
            truth = tiny_encdec.generated(theirs, ids, 8)
            assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, truth)
            assert PAD not in truth
            assert choice["text"] == tokenizer.decode(truth, skip_special_tokens=True)
        begin = tokenizer.encode("Der Hund", add_special_tokens=False, is_answer=True)
        given = {"prompt": "x", "decoder_prompt": "Der Hund", "return_token_ids": True}
        (choice,) = client.post("/v1/completions", json=body | given).json()["choices"]
        assert choice["token_ids"] == tiny_encdec.generated(theirs, tokenizer.encode("x"), 8, begin=[PAD, *begin])
        wanted = {"prompt": "The dog", "use_beam_search": True, "n": 3, "max_tokens": 4}
        beams = client.post("/v1/completions", json=body | wanted | {"length_penalty": 0, "ignore_eos": True}).json()
        how = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "max_new_tokens": 4}
        ids = torch.tensor([tokenizer.encode("The dog")])
        searched = theirs.generate(input_ids=ids, do_sample=False, min_new_tokens=4, **how)
        said = [tokenizer.decode(beam.tolist(), skip_special_tokens=True) for beam in searched]
        assert [choice["text"] for choice in beams["choices"]] == said


def test_a_chat_needs_a_template(http: httpx.Client, truth: Truth, tmp_path: Path) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": TEXTS[1]}], "temperature": 0, "max_tokens": 8}
    refused = http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert "has no chat template" in refused.json()["error"]["message"]
    refused = http.post("/v1/embeddings", json={"model": "tiny", "input": "x"})
    assert refused.status_code == 400
    assert "generates text, and does nothing else; POST /v1/completions works" in refused.json()["error"]["message"]
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    flags = ("--served-model-name", "tiny", "--chat-template", str(template))
    with serving(*flags, model=truth.directory) as running, running.client() as client:
        found = client.post("/v1/chat/completions", json=body).json()
        assert found["choices"][0]["message"]["content"] == truth.text(TEXTS[1], 8)
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            deltas = [event["choices"][0]["delta"].get("content") or "" for event in events(response.iter_lines())]
        assert "".join(deltas) == truth.text(TEXTS[1], 8)
