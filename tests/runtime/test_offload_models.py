"""Blocks of decoders' caches in a file: every type of cache, groups of layers, and what belongs to another model."""

from __future__ import annotations

import random
import select
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hf_oracle import CASES, make_hf, save
from toy_model import make_request, tokens_of

from octavo.kernels.native import cpu_features
from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, TokenOutput
from octavo.runtime.offload.select import check_offload
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.startup import load_engine

WINDOWED = "gemma3_text"
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("tiny", {}),
    "bf16, deterministic": ("tiny", {"deterministic": True}),
    "int8 cache": ("tiny", {"kv_cache_dtype": "int8"}),
    "int4 rows": ("tiny", {"kv_cache_dtype": "int4_per_token_head"}),
    "fp8 cache with the checkpoint's scales": ("tiny--llmc-fp8-kv", {}),
    "groups of layers": (WINDOWED, {"dtype": "float32"}),
}
PROMPT = [3 + (5 * i * i + i) % 90 for i in range(45)]
USUAL: dict[str, Any] = {"num_blocks": 400, "block_size": 4, "max_model_len": 64, "num_threads": 1}


@pytest.fixture
def models(fixtures: Path, tmp_path: Path) -> Any:
    def model(name: str) -> str:
        return str(save(make_hf(*CASES[name]), tmp_path / name) if name == WINDOWED else fixtures / name)

    return model


def load(model: str, directory: Path | None = None, **settings: Any) -> tuple[Engine, list[str]]:
    if directory is not None:
        settings |= {"kv_offloading_size": 0.01, "kv_offloading_path": str(directory)}
    engine, ready = load_engine(EngineConfig(model=model, **(USUAL | settings)), time.time())
    return engine, ready.report.notes


def run(engine: Engine, request: AddRequest) -> list[TokenOutput]:
    outputs = engine.add(request)
    while engine.has_work or engine.scheduler.waiting:
        if not engine.has_work:
            assert engine.offload is not None
            assert select.select([engine.offload.ready], [], [], 60)[0]
        engine.take_fetched()
        outputs += engine.step()
    assert outputs[-1].error is None
    return outputs


def answer_of(outputs: list[TokenOutput]) -> tuple[Any, ...]:
    """Tokens with their log-probabilities, to the bit, and how much was cached."""
    return tokens_of(outputs), [entry for it in outputs for entry in it.logprobs or []], outputs[0].num_cached_tokens


@pytest.mark.parametrize("name", CACHES)
def test_what_is_read_from_a_file_is_what_was_in_the_cache_to_the_bit(name: str, models: Any, tmp_path: Path) -> None:
    model, settings = CACHES[name]
    if settings.get("deterministic") and not cpu_features.has_dot_products():
        pytest.skip("needs AVX-512 BF16 and VNNI")
    request = make_request("r", PROMPT, max_tokens=12, logprobs=4)
    path = models(model)
    plain, _ = load(path, **settings)
    cold, warm = (answer_of(run(plain, request)) for _ in range(2))
    assert (cold[2], warm[2]) == (0, 44)
    if settings.get("deterministic"):
        assert warm[:2] == cold[:2]
    assert (len(plain.scheduler.config.windows) > 1) == (model == WINDOWED)
    before, notes = load(path, tmp_path / "kv", **settings)
    assert [answer_of(run(before, request)) for _ in range(2)] == [cold, warm]
    assert any("has 0 blocks" in note for note in notes)
    before.close()
    after, notes = load(path, tmp_path / "kv", **settings)
    assert not any("begun anew" in note or "has 0 blocks" in note for note in notes)
    outputs = run(after, request)
    assert answer_of(outputs) == warm
    assert outputs[0].num_fetched_tokens == 44
    after.close()


