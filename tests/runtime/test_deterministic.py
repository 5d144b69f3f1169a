"""--deterministic: an answer's tokens and log-probabilities have the bits of the same request by itself.

Alone means: nothing else in the engine, the prompt in one step, no cached prefix, every step computed by the layers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from guessing import Guessing
from slow_cases import slow
from toy_model import make_request, run_to_end, run_with_arrivals, tokens_of
from trimmed import whole

from octavo.kernels.native import cpu_features
from octavo.quant.checkpoint import read_config
from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, TokenOutput
from octavo.runtime.model.deterministic import choose_ops
from octavo.runtime.model.device import Device
from octavo.runtime.model.operators import REFERENCE
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.spec import DecoderSpec
from octavo.runtime.model.weights import load_model
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.speculation.speculation import Speculation
from octavo.runtime.startup import load_engine
from octavo.runtime.worker.worker import Worker

pytestmark = pytest.mark.skipif(not cpu_features.has_dot_products(), reason="needs AVX-512 BF16 and VNNI")
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("tiny", {"dtype": "bfloat16"}),
    "W8A8": ("tiny--llmc-w8a8", {}),
    "W4A16": ("tiny--llmc-w4a16-g32", {}),
    "FP8": ("tiny--llmc-fp8-dynamic", {}),
    "float32": ("tiny", {"dtype": "float32"}),
    "float16": ("tiny", {"dtype": "float16"}),
    "W8A8 in float32": ("tiny--llmc-w8a8", {"dtype": "float32"}),
    "FP8 with its cache": ("tiny--llmc-fp8-kv", {"kv_cache_dtype": "fp8_e4m3"}),
    "bf16 with an int8 cache and head": ("tiny", {"kv_cache_dtype": "int8", "lm_head_dtype": "int8"}),
    "bf16 with int4 rows": ("tiny", {"kv_cache_dtype": "int4_per_token_head"}),
    "act-order": ("tiny--gptqmodel-w4g32-act", {}),
    "biases": ("tiny-qwen2", {}),
    "blocks of FP8": ("tiny-qwen2--llmc-fp8-block", {}),
}
USUAL = {"num_blocks": 1024, "block_size": 4, "max_model_len": 256, "max_num_seqs": 64, "max_num_batched_tokens": 2048}
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"logprobs": 3, "prompt_logprobs": 2},
    "drawn": {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 7, "logprobs": 1},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {5: 1.5}, "logprobs": 0},
    "many": {"temperature": 0.7, "min_p": 0.01, "seed": 3, "logprobs": 80, "logprob_token_ids": (4, 90)},
}
Way = Callable[..., dict[str, list[TokenOutput]]]
VOCAB = 96  # tokens that prompts are made of, which all models here have


def requests(rng: random.Random) -> list[AddRequest]:
    """One of each kind, with prompts over a chunk of attention's keys and under, of which two begin alike."""
    stem = [rng.randrange(3, VOCAB) for _ in range(140)]
    prompts = [stem[:134], [*stem[:90], 5, 9], [rng.randrange(3, VOCAB) for _ in range(23)], [77]]
    return [
        make_request(name, prompt, max_tokens=6 if len(prompt) > 50 else 30, **params)
        for (name, params), prompt in zip(PARAMS.items(), prompts, strict=True)
    ]


def company(rng: random.Random, count: int) -> list[AddRequest]:
    """Requests that come beside them; some ask for more log-probabilities than a kernel keeps."""
    return [
        make_request(
            f"beside {i}",
            [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 60))],
            max_tokens=rng.randrange(1, 16),
            logprobs=rng.choice([None, 0, 2, 70]),
        )
        for i in range(count)
    ]


def answer_of(outputs: list[TokenOutput]) -> tuple[Any, ...]:
    """Tokens, their log-probabilities, and those of the prompt."""
    assert outputs[-1].error is None
    logprobs = [entry for output in outputs for entry in output.logprobs or []]
    return tokens_of(outputs), logprobs, outputs[0].prompt_logprobs


class Served:
    """A model, and engines of any limits on it."""

    def __init__(self, model: Path, *, deterministic: bool = True, **settings: Any) -> None:
        config = EngineConfig(model=str(model), deterministic=deterministic, **USUAL, **settings)
        self.engine, self.ready = load_engine(config, time.time())
        self._deterministic = deterministic
        self._windows: dict[str, Any] = {"windows": self.engine.scheduler.config.windows}

    def new(self, speculation: Speculation | None = None, **limits: Any) -> Engine:
        config = SchedulerConfig(**(USUAL | self._windows | {"enable_prefix_caching": False} | limits))
        assert config.num_blocks <= USUAL["num_blocks"]  # which the caches have
        worker = Worker(self.engine.worker.model, self.engine.worker.caches, config)
        return Engine(worker, config, overlaps=False, deterministic=self._deterministic, speculation=speculation)

    def alone(self, wanted: list[AddRequest]) -> dict[str, tuple[Any, ...]]:
        return {it.request_id: answer_of(run_to_end(self.new(), [it])[it.request_id]) for it in wanted}


