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
from octavo.bench.prompts import Prompt, PromptError, custom_prompts, measure_vocabulary, random_prompts
from octavo.commands.bench_flags import BenchError, configure, resolve

__all__ = ["configure", "run"]

PROG = "octavo bench"


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit code: 1 if a request failed or nothing could be measured, 130 on Ctrl-C."""
    _allow_many_sockets()
    try:
        resolve(args)
        model, result = uvloop.run(_measure(args))
    except (BenchError, HttpError, PromptError, OSError) as e:
        print(f"{PROG}: {e}", file=sys.stderr)
        return 1
    return _report(args, model, result)


def _allow_many_sockets() -> None:
    """Raise the limit of open files as far as it goes: with --request-rate inf, every request has a socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _measure(args: argparse.Namespace) -> tuple[str, LoadResult]:
    """The model's name, and what was measured."""
    client = Client(args.base_url, _headers(args), insecure=args.insecure)
    try:
        model = args.model or await _first_model(client)
        rng = random.Random(args.seed)
        prompts, how = await _prompts(args, client, model, rng)
        print(f"Model: {model}. Prompts: {how} Seed: {args.seed}.", flush=True)
        requests = [_request(args, model, prompt) for prompt in prompts]
        warmups = requests[: args.num_warmups]
        requests = requests[args.num_warmups :]
        if warmups:
            await _warm_up(args, client, warmups)
        arrivals = arrival_times(len(requests), args.request_rate, args.burstiness, rng)
        return model, await _load(args, client, requests, arrivals)
    finally:
        client.close()


def _headers(args: argparse.Namespace) -> dict[str, str]:
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    return ({"Authorization": f"Bearer {key}"} if key else {}) | dict(args.header)


async def _first_model(client: Client) -> str:
    try:
        return str((await client.json("GET", "/v1/models"))["data"][0]["id"])
    except (TypeError, KeyError, IndexError) as e:
        raise HttpError("GET /v1/models names no model; --model does") from e


async def _prompts(
    args: argparse.Namespace, client: Client, model: str, rng: random.Random
) -> tuple[list[Prompt], str]:
    """The prompts, those of the warm-up first, and how they were made."""
    count = args.num_warmups + args.num_prompts
    if args.dataset_name == "custom":
        return custom_prompts(args.dataset_path, count, args.output_len, rng), f"{args.dataset_path}, shuffled."
    vocabulary = await measure_vocabulary(client, model, chat=args.backend == "openai-chat")
    length = args.random_input_len
    ratio = args.random_range_ratio
    prompts = random_prompts(vocabulary, count, length, args.output_len, ratio, rng)
    if vocabulary.exact:
        tokens = sorted({prompt.num_tokens or 0 for prompt in prompts})
        span = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
        return prompts, f"random words, {span} tokens as the server's /tokenize counts them."
    return prompts, f"random words, about {length} tokens: the server has no /tokenize to make them exact."


def _request(args: argparse.Namespace, model: str, prompt: Prompt) -> Request:
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if args.backend == "openai-chat":
        body["messages"] = [{"role": "user", "content": prompt.text}]
        body["max_completion_tokens"] = prompt.output_len
    else:
        body["prompt"] = prompt.text
        body["max_tokens"] = prompt.output_len
    if args.ignore_eos:
        body["ignore_eos"] = True
    if args.temperature is not None:
        body["temperature"] = args.temperature
    return Request(json.dumps(body | args.extra_body).encode(), prompt.num_tokens)


async def _warm_up(args: argparse.Namespace, client: Client, requests: Sequence[Request]) -> None:
    result = await run_load(
        client,
        args.endpoint,
        requests,
        arrivals=[0.0] * len(requests),
        max_concurrency=args.max_concurrency,
        stop=asyncio.Event(),
        on_done=lambda _: None,
    )
    failed = next((record.error for record in result.records if record.error), None)
    if failed:
        raise HttpError(f"a warm-up request failed: {failed}")


async def _load(
    args: argparse.Namespace, client: Client, requests: Sequence[Request], arrivals: Sequence[float]
) -> LoadResult:
    """The measurement itself, which the first Ctrl-C ends early."""
    stop = asyncio.Event()
    with _progress(args, len(requests)) as on_done, _first_interrupt(stop.set):
        return await run_load(
            client,
            args.endpoint,
            requests,
            arrivals=arrivals,
            max_concurrency=args.max_concurrency,
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
def _progress(args: argparse.Namespace, total: int) -> Iterator[Callable[[Record], None]]:
    """A bar on stderr, where that is a terminal; gives what to call for each request that ended."""
    if args.disable_tqdm or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("", total=total)
        failed = 0

        def on_done(record: Record) -> None:
            nonlocal failed
            failed += record.error is not None
            progress.update(task, advance=1, description=f"{failed} failed" if failed else "")

        yield on_done


def _report(args: argparse.Namespace, model: str, result: LoadResult) -> int:
    from octavo.bench import metrics as bench_metrics
    from octavo.bench import report as bench_report

    metrics = bench_metrics.measure(result, args.metric_percentiles, dict(args.goodput))
    prices = None if args.cost_per_hour is None else bench_metrics.cost(metrics, args.cost_per_hour, args.num_gpus)
    lines = bench_report.report_lines(metrics, args, args.percentile_metrics, prices, result.num_unfinished)
    print("\n".join([*lines, *bench_report.notes(result)]), flush=True)
    for line in bench_report.failure_lines(result.records):
        print(f"{PROG}: {line}", file=sys.stderr)
    if args.save_result:
        content = bench_report.result_json(args, model, result, metrics, args.percentile_metrics, prices)
        try:
            print(f"written: {bench_report.save(content, args, model)}")
        except OSError as e:
            print(f"{PROG}: {e}", file=sys.stderr)
            return 1
    if result.num_unfinished:
        return 130
    return 1 if metrics.failed else 0
