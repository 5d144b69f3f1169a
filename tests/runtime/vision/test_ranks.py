"""Images in an engine of several ranks: the driver has the tower, and hands over what the others add zeros to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from asked_images import BLOCK, FIRST, SECOND, request_of, text_of
from forked_commands import fork_children
from slow_cases import slow
from tiny_vision import make_tiny_vision
from toy_model import run_to_end, tokens_of

from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.parallel.followers import Followers
from octavo.runtime.startup import load_engine

NUM_TOKENS = 6
CASES = {"first": [FIRST], "second": [SECOND], "both": [FIRST, SECOND], "swapped": [SECOND, FIRST], "none": []}
Start = Callable[..., tuple[Engine, Followers]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts an engine of two ranks, whose driver is this process and whose other is forked."""
    fork_children(monkeypatch)
    cores = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    started: list[Followers] = []

    def start_engine(directory: Path, chunk: int, **ranks: int) -> tuple[Engine, Followers]:
        config = EngineConfig(
            model=str(directory),
            dtype="float32",
            num_threads=1,
            num_blocks=200,
            block_size=BLOCK,
            max_model_len=200,
            max_num_batched_tokens=chunk,
            parallel=ParallelConfig(**ranks or {"tensor_parallel_size": 2}),
        )
        followers = Followers(config, "")
        started.append(followers)
        return load_engine(config, time.time(), followers=followers)[0], followers

    yield start_engine
    for followers in started:
        followers.close()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("kind", "chunk"),
    [
        ("qwen3_vl", 18),  # positions in three axes, and features behind earlier layers
        ("gemma3", 40),  # tokens that see those behind them
        *(slow(kind, 18) for kind in ("llava", "qwen2_5_vl", "smolvlm", "mistral3", "internvl", "llava_next")),
        *(slow(kind, 2048) for kind in ("paligemma", "llava", "qwen3_vl")),
        slow("qwen3_vl_moe", 18),
    ],
)
def test_two_ranks_answer_what_transformers_does(kind: str, chunk: int, start: Start, tmp_path: Path) -> None:
    """In chunks that cut images, beside each other and beside text; then out of the prefix cache."""
    tiny = make_tiny_vision(kind, tmp_path)
    sees_all = kind == "paligemma"
    cases = {name: pictures for name, pictures in CASES.items() if pictures or not sees_all}
    engine, _ = start(tmp_path, chunk)
    truth = {name: tiny.greedy(tiny.inputs(text_of(tiny, len(p)), p), NUM_TOKENS) for name, p in cases.items()}
    for again in (False, True):
        requests = [request_of(tiny, engine, pictures, name) for name, pictures in cases.items()]
        outputs = run_to_end(engine, requests)
        assert {name: tokens_of(outputs[name]) for name in cases} == truth
        if again and not sees_all:
            cached = [outputs[one.request_id][0].num_cached_tokens for one in requests]
            assert cached == [(len(one.token_ids) - 1) // BLOCK * BLOCK for one in requests]


def test_the_engine_ends_with_a_rank_that_has_no_tower(start: Start, tmp_path: Path) -> None:
    """While it waits for the embeddings of an image, among others."""
    tiny = make_tiny_vision("llava", tmp_path)
    engine, followers = start(tmp_path, 18)
    engine.add(request_of(tiny, engine, [FIRST, SECOND], max_tokens=30))
    engine.step()
    followers.processes[0].send_signal(signal.SIGKILL)

    def run() -> None:
        while engine.has_work:
            engine.step()

    with pytest.raises(RuntimeError, match=r"rank 1 of 2 ended \(killed by signal 9\)"):
        run()


@pytest.mark.slow
def test_stages_read_text_alone(start: Start, tmp_path: Path) -> None:
    make_tiny_vision("llava", tmp_path)
    engine, _ = start(tmp_path, 18, pipeline_parallel_size=2)
    model = engine.worker.model
    assert model.tower is None
    assert "images are not read: -pp 2: the stage with the embedding has no tower; -tp works" in model.notes
