"""The options of a server's benchmark, and of `octavo bench`, with vLLM's names and defaults."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from octavo.bench.prompt_options import OUTPUT_LEN, PromptOptions, sources_conflict
from octavo.bench.workloads import WORKLOADS
from octavo.flags import number, parse_json_object, parse_pair

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
OWN_FIELDS = ("prompt", "messages", "input", "stream", "stream_options")  # of a request's body


class BenchError(ValueError):
    """Options that don't go together; the message is one line."""


def parse_metrics(text: str) -> list[str]:
    """'ttft,itl'. Raises ValueError."""
    names = text.split(",")
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(METRICS)}")
    return names


def parse_percentiles(text: str) -> list[float]:
    """'25,50,99'. Raises ValueError."""
    parse = number(float, Meta(ge=0, le=100), "a percentile, from 0 to 100")
    return [parse(part) for part in text.split(",")]


def parse_goodput(text: str) -> tuple[str, float]:
    """'ttft:500', a metric and its limit in milliseconds. Raises ValueError."""
    name, _, value = text.partition(":")
    if name not in GOODPUT_METRICS:
        raise ValueError(f"{text!r} is not METRIC:MS with ttft, tpot or e2el")
    return name, number(float, Meta(gt=0))(value)


def parse_thresholds(text: str) -> tuple[float, float]:
    """'25,50'. Raises ValueError."""
    parts = [number(float, Meta(gt=0))(part) for part in text.split(",")]
    if len(parts) != 2 or parts[0] > parts[1]:
        raise ValueError(f"{text!r} is not two numbers of milliseconds, the smaller first, such as 25,50")
    return parts[0], parts[1]


class BenchOptions(PromptOptions, frozen=True, kw_only=True):
    """All options, as given; `resolve` fills in the defaults that depend on other options."""

    # load
    request_rate: Annotated[
        float,
        Meta(
            gt=0,
            description="requests a second, at random times (a Poisson process); inf: all at once",
            extra={"group": "load", "metavar": "RPS"},
        ),
    ] = float("inf")
    burstiness: Annotated[
        float | None,
        Meta(
            gt=0,
            description="shape of the gamma distribution of the gaps: under 1 in bursts, above 1 more even, inf: even",
            extra={"metavar": "B", "default": "1, or the workload's own"},
        ),
    ] = None
    ramp_up_strategy: Annotated[
        Literal["linear", "exponential"] | None,
        Meta(description="a rate that changes over the load", extra={"default": "one rate"}),
    ] = None
    ramp_up_start_rps: Annotated[
        float | None, Meta(gt=0, le=1e9, description="its beginning", extra={"metavar": "RPS", "default": "none"})
    ] = None
    ramp_up_end_rps: Annotated[
        float | None, Meta(gt=0, le=1e9, description="its end", extra={"metavar": "RPS", "default": "none"})
    ] = None
    self_timed: Annotated[
        bool | None,
        Meta(
            description="send requests at the times of the trace",
            extra={"default": "with a trace that has times, without --request-rate and --ramp-up-strategy"},
        ),
    ] = None
    max_concurrency: Annotated[
        int | None, Meta(ge=1, description="requests at one time", extra={"metavar": "N", "default": "no limit"})
    ] = None
    max_seconds: Annotated[
        float | None,
        Meta(
            gt=0,
            le=1e9,
            description="measure so long: with a rate, as many prompts as it takes are made",
            extra={"metavar": "SECONDS", "default": "until all prompts are answered"},
        ),
    ] = None
    num_warmups: Annotated[int, Meta(ge=0, description="requests before the measured ones", extra={"metavar": "N"})] = 0
    warmup_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=1e9,
            description="don't measure requests that begin so early in the load",
            extra={"metavar": "SECONDS", "default": "all are measured"},
        ),
    ] = 0

    request_id_prefix: Annotated[
        str,
        Meta(
            description="send X-Request-Id: this and the request's number",
            extra={"metavar": "TEXT", "default": "no ids"},
        ),
    ] = ""
    profile: Annotated[
        bool, Meta(description="ask the server for a profile of the load: POST /start_profile and /stop_profile")
    ] = False

    # sampling
    ignore_eos: Annotated[
        bool | None,
        Meta(
            description="generate up to the length that was asked for",
            extra={"group": "sampling", "default": "where prompts are made of lengths alone"},
        ),
    ] = None
    temperature: Annotated[
        float | None, Meta(description="sampling temperature", extra={"metavar": "T", "default": "the server's own"})
    ] = None
    top_p: Annotated[float | None, Meta(description="top-p", extra={"metavar": "P", "default": "the server's own"})] = (
        None
    )
    top_k: Annotated[int | None, Meta(description="top-k", extra={"metavar": "K", "default": "the server's own"})] = (
        None
    )
    min_p: Annotated[float | None, Meta(description="min-p", extra={"metavar": "P", "default": "the server's own"})] = (
        None
    )
    frequency_penalty: Annotated[
        float | None, Meta(description="frequency penalty", extra={"metavar": "P", "default": "the server's own"})
    ] = None
    presence_penalty: Annotated[
        float | None, Meta(description="presence penalty", extra={"metavar": "P", "default": "the server's own"})
    ] = None
    repetition_penalty: Annotated[
        float | None, Meta(description="repetition penalty", extra={"metavar": "P", "default": "the server's own"})
    ] = None
    logprobs: Annotated[
        int | None, Meta(ge=0, description="log-probabilities a token", extra={"metavar": "N", "default": "none"})
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any],
        Meta(
            description="variables of the chat template, such as '{\"enable_thinking\": false}'",
            extra={"metavar": "JSON", "default": "none", "parse": parse_json_object},
        ),
    ] = msgspec.field(default_factory=dict)
    lora_modules: Annotated[
        list[str],
        Meta(description="names of adapters, of which each request asks one", extra={"metavar": "NAME"}),
    ] = msgspec.field(default_factory=list)
    lora_assignment: Annotated[Literal["random", "round-robin"], Meta(description="which adapter a request asks")] = (
        "random"
    )
    extra_body: Annotated[
        dict[str, Any],
        Meta(
            description="more fields of the request",
            extra={"metavar": "JSON", "default": "none", "parse": parse_json_object},
        ),
    ] = msgspec.field(default_factory=dict)

    # numbers
    percentile_metrics: Annotated[
        list[str],
        Meta(
            description="latencies to report, of ttft,tpot,itl,e2el",
            extra={"group": "numbers", "metavar": "LIST", "default": "all; of embeddings e2el", "parse": parse_metrics},
        ),
    ] = msgspec.field(default_factory=list)
    metric_percentiles: Annotated[
        list[float],
        Meta(
            description="percentiles to report, such as 25,50,99",
            extra={"metavar": "LIST", "default": "99", "parse": parse_percentiles},
        ),
    ] = msgspec.field(default_factory=lambda: [99.0])
    goodput: Annotated[
        list[tuple[str, float]],
        Meta(
            description="count what stays within all of these, of ttft, tpot and e2el: ttft:500 tpot:50",
            extra={"metavar": "METRIC:MS", "default": "not reported", "parse_each": parse_goodput},
        ),
    ] = msgspec.field(default_factory=list)
    cost_per_hour: Annotated[
        float | None,
        Meta(
            gt=0,
            description="price of one GPU, or of the machine",
            extra={"metavar": "DOLLARS", "default": "no costs"},
        ),
    ] = None
    num_gpus: Annotated[int, Meta(ge=1, description="GPUs that cost as much", extra={"metavar": "N"})] = 1

    # output
    save_result: Annotated[
        bool, Meta(description="write a JSON file with vLLM's key names", extra={"group": "output"})
    ] = False
    save_detailed: Annotated[bool, Meta(description="in it, also each request's times, text and error")] = False
    append_result: Annotated[
        bool, Meta(description="add the result as a line to a file of JSON lines, and make it if there is none")
    ] = False
    plot: Annotated[
        bool,
        Meta(
            description="write a page of charts, which needs no network, beside it: a timeline of requests, latencies "
            "over time and their distributions, throughput, lengths",
            extra={"aliases": ("--plot-timeline", "--plot-dataset-stats")},
        ),
    ] = False
    timeline_itl_thresholds: Annotated[
        tuple[float, float],
        Meta(
            description="gaps between tokens, in ms, that color the timeline: shorter, between, longer",
            extra={"metavar": "MS,MS", "default": "25,50", "parse": parse_thresholds},
        ),
    ] = (25.0, 50.0)
    result_dir: Annotated[
        Path | None, Meta(description="where to write it", extra={"metavar": "DIR", "default": "here"})
    ] = None
    result_filename: Annotated[
        str | None,
        Meta(
            description="its name",
            extra={"metavar": "NAME", "default": "LABEL-RATEqps[-concurrencyN]-MODEL-DATE.json"},
        ),
    ] = None
    label: Annotated[str | None, Meta(description="what it is named after", extra={"default": "the backend"})] = None
    metadata: Annotated[
        list[tuple[str, str]],
        Meta(description="keys to add to it", extra={"metavar": "KEY=VALUE", "parse_each": parse_pair}),
    ] = msgspec.field(default_factory=list)
    disable_tqdm: Annotated[bool, Meta(description="show no progress bar")] = False


