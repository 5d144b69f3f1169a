"""Engines and ranks on the nodes of a Ray cluster, behind a real server: `make test-ray`.

Two nodes on this machine; a third one stands by for the one that is killed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from octavo_server import PATIENCE, SMALL, Server, by_engine, num_in_flight, started, tokens_of, wait_until

QUANTIZED = Path(__file__).parents[1] / "fixtures/tiny--llmc-w4a16-g32"
PROMPTS = [list(range(first, first + 40)) for first in range(5, 13)]
NUM_TOKENS = 180
BACK_SECONDS = 60.0  # from the death of a node until its engine answers again, with all that a slow machine adds
MARK = "OCTAVO_TEST_OF_RAY"  # in the environment of all processes of the cluster
ENGINE = b"octavo.runtime.process"
FOLLOWER = b"octavo.runtime.parallel.follower"
TP = ("-tp", "2", "--distributed-executor-backend", "ray")
DP = ("-dp", "2", "--data-parallel-backend", "ray")

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]  # Ray's own warnings are not ours to mend


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with a CPU each. This process starts what they consist of, and is no part of it."""
    variables = {"RAY_worker_register_timeout_seconds": "300", MARK: str(os.getpid())}  # a loaded machine is slow
    os.environ.update(variables)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()
        for name in variables:
            del os.environ[name]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What one process answers that has never heard of Ray."""
    with started(*SMALL, model=QUANTIZED) as server:
        server.wait_until_ready()
        with server.client() as client:
            return [tokens_of(client, prompt, NUM_TOKENS) for prompt in PROMPTS]


@contextmanager
def on(cluster: Any, *flags: str) -> Iterator[Server]:
    with started(*SMALL, *flags, model=QUANTIZED, environment={"RAY_ADDRESS": cluster.address}) as server:
        yield server


def processes(*programs: bytes) -> dict[int, int]:
    """Processes of this cluster that run one of these programs, each with the node that it is on: its raylet's pid."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            variables = (path / "environ").read_bytes().split(b"\0")
            is_ours = f"{MARK}={os.getpid()}".encode() in variables and not is_zombie(path)
            if is_ours and set(programs) & set(words):
                found[int(path.name)] = node_of(path)
        except OSError:  # it has ended
            continue
    return found


def are_on_two_nodes(found: dict[int, int]) -> bool:
    """Two processes, each on another node that lives."""
    return len(found) == len(set(found.values()) - {0}) == 2


def node_of(process: Path) -> int:
    """The raylet among the parents of a process; 0 where that is dead."""
    while process.name != "1":
        process = process.parent / status_of(process)["PPid"]
        if (process / "comm").read_text().strip() == "raylet":
            return int(process.name)
    return 0


def is_zombie(process: Path) -> bool:
    return status_of(process)["State"].startswith("Z")


