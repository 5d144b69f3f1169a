"""Decode steps that are replayed give the bits that the layers give, and steps that can't be are left to these.

With drafts among their tokens, too.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guessing import Guessing, Style
from hf_oracle import CASES, make_hf, save
from torch import Tensor
from toy_model import make_request, run_to_end, run_with_arrivals, tokens_of

from octavo.kernels.attention.step import StepInputs
from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest
from octavo.runtime.startup import load_engine
from octavo.runtime.worker.replays import StepReplays

GEMMA4 = ("gemma4_text", "gemma4_text-small")
FAMILIES = [
    "mistral",
    "qwen2",
    "gemma2",
    "gemma3_text",
    "granite",
    "smollm3",
    "olmo2",
    "gemma3n_text",
    *GEMMA4,
]
VOCAB = 96


def requests_of(rng: random.Random, count: int, max_tokens: int) -> list[AddRequest]:
    lengths = [rng.randrange(1, 12) for _ in range(count)]
    prompts = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]
    return [make_request(f"r{i}", prompt, max_tokens=max_tokens, logprobs=2) for i, prompt in enumerate(prompts)]


def answers(engine: Engine, seed: int) -> dict[str, list[tuple[object, ...]]]:
    """Tokens and logprobs of requests that come and go, so that steps have one sequence to all."""
    rng = random.Random(seed)
    outputs = run_with_arrivals(engine, requests_of(rng, 6, 40), rng)
    return {name: [(output.token_ids, output.logprobs) for output in told] for name, told in outputs.items()}


def load(directory: Path, **settings: Any) -> Engine:
    config = EngineConfig(model=str(directory), block_size=4, max_num_seqs=4, kv_cache_memory_bytes=1 << 20, **settings)
    return load_engine(config, time.time())[0]


def check(directory: Path, **settings: Any) -> None:
    replaying, eager = load(directory, **settings), load(directory, enforce_eager=True, **settings)
    assert eager.worker.replays is None
    assert replaying.worker.replays is not None
    marks: list[int] = []
    replaying.worker.watch(lambda: marks.append(1))
    for seed in (1, 2):
        assert answers(replaying, seed) == answers(eager, seed)
    assert {size.tokens for size in replaying.worker.replays.proven} >= {1, 2, 4}
    assert len(marks) % replaying.worker.model.num_layers == 0
    assert marks


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_layers(family: str, dtype: str, tmp_path: Path) -> None:
    """Logprobs too, to the bit."""
    name, overrides = CASES[family]
    sizes = {"head_dim": 32} | ({"global_head_dim": 64} if family in GEMMA4 else {})
    check(save(make_hf(name, overrides | sizes), tmp_path / family), dtype=dtype)


@pytest.mark.parametrize("family", ["granitemoehybrid-dense", "falcon_h1", "nemotron_h", "mamba2", "lfm2"])
def test_answers_of_hybrids_are_those_of_the_layers(family: str, tmp_path: Path) -> None:
    """With states, which a recorded step goes on with where they are; without experts."""
    name, overrides = CASES[family]
    kinds = ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"]
    dense = {"head_dim": 32, "layers_block_type": kinds} if family == "nemotron_h" else {}
    check(save(make_hf(name, overrides | dense), tmp_path / family), dtype="bfloat16")


@pytest.mark.parametrize("name", ["tiny--llmc-w8a8", "tiny--llmc-fp8-kv", "tiny--llmc-w4a16-g32", "tiny-qwen2"])
def test_answers_of_quantized_models_are_those_of_the_layers(name: str, fixtures: Path) -> None:
    check(fixtures / name, kv_cache_dtype="fp8_e4m3")


@pytest.mark.parametrize("style", ["right", "mixed"])
@pytest.mark.parametrize("name", ["tiny--llmc-w8a8", "tiny--llmc-w4a16-g32", "tiny-qwen2"])
def test_drafts_are_checked_by_the_same_bits(name: str, style: Style, fixtures: Path) -> None:
    """Of one sequence and of several, whose drafts are as many as there are, or fewer in some."""
    settings = {"enable_prefix_caching": False}  # or the engine that says the texts computes prompts in other pieces
    replaying, eager = load(fixtures / name, **settings), load(fixtures / name, enforce_eager=True, **settings)
    assert replaying.worker.replays is not None
    for seed, count in ((1, 1), (2, 3), (3, 3), (4, 3)):
        asked = requests_of(random.Random(seed), count, 160)
        plain = run_to_end(eager, asked)
        texts = {it.request_id: it.token_ids + tokens_of(plain[it.request_id]) for it in asked}
        found = []
        for engine in (replaying, eager):
            engine.speculation = Guessing(texts, style, VOCAB).speculation(count + 2)
            outputs = run_to_end(engine, asked)
            found.append({key: [(it.token_ids, it.logprobs) for it in told] for key, told in outputs.items()})
            engine.speculation = None
        assert found[0] == found[1]
    proven = {size.tokens for size in replaying.worker.replays.proven if size.query_class > 1}
    assert proven >= {"right": {4, 18}, "mixed": {2, 3, 4}}[style]
    assert max(proven) > 4


@pytest.mark.parametrize("name", ["tiny--llmc-w8a8", "tiny-qwen2"])
def test_one_recording_takes_any_number_of_sequences(name: str, fixtures: Path) -> None:
    worker = load(fixtures / name).worker
    replays, model = worker.replays, worker.model
    assert replays is not None
    cached = [cache for pair in worker.caches for cache in (pair.key, pair.value)]
    divisions = [[4, 2, 2]] * 7 + [[3, 5], [8], [1, 1, 1, 1, 4], [2, 1, 5]]
    rng = random.Random(0)
    with torch.inference_mode():
        for number, sizes in enumerate(divisions):
            lengths = [rng.randrange(16, 32) for _ in sizes]
            tokens = [rng.randrange(3, VOCAB) for _ in range(8)]
            step = StepInputs.prefill(lengths, 4, sizes=sizes, token_ids=tokens, logits_index=list(range(8)))
            before = [cache.clone() for cache in cached]
            found = replays.hidden(step).clone(), [cache.clone() for cache in cached]
            for cache, was in zip(cached, before, strict=True):
                cache.copy_(was)
            assert torch.equal(found[0], model.hidden(step, worker.caches))
            assert all(map(torch.equal, found[1], cached))
            assert len(replays.proven) == (number >= 5)


def test_mixtures_and_odd_heads_are_not_recorded(fixtures: Path, tmp_path: Path) -> None:
    assert load(fixtures / "tiny-moe").worker.replays is None
    assert load(save(make_hf(*CASES["qwen3"]), tmp_path / "24 elements a head")).worker.replays is None


class Reading:
    """A model that looks into its inputs, in a way that a recording can see or not."""

    adapters = None

    def __init__(self, look: Callable[[Tensor], int]) -> None:
        self._look = look

    def entering(self, step: StepInputs) -> Tensor:
        return step.token_ids.float()

    def hidden(self, step: StepInputs, _caches: object, _tap: object, entering: Tensor) -> Tensor:
        return entering * self._look(step.seq_lens)


@pytest.mark.parametrize(
    ("look", "warning"),
    [
        (lambda lengths: int(lengths[0]), "can't be recorded"),
        (lambda lengths: lengths.tolist()[0], "differs from the layers' own"),
    ],
)
def test_what_depends_on_a_value_is_not_replayed(
    look: Callable[[Tensor], int], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = load_cache()
    model: Any = Reading(look)
    replays = StepReplays(model, cache, 64, 4)
    settled = []
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        for length in range(16, 31):
            step = StepInputs.decode([length, 5], 4, token_ids=[length, 7])
            assert replays.hidden(step).tolist() == [length * length, 7 * length]
            settled.append(replays.is_settled)
    assert settled == sorted(settled), "of no use for an estimate before it is decided how such steps are computed"
    assert 4 <= settled.count(False) <= 6
    assert caplog.text.count(warning) == 1
    assert not replays.proven


def test_a_size_that_made_room_for_others_is_recorded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.runtime.worker import replays as module

    monkeypatch.setattr(module, "MOST_REPLAYS", 1)
    model: Any = Reading(lambda _: 3)
    replays = StepReplays(model, load_cache(), 64, 4)
    with torch.inference_mode():
        for count in (1, 2, 1):
            for token in range(10):
                step = StepInputs.decode([20] * count, 4, token_ids=[token] * count)
                assert replays.hidden(step).tolist() == [3 * token] * count
            assert [size.tokens for size in replays.proven] == [count]


def load_cache() -> list[Any]:
    from octavo.kernels.attention.cache import LayerCache

    return [LayerCache(torch.zeros(8, 1, 4, 1), torch.zeros(8, 1, 4, 1), torch.ones(1), torch.ones(1))]
