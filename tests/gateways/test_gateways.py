"""Gateways before two servers of the tiny model: no stream is lost, and prefixes are found as by one server alone.

`make gateways` installs them, beside octavo, and runs this: two minutes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from octavo_server import PATIENCE, Server, events, serving, value, wait_until

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
GATEWAYS = Path(os.environ.get("OCTAVO_GATEWAYS", HERE.parents[1] / ".gateways")).resolve()
KEY = "the-servers-own"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}
NUM_TALKS = 8
NUM_TURNS = 5
WORDS = (
    "the", "a", "of", "to", "and", "in", "that", "with", "for", "as", "by", "on", "function", "returns", "value",
    "list", "text", "file", "name", "line",
)  # fmt: skip
KV_EVENTS = '{"enable_kv_cache_events": true, "endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "tcp://127.0.0.1:*"}'


@pytest.fixture(autouse=True, scope="module")
def _installed() -> None:
    if not GATEWAYS.is_dir():
        pytest.fail(f"the gateways are not in {GATEWAYS}: `make gateways` installs them")


@contextmanager
def servers(count: int, **variables: str) -> Iterator[list[Server]]:
    flags = ("--served-model-name", "tiny", "--kv-events-config", KV_EVENTS)
    with ExitStack() as stack:
        yield [stack.enter_context(serving(*flags, environment=variables)) for _ in range(count)]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def command_of_compose(urls: Sequence[str]) -> list[str]:
    """The gateway's in deploy/compose; of flags that come twice the last counts, so its ports are no matter."""
    compose = yaml.safe_load((HERE.parents[1] / "deploy/compose/compose.yaml").read_text())
    line = compose["services"]["gateway"]["entrypoint"][-1]
    words = shlex.split(line.removeprefix("exec ").replace("$$WORKERS", " ".join(urls)))
    assert words[:3] == ["python", "-m", "sglang_router.launch_router"]
    return words


@contextmanager
def gateway(command: Sequence[str]) -> Iterator[httpx.Client]:
    """A client of a gateway that is ready."""
    port = free_port()
    own = [str(GATEWAYS / "bin" / command[0]), *command[1:], "--host", "127.0.0.1", "--port", str(port)]
    own += ["--prometheus-port", str(free_port()), "--prometheus-host", "127.0.0.1"]
    said: list[str] = []
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(own, text=True, **pipes) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=lambda: said.extend(process.stdout), daemon=True)
        reader.start()

        def is_ready() -> bool:
            assert process.poll() is None, "".join(said)
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/readiness").json()
            except httpx.TransportError:
                return False
            return bool(answer.get("healthy_workers") == 2)

        try:
            wait_until(is_ready)
            limits = httpx.Limits(max_connections=NUM_TALKS)
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=url, timeout=PATIENCE, limits=limits, headers=WITH_KEY) as client:
                yield client
        finally:
            process.kill()
            process.wait()
            reader.join(PATIENCE)


def opening(talk: int) -> str:
    """A system prompt of its own, long enough to be worth finding: about six blocks."""
    return " ".join(WORDS[(talk * 7 + i * (talk + 3)) % len(WORDS)] for i in range(60))


def talk(client: httpx.Client, number: int, num_turns: int = NUM_TURNS) -> int:
    """A conversation, each turn of which holds all before it. Returns how many of its streams were whole."""
    messages = [{"role": "system", "content": opening(number)}]
    num_whole = 0
    for turn in range(num_turns):
        messages.append({"role": "user", "content": f"{WORDS[turn]} {WORDS[number]} more"})
        body = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            chunks = list(events(response.iter_lines()))
        assert chunks[-1]["choices"][0]["finish_reason"] in {"stop", "length"}
        num_whole += 1
        said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        messages.append({"role": "assistant", "content": said})
    return num_whole


def talks(client: httpx.Client) -> int:
    """All conversations at once; how many of their streams were whole."""
    with ThreadPoolExecutor(NUM_TALKS) as pool:
        return sum(pool.map(lambda number: talk(client, number), range(NUM_TALKS)))


def counted(running: Sequence[Server], name: str) -> list[float]:
    """A counter of each server."""
    found = []
    for server in running:
        with server.client() as client:
            found.append(value(client, name))
    return found


def hits(running: Sequence[Server]) -> float:
    """The share of prompt tokens that were found in the prefix caches."""
    found = counted(running, "vllm:prefix_cache_hits_total")
    return sum(found) / sum(counted(running, "vllm:prefix_cache_queries_total"))


@pytest.fixture(scope="module")
def own_hits() -> float:
    """One server's, without a gateway."""
    with servers(1) as running, running[0].client() as client:
        assert talks(client) == NUM_TALKS * NUM_TURNS
        return hits(running)


def event_flags(server: Server) -> list[str]:
    (endpoint,) = re.findall(r"KV events: (tcp://\S+)", server.said)
    (replay,) = re.findall(r"KV events, replayed: (tcp://\S+)", server.said)
    return [
        "--kv-event-source", f"{server.url}={endpoint}",
        "--kv-event-replay-source", f"{server.url}={replay}",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["sglang-router", "vllm-router"])
def test_no_stream_is_lost_and_prefixes_are_found(name: str, own_hits: float) -> None:
    with servers(2, OCTAVO_API_KEY=KEY) as running:
        urls = [server.url for server in running]
        command = ["vllm-router", "--policy", "cache_aware", "--worker-urls", *urls]
        if name == "sglang-router":
            command = command_of_compose(urls)
        with gateway(command) as client:
            assert talks(client) == NUM_TALKS * NUM_TURNS
        share = hits(running)
        both = counted(running, "vllm:prefix_cache_queries_total")
    print(json.dumps({"gateway": name, "hits": share, "of one server": own_hits, "tokens": both}))
    assert min(both) > 0, "one server did everything"
    assert share >= 0.9 * own_hits


def test_kv_events_tell_a_gateway_where_a_prefix_is() -> None:
    """Prefixes that came to each server past the gateway, so that it knows of them by events alone."""
    with servers(2) as running:
        flags = [flag for server in running for flag in event_flags(server)]
        flags += ["--policy", "kv_aware", "--kv-event-block-size", "16", "--kv-event-model", "tiny"]
        with gateway(["vllm-router", *flags, "--worker-urls", *(server.url for server in running)]) as client:
            for number in range(NUM_TALKS):
                with running[number % 2].client() as direct:
                    assert talk(direct, number, num_turns=1) == 1
            for number in range(NUM_TALKS):
                before = counted(running, "vllm:prefix_cache_queries_total")
                assert talk(client, number) == NUM_TURNS
                after = counted(running, "vllm:prefix_cache_queries_total")
                moved = [now > then for now, then in zip(after, before, strict=True)]
                assert moved == [number % 2 == 0, number % 2 == 1], f"conversation {number} went elsewhere"
