"""The pooled routes of real servers, with their official clients, against transformers."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import ollama
import openai
import pytest
import torch
from octavo_server import serving
from tiny_encoders import CUTS, SIZE, CrossEncoder, SentenceModel
from torch import Tensor

SAID = [{"role": "user", "content": "The cat"}]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}{{ verb | default('say') }}:{% endif %}"
)
TEXTS = ["the cat sat on a mat", "red", "green and blue", "running runs 42 times " * 2]


@pytest.fixture(scope="module")
def sentence(tmp_path_factory: pytest.TempPathFactory) -> SentenceModel:
    return SentenceModel(tmp_path_factory.mktemp("sentence"))


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return CrossEncoder(tmp_path_factory.mktemp("crossed"))


@pytest.fixture(scope="module")
def url(sentence: SentenceModel) -> Iterator[str]:
    (sentence.directory / "chat_template.jinja").write_text(TEMPLATE)
    with serving("--served-model-name", "tiny", model=sentence.directory) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def scorer(crossed: CrossEncoder) -> Iterator[httpx.Client]:
    with (
        serving("--served-model-name", "tiny", model=crossed.directory) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def official(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


def assert_same(found: Any, truth: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found), truth, atol=1e-4, rtol=1e-4)


def posted(client: httpx.Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: httpx.Client, path: str, **body: Any) -> str:
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["message"])


def test_the_official_client_gets_embeddings(official: openai.OpenAI, sentence: SentenceModel) -> None:
    """It asks for base64 by itself, and for floats where it is told to."""
    for more in ({}, {"encoding_format": "float"}):
        answer = official.embeddings.create(model="tiny", input=TEXTS, **more)  # type: ignore[arg-type]
        assert [one.index for one in answer.data] == [0, 1, 2, 3]
        for text, one in zip(TEXTS, answer.data, strict=True):
            assert_same(one.embedding, sentence.embedding(text))
        lengths = [len(sentence.tokenizer.encode(text).ids) for text in TEXTS]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(lengths)


def test_one_text_and_token_ids(official: openai.OpenAI, sentence: SentenceModel) -> None:
    lists = [sentence.tokenizer.encode(text).ids for text in TEXTS]
    (one,) = official.embeddings.create(model="tiny", input=TEXTS[0]).data
    (same,) = official.embeddings.create(model="tiny", input=lists[0]).data
    many = official.embeddings.create(model="tiny", input=lists).data
    assert one.embedding == same.embedding
    for text, each in zip(TEXTS, many, strict=True):
        assert_same(each.embedding, sentence.embedding(text))


def test_many_clients_at_once_get_their_own(official: openai.OpenAI, sentence: SentenceModel) -> None:
    texts = [f"{'cat ' * (1 + i % 7)}{i}" for i in range(48)]
    with ThreadPoolExecutor(12) as threads:
        found = list(threads.map(lambda text: official.embeddings.create(model="tiny", input=text).data, texts))
    for text, (one,) in zip(texts, found, strict=True):
        assert_same(one.embedding, sentence.embedding(text))


def test_sizes_forms_and_prompts(client: httpx.Client, sentence: SentenceModel) -> None:
    (cut,) = posted(client, "/v1/embeddings", input="red", dimensions=CUTS[0])["data"]
    assert_same(cut["embedding"], sentence.embedding("red", CUTS[0]))
    raw = posted(client, "/v1/embeddings", input="red", encoding_format="base64", embed_dtype="float16")["data"][0]
    halves = struct.unpack(f"<{SIZE}e", base64.b64decode(raw["embedding"]))
    torch.testing.assert_close(torch.tensor(halves), sentence.embedding("red"), atol=1e-3, rtol=1e-2)
    (named,) = posted(client, "/v1/embeddings", input="red", prompt_name="query")["data"]
    (given,) = posted(client, "/v1/embeddings", input="red", prompt="query: ")["data"]
    assert_same(named["embedding"], sentence.embedding("query: red"))
    assert named == given
    plain = torch.tensor(posted(client, "/v1/embeddings", input="red", normalize=False)["data"][0]["embedding"])
    assert plain.norm() > 1.5
    assert_same((plain / plain.norm()).tolist(), sentence.embedding("red"))


def test_bfloat16_is_rounded_to_the_nearest(client: httpx.Client, sentence: SentenceModel) -> None:
    asked = {"input": "the mat", "encoding_format": "base64"}
    exact = base64.b64decode(posted(client, "/v1/embeddings", **asked)["data"][0]["embedding"])
    short = base64.b64decode(posted(client, "/v1/embeddings", **asked, embed_dtype="bfloat16")["data"][0]["embedding"])
    truth = torch.frombuffer(bytearray(exact), dtype=torch.float32).bfloat16()
    assert torch.equal(torch.frombuffer(bytearray(short), dtype=torch.bfloat16), truth)
    assert_same(truth.float().tolist(), sentence.embedding("the mat").bfloat16().float())


def test_long_texts_are_refused_or_cut_within_their_special_tokens(
    client: httpx.Client, sentence: SentenceModel
) -> None:
    text = " ".join(["cat", "sat", "red", "blue"] * 20)
    said = refused(client, "/v1/embeddings", input=text)
    assert "maximum context length is 32 tokens" in said
    assert "82 tokens" in said
    ids = sentence.tokenizer.encode(text).ids
    (whole,) = posted(client, "/v1/embeddings", input=text, truncate_prompt_tokens=-1)["data"]
    assert_same(whole["embedding"], sentence.embedding([*ids[:31], ids[-1]]))
    (tail,) = posted(client, "/v1/embeddings", input=text, truncate_prompt_tokens=9, truncation_side="left")["data"]
    assert_same(tail["embedding"], sentence.embedding([ids[0], *ids[-8:]]))
    assert "truncate_prompt_tokens 33 is more" in refused(
        client, "/v1/embeddings", input="x", truncate_prompt_tokens=33
    )


def test_a_step_has_as_many_texts_as_fit(client: httpx.Client, sentence: SentenceModel) -> None:
    """More tokens than one step takes, of texts that each need a step for all of them."""
    texts = [" ".join(["cat", "red"] * (1 + i % 15)) for i in range(300)]
    found = posted(client, "/v1/embeddings", input=texts)["data"]
    for i in (0, 14, 150, 299):
        assert_same(found[i]["embedding"], sentence.embedding(texts[i]))


def test_cohere_and_sglang(client: httpx.Client, sentence: SentenceModel) -> None:
    asked = {"model": "tiny", "texts": ["red", "blue"], "input_type": "search_query"}
    answer = posted(client, "/v2/embed", **asked, embedding_types=["float", "base64", "ubinary"])
    truth = sentence.embedding("query: red")
    assert_same(answer["embeddings"]["float"][0], truth)
    assert_same(struct.unpack(f"<{SIZE}f", base64.b64decode(answer["embeddings"]["base64"][0])), truth)
    bits = [byte >> (7 - place) & 1 for byte in answer["embeddings"]["ubinary"][0] for place in range(8)]
    assert bits == (truth > 0).int().tolist()
    long = " ".join(["cat", "red"] * 30)
    ids = sentence.tokenizer.encode(long).ids
    for most, kept in ((5, 5), (1000, 32)):  # 32: what the model takes
        cut = posted(client, "/v2/embed", texts=[long], max_tokens=most)["embeddings"]["float"][0]
        assert_same(cut, sentence.embedding([*ids[: kept - 1], ids[-1]]))
    one = posted(client, "/encode", text="red")
    assert_same(one["embedding"], sentence.embedding("red"))
    assert one["meta_info"]["prompt_tokens"] == 3
    many = posted(client, "/encode", input_ids=[[2, 13, 3], [2, 15, 3]])
    assert_same(many[1]["embedding"], sentence.embedding([2, 15, 3]))


def test_ollamas_client(url: str, sentence: SentenceModel) -> None:
    long = "cat " * 100
    ids = sentence.tokenizer.encode(long).ids
    with ollama.Client(url) as client:
        many = client.embed("tiny", ["red", "the mat"], dimensions=CUTS[1])
        assert_same(many.embeddings[1], sentence.embedding("the mat", CUTS[1]))
        assert many.prompt_eval_count == 3 + 4
        assert_same(client.embed("tiny:latest", "red").embeddings[0], sentence.embedding("red"))
        assert_same(client.embeddings("tiny", "red").embedding, sentence.embedding("red"))
        assert_same(client.embed("tiny", long).embeddings[0], sentence.embedding([*ids[:31], ids[-1]]))
        with pytest.raises(ollama.ResponseError, match="maximum context length"):
            client.embed("tiny", long, truncate=False)
        assert client.show("tiny").capabilities == ["embedding"]


def test_scores_of_an_embedder_are_cosines(client: httpx.Client, sentence: SentenceModel) -> None:
    answer = posted(client, "/score", queries="red", documents=["blue", "the cat"])
    truth = [float(sentence.embedding("red") @ sentence.embedding(text)) for text in ("blue", "the cat")]
    assert [one["score"] for one in answer["data"]] == pytest.approx(truth, abs=1e-4)
    ranked = posted(client, "/rerank", query="red", documents=["blue", "the cat", "red"])
    assert ranked["results"][0] == {"index": 2, "document": {"text": "red"}, "relevance_score": pytest.approx(1.0)}
    long = " ".join(["cat", "sat", "red", "blue"] * 20)
    ids = sentence.tokenizer.encode(long).ids
    for fields, kept in (
        ({"max_tokens_per_doc": 9, "truncate_prompt_tokens": -1, "truncation_side": "left"}, [ids[0], *ids[-8:]]),
        ({"max_tokens_per_doc": 9, "truncate_prompt_tokens": 7}, [*ids[:6], ids[-1]]),
        ({"max_tokens_per_doc": 4096}, [*ids[:31], ids[-1]]),
    ):
        (result,) = posted(client, "/rerank", query="red", documents=[long], **fields)["results"]
        truth = float(sentence.embedding("red") @ sentence.embedding(kept))
        assert result["relevance_score"] == pytest.approx(truth, abs=1e-4)


def test_a_conversation_is_one_prompt(client: httpx.Client, sentence: SentenceModel) -> None:
    """As the chat template writes it, without special tokens beside those that it writes itself."""
    said = [{"role": "user", "content": "The cat"}, {"role": "assistant", "content": [{"type": "text", "text": "sat"}]}]
    plain = sentence.tokenizer.encode("user: The cat assistant: sat", add_special_tokens=False).ids
    framed = sentence.tokenizer.encode("user: The cat assistant: sat").ids
    asking = sentence.tokenizer.encode("user: The cat assistant: sat say:", add_special_tokens=False).ids
    running = sentence.tokenizer.encode("user: The cat assistant: sat run:", add_special_tokens=False).ids
    for fields, ids in (
        ({}, plain),
        ({"add_special_tokens": True}, framed),
        ({"add_generation_prompt": True}, asking),
        ({"chat_template_kwargs": {"verb": "run"}, "add_generation_prompt": True}, running),
        ({"truncate_prompt_tokens": 4}, plain[:4]),
        ({"truncate_prompt_tokens": 4, "truncation_side": "left"}, plain[-4:]),
    ):
        found = posted(client, "/v1/embeddings", messages=said, **fields)
        assert found["usage"]["prompt_tokens"] == len(ids)
        assert_same(found["data"][0]["embedding"], sentence.embedding(ids))
    small = posted(client, "/v1/embeddings", messages=said, dimensions=CUTS[0], encoding_format="base64")
    numbers = struct.unpack(f"<{CUTS[0]}f", base64.b64decode(small["data"][0]["embedding"]))
    assert_same(list(numbers), sentence.embedding(plain, CUTS[0]))
    rows = posted(client, "/pooling", messages=said, task="token_embed", normalize=False)["data"][0]["data"]
    assert len(rows) == len(plain)


def test_states_of_tokens(client: httpx.Client, sentence: SentenceModel) -> None:
    (one,) = posted(client, "/pooling", input="the cat", task="token_embed", normalize=False)["data"]
    hidden = sentence.model(torch.tensor([sentence.tokenizer.encode("the cat").ids])).last_hidden_state[0].detach()
    assert_same(one["data"], torch.tanh(hidden @ sentence.dense.T))


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/embeddings", {"input": []}, "at least 1 item"),
        ("/v1/embeddings", {"input": [[]]}, "at least 1 item"),
        ("/v1/embeddings", {"input": ["a", 3]}, "valid string"),
        ("/v1/embeddings", {"input": [9999]}, "not below the vocabulary size"),
        ("/v1/embeddings", {"input": "a", "dimensions": 20}, "embeddings of 16, 32 numbers work"),
        ("/v1/embeddings", {"input": "a", "prompt_name": "no"}, "none of this model's prompts; query, document"),
        ("/v1/embeddings", {"input": [2, 13, 3], "prompt_name": "query"}, "token ids have no text before them"),
        ("/pooling", {"input": [[2, 13, 3]], "prompt": "a"}, "token ids have no text before them"),
        ("/v2/embed", {"texts": ["cat cat cat"], "truncate": "NONE", "max_tokens": 4}, "5 tokens, and max_tokens 4"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "does not support the value 'hex'"),
        ("/v1/embeddings", {"input": "a", "embed_dtype": "float16"}, "encoding_format base64 has such numbers"),
        ("/v1/embeddings", {"input": "a", "n": 2}, "n: octavo does not support this field"),
        ("/v1/embeddings", {"input": "a", "priority": 1}, "--scheduling-policy priority"),
        (
            "/v1/embeddings",
            {"input": ["a"] * 100, "prompt": "cat " * 50_000, "truncate_prompt_tokens": 8},
            "in front of each of 100 texts",
        ),
        ("/v1/embeddings", {"input": "a", "messages": SAID}, "input: octavo does not support this field"),
        ("/v1/embeddings", {"messages": SAID, "prompt_name": "query"}, "prompt_name: octavo does not support"),
        ("/v1/embeddings", {"messages": [SAID]}, "messages"),
        ("/v1/embeddings", {"messages": SAID * 40}, "Shorten it, or truncate_prompt_tokens -1 cuts it"),
        ("/v1/embeddings", {"messages": SAID, "chat_template": "x"}, "does not run a client's"),
        (
            "/v1/embeddings",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}]},
            "text alone",
        ),
        ("/classify", {"input": "a"}, "doesn't classify"),
        ("/score", {"queries": "a"}, "queries and documents"),
        ("/score", {"queries": ["a", "b"], "documents": ["c"]}, "queries has 2 texts, and documents 1"),
        ("/v1/completions", {"prompt": "a"}, "generates no text; POST /v1/embeddings"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "generates no text"),
    ],
)
def test_what_can_not_be_is_refused(client: httpx.Client, path: str, body: dict[str, Any], said: str) -> None:
    assert said in refused(client, path, **body)


def test_a_model_that_generates_names_what_works(server: Any) -> None:
    with server.client() as client:
        assert "/v1/completions" in refused(client, "/v1/embeddings", input="a")
        assert "generates text" in refused(client, "/rerank", query="a", documents=["b"])
        assert client.post("/api/embed", json={"model": "tiny", "input": "a"}).status_code == 400


def test_metrics_count_pooled_requests(client: httpx.Client) -> None:
    posted(client, "/v1/embeddings", input="the cat")
    page = client.get("/metrics").text
    (line,) = [line for line in page.splitlines() if line.startswith("vllm:request_success_total") and '"stop"' in line]
    assert float(line.split()[-1]) > 0
    assert client.get("/health").status_code == 200


def test_scores_of_a_cross_encoder(scorer: httpx.Client, crossed: CrossEncoder) -> None:
    documents = ["blue", "the cat sat on a mat", "red red red"]
    truth = [float(torch.sigmoid(crossed.logits("red", text))[0]) for text in documents]
    assert max(truth) - min(truth) > 1e-3  # or the order below would say nothing
    for asked in ({"queries": "red", "documents": documents}, {"text_1": ["red"] * 3, "text_2": documents}):
        answer = posted(scorer, "/score", **asked)
        assert [one["score"] for one in answer["data"]] == pytest.approx(truth, abs=1e-4)
    raw = posted(scorer, "/v1/score", data_1="red", data_2="blue", use_activation=False)["data"][0]
    assert raw["score"] == pytest.approx(float(crossed.logits("red", "blue")[0]), abs=1e-4)
    order = sorted(range(3), key=truth.__getitem__, reverse=True)
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        answer = posted(scorer, path, query="red", documents=[{"text": one} for one in documents], top_n=2)
        assert [one["index"] for one in answer["results"]] == order[:2]
        assert answer["results"][0]["relevance_score"] == pytest.approx(max(truth), abs=1e-4)
        assert answer["usage"]["total_tokens"] > 0


def test_long_pairs_are_refused_or_their_longer_text_is_cut(scorer: httpx.Client, crossed: CrossEncoder) -> None:
    long = " ".join(["cat", "red"] * 30)
    assert "maximum context length is 40" in refused(scorer, "/score", queries="blue mat", documents=long)
    (one,) = posted(scorer, "/score", queries="blue mat", documents=long, truncate_prompt_tokens=-1)["data"]
    kept = " ".join(["cat", "red"] * 30).split()[: 40 - 3 - 2]
    assert one["score"] == pytest.approx(float(torch.sigmoid(crossed.logits("blue mat", " ".join(kept)))[0]), abs=1e-4)
    ranked = posted(scorer, "/rerank", query="blue mat", documents=[long], max_tokens_per_doc=5)
    truth = float(torch.sigmoid(crossed.logits("blue mat", " ".join(kept[:5])))[0])
    assert ranked["results"][0]["relevance_score"] == pytest.approx(truth, abs=1e-4)


def test_sglangs_health_and_facts(client: httpx.Client, scorer: httpx.Client) -> None:
    for each in (client, scorer):
        assert each.get("/health_generate").status_code == 200
        assert [each.get(path).json()["is_generation"] for path in ("/model_info", "/get_model_info")] == [False] * 2


def test_labels(scorer: httpx.Client, crossed: CrossEncoder) -> None:
    answer = posted(scorer, "/classify", input=["red", "the cat"])
    for text, one in zip(["red", "the cat"], answer["data"], strict=True):
        assert (one["label"], one["num_classes"]) == ("bad", 1)
        assert one["probs"] == pytest.approx(torch.sigmoid(crossed.logits(text)).tolist(), abs=1e-4)
