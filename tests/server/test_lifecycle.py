"""How a server starts, drains, and ends, and what becomes of its requests when the engine dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
from octavo_server import (
    PATIENCE,
    SMALL,
    Server,
    events,
    forked,
    num_in_flight,
    said_at_once,
    serving,
    serving_anew,
    started,
    value,
    wait_until,
)

pytestmark = pytest.mark.long

LONG = {"prompt": ["x"] * 2, "n": 32, "max_tokens": 500, "temperature": 0, "ignore_eos": True}  # it won't be waited for
UNREAD = LONG | {"n": 128, "stream": True, "logprobs": 20}  # over a kilobyte a token: more than sockets hold
PATH = "/v1/completions"
NO_RESTART = ("--max-engine-restarts", "0")  # what becomes of requests otherwise is proved in test_takeover.py
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


def host_and_port(server: Server) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def wait_until_draining(server: Server) -> None:
    """Until /health, asked on a new connection each time, says that the server is shutting down."""

    def is_draining() -> bool:
        health = httpx.get(f"{server.url}/health", timeout=PATIENCE)
        return health.status_code == 503 and "shutting down" in health.json()["error"]["message"]

    wait_until(is_draining)


@contextmanager
def whole_request(server: Server, body: dict[str, Any]) -> Iterator[list[httpx.Response]]:
    """A request without a stream that is in the engine; its answer is there behind the block."""
    answers: list[httpx.Response] = []

    def send() -> None:
        with server.client() as client:
            answers.append(client.post(PATH, json=body))

    thread = threading.Thread(target=send)
    thread.start()
    num_choices = body["n"] * len(body["prompt"])
    with server.client() as client:
        wait_until(lambda: num_in_flight(client) == num_choices)
    yield answers
    thread.join(PATIENCE)
    assert answers


@contextmanager
def streamed_request(server: Server) -> Iterator[Iterator[str]]:
    """The lines of a long stream that has begun."""
    with server.client() as client, client.stream("POST", PATH, json=LONG | {"stream": True}) as response:
        lines = response.iter_lines()
        yield chain([next(lines)], lines)


def test_sigterm_lets_what_runs_finish() -> None:
    body = LONG | {"prompt": ["x"], "n": 20, "max_tokens": 400}
    patience = ("--shutdown-timeout", str(PATIENCE))
    with serving_anew(*patience) as server, server.client() as client, whole_request(server, body) as answers:
        with client.stream("POST", PATH, json=body | {"stream": True}) as response:
            lines = response.iter_lines()
            first = next(lines)
            with server.client() as second:
                wait_until(lambda: num_in_flight(second) == 40)
                server.send_signal(signal.SIGTERM)
                wait_until_draining(server)
                refused = second.post(PATH, json={"prompt": "x"})
                assert refused.status_code == 503
                assert "shutting down" in refused.json()["error"]["message"]
            chunks = list(events(iter([first, *lines])))
        assert server.exit_code() == 0
    finished = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert [choice["finish_reason"] for choice in finished] == ["length"] * 20
    assert {choice["finish_reason"] for choice in answers[0].json()["choices"]} == {"length"}
    assert "Traceback" not in server.said


def test_what_does_not_finish_in_time_ends_with_an_error() -> None:
    with serving("--shutdown-timeout", "0") as server:
        with whole_request(server, LONG) as answers, streamed_request(server) as lines:
            server.send_signal(signal.SIGTERM)
            *_, last = events(lines)
        assert server.exit_code() == 0
    assert (last["error"]["type"], last["error"]["code"]) == ("overloaded_error", 503)
    assert "shutting down" in last["error"]["message"]
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["message"] == last["error"]["message"]
    assert "Traceback" not in server.said


def test_clients_that_neither_read_nor_write_do_not_hold_the_end_up() -> None:
    content = json.dumps(UNREAD | {"max_tokens": 40}).encode()
    with serving("--shutdown-timeout", "0") as server, ExitStack() as connections:
        for sent in (b"", HEAD % 9, HEAD % 9 + b"{", HEAD[:9], HEAD % len(content) + content):
            connection = socket.create_connection(host_and_port(server), timeout=PATIENCE)
            connections.enter_context(connection)
            connection.sendall(sent)
        with server.client() as client:
            wait_until(lambda: value(client, "vllm:generation_tokens_total") > 0)
            wait_until(lambda: num_in_flight(client) == 0)
        server.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
    assert "Traceback" not in server.said


def test_a_second_sigint_ends_at_once() -> None:
    """It doesn't wait for a client that does not read either."""
    content = json.dumps(UNREAD).encode()
    with serving_anew() as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE)
        connection.connect(host_and_port(server))
        connection.sendall(HEAD % len(content) + content)
        with server.client() as client:
            wait_until(lambda: value(client, "vllm:generation_tokens_total") > 2000)
        server.send_signal(signal.SIGINT)
        wait_until_draining(server)
        assert server.process.poll() is None, "the first one waits"
        server.send_signal(signal.SIGINT)
        assert server.exit_code() == 0
    assert "Traceback" not in server.said


