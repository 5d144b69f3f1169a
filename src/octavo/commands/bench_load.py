"""One load of a server as the options of `octavo bench` say: what serve, throughput and sweep have in common."""

from __future__ import annotations

import asyncio
import math
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import uvloop

from octavo.bench.arrivals import Ramp
from octavo.bench.http import Client, HttpError, within
from octavo.bench.load import LoadResult, Record
from octavo.bench.options import BenchError, BenchOptions
from octavo.bench.prompts import Prompt
from octavo.bench.run import Point, Target, Warmup, first_model, run_point
from octavo.bench.server_options import ServerOptions
from octavo.bench.sources import PromptSet, make_prompts
from octavo.commands.progress_bar import progress_bar

READY_POLL_SECONDS = 0.5
MODELS_SECONDS = 30.0  # in which a server that is there says its models
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


@dataclass(frozen=True)
class Measured:
    """A load that was measured, of which model; asked: in words, what it was asked."""

    model: str
    asked: str
    result: LoadResult


def measure(options: BenchOptions) -> Measured:
    """Measure with these options, which are resolved, and say on stdout what is asked.

    Raises BenchError, HttpError, PromptError and OSError, in one line each.
    """
    allow_many_sockets()
    return uvloop.run(_measure(options))


def allow_many_sockets() -> None:
    """Raise the limit of open files as far as it goes: with --request-rate inf, every request has a socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _measure(options: BenchOptions) -> Measured:
    client = options.client()
    try:
        model = await model_of(options, client)
        rng = random.Random(options.seed)
        needed = _prompts_needed(options)
        found = await make_prompts(options, client, model, needed, rng)
        if _is_timed(options) and len(found.prompts) < needed:
            raise BenchError(
                f"{options.file} has {len(found.prompts)} requests, and --request-rate {options.request_rate:g} may "
                f"take {needed} in --max-seconds {options.max_seconds:g}: lower one of them"
            )
        point = _point(options, found)
        warmup = _warmup_rule(options, point)
        asked = f"Model: {model}. Prompts: {found.how} Seed: {options.seed}. {warmup}"
        print(asked, flush=True)
        target = _target(options, model, found)
        prompts = _with_adapters(options, found.prompts, rng)
        warmups = prompts[: options.num_warmups]
        prompts = prompts[options.num_warmups :]
        if not prompts:
            raise BenchError(f"{len(warmups)} prompts are all for --num-warmups {options.num_warmups}: none is left")
        if warmups:
            await _warm_up(options, client, target, warmups)
        result = await _load(options, client, target, prompts, point, rng)
        if not result.records and not result.num_unfinished:
            raise BenchError(_nothing_measured(options, result))
        if _ran_out(options, point, result):
            print(
                f"note: all {len(prompts)} prompts were answered before --max-seconds {options.max_seconds:g} was "
                "over: --num-prompts makes more",
                file=sys.stderr,
            )
        return Measured(model, asked, result)
    finally:
        client.close()


async def model_of(options: ServerOptions, client: Client) -> str:
    """The model's name, once the server is ready."""
    if options.model_name is not None and not options.ready_check_timeout_sec:
        return options.model_name
    deadline = perf_counter() + options.ready_check_timeout_sec
    patience = options.ready_check_timeout_sec or MODELS_SECONDS
    while True:
        try:
            first = await within(patience, "GET /v1/models", first_model(client))
        except HttpError:
            if perf_counter() >= deadline:
                raise
            await asyncio.sleep(READY_POLL_SECONDS)
        else:
            return options.model_name or first


def _ran_out(options: BenchOptions, point: Point, result: LoadResult) -> bool:
    """True of a closed load over a time that ended for want of prompts."""
    if options.max_seconds is None or point.is_open or result.num_unfinished:
        return False
    return result.until < result.begin + options.max_seconds


def _nothing_measured(options: BenchOptions, result: LoadResult) -> str:
    """Why no request was measured, and what to change."""
    if result.others:
        sent = f"all {len(result.others)} requests began within --warmup-seconds {options.warmup_seconds:g}"
        return f"nothing was measured: {sent}; give more --num-prompts, or --max-seconds and a rate"
    return f"nothing was measured: no request came within --max-seconds {options.max_seconds:g} at this rate"


def _prompts_needed(options: BenchOptions) -> int:
    """As many as are asked for; over a time, as many as its rate takes."""
    if _is_timed(options):
        return options.num_warmups + _timed_point(options).prompts_needed()
    return options.num_warmups + options.num_prompts


def _is_timed(options: BenchOptions) -> bool:
    """True of a rate over a time, which says how many prompts are sent."""
    return options.max_seconds is not None and options.request_rate != math.inf


