"""Measure how long octavo serve takes from its start to its first token, as vllm bench startup does.

A cold start has an empty cache of compiled CPU kernels, a warm one the cache of this user. The model's files may be in
the page cache in both.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Annotated

import msgspec
import numpy as np
import uvloop
from msgspec import Meta

from octavo.bench.http import Client, HttpError
from octavo.bench.load import ask
from octavo.bench.metrics import seconds_percentiles
from octavo.bench.prompts import Prompt
from octavo.bench.run import Target, first_model
from octavo.commands.failure import one_line
from octavo.flags import add_flags, flags_of, read
from octavo.jobs.written import why_unwritten
from octavo.own_server import OwnServer, ServerEndedError, own_server
from octavo.quant.hub import resolve_model
from octavo.quant.model_files import CheckpointError

PROG = "octavo bench startup"
PHASES = {"startup": "Startup time", "first_token": "Time to the first token"}


class StartupOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The model, how it is served, and how often it is started."""

    model: Annotated[str, Meta(description="as octavo serve takes it", extra={"positional": True})]
    serve_flags: Annotated[
        list[str],
        Meta(
            description="flags of octavo serve, in one word",
            extra={"metavar": "'FLAGS'", "default": "none", "parse": shlex.split},
        ),
    ] = msgspec.field(default_factory=list)
    num_iters_cold: Annotated[int, Meta(ge=0, description="cold starts", extra={"metavar": "N"})] = 3
    num_iters_warmup: Annotated[
        int, Meta(ge=0, description="starts before the warm ones, which fill the cache", extra={"metavar": "N"})
    ] = 1
    num_iters_warm: Annotated[int, Meta(ge=0, description="warm starts", extra={"metavar": "N"})] = 3
    output_json: Annotated[
        Path | None, Meta(description="write the figures here, with vLLM's keys", extra={"metavar": "FILE"})
    ] = None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, flags_of(StartupOptions))


def run(args: argparse.Namespace) -> int:
    """Start servers one after the other; returns the exit code."""
    options = read(StartupOptions, args)
    found: dict[str, object] = {}
    try:
        if (why := why_unwritten(resolve_model(options.model), options.serve_flags)) is not None:
            raise CheckpointError(f"{options.model}: {why}")
        for kind, start in (("cold", _cold), ("warm", _warm)):
            if starts := start(options):
                found |= _report(kind, starts)
        if options.output_json is not None:
            options.output_json.write_text(json.dumps(found, indent=4) + "\n", encoding="utf-8")
    except (ServerEndedError, HttpError, CheckpointError, OSError) as e:
        print(f"{PROG}: {one_line(e)}", file=sys.stderr)
        return 1
    return 0


def _cold(options: StartupOptions) -> list[dict[str, float]]:
    found = []
    for _ in range(options.num_iters_cold):
        with tempfile.TemporaryDirectory() as cache:
            found.append(_started(options, {"NUMBA_CACHE_DIR": cache}))
    return found


def _warm(options: StartupOptions) -> list[dict[str, float]]:
    if not options.num_iters_warm:
        return []
    starts = [_started(options, {}) for _ in range(options.num_iters_warmup + options.num_iters_warm)]
    return starts[options.num_iters_warmup :]


def _started(options: StartupOptions, environment: Mapping[str, str]) -> dict[str, float]:
    """The seconds of one start."""
    begun = perf_counter()
    with own_server(options.model, *options.serve_flags, environment=environment) as server:
        server.wait_until_ready()
        ready = perf_counter() - begun
        uvloop.run(_first_token(server))
        return {"startup": ready, "first_token": perf_counter() - begun}


async def _first_token(server: OwnServer) -> None:
    client = Client(server.url, {"Authorization": f"Bearer {server.api_key}"})
    try:
        target = Target(await first_model(client))
        record = await ask(client, target.path, target.request(Prompt("The", None, 1)))
    finally:
        client.close()
    if record.error is not None:
        raise HttpError(record.error)


def _report(kind: str, starts: list[dict[str, float]]) -> dict[str, object]:
    """Print one kind of starts; returns its figures for the file."""
    print(f"{kind.upper()} STARTUP:")
    found: dict[str, object] = {}
    for phase, title in PHASES.items():
        values = [start[phase] for start in starts]
        percentiles = seconds_percentiles(values)
        print(f"Avg {title.lower()}: {np.mean(values):.2f} seconds")
        print(f"{title} percentiles:")
        for percentile, value in percentiles.items():
            print(f"  {percentile}%: {value:.2f} seconds")
        found |= {
            f"avg_{kind}_{phase}_time": float(np.mean(values)),
            f"{kind}_{phase}_times": values,
            f"{kind}_{phase}_percentiles": percentiles,
        }
    return found
