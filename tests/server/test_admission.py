"""A queue with limits: what doesn't fit is refused at once, and what takes too long ends; others notice nothing."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from octavo_server import PATIENCE, Server, events, num_in_flight, serving, value, wait_until
from slow_cases import slow

from octavo.server.admission import MOST_MEDIA, Admission, QueueLimits
from octavo.server.errors import ApiError
from octavo.server.middleware import GENERATING_PATHS
from octavo.server.options import FairBy
from octavo.server.processes.board import Elsewhere

PATH = "/v1/completions"
SHORT = {"prompt": "The", "max_tokens": 2, "temperature": 0}
LONG = {"prompt": "The", "max_tokens": 500, "n": 2, "temperature": 0, "ignore_eos": True}
FLAGS = ("--max-num-seqs", "2", "--max-queued-requests", "3", "--max-queued-tokens", "300", "--queue-timeout", "60")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(*FLAGS) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
        wait_until(lambda: num_in_flight(client) == 0)


def error_of(response: httpx.Response, status: int) -> dict[str, object]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def refused_by_handler(client: httpx.Client, path: str) -> float:
    """How many requests to this path were answered with 4xx, as /metrics tells."""
    return value(client, "http_requests_total", handler=path, method="POST", status="4xx")


def test_what_exceeds_the_queue_is_told_when_to_come_again(client: httpx.Client) -> None:
    """Two seats and three places: five answers are taken, and a sixth is not."""
    answer = client.post(PATH, json=SHORT | {"n": 5})
    assert len(answer.json()["choices"]) == 5
    refused = client.post(PATH, json=SHORT | {"n": 6})
    error = error_of(refused, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert "--max-queued-requests" in str(error["message"])
    assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_a_full_queue_is_told_before_a_body_is_read() -> None:
    """What is no JSON is refused for that where there is room, and for the queue where there is none."""
    bad = {"content": b"{", "headers": {"content-type": "application/json"}}
    with serving(*FLAGS, "--engine-timeout", "300") as server:
        with server.client() as client:
            assert {client.post(path, **bad).status_code for path in GENERATING_PATHS} == {400}
        with full(server) as client:
            answers = {path: client.post(path, **bad) for path in GENERATING_PATHS}
            assert client.post("/tokenize", json={"prompt": "The"}).status_code == 200
            refusals = {path: refused_by_handler(client, path) for path in GENERATING_PATHS}
        assert set(refusals.values()) == {2}  # the 400 and the 429
        assert error_of(answers[PATH], 429)["code"] == "queue_full"
        assert error_of(answers["/v1/messages"], 429)["type"] == "rate_limit_error"
        assert all(each.status_code == 429 and int(each.headers["retry-after"]) >= 1 for each in answers.values())


@contextmanager
def full(server: Server) -> Iterator[httpx.Client]:
    """A client of a server whose queue is full, as its engine stands."""
    os.kill(server.engine_pid, signal.SIGSTOP)
    try:
        with server.client() as client, server.client() as other, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(other.post, PATH, json=SHORT | {"n": 5}, headers=KEY)
            try:
                wait_until(lambda: client.get("/load", headers=KEY).json()["server_load"] == 5)
                yield client
            finally:
                os.kill(server.engine_pid, signal.SIGCONT)
            assert waiting.result(PATIENCE).status_code == 200
    finally:
        os.kill(server.engine_pid, signal.SIGCONT)


def test_what_can_not_begin_in_time_is_refused_at_once() -> None:
    """Once the pace of a queue is known: who would run out of time in it is told when to come again."""
    with serving("--max-num-seqs", "2") as server, server.client() as client, ThreadPoolExecutor(40) as pool:
        ahead = [pool.submit(client.post, PATH, json=SHORT | {"max_tokens": 50}, timeout=PATIENCE) for _ in range(40)]
        wait_until(lambda: sum(each.done() for each in ahead) >= 5)
        hasty = client.post(PATH, json=SHORT, headers={"X-Request-Timeout": "0.001"})
        patient = client.post(PATH, json=SHORT, headers={"X-Request-Timeout": "600"})
        assert {each.result(PATIENCE).status_code for each in ahead} == {200}
    error = error_of(hasty, 429)
    assert error["code"] == "queue_full"
    assert "would pass before this request begins" in str(error["message"])
    assert int(hasty.headers["retry-after"]) >= 1
    assert patient.status_code == 200


KEY = {"Authorization": "Bearer one"}
CHANGING = {"date", "x-request-id", "request-id", "connection"}
CHANGING |= {"endpoint-load-metrics", "access-control-allow-origin", "vary"}
BY_THE_APPLICATION = [{"endpoint-load-metrics-format": "JSON"}, {"Origin": "http://page"}]


def told(response: httpx.Response) -> tuple[int, dict[str, str], bytes]:
    assert len(response.headers["x-request-id"]) > 0
    kept = {name: content for name, content in response.headers.items() if name not in CHANGING}
    return response.status_code, kept, response.content


def test_the_connection_refuses_as_the_application_does() -> None:
    """For each path: what the connection says by itself, and what passes all of the middleware, are the same."""
    flags = (
        "--engine-timeout",
        "300",
        "--api-key",
        "one",
        "two",
        "--allowed-origins",
        '["http://page"]',
        "--fair-by",
        "none",
        "--uvicorn-log-level",
        "info",
    )
    with serving(*FLAGS, *flags) as server, full(server) as client:
        for path in sorted(GENERATING_PATHS):
            at_once = client.post(path, json=SHORT, headers=KEY | {"X-Request-Id": "mine"})
            assert at_once.status_code == 429
            assert at_once.headers["x-request-id"] == "mine"
            assert ("request-id" in at_once.headers) == (path == "/v1/messages")
            for header in BY_THE_APPLICATION:
                assert told(client.post(path, json=SHORT, headers=KEY | header)) == told(at_once)
            assert refused_by_handler(client, path) == 3
            for headers, status in (({}, 401), ({"x-api-key": "three"}, 401), (KEY | {"Host": "elsewhere"}, 421)):
                assert client.post(path, json=SHORT, headers=headers).status_code == status
            assert client.post(path, json=SHORT, headers={"x-api-key": "two"}).status_code == 429
            wait_until(lambda line=f'"POST {path} HTTP/1.1" 429': server.said.count(line) == 4)


@pytest.mark.parametrize(
    ("flags", "other"),
    [((), {"headers": {"Authorization": "Bearer two"}}), (("--fair-by", "user"), {"json": {"user": "two"}})],
)
def test_a_queue_that_others_fill_has_places_for_who_has_few(flags: tuple[str, ...], other: dict[str, Any]) -> None:
    """Five places for two owners, of whom one has them all: two for the other, and none for the first."""
    keys = ("--engine-timeout", "300", "--api-key", "one", "two")
    mine = {"headers": other.get("headers", KEY), "json": SHORT | other.get("json", {})}
    with serving(*FLAGS, *keys, *flags) as server, full(server) as client, ThreadPoolExecutor(2) as pool:
        waiting = []
        for number in range(2):
            waiting.append(pool.submit(client.post, PATH, **mine))
            wait_until(lambda most=6 + number: client.get("/load", headers=KEY).json()["server_load"] == most)
        assert client.post(PATH, **mine).status_code == 429
        assert client.post(PATH, json=SHORT, headers=KEY).status_code == 429
        os.kill(server.engine_pid, signal.SIGCONT)
        assert [each.result(PATIENCE).status_code for each in waiting] == [200, 200]


def answers_on_one_connection(url: str, pieces: list[bytes]) -> bytes:
    """All that a server says to these bytes, until it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        for piece in pieces:
            connection.sendall(piece)
        found = b""
        while piece := connection.recv(65536):
            found += piece
    return found


