"""octavo.LLM and AsyncLLM of models that generate nothing, against transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_encoders import CUTS, VOCABULARY, CrossEncoder, SentenceModel, save_tokenizer

from octavo import LLM, AsyncLLM, PoolingParams

TEXTS = ["the cat sat on a mat", "red", "green and blue"]


@pytest.fixture(scope="module")
def sentence(tmp_path_factory: pytest.TempPathFactory) -> SentenceModel:
    return SentenceModel(tmp_path_factory.mktemp("sentence"))


@pytest.fixture(scope="module")
def embedder(forked: None, sentence: SentenceModel) -> Iterator[LLM]:  # noqa: ARG001
    with LLM(str(sentence.directory), dtype="float32", num_threads=1) as found:
        yield found


def test_embed_and_score(embedder: LLM, sentence: SentenceModel) -> None:
    found = embedder.embed([*TEXTS, {"prompt_token_ids": [2, 13, 3]}], use_tqdm=False)
    truths = [*map(sentence.embedding, TEXTS), sentence.embedding([2, 13, 3])]
    for output, truth in zip(found, truths, strict=True):
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), truth, atol=1e-4, rtol=1e-4)
    assert found[1].prompt_token_ids == sentence.tokenizer.encode("red").ids
    (short,) = embedder.embed("red", pooling_params=PoolingParams(dimensions=CUTS[0]), use_tqdm=False)
    assert short.outputs.hidden_size == CUTS[0]
    scores = embedder.score("red", TEXTS, use_tqdm=False)
    for text, output in zip(TEXTS, scores, strict=True):
        truth = float(sentence.embedding("red") @ sentence.embedding(text))
        assert output.outputs.score == pytest.approx(truth, abs=1e-4)


def test_encode_gives_tensors(embedder: LLM, sentence: SentenceModel) -> None:
    (whole,) = embedder.encode("red", use_tqdm=False)
    torch.testing.assert_close(whole.outputs.data, sentence.embedding("red"), atol=1e-4, rtol=1e-4)
    (rows,) = embedder.encode("red", pooling_task="token_embed", use_tqdm=False)
    assert rows.outputs.data.shape == (3, len(sentence.embedding("red")))


def test_one_token_is_a_row_where_tokens_are_asked_for(embedder: LLM) -> None:
    one = {"prompt_token_ids": [13]}
    for ask in ({"pooling_task": "token_embed"}, {"pooling_params": PoolingParams(task="token_embed")}):
        (rows,) = embedder.encode(one, use_tqdm=False, **ask)
        assert rows.outputs.data.ndim == 2
        assert len(rows.outputs.data) == 1
    (whole,) = embedder.encode(one, use_tqdm=False)
    assert whole.outputs.data.ndim == 1


def test_a_score_is_cut_beside_other_parameters(embedder: LLM) -> None:
    params = PoolingParams(use_activation=True)
    (cut,) = embedder.score("red", "cat " * 100, truncate_prompt_tokens=7, pooling_params=params, use_tqdm=False)
    assert len(cut.prompt_token_ids) == 7
    assert params.truncate_prompt_tokens is None


def test_more_prompts_than_a_group_has(embedder: LLM, sentence: SentenceModel) -> None:
    texts = [f"{'cat ' * (i % 9)}{i}" for i in range(600)]
    found = embedder.embed(texts, use_tqdm=False)
    for i in (0, 255, 256, 599):
        truth = sentence.embedding(texts[i])
        torch.testing.assert_close(torch.tensor(found[i].outputs.embedding), truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda llm: llm.classify("red"), "doesn't classify; its tasks are embed, token_embed"),
        (lambda llm: llm.generate("red"), "generates nothing"),
        (lambda llm: llm.embed("cat " * 100), "maximum context length is 32"),
        (lambda llm: llm.embed("red", pooling_params=PoolingParams(dimensions=7)), "16, 32 numbers work"),
        (lambda llm: llm.score(["a", "b"], ["c"]), "2 texts and 1"),
        (lambda llm: llm.embed(["a"], pooling_params=[PoolingParams()]), "is a list; one PoolingParams for all"),
        (lambda llm: llm.encode(["a"], [PoolingParams()]), "is a list; one PoolingParams for all"),
        (lambda llm: llm.score("a", "b", pooling_params=[PoolingParams()]), "is a list; one PoolingParams for all"),
        (lambda llm: llm.embed("red", pooling_params=PoolingParams(truncate_prompt_tokens=0)), "1 at least"),
    ],
)
def test_what_can_not_be_is_refused(embedder: LLM, ask: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ask(embedder)


def test_a_model_that_generates_says_so(llm: LLM) -> None:
    with pytest.raises(ValueError, match="this model generates text"):
        llm.embed("red")


def test_a_qwen3_reranker_is_asked_in_its_own_words(forked: None, tmp_path: Path) -> None:  # noqa: ARG001
    directory = tmp_path / "any-name"
    torch.manual_seed(0)
    sizes = {"vocab_size": len(VOCABULARY), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    model.save_pretrained(directory)
    tokenizer = save_tokenizer(directory)
    before = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    task = "Given a web search query, retrieve relevant passages that answer the query"
    behind = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    with LLM(str(directory), dtype="float32", num_threads=1, convert="classify") as llm:
        for text, output in zip(TEXTS, llm.score("red", TEXTS, use_tqdm=False), strict=True):
            asked = f"{before}<Instruct>: {task}\n<Query>: red\n<Document>: {text}{behind}"
            ids = tokenizer.encode(asked, add_special_tokens=False).ids
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0, -1]
            words = [tokenizer.token_to_id("no"), tokenizer.token_to_id("yes")]
            assert output.outputs.score == pytest.approx(float(logits[words].softmax(dim=0)[1]), abs=1e-4)


def test_labels_and_an_event_loop(forked: None, tmp_path: Path) -> None:  # noqa: ARG001
    model = CrossEncoder(tmp_path, num_labels=3)
    truths = [model.logits(text).softmax(dim=-1) for text in TEXTS]

    async def ask() -> list[Any]:
        async with AsyncLLM(str(tmp_path), dtype="float32", num_threads=1) as llm:
            params = PoolingParams(task="classify")
            return [it for text in TEXTS async for it in llm.encode(text, params, text)]

    for truth, output in zip(truths, asyncio.run(ask()), strict=True):
        torch.testing.assert_close(output.outputs.data, truth, atol=1e-4, rtol=1e-4)


def test_a_prompt_stands_before_texts_that_are_embedded(embedder: LLM, sentence: SentenceModel) -> None:
    named = PoolingParams(prompt_name="query")
    (found,) = embedder.embed("red", pooling_params=named, use_tqdm=False)
    torch.testing.assert_close(
        torch.tensor(found.outputs.embedding), sentence.embedding("query: red"), atol=1e-4, rtol=1e-4
    )
    for ask, said in (
        (lambda: embedder.embed("red", pooling_params=PoolingParams(prompt_name="x")), "none of this model's prompts"),
        (lambda: embedder.embed({"prompt_token_ids": [13]}, pooling_params=named), "leave it out"),
        (lambda: embedder.encode("red", pooling_task="token_embed", pooling_params=named), "leave it out"),
        (lambda: embedder.score("red", ["red"], pooling_params=named), "leave it out"),
    ):
        with pytest.raises(ValueError, match=said):
            ask()
