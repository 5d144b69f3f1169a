"""The bytes of a stream, clients that hang up, clients that do not read, and many at once."""

from __future__ import annotations

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from octavo_server import PATIENCE, Server, num_in_flight, stream, value, wait_until

LONG = {"prompt": "x", "max_tokens": 500, "temperature": 0, "ignore_eos": True, "n": 16}
RUNNING, WAITING, USAGE = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
ABORTED, GENERATED = "vllm:request_success_total", "vllm:generation_tokens_total"


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def post(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def read_all(connection: socket.socket) -> bytes:
    answer = b""
    while piece := connection.recv(1 << 16):
        answer += piece
    return answer


def test_framing_byte_for_byte(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "allowed_token_ids": [66], "max_tokens": 2, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "request_id": "one"}
    with connect(server) as connection:
        connection.sendall(post("/v1/chat/completions", body))
        head, _, rest = read_all(connection).partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK"
    assert b"content-type: text/event-stream; charset=utf-8" in lines
    assert b"cache-control: no-cache" in lines
    assert b"transfer-encoding: chunked" in lines
    content = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        content += rest[:length]
        assert rest[length : length + 2] == b"\r\n"
        rest = rest[length + 2 :]
    assert length == 0
    content = re.sub(rb'"created":\d+', b'"created":0', content)
    start = b'data: {"id":"chatcmpl-one","object":"chat.completion.chunk","created":0,"model":"tiny","choices":['
    role = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
    first = b'{"index":0,"delta":{"content":"`"},"logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
    last = first.replace(b'"finish_reason":null', b'"finish_reason":"length"')
    usage = b'],"usage":{"prompt_tokens":13,"completion_tokens":2,"total_tokens":15,'
    usage += b'"prompt_tokens_details":{"cached_tokens":0}}}\n\n'
    assert content == start + role + start + first + start + last + start + usage + b"data: [DONE]\n\n"


def idle(client: httpx.Client) -> None:
    wait_until(lambda: not any(value(client, name) for name in (RUNNING, WAITING, USAGE)))


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_hangs_up_ends_its_request(
    server: Server, client: httpx.Client, streams: bool, path: str
) -> None:
    body = LONG | {"stream": streams, "n": 128}
    if path == "/v1/chat/completions":
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    idle(client)
    aborted, generated = value(client, ABORTED, finished_reason="abort"), value(client, GENERATED)
    with connect(server) as connection:
        connection.sendall(post(path, body))
        wait_until(lambda: num_in_flight(client) == 128)
    wait_until(lambda: value(client, ABORTED, finished_reason="abort") == aborted + 128)
    idle(client)
    assert value(client, GENERATED) - generated < 128 * 400


def test_a_client_that_hangs_up_while_its_prompt_waits(server: Server, client: httpx.Client) -> None:
    idle(client)
    with connect(server) as first:
        first.sendall(post("/v1/completions", LONG | {"prompt": ["x", "y", "z"], "n": 128}))
        wait_until(lambda: num_in_flight(client) == 384)
        aborted = value(client, ABORTED, finished_reason="abort")
        with connect(server) as second:
            second.sendall(post("/v1/completions", LONG | {"n": 7}))
            wait_until(lambda: num_in_flight(client) == 384 + 7)
        wait_until(lambda: value(client, ABORTED, finished_reason="abort") == aborted + 7)
    idle(client)


def test_a_stop_string_ends_the_engine_s_work_too(client: httpx.Client) -> None:
    idle(client)
    aborted = value(client, ABORTED, finished_reason="abort")
    body = {"prompt": "The", "max_tokens": 500, "temperature": 0, "ignore_eos": True, "stop": [" ", "e", "a"], "n": 4}
    before = value(client, GENERATED)
    answer = client.post("/v1/completions", json=body).json()
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    idle(client)
    assert value(client, GENERATED) - before == answer["usage"]["completion_tokens"]
    assert value(client, ABORTED, finished_reason="abort") == aborted


def test_a_client_that_does_not_read_holds_up_nobody(server: Server, client: httpx.Client) -> None:
    """Its answer waits in the server; the engine and the others go on."""
    idle(client)
    body = {"prompt": ["x"] * 4, "n": 128, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": 20}
    generated = value(client, GENERATED)
    with connect(server) as lazy:
        lazy.sendall(post("/v1/completions", body | {"stream": True}))
        wait_until(lambda: value(client, GENERATED) > generated)
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
        assert client.get("/health").status_code == 200
        idle(client)
        answer = read_all(lazy)
    assert answer.count(b'"finish_reason":"length"') == 4 * 128
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_many_streams_at_once_are_what_each_is_alone(server: Server) -> None:
    def text(number: int) -> str:
        body = {"prompt": f"Number {number}", "max_tokens": 40, "seed": number, "temperature": number % 3 / 2}
        with server.client() as own:
            return "".join(chunk["choices"][0]["text"] for chunk in stream(own, "/v1/completions", body))

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(text, range(32)))
    assert [text(number) for number in range(0, 32, 5)] == together[::5]


def test_a_thousand_idle_connections(server: Server, client: httpx.Client) -> None:
    connections = [connect(server) for _ in range(1000)]
    try:
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
        connections[-1].sendall(post("/v1/completions", {"prompt": "x", "max_tokens": 2}))
        assert read_all(connections[-1]).startswith(b"HTTP/1.1 200 ")
    finally:
        for connection in connections:
            connection.close()
