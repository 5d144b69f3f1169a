"""Puts the loads of the plan on a real server, over HTTP, and says what came of each."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeVar

import uvloop

from octavo.bench.http import Client, HttpError, within
from octavo.bench.load import LoadResult
from octavo.bench.metrics import by_segment, output_by_segment, tpot
from octavo.bench.prompts import Prompt, PromptError, RandomShape, Vocabulary, measure_vocabulary, random_prompts
from octavo.bench.run import Point, Target, Warmup, first_model, run_point
from octavo.bench.workloads import WORKLOADS, make_requests
from octavo.jobs.cost.loads import SEGMENTS, WARM_UP, Answers, Load, Run
from octavo.jobs.cost.machine import LOOK_SECONDS, EnergyMeter, busy_cores, memory_of
from octavo.jobs.cost.quality import Answered, ask_server, windows_of

DRAIN = 1.0  # an open load's open answers are waited for as long again as it lasted, and are failures then
PATIENCE = 1800.0  # seconds that a closed load's are waited for: a server that takes longer hangs
ASK_SECONDS = 60.0  # for what is no work for a server: its models, its version, the tokens of words
FIRST_GUESS = 20.0  # prompts a second, until a load has shown how many a closed load takes
SPARE = 2.0
MAX_ERRORS = 3  # that a run keeps

T = TypeVar("T")


class ServerError(Exception):
    """The server can't be measured; the message is one line."""


@dataclass(frozen=True)
class Asking:
    """What requests are like. workload: a name out of bench/workloads.py, or '' for random prompts of one length."""

    chat: bool = False
    ignore_eos: bool = True
    workload: str = ""
    scale: float = 1.0
    input_len: int = 256
    output_len: int = 64

    def prompts(self, vocabulary: Vocabulary, count: int, rng: random.Random) -> list[Prompt]:
        """`count` prompts."""
        if self.workload:
            return make_requests(WORKLOADS[self.workload].scaled(self.scale), count, rng, vocabulary)
        return random_prompts(vocabulary, count, RandomShape(self.input_len, self.output_len), rng)

    @property
    def burstiness(self) -> float:
        """Of the arrivals of an open load; 1 is a Poisson process."""
        return WORKLOADS[self.workload].burstiness if self.workload else 1.0

    def describe(self) -> str:
        """One line for the report."""
        if self.workload:
            scaled = "" if self.scale == 1 else f", all lengths times {self.scale:g}"
            bursts = "" if self.burstiness == 1 else f", in bursts (gamma gaps of shape {self.burstiness:g})"
            return f"{self.workload}: {WORKLOADS[self.workload].describe()}{scaled}{bursts}"
        return f"random words: prompts of {self.input_len} tokens, answers of {self.output_len}"


