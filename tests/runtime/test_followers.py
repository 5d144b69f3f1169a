"""Two ranks with the same weights: the driver here, a follower in another process, orders through shared memory."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_model import make_request, run_to_end, run_with_arrivals, tokens_of

from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest
from octavo.runtime.model.weights import load_model
from octavo.runtime.parallel.channel import NUM_SLOTS, ChannelEnds, DriverChannel, FollowerChannel
from octavo.runtime.parallel.followers import Followers
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.worker import kv_cache
from octavo.runtime.worker.worker import Worker

LIMITS = SchedulerConfig(
    num_blocks=14, block_size=8, max_model_len=90, max_num_seqs=6, max_num_batched_tokens=20, max_prompt_logits=5
)


def config(model: Path, **settings: object) -> EngineConfig:
    """Sums are cut by the number of threads, so a follower has as many as this process."""
    threads = torch.get_num_threads()
    return EngineConfig(
        **({"model": str(model), "dtype": "float32", "num_threads": threads, "block_size": 8} | settings)
    )


def make_worker(settings: EngineConfig) -> Worker:
    with torch.inference_mode():
        model = load_model(settings)
        caches, _ = kv_cache.create(model, settings, notes=[])
        return Worker(model, caches, LIMITS)


Start = Callable[[EngineConfig, EngineConfig], tuple[Engine, Followers]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts an engine of two ranks, each by its own config; the second ends with the test."""
    started: list[Followers] = []

    def start_both(own: EngineConfig, others: EngineConfig) -> tuple[Engine, Followers]:
        worker = make_worker(own)
        followers = Followers(others, LIMITS, 1, worker.model.vocab_size, compares=True)
        started.append(followers)
        followers.wait()
        return Engine(worker, LIMITS, followers=followers), followers

    yield start_both
    for followers in started:
        followers.close()


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


@pytest.mark.parametrize("name", ["tiny", "tiny--llmc-w4a16-g32"])
def test_ranks_that_take_the_same_orders_hold_the_same_logits(fixtures: Path, start: Start, name: str) -> None:
    """Bit for bit, in each step: the driver compares. With chunks, preemptions, shared prefixes and aborts."""
    settings = config(fixtures / name, num_blocks=LIMITS.num_blocks)
    engine, _ = start(settings, settings)
    rng = random.Random(1)
    requests = random_requests(rng)
    together = run_with_arrivals(engine, requests, rng)
    alone = run_to_end(Engine(make_worker(settings), LIMITS), requests)
    assert {r.request_id: tokens_of(together[r.request_id]) for r in requests} == {
        r.request_id: tokens_of(alone[r.request_id]) for r in requests
    }
    stats = engine.scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0


def test_a_rank_that_computes_something_else_is_found(fixtures: Path, start: Start) -> None:
    own = config(fixtures / "tiny", num_blocks=LIMITS.num_blocks)
    engine, _ = start(own, config(fixtures / "tiny", num_blocks=LIMITS.num_blocks, dtype="int8"))
    engine.add(make_request("a", [5, 6, 7]))
    with pytest.raises(RuntimeError, match="rank 1 computed other logits than rank 0 in step 0"):
        engine.step()


def test_the_engine_ends_with_a_follower(fixtures: Path, start: Start) -> None:
    settings = config(fixtures / "tiny", num_blocks=LIMITS.num_blocks)
    engine, followers = start(settings, settings)
    engine.add(make_request("a", [5, 6, 7], max_tokens=80))
    engine.step()
    followers.processes[0].send_signal(signal.SIGKILL)

    def run() -> None:
        while engine.has_work:  # steps that were under way may still bring tokens
            engine.step()

    with pytest.raises(RuntimeError, match=r"rank 1 of 2 ended \(killed by signal 9\)"):
        run()


def test_a_follower_that_can_not_load_is_told(tmp_path: Path) -> None:
    followers = Followers(config(tmp_path), LIMITS, 1, 1024, compares=False)
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 ended \(exit code 1\)"):
        followers.wait()
    followers.close()


def test_a_follower_ends_with_the_driver_and_shared_memory_has_no_name(fixtures: Path, start: Start) -> None:
    settings = config(fixtures / "tiny", num_blocks=LIMITS.num_blocks)
    _, followers = start(settings, settings)
    assert not [name for name in os.listdir("/dev/shm") if "octavo" in name]
    (process,) = followers.processes
    assert process.stdin is not None
    process.stdin.close()  # as the system does when the driver is gone
    assert process.wait() == 0


def test_a_ring_of_orders_is_read_in_order_however_far_behind_a_reader_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without eventfd, which Python on macOS does not have."""
    for name in ("eventfd", "eventfd_read", "eventfd_write"):
        monkeypatch.delattr(os, name, raising=False)
    channel = DriverChannel(2, order_numbers=50, answer_numbers=12)
    received: list[list[int]] = [[], []]

    def read(ends: ChannelEnds) -> None:
        reader = FollowerChannel(ends, 2)
        for number in range(200):
            order = reader.receive()
            received[ends.place] += order.tolist()
            if number % 7 == 0:
                reader.answer(np.full((3, 4), number + ends.place, np.float32))

    threads = [threading.Thread(target=read, args=(ends,)) for ends in channel.ends]
    threads[0].start()
    for number in range(NUM_SLOTS):
        channel.send(np.arange(number % 50, dtype=np.int32))
    threads[1].start()  # NUM_SLOTS orders behind
    assert channel.receive(0).tolist() == [[0.0] * 4] * 3
    for number in range(NUM_SLOTS, 200):
        channel.send(np.arange(number % 50, dtype=np.int32))
    for thread in threads:
        thread.join()
    expected = [token for number in range(200) for token in range(number % 50)]
    assert received == [expected, expected]
    assert channel.receive(1).tolist() == [[197.0] * 4] * 3
    channel.close()


def test_a_driver_that_waits_is_woken_by_a_failure() -> None:
    channel = DriverChannel(1, order_numbers=4, answer_numbers=0)
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
    channel = DriverChannel(1, order_numbers=4, answer_numbers=4)
    if message is not None:
        channel.fail(message)
    channel.close()
    with pytest.raises(RuntimeError, match=message or "is closed"):
        channel.send(np.zeros(4, np.int32))
    with pytest.raises(RuntimeError, match=message or "is closed"):
        channel.receive(0)
