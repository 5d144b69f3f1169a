"""Decoders as embedders, classifiers and rerankers, against transformers, through the engine's own steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_oracle import SIZES
from safetensors.torch import save_file
from tiny_encoders import write
from torch import Tensor

from octavo.runtime.config import EngineConfig, PoolerConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, PoolingParams, SamplingParams
from octavo.runtime.model.families.family import UnsupportedModelError
from octavo.runtime.model.sources import LoadError
from octavo.runtime.startup import load_engine

TEXTS = [[5, 6, 7], list(range(3, 45)), [9], list(range(3, 35))]
KEYS: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 16},
    "Llama": {"attention_bias": True},
    "Mistral": {"sliding_window": 7},
    "Qwen2": {},
}


def made(kind: str, directory: Path, **keys: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    family = kind.partition("For")[0].removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(**SIZES | KEYS[family] | keys, attn_implementation="eager")
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    model.save_pretrained(directory)
    return model


def engine(directory: Path, **options: Any) -> Engine:
    """In float32, with steps that long texts don't fit into."""
    sizes = {"num_blocks": 64, "block_size": 4, "max_num_batched_tokens": 16}
    return load_engine(EngineConfig(model=str(directory), dtype="float32", **sizes | options), 0.0)[0]


def pooled(engine: Engine, texts: list[list[int]], params: PoolingParams) -> list[Tensor]:
    for i, text in enumerate(texts):
        request = AddRequest(str(i), text, SamplingParams(max_tokens=1), 0.0, pooling=params)
        assert not engine.add(request)
    found: dict[int, Tensor] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.pooled is not None, output.error
            data = torch.frombuffer(bytearray(output.pooled.data), dtype=torch.float32)
            found[int(output.request_id)] = data.view(-1, output.pooled.width)
    return [found[i] for i in range(len(texts))]


@torch.inference_mode()
def hidden(model: Any, text: list[int]) -> Tensor:
    return model(torch.tensor([text])).last_hidden_state[0]


def close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", KEYS)
def test_an_embedding_is_the_last_tokens_state(family: str, tmp_path: Path) -> None:
    """In chunks, in batches, and once more out of the prefix cache."""
    model = made(f"{family}Model", tmp_path)
    running = engine(tmp_path)
    for _ in range(2):
        for text, found in zip(TEXTS, pooled(running, TEXTS, PoolingParams()), strict=True):
            truth = hidden(model, text)[-1]
            close(found[0], truth / truth.norm())
    assert running.scheduler.prefixes.num_hits > 0 or family == "Mistral"


def test_a_mean_is_one_of_all_chunks(tmp_path: Path) -> None:
    model = made("Qwen3Model", tmp_path)
    running = engine(tmp_path, pooler_config=PoolerConfig(pooling_type="MEAN", use_activation=False))
    for _ in range(2):
        for text, found in zip(TEXTS, pooled(running, TEXTS, PoolingParams()), strict=True):
            close(found[0], hidden(model, text).mean(dim=0))
    for text, found in zip(TEXTS, pooled(running, TEXTS, PoolingParams("token_embed")), strict=True):
        close(found, hidden(model, text))


def test_a_model_that_generates_embeds_where_it_is_asked_to(tmp_path: Path) -> None:
    model = made("LlamaForCausalLM", tmp_path)
    running = engine(tmp_path, runner="pooling")
    for text, found in zip(TEXTS, pooled(running, TEXTS, PoolingParams()), strict=True):
        truth = hidden(model.model, text)[-1]
        close(found[0], truth / truth.norm())


@pytest.mark.parametrize("labels", [1, 3])
def test_scores_of_a_classifier(labels: int, tmp_path: Path) -> None:
    model = made("Qwen2ForSequenceClassification", tmp_path, num_labels=labels)
    running = engine(tmp_path)
    for text, found in zip(TEXTS, pooled(running, TEXTS, PoolingParams("classify")), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([text])).logits[0]
        close(found[0], logits.sigmoid() if labels == 1 else logits.softmax(dim=-1))


def test_a_reward_model_has_two_layers(tmp_path: Path) -> None:
    """Qwen2.5-Math-RM's class is its own code's; its head is what is told here."""
    model = made("Qwen2Model", tmp_path / "bare")
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    first = torch.nn.Linear(64, 64)
    last = torch.nn.Linear(64, 1)
    weights |= {"score.0.weight": first.weight, "score.0.bias": first.bias}
    weights |= {"score.2.weight": last.weight, "score.2.bias": last.bias}

    (tmp_path / "own").mkdir()
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in weights.items()}, tmp_path / "own/model.safetensors"
    )
    config = json.loads((tmp_path / "bare/config.json").read_text())
    write(tmp_path / "own/config.json", config | {"architectures": ["Qwen2ForRewardModel"]})
    for text, found in zip(TEXTS, pooled(engine(tmp_path / "own"), TEXTS, PoolingParams("classify")), strict=True):
        with torch.inference_mode():
            close(found[0], last(torch.relu(first(hidden(model, text)[-1]))))


@pytest.mark.parametrize("tied", [False, True])
def test_a_reranker_says_yes_or_no(tied: bool, tmp_path: Path) -> None:
    directory = tmp_path / "any-name"
    model = made("Qwen3ForCausalLM", directory, tie_word_embeddings=tied)
    write(directory / "tokenizer.json", {"model": {"vocab": {"no": 11, "yes": 12}}})
    running = engine(directory, convert="classify")
    assert running.worker.model.pooler is not None
    assert running.worker.model.pooler.template == "qwen3_reranker"
    for text, found in zip(TEXTS, pooled(running, TEXTS, PoolingParams("classify")), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([text])).logits[0, -1]
        close(found[0, 0], logits[[11, 12]].softmax(dim=0)[1])


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("LlamaForCausalLM", {"runner": "pooling", "convert": "classify"}, "LlamaForCausalLM has no classifier"),
        ("LlamaForCausalLM", {"runner": "pooling", "model_impl": "hf"}, "transformers' own code is not served"),
        ("LlamaForCausalLM", {"runner": "pooling", "load_format": "dummy"}, "--load-format dummy"),
        ("LlamaForCausalLM", {"pooler_config": PoolerConfig(pooling_type="MEAN")}, "--runner pooling makes embeddings"),
    ],
)
def test_what_can_not_be_is_refused(kind: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    made(kind, tmp_path)
    with pytest.raises(LoadError, match=said):
        engine(tmp_path, **options)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"is_causal": False}, "is_causal False: decoders that attend both ways are not served"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True: decoders that attend both ways"),
        ({"architectures": ["Qwen2BidirectionalModel"]}, "'Qwen2BidirectionalModel': decoders that attend both ways"),
    ],
)
def test_attention_both_ways_is_refused(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    made("Qwen2Model", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    with pytest.raises(LoadError, match=said):
        engine(tmp_path)


def test_attention_both_ways_is_refused_where_text_is_generated(tmp_path: Path) -> None:
    made("Qwen2ForCausalLM", tmp_path, is_causal=False)
    with pytest.raises(UnsupportedModelError, match="is_causal = False"):
        engine(tmp_path)