def status_of(process: Path) -> dict[str, str]:
    lines = (process / "status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def engines_up(client: httpx.Client) -> float:
    return sum(by_engine(client, "octavo:engine_up").values())


@pytest.mark.parametrize("flags", [TP, DP], ids=["tp", "dp"])
def test_two_nodes_answer_as_one_process_and_a_killed_one_is_replaced(
    cluster: Any, expected: list[list[int]], flags: tuple[str, ...]
) -> None:
    num_engines = 2 if flags == DP else 1
    with on(cluster, *flags) as server, ThreadPoolExecutor(len(PROMPTS)) as pool:
        server.wait_until_ready()
        assert are_on_two_nodes(processes(ENGINE, FOLLOWER))
        assert len(processes(ENGINE)) == num_engines
        with server.client() as client:
            assert [tokens_of(client, prompt, NUM_TOKENS) for prompt in PROMPTS] == expected

            (second,) = cluster.worker_nodes
            cluster.add_node(num_cpus=1)
            answers = [pool.submit(tokens_of, client, prompt, NUM_TOKENS) for prompt in PROMPTS]
            wait_until(lambda: num_in_flight(client) > 0)
            killed = time.monotonic()
            cluster.remove_node(second, allow_graceful=False)
            assert [answer.result(PATIENCE) for answer in answers] == expected, "no answer is cut"
            wait_until(lambda: engines_up(client) == num_engines and are_on_two_nodes(processes(ENGINE, FOLLOWER)))
            seconds = time.monotonic() - killed
            print(f"back after {seconds:.1f} s")
            assert seconds < BACK_SECONDS
            assert [tokens_of(client, prompt, NUM_TOKENS) for prompt in PROMPTS] == expected
        server.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0, server.said
        wait_until(lambda: not processes(ENGINE, FOLLOWER))


def test_an_engine_that_finds_no_room_waits_for_a_node(cluster: Any, expected: list[list[int]]) -> None:
    with on(cluster, *TP) as server, ThreadPoolExecutor(1) as pool:
        server.wait_until_ready()
        (second,) = cluster.worker_nodes
        cluster.remove_node(second, allow_graceful=False)
        wait_until(lambda: "waiting for room for an engine of 2 ranks with 1 CPU for each rank" in server.said)
        with server.client() as client:
            answer = pool.submit(tokens_of, client, PROMPTS[0], NUM_TOKENS)
            cluster.add_node(num_cpus=1)
            assert answer.result(PATIENCE) == expected[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_a_server_is_the_end_of_its_ranks(cluster: Any, number: signal.Signals) -> None:
    """While it starts."""
    with on(cluster, *TP) as server:
        wait_until(lambda: len(processes(ENGINE, FOLLOWER)) == 2)
        server.send_signal(number)
        assert server.exit_code() == (-number if number == signal.SIGKILL else 0), server.said
        wait_until(lambda: not processes(ENGINE, FOLLOWER))


def test_an_engine_that_is_killed_comes_again(cluster: Any, expected: list[list[int]]) -> None:
    with on(cluster, *DP, "--max-engine-restarts", "1") as server:
        server.wait_until_ready()
        before = processes(ENGINE)
        os.kill(next(iter(before)), signal.SIGKILL)
        wait_until(lambda: len(processes(ENGINE)) == 2 and len(processes(ENGINE).keys() & before.keys()) == 1)
        with server.client() as client:
            wait_until(lambda: engines_up(client) == 2)
            assert [tokens_of(client, prompt, NUM_TOKENS) for prompt in PROMPTS] == expected
        assert "ended (killed by signal 9)" in server.said


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (
            ("-dp", "3", "--data-parallel-backend", "ray"),
            "3 engines, each of 1 rank with 1 CPU for each rank, on one node",
        ),
        (
            ("-tp", "2", "--data-parallel-backend", "ray"),
            "an engine of 2 ranks with 1 CPU for each rank, on one node",
        ),
    ],
)
def test_where_there_is_no_room_it_is_said_what_is_there(cluster: Any, flags: tuple[str, ...], asked: str) -> None:
    with on(cluster, *flags, "--distributed-timeout-seconds", "3") as server:
        assert server.exit_code() == 1
        limit = "within 3 s (--distributed-timeout-seconds)"
        there = "the Ray cluster has 2 nodes with 1 CPU, and 2 CPU free"
        assert server.lines[-1].endswith(f"ray: no room {limit} for {asked}; {there}\n"), server.said


def test_another_version_of_ray_is_refused_with_both(cluster: Any) -> None:
    program = (
        "import ray; from octavo.runtime.parallel.ray_cluster import join_cluster\n"
        "ray.__version__ = '1.2.3'\n"
        "try: join_cluster()\n"
        "except ValueError as error: print(error)\n"
    )
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    assert re.fullmatch(r"ray \(.*\): .*Ray: 2\..*Ray: 1\.2\.3.*\n", done.stdout), done.stdout


def test_where_there_is_no_cluster_it_is_said_how_to_start_one() -> None:
    with started(*SMALL, *TP, model=QUANTIZED, environment={"RAY_ADDRESS": "127.0.0.1:1"}) as server:
        assert server.exit_code() == 1
        assert server.lines[-1].startswith("octavo serve: ray (--distributed-executor-backend"), server.said
        assert ":1: Connection refused; `ray start --head` starts a cluster" in server.lines[-1]
