"""Measure a running OpenAI-compatible server: throughput, latency, goodput, and dollars per million tokens.

Flags, report lines and JSON keys are those of `vllm bench serve`, so that numbers of both can be laid side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvloop

from octavo.bench.http import Client, HttpError
from octavo.bench.load import LoadResult, Record
from octavo.bench.options import BenchError, BenchOptions, resolve
from octavo.bench.prompts import Prompt, PromptError, RandomShape, custom_prompts, measure_vocabulary, random_prompts
from octavo.bench.run import Point, Target, first_model, run_point
from octavo.commands.progress_bar import progress_bar
from octavo.flags import add_flags, flags_of, read

PROG = "octavo bench"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, flags_of(BenchOptions))


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit code: 1 if a request failed or nothing could be measured, 130 on Ctrl-C."""
    _allow_many_sockets()
    try:
        options = resolve(read(BenchOptions, args))
        model, result = uvloop.run(_measure(options))
    except (BenchError, HttpError, PromptError, OSError) as e:
        print(f"{PROG}: {e}", file=sys.stderr)
        return 1
    return _report(options, model, result)


def _allow_many_sockets() -> None:
    """Raise the limit of open files as far as it goes: with --request-rate inf, every request has a socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _measure(options: BenchOptions) -> tuple[str, LoadResult]:
    """The model's name, and what was measured."""
    client = Client(options.base_url, _headers(options), insecure=options.insecure)
    try:
        model = options.model or await first_model(client)
        rng = random.Random(options.seed)
        prompts, how = await _prompts(options, client, model, rng)
        print(f"Model: {model}. Prompts: {how} Seed: {options.seed}.", flush=True)
        target = _target(options, model)
        warmups = prompts[: options.num_warmups]
        prompts = prompts[options.num_warmups :]
        if warmups:
            await _warm_up(options, client, target, warmups)
        return model, await _load(options, client, target, prompts, rng)
    finally:
        client.close()


def _headers(options: BenchOptions) -> dict[str, str]:
    key = options.api_key or os.environ.get("OPENAI_API_KEY")
    return ({"Authorization": f"Bearer {key}"} if key else {}) | dict(options.header)


async def _prompts(options: BenchOptions, client: Client, model: str, rng: random.Random) -> tuple[list[Prompt], str]:
    """The prompts, those of the warm-up first, and how they were made."""
    count = options.num_warmups + options.num_prompts
    if options.dataset_path is not None:
        prompts = custom_prompts(options.dataset_path, count, options.output_len, rng)
        return prompts, f"{options.dataset_path}, shuffled."
    vocabulary = await measure_vocabulary(client, model, chat=options.backend == "openai-chat")
    length = options.random_input_len
    shape = RandomShape(length, options.output_len, options.random_range_ratio)
    prompts = random_prompts(vocabulary, count, shape, rng)
    if vocabulary.exact:
        tokens = sorted({prompt.num_tokens or 0 for prompt in prompts})
        span = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
        return prompts, f"random words, {span} tokens as the server's /tokenize counts them."
    return prompts, f"random words, about {length} tokens: the server has no /tokenize to make them exact."


def _target(options: BenchOptions, model: str) -> Target:
    temperature = {} if options.temperature is None else {"temperature": options.temperature}
    return Target(
        model,
        chat=options.backend == "openai-chat",
        ignore_eos=bool(options.ignore_eos),
        extra_body=temperature | options.extra_body,
        endpoint=options.endpoint,
    )


async def _warm_up(options: BenchOptions, client: Client, target: Target, prompts: Sequence[Prompt]) -> None:
    point = Point(concurrency=options.max_concurrency or len(prompts))
    result = await run_point(client, target, prompts, point, rng=random.Random(0))
    failed = next((record.error for record in result.records if record.error), None)
    if failed:
        raise HttpError(f"a warm-up request failed: {failed}")


async def _load(
    options: BenchOptions, client: Client, target: Target, prompts: Sequence[Prompt], rng: random.Random
) -> LoadResult:
    """The measurement itself, which the first Ctrl-C ends early."""
    stop = asyncio.Event()
    at_once = options.request_rate == float("inf")
    point = Point(
        rate=None if at_once else options.request_rate,
        concurrency=options.max_concurrency or (len(prompts) if at_once else None),
        burstiness=options.burstiness,
    )
    with _progress(options, len(prompts)) as on_done, _first_interrupt(stop.set):
        return await run_point(client, target, prompts, point, rng=rng, stop=stop, on_done=on_done)


@contextmanager
def _first_interrupt(then: Callable[[], None]) -> Iterator[None]:
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


def _report(options: BenchOptions, model: str, result: LoadResult) -> int:
    from octavo.bench import metrics as bench_metrics
    from octavo.bench import report as bench_report

    metrics = bench_metrics.measure(result, options.metric_percentiles, dict(options.goodput))
    prices = (
        None if options.cost_per_hour is None else bench_metrics.cost(metrics, options.cost_per_hour, options.num_gpus)
    )
    lines = bench_report.report_lines(metrics, options, prices, result.num_unfinished)
    print("\n".join([*lines, *bench_report.notes(result)]), flush=True)
    for line in bench_report.failure_lines(result.records):
        print(f"{PROG}: {line}", file=sys.stderr)
    if options.save_result:
        content = bench_report.result_json(options, model, result, metrics, prices)
        try:
            print(f"written: {bench_report.save(content, options, model)}")
        except OSError as e:
            print(f"{PROG}: {e}", file=sys.stderr)
            return 1
    if result.num_unfinished:
        return 130
    return 1 if metrics.failed else 0
