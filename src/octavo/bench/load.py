"""The load: requests sent at their times, and a record of when each token of their answers came.

A load is open or closed. In an open one each request has a time at which it is meant to be sent, whatever the server
does, and latencies count from that time (`Record.intended`): what a request waits for a free connection, for a place
under `max_concurrency` or for this client counts too. If latencies counted from the sending, a server that stalls would
hide the wait of all requests that it kept from being sent (coordinated omission). In a closed load a request is sent
when another one has ended, and latencies count from its sending.

The requests of a conversation follow each other (`Request.follows`): one is sent when the answer before it has ended,
after a pause to think in an open load. Its intended time counts from that end.

An event with a choice in it counts as a token's arrival, as in `vllm bench serve`. Exceptions are a chat's opening
event, which only names the role, and a closing event with a finish_reason and no text, if it stands for no token. The
number of tokens comes from the server (usage), since an event may carry several.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Annotated, Any

import msgspec

from octavo.bench.alarm import Alarm
from octavo.bench.http import Client, HttpError
from octavo.bench.sse import EventSplitter, error_message, one_line

ANSWER_SECONDS = 6 * 3600.0  # one answer may take as long as with vLLM's client
AHEAD_SECONDS = 0.1  # that a request is made ready before it is sent
MAX_RAW = 8192  # bytes of an answer that are kept in case it is an error
MAX_WHOLE = 1 << 26  # bytes of an answer that is no stream
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
    cached_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Usage(msgspec.Struct, gc=False):
    """The server's own counts."""

    prompt_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    completion_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: Any = None
    object: str | None = None


class _Whole(msgspec.Struct, gc=False):
    data: list[msgspec.Raw]
    usage: Usage | None = None


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
    intended: float | None = None  # when it was meant to be sent; None in a closed load

    @property
    def begin(self) -> float:
        """Where latencies count from: the intended time, or the sending in a closed load."""
        return self.start if self.intended is None else self.intended

    @property
    def end(self) -> float:
        """When the last token came, or the sending where none came."""
        return self.token_times[-1] if self.token_times else self.start

    @property
    def lag(self) -> float:
        """Seconds from the intended time to the sending; 0 in a closed load."""
        return self.start - self.begin

    @property
    def ttft(self) -> float:
        """Seconds to the first token; 0 where none came."""
        return self.token_times[0] - self.begin if self.token_times else 0.0

    @property
    def latency(self) -> float:
        """Seconds to the last token; 0 where none came."""
        return self.token_times[-1] - self.begin if self.token_times else 0.0

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
    """A request, ready to be sent.

    follows  it is the next turn of the request before it, after `think` seconds
    id       sent as X-Request-Id, if it has one
    stream   False: its answer is a whole JSON object, an embedding, and counts as one event without a token
    """

    body: bytes
    prompt_len: int | None
    follows: bool = False
    think: float = 0.0
    stream: bool = True
    id: str = ""


@dataclass(frozen=True)
class LoadResult:
    """The result of a load: the requests that ended, in the order in which they were made, and the seconds it took.

    `others` ended too and are not measured: the warm-up (see run.py). `begin` and `until` are times on perf_counter's
    clock: `duration` counts from `begin`, and no measured request begins after `until`.
    """

    records: list[Record]
    duration: float
    num_unfinished: int = 0
    others: list[Record] = field(default_factory=list)
    begin: float = 0.0
    until: float = 0.0

    @property
    def first_error(self) -> str | None:
        """Why the first measured request that failed did, or None."""
        return next((record.error for record in self.records if record.error), None)


@dataclass(frozen=True)
class Schedule:
    """When requests are sent.

    arrivals         open load: seconds after the start, one for each request; those that follow another ignore theirs.
                     None: a closed load, in which each conversation keeps its place until its last answer
    max_concurrency  requests at one time; None: no limit
    seconds          nothing is sent that long after the start; None: no limit
    """

    arrivals: Sequence[float] | None = None
    max_concurrency: int | None = None
    seconds: float | None = None


async def run_load(
    client: Client,
    path: str,
    requests: Sequence[Request],
    schedule: Schedule,
    *,
    stop: asyncio.Event | None = None,
    on_begin: Callable[[], None] = lambda: None,
    on_done: Callable[[Record], None] = lambda _: None,
) -> LoadResult:
    """Send all requests at their times until all have ended or `stop` is set.

    Requests that are still open then are cut off (the server sees their connections close) and not in the result. What
    the caller has frozen for the garbage collector stays so. `on_begin` is called when the load's clock starts: what
    comes before may take seconds.
    """
    frozen_before = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()  # what is there now is not walked through again while latencies are taken
    load = _Load(client, path, requests, schedule, on_done)
    on_begin()
    running = asyncio.create_task(load.run())
    stopped = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait((running, stopped), return_when=asyncio.FIRST_COMPLETED)
        duration = perf_counter() - load.begun
    finally:
        running.cancel()
        stopped.cancel()
        await asyncio.wait((running, stopped))
        load.close()
        if not frozen_before:
            gc.unfreeze()
    if not running.cancelled():
        running.result()
    ended = [record for record in load.records if record is not None]
    unfinished = len(requests) - len(ended) - load.num_unsent
    return LoadResult(ended, duration, unfinished, begin=load.begun, until=load.begun + duration)


