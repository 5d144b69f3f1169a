"""Measure a running OpenAI-compatible server: throughput, latency, goodput, and dollars per million tokens.

Flags, report lines and JSON keys are those of `vllm bench serve`, so that numbers of both can be laid side by side.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.bench.http import HttpError
from octavo.bench.options import BenchError, BenchOptions, resolve
from octavo.bench.prompts import PromptError
from octavo.commands.bench_load import Measured, measure
from octavo.commands.failure import one_line
from octavo.flags import add_flags, flags_of, read

if TYPE_CHECKING:
    from octavo.bench.metrics import Metrics

PROG = "octavo bench"
# The first word of a command line, and the module of its command; without one of them it is serve.
SUBCOMMANDS = {
    "serve": "bench",
    "throughput": "bench_throughput",
    "latency": "bench_latency",
    "startup": "bench_startup",
    "sweep": "bench_sweep",
    "compare": "bench_compare",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, flags_of(BenchOptions))
    others = ", ".join(name for name in SUBCOMMANDS if name != "serve")
    parser.epilog = f"octavo bench serve is the same. Others: octavo bench {{{others}}} ...; --help tells of them."


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit code: 1 if a request failed or nothing could be measured, 130 on Ctrl-C."""
    try:
        options = resolve(read(BenchOptions, args))
        if options.save_detailed and not (options.save_result or options.append_result):
            raise BenchError("--save-detailed goes with --save-result or --append-result: it says what they write")
        if options.metadata:
            from octavo.bench.report import check_metadata

            check_metadata(options)
        measured = measure(options)
        return _report(options, measured)
    except (BenchError, HttpError, PromptError, OSError) as e:
        print(f"{PROG}: {one_line(e)}", file=sys.stderr)
        return 1


def _plotted(options: BenchOptions, measured: Measured, metrics: Metrics, date: str) -> Path:
    """Write the page of charts; returns its path."""
    from octavo.bench import report as bench_report
    from octavo.bench.plots import page
    from octavo.report.files import write_whole

    path = bench_report.result_path(options, measured.model, date).with_suffix(".html")
    path.parent.mkdir(parents=True, exist_ok=True)
    title = options.label or measured.model
    write_whole(path, page(title, measured.asked, measured.result, metrics, options.timeline_itl_thresholds).to_html())
    return path


def _report(options: BenchOptions, measured: Measured) -> int:
    from octavo.bench import report as bench_report  # numpy, which --help and a refusal don't need

    result = measured.result
    metrics, prices = bench_report.evaluate(result, options)
    lines = bench_report.report_lines(metrics, options, prices, result.num_unfinished)
    print("\n".join([*lines, *bench_report.notes(result)]), flush=True)
    for line in bench_report.failure_lines(result.records):
        print(f"{PROG}: {line}", file=sys.stderr)
    content = bench_report.result_json(options, measured.model, result, metrics, prices)
    if options.save_result or options.append_result:
        print(f"written: {bench_report.save(content, options, measured.model)}")
    if options.plot:
        print(f"written: {_plotted(options, measured, metrics, content['date'])}")
    if result.num_unfinished:
        return 130
    return 1 if metrics.failed else 0
