"""Starting an engine in this process: limits that fit the cache, the report, and the decoder under the scheduler."""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path

import pytest
import torch
from slow_cases import slow
from toy_model import ToyModel, make_request, run_to_end, run_with_arrivals, tokens_of

from octavo.flags import parse_size
from octavo.kernels.attention.cache import LayerCache
from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, TokenOutput
from octavo.runtime.parallel.order import make_order
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.startup import (
    COUNTS,
    check_limits,
    check_machine,
    choose_max_model_len,
    load_engine,
    warm_up,
)
from octavo.runtime.worker import kv_cache
from octavo.runtime.worker.device import choose_device
from octavo.runtime.worker.worker import Worker


def config(**settings: object) -> EngineConfig:
    return EngineConfig(**({"model": "unused", "dtype": "float32", "num_threads": 1} | settings))


def test_the_models_own_length_when_the_cache_holds_it() -> None:
    notes: list[str] = []
    assert choose_max_model_len(config(), 512, 4096, notes) == 512
    assert choose_max_model_len(config(max_model_len=100), 512, 4096, notes) == 100
    assert not notes


def test_a_small_cache_shortens_what_nobody_asked_for() -> None:
    notes: list[str] = []
    assert choose_max_model_len(config(), 512, 160, notes) == 160
    assert notes == ["max_model_len is 160, not the model's 512: the KV cache holds no more"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (513, "--max-model-len 513: the model has 512 positions; 160 works"),
        (161, "--max-model-len 161: the KV cache holds 160 tokens; --max-model-len 160 works"),
    ],
)
def test_a_length_that_can_not_be_is_refused_with_one_that_can(wanted: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_max_model_len(config(max_model_len=wanted), 512, 160, [])


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_positive(name: str) -> None:
    check_limits(config(**{name: 1}))
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} 0: must be 1 at least"):
        check_limits(config(**{name: 0}))


def test_a_context_holds_a_prompt_and_an_answer() -> None:
    check_limits(config(max_model_len=2))
    with pytest.raises(ValueError, match="--max-model-len 1: a prompt and an answer take 2 tokens at least; 2 or more"):
        check_limits(config(max_model_len=1))


GB = 10**9


@pytest.mark.parametrize(
    ("settings", "fits", "message"),
    [
        ({"kv_cache_memory_bytes": 100 * GB}, {"kv_cache_memory_bytes": 19 * GB}, "--kv-cache-memory-bytes"),
        ({"num_threads": 100_000}, {"num_threads": os.cpu_count()}, "--num-threads"),
        ({"max_num_seqs": GB}, {"max_num_seqs": 256}, "--max-num-seqs"),
    ],
)
def test_sizes_that_the_machine_does_not_have(settings: dict[str, int], fits: dict[str, int], message: str) -> None:
    """What the error proposes works."""
    check_machine(config(**fits), 20 * GB)
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{message} {value}: .* works") as error:
        check_machine(config(**settings), 20 * GB)
    proposed = re.findall(rf"{message} (\w+) works", str(error.value))[0]
    check_machine(config(**{name: parse_size(proposed)}), 20 * GB)


def test_a_gpu_is_used_or_its_absence_told() -> None:
    if torch.cuda.is_available():
        assert choose_device("auto").type == choose_device("cuda").type == "cuda"
        return
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="device 'cuda': torch finds no NVIDIA GPU"):
        choose_device("cuda")


@pytest.fixture(scope="module")
def tiny(fixtures: Path) -> Engine:
    return load_engine(config(model=str(fixtures / "tiny"), num_blocks=64), time.time())[0]


def with_limits(engine: Engine, **limits: object) -> Engine:
    """Another engine over the same model and a cache of its own."""
    settings = SchedulerConfig(**({"block_size": 16, "max_model_len": 160} | limits))
    model = engine.worker.model
    caches = kv_cache.allocate(model, settings.num_blocks, settings.block_size, torch.float32)
    return Engine(Worker(model, caches, settings), settings)


def random_requests(rng: random.Random) -> list[AddRequest]:
    """Prompts that share beginnings; 85 tokens with their answers at most."""
    stem = [rng.randrange(1024) for _ in range(60)]
    return [
        make_request(f"r{i}", [*stem[: rng.randrange(1, 40)], rng.randrange(1024)], max_tokens=rng.randrange(1, 46))
        for i in range(8)
    ]


