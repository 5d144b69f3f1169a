"""Measure how long a running server takes for one batch of requests, as vllm bench latency does without a server.

A batch is a number of random prompts that are sent at the same time; its latency is the time until all are answered.
Every batch has new prompts, so that none is found in the prefix cache.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import uvloop
from msgspec import Meta

from octavo.bench.http import HttpError
from octavo.bench.metrics import seconds_percentiles
from octavo.bench.prompts import PromptError, RandomShape, measure_vocabulary, random_prompts
from octavo.bench.run import Point, Target, run_point
from octavo.bench.server_options import ServerOptions
from octavo.commands.bench_load import allow_many_sockets, model_of
from octavo.commands.failure import one_line
from octavo.flags import add_flags, flags_of, read

PROG = "octavo bench latency"


class LatencyOptions(ServerOptions, frozen=True, kw_only=True):
    """The server, and the batches."""

    input_len: Annotated[
        int, Meta(ge=1, description="tokens of a prompt", extra={"group": "batches", "metavar": "N"})
    ] = 32
    output_len: Annotated[int, Meta(ge=1, description="tokens of an answer", extra={"metavar": "N"})] = 128
    batch_size: Annotated[int, Meta(ge=1, description="requests at one time", extra={"metavar": "N"})] = 8
    num_iters_warmup: Annotated[int, Meta(ge=0, description="batches before the measured", extra={"metavar": "N"})] = 10
    num_iters: Annotated[int, Meta(ge=1, description="batches that are measured", extra={"metavar": "N"})] = 30
    seed: Annotated[
        int | None, Meta(description="seed of the prompts", extra={"default": "a new one each time, which is printed"})
    ] = None
    output_json: Annotated[
        Path | None, Meta(description="write the figures here, with vLLM's keys", extra={"metavar": "FILE"})
    ] = None


@dataclass(frozen=True)
class Batches:
    """Seconds of each batch, and of the first token in it."""

    latencies: list[float]
    first_tokens: list[float]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, flags_of(LatencyOptions))


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    options = read(LatencyOptions, args)
    allow_many_sockets()
    try:
        _report(options, uvloop.run(_measure(options)))
    except (HttpError, PromptError, OSError) as e:
        print(f"{PROG}: {one_line(e)}", file=sys.stderr)
        return 1
    return 0


def _report(options: LatencyOptions, batches: Batches) -> None:
    average = float(np.mean(batches.latencies))
    deviation = float(np.std(batches.latencies))
    percentiles = seconds_percentiles(batches.latencies)
    print(f"Avg latency: {average} seconds")
    print(f"Std latency: {deviation} seconds")
    for percentile, value in percentiles.items():
        print(f"{percentile}% percentile latency: {value} seconds")
    print(f"Avg time to the first token: {np.mean(batches.first_tokens)} seconds")
    if options.output_json is not None:
        content = {
            "avg_latency": average,
            "std_latency": deviation,
            "latencies": batches.latencies,
            "percentiles": percentiles,
        }
        options.output_json.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


async def _measure(options: LatencyOptions) -> Batches:
    client = options.client()
    try:
        model = await model_of(options, client)
        seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
        rng = random.Random(seed)
        vocabulary = await measure_vocabulary(client, model, chat=options.chat)
        target = Target(model, chat=options.chat, endpoint=options.path, embeddings=options.embeddings)
        print(
            f"Model: {model}. Batches of {options.batch_size} prompts of {options.input_len} tokens. Seed: {seed}. "
            f"Not measured, as warm-up: the first {options.num_iters_warmup} batches.",
            flush=True,
        )
        shape = RandomShape(options.input_len, options.output_len)
        found = Batches([], [])
        for number in range(options.num_iters_warmup + options.num_iters):
            prompts = random_prompts(vocabulary, options.batch_size, shape, rng)
            result = await run_point(client, target, prompts, Point(concurrency=options.batch_size), rng=rng)
            if result.first_error:
                raise HttpError(result.first_error)
            if number >= options.num_iters_warmup:
                found.latencies.append(result.duration)
                found.first_tokens.append(min(record.token_times[0] for record in result.records) - result.begin)
        return found
    finally:
        client.close()
