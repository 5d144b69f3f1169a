"""One batch: what is known of it, and its requests under way.

A line begins only while a quarter of the engine's places is free and nobody waits. When somebody else does wait, the
line that began last gives way, and is begun again later.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from typing import IO, Any, Literal

import msgspec
from starlette.types import ASGIApp

from octavo.server.batch_lines import Line, answer_line, done_ids, lines_of
from octavo.server.files import Files
from octavo.server.fleet.fleet import Fleet
from octavo.server.inner_call import post_within

POLL_SECONDS = 0.05
LATER_SECONDS = 1.0  # before a line is begun again
DAY_SECONDS = 86_400

Json = dict[str, Any]
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ENDED = ("failed", "completed", "expired", "cancelled")


class ServerEndsError(RuntimeError):
    """The server takes no requests any more."""


class Batch(msgspec.Struct):
    """One batch; times in seconds since the epoch.

    output, failures: the ids of the files that its answers are written to, which clients are told of at its end.
    """

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    output: str
    failures: str
    created_at: int
    metadata: dict[str, str] = {}
    keep_seconds: int | None = None
    status: Status = "validating"
    errors: list[Json] = []
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    times: dict[str, int] = {}
    output_file_id: str | None = None
    error_file_id: str | None = None

    def as_json(self) -> Json:
        """OpenAI's shape."""
        states = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.created_at + DAY_SECONDS,
            **{f"{state}_at": self.times.get(state) for state in states},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
            "usage": {
                "input_tokens": self.input_tokens,
                "input_tokens_details": {"cached_tokens": self.cached_tokens},
                "output_tokens": self.output_tokens,
                "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
                "total_tokens": self.input_tokens + self.output_tokens,
            },
        }

    def count(self, body: Any) -> None:
        """Add the tokens that an answer tells of, in whichever dialect."""
        usage = body.get("usage") if isinstance(body, dict) else None
        if not isinstance(usage, dict):
            return
        prompt: int = usage.get("input_tokens") or usage.get("prompt_tokens") or 0
        output: int = usage.get("output_tokens") or usage.get("completion_tokens") or 0
        details = usage.get("input_tokens_details") or usage.get("prompt_tokens_details") or {}
        own = usage.get("output_tokens_details") or usage.get("completion_tokens_details") or {}
        self.input_tokens += prompt
        self.output_tokens += output
        self.cached_tokens += details.get("cached_tokens") or 0
        self.reasoning_tokens += own.get("reasoning_tokens") or 0


class SpareCapacity:
    """Whether the engine has room that nobody else needs."""

    def __init__(self, client: Fleet, max_num_seqs: int) -> None:
        self._client = client
        self._limit = max(1, max_num_seqs - max_num_seqs // 4)
        self.num_running = 0  # lines, of all batches

    @property
    def is_there(self) -> bool:
        """Whether one more line may begin. One that has begun may not be open in the engine yet."""
        if self._client.asleep is not None:
            return False
        return max(self._client.num_open_everywhere, self.num_running) < self._limit and not self._somebody_waits

    @property
    def is_needed(self) -> bool:
        """Whether somebody else waits for the engine."""
        return self._client.num_open_everywhere > self.num_running and self._somebody_waits

    @property
    def is_over(self) -> bool:
        """Whether the engine takes nothing any more."""
        return self._client.is_ending

    @property
    def _somebody_waits(self) -> bool:
        stats = self._client.stats
        return self._client.num_open_everywhere > 0 and stats is not None and stats.num_waiting > 0


class BatchRun:
    """The requests of one batch under way. Use once."""

    def __init__(self, app: ASGIApp, files: Files, spare: SpareCapacity, batch: Batch) -> None:
        self._app = app
        self._files = files
        self._spare = spare
        self._batch = batch
        self._again: deque[Line] = deque()  # lines that gave way
        self._running: dict[asyncio.Task[tuple[int, bytes] | None], Line] = {}
        self._not_before = 0.0

    async def all(self) -> None:
        """Answer all lines that have no answer yet. Raises ServerEndsError."""
        batch = self._batch
        output = self._files.path(batch.output)
        failures = self._files.path(batch.failures)
        answered = await asyncio.to_thread(done_ids, output)
        failed = await asyncio.to_thread(done_ids, failures)
        batch.completed = len(answered)
        batch.failed = len(failed)
        lines = lines_of(self._files.path(batch.input_file_id), {batch.endpoint})
        rest = (line for line in lines if line.custom_id not in answered and line.custom_id not in failed)
        with closing(lines), output.open("ab") as answers, failures.open("ab") as errors:
            try:
                while self._begin(rest) or self._running:
                    await self._wait()
                    self._take(answers, errors)
                    self._give_way()
            finally:
                await self._end()

    def _begin(self, rest: Iterator[Line]) -> bool:
        """Begin lines as far as there is room; whether some may be left."""
        while self._spare.is_there and time.monotonic() >= self._not_before:
            line = self._again.popleft() if self._again else next(rest, None)
            if line is None:
                return False
            task = asyncio.get_running_loop().create_task(self._answer(line))
            self._running[task] = line
            self._spare.num_running += 1
            task.add_done_callback(self._count_end)
        return True

    def _count_end(self, _: object) -> None:
        self._spare.num_running -= 1

    async def _wait(self) -> None:
        if self._running:
            await asyncio.wait(self._running, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(POLL_SECONDS)

    async def _answer(self, line: Line) -> tuple[int, bytes] | None:
        """(status, what is written for it); None where it must be asked again. Raises ServerEndsError."""
        state = {"owner": self._batch.owner, "gives_way": True}
        body = msgspec.json.encode(line.body)
        status, request_id, content = await post_within(self._app, line.url, body, state)
        if status in (429, 503):
            if self._spare.is_over:
                raise ServerEndsError
            return None
        answer = msgspec.json.decode(content)
        if status == 200:
            self._batch.count(answer)
        return status, answer_line(line, status, request_id, answer)

    def _take(self, answers: IO[bytes], errors: IO[bytes]) -> None:
        """Write what has come."""
        for task in [task for task in self._running if task.done()]:
            line = self._running.pop(task)
            result = None if task.cancelled() else task.result()
            if result is None:
                self._again.append(line)
                self._not_before = time.monotonic() + LATER_SECONDS
                continue
            status, written = result
            file = answers if status == 200 else errors
            file.write(written)
            file.flush()
            self._batch.completed += status == 200
            self._batch.failed += status != 200

    def _give_way(self) -> None:
        """Let go of the line that began last, where somebody else needs its place."""
        if self._running and self._spare.is_needed:
            *_, last = self._running
            last.cancel()

    async def _end(self) -> None:
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
