"""How soon a full queue says 429: far more requests than may wait, at a server of each of several checkouts in turns.

    PYTHONPATH=src python -m benchmarks.flood MODEL --old CHECKOUT
    PYTHONPATH=src python -m benchmarks.flood MODEL --chat --connections 100 500 --within

Either so many connections ask again as soon as they are answered (--connections), or each request opens one of its own,
all within a second (--within). Beside the servers stands a uvicorn whose application says nothing but 429: on a machine
where client and server share the cores, no server of the kind is faster. It is asked again while another process takes
a core, as the engine of a server does that has 429 to say ("bare, busy").
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop
from benchmarks.cpu_servers import NAME, Running, Server, octavo_server, running

SEATS = 32
PLACES = 100
COMPLETION = {"prompt": "The capital of", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
QUESTION = "Write three sentences about the sea, and say why it is blue."
CONVERSATION = {
    "messages": [{"role": "system", "content": "You help. " * 40}, {"role": "user", "content": QUESTION}],
    "max_tokens": 64,
}
BARE = """
import sys, uvicorn
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"2"), (b"retry-after", b"1")]
async def app(scope, receive, send):
    status = 429 if (b"user-agent", b"OpenAI/Python") in scope["headers"] else 200
    await send({"type": "http.response.start", "status": status, "headers": HEADERS})
    await send({"type": "http.response.body", "body": b"{}"})
uvicorn.run(app, port=int(sys.argv[1]), log_level="error", lifespan="off", http="httptools", access_log=False)
"""


@dataclass(frozen=True)
class Answered:
    """One request: its status, the seconds until its response was there, and whether that said when to come again."""

    status: int
    seconds: float
    says_when: bool


class Client(asyncio.Protocol):
    """A connection that sends the same request `count` times, each as soon as the one before is answered."""

    def __init__(self, request: bytes, count: int, begun: float, answers: list[Answered]) -> None:
        self._request = request
        self._left = count
        self._begun = begun
        self._answers = answers
        self._received = b""
        self.is_over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        lengths = [int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")]
        if not end or len(body) < lengths[0]:
            return
        seconds = time.perf_counter() - self._begun
        self._answers.append(Answered(int(head[9:12]), seconds, b"retry-after" in head.lower()))
        self._received = b""
        self._left -= 1
        if self._left:
            self._begun = time.perf_counter()
            self._transport.write(self._request)
        else:
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if self._left:
            self._answers.append(Answered(0, time.perf_counter() - self._begun, says_when=False))
        if not self.is_over.done():
            self.is_over.set_result(None)


async def flood(port: int, request: bytes, num_requests: int, num_connections: int | None) -> list[Answered]:
    """The answers to so many requests; num_connections None: each over its own, all begun within a second."""
    loop = asyncio.get_running_loop()
    answers: list[Answered] = []

    async def one(count: int) -> None:
        client = Client(request, count, time.perf_counter(), answers)
        await loop.create_connection(lambda: client, "127.0.0.1", port)
        await client.is_over

    if num_connections is not None:
        await asyncio.gather(*(one(num_requests // num_connections) for _ in range(num_connections)))
        return answers
    begun = time.perf_counter()
    tasks = []
    for number in range(num_requests):
        early = begun + number / num_requests - time.perf_counter()
        if early > 0 or number % 8 == 0:
            await asyncio.sleep(max(0.0, early))
        tasks.append(loop.create_task(one(1)))
    await asyncio.gather(*tasks)
    return answers


def told(name: str, answers: list[Answered]) -> str:
    """What came, in one line."""
    refused = sorted(answer.seconds for answer in answers if answer.status == 429)
    num_served = sum(answer.status == 200 for answer in answers)
    num_others = len(answers) - num_served - len(refused)
    line = f"{name:10s} served {num_served:5d}, refused {len(refused):5d}, other {num_others}"
    if not refused:
        return line
    p99 = refused[int(0.99 * (len(refused) - 1))]
    soon = sum(seconds <= 0.1 for seconds in refused) / len(refused)
    says_when = all(answer.says_when for answer in answers if answer.status == 429)
    return (
        f"{line}; 429 after ms: median {1e3 * statistics.median(refused):.1f}, p99 {1e3 * p99:.1f}, within 100 ms "
        f"{soon:.1%}{'' if says_when else '; some without Retry-After'}"
    )


def request_of(*, chat: bool) -> bytes:
    """A request as the OpenAI SDK sends it."""
    body = json.dumps((CONVERSATION if chat else COMPLETION) | {"model": NAME}).encode()
    head = (
        f"POST /v1/{'chat/' if chat else ''}completions HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: OpenAI/Python\r\n"
        "Accept: application/json\r\nAccept-Encoding: gzip, deflate\r\nAuthorization: Bearer none\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@contextlib.contextmanager
def all_running(args: argparse.Namespace) -> Iterator[dict[str, Running]]:
    """The bare server, and octavo of each checkout; those that are not asked take no time of the cores."""
    flags = ("--max-num-seqs", str(SEATS), "--max-queued-requests", str(PLACES), "--num-threads", "1")
    program = BARE.replace("{", "{{").replace("}", "}}")  # a command is a format
    servers = [Server("bare", (sys.executable, "-c", program, "{port}"))]
    for name, checkout in {"old": args.old, "new": Path.cwd()}.items():
        if checkout is not None:
            server = octavo_server(name, args.model, *flags)
            path = {"PYTHONPATH": str(checkout.resolve() / "src")}
            servers.append(Server(name, server.command, environment=path))
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as logs:
        yield {server.name: stack.enter_context(running(server, Path(logs) / server.name)) for server in servers}


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """A process that does nothing else than to take its core."""
    process = multiprocessing.get_context("fork").Process(target=_spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _spin() -> None:
    while True:
        pass


def port_of(server: Running) -> int:
    port = urlsplit(server.url).port
    assert port is not None
    return port


def main() -> None:
    """Measure, and print a line for each server and load."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--old", type=Path, help="another checkout of octavo")
    parser.add_argument("--chat", action="store_true", help="conversations, not completions")
    parser.add_argument("--connections", type=int, nargs="*", default=[100, 500])
    parser.add_argument("--within", action="store_true", help="also new connections, all within a second")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    request = request_of(chat=args.chat)
    loads: list[int | None] = [*args.connections, *([None] if args.within else [])]
    with all_running(args) as servers:
        for server in servers.values():
            uvloop.run(flood(port_of(server), request, 200, 50))  # they warm up
        for number in range(args.rounds):
            print(f"round {number + 1}, load average {os.getloadavg()[0]:.1f}", flush=True)
            for load in loads:
                print("new connections within a second" if load is None else f"{load} connections", flush=True)
                for name, server in servers.items():
                    for beside in (False, True) if name == "bare" else (False,):
                        with busy_core() if beside else contextlib.nullcontext():
                            answers = uvloop.run(flood(port_of(server), request, args.requests, load))
                        print(told(f"{name}, busy" if beside else name, answers), flush=True)
                        time.sleep(1)


if __name__ == "__main__":
    main()
