"""/pause and /resume on a server of their own: requests wait, end, or stand still, and go on with the same tokens."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
from octavo_server import Server, events, num_in_flight, serving, wait_until

BODY = {"prompt": "The capital of", "max_tokens": 300, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
        client.post("/resume")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def complete(server: Server, **fields: Any) -> dict[str, Any]:
    with server.client() as client:
        answer = client.post("/v1/completions", json=BODY | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()


def is_paused(client: httpx.Client) -> bool:
    return client.get("/is_paused").json()["is_paused"]


def begun(server: Server, pool: ThreadPoolExecutor) -> tuple[Future[list[Any]], threading.Event]:
    """A stream of which the first token has come: (all of its events, what is set then)."""
    first = threading.Event()

    def read() -> list[Any]:
        found = []
        with (
            server.client() as client,
            client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer,
        ):
            for event in events(answer.iter_lines()):
                found.append(event)
                first.set()
        return found

    future = pool.submit(read)
    assert first.wait(300)
    return future, first


def test_new_requests_wait_until_resume(server: Server, client: httpx.Client, pool: ThreadPoolExecutor) -> None:
    expected = complete(server)["choices"]
    assert not is_paused(client)
    assert client.post("/pause").json() == {"status": "paused"}
    assert is_paused(client)
    waiting = pool.submit(complete, server)
    searching = pool.submit(complete, server, use_beam_search=True, max_tokens=2)
    assert client.get("/health").status_code == 200
    assert num_in_flight(client) == 0
    assert not waiting.done()
    assert client.post("/resume").json() == {"status": "resumed"}
    assert waiting.result(300)["choices"] == expected
    assert searching.result(300)["choices"][0]["finish_reason"] == "length"
    assert not is_paused(client)


def test_open_requests_are_ended(server: Server, client: httpx.Client, pool: ThreadPoolExecutor) -> None:
    future, _ = begun(server, pool)
    assert client.post("/pause?mode=abort").status_code == 200
    last = future.result(300)[-1]["choices"][0]
    assert last["finish_reason"] in ("abort", "length")
    wait_until(lambda: num_in_flight(client) == 0)


def test_open_requests_stand_still_and_go_on(server: Server, client: httpx.Client, pool: ThreadPoolExecutor) -> None:
    text = complete(server)["choices"][0]["text"]
    future, _ = begun(server, pool)
    assert client.post("/pause?mode=keep").status_code == 200
    before = client.get("/metrics").text
    assert client.get("/health").status_code == 200
    assert num_in_flight(client) in (0, 1)
    if num_in_flight(client):
        assert not future.done()
        generated = [line for line in before.splitlines() if line.startswith("vllm:generation_tokens_total")]
        assert client.get("/health").status_code == 200  # a turn of the engine's loop
        after = client.get("/metrics").text.splitlines()
        later = [line for line in after if line.startswith("vllm:generation_tokens_total")]
        assert float(later[0].split()[-1]) - float(generated[0].split()[-1]) <= 2  # the steps that were under way
    client.post("/resume")
    assert "".join(event["choices"][0]["text"] for event in future.result(300)) == text


def test_open_requests_are_waited_for(server: Server, client: httpx.Client, pool: ThreadPoolExecutor) -> None:
    future, _ = begun(server, pool)
    assert client.post("/pause?mode=wait").status_code == 200
    assert num_in_flight(client) == 0
    assert future.result(300)[-1]["choices"][0]["finish_reason"] == "length"


def test_sglang_s_names(client: httpx.Client) -> None:
    for body in ({}, {"mode": "in_place"}, {"mode": "retract"}, {"mode": "abort"}):
        assert client.post("/pause_generation", json=body).json()["status"] == "ok"
        assert is_paused(client)
        assert client.post("/continue_generation", json={}).json()["status"] == "ok"
        assert not is_paused(client)
    assert client.post("/pause_generation", json={"mode": "x"}).status_code == 400
    assert client.post("/pause?mode=x").status_code == 400


@pytest.mark.parametrize("path", ["/pause", "/resume", "/reset_prefix_cache", "/pause_generation"])
def test_no_page_of_another_origin_may_do_that(client: httpx.Client, path: str) -> None:
    refused = client.post(path, headers={"Origin": "http://page.example"})
    assert refused.status_code == 403
    assert path in refused.json()["error"]["message"]
    assert client.post(path, headers={"Origin": str(client.base_url).rstrip("/")}).status_code == 200


def test_a_paused_server_ends() -> None:
    """Requests that wait get an error; SIGTERM isn't held up by them."""
    with serving("--shutdown-timeout", "1") as server, server.client() as client, ThreadPoolExecutor(1) as pool:
        client.post("/pause")
        waiting = pool.submit(client.post, "/v1/completions", json=BODY)
        wait_until(lambda: client.get("/is_paused").json()["is_paused"])
        server.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
        with suppress(httpx.TransportError):  # perhaps it had not been received
            assert waiting.result(300).status_code == 503
