"""An engine of two ranks: the driver here or in the engine process, followers in others, orders in shared memory."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from forked_commands import fork_children
from guessing import Guessing
from hf_oracle import CASES, make_hf, save
from peft_oracle import PeftOracle
from toy_model import make_request, run_to_end, run_with_arrivals, tokens_of

import octavo
from octavo.quant.adapter_files import digest_of
from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.lora_config import LoraOptions
from octavo.runtime.messages import AddRequest, LoadAdapter, Ready, TokenOutput
from octavo.runtime.parallel.channel import NUM_SLOTS, ChannelEnds, DriverChannel, FollowerChannel
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.parallel.follower_process import share_of_cores
from octavo.runtime.parallel.followers import Followers, crowded
from octavo.runtime.progress import Progress
from octavo.runtime.startup import load_engine

pytestmark = pytest.mark.long

BLOCKS = 12


def config(model: Path, ranks: int = 2, stages: int = 1, **settings: object) -> EngineConfig:
    """ranks: of each stage."""
    return EngineConfig(
        **(
            {
                "model": str(model),
                "dtype": "float32",
                "num_threads": 1,
                "num_blocks": BLOCKS,
                "block_size": 8,
                "max_model_len": 90,
                "max_num_seqs": 6,
                "max_num_batched_tokens": 20,
                "parallel": ParallelConfig(tensor_parallel_size=ranks, pipeline_parallel_size=stages),
            }
            | settings
        )
    )


Start = Callable[..., tuple[Engine, Ready, Followers]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts an engine whose driver is this process, which it doesn't leave pinned or with another thread count.

    Its followers are forked; test_nodes.py has one that is a new interpreter.
    """
    fork_children(monkeypatch)
    cores = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    started: list[Followers] = []

    def start_engine(settings: EngineConfig, heartbeat: str = "") -> tuple[Engine, Ready, Followers]:
        followers = Followers(settings, heartbeat)
        started.append(followers)
        engine, ready = load_engine(settings, time.time(), followers=followers)
        return engine, ready, followers

    yield start_engine
    for followers in started:
        followers.close()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


def random_requests(rng: random.Random) -> list[AddRequest]:
    """Prompts that share beginnings, greedy and drawn, some with log-probabilities of the prompt."""
    stem = [rng.randrange(1024) for _ in range(60)]
    settings: list[dict[str, object]] = [{}, {"temperature": 1.0, "seed": 3}, {"prompt_logprobs": 1}]
    return [
        make_request(
            f"r{i}",
            [*stem[: rng.randrange(1, 40)], rng.randrange(1024)],
            max_tokens=rng.randrange(1, 46),
            stop_token_ids=tuple(rng.randrange(1024) for _ in range(20)),
            **settings[i % 3],
        )
        for i in range(12)
    ]


@pytest.mark.parametrize(
    ("ranks", "stages"), [(2, 1), *(pytest.param(ranks, 2, marks=pytest.mark.slow) for ranks in (1, 2))]
)
def test_every_rank_has_the_adapters_of_a_step(ranks: int, stages: int, start: Start, tmp_path: Path) -> None:
    """Three over two slots, of which two are kept in memory; answers are PEFT's."""
    base = make_hf(*CASES["qwen2"])
    oracles = [PeftOracle(base, tmp_path / str(seed), seed=seed, r=2 + seed) for seed in range(3)]
    lora = LoraOptions(enable_lora=True, max_loras=2)
    engine, _, _ = start(
        config(save(base, tmp_path / "base"), ranks, stages, lora=lora, num_blocks=40, max_model_len=60)
    )
    told = {}
    messages = [LoadAdapter(digest_of(one.directory), str(one.directory), "x") for one in oracles]
    for message in messages:
        assert engine.load_adapter(message) is None
    while len(told) < 3:
        told |= {answer.digest: answer.error for answer in engine.take_adapters()[0]}
        time.sleep(0.001)
    assert not any(told.values())
    prompt = [5, 6, 7]
    requests = [
        msgspec.structs.replace(make_request(str(i), prompt, max_tokens=5), adapter=messages[i % 3].digest)
        for i in range(9)
    ]
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        assert not engine.add(request)
    while engine.scheduler.waiting or engine.has_work:
        assert not engine.take_adapters()[1]
        for output in engine.step():
            outputs[output.request_id].append(output)
    for i in range(9):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(oracles[i % 3].logits(ids)[-1].argmax()))
        assert tokens_of(outputs[str(i)]) == ids[3:]


