"""A server of two engines of two ranks each: -dp and -tp together. One server for all of these tests."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from octavo_server import PATIENCE, Server, by_engine, events, serving, wait_until
from tiny_oracle import Oracle

PROMPTS = [f"{number} and so on" for number in range(8)]
MAX_TOKENS = 60


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Each engine gets every other request."""
    with serving("-dp", "2", "-tp", "2", "--routing", "round-robin") as it:
        yield it


@pytest.fixture(scope="module")
def wanted() -> list[str]:
    """What transformers, in one process, says to the prompts."""
    oracle = Oracle()
    return [oracle.text(oracle.greedy(oracle.ids(prompt), MAX_TOKENS)) for prompt in PROMPTS]


def ranks_of(driver: int) -> list[int]:
    """An engine's processes: its driver, and the follower that the driver has started."""
    (follower,) = Path(f"/proc/{driver}/task/{driver}/children").read_text().split()
    return [driver, int(follower)]


def texts(server: Server, on_begin: Callable[[int], None] = lambda _: None) -> list[str]:
    """All answers. on_begin is called with the number of streams that have begun, whenever one has."""

    async def answer(client: httpx.AsyncClient, prompt: str, begun: list[str]) -> str:
        asked = {"prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, "temperature": 0, "stream": True}
        lines: list[str] = []
        async with client.stream("POST", "/v1/completions", json=asked) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                lines.append(line)
                if len(lines) == 1:
                    begun.append(prompt)
                    on_begin(len(begun))
        return "".join(choice["text"] for chunk in events(lines) for choice in chunk["choices"])

    async def answers() -> list[str]:
        begun: list[str] = []
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
            return await asyncio.gather(*(answer(client, prompt, begun) for prompt in PROMPTS))

    return asyncio.run(answers())


def test_answers_are_those_of_one_process(server: Server, wanted: list[str]) -> None:
    assert len(set(wanted)) > 1
    assert texts(server) == wanted
    with server.client() as client:
        counted = by_engine(client, "vllm:generation_tokens_total")
    assert counted == dict.fromkeys("01", len(PROMPTS) // 2 * MAX_TOKENS)


def test_engines_share_no_core_and_say_when_their_ranks_do(server: Server) -> None:
    cores = [[os.sched_getaffinity(pid) for pid in ranks_of(driver)] for driver in server.engine_pids]
    assert not set.union(*cores[0]) & set.union(*cores[1])
    assert set.union(*cores[0], *cores[1]) == os.sched_getaffinity(0)
    crowded = any(len(set.union(*engine)) < 2 for engine in cores)
    assert ("2 ranks take turns on 1 core" in server.said) == crowded
    assert all(crowded or not driver & follower for driver, follower in cores)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_s_death_ends_its_engine_alone(server: Server, wanted: list[str], rank: int) -> None:
    """Its streams go on in the other engine, and its engine comes back with two new ranks.

    Two processes load on one core: 8 s. That a follower ends with its driver is proved in runtime/test_followers.py.
    """
    living, dying = map(ranks_of, server.engine_pids)

    def kill(num_begun: int) -> None:
        if num_begun == len(PROMPTS):
            os.kill(dying[rank], signal.SIGKILL)

    assert texts(server, kill) == wanted
    with server.client() as client:
        wait_until(lambda: by_engine(client, "octavo:engine_up") == {"0": 1, "1": 1})
        moved = by_engine(client, "octavo:requests_migrated_total")
        restarts = by_engine(client, "octavo:engine_restarts_total")
    assert moved["1"] > 0
    assert moved["0"] == restarts["0"] == 0
    still, back = map(ranks_of, server.engine_pids)
    assert still == living
    assert not set(back) & set(dying)
    assert not any(Path(f"/proc/{pid}").exists() for pid in dying)
    said = "rank 1 of 2 ended (killed by signal 9)" if rank else "the engine process ended (killed by signal 9)"
    assert f"engine 1: {said}" in server.said
    assert texts(server) == wanted
