"""Layers with a sliding window hold the window and no more, and answer as they did when they held everything."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_oracle import CASES, make_hf, save
from slow_cases import slow
from toy_model import make_request, run_to_end, run_with_arrivals, tokens_of

from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.scheduling.block_pool import BlockPool, hash_block
from octavo.runtime.scheduling.kv_groups import KVGroups, capacity, most_blocks
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.startup import load_engine
from octavo.runtime.worker import kv_cache
from octavo.runtime.worker.kv_layout import choose_layout
from octavo.runtime.worker.worker import Worker

pytestmark = pytest.mark.long

WINDOWED = ["mistral", "qwen2", "gemma2", "gemma3_text", "smollm3", "qwen3_moe", "gemma3n_text"]
GEMMA3 = [512 if layer % 6 != 5 else None for layer in range(18)]  # of the 270M


def test_layers_are_dealt_out_in_groups_of_one_size() -> None:
    layout = choose_layout(GEMMA3, 32768)
    assert layout.windows == (None, 512, 512, 512, 512, 512)
    assert layout.layers[0] == (5, 11, 17)
    assert layout.depth == 3
    assert sorted(layer for group in layout.layers for layer in group) == list(range(18))
    assert all(GEMMA3[layer] == window for group, window in zip(*_columns(layout), strict=True) for layer in group)


def _columns(layout: Any) -> tuple[Any, Any]:
    return layout.layers, layout.windows


@pytest.mark.parametrize(
    ("windows", "longest", "sizes"),
    [
        ([None] * 4, 100, [4]),
        ([8] * 4, 100, [4]),  # one kind
        ([8, None] * 2, 8, [4]),  # the window holds every sequence
        ([8, None] * 2, 9, [2, 2]),
        ([8, 8, 8, None], 100, [1, 1, 1, 1]),
        ([8] * 22 + [None] * 4, 100, [4, 4, 4, 4, 4, 4, 2]),  # two layers' memory of 28 is nobody's
        ([8] * 5 + [None] * 3, 100, [3, 3, 2]),
        ([8] * 5 + [None] * 4, 100, [2, 2, 2, 2, 1]),
        ([8, 16, None], 100, [1, 1, 1]),
    ],
)
def test_group_sizes(windows: list[int | None], longest: int, sizes: list[int]) -> None:
    assert [len(group) for group in choose_layout(windows, longest).layers] == sizes


def test_a_prefix_needs_the_last_window_alone() -> None:
    groups = KVGroups(BlockPool(32), 4, (None, 6))
    hashes = [hash_block(b"", [i]) for i in range(5)]
    blocks = groups.empty()
    groups.grow(blocks, 5)
    groups.remember(blocks, hashes, 0, 5)
    groups.give_back_unseen(blocks, 20)  # position 20 sees 15 and behind: block 3
    assert blocks.begins == [0, 3]
    evicted = blocks.tables[1][:3]
    groups.pool.forget(evicted)
    assert groups.find_prefix(hashes).tables == [blocks.tables[0], [0, 0, 0, *blocks.tables[1][3:]]]
    groups.pool.forget(blocks.tables[1][4:])
    assert len(groups.find_prefix(hashes)) == 0, "no shorter prefix has its window"
    groups.release(blocks)
    groups.pool.check([])


def test_what_one_sequence_can_have() -> None:
    assert capacity(64, 16, (None,), 10_000) == 1024
    assert capacity(64, 16, (None, 100), 10_000) == 16 * (64 - 8)  # 100 tokens lie in 8 blocks at most
    assert capacity(4, 16, (100,), 10_000) == 64
    assert capacity(9, 16, (100,), 10_000) == 10_000


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("windowed")
    return {name: save(make_hf(*CASES[name]), root / name) for name in WINDOWED}


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """What transformers' own model answers, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def engine_of(model: Any, **limits: Any) -> Engine:
    """An engine over a loaded model and a cache of its own, in groups."""
    layout = choose_layout(model.kv_windows, 64)
    settings = SchedulerConfig(windows=layout.windows, max_model_len=64, **limits)
    caches = kv_cache.allocate(model, settings.num_blocks, settings.block_size, torch.float32, None, layout)
    return Engine(Worker(model, caches, settings), settings)


