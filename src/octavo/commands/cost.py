"""Say what a million tokens costs: each model's highest load within an SLO, its quality, and dollars, in one report.

A MODEL is a checkpoint or a Hub id; MODEL@W8A8, MODEL@fp8, MODEL@int8, MODEL@W4A16@64/gptq, which is quantized first;
or the URL of a running server of anybody. LABEL=MODEL names it. Flags for `octavo serve` go behind `--`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from octavo.bench.options import parse_goodput
from octavo.bench.workloads import WORKLOADS
from octavo.commands.failure import one_line
from octavo.commands.progress_bar import progress_bar
from octavo.commands.termination import unwinding_when_terminated
from octavo.flags import add_flags, flags_of, number, parse_count, read
from octavo.jobs.cost.prices import ApiPrice, parse_api_price
from octavo.kernels.native.environment import ENVIRONMENT

if TYPE_CHECKING:
    from octavo.jobs.cost.job import CostJob, Surroundings
    from octavo.jobs.cost.page import Wanted
    from octavo.jobs.cost.plan import Settings
    from octavo.own_server import OwnServer

PROG = "octavo cost"


class CostError(ValueError):
    """Options that can't be followed; the message is one line."""


def parse_percentile(text: str) -> float:
    """Of the requests that keep the SLO. Raises ValueError."""
    value: float = number(float, Meta(ge=50, lt=100), "a percentile from 50 to below 100")(text)
    return value


class CostOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The flags of `octavo cost`."""

    models: Annotated[
        list[str],
        Meta(
            description="checkpoints, Hub ids, MODEL@SCHEME[@GROUP][/ALGORITHM], or URLs of running servers; the "
            "others' quality is measured against the first",
            extra={"positional": True, "metavar": "MODEL"},
        ),
    ]
    output: Annotated[
        Path,
        Meta(
            description="the report's directory; a second run with it goes on where the first one ended",
            extra={"flag": ("-o", "--output"), "metavar": "REPORT"},
        ),
    ]
    overwrite: Annotated[bool, Meta(description="begin anew", extra={"default": "go on"})] = False

    cost_per_hour: Annotated[
        float | None,
        Meta(gt=0, description="price of the machine", extra={"group": "prices", "metavar": "DOLLARS"}),
    ] = None
    machine: Annotated[
        str | None,
        Meta(description="take the price from the table of prices", extra={"metavar": "NAME"}),
    ] = None
    prices: Annotated[
        Path | None,
        Meta(description="a table of prices of your own, which adds to octavo's", extra={"metavar": "FILE"}),
    ] = None
    compare_price: Annotated[
        list[ApiPrice],
        Meta(
            description="an API's prices in dollars per million tokens, to be compared",
            extra={"metavar": "NAME=IN/OUT", "default": "none", "parse_each": parse_api_price},
        ),
    ] = []
    tokens_per_day: Annotated[
        int | None,
        Meta(
            description="input and output tokens of a day, to say how many machines they take: 10m, 2g",
            extra={"metavar": "N", "default": "not said", "parse": parse_count},
        ),
    ] = None

    slo: Annotated[
        list[tuple[str, float]],
        Meta(
            description="limits that requests must keep, of ttft, tpot and e2el in milliseconds",
            extra={
                "group": "the service level",
                "metavar": "METRIC:MS",
                "default": "ttft:500 tpot:50",
                "parse_each": parse_goodput,
            },
        ),
    ] = []
    slo_percentile: Annotated[
        float,
        Meta(
            description="percent of the requests that must keep all of them",
            extra={"metavar": "P", "parse": parse_percentile},
        ),
    ] = 99.0

    workload: Annotated[
        str,
        Meta(
            description="lengths and conversations as published traces have them",
            extra={"group": "the load", "choices": tuple(WORKLOADS), "default": "random prompts of one length"},
        ),
    ] = ""
    workload_scale: Annotated[
        float, Meta(gt=0, le=100, description="all of the workload's lengths times X", extra={"metavar": "X"})
    ] = 1.0
    input_len: Annotated[int, Meta(ge=1, description="tokens of a random prompt", extra={"metavar": "N"})] = 256
    output_len: Annotated[int, Meta(ge=2, description="tokens of its answer", extra={"metavar": "N"})] = 64
    concurrency: Annotated[
        list[int],
        Meta(
            description="requests at a time of the closed loads; the highest is to saturate the server",
            extra={"metavar": "N", "default": "1 8 32", "parse_each": parse_count},
        ),
    ] = []
    seconds: Annotated[
        float,
        Meta(
            ge=0.1,
            description="of each load; a model takes some thirty loads",
            extra={"metavar": "S"},
        ),
    ] = 30.0
    repetitions: Annotated[
        int, Meta(ge=1, le=100, description="of each load; intervals come from them", extra={"metavar": "N"})
    ] = 3
    seed: Annotated[int, Meta(ge=0, description="of prompts and times")] = 0
    backend: Annotated[
        str,
        Meta(
            description="openai: completions; openai-chat: the prompt is a user's message",
            extra={"choices": ("openai", "openai-chat")},
        ),
    ] = "openai"
    ignore_eos: Annotated[
        bool,
        Meta(
            description="let answers end early: servers such as OpenAI's refuse ignore_eos",
            extra={"flag": "--no-ignore-eos", "default": "answers have the length that was asked for"},
        ),
    ] = True
    served_model_name: Annotated[
        str | None,
        Meta(
            description="the model's name on servers given by URL",
            extra={"metavar": "NAME", "default": "their first one"},
        ),
    ] = None
    api_key: Annotated[
        str | None,
        Meta(description="for servers given by URL", extra={"metavar": "KEY", "default": "$OPENAI_API_KEY"}),
    ] = None

    quality: Annotated[
        bool,
        Meta(
            description="don't measure quality",
            extra={"group": "quality", "flag": "--no-quality", "default": "measure it"},
        ),
    ] = True
    eval_tokens: Annotated[
        int, Meta(ge=2, description="tokens of octavo's held-out text to measure on", extra={"metavar": "N"})
    ] = 2048
    tasks: Annotated[
        list[str],
        Meta(
            description="tasks of lm-eval, to be run on each server; lm-eval[api] must be installed beside octavo",
            extra={"metavar": "TASK", "default": "none"},
        ),
    ] = []
    tasks_path: Annotated[Path | None, Meta(description="a folder of tasks of your own", extra={"metavar": "DIR"})] = (
        None
    )
    tasks_limit: Annotated[
        int | None, Meta(ge=1, description="documents of each task", extra={"metavar": "N", "default": "all"})
    ] = None
    max_kl: Annotated[
        float,
        Meta(
            ge=0,
            description="a model whose mean KL to the first one is above is not recommended",
            extra={"metavar": "X"},
        ),
    ] = 0.1


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, flags_of(CostOptions))
    parser.set_defaults(serve_flags=())


def own_words(arguments: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The command line without what stands behind `--`, which is for the server."""
    words = list(arguments)
    if "--" in words:
        at = words.index("--")
        parser.set_defaults(serve_flags=tuple(words[at + 1 :]))
        words = words[:at]
    return words


def run(args: argparse.Namespace) -> int:
    """Measure and write; returns the exit code: 1 where a model could not be measured, 130 on Ctrl-C."""
    os.environ.update({**ENVIRONMENT, **os.environ})  # before torch is imported, here and in children
    from octavo.jobs.cost import job as cost_job
    from octavo.jobs.cost.client import ServerError
    from octavo.jobs.cost.prices import PriceError
    from octavo.jobs.cost.state import StateError
    from octavo.jobs.cost.targets import TargetError
    from octavo.jobs.cost.wording import duration
    from octavo.quant.model_files import CheckpointError

    try:
        job = _job(read(CostOptions, args), args.serve_flags)
        with unwinding_when_terminated(PROG), _surroundings() as around:
            around.say(
                f"about {duration(job.seconds * len(job.targets))} of loads in all; Ctrl-C keeps what is measured"
            )
            state = cost_job.run(job, around)
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; the same command goes on with what is measured", file=sys.stderr)
        return 130
    except (CostError, ServerError, TargetError, PriceError, StateError, CheckpointError, OSError) as e:
        print(f"{PROG}: {one_line(e)}", file=sys.stderr)
        return 1
    for line in cost_job.answer_lines(job, state):
        print(line)
    print(f"written: {job.output / 'report.html'}, report.md, report.json, points.csv")
    return 1 if any(server.problem for server in state.servers) else 0


