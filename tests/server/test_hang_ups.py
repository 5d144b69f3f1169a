"""Clients of all dialects at once, of whom a third hangs up at any point: nothing of theirs is left.

The slow case (a thousand) runs with `pytest -m slow`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from calling_template import TEMPLATE
from octavo_server import PATIENCE, Server, num_in_flight, serving, value, wait_until
from slow_cases import slow
from task_census import census, census_environment

Json = dict[str, Any]
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Bern", "Basel"]}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "d", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]
HI = [{"role": "user", "content": "Hi"}]
AT_ONCE = 24
HANG_UPS = 0.3

CHAT: Json = {"model": "tiny", "messages": HI, "max_tokens": 30, "ignore_eos": True}
COMPLETION: Json = {"model": "tiny", "prompt": "The capital of", "max_tokens": 30, "ignore_eos": True}
RESPONSE: Json = {"model": "tiny", "input": "Hi", "max_output_tokens": 30, "ignore_eos": True}
MESSAGE: Json = {"model": "tiny", "messages": HI, "max_tokens": 30, "ignore_eos": True}
NATIVE: Json = {"text": "The", "sampling_params": {"max_new_tokens": 30, "ignore_eos": True}}
OLLAMA: Json = {"model": "tiny", "options": {"num_predict": 30}}
ASKED: list[tuple[str, Json]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"n": 3, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", CHAT | {"tools": TOOLS, "tool_choice": "required"}),
    ("/v1/chat/completions", CHAT | {"tools": TOOLS, "parallel_tool_calls": False}),
    (
        "/v1/chat/completions",
        CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    ),
    ("/v1/completions", COMPLETION),
    ("/v1/completions", COMPLETION | {"prompt": ["a", "b c"], "n": 2, "echo": True, "logprobs": 1}),
    ("/v1/completions", COMPLETION | {"n": 3, "use_beam_search": True, "max_tokens": 8, "temperature": 0}),
    ("/v1/completions", COMPLETION | {"structured_outputs": {"regex": "[a-f]{30}"}}),
    ("/v1/completions", COMPLETION | {"prompt": [7] * 300, "prompt_logprobs": 1}),
    ("/v1/responses", RESPONSE),
    ("/v1/responses", RESPONSE | {"store": False}),
    ("/v1/responses", RESPONSE | {"background": True}),
    ("/v1/responses", RESPONSE | {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"}),
    ("/v1/messages", MESSAGE),
    (
        "/v1/messages",
        MESSAGE | {"tools": [{"name": "w", "input_schema": SCHEMA}], "tool_choice": {"type": "tool", "name": "w"}},
    ),
    ("/api/chat", OLLAMA | {"messages": HI}),
    ("/api/chat", OLLAMA | {"messages": HI, "format": SCHEMA}),
    ("/api/generate", OLLAMA | {"prompt": "Hi", "raw": True}),
    ("/generate", NATIVE),
    ("/generate", NATIVE | {"text": ["a", "b"], "return_logprob": True}),
    ("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 20, "n": 2, "json_schema": json.dumps(SCHEMA)}}),
]


@dataclass(frozen=True)
class Call:
    """One client. Where it hangs up: behind so many bytes of its request, or of the answer; None: nowhere."""

    number: int
    path: str
    body: Json
    sends: float | None
    reads: int | None
    resets: bool

    @property
    def hangs_up(self) -> bool:
        return self.sends is not None or self.reads is not None

    @property
    def may_be_stored(self) -> bool:
        """Whether its response may be there afterwards. One that isn't streamed is, if it had ended by the hang-up."""
        return self.path == "/v1/responses" and bool(self.body.get("store", True)) and self.sends is None


def calls(count: int, seed: int) -> list[Call]:
    draw = random.Random(seed)
    made = []
    for number in range(count):
        path, body = draw.choice(ASKED)
        body = body | {"stream": draw.random() < 0.7}
        if path == "/v1/responses":
            body |= {"metadata": {"number": str(number)}}
        sends = reads = None
        if draw.random() < HANG_UPS:
            if draw.random() < 0.2:
                sends = draw.random()
            else:
                reads = draw.choice((0, 1, 200, 500, 1000, 3000))
        made.append(Call(number, path, body, sends, reads, draw.random() < 0.5))
    return made