@pytest.mark.parametrize("seeds", [(1, 3), slow(range(8))], ids=str)
@pytest.mark.parametrize("family", WINDOWED)
def test_answers_are_those_of_transformers_however_they_are_scheduled(
    checkpoints: dict[str, Path], family: str, seeds: Sequence[int]
) -> None:
    """Chunks, shared prefixes, preemption and blocks that change hands among groups of layers."""
    config = EngineConfig(
        model=str(checkpoints[family]), dtype="float32", num_blocks=400, block_size=4, max_model_len=64
    )
    model = load_engine(config, time.time())[0].worker.model
    assert any(choose_layout(model.kv_windows, 64).windows)
    rng = random.Random(0)
    stem = [rng.randrange(3, 96) for _ in range(40)]
    requests = [
        make_request(f"r{i}", [*stem[: rng.randrange(1, 40)], rng.randrange(3, 96)], max_tokens=rng.randrange(5, 20))
        for i in range(8)
    ]
    reference = make_hf(*CASES[family])  # the checkpoint's weights: the seed is the same
    truth = {r.request_id: greedy(reference, r.token_ids, r.params.max_tokens) for r in requests}
    preemptions = hits = 0
    for seed in seeds:
        rng = random.Random(seed)
        windows = choose_layout(model.kv_windows, 64).windows
        engine = engine_of(
            model,
            block_size=4,
            num_blocks=most_blocks(60, 4, windows) + rng.randrange(6 * len(windows)),
            max_num_seqs=rng.randrange(2, 9),
            max_num_batched_tokens=rng.choice([1, 8, 20, 200]),
        )
        together = run_with_arrivals(engine, requests, rng)
        assert {name: tokens_of(together[name]) for name in truth} == truth
        engine.scheduler.pool.check([])
        preemptions += engine.scheduler.stats().num_preemptions
        hits += engine.scheduler.stats().prefix_cache_hits
    assert hits > 30
    assert preemptions > 0


def test_gemma_3_at_8k_holds_its_windows_alone(tmp_path: Path) -> None:
    """Six layers in Gemma 3's pattern: one holds all 8,192 tokens, five hold their window of 512."""
    sizes = {"num_hidden_layers": 6, "head_dim": 16, "sliding_window": 512, "max_position_embeddings": 8192}
    directory = save(make_hf("Gemma3", sizes | {"query_pre_attn_scalar": 16}), tmp_path / "gemma3")
    config = EngineConfig(model=str(directory), dtype="float32", num_blocks=6 * 600, max_num_batched_tokens=1024)
    engine, ready = load_engine(config, time.time())
    assert ready.max_model_len == 8192
    prompt = [3 + i * i % 90 for i in range(8100)]
    engine.add(make_request("long", prompt, max_tokens=80))
    most = 0
    while engine.has_work:
        engine.step()
        decoding = [s for s in engine.scheduler.running if len(s.token_ids) > len(prompt) + 20]
        most = max([most, *(sum(map(len, s.blocks.held())) for s in decoding)])
    in_one_group = 6 * -(-8180 // 16)
    in_windows = -(-8180 // 16) + 5 * (512 // 16 + 2)
    assert 0 < most <= in_windows
    per_block = ready.report.kv_cache_bytes // ready.num_blocks
    assert per_block == 2 * 2 * 16 * 16 * 4, "keys and values of 2 heads of 16, 16 tokens, float32, one layer"
    assert most * per_block < 0.23 * in_one_group * per_block


def test_a_long_answer_in_a_cache_of_windows_never_runs_out(checkpoints: dict[str, Path]) -> None:
    """All of mistral's layers have a window of 7: three blocks of four tokens serve a sequence of any length."""
    limits = {"num_blocks": 5, "block_size": 4, "max_num_batched_tokens": 8}
    config = EngineConfig(model=str(checkpoints["mistral"]), dtype="float32", **limits)
    engine, ready = load_engine(config, time.time())
    assert ready.max_model_len == 64
    outputs = run_to_end(engine, [make_request("a", [5, 6, 7], max_tokens=60)])
    assert len(tokens_of(outputs["a"])) == 60
    assert engine.scheduler.stats().num_preemptions == 0
    assert tokens_of(outputs["a"]) == greedy(make_hf(*CASES["mistral"]), [5, 6, 7], 60)