def test_a_refused_client_keeps_its_connection_once_its_body_has_come() -> None:
    """Several requests in one packet are answered in order; an answer before the body's end is the last one."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\nauthorization: Bearer one\r\n"
    last = head + b"connection: close\r\n\r\nbody"
    other = b"GET /version HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer one\r\n\r\n"
    with serving(*FLAGS, "--engine-timeout", "300", "--api-key", "one") as server, full(server):
        said = answers_on_one_connection(server.url, [head + b"\r\nbody" + other + head + b"\r\nbody" + last])
        assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"429", b"200", b"429", b"429"]
        assert said.count(b"connection: close") == 1
        said = answers_on_one_connection(server.url, [head + b"\r\n", b"bo", b"dy" + last])
        assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"429", b"429"]
        cut = answers_on_one_connection(server.url, [head + b"\r\nbo"])
        assert re.findall(rb"HTTP/1.1 (\d+)", cut) == [b"429"]
        assert b"connection: close" in cut
        assert "Traceback" not in server.said


def read_until(connection: socket.socket, words: bytes) -> bytes:
    """What comes on a connection until it contains these words."""
    said = b""
    while words not in said:
        piece = connection.recv(65536)
        assert piece, said
        said += piece
    return said


def test_a_refused_client_takes_no_place_that_is_free_by_the_time_of_its_body() -> None:
    """Nobody would give it back: so many bodies that come late would leave the queue full for ever."""
    request = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\nbo"
    with serving(*FLAGS, "--engine-timeout", "300") as server, socket.socket() as late:
        late.settimeout(PATIENCE)
        late.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        with full(server):  # once what comes before it is answered, the request has been refused
            late.sendall(b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n" + request)
            assert read_until(late, b'"version"').startswith(b"HTTP/1.1 200")
        late.sendall(b"dy")
        assert read_until(late, b'"queue_full"').startswith(b"HTTP/1.1 429")
        with server.client() as client:
            assert len(client.post(PATH, json=SHORT | {"n": 5}).json()["choices"]) == 5


def test_of_a_burst_only_as_many_are_read_as_have_a_place() -> None:
    """All come while the server stands, and are found in one turn: bodies that are no JSON tell which it read."""
    request = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    request += b"connection: close\r\ncontent-length: 1\r\n\r\n{"
    with serving(*FLAGS) as server:
        host, port = server.url.removeprefix("http://").split(":")
        server.send_signal(signal.SIGSTOP)
        try:
            connections = [socket.create_connection((host, int(port)), timeout=PATIENCE) for _ in range(40)]
            for connection in connections:
                connection.sendall(request)
        finally:
            server.send_signal(signal.SIGCONT)
        statuses = Counter[int]()
        for connection in connections:
            with connection:
                statuses[int(connection.recv(65536)[9:12])] += 1
        assert set(statuses) == {400, 429}
        assert statuses[400] < 20  # five, if it was one turn
        with server.client() as client:
            assert len(client.post(PATH, json=SHORT | {"n": 5}).json()["choices"]) == 5  # no place is lost


@pytest.mark.parametrize("fair_by", ["none", "key", "user"])
def test_other_processes_are_told_of_a_place_that_is_taken_and_given_back(fair_by: FairBy) -> None:
    """Whether its owner is known before the body is read or not."""
    fleet: Any = SimpleNamespace(num_open=0, num_queued_tokens=0, elsewhere=Elsewhere(), finish_rate=lambda: 0.0)
    admission = Admission(fleet, QueueLimits(max_num_seqs=1, num_requests=0), fair_by)
    told: list[int] = []
    admission.on_change = lambda: told.append(admission.under_way[0])
    place = admission.hold("key")
    assert place is not None
    assert admission.hold("key") is None
    place.leave()
    place.leave()
    assert told == [1, 0]


def test_images_and_recordings_have_room_for_so_many_bytes_at_a_time() -> None:
    """Unless there are no others: what is larger than that could never be answered."""
    fleet: Any = SimpleNamespace(num_open=0, num_queued_tokens=0, elsewhere=Elsewhere(), finish_rate=lambda: 0.0)
    admission = Admission(fleet, QueueLimits(max_num_seqs=1))
    with admission.admit([1], None, media_bytes=MOST_MEDIA + 1):
        with pytest.raises(ApiError, match="take 2048 of 2048 MiB, and this one's take 1; try again later") as refused:
            admission.admit([1], None, media_bytes=1)
        assert refused.value.status == 429
        admission.admit([1], None).__exit__()
    with admission.admit([1], None, media_bytes=MOST_MEDIA - 1), admission.admit([1, 1], None, media_bytes=1):
        pass
    admission.admit([1], None, media_bytes=MOST_MEDIA).__exit__()


def resident_bytes(server: Server) -> int:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("count", [200, slow(5000)])
def test_a_burst_is_served_or_refused_and_nothing_else(server: Server, count: int) -> None:
    """Twice, and the second time takes no more memory than the first: nothing is kept of what was refused."""

    async def burst() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=400)
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, limits=limits) as client:
            places = asyncio.Semaphore(400)  # httpx's pool compares every request that waits with every connection

            async def one() -> httpx.Response:
                async with places:
                    return await client.post(PATH, json=SHORT)

            return await asyncio.gather(*(one() for _ in range(count)))

    asyncio.run(burst())
    before = resident_bytes(server)
    answers = asyncio.run(burst())
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 429}
    assert counts[200] >= 5
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in answers if answer.status_code == 429)
    assert resident_bytes(server) < before + count * 1024 + (8 << 20)  # 8 MiB: an allocator's own arenas
    assert len({answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}) == 1
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)


def test_tokens_that_wait_are_bounded_too(client: httpx.Client) -> None:
    """A prompt alone is taken whatever its length; behind others that have not begun, it has to fit."""
    assert client.post(PATH, json=SHORT | {"prompt": [5] * 400}).status_code == 200
    with client.stream("POST", PATH, json=LONG | {"stream": True}) as running:
        lines = running.iter_lines()
        next(lines)
        with client.stream("POST", PATH, json=SHORT | {"prompt": [5] * 200, "stream": True}) as waiting:
            error = error_of(client.post(PATH, json=SHORT | {"prompt": [6] * 200}), 429)
            assert "--max-queued-tokens" in str(error["message"])
            list(lines)
            assert list(events(waiting.iter_lines()))


def test_a_request_ends_when_its_time_is_up(client: httpx.Client) -> None:
    error = error_of(client.post(PATH, json=LONG, headers={"X-Request-Timeout": "0.05"}), 408)
    assert (error["type"], error["code"]) == ("timeout_error", "timeout")
    with client.stream("POST", PATH, json=LONG | {"stream": True}, headers={"X-Request-Timeout": "0.05"}) as response:
        *_, last = events(response.iter_lines())
    assert last["error"]["code"] == "timeout"
    assert client.post(PATH, json=SHORT, headers={"X-Request-Timeout": "50"}).status_code == 200


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf", "nan", ""])
def test_a_timeout_that_is_none_is_refused(client: httpx.Client, value: str) -> None:
    error = error_of(client.post(PATH, json=SHORT, headers={"X-Request-Timeout": value}), 400)
    assert error["param"] == "X-Request-Timeout"


def test_a_place_in_the_queue_is_not_kept_for_ever() -> None:
    with serving("--queue-timeout", "0.5", "--engine-timeout", "300") as server, server.client() as client:
        os.kill(server.engine_pid, signal.SIGSTOP)  # nothing begins any more
        try:
            error = error_of(client.post(PATH, json=SHORT), 408)
        finally:
            os.kill(server.engine_pid, signal.SIGCONT)
        assert "--queue-timeout" in str(error["message"])
        assert client.post(PATH, json=SHORT).status_code == 200
