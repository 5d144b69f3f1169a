"""Measure a running OpenAI-compatible server: throughput, latency, goodput, and dollars per million tokens.

Flags, report lines and JSON keys are those of `vllm bench serve`, so that numbers of both can be laid side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvloop

from octavo.bench.http import Client, HttpError
from octavo.bench.load import LoadResult, Record, Request, arrival_times, run_load
from octavo.bench.options import BenchError, BenchOptions, resolve
from octavo.bench.prompts import Prompt, PromptError, custom_prompts, measure_vocabulary, random_prompts
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
        model = options.model or await _first_model(client)
        rng = random.Random(options.seed)
        prompts, how = await _prompts(options, client, model, rng)
        print(f"Model: {model}. Prompts: {how} Seed: {options.seed}.", flush=True)
        requests = [_request(options, model, prompt) for prompt in prompts]
        warmups = requests[: options.num_warmups]
        requests = requests[options.num_warmups :]
        if warmups:
            await _warm_up(options, client, warmups)
        arrivals = arrival_times(len(requests), options.request_rate, options.burstiness, rng)
        return model, await _load(options, client, requests, arrivals)
    finally:
        client.close()


def _headers(options: BenchOptions) -> dict[str, str]:
    key = options.api_key or os.environ.get("OPENAI_API_KEY")
    return ({"Authorization": f"Bearer {key}"} if key else {}) | dict(options.header)


async def _first_model(client: Client) -> str:
    try:
        return str((await client.json("GET", "/v1/models"))["data"][0]["id"])
    except (TypeError, KeyError, IndexError) as e:
        raise HttpError("GET /v1/models names no model; --model does") from e


async def _prompts(options: BenchOptions, client: Client, model: str, rng: random.Random) -> tuple[list[Prompt], str]:
    """The prompts, those of the warm-up first, and how they were made."""
    count = options.num_warmups + options.num_prompts
    if options.dataset_path is not None:
        prompts = custom_prompts(options.dataset_path, count, options.output_len, rng)
        return prompts, f"{options.dataset_path}, shuffled."
    vocabulary = await measure_vocabulary(client, model, chat=options.backend == "openai-chat")
    length = options.random_input_len
    ratio = options.random_range_ratio
    prompts = random_prompts(vocabulary, count, length, options.output_len, ratio, rng)
    if vocabulary.exact:
        tokens = sorted({prompt.num_tokens or 0 for prompt in prompts})
        span = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
        return prompts, f"random words, {span} tokens as the server's /tokenize counts them."
    return prompts, f"random words, about {length} tokens: the server has no /tokenize to make them exact."


def _request(options: BenchOptions, model: str, prompt: Prompt) -> Request:
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if options.backend == "openai-chat":
        body["messages"] = [{"role": "user", "content": prompt.text}]
        body["max_completion_tokens"] = prompt.output_len
    else:
        body["prompt"] = prompt.text
        body["max_tokens"] = prompt.output_len
    if options.ignore_eos:
        body["ignore_eos"] = True
    if options.temperature is not None:
        body["temperature"] = options.temperature
    return Request(json.dumps(body | options.extra_body).encode(), prompt.num_tokens)


async def _warm_up(options: BenchOptions, client: Client, requests: Sequence[Request]) -> None:
    result = await run_load(
        client,
        options.endpoint,
        requests,
        arrivals=[0.0] * len(requests),
        max_concurrency=options.max_concurrency,
        stop=asyncio.Event(),
        on_done=lambda _: None,
    )
    failed = next((record.error for record in result.records if record.error), None)
    if failed:
        raise HttpError(f"a warm-up request failed: {failed}")


async def _load(
    options: BenchOptions, client: Client, requests: Sequence[Request], arrivals: Sequence[float]
) -> LoadResult:
    """The measurement itself, which the first Ctrl-C ends early."""
    stop = asyncio.Event()
    with _progress(options, len(requests)) as on_done, _first_interrupt(stop.set):
        return await run_load(
            client,
            options.endpoint,
            requests,
            arrivals=arrivals,
            max_concurrency=options.max_concurrency,
            stop=stop,
            on_done=on_done,
        )


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
