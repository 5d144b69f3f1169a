"""A real server whose engines are killed in the middle of their answers: no stream is cut, and none is changed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from octavo_server import PATIENCE, Server, by_engine, events, serving, serving_anew, value, wait_until

import octavo
from octavo.demo_models import fetch_model

pytestmark = pytest.mark.long

PATH = "/v1/completions"
NUM_STREAMS = 40
KEY = "secret"
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """With two engines, which are restarted as often as it takes."""
    with serving("-dp", "2", "--max-engine-restarts", "1000", "--api-key", KEY) as it:
        yield it


def body(number: int, **fields: Any) -> dict[str, Any]:
    """A request whose answer is always the same, and long enough to be caught in the middle of it."""
    asked = {"prompt": f"{number} and so on", "max_tokens": 150 + number, "ignore_eos": True, "temperature": 0}
    return asked | {"stream": True, "stream_options": {"include_usage": True}} | fields


async def answers(url: str, bodies: list[dict[str, Any]], on_begin: Callable[[int], None]) -> list[list[Any]]:
    """All events of each stream; on_begin is called with the number of streams whenever one has begun."""
    num_begun = 0

    async def one(client: httpx.AsyncClient, asked: dict[str, Any]) -> list[Any]:
        nonlocal num_begun
        lines = []
        async with client.stream("POST", PATH, json=asked) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if not lines:
                    num_begun += 1
                    on_begin(num_begun)
                lines.append(line)
        return list(events(lines))

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits, headers=HEADERS) as client:
        return await asyncio.gather(*(one(client, asked) for asked in bodies))


def undisturbed(server: Server, bodies: list[dict[str, Any]]) -> list[list[Any]]:
    return asyncio.run(answers(server.url, bodies, lambda _: None))


def num_up(client: httpx.Client, num_engines: int = 2) -> int:
    text = client.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("octavo:engine_up{")]
    assert len(lines) == num_engines
    return sum(line.endswith(" 1.0") for line in lines)


def test_engines_have_cores_and_series_of_their_own(server: Server) -> None:
    first, second = map(os.sched_getaffinity, server.engine_pids)
    assert first
    assert second
    assert not first & second
    assert first | second == os.sched_getaffinity(0)
    with server.client(headers=HEADERS) as client:
        ended = [client.post(PATH, json={"prompt": "x" * n, "max_tokens": 3, "ignore_eos": True}) for n in (5, 200)]
        counted = by_engine(client, "vllm:generation_tokens_total")
    assert sorted(counted) == ["0", "1"]
    assert sum(counted.values()) == sum(one.json()["usage"]["completion_tokens"] for one in ended) == 6


def test_a_beam_search_counts_for_the_engine_that_began_it() -> None:
    asked = {"prompt": "x", "max_tokens": 1, "use_beam_search": True, "n": 2, "temperature": 0}
    with serving("-dp", "2", "--routing", "round-robin") as it, it.client() as client:
        assert [client.post(PATH, json=asked).status_code for _ in range(2)] == [200, 200]
        counted = by_engine(client, "vllm:generation_tokens_total")
    assert counted == {"0": 2, "1": 2}


def test_forty_streams_survive_an_engine(server: Server) -> None:
    """It is killed when the 20th has begun. Usage, log-probabilities and the order of the events are as without it."""
    bodies = [body(number, logprobs=2 if number % 4 == 0 else None) for number in range(NUM_STREAMS)]
    bodies += [body(7, prompt=["one", "two"], n=2, max_tokens=90, temperature=1.0, seed=3)]
    wanted = undisturbed(server, bodies)
    killed: list[int] = []

    def kill(num_begun: int) -> None:
        if num_begun == 20:
            killed.append(server.engine_pids[-1])
            os.kill(killed[0], signal.SIGKILL)

    found = asyncio.run(answers(server.url, bodies, kill))
    with server.client() as client:
        wait_until(lambda: num_up(client) == 2)
        text = client.get("/metrics").text
    migrated = [line for line in text.splitlines() if line.startswith("octavo:requests_migrated_total{")]
    assert sum(float(line.split()[-1]) for line in migrated) > 0
    assert killed[0] not in server.engine_pids
    for mine, without in zip(found, wanted, strict=True):
        assert joined(mine) == joined(without)
    assert "Traceback" not in server.said


@pytest.mark.slow
def test_streams_survive_an_engine_that_is_stopped(server: Server) -> None:
    """It is noticed after --engine-timeout, by default, killed and replaced; /health is 200 by the other one.

    Half a minute. With engines without a model the same is proved in fleet/test_fleet.py.
    """
    bodies = [body(number) for number in range(8)]
    wanted = undisturbed(server, bodies)
    stopped: list[int] = []

    def stop(num_begun: int) -> None:
        if num_begun == len(bodies):
            stopped.append(server.engine_pids[0])
            os.kill(stopped[0], signal.SIGSTOP)

    begun = time.monotonic()
    found = asyncio.run(answers(server.url, bodies, stop))
    assert 15 < time.monotonic() - begun < 40, "30 s to notice it, and those that were left"
    with server.client() as client:
        assert client.get("/health").status_code == 200
        wait_until(lambda: num_up(client) == 2)
    assert stopped[0] not in server.engine_pids
    assert not Path(f"/proc/{stopped[0]}").exists()
    assert [joined(mine) for mine in found] == [joined(without) for without in wanted]


def joined(chunks: list[Any]) -> Any:
    """What a stream says: events of several choices come in any order between them."""
    usage = [chunk["usage"] | {"prompt_tokens_details": None} for chunk in chunks if chunk.get("usage")]
    assert len(usage) == 1
    by_choice: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            by_choice.setdefault(choice["index"], []).append(choice)
    whole = {
        index: (
            "".join(choice["text"] for choice in choices),
            [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["tokens"]],
            [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["text_offset"]],
            [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        )
        for index, choices in by_choice.items()
    }
    return usage, whole


def test_an_answer_that_is_not_streamed_survives_it_too(server: Server) -> None:
    asked = {"prompt": "x", "n": 8, "max_tokens": 300, "ignore_eos": True, "temperature": 0, "prompt_logprobs": 1}
    with server.client(headers=HEADERS) as client:
        wait_until(lambda: num_up(client) == 2)
        wanted = client.post(PATH, json=asked).json()

        async def ask() -> Any:
            async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, headers=HEADERS) as other:
                task = asyncio.create_task(other.post(PATH, json=asked))
                await asyncio.to_thread(wait_until, lambda: in_flight(client) == 8)
                for pid in server.engine_pids:  # one of both has it
                    os.kill(pid, signal.SIGKILL)
                return (await task).json()

        found = asyncio.run(ask())
    assert found["choices"] == wanted["choices"]
    assert found["usage"]["completion_tokens"] == 8 * 300


def test_an_engine_is_drained_by_who_has_a_key(server: Server) -> None:
    with server.client() as anybody, server.client(headers=HEADERS) as client:
        wait_until(lambda: num_up(anybody) == 2)
        before = set(server.engine_pids)
        assert anybody.post("/engines/1/drain").status_code == 401
        assert client.post("/engines/2/drain").json()["error"]["message"] == "there is no engine 2: they are 0 to 1"
        assert client.post("/engines/1/drain").json() == {"engine": 1, "status": "replaced"}
        assert len(before & set(server.engine_pids)) == 1
        assert num_up(anybody) == 2


def in_flight(client: httpx.Client) -> int:
    """Over both engines."""
    text = client.get("/metrics").text
    return sum(
        int(float(line.split()[-1])) for line in text.splitlines() if line.startswith("vllm:num_requests_running{")
    )


@pytest.mark.slow
def test_no_stream_of_a_real_model_is_cut_or_changed_in_200_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a release: some 40 minutes. A kill -9 at a random time under 40 streams, SmolLM2 in float32."""
    from benchmarks import fronts, takeover

    monkeypatch.setenv("PYTHONPATH", str(Path(octavo.__file__).parent.parent))
    found: list[takeover.Round] = []
    with fronts.cell(fetch_model("smollm2", Path("models")), ["--dtype", "float32"], {}) as front:
        asyncio.run(takeover.measure(front, "", takeover.Plan(rounds=200), found.append))
    assert sum(one.death is not None and not one.is_late for one in found) > 150
    assert all(set(one.outcomes) == {"whole"} for one in found)
    assert all(all(one.equal) for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["driver", "follower"])