class _Load:
    """A load under way."""

    def __init__(
        self,
        client: Client,
        path: str,
        requests: Sequence[Request],
        schedule: Schedule,
        on_done: Callable[[Record], None],
    ) -> None:
        self.records: list[Record | None] = [None] * len(requests)
        self.begun = perf_counter()
        self.num_unsent = 0  # since the schedule's seconds were over
        self._client = client
        self._path = path
        self._requests = requests
        self._schedule = schedule
        self._on_done = on_done
        self._gate = asyncio.Semaphore(schedule.max_concurrency or max(len(requests), 1))
        self._alarm = Alarm()
        self._deadline = float("inf") if schedule.seconds is None else self.begun + schedule.seconds

    def close(self) -> None:
        """Give back what it holds, when it has ended."""
        self._alarm.close()

    async def run(self) -> None:
        """Begin all conversations at their times, and wait for their ends."""
        firsts = [i for i, request in enumerate(self._requests) if not request.follows or i == 0]
        conversations = [range(first, end) for first, end in pairwise([*firsts, len(self._requests)])]
        arrivals = self._schedule.arrivals
        async with asyncio.TaskGroup() as group:
            if arrivals is None:
                waiting = iter(conversations)
                for _ in range(min(self._schedule.max_concurrency or len(conversations), len(conversations))):
                    group.create_task(self._closed(waiting))
                return
            for conversation in conversations:
                intended = self.begun + arrivals[conversation.start]
                if intended >= self._deadline:
                    self.num_unsent += len(conversation)
                    continue
                # a task that is made when it is due would begin a turn of the event loop later
                await self._alarm.at(intended - AHEAD_SECONDS)
                group.create_task(self._open(conversation, intended))

    async def _closed(self, waiting: Iterator[range]) -> None:
        """One place: a conversation after the other. A task for each of 100,000 would take a second to begin."""
        for conversation in waiting:
            for i in conversation:
                if perf_counter() >= self._deadline:
                    self.num_unsent += conversation.stop - i
                    break
                await self._one(i, None)

    async def _open(self, conversation: range, intended: float) -> None:
        for i in conversation:
            if i > conversation.start:
                intended = perf_counter() + self._requests[i].think
            if intended >= self._deadline:
                self.num_unsent += conversation.stop - i
                return
            await self._alarm.at(intended)
            async with self._gate:
                await self._one(i, intended)

    async def _one(self, i: int, intended: float | None) -> None:
        record = await ask(self._client, self._path, self._requests[i], intended)
        self.records[i] = record
        self._on_done(record)


async def ask(client: Client, path: str, request: Request, intended: float | None = None) -> Record:
    """Send one request and read its answer to the end; whatever goes wrong is in the record's error."""
    record = Record(request.prompt_len, intended=intended)
    splitter = EventSplitter()
    raw = bytearray()
    kept = MAX_RAW if request.stream else MAX_WHOLE

    def sink(now: float, piece: bytes) -> None:
        if len(raw) < kept:
            raw.extend(piece)
        if not request.stream:
            record.token_times = [now]
            return
        for data in splitter.feed(piece):
            _take(record, now, data)

    record.start = perf_counter()
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            headers = f"X-Request-Id: {request.id}\r\n" if request.id else ""
            answer = await client.send("POST", path, request.body, sink, headers)
    except TimeoutError:
        record.error = f"no end of the answer within {ANSWER_SECONDS / 3600:.0f} h"
    except HttpError as e:
        record.error = record.error or str(e)
    else:
        if answer.status != 200:
            record.error = answer.error(bytes(raw))
        elif not request.stream:
            record.error = _take_whole(record, bytes(raw))
        elif answer.content_type != "text/event-stream":
            record.error = (
                f"the answer is no event stream but {answer.content_type!r}: {one_line(raw.decode('latin-1'))}"
            )
        else:
            record.error = record.error or _close(record)
    return record


def _take_whole(record: Record, body: bytes) -> str | None:
    """Take an answer that is one JSON object into the record. Returns what is wrong with it."""
    try:
        answer = msgspec.json.decode(body, type=_Whole)
    except msgspec.MsgspecError as e:
        return f"the answer is not an object with data: {e}: {one_line(body.decode('latin-1'))}"
    record.usage = answer.usage or Usage()
    record.usage.completion_tokens = 0
    record.finish_reason = "stop"
    return None


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
    elif delta and delta.role and not choice.finish_reason and not record.token_times:
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
