"""One measurement of one server at one load, as a library: what `octavo bench` and `octavo cost` are built on.

    client = Client("http://127.0.0.1:8000")
    model = await first_model(client)
    vocabulary = await measure_vocabulary(client, model, chat=True, turns=True)
    point = Point(rate=4.0, seconds=60, warmup=Warmup(seconds=10))
    rng = random.Random(seed)
    prompts = make_requests(WORKLOADS["chat"], point.prompts_needed(), rng, vocabulary)
    result = await run_point(client, Target(model, chat=True), prompts, point, rng=rng)
    metrics = measure(result, [50, 99], {"ttft": 500, "tpot": 50})

A point has a rate, which is an open load (load.py says what that means for latencies), or a concurrency, which is a
closed one, and lasts as long as its prompts or `seconds`. The warm-up is a part of the load that isn't measured: the
server is under way when measuring begins. Which requests it takes is a rule, which `Warmup.describe` prints.

`metrics.measure` counts the measured requests, over the time until the last of them has ended. For the throughput of a
server under a closed load over `seconds`, take `metrics.steady_output_throughput`: the tokens of all requests that came
within the measured time, without the ends of the load, at which the server is no longer full.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from octavo.bench.arrivals import Ramp, arrival_times, ramped_times, times_within
from octavo.bench.http import Client, HttpError
from octavo.bench.load import LoadResult, Record, Request, Schedule, run_load
from octavo.bench.prompts import Prompt, messages
from octavo.bench.server_options import ENDPOINTS


@dataclass(frozen=True)
class Target:
    """How a model is asked: by chat, completions or for embeddings, and what stands in each request beside its prompt.

    request_id_prefix: what the id of each request begins with, before its number; '' for no ids
    ignore_eos: generate as many tokens as are asked for; vLLM, SGLang, llama.cpp and octavo know it, OpenAI doesn't.
    """

    model: str
    chat: bool = False
    ignore_eos: bool = True
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    endpoint: str = ""
    embeddings: bool = False
    request_id_prefix: str = ""

    @property
    def path(self) -> str:
        """Where requests go."""
        backend = "openai-embeddings" if self.embeddings else "openai-chat" if self.chat else "openai"
        return self.endpoint or ENDPOINTS[backend]

    def request(self, prompt: Prompt) -> Request:
        """The request that asks this prompt."""
        body = {"model": prompt.model or self.model, **self._asked(prompt), **self.extra_body}
        content = json.dumps(body).encode()
        stream = not self.embeddings
        return Request(content, prompt.num_tokens, follows=prompt.follows, think=prompt.think, stream=stream)

    def _asked(self, prompt: Prompt) -> dict[str, Any]:
        """The prompt, and how its answer is to be."""
        texts = (*prompt.history, prompt.text)
        if self.embeddings:
            return {"input": " ".join(texts)}
        body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        if self.chat:
            body["messages"] = messages(texts)
            body["max_completion_tokens"] = prompt.output_len
        else:
            body["prompt"] = " ".join(texts)
            body["max_tokens"] = prompt.output_len
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body


@dataclass(frozen=True)
class Warmup:
    """Which requests are not measured: the first `requests`, and those that begin within the first `seconds`."""

    requests: int = 0
    seconds: float = 0.0

    def describe(self) -> str:
        """The rule in words, for the report."""
        rules = []
        if self.requests:
            rules.append(f"the first {self.requests} requests")
        if self.seconds:
            rules.append(f"requests that begin within the first {self.seconds:g} s")
        return (
            f"Not measured, as warm-up: {' and '.join(rules)}." if rules else "No warm-up: every request is measured."
        )


@dataclass(frozen=True)
class Point:
    """A load: `rate` requests a second on average (open), or `concurrency` requests at a time (closed).

    rate         counts all requests, also those that follow another in a conversation
    ramp         a rate that changes
    speed        the prompts' own arrivals (a trace), that many times as fast
    concurrency  with one of these: the most that are sent at one time; the wait for a place counts as latency
    seconds      how long is measured, after the warm-up's seconds; None: until the prompts are at their end
    burstiness   of the arrivals (arrivals.py)
    """

    rate: float | None = None
    ramp: Ramp | None = None
    speed: float | None = None
    concurrency: int | None = None
    seconds: float | None = None
    burstiness: float = 1.0
    warmup: Warmup = Warmup()

    def __post_init__(self) -> None:
        ways = sum(way is not None for way in (self.rate, self.ramp, self.speed))
        if ways > 1 or (ways == 0 and self.concurrency is None):
            raise ValueError("a load has a rate, a ramp or a trace's speed, or a concurrency, or one of them with it")

    @property
    def is_open(self) -> bool:
        """True if requests have times at which they are meant to be sent."""
        return self.rate is not None or self.ramp is not None or self.speed is not None

    @property
    def _sending(self) -> float | None:
        """Seconds in which requests are sent; None: no limit."""
        return None if self.seconds is None else self.warmup.seconds + self.seconds

    def prompts_needed(self) -> int:
        """As many prompts as a rate over `seconds` takes at any seed: eight standard deviations above the mean.

        Five would do, but conversations have a random number of turns, too.
        """
        if self.rate is None or self._sending is None:
            raise ValueError("only a rate over a number of seconds says how many prompts it takes")
        mean = self.rate * self._sending
        return math.ceil(mean + 8 * math.sqrt(mean / min(self.burstiness, 1.0)) + 10)


async def first_model(client: Client) -> str:
    """The name of the first model that the server knows."""
    try:
        return str((await client.json("GET", "/v1/models"))["data"][0]["id"])
    except (TypeError, KeyError, IndexError) as e:
        raise HttpError("GET /v1/models names no model; --model does") from e


async def run_point(
    client: Client,
    target: Target,
    prompts: Sequence[Prompt],
    point: Point,
    *,
    rng: random.Random,
    stop: asyncio.Event | None = None,
    on_begin: Callable[[], None] = lambda: None,
    on_done: Callable[[Record], None] = lambda _: None,
) -> LoadResult:
    """Ask these prompts in their order at this load; `rng` draws the times at which an open load sends them.

    The load ends early when `stop` is set; `on_begin` is called when it begins, with all requests ready. Raises
    ValueError where an open load over `seconds` has too few prompts.
    """
    if not prompts:
        raise ValueError("a load of no prompts has nothing to measure")
    used, arrivals = _arrivals(prompts, point, rng)
    requests = [target.request(prompt) for prompt in used]
    if target.request_id_prefix:
        requests = [replace(request, id=f"{target.request_id_prefix}{i}") for i, request in enumerate(requests)]
    schedule = Schedule(arrivals, point.concurrency, point._sending)
    result = await run_load(client, target.path, requests, schedule, stop=stop, on_begin=on_begin, on_done=on_done)
    return _measured(result, point)


def _arrivals(
    prompts: Sequence[Prompt], point: Point, rng: random.Random
) -> tuple[Sequence[Prompt], Sequence[float] | None]:
    """The prompts that are sent, and when each of them is, or None for a closed load."""
    if not point.is_open:
        return prompts, None
    firsts = [i for i, prompt in enumerate(prompts) if not prompt.follows]
    times = _first_times(prompts, firsts, point, rng)
    if len(times) > len(firsts):
        raise ValueError(
            f"{len(prompts)} prompts in {len(firsts)} conversations are too few for {point.rate} requests a second "
            f"over {point._sending} s, which began {len(times)} conversations; Point.prompts_needed says how many"
        )
    end = firsts[len(times)] if len(times) < len(firsts) else len(prompts)
    at = iter(times)
    return prompts[:end], [0.0 if prompt.follows else next(at) for prompt in prompts[:end]]


def _first_times(prompts: Sequence[Prompt], firsts: Sequence[int], point: Point, rng: random.Random) -> Sequence[float]:
    """When conversations begin."""
    share = len(firsts) / len(prompts)  # a rate counts requests, and these are conversations
    if point.speed is not None:
        begun = prompts[firsts[0]].arrival or 0.0
        return [((prompts[i].arrival or 0.0) - begun) / point.speed for i in firsts]
    if point.ramp is not None:
        ramp = replace(point.ramp, start=point.ramp.start * share, end=point.ramp.end * share)
        return ramped_times(len(firsts), ramp, point.burstiness, rng)
    rate = (point.rate or 0.0) * share
    if point._sending is None:
        return arrival_times(len(firsts), rate, point.burstiness, rng)
    return times_within(point._sending, rate, point.burstiness, rng)


def _measured(result: LoadResult, point: Point) -> LoadResult:
    """The result without its warm-up."""
    begin = result.begin + point.warmup.seconds
    rest = sorted(result.records, key=lambda record: record.begin)[point.warmup.requests :]
    if point.warmup.requests and rest:
        begin = max(begin, rest[0].begin)
    until = result.until
    if point.seconds is not None:
        whole = point.is_open and not result.num_unfinished  # an open load may end before its time does
        until = begin + point.seconds if whole else min(begin + point.seconds, until)
    measured = {id(record) for record in rest if record.begin >= begin}
    return replace(
        result,
        records=[record for record in result.records if id(record) in measured],
        others=[record for record in result.records if id(record) not in measured],
        begin=begin,
        until=until,
        duration=max(result.until - begin, 1e-9),
    )