def tight_engine(tiny: Engine, rng: random.Random) -> Engine:
    """With room for the longest request and some more."""
    block_size = rng.choice([4, 8, 16, 32])
    return with_limits(
        tiny,
        block_size=block_size,
        num_blocks=-(-85 // block_size) + rng.randrange(48 // block_size + 1),
        max_num_seqs=rng.randrange(2, 9),
        max_num_batched_tokens=rng.choice([1, 8, 20, 200]),
        enable_prefix_caching=rng.random() < 0.8,
    )


@pytest.mark.parametrize("seed", [*range(20), *map(slow, range(20, 200))])
def test_greedy_tokens_of_the_decoder_do_not_depend_on_the_schedule(tiny: Engine, seed: int) -> None:
    """Whatever else is in the batch, how prompts are cut, which blocks are shared, who is preempted or aborted.

    In float32, whose rounding would have to meet a near-tie of two logits to be seen.
    """
    rng = random.Random(seed)
    requests = random_requests(rng)
    roomy = with_limits(tiny, num_blocks=16, enable_prefix_caching=False)
    alone = {r.request_id: tokens_of(run_to_end(roomy, [r])[r.request_id]) for r in requests}
    tight = tight_engine(tiny, rng)
    together = run_with_arrivals(tight, requests, rng)
    assert {name: tokens_of(together[name]) for name in alone} == alone
    tight.scheduler.pool.check([])


@torch.inference_mode()
def run_in_turns(tiny: Engine, requests: list[AddRequest]) -> dict[str, list[TokenOutput]]:
    """What a loop brings that plans a step when the one before it is committed, without threads."""
    engine = with_limits(tiny, num_blocks=40)
    scheduler = engine.scheduler
    sampler = engine.executor.sampler
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        assert not engine.add(request)
    while scheduler.has_work:
        plan = scheduler.plan()
        order = make_order(plan, 0)
        assert order.token_ids.min() >= 0
        logits = engine.worker.forward(engine.worker.prepare(order))
        for output in scheduler.commit(plan, sampler.sample(logits, plan)):
            outputs[output.request_id].append(output)
    return outputs


@pytest.mark.parametrize("seed", [*range(12), *map(slow, range(12, 20))])
def test_results_that_come_a_step_late_change_no_answer(tiny: Engine, seed: int) -> None:
    """Greedy, drawn, under penalties and with log-probabilities: tokens, ends and numbers are the same."""
    rng = random.Random(seed)
    settings: list[dict[str, object]] = [
        {},
        {"temperature": 1.0, "seed": seed},
        {"temperature": 0.8, "top_p": 0.9, "seed": seed, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
        {"presence_penalty": 1.5, "min_tokens": 3, "logprobs": 2},
        {"temperature": 1.0, "seed": seed, "logit_bias": {5: 4.0}, "prompt_logprobs": 1},
        {"temperature": 2.0, "seed": seed, "allowed_token_ids": tuple(range(40)), "repetition_penalty": 2.0},
    ]
    requests = []
    for i, request in enumerate(random_requests(rng)):
        stops = tuple(rng.randrange(1024) for _ in range(60))
        params = {"max_tokens": request.params.max_tokens, "stop_token_ids": stops} | settings[i % len(settings)]
        requests.append(make_request(request.request_id, request.token_ids, **params))
    ahead = run_to_end(with_limits(tiny, num_blocks=40), requests)
    in_turns = run_in_turns(tiny, requests)
    for name, outputs in in_turns.items():
        assert tokens_of(ahead[name]) == tokens_of(outputs)
        assert [o.finish_reason for o in ahead[name]] == [o.finish_reason for o in outputs]
        entries = [entry for o in outputs for entry in [*(o.logprobs or []), *(o.prompt_logprobs or [])]]
        found = [entry for o in ahead[name] for entry in [*(o.logprobs or []), *(o.prompt_logprobs or [])]]
        for entry, truth in zip(found, entries, strict=True):
            assert (entry is None) == (truth is None)
            if entry is not None:
                assert (entry.token_id, entry.rank, entry.top_ids) == (truth.token_id, truth.rank, truth.top_ids)
                # a sequence that has stopped may be in one step more, and sums go by how many there are: float32
                assert entry.top_logprobs == pytest.approx(truth.top_logprobs, abs=8e-6)


def test_those_schedules_do_preempt_and_hit_the_prefix_cache(tiny: Engine) -> None:
    preemptions = hits = 0
    for seed in range(15):
        rng = random.Random(seed)
        requests, tight = random_requests(rng), tight_engine(tiny, rng)
        run_with_arrivals(tight, requests, rng)
        preemptions += tight.scheduler.stats().num_preemptions
        hits += tight.scheduler.stats().prefix_cache_hits
    assert preemptions > 5
    assert hits > 50


class _Overflowing(ToyModel):
    def forward(self, inputs, caches, *_):  # type: ignore[no-untyped-def]
        return super().forward(inputs, caches) * torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_model_without_finite_logits_does_not_start(dtype: torch.dtype) -> None:
    model = _Overflowing()
    model.dtype = dtype
    limits = SchedulerConfig(num_blocks=8, block_size=4, max_model_len=32)
    shape = (limits.num_blocks, 1, limits.block_size, 1)
    caches = [LayerCache(torch.zeros(shape), torch.zeros(shape), torch.ones(1), torch.ones(1))]
    with pytest.raises(ValueError, match=r"the model can't be run: .* not finite") as error:
        warm_up(model, caches, limits)
    assert ("--dtype bfloat16" in str(error.value)) == (dtype == torch.float16)


def test_a_prompt_of_one_token_and_one_as_long_as_the_context(tiny: Engine) -> None:
    engine = with_limits(tiny, num_blocks=10)
    requests: list[AddRequest] = [make_request("one", [5]), make_request("full", list(range(159)), max_tokens=99)]
    outputs = run_to_end(engine, requests)
    assert len(tokens_of(outputs["one"])) == 8
    assert (len(tokens_of(outputs["full"])), outputs["full"][-1].finish_reason) == (1, "length")
