"""An engine over two nodes: its driver here, the other one `octavo serve --headless` in a process of its own.

Over loopback; tests/server/test_machines.py has the same on two machines.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
from octavo_server import TINY, Server, forked, started, wait_until
from toy_model import make_request, run_to_end, run_with_arrivals, tokens_of

from octavo.runtime.config import EngineConfig
from octavo.runtime.messages import AddRequest
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.parallel.followers import Followers
from octavo.runtime.startup import load_engine

pytestmark = pytest.mark.long

SIZES = {
    "num_blocks": 12,
    "block_size": 8,
    "max_model_len": 90,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 20,
    "num_threads": 1,
}
FLAGS = ["--dtype", "float32", "-tp", "2", "--nnodes", "2"]
for name, number in SIZES.items():
    flag = "num-gpu-blocks-override" if name == "num_blocks" else name.replace("_", "-")
    FLAGS += [f"--{flag}", str(number)]


@contextmanager
def headless(config: EngineConfig, *flags: str, is_forked: bool = False) -> Iterator[Server]:
    """Node 1 of this engine."""
    parallel = config.parallel
    flags += ("--headless", "--node-rank", "1", "--master-port", str(parallel.master_port))
    flags += ("--distributed-timeout-seconds", str(parallel.distributed_timeout_seconds))
    with (forked if is_forked else started)(*FLAGS, *flags) as server:
        yield server


def alone(requests: list[AddRequest]) -> dict[str, list[int]]:
    """The tokens of an engine of one rank."""
    config = EngineConfig(model=str(TINY), dtype="float32", **SIZES)  # type: ignore[arg-type]
    engine, _ = load_engine(config, time.time())
    outputs = run_to_end(engine, requests)
    return {request.request_id: tokens_of(outputs[request.request_id]) for request in requests}


@pytest.fixture
def config() -> EngineConfig:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    parallel = ParallelConfig(tensor_parallel_size=2, nnodes=2, master_port=port, distributed_timeout_seconds=30.0)
    return EngineConfig(model=str(TINY), dtype="float32", parallel=parallel, **SIZES)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _unpinned() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


def follower_of(server: Server) -> int:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    (pid,) = map(int, children)
    return pid


def test_two_nodes_answer_as_one_machine_and_come_again(config: EngineConfig) -> None:
    """Over loopback, where no key is needed. The follower is killed, and the headless node joins the next engine."""
    rng = random.Random(1)
    stem = [rng.randrange(1024) for _ in range(40)]
    requests = [
        make_request(f"r{i}", [*stem[: 3 * i + 1], i], max_tokens=20, temperature=float(i % 2), seed=3)
        for i in range(8)
    ]
    with headless(config) as node:
        followers = Followers(config)
        engine, ready = load_engine(config, time.time(), followers=followers)
        assert "2 ranks on 2 machines" in ready.report.device
        assert ready.report.ranks[1].endswith("gloo")
        outputs = run_with_arrivals(engine, requests, rng)
        expected = alone(requests)
        assert {name: tokens_of(outputs[name]) for name in expected} == expected

        os.kill(follower_of(node), signal.SIGKILL)
        assert os.read(followers.ended, 1)
        with pytest.raises(RuntimeError, match=r"rank 1 of 2 ended \(killed by signal 9\) \(node 1\)") as raised:
            followers.check()
        with pytest.raises(RuntimeError, match=r"rank 1 of 2 ended \(killed by signal 9\)"):
            run_to_end(engine, [make_request("late", [5, 6, 7], max_tokens=80)])
        followers.close(str(raised.value))

        again = Followers(config)
        engine, _ = load_engine(config, time.time(), followers=again)
        outputs = run_to_end(engine, requests[:2])
        assert {name: tokens_of(outputs[name]) for name in ("r0", "r1")} == {n: expected[n] for n in ("r0", "r1")}
        again.close()
        assert node.exit_code() == 0, node.said
        assert "the server has ended" in node.said


def test_a_node_of_another_model_ends_both_sides_with_one_line(config: EngineConfig) -> None:
    with headless(config, "--max-num-seqs", "5", is_forked=True) as node:
        followers = Followers(config)
        text = r"doesn't mean the same as node 0: --max-num-seqs is 6 on node 0 and 5 on node 1"
        assert os.read(followers.ended, 1)
        with pytest.raises(RuntimeError, match=text):
            load_engine(config, time.time(), followers=followers)
        assert node.exit_code() == 1
        last = node.lines[-1]
        assert last.startswith("octavo serve: rank 1 of 2: node 1 (127.0.0.1) doesn't mean the same as node 0: ")
        followers.close("it could not start")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_node_that_is_told_to_end_says_so_at_once(config: EngineConfig, number: signal.Signals) -> None:
    """By whatever tells it: the driver is not to wait until it is missed."""
    with headless(config, is_forked=True) as node:
        followers = Followers(config)
        assert followers.join().size == 2
        node.send_signal(number)
        assert os.read(followers.ended, 1)
        with pytest.raises(RuntimeError, match="rank 1 of 2: node 1 was told to end"):
            followers.check()
        followers.close("its other node has ended")


@pytest.mark.slow  # two servers start
def test_nodes_outlive_a_server_that_is_killed_and_join_the_next_one(config: EngineConfig) -> None:
    parallel = msgspec.structs.replace(config.parallel, distributed_timeout_seconds=3.0)
    flags = [*FLAGS, "--master-port", str(parallel.master_port), "--distributed-timeout-seconds", "3"]
    body = {"prompt": [5, 6, 7], "max_tokens": 20, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answers = []
    with headless(msgspec.structs.replace(config, parallel=parallel)) as node:
        for number in (signal.SIGKILL, signal.SIGTERM):
            with started(*flags) as server:
                server.wait_until_ready()
                with server.client() as client:
                    answers.append(client.post("/v1/completions", json=body).json()["choices"][0]["token_ids"])
                server.send_signal(number)
                assert server.exit_code() == (0 if number == signal.SIGTERM else -signal.SIGKILL)
            wait_until(lambda: "its ranks are started again" in node.said)
        assert node.exit_code() == 0, node.said
    assert answers[0] == answers[1]
    assert len(answers[0]) == 20
