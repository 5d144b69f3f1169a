"""Engines of tiny models with a draft model beside them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toy_model import make_request, run_to_end, run_with_arrivals, tokens_of

from octavo.kernels.attention.cache import LayerCache
from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, TokenOutput
from octavo.runtime.scheduling.kv_groups import BlockTables
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.speculation.config import SpeculativeConfig
from octavo.runtime.speculation.draft_model import DraftModel
from octavo.runtime.speculation.model_speculation import ModelSpeculation
from octavo.runtime.startup import load_engine

SIZES = {"block_size": 4, "max_num_seqs": 4, "num_blocks": 256, "max_model_len": 96}

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 7},
    {"logprobs": 2},
    {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"stop_token_ids": tuple(range(0, 256, 5)), "min_tokens": 9},
]


def load(directory: Path, draft: Path | None = None, num_draft_blocks: int | None = None, **limits: Any) -> Engine:
    """In float32. A draft model says 4 tokens each time, whatever that costs."""
    speculative = None if draft is None else SpeculativeConfig("draft_model", model=str(draft))
    config = EngineConfig(
        model=str(directory), dtype="float32", device="cpu", speculative_config=speculative, **{**SIZES, **limits}
    )
    engine, _ = load_engine(config, time.time())
    if draft is not None:
        model = draft_of(engine)
        if num_draft_blocks is not None:
            caches = [
                LayerCache(it.key[:num_draft_blocks], it.value[:num_draft_blocks], it.key_scale, it.value_scale)
                for it in model.caches
            ]
            model = DraftModel(model.model, caches, model.model.vocab_size, SIZES["max_model_len"], 0)
        engine.speculation = ModelSpeculation(model, lambda _: 4, 4)
    return engine


def draft_of(engine: Engine) -> DraftModel:
    assert isinstance(engine.speculation, ModelSpeculation)
    return engine.speculation._model


def asked(name: str, tokens: list[int]) -> Sequence:
    """One that runs, greedily."""
    return Sequence(make_request(name, tokens, max_tokens=50), 0, BlockTables([[]], [0]))


def said(outputs: list[TokenOutput]) -> tuple[list[int], object]:
    return tokens_of(outputs), outputs[-1].finish_reason


def assert_same_answers(plain: Engine, engine: Engine, requests: Callable[[random.Random], list[AddRequest]]) -> None:
    """Requests that arrive between the steps of `engine` end as those that `plain` is given at once; of two draws."""
    for seed in (1, 2):
        wanted = requests(random.Random(seed))
        expected = run_to_end(plain, wanted)
        found = run_with_arrivals(engine, wanted, random.Random(seed))
        for it in wanted:
            assert said(found[it.request_id]) == said(expected[it.request_id])
