"""The load: requests sent at their times, and a record of when each token of their answers came.

An event with a choice in it counts as a token's arrival, as in `vllm bench serve`. Exceptions are a chat's opening
event, which only names the role, and a closing event with a finish_reason and no text, if it stands for no token. The
number of tokens comes from the server (usage), since an event may carry several.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import msgspec

from octavo.bench.http import Client, HttpError
from octavo.bench.sse import EventSplitter, error_message, http_error, one_line

ANSWER_SECONDS = 6 * 3600.0  # one answer may take as long as with vLLM's client
MAX_RAW = 8192  # bytes of an answer that are kept in case it is an error
DONE = b"[DONE]"


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, gc=False):
    """The server's own counts."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: Any = None
    object: str | None = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class Record:
    """One request. Times are perf_counter's seconds; prompt_len is what was asked for, where that is known."""

    prompt_len: int | None
    start: float = 0.0
    token_times: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    usage: Usage | None = None
    finish_reason: str | None = None
    closed_empty: bool = False  # the last event had a finish_reason, and no text
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first token; 0 where none came."""
        return self.token_times[0] - self.start if self.token_times else 0.0

    @property
    def latency(self) -> float:
        """Seconds from sending to the last token; 0 where none came."""
        return self.token_times[-1] - self.start if self.token_times else 0.0

    @property
    def itls(self) -> list[float]:
        """Seconds between one event with tokens and the next; 0 for two that came in one piece."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def counted_by_server(self) -> bool:
        """True if the server said how many tokens it generated."""
        return self.usage is not None and self.usage.completion_tokens is not None

    @property
    def output_len(self) -> int:
        """Tokens generated: the server's count, or the number of events that carried some."""
        if self.usage is not None and self.usage.completion_tokens is not None:
            return self.usage.completion_tokens
        return len(self.token_times)

    @property
    def input_len(self) -> int:
        """Tokens of the prompt: the server's count, or as many as were asked for, or 0 where nobody knows."""
        if self.usage is not None and self.usage.prompt_tokens is not None:
            return self.usage.prompt_tokens
        return self.prompt_len or 0

    @property
    def cached_len(self) -> int | None:
        """Tokens of the prompt that the server had cached, where it says so."""
        details = self.usage.prompt_tokens_details if self.usage else None
        return details.cached_tokens if details else None


@dataclass(frozen=True)
class Request:
    """A request, ready to be sent."""

    body: bytes
    prompt_len: int | None


@dataclass(frozen=True)
class LoadResult:
    """The result of a load: the requests that ended, in the order in which they were made, and the seconds it took."""

    records: list[Record]
    duration: float
    num_unfinished: int = 0


def arrival_times(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Seconds after the start at which to send each request: gaps from a gamma distribution, exponential at 1.

    They are stretched to end at count / rate exactly, as vLLM does, so that seeds differ in the order of gaps only.
    """
    if rate == float("inf"):
        return [0.0] * count
    times = []
    now = 0.0
    for _ in range(count):
        now += rng.gammavariate(burstiness, 1 / (rate * burstiness))
        times.append(now)
    return [time * (count / rate) / now for time in times]


async def run_load(
    client: Client,
    path: str,
    requests: Sequence[Request],
    *,
    arrivals: Sequence[float],
    max_concurrency: int | None,
    stop: asyncio.Event,
    on_done: Callable[[Record], None],
) -> LoadResult:
    """Send all requests at their times, at most `max_concurrency` at once, until all have ended or `stop` is set.

    Requests that are still open then are cut off (the server sees their connections close) and not in the result.
    """
    records: list[Record | None] = [None] * len(requests)
    gate = asyncio.Semaphore(max_concurrency or len(requests))
    begun = perf_counter()

    async def one(i: int) -> None:
        async with gate:
            record = await ask(client, path, requests[i])
        records[i] = record
        on_done(record)

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for i, arrival in enumerate(arrivals):
                if (wait := begun + arrival - perf_counter()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(one(i))

    load = asyncio.create_task(all_of_them())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((load, stopped), return_when=asyncio.FIRST_COMPLETED)
        duration = perf_counter() - begun
    finally:
        load.cancel()
        stopped.cancel()
        await asyncio.wait((load, stopped))
    if not load.cancelled():
        load.result()
    ended = [record for record in records if record is not None]
    return LoadResult(ended, duration, len(requests) - len(ended))


async def ask(client: Client, path: str, request: Request) -> Record:
    """Send one request and read its answer to the end; whatever goes wrong is in the record's error."""
    record = Record(request.prompt_len)
    splitter = EventSplitter()
    raw = bytearray()

    def sink(now: float, piece: bytes) -> None:
        if len(raw) < MAX_RAW:
            raw.extend(piece)
        for data in splitter.feed(piece):
            _take(record, now, data)

    record.start = perf_counter()
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            answer = await client.send("POST", path, request.body, sink)
    except TimeoutError:
        record.error = f"no end of the answer within {ANSWER_SECONDS / 3600:.0f} h"
    except HttpError as e:
        record.error = record.error or str(e)
    else:
        if answer.status != 200:
            record.error = http_error(answer.status, bytes(raw))
        elif answer.content_type != "text/event-stream":
            record.error = (
                f"the answer is no event stream but {answer.content_type!r}: {one_line(raw.decode('latin-1'))}"
            )
        record.error = record.error or _close(record)
    return record


def _take(record: Record, now: float, data: bytes) -> None:
    """Take one event into the record."""
    if data == DONE:
        record.finish_reason = record.finish_reason or "unknown"
        return
    try:
        event = _decode(data)
    except msgspec.MsgspecError as e:
        record.error = (
            record.error or f"an event of the stream is not as OpenAI's: {e}: {one_line(data.decode('latin-1'))}"
        )
        return
    if event.error or event.object == "error":
        body = msgspec.json.decode(data)
        record.error = record.error or f"in mid-stream: {error_message(body) or one_line(data.decode('latin-1'))}"
        return
    if event.usage is not None:
        record.usage = event.usage
    if not event.choices:
        return
    choice = event.choices[0]
    delta = choice.delta
    text = choice.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning)) or ""
    if choice.finish_reason:
        record.finish_reason = choice.finish_reason
    if text:
        record.pieces.append(text)
    elif delta and delta.role and not choice.finish_reason:
        return
    record.closed_empty = not text and choice.finish_reason is not None
    record.token_times.append(now)


def _close(record: Record) -> str | None:
    """Drop a closing event that stands for no token. Returns why an answer without an error is incomplete."""
    if record.closed_empty and len(record.token_times) > 1:
        counted = record.output_len if record.counted_by_server else None
        surplus = record.finish_reason == "length" if counted is None else len(record.token_times) > counted
        if surplus:
            record.token_times.pop()
    if record.finish_reason is None:
        return "the stream ended before the answer did (no finish_reason, no [DONE])"
    if not record.token_times:
        return "the stream ended without a token"
    return None