def _job(options: CostOptions, serve_flags: tuple[str, ...]) -> CostJob:
    """Raises CostError, TargetError, PriceError, CheckpointError and OSError before anything takes long."""
    from octavo.jobs.cost.client import Asking
    from octavo.jobs.cost.job import CostJob, check_targets
    from octavo.jobs.cost.plan import Settings
    from octavo.jobs.cost.targets import parse_targets
    from octavo.jobs.cost.tasks import Tasks, is_installed, missing_tasks

    slo = dict(options.slo or [("ttft", 500.0), ("tpot", 50.0)])
    settings = Settings(
        slo=slo,
        percentile=options.slo_percentile,
        concurrency=tuple(sorted(set(options.concurrency or [1, 8, 32]))),
        seconds=options.seconds,
        repetitions=options.repetitions,
        seed=options.seed,
    )
    asking = Asking(
        chat=options.backend == "openai-chat",
        ignore_eos=options.ignore_eos,
        workload=options.workload,
        scale=options.workload_scale,
        input_len=options.input_len,
        output_len=options.output_len,
    )
    if options.tasks and not is_installed():
        raise CostError(missing_tasks(options.tasks))
    job = CostJob(
        targets=tuple(parse_targets(options.models)),
        output=options.output,
        asking=asking,
        settings=settings,
        wanted=_wanted(options, settings),
        serve_flags=serve_flags,
        eval_tokens=options.eval_tokens,
        quality=options.quality,
        tasks=Tasks(tuple(options.tasks), options.tasks_path, options.tasks_limit),
        api_key=options.api_key or os.environ.get("OPENAI_API_KEY"),
        served_name=options.served_model_name,
        overwrite=options.overwrite,
    )
    check_targets(job)
    return job


def _wanted(options: CostOptions, settings: Settings) -> Wanted:
    from octavo.jobs.cost.figures import Question
    from octavo.jobs.cost.page import Wanted
    from octavo.jobs.cost.prices import machine_named

    if (options.cost_per_hour is None) == (options.machine is None):
        raise CostError("a price is needed: --cost-per-hour DOLLARS, or --machine NAME out of the table of prices")
    if options.machine is not None:
        machine = machine_named(options.machine, options.prices)
        dollars = machine.cost_per_hour
        source = f"{options.machine}, {machine.what}; {machine.source}, {machine.date}"
    else:
        dollars = options.cost_per_hour or 0.0
        source = "as given by --cost-per-hour"
    tokens = None if options.tokens_per_day is None else float(options.tokens_per_day)
    question = Question(settings, dollars, tokens, tuple(options.compare_price))
    return Wanted(question, options.max_kl, source)


@contextmanager
def _surroundings() -> Iterator[Surroundings]:
    from octavo.jobs.cost.job import Surroundings

    with progress_bar("loads") as bar:
        yield Surroundings(serve=_served, octavo=_octavo, program=_program, progress=bar.progress, say=bar.say)


@contextmanager
def _served(*words: str) -> Iterator[OwnServer]:
    """`octavo serve WORDS`, whose end raises ServerError."""
    from octavo.jobs.cost.client import ServerError
    from octavo.own_server import ServerEndedError, own_server

    try:
        with own_server(*words) as server:
            yield server
    except ServerEndedError as e:
        raise ServerError(str(e)) from e


def _octavo(words: Sequence[str]) -> tuple[int, str]:
    """`octavo WORDS` to its end: its exit code and the last line that it wrote to stderr."""
    return _program([sys.executable, "-m", "octavo", *words], None)


def _program(words: Sequence[str], api_key: str | None) -> tuple[int, str]:
    """The same of any program, which finds the key where OpenAI's clients look for it."""
    environment = os.environ | ({"OPENAI_API_KEY": api_key} if api_key else {})
    null = subprocess.DEVNULL
    process = subprocess.Popen(words, stdin=null, stdout=null, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        _, errors = process.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            process.terminate()
        process.wait()
        raise
    lines = errors.strip().splitlines()
    return process.returncode, lines[-1] if lines else ""
