"""A listener of vLLM's KV events at a real `octavo serve`: what it hears, and what it gets again that it has missed."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
import zmq
from octavo_server import PATIENCE, Server, serving
from vllm_kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, KVIndex, decode

CONFIG = (
    '{"enable_kv_cache_events": true, "endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "tcp://127.0.0.1:*", '
    '"topic": "kv@me"}'
)
BLOCK_SIZE = 16
END = b"\xff" * 8


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    limits = ("--num-gpu-blocks-override", "12", "--max-model-len", "160")
    with serving("--served-model-name", "tiny", "--kv-events-config", CONFIG, *limits) as server:
        yield server


class Listener:
    """A subscriber. batches: what it has heard, by number."""

    def __init__(self, server: Server, context: zmq.Context) -> None:
        (self.address,) = re.findall(r"KV events: (tcp://\S+)", server.said)
        (replay,) = re.findall(r"KV events, replayed: (tcp://\S+)", server.said)
        self.batches: dict[int, KVEventBatch] = {}
        self.index = KVIndex()
        self.socket = context.socket(zmq.SUB)
        self.socket.linger = 0
        self.socket.subscribe("kv@me")
        self.socket.connect(self.address)
        self.client = context.socket(zmq.DEALER)
        self.client.linger = 0
        self.client.rcvtimeo = int(PATIENCE * 1000)
        self.client.connect(replay)
        with server.client() as client:
            while not self.socket.poll(20):  # until the subscription has arrived: each reset is an event
                assert client.post("/reset_prefix_cache").status_code == 200
        self.hear()

    def hear(self) -> None:
        """Take what has come."""
        while self.socket.poll(500):
            topic, number, payload = self.socket.recv_multipart()
            assert topic == b"kv@me"
            batch = decode(payload)
            self.batches[int.from_bytes(number, "big")] = batch
            self.index.apply(batch)

    def events(self, since: int = 0) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
        """All events of the messages heard from this number on."""
        return [event for number in sorted(self.batches) if number >= since for event in self.batches[number].events]

    @property
    def next(self) -> int:
        return max(self.batches) + 1

    def replayed(self, begin: int) -> dict[int, KVEventBatch]:
        self.client.send_multipart([b"", begin.to_bytes(8, "big")])
        found = {}
        while True:
            empty, topic, number, payload = self.client.recv_multipart()
            if number == END:
                assert (empty, topic, payload) == (b"", b"", b"")
                return found
            assert (empty, topic) == (b"", b"kv@me")
            found[int.from_bytes(number, "big")] = decode(payload)


@pytest.fixture
def listener(server: Server) -> Iterator[Listener]:
    with zmq.Context() as context:
        listener = Listener(server, context)
        yield listener
        context.destroy(linger=0)


def complete(client: httpx.Client, prompt: list[int], max_tokens: int = 1, **fields: object) -> tuple[list[int], int]:
    """The answer's tokens, and how many of the prompt's were cached."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True}
    response = client.post("/v1/completions", json=body | fields)
    assert response.status_code == 200, response.text
    cached = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return response.json()["choices"][0]["token_ids"], cached


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def test_what_is_told_is_what_the_cache_finds(listener: Listener, client: httpx.Client) -> None:
    """By vLLM's classes, and by an index: what it says of a prompt is what the server counts as cached."""
    prompt = list(range(100, 140))
    begin = listener.next
    answer, cached = complete(client, prompt, max_tokens=9)
    listener.hear()
    assert cached == 0
    first, second = listener.events(begin)
    assert (first.token_ids, first.parent_block_hash) == (prompt[:32], None)
    assert (second.token_ids, second.parent_block_hash) == (prompt[32:] + answer[:8], first.block_hashes[-1])
    assert {first.medium, second.medium} == {"GPU"}
    begin = listener.next
    _, cached = complete(client, prompt + answer)
    listener.hear()
    assert cached == 48 == BLOCK_SIZE * len(listener.index.blocks)
    assert listener.events(begin) == []


def test_a_salt_is_told_with_the_first_block(listener: Listener, client: httpx.Client) -> None:
    begin = listener.next
    _, cached = complete(client, list(range(200, 240)), cache_salt="mine")
    listener.hear()
    (event,) = listener.events(begin)
    assert (event.extra_keys, cached) == ([("mine",), None], 0)


def test_what_makes_room_is_told_as_removed(listener: Listener, client: httpx.Client) -> None:
    """The cache has 12 blocks: after two prompts of 9 each, 12 are known at most, and the second's are."""
    for first in (300, 500):
        complete(client, [first + i for i in range(9 * BLOCK_SIZE)], max_tokens=1)
    listener.hear()
    assert any(isinstance(event, BlockRemoved) for event in listener.events())
    assert len(listener.index.blocks) <= 12
    _, cached = complete(client, [500 + i for i in range(9 * BLOCK_SIZE)], max_tokens=1)
    known = [tokens for block, (_, tokens) in listener.index.prefixes.items() if (0, block) in listener.index.blocks]
    assert cached == 8 * BLOCK_SIZE
    assert [500 + i for i in range(cached)] in known


def test_who_comes_late_gets_what_was_missed(listener: Listener, server: Server, client: httpx.Client) -> None:
    complete(client, list(range(700, 740)))
    listener.hear()
    missed = dict(listener.batches)
    with zmq.Context() as context:
        late = Listener(server, context)
        assert not missed.keys() & late.batches.keys()
        again = late.replayed(min(missed))
        assert {number: again[number] for number in missed} == missed
        assert sorted(again) == list(range(min(missed), late.next))
        index = KVIndex()
        for _, batch in sorted(late.replayed(0).items()):
            index.apply(batch)
        assert index.blocks == late.index.blocks
        context.destroy(linger=0)


def test_a_reset_is_told(listener: Listener, client: httpx.Client) -> None:
    complete(client, list(range(800, 840)))
    begin = listener.next
    client.post("/reset_prefix_cache")
    listener.hear()
    assert listener.events(begin)[-1] == AllBlocksCleared()
    assert listener.index.blocks == set()
