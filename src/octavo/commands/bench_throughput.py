"""Measure a running server's throughput: all requests at once, as vllm bench throughput does without a server.

Prompts are chosen by the flags of octavo bench serve; --max-concurrency keeps that many requests under way. Flags of
its report and of the rate are unknown here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from octavo.bench import report as bench_report
from octavo.bench.http import HttpError
from octavo.bench.metrics import measure as measure_metrics
from octavo.bench.options import BenchError, BenchOptions, resolve
from octavo.bench.prompts import PromptError
from octavo.commands.bench_load import measure
from octavo.commands.failure import one_line
from octavo.flags import add_flags, flags_of, read

PROG = "octavo bench throughput"
# fields of BenchOptions that would change nothing here
WITHOUT = (
    "request_rate", "burstiness", "ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps", "self_timed",
    "percentile_metrics", "metric_percentiles", "goodput", "cost_per_hour", "num_gpus",
    "save_result", "save_detailed", "append_result", "plot", "timeline_itl_thresholds", "result_dir",
    "result_filename", "label", "metadata",
)  # fmt: skip


class ThroughputOptions(BenchOptions, frozen=True, kw_only=True):
    """The options of a load, and where the figures go."""

    output_json: Annotated[
        Path | None, Meta(description="write the figures here, with vLLM's keys", extra={"metavar": "FILE"})
    ] = None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, [flag for flag in flags_of(ThroughputOptions) if flag.field not in WITHOUT])


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    try:
        return _measured(resolve(read(ThroughputOptions, args)))
    except (BenchError, HttpError, PromptError, OSError) as e:
        print(f"{PROG}: {one_line(e)}", file=sys.stderr)
        return 1


def _measured(options: ThroughputOptions) -> int:
    result = measure(msgspec.structs.replace(options, self_timed=False)).result
    found = measure_metrics(result, [], {})
    print(
        f"Throughput: {found.request_throughput:.2f} requests/s, {found.total_throughput:.2f} total tokens/s, "
        f"{found.output_throughput:.2f} output tokens/s\n"
        f"Total num prompt tokens:  {found.total_input}\n"
        f"Total num output tokens:  {found.total_output}"
    )
    for line in (*bench_report.notes(result), *bench_report.failure_lines(result.records)):
        print(f"{PROG}: {line}", file=sys.stderr)
    if options.output_json is not None:
        content = {
            "elapsed_time": found.duration,
            "num_requests": found.completed,
            "total_num_tokens": found.total_input + found.total_output,
            "requests_per_second": found.request_throughput,
            "tokens_per_second": found.total_throughput,
            "output_tokens_per_second": found.output_throughput,
        }
        options.output_json.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    if result.num_unfinished:
        return 130
    return 1 if found.failed else 0