def test_a_stopped_rank_is_noticed_within_thirty_seconds(who: str) -> None:
    """With the default of --engine-timeout: a minute each, in which a stream waits for the restart."""
    asked = body(3, max_tokens=400)
    with serving_anew("-tp", "2") as server, server.client() as client:
        (wanted,) = undisturbed(server, [asked])
        driver = server.engine_pid
        (follower,) = children_of(driver)
        times: list[float] = []

        def stop(_: int) -> None:
            os.kill(driver if who == "driver" else follower, signal.SIGSTOP)
            times.append(time.monotonic())
            wait_until(lambda: client.get("/health").status_code == 503 and not num_up(client, 1))
            times.append(time.monotonic())

        (found,) = asyncio.run(answers(server.url, [asked], stop))
        assert 15 < times[1] - times[0] < 30
        assert joined(found) == joined(wanted)
        assert not any(Path(f"/proc/{pid}").exists() for pid in (driver, follower))
        assert value(client, "octavo:engine_restarts_total") == 1
        assert f"rank {0 if who == 'driver' else 1} of 2 is frozen" in server.said or "the engine hangs" in server.said


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_only_engine_is_waited_for() -> None:
    asked = body(3, max_tokens=400)
    with serving() as server, server.client() as client:
        (wanted,) = undisturbed(server, [asked])
        healths: list[int] = []

        def kill(_: int) -> None:
            os.kill(server.engine_pid, signal.SIGKILL)
            wait_until(lambda: not num_up(client, 1))
            healths.append(client.get("/health").status_code)

        (found,) = asyncio.run(answers(server.url, [asked], kill))
        assert joined(found) == joined(wanted)
        assert healths == [503]
        assert client.get("/health").status_code == 200
        assert "--api-key" in client.post("/engines/0/drain").json()["error"]["message"]
        assert value(client, "octavo:engine_restarts_total") == 1
        assert value(client, "octavo:requests_migrated_total") == 1
        assert client.post(PATH, json={"prompt": "x", "max_tokens": 2}).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