def speculated(served: Served, wanted: list[AddRequest], rng: random.Random) -> dict[str, list[TokenOutput]]:
    """In company, in chunks of 50, with drafts that are right as far as chance has it."""
    texts = {it.request_id: it.token_ids + tokens_of(run_to_end(served.new(), [it])[it.request_id]) for it in wanted}
    guessing = Guessing(texts, "mixed", VOCAB)
    engine = served.new(guessing.speculation(7), max_num_batched_tokens=50, enable_prefix_caching=True)
    found = run_with_arrivals(engine, [*company(rng, 5), *wanted], rng)
    assert sum(engine.scheduler.stats().accepted_per_pos) > 20
    return found


def answers(outputs: dict[str, list[TokenOutput]]) -> dict[str, tuple[Any, ...]]:
    return {name: answer_of(outputs[name]) for name in PARAMS}


def preempted(served: Served, wanted: list[AddRequest], rng: random.Random) -> dict[str, list[TokenOutput]]:
    """In company, in chunks of 16, and computed again."""
    tight = served.new(num_blocks=44, max_model_len=160, max_num_batched_tokens=16, enable_prefix_caching=True)
    growing = [make_request(f"growing {i}", it.token_ids[:8], max_tokens=40) for i, it in enumerate(company(rng, 8))]
    found = run_to_end(tight, [*growing, *wanted])
    assert sum(found[name][-1].num_preemptions for name in PARAMS)
    return found


def from_the_prefix_cache(served: Served, wanted: list[AddRequest], rng: random.Random) -> dict[str, list[TokenOutput]]:
    """In company, in chunks of 50, after the same requests."""
    caching = served.new(max_num_batched_tokens=50, enable_prefix_caching=True)
    run_to_end(caching, [msgspec.structs.replace(it, request_id=f"before {it.request_id}") for it in wanted])
    found = run_with_arrivals(caching, [*company(rng, 5), *wanted], rng)
    assert found["drawn"][0].num_cached_tokens
    return found


@pytest.mark.parametrize("name", ["bf16", "W8A8", slow("W4A16"), slow("FP8"), "float32"])
def test_an_answer_has_the_bits_that_it_has_alone(name: str, fixtures: Path) -> None:
    rng = random.Random(1)
    model, settings = FORMATS[name]
    served = Served(fixtures / model, **settings)
    wanted = requests(rng)
    expected = served.alone(wanted)
    assert answers(preempted(served, wanted, rng)) == expected
    assert answers(from_the_prefix_cache(served, wanted, rng)) == expected
    assert answers(taken_over(served, wanted, rng)) == expected
    assert answers(speculated(served, wanted, rng)) == expected
    assert served.ready.report.deterministic


def in_a_batch(size: int) -> Way:
    def run(served: Served, wanted: list[AddRequest], rng: random.Random) -> dict[str, list[TokenOutput]]:
        if size <= len(wanted):
            return {
                it.request_id: run_to_end(served.new(), [*company(rng, size - 1), it])[it.request_id] for it in wanted
            }
        everybody = [*wanted, *company(rng, size - len(wanted))]
        return run_to_end(served.new(), rng.sample(everybody, size))

    return run


def in_chunks(size: int) -> Way:
    def run(served: Served, wanted: list[AddRequest], rng: random.Random) -> dict[str, list[TokenOutput]]:
        return run_with_arrivals(served.new(max_num_batched_tokens=size), [*wanted, *company(rng, 5)], rng)

    return run


def by_recordings(served: Served, wanted: list[AddRequest], rng: random.Random) -> dict[str, list[TokenOutput]]:
    """Steps that are replayed once they have been recorded."""
    others = [make_request(f"before {i}", [i + 3] * 8, max_tokens=30) for i in range(3)]
    run_to_end(served.engine, others)
    found = run_with_arrivals(served.engine, wanted, rng)
    assert served.engine.worker.replays is not None
    assert served.engine.worker.replays.proven
    return found