def test_a_stop_while_the_engine_loads() -> None:
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        with TemporaryDirectory(dir="/tmp") as directory, started(environment={"TMPDIR": directory}) as server:
            wait_until_loading(server)
            server.send_signal(number)
            assert server.exit_code() in (0, code)
            assert "Traceback" not in server.said
            wait_until(lambda directory=directory: not os.listdir(directory))


def test_the_engine_s_death_is_told_to_everybody() -> None:
    """By a server that is told to go on without it."""
    flags = ("--enable-log-requests", "--keep-alive-on-engine-death", *NO_RESTART)
    with serving(*flags) as server, server.client() as client:
        with whole_request(server, LONG) as answers, streamed_request(server) as lines:
            assert client.get("/health").status_code == 200
            os.kill(server.engine_pid, signal.SIGKILL)
            *_, last = events(lines)
        assert last["error"]["code"] == 503
        assert "killed by signal 9" in last["error"]["message"]
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["message"] == last["error"]["message"]
        health = client.get("/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, 503)
        for path, body in (
            (PATH, {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            for streams in (False, True):
                refused = client.post(path, json=body | {"stream": streams})
                assert refused.status_code == 503
                assert "killed by signal 9" in refused.json()["error"]["message"]
        assert client.post("/tokenize", json={"prompt": "x"}).status_code == 200
        assert client.get("/metrics").status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.exit_code() == 1
    assert "Traceback" not in server.said


def test_a_server_ends_with_its_engine_once_its_clients_are_told() -> None:
    with serving_anew(*NO_RESTART) as server:
        with whole_request(server, LONG) as answers, streamed_request(server) as lines:
            os.kill(server.engine_pid, signal.SIGKILL)
            *_, last = events(lines)
        assert server.exit_code() == 1
    assert last["error"]["code"] == answers[0].status_code == 503
    assert "killed by signal 9" in last["error"]["message"]
    assert answers[0].json()["error"]["message"] == last["error"]["message"]
    assert "Traceback" not in server.said


def test_a_frozen_engine_is_a_dead_one() -> None:
    """Its process is stopped: it can't even say that it fails."""
    with serving("--engine-timeout", "3", *NO_RESTART) as server:
        pid = server.engine_pid
        with whole_request(server, LONG) as answers, streamed_request(server) as lines:
            os.kill(pid, signal.SIGSTOP)
            *_, last = events(lines)
        assert server.exit_code() == 1
        assert not Path(f"/proc/{pid}").exists()
    assert last["error"]["code"] == answers[0].status_code == 503
    assert "--engine-timeout" in last["error"]["message"]
    assert answers[0].json()["error"]["message"] == last["error"]["message"]
    assert "Traceback" not in server.said


def test_health_tells_of_a_frozen_engine() -> None:
    flags = ("--engine-timeout", "3", "--keep-alive-on-engine-death", *NO_RESTART)
    with serving(*flags) as server, server.client() as client:
        assert client.get("/health").status_code == 200
        os.kill(server.engine_pid, signal.SIGSTOP)
        health = client.get("/health")
        assert health.status_code == 503
        assert "--engine-timeout" in health.json()["error"]["message"]


def test_sockets_of_a_server_that_died_with_its_engine_are_removed_at_the_next_start() -> None:
    """And nobody else's: not those of a server that lives, nor what only has such a name."""
    with TemporaryDirectory(dir="/tmp") as directory:
        environment = {"TMPDIR": directory}
        with serving_anew(environment=environment) as server:
            (left_over,) = os.listdir(directory)
            os.kill(server.engine_pid, signal.SIGSTOP)  # so that it can't remove them when its server is gone
            engine = server.engine_pid
            server.send_signal(signal.SIGKILL)
            server.process.wait()
            os.kill(engine, signal.SIGKILL)
        assert os.listdir(directory) == [left_over]
        other = Path(directory, left_over.rstrip(left_over[-1]) + "other")
        other.mkdir()
        (other / "file").touch()
        with serving(environment=environment) as living:
            assert left_over not in os.listdir(directory)
            (used,) = set(os.listdir(directory)) - {other.name}
            with serving(environment=environment), living.client() as client:
                assert {used, other.name} < set(os.listdir(directory))
                assert client.get("/health").status_code == 200


def test_a_port_that_is_taken() -> None:
    """Told before anything is loaded: the model is not even looked for."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = said_at_once("no/such/model/here", "--port", str(port))
    assert f"--port {port}: Address already in use" in said
    assert f"127.0.0.1:{port}" in said
    assert "--port 0" in said


def wait_until_loading(server: Server) -> None:
    """Until the engine's process is there: by then the address has been reserved."""
    while not Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text():
        assert server.process.poll() is None, server.said


def free_port_with_a_lingering_connection() -> int:
    """A port that was free a moment ago, on which a closed connection of an earlier server is still known."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            listener.accept()[0].close()  # who closes first keeps the connection, in TIME_WAIT
            assert client.recv(1) == b""
    return port


def test_a_port_belongs_to_the_first_who_loads() -> None:
    """Nobody listens yet when the second comes, and until the first can answer, clients are refused."""
    port = free_port_with_a_lingering_connection()
    with forked(*SMALL, "--port", str(port)) as first:
        wait_until_loading(first)
        assert f"--port {port}: Address already in use" in said_at_once("no/such/model/here", "--port", str(port))
        if not first.url:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
        first.wait_until_ready()
        with first.client() as client:
            assert client.get("/health", headers={"Connection": "close"}).status_code == 200


def test_a_path_belongs_to_the_first_who_loads(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with forked(*SMALL, "--uds", path) as first:
        wait_until_loading(first)
        assert f"--uds {path}: Address already in use" in said_at_once("no/such/model/here", "--uds", path)
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://x", timeout=PATIENCE) as client:
            assert client.get("/health").status_code == 200


def test_a_model_that_can_not_be_served(fixtures: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((fixtures / "tiny" / name).read_bytes())
    assert "safetensors" in said_at_once(str(tmp_path), "--port", "0")


def test_flags_that_can_not_be_honoured(fixtures: Path, tmp_path: Path) -> None:
    tiny = str(fixtures / "tiny")
    assert "name one model" in said_at_once("--port", "0")
    assert "temperature" in said_at_once(tiny, "--port", "0", "--override-generation-config", '{"temperature": 3}')
    assert "--ssl-certfile" in said_at_once(tiny, "--port", "0", "--ssl-certfile", str(tmp_path / "none.pem"))
    assert "--uds" in said_at_once(tiny, "--uds", str(tmp_path / "none" / "socket"))
    assert "no such directory" in said_at_once(tiny, "--port", "0", "--tokenizer", str(tmp_path / "none"))
    assert "--chat-template" in said_at_once(tiny, "--port", "0", "--chat-template", "none.jinja")


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is there: see test_ray_engine.py")
def test_a_flag_that_wants_an_extra_names_it(fixtures: Path) -> None:
    for flag in ("--distributed-executor-backend", "--data-parallel-backend"):
        said = said_at_once(str(fixtures / "tiny"), "--port", "0", flag, "ray")
        assert flag in said
        assert "is not installed: pip install 'octavo[ray]'" in said
