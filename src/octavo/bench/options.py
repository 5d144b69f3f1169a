"""The options of a server's benchmark, and of `octavo bench`, with vLLM's names and defaults."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from octavo.flags import number, parse_json_object, parse_pair

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
OWN_FIELDS = ("prompt", "messages", "stream", "stream_options")  # of a request's body


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


class BenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """All options, as given; `resolve` fills in the defaults that depend on other options."""

    # the server
    base_url: Annotated[
        str,
        Meta(
            description="with or without /v1",
            extra={"group": "the server", "metavar": "URL", "default": "http://HOST:PORT"},
        ),
    ] = ""
    host: Annotated[str, Meta(description="where --base-url is not given")] = "127.0.0.1"
    port: Annotated[int, Meta(description="where --base-url is not given")] = 8000
    backend: Annotated[
        Literal["openai", "openai-chat"],
        Meta(description="openai: completions, the prompt as it is; openai-chat: the prompt is a user's message"),
    ] = "openai"
    endpoint: Annotated[
        str,
        Meta(
            description="path of the requests",
            extra={"metavar": "PATH", "default": "/v1/completions or /v1/chat/completions"},
        ),
    ] = ""
    model: Annotated[
        str | None,
        Meta(description="the name that the server knows it by", extra={"default": "the first of /v1/models"}),
    ] = None
    api_key: Annotated[
        str | None,
        Meta(description="sent as a bearer token", extra={"metavar": "KEY", "default": "$OPENAI_API_KEY"}),
    ] = None
    header: Annotated[
        list[tuple[str, str]],
        Meta(
            description="HTTP headers to send with each request",
            extra={"metavar": "NAME=VALUE", "default": "none", "parse_each": parse_pair},
        ),
    ] = []
    insecure: Annotated[bool, Meta(description="don't check the certificate of an https server")] = False

    # prompts
    dataset_name: Annotated[
        Literal["random", "custom"],
        Meta(
            description="random: random words, their tokens counted by the server's /tokenize, openai-chat's template "
            'included; custom: the "prompt" of each line of --dataset-path',
            extra={"group": "prompts"},
        ),
    ] = "random"
    dataset_path: Annotated[
        Path | None, Meta(description="JSON lines, for --dataset-name custom", extra={"metavar": "FILE"})
    ] = None
    num_prompts: Annotated[int, Meta(ge=1, description="requests", extra={"metavar": "N"})] = 1000
    random_input_len: Annotated[
        int,
        Meta(
            ge=1,
            description="tokens of a random prompt",
            extra={"flag": ("--random-input-len", "--input-len"), "metavar": "N"},
        ),
    ] = 1024
    output_len: Annotated[
        int,
        Meta(
            ge=1,
            description="tokens of an answer, at most; with --ignore-eos, exactly",
            extra={
                "flag": ("--random-output-len", "--custom-output-len", "--output-len"),
                "metavar": "N",
                "default": "128; with custom prompts 256",
            },
        ),
    ] = 0
    random_range_ratio: Annotated[
        float,
        Meta(
            ge=0,
            lt=1,
            description="random lengths are uniform within [N * (1 - R), N * (1 + R)]",
            extra={"metavar": "R"},
        ),
    ] = 0.0
    seed: Annotated[
        int | None,
        Meta(
            description="seed of prompts, lengths and arrivals. A seed used twice on one server meets its prefix cache",
            extra={"default": "a new one each time, which is printed"},
        ),
    ] = None

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
        float,
        Meta(
            gt=0,
            description="shape of the gamma distribution of the gaps: under 1 in bursts, above 1 more even",
            extra={"metavar": "B"},
        ),
    ] = 1.0
    max_concurrency: Annotated[
        int | None, Meta(ge=1, description="requests at one time", extra={"metavar": "N", "default": "no limit"})
    ] = None
    num_warmups: Annotated[int, Meta(ge=0, description="requests before the measured ones", extra={"metavar": "N"})] = 0

    # sampling
    ignore_eos: Annotated[
        bool | None,
        Meta(
            description="generate up to the length that was asked for",
            extra={"group": "sampling", "default": "with random prompts"},
        ),
    ] = None
    temperature: Annotated[
        float | None, Meta(description="sampling temperature", extra={"metavar": "T", "default": "the server's own"})
    ] = None
    extra_body: Annotated[
        dict[str, Any],
        Meta(
            description="more fields of the request",
            extra={"metavar": "JSON", "default": "none", "parse": parse_json_object},
        ),
    ] = {}

    # numbers
    percentile_metrics: Annotated[
        list[str],
        Meta(
            description="latencies to report, of ttft,tpot,itl,e2el",
            extra={"group": "numbers", "metavar": "LIST", "default": "all", "parse": parse_metrics},
        ),
    ] = msgspec.field(default_factory=lambda: list(METRICS))
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
    ] = []
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
    ] = []
    disable_tqdm: Annotated[bool, Meta(description="show no progress bar")] = False


def resolve(options: BenchOptions) -> BenchOptions:
    """Fill in the defaults that depend on other options; raises BenchError for options that don't go together."""
    is_random = options.dataset_name == "random"
    if is_random != (options.dataset_path is None):
        raise BenchError("--dataset-path FILE goes with --dataset-name custom, and only with it")
    if taken := [name for name in OWN_FIELDS if name in options.extra_body]:
        raise BenchError(f"--extra-body: {', '.join(taken)} is for octavo bench to set")
    if options.extra_body.get("n") not in (None, 1):
        raise BenchError("--extra-body: n must be 1: the answers of one request can't be told apart by their times")
    host = f"[{options.host}]" if ":" in options.host else options.host
    return msgspec.structs.replace(
        options,
        base_url=options.base_url or f"http://{host}:{options.port}",
        endpoint=options.endpoint or ENDPOINTS[options.backend],
        output_len=options.output_len or (128 if is_random else 256),
        ignore_eos=is_random if options.ignore_eos is None else options.ignore_eos,
        seed=random.SystemRandom().randrange(10**6) if options.seed is None else options.seed,
    )
