"""A stream's memory is bounded, whoever does not read it."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from octavo.runtime.messages import (
    AddRequest,
    EngineStats,
    Logprobs,
    Ready,
    SamplingParams,
    StartupReport,
    StepOutputs,
    TokenOutput,
)
from octavo.server.engine_client import EngineDeadError
from octavo.server.fleet import fleet, stream
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.limits import FleetLimits
from octavo.server.fleet.stream import LOGPROBS_BYTES, OUTPUT_BYTES, TOP_BYTES, num_bytes

STATS = EngineStats(0, 0, 0.0, 0, 0, 0, 0)
READY = Ready(64, 4, 16, 1024, StartupReport("m", "m", "float32", "cpu", "float32", [], 0, 0, {}))


class Process:
    """An engine process that is there and says nothing."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.process = self
        self.ended = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def wait(self) -> int:
        asyncio.run_coroutine_threadsafe(self.ended.wait(), self.loop).result()
        return 0

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.ended.set)


def run(test: Callable[[Fleet], Awaitable[None]], address: str) -> None:
    async def inside() -> None:
        process = Process(f"ipc://{address}")
        client = Fleet([process], lambda _: process)  # type: ignore[arg-type,list-item,return-value]
        client.members[0].come_up(READY)
        try:
            await test(client)
        finally:
            await client.close()

    asyncio.run(inside())


@pytest.fixture
def address(tmp_path: object) -> str:
    return f"{tmp_path}/engine"


def request(name: str) -> AddRequest:
    return AddRequest(name, [1], SamplingParams(max_tokens=100), 0.0)


def output(name: str, num_logprobs: int = 0, finish_reason: str | None = None) -> TokenOutput:
    """An output that brings a prompt's log-probabilities, each with 20 likely tokens."""
    entry = Logprobs(1, -1.0, 1, list(range(20)), [-1.0] * 20)
    prompt = [None, *[entry] * num_logprobs] if num_logprobs else None
    return TokenOutput(name, [1], finish_reason, prompt_logprobs=prompt)  # type: ignore[arg-type]


def step(client: Fleet, *outputs: TokenOutput) -> None:
    client._take_step(client.members[0], StepOutputs(list(outputs), STATS))


def test_what_is_not_read_ends_in_an_error(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(stream, "MAX_PENDING", 3 * OUTPUT_BYTES)

    async def test(client: Fleet) -> None:
        async with client.open([request("a"), request("b")]) as mine:
            step(client, *[output("a")] * 3)
            assert len(await mine.next()) == 3
            assert client.num_pending == 0
            step(client, output("a", finish_reason="length"))
            step(client, *[output("b")] * 9)
            assert not mine.open_ids
            with pytest.raises(EngineDeadError, match="not read"):
                await mine.next()
        assert client.num_pending == 0

    run(test, address)


def test_a_reader_that_is_no_client_gets_all(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(stream, "MAX_PENDING", OUTPUT_BYTES)
    monkeypatch.setattr(fleet, "MAX_ALL_PENDING", OUTPUT_BYTES)

    async def test(client: Fleet) -> None:
        client._limits = FleetLimits(keeps_all=True)
        async with client.open([request("a")]) as mine:
            step(client, *[output("a")] * 9)
            assert len(await mine.next()) == 9

    run(test, address)


def test_an_overflow_by_a_last_output_ends_one_stream_alone(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(stream, "MAX_PENDING", OUTPUT_BYTES)

    async def test(client: Fleet) -> None:
        async with client.open([request("a")]) as mine, client.open([request("b")]) as other:
            step(client, output("a"), output("a", finish_reason="stop"), output("b", finish_reason="stop"))
            assert [one.request_id for one in await other.next()] == ["b"]
            with pytest.raises(EngineDeadError, match="not read"):
                await mine.next()

    run(test, address)


def test_a_prompt_s_log_probabilities_count_by_their_size(address: str) -> None:
    """18 kB of a request made 846 MB of answers that nobody read."""

    async def test(client: Fleet) -> None:
        names = [f"r{number}" for number in range(1000)]
        async with client.open([request(name) for name in names]) as mine:
            for name in names:
                step(client, output(name, 2000))
                assert mine.num_pending <= stream.MAX_PENDING
            assert not mine.open_ids, "it has overflowed"

    run(test, address)


def test_one_output_is_kept_whatever_its_size(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(stream, "MAX_PENDING", 1)
    monkeypatch.setattr(stream, "MAX_AT_ONCE", 1)

    async def test(client: Fleet) -> None:
        async with client.open([request("a")]) as mine:
            for _ in range(3):
                step(client, output("a", 500))
                assert len(await mine.next()) == 1

    run(test, address)


def test_outputs_are_handed_out_in_bounded_pieces_and_in_order(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(stream, "MAX_AT_ONCE", 10 * OUTPUT_BYTES)

    async def test(client: Fleet) -> None:
        async with client.open([request("a")]) as mine:
            step(client, *[TokenOutput("a", [number]) for number in range(45)])
            pieces = [await mine.next() for _ in range(5)]
            assert [one.token_ids[0] for piece in pieces for one in piece] == list(range(45))
            assert max(map(len, pieces)) == 11
            assert client.num_pending == 0

    run(test, address)


def test_all_streams_together_are_bounded_by_ending_the_largest(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(fleet, "MAX_ALL_PENDING", 100 * OUTPUT_BYTES)

    async def test(client: Fleet) -> None:
        async with client.open([request("a")]) as small, client.open([request("b")]) as large:
            step(client, *[output("a")] * 10)
            step(client, *[output("b")] * 80, output("b", finish_reason="length"))
            step(client, *[output("a")] * 10)
            assert len(await small.next()) == 20
            with pytest.raises(EngineDeadError, match="not read"):
                await large.next()

    run(test, address)


def test_a_reader_that_leaves_takes_its_outputs_along(address: str) -> None:
    async def test(client: Fleet) -> None:
        async with client.open([request("a")]):
            step(client, *[output("a", 10)] * 3)
            assert client.num_pending > 0
        assert client.num_pending == 0
        assert not client._readers

    run(test, address)


@pytest.mark.parametrize("num_top", [0, 5, 20])
def test_sizes_are_those_that_objects_take(num_top: int) -> None:
    entry = Logprobs(5000, -1.5, 300, [5000 + i for i in range(num_top)], [-1.5 - i for i in range(num_top)])
    decoder = msgspec.msgpack.Decoder(TokenOutput)
    for one in (TokenOutput("request-1", [1000]), TokenOutput("request-1", [1], prompt_logprobs=[None, *[entry] * 99])):
        frames = [msgspec.msgpack.encode(one)] * 200
        tracemalloc.start()
        kept = [decoder.decode(frame) for frame in frames]
        taken = tracemalloc.get_traced_memory()[0] / len(kept)
        tracemalloc.stop()
        assert 0.8 < num_bytes(one) / taken < 1.3
    assert num_bytes(TokenOutput("a", [1], logprobs=[entry])) == OUTPUT_BYTES + LOGPROBS_BYTES + TOP_BYTES * num_top
