"""Measure a running server at many settings, several times each: every combination of what --sweep names.

    octavo bench sweep --sweep request_rate=1,2,4,8 --sweep random_input_len=512,2048 --num-runs 3 -o results

Each run is a file, which is not measured again; summary.csv has a line for each. octavo bench compare reads them.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from octavo.bench.http import HttpError
from octavo.bench.options import BenchError, BenchOptions, resolve
from octavo.bench.prompts import PromptError
from octavo.bench.report import check_metadata, evaluate, failure_lines, result_json
from octavo.commands.bench_load import measure
from octavo.commands.failure import one_line
from octavo.flags import add_flags, flags_of, read
from octavo.report.files import write_whole

PROG = "octavo bench sweep"
ALL_RUNS = "runs.jsonl"
# fields of BenchOptions that would change nothing here: each run has a file anyway
WITHOUT = ("save_result", "append_result", "plot", "timeline_itl_thresholds", "result_dir", "result_filename")


def parse_axis(text: str) -> tuple[str, list[str]]:
    """'request_rate=1,2,4'. Raises ValueError."""
    name, equals, values = text.partition("=")
    if not (name and equals and values):
        raise ValueError(f"{text!r} is not NAME=VALUE,VALUE,... with the name of a flag")
    return name.strip().lstrip("-").replace("_", "-"), values.split(",")


class SweepOptions(BenchOptions, frozen=True, kw_only=True):
    """The options of each load, and what varies."""

    sweep: Annotated[
        list[tuple[str, list[str]]],
        Meta(
            description="flags of octavo bench serve and their values, such as max_concurrency=1,8,32",
            extra={"group": "sweep", "metavar": "NAME=VALUES", "default": "nothing", "parse_each": parse_axis},
        ),
    ] = msgspec.field(default_factory=list)
    bench_params: Annotated[
        Path | None,
        Meta(description="JSON: a list of objects of flags and values, vLLM's", extra={"metavar": "FILE"}),
    ] = None
    num_runs: Annotated[int, Meta(ge=1, description="runs of each combination", extra={"metavar": "N"})] = 3
    output_dir: Annotated[
        Path, Meta(description="where results go", extra={"flag": ("-o", "--output-dir"), "metavar": "DIR"})
    ] = Path("results")
    dry_run: Annotated[bool, Meta(description="only say what would be measured")] = False


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, [flag for flag in flags_of(SweepOptions) if flag.field not in WITHOUT])
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, and write the summary; returns the exit code."""
    options = read(SweepOptions, args)
    try:
        combinations = _combinations(options)
        rows = []
        failed = 0
        for combination in combinations:
            for number in range(options.num_runs):
                path = options.output_dir / _name(combination) / f"run={number}.json"
                there = " is there already, and is not measured again" if path.exists() else ""
                print(f"{_name(combination)}, run {number + 1} of {options.num_runs}: {path}{there}", flush=True)
                if options.dry_run:
                    continue
                if not path.exists():
                    failed += _one(args, options, combination, number, path)
                rows.append(combination | _figures(path, number))
            if not options.dry_run:
                _gather(options.output_dir / _name(combination), options.num_runs)
        if rows:
            _summary(options.output_dir / "summary.csv", rows)
    except (BenchError, HttpError, PromptError, OSError, ValueError) as e:
        print(f"{PROG}: {one_line(e)}", file=sys.stderr)
        return 1
    return 1 if failed else 0


def _combinations(options: SweepOptions) -> list[dict[str, str]]:
    """Each element of --bench-params with each combination of the axes."""
    fixed: list[dict[str, str]] = [{}]
    if options.bench_params is not None:
        content = _json_of(options.bench_params)
        if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
            raise BenchError(f"{options.bench_params} is not a list of objects")
        fixed = [{str(key).replace("_", "-"): str(value) for key, value in item.items()} for item in content]
    names = [name for name, _ in options.sweep]
    crossed = itertools.product(*(values for _, values in options.sweep))
    return [item | dict(zip(names, values, strict=True)) for values in crossed for item in fixed]


def _json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise BenchError(f"{path} is not JSON: {e}") from e


def _name(combination: Mapping[str, str]) -> str:
    """A folder's name, as vLLM makes it."""
    return "-".join(f"{name}={value}" for name, value in combination.items()).replace("/", "_") or "default"


def _one(
    args: argparse.Namespace, options: SweepOptions, combination: Mapping[str, str], number: int, path: Path
) -> int:
    """Measure one run and write its file; returns 1 if a request failed."""
    words = [word for name, value in combination.items() for word in (f"--{name}", *shlex.split(value))]
    chosen = vars(args.parser.parse_args(words))
    fields = set(BenchOptions.__struct_fields__)
    if own := [name for name in SweepOptions.__struct_fields__ if name in chosen and name not in fields]:
        raise BenchError(f"--{own[0].replace('_', '-')} is the sweep's own, and the same for all of its loads")
    run_options = resolve(read(BenchOptions, argparse.Namespace(**vars(args) | chosen)))
    if options.seed is not None:
        run_options = msgspec.structs.replace(run_options, seed=options.seed + number)
    check_metadata(run_options)
    measured = measure(run_options)
    found, prices = evaluate(measured.result, run_options)
    for line in failure_lines(measured.result.records):
        print(f"{PROG}: {line}", file=sys.stderr)
    if measured.result.num_unfinished:
        raise KeyboardInterrupt
    path.parent.mkdir(parents=True, exist_ok=True)
    content = result_json(run_options, measured.model, measured.result, found, prices)
    write_whole(path, json.dumps(content) + "\n")  # a file that is there is not measured again
    return int(found.failed > 0)


def _figures(path: Path, number: int) -> dict[str, Any]:
    """The scalars of a run's file."""
    content = _json_of(path)
    if not isinstance(content, dict):
        raise BenchError(f"{path} is no result of octavo bench")
    return {"run": number} | {key: value for key, value in content.items() if not isinstance(value, list | dict)}


def _gather(folder: Path, num_runs: int) -> None:
    """All runs of a combination as lines of one file, which octavo bench compare takes for repetitions."""
    lines = [(folder / f"run={number}.json").read_text(encoding="utf-8").strip() for number in range(num_runs)]
    (folder / ALL_RUNS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _summary(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {path}")
