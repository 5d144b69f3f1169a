"""Servers on two machines: network namespaces joined by a cable, which is cut. What a machine says is octavo's own CLI.

The server listens on a Unix socket, which no namespace hides from the test. Skipped, with the reason, where the system
doesn't allow namespaces; tests/runtime/test_nodes.py has what loopback can show.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from machines import Machine, two_machines
from octavo_server import (
    PATIENCE,
    SMALL,
    Server,
    by_engine,
    num_in_flight,
    samples,
    serving,
    started,
    tokens_of,
    wait_until,
)

KEY = {"OCTAVO_CLUSTER_KEY": "a key that both machines have"}
OTHER_KEY = {"OCTAVO_CLUSTER_KEY": "a key that only one machine has"}
SECONDS = 5  # --distributed-timeout-seconds
PROMPT = list(range(5, 60))
NUM_TOKENS = 180


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    with two_machines() as found:
        yield found


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What a server of one machine answers."""
    with serving() as server, server.client() as client:
        return tokens_of(client, PROMPT, NUM_TOKENS)


@contextmanager
def client_of(path: Path) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(path))
    with httpx.Client(transport=transport, base_url="http://octavo", timeout=PATIENCE) as client:
        yield client


@contextmanager
def on(machine: Machine, *flags: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """`octavo serve` on a machine."""
    with started(*SMALL, *flags, environment=environment or KEY, prefix=machine.prefix) as server:
        yield server


@pytest.mark.slow  # 20 s; tests/runtime/test_nodes.py proves the same over loopback, but for the cable
def test_an_engine_over_two_machines_answers_and_ends_with_the_cable(
    machines: tuple[Machine, Machine], expected: list[int], tmp_path: Path
) -> None:
    first, second = machines
    flags = ["-tp", "2", "-n", "2", "--master-addr", first.host, "--distributed-timeout-seconds", str(SECONDS)]
    path = tmp_path / "server"
    with (
        on(first, *flags, "--uds", str(path), "--max-engine-restarts", "0") as server,
        on(second, *flags, "--headless", "-r", "1", environment=OTHER_KEY) as stranger,
    ):
        assert stranger.exit_code() == 1
        assert stranger.lines[-1] == (
            f"octavo serve: rank 1 of 2: {first.host}:29501 doesn't let this machine in: its OCTAVO_CLUSTER_KEY is "
            "another one, or only one of both has it\n"
        )
        with on(second, *flags, "--headless", "-r", "1") as node:
            server.wait_until_ready()
            with client_of(path) as client:
                assert tokens_of(client, PROMPT, NUM_TOKENS) == expected
            second.plug(is_in=False)
            begin = time.monotonic()
            assert server.exit_code() == 1
            seconds = time.monotonic() - begin
            assert f"rank 1 of 2 on node 1 ({second.host}) has not been heard of for {SECONDS} s" in server.said
            assert seconds < 6 * SECONDS, "bounded by the time-out"
            while "has not been heard of" not in node.said:
                time.sleep(0.05)
            assert node.process.poll() is None, "it waits for another engine"
            node.send_signal(signal.SIGTERM)
            assert node.exit_code() == 0, node.said
    second.plug(is_in=True)


def test_without_a_key_neither_side_starts(machines: tuple[Machine, Machine]) -> None:
    first, second = machines
    flags = ["-tp", "2", "-n", "2", "--master-addr", first.host]
    none: dict[str, Any] = {"environment": {"OCTAVO_CLUSTER_KEY": ""}}
    with on(first, *flags, **none) as server, on(second, *flags, "--headless", "-r", "1", **none) as node:
        for process in (server, node):
            assert process.exit_code() == 1
            said = f"octavo serve: {first.host}:29501: every address but loopback wants a key"
            assert process.lines[-1].startswith(said), process.said


def engines_up(client: httpx.Client) -> list[float]:
    return [up for _, up in sorted(by_engine(client, "octavo:engine_up").items())]


def engine_of(node: Server) -> int:
    """The process of the engine that a machine without a server runs."""
    tasks = Path(f"/proc/{node.process.pid}/task").glob("*/children")  # a thread has started it
    (pid,) = (int(pid) for children in tasks for pid in children.read_text().split())
    return pid


@pytest.mark.slow
def test_engines_of_two_machines_take_over_from_each_other(
    machines: tuple[Machine, Machine], expected: list[int], tmp_path: Path
) -> None:
    """The other machine's engine is killed, and then its cable is cut: no answer is, and it comes again both times.

    It takes half a minute, and runs with `pytest -m slow` before a release.
    """
    first, second = machines
    flags = ["-dp", "2", "-dpl", "1", "-dpa", first.host, "--distributed-timeout-seconds", str(SECONDS)]
    flags += ["--routing", "round-robin", "--max-engine-restarts", "9"]
    path = tmp_path / "server"
    with (
        on(first, *flags, "--uds", str(path), "--engine-timeout", "6") as server,
        on(second, *flags, "--headless", "-dpr", "1") as node,
        ThreadPoolExecutor(8) as pool,
        client_of(path) as client,
    ):
        server.wait_until_ready()

        def answers_over(harm: Callable[[], None]) -> list[list[int]]:
            streams = [pool.submit(tokens_of, client, PROMPT, NUM_TOKENS) for _ in range(8)]
            wait_until(lambda: num_in_flight(client) > 0)
            harm()
            return [one.result(PATIENCE) for one in streams]

        assert answers_over(lambda: None) == [expected] * 8
        assert answers_over(lambda: os.kill(engine_of(node), signal.SIGKILL)) == [expected] * 8
        assert f"engine 1 on {second.host} ended (killed by signal 9)" in server.said
        wait_until(lambda: engines_up(client) == [1, 1])
        assert answers_over(lambda: second.plug(is_in=False)) == [expected] * 8
        wait_until(lambda: engines_up(client) == [1, 0])
        assert samples(client)["octavo:requests_migrated_total", ()] > 0
        second.plug(is_in=True)
        wait_until(lambda: engines_up(client) == [1, 1])
        assert answers_over(lambda: None) == [expected] * 8
        server.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0, server.said
        assert node.exit_code() == 0, node.said