Options = TypeVar("Options", bound=BenchOptions)


def resolve(options: Options) -> Options:
    """Fill in the defaults that depend on other options; raises BenchError for options that don't go together."""
    if wrong := sources_conflict(options) or _load_conflict(options):
        raise BenchError(wrong)
    if taken := [name for name in OWN_FIELDS if name in options.extra_body]:
        raise BenchError(f"--extra-body: {', '.join(taken)} is for octavo bench to set")
    if options.extra_body.get("n") not in (None, 1):
        raise BenchError("--extra-body: n must be 1: the answers of one request can't be told apart by their times")
    workload = None if options.workload is None else WORKLOADS[options.workload]
    return msgspec.structs.replace(
        options,
        base_url=options.address,
        endpoint=options.path,
        output_len=options.output_len or (OUTPUT_LEN[options.dataset_name] if options.is_random else 0),
        percentile_metrics=options.percentile_metrics or (["e2el"] if options.embeddings else list(METRICS)),
        burstiness=options.burstiness or (workload.burstiness if workload else 1.0),
        seed=random.SystemRandom().randrange(10**6) if options.seed is None else options.seed,
    )


def _load_conflict(options: BenchOptions) -> str | None:
    """What is wrong with the load, or None."""
    ramp = options.ramp_up_strategy is not None
    limits = (options.ramp_up_start_rps, options.ramp_up_end_rps)
    if ramp != any(limit is not None for limit in limits) or (ramp and None in limits):
        return "--ramp-up-strategy, --ramp-up-start-rps and --ramp-up-end-rps go together"
    if ramp and options.request_rate != math.inf:
        return "--request-rate and --ramp-up-strategy exclude each other: both say how fast requests come"
    if ramp and options.max_seconds is not None:
        return "--max-seconds goes with a rate that stays: a ramp is over when all of its prompts are sent"
    if options.self_timed and not options.keeps_times:
        return "--self-timed goes with --trace: nothing else has times of its own"
    if options.self_timed and (ramp or options.request_rate != math.inf):
        return "--self-timed excludes --request-rate and --ramp-up-strategy: all say when requests come"
    return None
