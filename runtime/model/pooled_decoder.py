"""A decoder that makes embeddings or scores: its pooler, out of a classifier's head or two rows of its output head.

The layers are those that generate; behind the last one a pooler stands in the place of the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch
from torch import Tensor

from octavo.kernels.quantized_activation import Hidden
from octavo.quant.head_name import head_name
from octavo.quant.model_files import read_object_if_any
from octavo.runtime.config import EngineConfig
from octavo.runtime.messages import PairTemplate
from octavo.runtime.model.device import Device
from octavo.runtime.model.families.encoding import HeadStep
from octavo.runtime.model.families.registry import ENCODERS
from octavo.runtime.model.names import embedding_name
from octavo.runtime.model.pooler_choice import PoolerParts, class_of, make_pooler, purpose_of
from octavo.runtime.model.pooling import Pooler, Projection
from octavo.runtime.model.sentence_files import read_modules
from octavo.runtime.model.sources import CheckpointSource, LoadError
from octavo.runtime.model.spec import DecoderSpec
from octavo.runtime.parallel.group import Group

NO_AND_YES = ("no", "yes")


class NoHead:
    """In the place of a `Head`, where a pooler follows the layers."""

    linear = None

    def forward(self, hidden: Hidden, step: object) -> NoReturn:
        raise NotImplementedError("this model is pooled: it has hidden states and no logits")


def check_pooled(config: EngineConfig, hf_config: Mapping[str, Any], device: Device, group: Group) -> None:
    """Raise LoadError for what pooled decoders don't have: attention both ways, and some options."""
    both_ways = _both_ways(hf_config)
    if both_ways is not None:
        raise LoadError(
            f"config.json: {both_ways}: decoders that attend both ways are not served; those whose tokens see only "
            f"the ones before work, and encoders ({', '.join(ENCODERS)})"
        )
    if group.size > 1:
        raise LoadError("--runner pooling: a pooled model runs on one rank so far; leave the other ranks out")
    if device.torch_device.type != "cpu":
        raise LoadError("--runner pooling: pooled models run on the CPU so far: --device cpu works")
    if config.lora.enable_lora:
        raise LoadError("--enable-lora: adapters of pooled models are not served; leave it out")
    if config.speculative_config is not None:
        raise LoadError("--speculative-config: a pooled model generates nothing; leave it out")
    if config.load_format == "dummy":
        raise LoadError("--load-format dummy: a pooled model's weights can't be random; leave it out")


def _both_ways(hf_config: Mapping[str, Any]) -> str | None:
    """What of a config.json says that tokens attend to those behind them, too; None: nothing does."""
    if both_ways := hf_config.get("use_bidirectional_attention"):
        return f"use_bidirectional_attention {both_ways!r}"
    is_causal = hf_config.get("is_causal")
    if is_causal not in (None, True):
        return f"is_causal {is_causal!r}"
    name = class_of(hf_config)
    return f"architecture {name!r}" if "Bidirectional" in name else None


def with_longest(config: EngineConfig) -> EngineConfig:
    """With the longest text that sentence-transformers names, where none was asked for."""
    modules = read_modules(Path(config.model))
    if config.max_model_len is not None or modules is None or modules.max_length is None:
        return config
    return msgspec.structs.replace(config, max_model_len=modules.max_length)


def decoder_pooler(
    config: EngineConfig, hf_config: Mapping[str, Any], spec: DecoderSpec, source: CheckpointSource, notes: list[str]
) -> Pooler:
    """The pooler of a decoder. Raises LoadError."""
    steps = _head_steps(source)
    words = _words_of_head(config, hf_config, steps)
    if words is not None:
        template: PairTemplate = "qwen3_reranker" if is_qwen3_reranker(config, hf_config) else ""
        if template:
            notes.append("scored as Qwen3-Reranker is: asked in its words, by the probability of yes against no")
        return replace(_from_words(config, spec, source, words), template=template)

    def read(step: HeadStep, rows: int) -> Projection:
        return _read(step, rows, spec, source)

    if steps and "num_labels" not in hf_config and "id2label" not in hf_config:
        labels = source.checkpoint.spec(f"{steps[-1].module}.weight").shape[0]  # a reward model says nothing of it
        hf_config = {**hf_config, "num_labels": labels}
        if labels == 1:
            hf_config.setdefault("problem_type", "regression")
    parts = PoolerParts(spec.hidden_size, "last", steps, steps, "last", read)
    pooler = make_pooler(config, hf_config, parts, notes)
    if purpose_of(config, hf_config) == "embed":
        for step in steps:
            source.checkpoint.leave(step.module)
    return pooler


def _head_steps(source: CheckpointSource) -> list[HeadStep]:
    """Of a classifier, or of a reward model, whose head has two layers."""
    if source.has("score"):
        return [HeadStep("score")]
    return [HeadStep("score.0", "relu"), HeadStep("score.2")] if source.has("score.0") else []


def _read(step: HeadStep, rows: int, spec: DecoderSpec, source: CheckpointSource) -> Projection:
    return Projection(*source.dense(step.module, rows, spec.hidden_size), step.activation)


def is_qwen3_reranker(config: EngineConfig, hf_config: Mapping[str, Any]) -> bool:
    """Whether this is to be a Qwen3-Reranker as its makers have it, a decoder that says yes or no.

    Its config.json is that of any Qwen3: it is one where a classifier is asked for that isn't there.
    """
    asked = config.convert == "classify" or bool(hf_config.get("is_original_qwen3_reranker"))
    return asked and hf_config.get("model_type") == "qwen3"


def _words_of_head(config: EngineConfig, hf_config: Mapping[str, Any], steps: list[HeadStep]) -> tuple[str, str] | None:
    """The tokens whose logits make a score, (against, for); None where there is a classifier, or none is wanted."""
    if steps or config.convert == "embed":
        return None
    words = hf_config.get("classifier_from_token") or (NO_AND_YES if is_qwen3_reranker(config, hf_config) else None)
    if words is None:
        return None
    if len(words) != 2 or not all(isinstance(word, str) for word in words):
        raise LoadError(f"config.json: classifier_from_token is {words!r}; two tokens work, such as {list(NO_AND_YES)}")
    return words[0], words[1]


def _from_words(config: EngineConfig, spec: DecoderSpec, source: CheckpointSource, words: tuple[str, str]) -> Pooler:
    """A softmax over two logits is the sigmoid of their difference, which is that of their rows."""
    name = embedding_name(spec, source.prefix) if spec.tied else head_name(source.prefix)
    if source.is_quantized(name):
        raise LoadError(f"{name} is quantized, and a score would be made of two of its rows; that is not served")
    table = source.tensor(f"{name}.weight", (spec.vocab_size, spec.hidden_size))
    against, for_it = (table[_token_id(Path(config.model), word)].float() for word in words)
    row: Tensor = (for_it - against)[None]
    projection = Projection(row.to(torch.float32, copy=True))
    return Pooler(("classify",), ("last",), (projection,), 1, probabilities="sigmoid")


def _token_id(directory: Path, word: str) -> int:
    """The id of a token, out of tokenizer.json: nothing else of the tokenizer is needed here."""
    content = read_object_if_any(directory / "tokenizer.json")
    model = content.get("model")
    found = model.get("vocab", {}).get(word) if isinstance(model, dict) else None
    if type(found) is not int:
        raise LoadError(f"{directory / 'tokenizer.json'} has no token {word!r}, of which a score would be made")
    return found