@pytest.mark.parametrize(("ranks", "stages"), [(2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_several_ranks_answer_as_one(ranks: int, stages: int, fixtures: Path, start: Start) -> None:
    """With chunks, preemptions, shared prefixes and aborts: a rank with other blocks would read another's tokens."""
    engine, ready, _ = start(config(fixtures / "tiny", ranks, stages))
    rng = random.Random(1)
    requests = random_requests(rng)
    together = run_with_arrivals(engine, requests, rng)
    one, alone_ready = load_engine(config(fixtures / "tiny", ranks=1), time.time())
    alone = run_to_end(one, requests)
    expected = {r.request_id: tokens_of(alone[r.request_id]) for r in requests}
    assert {r.request_id: tokens_of(together[r.request_id]) for r in requests} == expected
    texts = {r.request_id: r.token_ids + expected[r.request_id] for r in requests}
    engine.speculation = Guessing(texts, "mixed", 1024).speculation(4)
    speculated = run_with_arrivals(engine, requests, rng)
    assert {r.request_id: tokens_of(speculated[r.request_id]) for r in requests} == expected
    assert sum(engine.scheduler.stats().accepted_per_pos) > 50
    assert engine.worker.replays is not None
    assert engine.worker.replays.proven
    stats = engine.scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0
    size = ranks * stages
    assert [line.partition(":")[0] for line in ready.report.ranks] == [f"rank {rank} of {size}" for rank in range(size)]
    assert (ready.num_blocks, ready.max_model_len) == (alone_ready.num_blocks, alone_ready.max_model_len)
    assert ready.report.kv_cache_bytes == alone_ready.report.kv_cache_bytes
    assert alone_ready.report.ranks == []


def test_ranks_with_whole_experts_answer_as_one(fixtures: Path, start: Start) -> None:
    """Followers are told of the flag, and their experts' outputs are in the sum: greedy answers, prompts in chunks."""
    requests = [make_request(f"r{i}", [7 * i + j for j in range(9 * i + 1)], max_tokens=12) for i in range(4)]
    dealt = ParallelConfig(tensor_parallel_size=2, enable_expert_parallel=True)
    engine, ready, _ = start(config(fixtures / "tiny-moe", parallel=dealt))
    together = run_to_end(engine, requests)
    one, _ = load_engine(config(fixtures / "tiny-moe", ranks=1), time.time())
    alone = run_to_end(one, requests)
    assert [tokens_of(together[r.request_id]) for r in requests] == [tokens_of(alone[r.request_id]) for r in requests]
    assert [line.partition(" experts ")[2].partition(",")[0] for line in ready.report.ranks] == ["0-2", "2-4"]


def test_stages_of_a_model_with_windows_have_measured_scales_and_all_that_a_request_may_want(
    tmp_path: Path, start: Start
) -> None:
    """Groups of layers that lie in several stages, a cache in int8, penalties, drawn tokens and log-probabilities.

    Meanwhile the other stage tells how far it is; the driver, which `serve` would tell to, does not.
    """
    model = save(make_hf(*CASES["gemma3_text"]), tmp_path)
    settings: dict[str, object] = {"kv_cache_dtype": "int8", "num_blocks": 60, "max_model_len": 60}
    wanted: list[dict[str, object]] = [
        {"logprobs": 3},
        {"prompt_logprobs": 2},
        {"temperature": 2.0, "seed": 5, "presence_penalty": 0.5},
        {"logit_bias": {5: 3.0}, "logprobs": 1},
        {},
    ]
    prompts = [[(i * j + 7) % 90 + 3 for j in range(10 + 6 * i)] for i in range(1, 6)]
    requests = [
        make_request(f"r{i}", prompt, max_tokens=14, **params)
        for i, (prompt, params) in enumerate(zip(prompts, wanted, strict=True))
    ]
    progress = Progress(str(tmp_path / "progress"))
    progress.work()
    engine, ready, _ = start(config(model, 1, 2, **settings), f"ipc://{tmp_path}/heartbeat")
    before = progress.count
    divided = run_to_end(engine, requests)
    assert before is not None
    assert (progress.count or 0) >= before + 14 * 2
    one, alone_ready = load_engine(config(model, 1, **settings), time.time())
    alone = run_to_end(one, requests)
    assert len(engine.scheduler.config.windows) > 1
    assert [note for note in ready.report.notes if "measured" in note] == [
        note for note in alone_ready.report.notes if "measured" in note
    ]
    for request in requests:
        ours, theirs = divided[request.request_id], alone[request.request_id]
        assert tokens_of(ours) == tokens_of(theirs)
        assert listed(ours) == pytest.approx(listed(theirs), abs=1e-3)


def listed(outputs: list[TokenOutput]) -> list[float]:
    """All log-probabilities, of the answer and of the prompt."""
    entries = [entry for output in outputs for entry in (*(output.logprobs or ()), *(output.prompt_logprobs or ()))]
    return [value for entry in entries if entry is not None for value in (entry.logprob, *entry.top_logprobs)]


def test_the_engine_ends_with_a_follower(fixtures: Path, start: Start) -> None:
    """Whether its steps are replayed or not: they are, after some."""
    engine, _, followers = start(config(fixtures / "tiny"))
    assert engine.worker.replays is not None
    engine.add(make_request("a", [5] * 33, max_tokens=30))
    while not engine.worker.replays.proven:
        assert engine.has_work
        engine.step()
    followers.processes[0].send_signal(signal.SIGKILL)

    def run() -> None:
        while engine.has_work:  # steps that were under way may still bring tokens
            engine.step()

    with pytest.raises(RuntimeError, match=r"rank 1 of 2 ended \(killed by signal 9\)"):
        run()


@pytest.mark.usefixtures("start")
def test_a_follower_that_can_not_load_says_why(tmp_path: Path, fixtures: Path) -> None:
    """Its directory lacks what the driver's has, as on another machine."""
    followers = Followers(config(tmp_path))
    with pytest.raises(RuntimeError, match=r"rank 1 of 2: .*config.json"):
        load_engine(config(fixtures / "tiny"), time.time(), followers=followers)
    followers.close()


def test_ranks_divide_the_memory_of_a_cache_and_end_with_the_driver(fixtures: Path, start: Start) -> None:
    """As many blocks as one rank has of the same memory: each rank holds half of each. Shared memory has no name."""
    settings = {"num_blocks": None, "kv_cache_memory_bytes": 200_000}
    _, ready, followers = start(config(fixtures / "tiny", **settings))
    _, alone = load_engine(config(fixtures / "tiny", ranks=1, **settings), time.time())
    assert ready.num_blocks == alone.num_blocks > 0
    assert not [name for name in os.listdir("/dev/shm") if "octavo" in name]
    (process,) = followers.processes
    assert process.stdin is not None
    process.stdin.close()  # as the system does when the driver is gone
    assert process.wait() == 0


CHILD = (
    "from octavo.runtime.parallel.lifeline import be_killed_with_parent; import os, time\n"
    "be_killed_with_parent(); print(os.getpid(), flush=True); time.sleep(600)"
)
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-P', '-c', sys.argv[1]])"


def test_a_follower_that_is_stopped_ends_with_its_driver_too() -> None:
    """It can't read that its stdin has ended."""
    environment = os.environ | {"PYTHONPATH": str(Path(octavo.__file__).parent.parent)}
    command = [sys.executable, "-P", "-c", PARENT, CHILD]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, signal.SIGSTOP)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 60  # not a measurement: the system ends it in its own time
        while is_there(child):
            assert time.monotonic() < deadline, "it outlives its driver"


def is_there(pid: int) -> bool:
    """Whether a process runs or is stopped."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ranks_share_the_cores() -> None:
    assert [share_of_cores([0, 1, 2, 3, 6], rank, 2) for rank in range(2)] == [[0, 1], [2, 3, 6]]
    assert share_of_cores([0, 1], 2, 3) == []
    assert crowded(2, 2) == []
    assert crowded(3, 2)[0].startswith("3 ranks take turns on 2 cores")


def test_a_ring_of_orders_is_read_in_order_however_far_behind_a_reader_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without eventfd, which Python on macOS does not have."""
    for name in ("eventfd", "eventfd_read", "eventfd_write"):
        monkeypatch.delattr(os, name, raising=False)
    channel = DriverChannel(2)
    channel.open(50)
    received: list[list[int]] = [[], []]

    def read(ends: ChannelEnds, place: int) -> None:
        reader = FollowerChannel(ends, 50)
        for _ in range(200):
            order = reader.receive()
            assert order is not None
            received[place] += order.tolist()

    threads = [threading.Thread(target=read, args=(ends, place)) for place, ends in enumerate(channel.ends)]
    threads[0].start()
    for number in range(NUM_SLOTS):
        channel.send(np.arange(number % 50, dtype=np.int32))
    threads[1].start()  # NUM_SLOTS orders behind
    for number in range(NUM_SLOTS, 200):
        channel.send(np.arange(number % 50, dtype=np.int32))
    for thread in threads:
        thread.join()
    expected = [token for number in range(200) for token in range(number % 50)]
    assert received == [expected, expected]
    channel.close()


def test_a_driver_that_waits_is_woken_by_a_failure() -> None:
    channel = DriverChannel(1)
    channel.open(4)
    for _ in range(NUM_SLOTS):
        channel.send(np.zeros(4, np.int32))
    timer = threading.Timer(0.05, channel.fail, ("rank 1 is gone",))
    timer.start()
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        channel.send(np.zeros(4, np.int32))  # the ring is full
    timer.join()
    channel.close()


@pytest.mark.parametrize("message", [None, "rank 1 is gone"])
def test_a_closed_channel_waits_for_nothing(message: str | None) -> None:
    """Its descriptors' numbers may be those of other files by then, from which a step under way would read."""
    channel = DriverChannel(1)
    channel.open(4)
    if message is not None:
        channel.fail(message)
    channel.close()
    with pytest.raises(RuntimeError, match=message or "is closed"):
        channel.send(np.zeros(4, np.int32))