async def ask(port: int, call: Call) -> bytes:
    """The answer with its head, as far as the client has read it."""
    content = json.dumps(call.body).encode()
    head = f"POST {call.path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    request = f"{head}content-length: {len(content)}\r\n\r\n".encode() + content
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request if call.sends is None else request[: int(call.sends * len(request))])
    await writer.drain()
    answer = b""
    if call.sends is None:
        while call.reads is None or len(answer) < call.reads:
            piece = await reader.read(65536 if call.reads is None else call.reads - len(answer))
            if not piece:
                break
            answer += piece
    if call.hangs_up and call.resets:
        writer.transport.abort()
    else:
        writer.close()
    return answer


async def ask_all(port: int, asked: list[Call]) -> list[bytes]:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(call: Call) -> bytes:
        async with places, asyncio.timeout(PATIENCE):
            return await ask(port, call)

    return list(await asyncio.gather(*map(one, asked)))


ENDS = {
    "/v1/chat/completions": b"[DONE]",
    "/v1/completions": b"[DONE]",
    "/generate": b"[DONE]",
    "/v1/messages": b"message_stop",
    "/api/chat": b'"done":true',
    "/api/generate": b'"done":true',
}


def check(call: Call, answer: bytes) -> None:
    """Whoever stays gets all of it."""
    if call.hangs_up:
        return
    shown = f"{call}: {answer[-2000:]!r}"
    assert answer.startswith(b"HTTP/1.1 200"), shown
    if call.body["stream"]:
        ends = (ENDS.get(call.path, b""),) if call.path in ENDS else (b"response.completed", b"response.incomplete")
        assert any(end in answer[-20_000:] for end in ends), shown
        assert b"internal error" not in answer, shown


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def num_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def check_idle(server: Server, client: httpx.Client, tasks: dict[str, int], descriptors: int) -> None:
    """Nothing is open, held or under way."""
    wait_until(lambda: num_in_flight(client) == 0)
    wait_until(lambda: client.get("/load").json()["server_load"] == 0)
    assert value(client, "vllm:kv_cache_usage_perc") == 0
    wait_until(lambda: census(server) == tasks)
    wait_until(lambda: num_descriptors(server.process.pid) == descriptors)


def check_store(path: Path, asked: list[Call]) -> None:
    """What is kept has ended, each once, and nothing is kept that was not asked for whole, or not to be kept."""
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT response, active FROM responses").fetchall()
    kept: Counter[int] = Counter()
    for content, active in rows:
        response = json.loads(content)
        assert not active, response
        assert response["status"] in ("completed", "incomplete", "cancelled", "failed"), response
        assert response["error"] is None or response["status"] == "cancelled", response
        kept[int(response["metadata"]["number"])] += 1
    assert set(kept.values()) == {1}
    stayed = {call.number for call in asked if call.may_be_stored and not call.hangs_up}
    assert stayed <= set(kept) <= {call.number for call in asked if call.may_be_stored}


@pytest.mark.parametrize(("count", "seed"), [(50, 1), slow(1_000, 2)])
def test_who_hangs_up_leaves_nothing(tmp_path: Path, count: int, seed: int) -> None:
    store = tmp_path / "responses.sqlite"
    flags = ("--served-model-name", "tiny", "--chat-template", TEMPLATE, "--response-store", str(store))
    small = ("--max-num-seqs", "12", "--num-gpu-blocks-override", "60")  # so that some wait, and some give way
    asked = calls(count, seed)
    with serving(*flags, *small, environment=census_environment(tmp_path)) as server, server.client() as client:
        port = int(server.url.rpartition(":")[2])
        pid = server.process.pid
        client.get("/health")
        for call, answer in zip(asked[:AT_ONCE], asyncio.run(ask_all(port, asked[:AT_ONCE])), strict=True):
            check(call, answer)
        wait_until(lambda: num_in_flight(client) == 0)
        tasks = census(server)
        descriptors = num_descriptors(pid)
        sizes = []
        for part in (asked[AT_ONCE : count // 2], asked[max(AT_ONCE, count // 2) :]):
            for call, answer in zip(part, asyncio.run(ask_all(port, part)), strict=True):
                check(call, answer)
            check_idle(server, client, tasks, descriptors)
            sizes.append(resident_bytes(pid))
        assert sizes[1] < sizes[0] + (8 << 20), sizes  # an allocator's own arenas
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert "Traceback" not in server.said
        server.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
    check_store(store, asked)
