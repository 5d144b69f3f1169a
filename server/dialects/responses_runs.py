"""Responses that run in the background: tasks of the server, which go on whether or not anybody reads them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from octavo.server.dialects.responses_answer import NOT_STORED, ResponseAnswer
from octavo.server.errors import ApiError
from octavo.server.generation import Steps

MOST_RUNS = 1024  # each holds its events until it has ended
MOST_LOST = 64  # that have ended and could not be stored: the last ones are told about

Json = dict[str, Any]


class Run:
    """One response under way, and those who follow its events."""

    def __init__(self, answer: ResponseAnswer, owner: str) -> None:
        self.answer = answer
        self.owner = owner
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, steps: Steps) -> asyncio.Task[None]:
        """Begin to make the answer."""
        self._task = asyncio.get_running_loop().create_task(self._make(steps))
        return self._task

    async def cancel(self) -> None:
        """End it where it is; its requests are aborted in the engine by then."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def now(self) -> Json:
        """The response as it is; where it has ended, as soon as it is known whether it could be stored."""
        if self.answer.has_ended and self._task is not None:
            await asyncio.wait((self._task,))
        return self.answer.object()

    async def follow(self, start: int) -> AsyncGenerator[bytes, None]:
        """The events from this number on, as they come."""
        log = self.answer.log
        while True:
            news = self._news
            if pieces := log[start:]:
                start += len(pieces)
                yield b"".join(pieces)
            elif self.answer.is_over:
                return
            else:
                await news.wait()

    async def _make(self, steps: Steps) -> None:
        try:
            async with aclosing(self.answer.events(steps)) as events:
                async for _ in events:
                    self._tell()
        finally:
            self._tell()

    def _tell(self) -> None:
        news = self._news
        self._news = asyncio.Event()
        news.set()


class Runs:
    """All that run, by id."""

    def __init__(self) -> None:
        self._by_id: dict[str, Run] = {}
        self._lost: dict[str, Run] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, response_id: str, owner: str) -> Run | None:
        """The one of this id, if it is this owner's, and still runs or could not be stored."""
        run = self._by_id.get(response_id) or self._lost.get(response_id)
        return run if run is not None and run.owner == owner else None

    def check(self) -> None:
        """Whether one more may run. Raises ApiError."""
        if len(self._by_id) >= MOST_RUNS:
            raise ApiError(
                429,
                f"{MOST_RUNS} responses run in the background, which is all that may; try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    def start(self, run: Run, steps: Steps) -> None:
        """Let it run until it ends."""
        response_id = run.answer.id
        self._by_id[response_id] = run
        run.start(steps).add_done_callback(lambda _: self._end(response_id))

    def forget(self, response_id: str) -> None:
        """Drop one that could not be stored."""
        self._lost.pop(response_id, None)

    def _end(self, response_id: str) -> None:
        run = self._by_id.pop(response_id)
        if run.answer.error is not None and run.answer.error.code == NOT_STORED:
            if len(self._lost) >= MOST_LOST:
                del self._lost[next(iter(self._lost))]
            self._lost[response_id] = run
