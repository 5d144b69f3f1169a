"""octavo on a Ray cluster of two nodes on this machine, in an environment with the extra `ray`: `make test-ray`.

Ray can't be taken up and down often in one process, so one cluster serves all tests, and each deploys its application.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

TINY = Path(__file__).parents[1] / "fixtures/tiny"
QUANTIZED = Path(__file__).parents[1] / "fixtures/tiny--llmc-w4a16-g32"
PATIENCE = 600.0  # seconds; only so that a hang is a failure
SMALL = {"dtype": "float32", "num_gpu_blocks_override": "512", "block_size": "16"}

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]  # Ray's own warnings are not ours to mend


@dataclass
class Running:
    """A cluster of two nodes, with Serve's HTTP proxy on the first, and the second one."""

    cluster: Any
    second: Any
    url: str


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    # A loaded machine takes longer to start processes than Ray waits by default.
    for name in (
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S",
        "RAY_worker_register_timeout_seconds",
    ):
        os.environ[name] = "300"
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    second = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address)
    try:
        until(lambda: start_serve(port), "Serve has started")
        yield Running(cluster, second, f"http://127.0.0.1:{port}")
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def start_serve(port: int) -> bool:
    from ray import serve

    try:
        serve.start("HeadOnly", {"host": "127.0.0.1", "port": port})
    except TimeoutError:  # after 60 s; it goes on starting
        return False
    return True


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE:.0f} s: {what}"
        time.sleep(0.2)


@pytest.fixture
def deploy(running: Running) -> Iterator[Any]:
    from ray import serve

    from octavo.server.ray_serve import build

    def run(**arguments: Any) -> str:
        serve.run(build({"model": str(TINY), **SMALL, "served_model_name": "tiny", **arguments}), name="octavo")
        return running.url

    yield run
    serve.delete("octavo")


def num_cells() -> int:
    from ray import serve

    cell = serve.status().applications["octavo"].deployments["cell"]
    return cell.replica_states.get("RUNNING", 0)


def ask(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True, **fields}


async def completion(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
    """The number of tokens that came; a stream that is cut has no [DONE]."""
    if not body.get("stream"):
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["completion_tokens"])
    body |= {"stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        events = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
    assert events[-1] == "[DONE]"
    assert not any('"error"' in event for event in events)
    return int(json.loads(events[-2])["usage"]["completion_tokens"])


def test_a_cell_answers_as_the_server_does(deploy: Any) -> None:
    base = deploy()
    with httpx.Client(base_url=base, timeout=PATIENCE) as client:
        whole = client.post("/v1/completions", json=ask("Hello"))
        assert whole.status_code == 200
        assert whole.json()["usage"]["completion_tokens"] == 16
        assert whole.headers["content-type"] == "application/json"
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert client.get("/health").status_code == 200
        refused = client.post("/v1/completions", json=ask("Hello", temperature=-1))
        assert refused.status_code == 400
        assert "temperature" in refused.json()["error"]["message"]
        assert client.get("/v1/nothing").status_code == 404
        assert client.request("HEAD", "/health").status_code == 405


def test_a_client_that_leaves_ends_its_request(deploy: Any) -> None:
    base = deploy()
    with httpx.Client(base_url=base, timeout=PATIENCE) as client:
        # 64 answers of 500 tokens are four times what the cache holds at once, so they take a while.
        body = ask("Hello", max_tokens=500, n=64, stream=True)
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            next(answer.iter_lines())  # whoever drops an iterator of lines hangs up, as the end of this block does
        until(lambda: client.get("/load").json() == {"server_load": 0}, "the request has ended")
    assert 0 < sum(counted("vllm:generation_tokens_total")) < 64 * 500


def test_serve_scales_up_and_down_without_a_failed_request(deploy: Any) -> None:
    """1 -> 3 -> 1 replicas under load: streams and whole answers, all of them complete."""
    base = deploy(
        max_replicas=3, target_ongoing_requests=4, upscale_delay_s=1, downscale_delay_s=2, shutdown_timeout_s=PATIENCE
    )
    assert num_cells() == 1
    seen = [0]

    async def load() -> list[int]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        counts: list[int] = []

        async def worker(client: httpx.AsyncClient, number: int) -> None:
            while seen[0] < 3:
                body = ask(f"Number {number}", max_tokens=200, stream=number % 2 == 0)
                counts.append(await completion(client, body))
                seen[0] = max(seen[0], await asyncio.to_thread(num_cells))

        async with httpx.AsyncClient(base_url=base, timeout=PATIENCE, limits=limits) as client:
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*(worker(client, number) for number in range(24)))
            # A trickle, so that requests are under way while replicas are taken down.
            while await asyncio.to_thread(num_cells) > 1:
                counts.append(await completion(client, ask("Later", max_tokens=200, stream=True)))
        return counts

    counts = asyncio.run(load())
    assert num_cells() == 1
    assert len(counts) > 24
    assert set(counts) == {200}