class Measured:
    """A server under measurement. `measure` is what the plan calls. Close it by `with`.

    url      without /v1
    model    what the server calls its model
    program  what the server is, where it says so
    """

    def __init__(
        self, url: str, api_key: str | None, asking: Asking, *, model: str | None = None, pid: int | None = None
    ) -> None:
        try:
            self._client = Client(url, {"Authorization": f"Bearer {api_key}"} if api_key else {})
        except HttpError as e:
            raise ServerError(str(e)) from e
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.url = url.rstrip("/").removesuffix("/v1")
        self.api_key = api_key
        self._asking = asking
        self._pid = pid
        self._guess: dict[tuple[str, int | None], float] = {}
        self._meter = EnergyMeter.find()
        try:
            self.model = model or self._ask("GET /v1/models", first_model(self._client))
            self.program = self._ask("GET /version", _program(self._client))
            chat = asking.chat
            turns = bool(asking.workload) and chat
            measuring = measure_vocabulary(self._client, self.model, chat=chat, turns=turns)
            self.vocabulary = self._ask("POST /tokenize", measuring)
        except HttpError as e:
            self.close()
            raise ServerError(f"{url}: {e}") from e
        self._target = Target(self.model, asking.chat, asking.ignore_eos)

    def __enter__(self) -> Measured:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        self._runner.close()

    def warm_up(self, concurrency: int, seed: int) -> None:
        """Some requests that nobody counts. Raises ServerError if one fails, or if prompts don't fit the server."""
        rng = random.Random(f"warm-up {seed}")  # no load's: their prompts must be new to the server
        try:
            prompts = self._asking.prompts(self.vocabulary, 2 * concurrency, rng)
        except PromptError as e:
            raise ServerError(str(e)) from e
        result, _ = self._run(prompts, Point(concurrency=concurrency), rng)
        if result.first_error:
            raise ServerError(f"a request failed: {result.first_error}")

    def measure(self, load: Load) -> Run:
        """Put one load on the server."""
        busy = busy_cores(min(LOOK_SECONDS, load.seconds / 10))
        rng = random.Random(load.seed)
        warmup = Warmup(seconds=load.seconds * WARM_UP)
        counted = load.seconds * (1 - WARM_UP)
        burstiness = self._asking.burstiness
        point = Point(
            rate=load.rate, concurrency=load.concurrency, seconds=counted, burstiness=burstiness, warmup=warmup
        )
        if load.kind == "open":
            prompts = self._asking.prompts(self.vocabulary, point.prompts_needed(), rng)
            result, joules = self._run(prompts, point, rng)
        else:
            result, joules = self._closed(load, point, rng)
        return _run_of(load, result, busy, memory_of(self._pid), joules)

    def windows(self, text: str, max_tokens: int) -> list[list[int]]:
        """A text in windows of this server's tokens. Raises HttpError."""
        return self._ask("POST /tokenize", windows_of(self._client, self.model, text, max_tokens))

    def answers(self, windows: Sequence[Sequence[int]]) -> Answered:
        """What this server says of windows of tokens. Raises HttpError."""
        return self._runner.run(ask_server(self._client, self.model, windows))

    def _ask(self, what: str, answer: Awaitable[T]) -> T:
        """What a server says without work. Raises HttpError where it doesn't in time."""
        return self._runner.run(within(ASK_SECONDS, what, answer))

    def _closed(self, load: Load, point: Point, rng: random.Random) -> tuple[LoadResult, float | None]:
        """A closed load takes as many prompts as the server can answer: when they run out it is made again."""
        key = (load.kind, load.concurrency)
        count = int(self._guess.get(key, FIRST_GUESS) * load.seconds * SPARE) + (load.concurrency or 0)
        while True:
            prompts = self._prompts(load, count, rng)
            result, joules = self._run(prompts, point, rng)
            ended = len(result.records) + len(result.others)
            if ended < count:
                self._guess[key] = ended / load.seconds
                return result, joules
            count *= 4

    def _prompts(self, load: Load, count: int, rng: random.Random) -> list[Prompt]:
        if load.kind == "closed":
            return self._asking.prompts(self.vocabulary, count, rng)
        if load.kind == "prefill":
            return [_one_token(prompt) for prompt in self._asking.prompts(self.vocabulary, count, rng)]
        few = load.concurrency or 1
        known = [_one_token(prompt) for prompt in self._asking.prompts(self.vocabulary, few, rng)]
        self._run(known, Point(concurrency=few), rng)
        return [known[i % few] for i in range(count)]

    def _run(self, prompts: Sequence[Prompt], point: Point, rng: random.Random) -> tuple[LoadResult, float | None]:
        """What came of a load, and the joules that the machine used in its counted time, where it tells.

        What is still open of an open load is cut off in the end; of a closed one it is a ServerError.
        """
        sending = point.warmup.seconds + (point.seconds or 0.0)
        limit = sending * (1 + DRAIN) if point.is_open else sending + PATIENCE
        timers: list[asyncio.TimerHandle] = []
        read: list[float] = []

        def read_meter() -> None:
            if self._meter is not None:
                read.append(self._meter.joules())

        async def timed() -> LoadResult:
            loop = asyncio.get_running_loop()
            stop = asyncio.Event()

            def begin() -> None:
                timers.append(loop.call_later(limit, stop.set))
                timers.extend(loop.call_later(moment, read_meter) for moment in (point.warmup.seconds, sending))

            try:
                return await run_point(self._client, self._target, prompts, point, rng=rng, stop=stop, on_begin=begin)
            finally:
                for timer in timers:
                    timer.cancel()

        result = self._runner.run(timed())
        if result.num_unfinished and not point.is_open:
            raise ServerError(f"answers had not ended {limit:g} s after their load began")
        return result, read[1] - read[0] if len(read) == 2 else None


async def _program(client: Client) -> str:
    """'vllm 0.32.0': the owner of the first model, as servers put it there, and the version."""
    try:
        owner = str((await client.json("GET", "/v1/models"))["data"][0].get("owned_by") or "")
        return f"{owner} {(await client.json('GET', '/version'))['version']}".strip()
    except (HttpError, TypeError, KeyError, IndexError, AttributeError):
        return ""


def _one_token(prompt: Prompt) -> Prompt:
    return replace(prompt, output_len=1, follows=False, think=0.0)


def _run_of(load: Load, result: LoadResult, busy: float | None, memory: int | None, joules: float | None) -> Run:
    """The counted part of what came back, as report.json keeps it: times in tenths of a millisecond."""
    begin = load.seconds * WARM_UP
    counted = load.seconds - begin
    until = result.begin + counted
    answered = [record for record in (*result.records, *result.others) if record.token_times]
    firsts = [record.token_times[0] for record in answered]
    good = [record for record in result.records if record.error is None]
    failed = [record for record in result.records if record.error is not None]
    errors = list(dict.fromkeys(record.error or "" for record in failed))[:MAX_ERRORS]
    if result.num_unfinished:
        errors.append(f"no whole answer {DRAIN * load.seconds:g} s after the load's end")
    return Run(
        load,
        Answers(
            at=[round(record.begin - result.begin + begin, 4) for record in good],
            ttft=[round(record.ttft * 1e3, 2) for record in good],
            tpot=[round(tpot(record) * 1e3, 3) for record in good],
            e2el=[round(record.latency * 1e3, 2) for record in good],
            inputs=[record.input_len for record in good],
            outputs=[record.output_len for record in good],
            cached=[record.cached_len for record in good],
        ),
        output_tokens=output_by_segment(result, until, SEGMENTS),
        input_tokens=by_segment(firsts, [record.input_len for record in answered], result.begin, until, SEGMENTS),
        failed_in=[
            *(min(int((record.begin - result.begin) / counted * SEGMENTS), SEGMENTS - 1) for record in failed),
            *([SEGMENTS - 1] * result.num_unfinished),  # the last ones are those that still wait
        ],
        errors=errors,
        busy_elsewhere=busy,
        memory=memory,
        joules=joules,
    )
