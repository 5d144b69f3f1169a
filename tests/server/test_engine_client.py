"""A stream's memory is bounded, whoever does not read it."""

from __future__ import annotations

import asyncio

import pytest

from octavo.runtime.messages import AddRequest, SamplingParams, TokenOutput
from octavo.server import engine_client
from octavo.server.engine_client import EngineDeadError, Stream


class Engine:
    """What a stream sees of its client: requests that come and go."""

    def __init__(self) -> None:
        self.aborted: list[str] = []

    def _add(self, stream: Stream, requests: list[AddRequest]) -> None:
        pass

    def _abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids


def request(name: str) -> AddRequest:
    return AddRequest(name, [1], SamplingParams(max_tokens=100), 0.0)


def test_what_is_not_read_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "MAX_PENDING", 3)

    async def read() -> None:
        engine = Engine()
        async with Stream(engine, [request("a"), request("b")]) as stream:  # type: ignore[arg-type]
            for _ in range(3):
                stream._put(TokenOutput("a", [1]))
            assert len(await stream.next()) == 3
            stream._put(TokenOutput("a", [1], finish_reason="length"))
            for _ in range(9):
                stream._put(TokenOutput("b", [1]))
            assert engine.aborted == ["b"]
            with pytest.raises(EngineDeadError, match="not read"):
                await stream.next()
        assert engine.aborted == ["b"]

    asyncio.run(read())