def test_a_replica_whose_server_dies_is_replaced(deploy: Any) -> None:
    base = deploy(min_replicas=1)
    (server,) = cell_processes()
    os.kill(server, signal.SIGKILL)

    def is_back() -> bool:
        answer = httpx.post(f"{base}/v1/completions", json=ask("Hello"), timeout=PATIENCE)
        return answer.status_code == 200 and server not in cell_processes()

    until(is_back, "a new replica answers")


def test_a_server_ends_with_its_replica(deploy: Any) -> None:
    deploy()
    (server,) = cell_processes()
    replica = parent_of(server)
    os.kill(replica, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{server}").exists() or is_zombie(server), "the server has ended")


def test_prompts_with_one_beginning_go_to_one_cell(deploy: Any) -> None:
    base = deploy(min_replicas=2, max_replicas=2, router="prefix")
    beginnings = ["The quick brown fox. " * 33, "Pack my box with jugs. " * 30]

    async def ask_all() -> None:
        async with httpx.AsyncClient(base_url=base, timeout=PATIENCE) as client:
            for turn in range(6):
                for beginning in beginnings:
                    await completion(client, ask(f"{beginning} {turn}", max_tokens=4, stream=turn % 2 == 0))

    asyncio.run(ask_all())
    hits = sum(counted("vllm:prefix_cache_hits_total"))
    # Each beginning is computed once, whatever the number of cells: 5 of 6 turns find it.
    assert hits / sum(counted("vllm:prefix_cache_queries_total")) > 0.7


def test_a_session_stays_with_its_cell(deploy: Any) -> None:
    base = deploy(min_replicas=2, max_replicas=2, router="session")
    with httpx.Client(base_url=base, timeout=PATIENCE, headers={"x-session-id": "one"}) as client:
        for number in range(8):
            answer = client.post("/v1/completions", json=ask(f"Number {number}", max_tokens=1))
            assert answer.status_code == 200, answer.text
    assert sorted(counted("vllm:request_success_total")) == [0, 8]


def test_a_cell_may_have_several_engines_of_several_ranks(deploy: Any) -> None:
    texts = set()
    sizes: list[dict[str, int]] = [{}, {"tensor_parallel_size": 2}, {"data_parallel_size": 2}]
    for size in sizes:
        base = deploy(model=str(QUANTIZED), num_cpus=2, **size)
        answer = httpx.post(f"{base}/v1/completions", json=ask("Hello"), timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        texts.add(answer.json()["choices"][0]["text"])
    assert len(texts) == 1


def test_a_killed_nodes_cell_comes_back_on_another(deploy: Any, running: Running) -> None:
    """Last in this file, since the second node is gone afterwards."""
    base = deploy(num_cpus=2, min_replicas=2, max_replicas=2)
    before = set(cell_processes())
    assert len(before) == 2
    running.cluster.add_node(num_cpus=2)
    killed = time.monotonic()
    running.cluster.remove_node(running.second, allow_graceful=False)

    def are_two_again() -> bool:
        there = set(cell_processes())
        return num_cells() == 2 and len(there) == 2 and len(there & before) == 1

    until(are_two_again, "the cell has come back")
    print(f"back after {time.monotonic() - killed:.1f} s")
    for number in range(8):
        answer = httpx.post(f"{base}/v1/completions", json=ask(f"Number {number}"), timeout=PATIENCE)
        assert answer.status_code == 200, answer.text


def cell_processes() -> list[int]:
    """Servers that replicas have started, by their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        number = int(path.parent.name)
        if b"octavo.server.ray_cell_process" in words and not is_zombie(number):
            found.append(number)
    return found


def status_of(process: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def parent_of(process: int) -> int:
    return int(status_of(process)["PPid"])


def is_zombie(process: int) -> bool:
    return status_of(process).get("State", "Z").startswith("Z")


def counted(name: str) -> list[float]:
    """A counter of each cell: each is asked on its own socket."""
    found = []
    for process in cell_processes():
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
        transport = httpx.HTTPTransport(uds=words[words.index("--uds") + 1])
        with httpx.Client(transport=transport, base_url="http://cell", timeout=PATIENCE) as client:
            page = client.get("/metrics").text
        found.append(sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(name)))
    return found