def test_windowed_layers_need_their_last_window_alone(models: Any, tmp_path: Path) -> None:
    """Of a layer with a window the file has all blocks, and what is read is what a running sequence would hold."""
    model = models(WINDOWED)
    engine, _ = load(model, tmp_path / "kv", dtype="float32")
    run(engine, make_request("r", PROMPT, max_tokens=1))
    engine.close()
    engine, _ = load(model, tmp_path / "kv", dtype="float32")
    engine.add(make_request("r", PROMPT, max_tokens=1))
    engine.advance()
    held = engine.scheduler.pool.num_blocks - engine.scheduler.pool.num_free
    assert 0 < held < 11 * len(engine.scheduler.config.windows)
    engine.scheduler.abort(["r"])
    engine.close()


@pytest.mark.parametrize("size", [0.0001, 0.01])
def test_random_requests_over_restarts_are_answered_as_without(size: float, models: Any, tmp_path: Path) -> None:
    """In float32, where the order in which sums are made changes no greedy token here."""
    model = models(WINDOWED)
    rng = random.Random(0)
    stem = [rng.randrange(3, 96) for _ in range(40)]
    requests = [
        make_request(f"r{i}", [*stem[: rng.randrange(1, 40)], rng.randrange(3, 96)], max_tokens=rng.randrange(5, 20))
        for i in range(8)
    ]
    plain, _ = load(model, dtype="float32")
    expected = [tokens_of(run(plain, request)) for request in requests]
    fetched = 0
    for _ in range(3):
        engine, _ = load(model, dtype="float32", kv_offloading_size=size, kv_offloading_path=str(tmp_path / "kv"))
        outputs = [run(engine, request) for request in requests]
        assert [tokens_of(it) for it in outputs] == expected
        fetched += sum(it[0].num_fetched_tokens for it in outputs)
        engine.close()
        assert sum(path.stat().st_size for path in (tmp_path / "kv").iterdir()) <= size * 2**30
    assert fetched > 0


@pytest.mark.parametrize(
    ("what", "settings"),
    [
        ("model", {}),
        ("dtype", {"dtype": "float32"}),
        ("KV cache", {"block_size": 8}),
        ("KV cache", {"kv_cache_dtype": "float32"}),
        ("length", {"max_model_len": 60}),
    ],
)
def test_blocks_of_anything_else_are_not_used(
    what: str, settings: dict[str, Any], fixtures: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(fixtures / "tiny", tmp_path / "model")
    request = make_request("r", PROMPT, max_tokens=2)
    engine, _ = load(str(model), tmp_path / "kv")
    run(engine, request)
    engine.close()
    if what == "model":
        weights = model / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-100] ^= 1
        weights.write_bytes(data)
    engine, notes = load(str(model), tmp_path / "kv", **settings)
    (note,) = [note for note in notes if "begun anew" in note]
    assert f"of another {what}" in note
    assert run(engine, request)[0].num_cached_tokens == 0
    engine.close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kv_offloading_size": None}, "--kv-offloading-size GIB says how large its files may be"),
        ({"kv_offloading_path": None}, "--kv-cache-memory-bytes makes it larger; with --kv-offloading-path DIR"),
        ({"parallel": ParallelConfig(tensor_parallel_size=2)}, "-dp N runs several engines"),
        ({"parallel": ParallelConfig(pipeline_parallel_size=2)}, "-dp N runs several engines"),
        ({"enable_prefix_caching": False}, "it is the prefix cache that is kept"),
        ({"device": "cuda"}, "on a GPU"),
        ({"kv_offloading_size": 1e9}, r"GiB free; --kv-offloading-size [0-9.]+ works"),
        ({"kv_offloading_path": "/dev/null/kv"}, "/dev/null is not a directory that can be written to"),
    ],
)
def test_what_can_t_be_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    usual = {"model": "m", "kv_offloading_size": 1.0, "kv_offloading_path": str(tmp_path / "new")}
    check_offload(EngineConfig(**usual))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=said):
        check_offload(EngineConfig(**(usual | settings)))
