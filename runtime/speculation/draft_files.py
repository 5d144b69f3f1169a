"""Loads a draft model beside the model that is served, after a look at whether their tokens are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import StateShape
from octavo.quant.checkpoint import read_config
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.dtypes import DTYPES
from octavo.runtime.model.weights import load_model
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.speculation.draft_model import DraftModel
from octavo.runtime.speculation.head_config import method_of
from octavo.runtime.speculation.own_config import own_config
from octavo.runtime.worker import kv_cache
from octavo.runtime.worker.device import free_memory
from octavo.runtime.worker.kv_layout import one_group
from octavo.runtime.worker.worker import Worker

CACHE_BYTES = 1 << 30  # of the draft model's, if an eighth of what is free is no less
SOURCES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # the first one that is there says it all


@torch.inference_mode()
def load_draft_model(config: EngineConfig, worker: Worker, limits: SchedulerConfig, notes: list[str]) -> DraftModel:
    """The draft model of a configuration that names one, run once; notes get a line about it. Raises ValueError."""
    asked = config.speculative_config
    assert asked is not None
    method = method_of(read_config(Path(asked.model)))
    if method is not None:
        raise ValueError(
            f"--speculative-config: {asked.model} is a head, and no model: the method {method} drafts with it"
        )
    check_tokenizers(Path(config.model), Path(asked.model))
    dtype_asked = config.dtype if config.dtype in DTYPES else "auto"
    model = load_model(own_config(config, model=asked.model, dtype=dtype_asked, kv_cache_dtype="auto"))
    if any(isinstance(shape, StateShape) for shape in model.kv_shapes):
        raise ValueError(
            f"--speculative-config: layers of the draft model, {model.architecture}, have states, and what they are "
            "told can't be taken back; one with attention in all layers works"
        )
    dtype = kv_cache.choose_dtype(model, "auto", [])
    per_block = kv_cache.bytes_per_block(model, config.block_size, dtype, one_group(len(model.kv_shapes)))
    budget = min(CACHE_BYTES, free_memory(model.device) // 8)
    longest = -(-limits.max_model_len // config.block_size)
    num_blocks = min(limits.max_num_seqs * longest, budget // per_block)
    if num_blocks == 0:
        raise ValueError(
            f"--speculative-config: a block of the draft model's cache takes {per_block / 1e6:.1f} MB, and {budget} "
            "bytes are there for it; a smaller --block-size works"
        )
    caches = kv_cache.allocate(model, num_blocks, config.block_size, dtype, kv_cache.choose_scales(model, dtype, []))
    worker.draft_caches = caches
    model.forward(StepInputs.prefill([2], config.block_size).to(model.device), caches)  # what compiles at first use
    tokens = num_blocks * config.block_size
    notes.append(
        f"draft model {asked.model}: {model.architecture}, {model.weight_bytes / 1e6:,.0f} MB of weights, "
        f"a cache for {tokens:,} tokens"
    )
    records = not config.enforce_eager
    return DraftModel(model, caches, worker.model.vocab_size, limits.max_model_len, config.seed, records=records)


def check_tokenizers(target: Path, draft: Path) -> None:
    """Raise ValueError where a token id may mean another text to the draft model."""
    for name in SOURCES:
        files = [directory / name for directory in (target, draft)]
        if not all(file.exists() for file in files):
            continue
        one, other = (file.read_bytes() for file in files)
        if one == other:
            return
        if name != "tokenizer.json":
            raise ValueError(f"{_refusal(draft)}: {name} is another one than in {target}")
        first, second = (_tokens(content) for content in (one, other))
        differing = [text for text in first.keys() | second.keys() if first.get(text) != second.get(text)]
        if not differing:
            return
        text = min(differing, key=lambda text: (first.get(text, len(first)), text))
        raise ValueError(
            f"{_refusal(draft)}: {text!r} is token {first.get(text)} in {target}, and {second.get(text)} in the other"
        )
    raise ValueError(f"{_refusal(draft)}: none of {', '.join(SOURCES)} is in both directories, to compare them by")


def _refusal(draft: Path) -> str:
    return f"--speculative-config: the draft model {draft} must have the tokenizer of the model that is served"


def _tokens(tokenizer: bytes) -> dict[str, int]:
    """Text to id of a tokenizer.json, of its vocabulary and of what was added."""
    content: dict[str, Any] = json.loads(tokenizer)
    vocab = content.get("model", {}).get("vocab", {})
    found = {entry[0]: place for place, entry in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    found |= {entry["content"]: entry["id"] for entry in content.get("added_tokens", ())}
    return found