def _timed_point(options: BenchOptions) -> Point:
    return Point(
        rate=options.request_rate,
        concurrency=options.max_concurrency,
        seconds=options.max_seconds,
        burstiness=options.burstiness or 1.0,
        warmup=Warmup(seconds=options.warmup_seconds),
    )


def _point(options: BenchOptions, found: PromptSet) -> Point:
    """The load that the options mean for these prompts."""
    point = _timed_point(options)
    if options.request_rate != math.inf:
        return point
    if options.ramp_up_strategy is not None:
        ramp = Ramp(options.ramp_up_strategy, options.ramp_up_start_rps or 0.0, options.ramp_up_end_rps or 0.0)
        return replace(point, rate=None, ramp=ramp)
    if options.self_timed and not found.timed:
        raise BenchError(f"--self-timed: {options.file} has no times")
    if found.timed and options.self_timed is not False:
        return replace(point, rate=None, speed=options.trace_speed)
    if options.max_seconds is not None and options.max_concurrency is None:
        raise BenchError("--max-seconds goes with --request-rate or --max-concurrency: all at once have no duration")
    return replace(point, rate=None, concurrency=options.max_concurrency or max(len(found.prompts), 1))


def _warmup_rule(options: BenchOptions, point: Point) -> str:
    """Which requests are not measured, in a sentence."""
    if not options.num_warmups:
        return point.warmup.describe()
    before = f"{options.num_warmups} requests before the load"
    also = f", and requests that begin within its first {options.warmup_seconds:g} s" if options.warmup_seconds else ""
    return f"Not measured, as warm-up: {before}{also}."


def _target(options: BenchOptions, model: str, found: PromptSet) -> Target:
    body: dict[str, Any] = {name: value for name in SAMPLING if (value := getattr(options, name)) is not None}
    if options.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": options.logprobs} if options.chat else {"logprobs": options.logprobs}
    if options.chat_template_kwargs:
        body["chat_template_kwargs"] = options.chat_template_kwargs
    return Target(
        model,
        chat=options.chat,
        ignore_eos=found.synthetic if options.ignore_eos is None else options.ignore_eos,
        extra_body=body | options.extra_body,
        endpoint=options.path,
        embeddings=options.embeddings,
        request_id_prefix=options.request_id_prefix,
    )


def _with_adapters(options: BenchOptions, prompts: list[Prompt], rng: random.Random) -> list[Prompt]:
    """Each prompt with the adapter that it asks, the same one through a conversation."""
    names = options.lora_modules
    if not names:
        return prompts
    found: list[Prompt] = []
    conversations = 0
    for prompt in prompts:
        if prompt.follows and found:
            name = found[-1].model
        else:
            name = names[conversations % len(names)] if options.lora_assignment == "round-robin" else rng.choice(names)
            conversations += 1
        found.append(replace(prompt, model=name))
    return found


async def _warm_up(options: BenchOptions, client: Client, target: Target, prompts: Sequence[Prompt]) -> None:
    point = Point(concurrency=options.max_concurrency or len(prompts))
    result = await run_point(client, target, prompts, point, rng=random.Random(0))
    if result.first_error:
        raise HttpError(f"a warm-up request failed: {result.first_error}")


async def _load(
    options: BenchOptions,
    client: Client,
    target: Target,
    prompts: Sequence[Prompt],
    point: Point,
    rng: random.Random,
) -> LoadResult:
    """The measurement itself, which the first Ctrl-C ends early."""
    stop = asyncio.Event()
    if options.profile:
        await client.whole("POST", "/start_profile")
    try:
        with _progress(options, len(prompts)) as on_done, first_interrupt(stop.set):
            return await run_point(client, target, prompts, point, rng=rng, stop=stop, on_done=on_done)
    finally:
        if options.profile:
            try:
                await client.whole("POST", "/stop_profile")
            except HttpError as e:  # the measurement stands
                print(f"octavo bench: {e}", file=sys.stderr)


@contextmanager
def first_interrupt(then: Callable[[], None]) -> Iterator[None]:
    """Call `then` on the first SIGINT; a second one is a KeyboardInterrupt as ever."""
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        then()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextmanager
def _progress(options: BenchOptions, total: int) -> Iterator[Callable[[Record], None]]:
    """A bar on stderr; gives what to call for each request that ended."""
    if options.disable_tqdm:
        yield lambda _: None
        return
    ended = 0
    failed = 0

    with progress_bar("requests") as bar:

        def on_done(record: Record) -> None:
            nonlocal ended, failed
            ended += 1
            failed += record.error is not None
            bar.progress(ended, total, f"requests, {failed} failed" if failed else "requests")

        yield on_done