def taken_over(served: Served, wanted: list[AddRequest], rng: random.Random) -> dict[str, list[TokenOutput]]:
    """Begun in a batch, and gone on with by another engine from the tokens that have come."""
    begun = {name: outputs[:3] for name, outputs in run_to_end(served.new(), wanted).items()}
    rest = [
        msgspec.structs.replace(
            it, token_ids=[*it.token_ids, *tokens_of(begun[it.request_id])], num_prompt=len(it.token_ids)
        )
        for it in wanted
    ]
    found = run_with_arrivals(served.new(max_num_batched_tokens=50), [*company(rng, 3), *rest], rng)
    return {name: begun[name] + found[name] for name in begun}


WAYS: dict[str, Way] = {
    **{f"in a batch of {size}": in_a_batch(size) for size in (2, 3, 4, 8, 17, 64)},
    **{f"in chunks of {size}": in_chunks(size) for size in (1, 16, 50, 100)},
    "preempted": preempted,
    "from the prefix cache": from_the_prefix_cache,
    "taken over": taken_over,
    "speculated": speculated,
    "by recordings": by_recordings,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_has_these_bits_in_every_way(name: str, fixtures: Path, tmp_path: Path) -> None:
    """The crossing of formats and ways, each over several prompts."""
    model, settings = FORMATS[name]
    cross(Served(whole(fixtures / model, tmp_path), **settings), WAYS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "olmo2", "gemma4_text-small"])
def test_so_has_one_of_each_family(family: str, dtype: str, tmp_path: Path) -> None:
    """With windows, soft caps and norms of queries. Windows give blocks back, so that nothing has to be preempted."""
    from hf_oracle import CASES, make_hf, save  # transformers, which takes seconds

    name, overrides = CASES[family]
    sizes = {"head_dim": 32, "max_position_embeddings": 256}
    sizes |= {"global_head_dim": 64} if family.startswith("gemma4") else {}
    served = Served(save(make_hf(name, overrides | sizes), tmp_path / family), dtype=dtype)
    cross(served, {way: run for way, run in WAYS.items() if way != "preempted"})


def cross(served: Served, ways: dict[str, Way]) -> None:
    for seed in range(3):
        wanted = requests(random.Random(seed))
        expected = served.alone(wanted)
        for way, run in ways.items():
            assert answers(run(served, wanted, random.Random(seed))) == expected, way


@pytest.mark.parametrize("name", ["bf16", slow("W8A8"), slow("float32")])
def test_without_the_mode_an_answer_depends_on_its_company(name: str, fixtures: Path) -> None:
    """Else the tests above would prove nothing."""
    rng = random.Random(1)
    model, settings = FORMATS[name]
    served = Served(fixtures / model, deterministic=False, **settings)
    wanted = requests(rng)
    assert answers(in_chunks(16)(served, wanted, rng)) != served.alone(wanted)
    assert not served.ready.report.deterministic


def test_what_is_not_batch_invariant_is_refused_by_name(fixtures: Path) -> None:
    spec = DecoderSpec.from_hf(read_config(fixtures / "tiny"))
    moe = DecoderSpec.from_hf(read_config(fixtures / "tiny-moe"))
    cpu = Device.choose("cpu")
    gpu = Device(torch.device("cuda"), 90, lambda _: REFERENCE)
    narrow = tuple(replace(layer, mixer=replace(layer.mixer, head_dim=24)) for layer in spec.layers)
    config = EngineConfig(model="", deterministic=True)
    for device, refused, is_divided, why in (
        (gpu, spec, False, "no kernel of a GPU of compute capability 9.0 is known to be batch-invariant; --device cpu"),
        (cpu, spec, True, "sums over the ranks of an engine are not known to be"),
        (cpu, moe, False, "the router of .* is not batch-invariant"),
        (cpu, replace(spec, layers=narrow), False, "heads of 24 elements have no batch-invariant attention"),
    ):
        with pytest.raises(LoadError, match=f"--deterministic: {why}"):
            choose_ops(config, refused, device, torch.bfloat16, is_divided=is_divided)


def test_transformers_own_code_is_refused(fixtures: Path) -> None:
    config = EngineConfig(model=str(fixtures / "tiny"), model_impl="hf", device="cpu", deterministic=True)
    with pytest.raises(LoadError, match="--deterministic: transformers' own code is not batch-invariant"):
        load_model(config)


def test_an_old_processor_is_refused(fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_features, "has_dot_products", lambda: False)
    config = EngineConfig(model=str(fixtures / "tiny"), device="cpu", deterministic=True)
    with pytest.raises(LoadError, match="--deterministic: this processor has no AVX-512 with BF16 and VNNI"):
        load_model(config)
