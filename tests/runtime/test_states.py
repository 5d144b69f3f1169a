"""States of sequences: who has which row, snapshots that others begin with, and models with the gated delta rule."""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hf_oracle import CASES, make_hf, save
from slow_cases import slow
from toy_model import (
    make_request,
    preemptions_and_hits,
    random_requests,
    run_to_end,
    run_with_arrivals,
    tokens_of,
)
from toy_states import greedy_of_state, make_stateful_engine

from octavo.kernels.native import cpu_features
from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, TokenOutput
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.weights import load_model
from octavo.runtime.parallel.group import Group
from octavo.runtime.scheduling.plan import StepPlan, StepResult
from octavo.runtime.scheduling.snapshots import Snapshots
from octavo.runtime.speculation.config import SpeculativeConfig
from octavo.runtime.startup import load_engine
from octavo.runtime.worker.worker import Worker

FAMILIES = ("qwen3_next", "qwen3_5_text")
PROMPT = [3 + (5 * i * i + i) % 90 for i in range(45)]


def random_engine(rng: random.Random) -> Engine:
    block_size = rng.choice([1, 2, 4, 16])
    return make_stateful_engine(
        block_size=block_size,
        max_model_len=64,
        num_blocks=-(-64 // block_size) + rng.randrange(24 // block_size + 1),
        max_num_seqs=rng.randrange(1, 10),
        max_num_batched_tokens=rng.choice([1, 3, 8, 64, 256]),
        enable_prefix_caching=rng.random() < 0.8,
        num_snapshots=rng.choice([0, 1, 3, 40]),
        snapshot_tokens=rng.choice([1, 8, 512]),
        overlaps=rng.random() < 0.5,
    )


@pytest.mark.parametrize("seed", [*range(40), *map(slow, range(40, 200))])
def test_tokens_do_not_depend_on_the_schedule(seed: int) -> None:
    rng = random.Random(seed)
    requests = random_requests(rng, 12)
    engine = random_engine(rng)
    outputs = run_with_arrivals(engine, requests, rng)
    for request in requests:
        assert tokens_of(outputs[request.request_id]) == greedy_of_state(request)
    engine.scheduler.pool.check([])


def test_the_random_schedules_do_preempt_and_begin_with_snapshots() -> None:
    preemptions, hits = preemptions_and_hits(random_engine, range(12))
    assert preemptions > 5
    assert hits > 50


@pytest.mark.parametrize("seed", range(6))
def test_a_step_that_brings_no_token_is_computed_anew(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is past the position by then."""
    rng = random.Random(seed)
    engine = make_stateful_engine(num_snapshots=4, overlaps=bool(seed % 2))
    commit = engine.scheduler.commit
    lost = 0

    def losing(plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        nonlocal lost
        for place, tokens in enumerate(result.tokens):
            if tokens and rng.random() < 0.3:
                result.tokens[place] = []
                lost += 1
        return commit(plan, result)

    monkeypatch.setattr(engine.scheduler, "commit", losing)
    requests = random_requests(rng, 6)
    outputs = run_to_end(engine, requests)
    assert lost > 3
    for request in requests:
        assert tokens_of(outputs[request.request_id]) == greedy_of_state(request)


def test_answers_to_one_prompt_compute_it_once() -> None:
    engine = make_stateful_engine(num_snapshots=4)
    prompt = list(range(3, 33))
    outputs = run_to_end(engine, [make_request(f"r{i}", prompt) for i in range(5)])
    assert sorted(it[0].num_cached_tokens or 0 for it in outputs.values()) == [0, 28, 28, 28, 28]


def test_a_shared_beginning_is_found_where_there_is_a_snapshot() -> None:
    engine = make_stateful_engine(num_snapshots=4, snapshot_tokens=8)
    shared = list(range(3, 23))
    run_to_end(engine, [make_request("first", [*shared, 50, 51, 52, 53, 54])])
    outputs = run_to_end(engine, [make_request("second", [*shared, 55, 56])])
    assert outputs["second"][0].num_cached_tokens == 16
    engine.scheduler.reset_prefix_cache()
    outputs = run_to_end(engine, [make_request("third", [*shared, 55, 56])])
    assert outputs["third"][0].num_cached_tokens == 0


def test_of_more_states_in_a_step_than_rows_the_last_are_kept() -> None:
    engine = make_stateful_engine(num_snapshots=2, snapshot_tokens=4, max_num_batched_tokens=64)
    prompt = list(range(3, 33))
    for expected in (0, 28):
        outputs = run_to_end(engine, [make_request("r", prompt)])
        assert outputs["r"][0].num_cached_tokens == expected


def test_a_row_that_a_step_reads_is_not_given_away_in_it() -> None:
    snapshots = Snapshots(10, 2)
    assert [snapshots.make(name) for name in (b"a", b"b", b"c")] == [10, 11, None]
    assert not snapshots.has(b"a")  # until the step has been computed
    snapshots.begin_step()
    assert snapshots.use(b"a") == 10
    assert [snapshots.make(name) for name in (b"c", b"d")] == [11, None]
    snapshots.forget(b"a")
    snapshots.forget(b"c")
    assert snapshots.make(b"d") is None
    snapshots.begin_step()
    assert {snapshots.make(b"d"), snapshots.make(b"e")} == {10, 11}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("states")
    return {name: save(make_hf(*CASES[name]), directory / name) for name in FAMILIES}


def load(model: Path, **settings: Any) -> Engine:
    usual = {"num_blocks": 200, "block_size": 4, "max_model_len": 64, "num_threads": 1, "max_num_seqs": 8}
    config = EngineConfig(model=str(model), **({"dtype": "float32"} | usual | settings))
    return load_engine(config, time.time())[0]


def answer(outputs: list[TokenOutput]) -> tuple[Any, ...]:
    return tokens_of(outputs), [entry for it in outputs for entry in it.logprobs or []]


def requests_of(rng: random.Random, count: int) -> list[AddRequest]:
    return [
        make_request(f"r{i}", [*PROMPT[: rng.randrange(4, 45)], *(rng.randrange(3, 96) for _ in range(3))], logprobs=2)
        for i in range(count)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_each_request_alone(name: str, models: dict[str, Path]) -> None:
    """In chunks, from snapshots, preempted and in company: tokens, and log-probabilities but for rounding."""
    engine = load(models[name])
    worker = engine.worker
    config = dataclasses.replace(engine.scheduler.config, enable_prefix_caching=False)
    requests = requests_of(random.Random(0), 10)
    alone = {}
    for request in requests:
        alone |= run_to_end(Engine(Worker(worker.model, worker.caches, config), config, overlaps=False), [request])
    tight = dataclasses.replace(
        engine.scheduler.config, num_blocks=24, max_num_batched_tokens=13, snapshot_tokens=8, num_snapshots=5
    )
    crowded = Engine(Worker(worker.model, worker.caches, tight), tight, overlaps=False)
    found = run_to_end(crowded, requests)
    stats = crowded.scheduler.stats()
    assert stats.num_preemptions
    assert stats.prefix_cache_hits
    for request in requests:
        tokens, listed = answer(found[request.request_id])
        expected, logprobs = answer(alone[request.request_id])
        assert tokens == expected
        differences = [abs(a.logprob - b.logprob) for a, b in zip(listed, logprobs, strict=True)]
        assert max(differences) < 1e-4


@pytest.mark.skipif(not cpu_features.has_dot_products(), reason="needs AVX-512 BF16 and VNNI")
def test_deterministic_answers_have_the_bits_of_each_request_alone(models: dict[str, Path]) -> None:
    engine = load(models["qwen3_5_text"], deterministic=True, dtype="bfloat16")
    worker = engine.worker
    requests = requests_of(random.Random(1), 8)
    alone = {}
    config = dataclasses.replace(engine.scheduler.config, enable_prefix_caching=False)
    for request in requests:
        single = Engine(Worker(worker.model, worker.caches, config), config, overlaps=False, deterministic=True)
        alone |= run_to_end(single, [request])
    tight = dataclasses.replace(config, max_num_batched_tokens=9, enable_prefix_caching=True, snapshot_tokens=8)
    crowded = Engine(Worker(worker.model, worker.caches, tight), tight, overlaps=False, deterministic=True)
    found = run_to_end(crowded, requests)
    assert crowded.scheduler.stats().prefix_cache_hits
    assert {key: answer(it) for key, it in found.items()} == {key: answer(it) for key, it in alone.items()}


def test_decode_steps_are_recorded_and_have_the_same_bits(models: dict[str, Path]) -> None:
    requests = requests_of(random.Random(2), 3)
    model = models["qwen3_5_text"]
    replaying, eager = load(model), load(model, enforce_eager=True)
    for _ in range(3):
        found, expected = run_to_end(replaying, requests), run_to_end(eager, requests)
        assert {key: answer(it) for key, it in found.items()} == {key: answer(it) for key, it in expected.items()}
    assert replaying.worker.replays is not None
    assert replaying.worker.replays.proven


def test_prefixes_that_are_forgotten_have_no_snapshot(models: dict[str, Path]) -> None:
    engine = load(models["qwen3_5_text"])
    request = make_request("r", PROMPT)
    first, second = (run_to_end(engine, [request])["r"] for _ in range(2))
    assert second[0].num_cached_tokens == 44
    engine.scheduler.reset_prefix_cache()
    third = run_to_end(engine, [request])["r"]
    assert third[0].num_cached_tokens == 0
    assert tokens_of(first) == tokens_of(second) == tokens_of(third)


@pytest.mark.parametrize("cache", ["fp8_e4m3", "int4_per_token_head"])
def test_the_other_layers_may_have_a_quantized_cache(cache: str, models: dict[str, Path]) -> None:
    """States are float32 all the same, and layers of attention alone are measured."""
    plain, narrow = load(models["qwen3_5_text"]), load(models["qwen3_5_text"], kv_cache_dtype=cache)
    request = make_request("r", PROMPT, prompt_logprobs=0, max_tokens=1)
    found, expected = (run_to_end(engine, [request])["r"][0].prompt_logprobs for engine in (narrow, plain))
    assert found is not None
    assert expected is not None
    differences = [abs(a.logprob - b.logprob) for a, b in zip(found[1:], expected[1:], strict=True) if a and b]
    assert 0 < sum(differences) / len(differences) < 0.5


def test_memory_is_divided_among_slots_snapshots_and_blocks(models: dict[str, Path]) -> None:
    budget = 1 << 19
    config = EngineConfig(
        model=str(models["qwen3_next"]), dtype="float32", kv_cache_memory_bytes=budget, max_num_seqs=64, num_threads=1
    )
    engine, ready = load_engine(config, time.time())
    row = 2 * 4 * (3 * 160 + 4 * 24 * 16)  # two layers' convolutions, and states of four heads
    slots = budget // 2 // row
    assert engine.scheduler.config.max_num_seqs == slots
    assert engine.scheduler.config.num_snapshots == budget // 4 // row
    assert any(f"{slots} sequences run at once, not 64" in note for note in ready.report.notes)
    assert ready.report.kv_cache_bytes <= budget
    with pytest.raises(ValueError, match="the states of one sequence take"):
        load_engine(msgspec.structs.replace(config, kv_cache_memory_bytes=row), time.time())


class TwoRanks(Group):
    size = 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculative_config": SpeculativeConfig("ngram", 3)}, "--speculative-config: layers of .* have states"),
        ({"kv_offloading_path": "/tmp", "kv_offloading_size": 0.001}, "--kv-offloading-path: layers of .* have states"),
    ],
)
def test_what_states_are_not_served_with_is_refused_by_name(
    settings: dict[str, Any], message: str, models: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        load(models["qwen3_5_text"], **settings)


def test_states_are_not_divided_over_ranks(models: dict[str, Path]) -> None:
    with pytest.raises(LoadError, match="-tp 2: the gated delta rule, which qwen3_5_text has, is not divided"):
        load_model(EngineConfig(model=str(models["qwen3_5_text"])), group=TwoRanks())


def test_a_lost_tensor_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = models["qwen3_5_text"]
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.0.linear_attn.A_log"))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises((LoadError, ValueError), match=name):
        load_model(EngineConfig(model=str(tmp_path)))
