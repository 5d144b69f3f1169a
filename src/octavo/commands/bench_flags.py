"""The flags of `octavo bench`: vLLM's names and defaults, and how each is read."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
OWN_FIELDS = ("prompt", "messages", "stream", "stream_options")


class BenchError(ValueError):
    """Flags that don't go together; the message is one line."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _configure_server(parser)
    _configure_prompts(parser)
    _configure_load(parser)
    _configure_sampling(parser)
    _configure_output(parser)


def _configure_server(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("the server")
    server.add_argument("--base-url", metavar="URL", help="with or without /v1 (default: http://HOST:PORT)")
    server.add_argument("--host", default="127.0.0.1", help="where --base-url is not given (default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, help="where --base-url is not given (default: 8000)")
    server.add_argument(
        "--backend",
        choices=ENDPOINTS,
        default="openai",
        help="openai: completions, the prompt as it is; openai-chat: the prompt is a user's message (default: openai)",
    )
    server.add_argument("--endpoint", metavar="PATH", help="(default: /v1/completions or /v1/chat/completions)")
    server.add_argument("--model", help="the name that the server knows it by (default: the first of /v1/models)")
    server.add_argument("--api-key", metavar="KEY", help="sent as a bearer token (default: $OPENAI_API_KEY)")
    server.add_argument(
        "--header",
        type=_pair,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="HTTP headers to send with each request (default: none)",
    )
    server.add_argument("--insecure", action="store_true", help="don't check the certificate of an https server")


def _configure_prompts(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--dataset-name",
        choices=("random", "custom"),
        default="random",
        help="random: random words, their tokens counted by the server's /tokenize, openai-chat's template "
        'included; custom: the "prompt" of each line of --dataset-path (default: random)',
    )
    prompts.add_argument("--dataset-path", type=Path, metavar="FILE", help="JSON lines, for --dataset-name custom")
    prompts.add_argument("--num-prompts", type=_count, default=1000, metavar="N", help="requests (default: 1000)")
    prompts.add_argument(
        "--random-input-len", "--input-len", type=_count, default=1024, metavar="N", help="tokens (default: 1024)"
    )
    prompts.add_argument(
        "--random-output-len",
        "--custom-output-len",
        "--output-len",
        dest="output_len",
        type=_count,
        metavar="N",
        help="tokens of an answer, at most; with --ignore-eos, exactly (default: 128; with custom prompts 256)",
    )
    prompts.add_argument(
        "--random-range-ratio",
        type=_ratio,
        default=0.0,
        metavar="R",
        help="random lengths are uniform within [N * (1 - R), N * (1 + R)] (default: 0.0)",
    )
    prompts.add_argument(
        "--seed",
        type=int,
        help="of prompts, lengths and arrivals. A seed used twice on one server meets its prefix cache, so the default "
        "is a new one each time; it is printed",
    )


def _configure_load(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load")
    load.add_argument(
        "--request-rate",
        type=_positive,
        default=float("inf"),
        metavar="RPS",
        help="requests a second, at random times (a Poisson process); inf: all at once (default: inf)",
    )
    load.add_argument(
        "--burstiness",
        type=_positive,
        default=1.0,
        metavar="B",
        help="shape of the gamma distribution of the gaps: under 1 in bursts, above 1 more even (default: 1.0)",
    )
    load.add_argument("--max-concurrency", type=_count, metavar="N", help="requests at one time (default: no limit)")
    load.add_argument(
        "--num-warmups", type=_count_or_none, default=0, metavar="N", help="requests before, not measured (default: 0)"
    )


def _configure_sampling(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="generate up to the length that was asked for (default: with random prompts)",
    )
    sampling.add_argument("--temperature", type=float, metavar="T", help="(default: the server's own)")
    sampling.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON", help="more fields of the request (default: none)"
    )


def _configure_output(parser: argparse.ArgumentParser) -> None:
    numbers = parser.add_argument_group("numbers")
    numbers.add_argument(
        "--percentile-metrics",
        type=_metrics,
        default=METRICS,
        metavar="LIST",
        help="latencies to report, of ttft,tpot,itl,e2el (default: all)",
    )
    numbers.add_argument(
        "--metric-percentiles", type=_percentiles, default=[99.0], metavar="LIST", help="such as 25,50,99 (default: 99)"
    )
    numbers.add_argument(
        "--goodput",
        type=_limit,
        nargs="+",
        action="extend",
        default=[],
        metavar="METRIC:MS",
        help="count what stays within all of these, of ttft, tpot and e2el: ttft:500 tpot:50 (default: not reported)",
    )
    numbers.add_argument(
        "--cost-per-hour", type=_positive, metavar="DOLLARS", help="of one GPU, or of the machine (default: no costs)"
    )
    numbers.add_argument("--num-gpus", type=_count, default=1, metavar="N", help="that cost as much (default: 1)")
    output = parser.add_argument_group("output")
    output.add_argument("--save-result", action="store_true", help="write a JSON file with vLLM's key names")
    output.add_argument("--save-detailed", action="store_true", help="in it, also each request's times, text and error")
    output.add_argument("--result-dir", type=Path, metavar="DIR", help="where to write it (default: here)")
    output.add_argument(
        "--result-filename", metavar="NAME", help="(default: LABEL-RATEqps[-concurrencyN]-MODEL-DATE.json)"
    )
    output.add_argument("--label", help="what it is named after (default: the backend)")
    output.add_argument(
        "--metadata", type=_pair, nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="keys to add to it"
    )
    output.add_argument("--disable-tqdm", action="store_true", help="show no progress bar")


def resolve(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other flags; raises BenchError for flags that don't go together."""
    if (args.dataset_name == "custom") != (args.dataset_path is not None):
        raise BenchError("--dataset-path FILE goes with --dataset-name custom, and only with it")
    taken = [name for name in OWN_FIELDS if name in args.extra_body]
    if taken:
        raise BenchError(f"--extra-body: {', '.join(taken)} is for octavo bench to set")
    if args.extra_body.get("n") not in (None, 1):
        raise BenchError("--extra-body: n must be 1: the answers of one request can't be told apart by their times")
    is_random = args.dataset_name == "random"
    host = f"[{args.host}]" if ":" in args.host else args.host
    args.base_url = args.base_url or f"http://{host}:{args.port}"
    args.endpoint = args.endpoint or ENDPOINTS[args.backend]
    args.output_len = args.output_len or (128 if is_random else 256)
    args.ignore_eos = is_random if args.ignore_eos is None else args.ignore_eos
    args.seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _positive(text: str) -> float:
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def _ratio(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not in [0, 1)")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _metrics(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(METRICS)}")
    return names


def _percentiles(text: str) -> list[float]:
    values = [_number(part) for part in text.split(",")]
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: percentiles are from 0 to 100")
    return values


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    if name not in GOODPUT_METRICS:
        raise argparse.ArgumentTypeError(f"{text!r} is not METRIC:MS with ttft, tpot or e2el")
    return name, _positive(value)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name.strip(), value.strip()


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"not JSON: {e}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value
