"""What the client of octavo bench costs and adds: its CPU time, and how late it sees tokens, at many streams.

    PYTHONPATH=src python -m benchmarks.client_overhead [--streams 1000] [--rate 50] [--tokens 250] [--steps]

A scripted server, which is another process, gives each of a number of concurrent streams so many tokens a second, in
events as long as vLLM's. Requests come in an open load, so that the number under way is steady; what is measured begins
when it is. Each event says when it was written, on the clock that both processes read (CLOCK_MONOTONIC), so that what
the client adds is known to the request:

    added to TTFT  (first token seen - time meant for sending) - (first token written - request read)
    seen late      token seen - token written, of all tokens
    cores          CPU time of the client's process, per second

With --steps all streams get their tokens at the same time, as an engine's steps write them; without, each at its own.
The server needs a core of its own, and a quiet machine. Not part of octavo.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import multiprocessing
import os
import random
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter

import numpy as np
import uvloop

from octavo.bench.http import Client
from octavo.bench.prompts import Prompt
from octavo.bench.run import Point, Target, Warmup, run_point
from octavo.commands.bench_load import allow_many_sockets

FIRST_TOKEN_SECONDS = 0.05
MAX_WRITES = 8  # before it looks for requests again: what it reads late would count as the client's
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1764460800,'
    b'"model":"scripted/model","choices":[{"index":0,"text":"%.7f","logprobs":null,"finish_reason":%s,'
    b'"stop_reason":null}],"usage":null}\n\n'
)
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":%d}}\n\ndata: [DONE]\n\n'


def chunk(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


@dataclass(slots=True)
class Stream:
    """An answer under way: when its next token is due, and how many are left. read: when the request was."""

    send: Callable[[bytes], int]
    read: float
    due: float
    left: int
    begun: bool = False

    def __lt__(self, other: Stream) -> bool:
        return self.due < other.due


class Server:
    """Reads requests and writes tokens when they are due, in one thread without a library's overhead."""

    def __init__(self, tokens: int, rate: float, steps: bool) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._tokens = tokens
        self._gap = 1 / rate
        self._steps = steps
        self._poll = select.epoll()
        self._poll.register(self._listener.fileno(), select.EPOLLIN)
        self._sockets: dict[int, socket.socket] = {}
        self._cut: dict[int, bytes] = {}
        self._streams: list[Stream] = []

    def run(self) -> None:
        """For ever."""
        while True:
            wait = self._streams[0].due - perf_counter() if self._streams else 1.0
            if wait > 0:  # epoll counts milliseconds, select microseconds
                select.select([self._poll], [], [], wait)
            for descriptor, _ in self._poll.poll(0):
                self._accept() if descriptor == self._listener.fileno() else self._read(descriptor)
            for _ in range(MAX_WRITES):
                if not self._streams or self._streams[0].due > perf_counter():
                    break
                stream = self._streams[0]
                self._write(stream)
                if stream.left:
                    heapq.heapreplace(self._streams, stream)
                else:
                    heapq.heappop(self._streams)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
            self._sockets[connection.fileno()] = connection
            self._poll.register(connection.fileno(), select.EPOLLIN)

    def _read(self, descriptor: int) -> None:
        connection = self._sockets[descriptor]
        try:
            data = self._cut.pop(descriptor, b"") + connection.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            self._poll.unregister(descriptor)
            self._sockets.pop(descriptor).close()
            return
        now = perf_counter()
        head, end, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if not end or len(body) < length:
            self._cut[descriptor] = data
            return
        due = now + FIRST_TOKEN_SECONDS
        if self._steps:
            due = (due // self._gap + 1) * self._gap
        heapq.heappush(self._streams, Stream(connection.send, now, due, self._tokens))

    def _write(self, stream: Stream) -> None:
        now = perf_counter()
        stream.left -= 1
        # the first event says how long the server took itself
        text = now if stream.begun else now - stream.read
        data = chunk(EVENT % (text, b"null" if stream.left else b'"length"'))
        if not stream.begun:
            data = HEAD + data + chunk(EVENT % (now, b"null"))
            stream.begun = True
        if not stream.left:
            data += chunk(USAGE % self._tokens) + b"0\r\n\r\n"
        stream.due += self._gap
        stream.send(data)


def serve(tokens: int, rate: float, steps: bool, pipe: Connection) -> None:
    """Be the server."""
    allow_many_sockets()
    server = Server(tokens, rate, steps)
    pipe.send(server.port)
    server.run()


@dataclass
class Sampled:
    """CPU seconds, those of them in the kernel, and the time in which they were used."""

    cpu: float = 0.0
    system: float = 0.0
    seconds: float = 0.0


async def measure(port: int, args: argparse.Namespace) -> None:
    """The load, and its figures."""
    lasts = args.tokens / args.rate  # seconds of a stream
    arrivals = args.streams / lasts
    warm = lasts + 0.5
    point = Point(rate=arrivals, seconds=args.seconds, warmup=Warmup(seconds=warm))
    prompts = [Prompt("The", 3, args.tokens) for _ in range(point.prompts_needed())]
    sampled = Sampled()

    async def sample() -> None:
        await asyncio.sleep(warm)
        before = os.times()
        begun = perf_counter()
        await asyncio.sleep(args.seconds)
        sampled.seconds = perf_counter() - begun
        after = os.times()
        sampled.system = after.system - before.system
        sampled.cpu = after.user - before.user + sampled.system

    client = Client(f"http://127.0.0.1:{port}")
    sampling = asyncio.create_task(sample())
    result = await run_point(client, Target("scripted/model"), prompts, point, rng=random.Random(args.seed))
    await sampling
    failed = [record.error for record in (*result.records, *result.others) if record.error]
    assert not failed, failed[0]
    records = result.records
    taken = [float(record.pieces[0]) for record in records]
    added = [record.ttft - own for record, own in zip(records, taken, strict=True)]
    # the second piece, which came with the first, and all others say when they were written
    late = [
        seen - float(written)
        for record in records
        for seen, written in zip(record.token_times[1:], record.pieces[1:], strict=False)
    ]
    within = sum(result.begin <= t < result.until for r in (*records, *result.others) for t in r.token_times)
    print(f"streams under way: {args.streams} on average; {within / args.seconds:,.0f} tokens/s seen")
    print(
        f"client: {sampled.cpu / sampled.seconds:.2f} cores ({sampled.system / sampled.seconds:.2f} in the kernel), "
        f"{1e6 * sampled.cpu / within:.1f} us a token"
    )
    for name, values in (
        ("added to TTFT", added),
        ("of that, sent late", [record.lag for record in records]),
        ("tokens seen late", late),
    ):
        p50, p99 = np.percentile(values, [50, 99]) * 1e3
        print(f"{name}: mean {np.mean(values) * 1e3:.3f} ms, P50 {p50:.3f}, P99 {p99:.3f} ({len(values)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=50, help="tokens a second of a stream")
    parser.add_argument("--tokens", type=int, default=250, help="of a stream")
    parser.add_argument("--seconds", type=float, default=5, help="that are measured")
    parser.add_argument("--steps", action="store_true", help="all streams' tokens at one time, as of an engine's step")
    parser.add_argument("--cores", type=int, nargs=2, help="of the server and of the client", metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    allow_many_sockets()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(args.tokens, args.rate, args.steps, theirs), daemon=True)
    server.start()
    if args.cores:
        os.sched_setaffinity(server.pid or 0, {args.cores[0]})
        os.sched_setaffinity(0, {args.cores[1]})
    try:
        uvloop.run(measure(ours.recv(), args))
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
