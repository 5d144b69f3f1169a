"""The flags of `octavo serve`, and the engine's configuration out of them. vLLM's names; SGLang's as hidden aliases."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from octavo.commands.flag_types import parse_size
from octavo.quant.scheme import AT_LOAD, KV_SHORT_NAMES
from octavo.runtime.config import EngineConfig

IMPLEMENTATIONS = {"transformers": "hf"}  # vLLM's name
DEFAULTS = EngineConfig(model="")
Number = TypeVar("Number", int, float)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _configure_model(parser.add_argument_group("model"))
    _configure_cache(parser.add_argument_group("KV cache and batching"))
    _configure_text(parser.add_argument_group("text and sampling"))
    _configure_http(parser.add_argument_group("HTTP"))
    _configure_logs(parser.add_argument_group("logs"))


def engine_config(args: argparse.Namespace, directory: Path) -> EngineConfig:
    """What the engine process is told."""
    return EngineConfig(
        model=str(directory),
        dtype=args.quantization or args.dtype,
        lm_head_dtype=args.lm_head_dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        device=args.device,
        model_impl=args.model_impl,
        load_format=args.load_format,
        trust_remote_code=args.trust_remote_code,
        max_model_len=args.max_model_len,
        block_size=args.block_size,
        num_blocks=args.num_gpu_blocks_override,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        gpu_memory_utilization=args.gpu_memory_utilization,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        enable_prefix_caching=args.enable_prefix_caching,
        enforce_eager=args.enforce_eager,
        num_threads=args.num_threads,
        seed=args.seed,
    )


def _configure_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("model", nargs="?", help="a local directory, or a Hugging Face Hub id")
    _add(group, "--model", "--model-path", dest="model_flag", metavar="MODEL", help="the same, as a flag")
    _add(group, "--revision", help="branch, tag or commit of a Hub id (default: its main branch)")
    _add(
        group, "--tokenizer", "--tokenizer-path", metavar="DIR", help="another directory's tokenizer (default: MODEL's)"
    )
    _add(
        group,
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names that requests may use; the first is the one in answers and metrics (default: MODEL as written)",
    )
    _add(
        group,
        "--dtype",
        choices=_choices("dtype"),
        default=DEFAULTS.dtype,
        help="what to compute in; fp8, int8 and int4 quantize an unquantized checkpoint while loading it. auto: the "
        "checkpoint's own type (on a CPU bfloat16)",
    )
    _add(
        group,
        "--quantization",
        "-q",
        choices=tuple(AT_LOAD),
        help="the same as --dtype fp8, int8 or int4 (vLLM's name)",
    )
    _add(
        group,
        "--lm-head-dtype",
        choices=_choices("lm_head_dtype"),
        default=DEFAULTS.lm_head_dtype,
        help="int8: quantize the output head's copy of its weight; fewer bytes for each token",
    )
    _configure_loading(group)


def _configure_loading(group: argparse._ArgumentGroup) -> None:
    _add(
        group,
        "--model-impl",
        type=lambda name: IMPLEMENTATIONS.get(name, name),
        choices=_choices("model_impl"),
        default=DEFAULTS.model_impl,
        help="octavo: its own decoder only. hf: transformers' modelling code, slower. auto: the former where it can",
    )
    _add(
        group,
        "--load-format",
        choices=_choices("load_format"),
        default=DEFAULTS.load_format,
        help="dummy: random weights of the model's shape, to measure speed",
    )
    _add(group, "--trust-remote-code", action="store_true", help="run Python code that lies in the checkpoint")
    _add(group, "--device", choices=_choices("device"), default=DEFAULTS.device, help="where to compute")
    _add(
        group,
        "--enforce-eager",
        "--disable-cuda-graph",
        action="store_true",
        help="on a GPU, launch the kernels of a step one by one instead of replaying a CUDA graph",
    )
    _add(group, "--num-threads", type=_count, metavar="N", help="CPU threads of the engine (default: all cores)")
    _add(
        group,
        "--tensor-parallel-size",
        "-tp",
        "--tp",
        "--tp-size",
        type=int,
        choices=(1,),
        default=1,
        help="GPUs to split the model over: only 1 is supported yet",
    )


def _configure_cache(group: argparse._ArgumentGroup) -> None:
    _add(
        group,
        "--max-model-len",
        "--context-length",
        type=_count,
        metavar="N",
        help="longest sequence, prompt and answer (default: what the model says, less if the cache holds less)",
    )
    _add(
        group,
        "--kv-cache-dtype",
        type=lambda name: KV_SHORT_NAMES.get(name, name),
        choices=_choices("kv_cache_dtype"),
        default=DEFAULTS.kv_cache_dtype,
        help="type of the KV cache; fp8 is fp8_e4m3. auto: what the checkpoint was calibrated for, else --dtype's",
    )
    _add(
        group,
        "--kv-cache-memory-bytes",
        type=parse_size,
        metavar="SIZE",
        help="memory of the KV cache, such as 4GiB (default: on a CPU 4 GiB, at most half of what is free; on a GPU "
        "see --gpu-memory-utilization)",
    )
    _add(
        group,
        "--gpu-memory-utilization",
        "--mem-fraction-static",
        type=_fraction,
        default=DEFAULTS.gpu_memory_utilization,
        metavar="SHARE",
        help="share of a GPU's memory for weights and KV cache together",
    )
    _add(group, "--num-gpu-blocks-override", type=_count, metavar="N", help="size of the KV cache in blocks")
    _add(
        group,
        "--block-size",
        "--page-size",
        type=_count,
        default=DEFAULTS.block_size,
        metavar="N",
        help="tokens of a block",
    )
    _configure_batching(group)


def _configure_batching(group: argparse._ArgumentGroup) -> None:
    _add(
        group,
        "--max-num-seqs",
        "--max-running-requests",
        type=_count,
        default=DEFAULTS.max_num_seqs,
        metavar="N",
        help="sequences that run at once",
    )
    _add(
        group,
        "--max-num-batched-tokens",
        "--chunked-prefill-size",
        type=_count,
        default=DEFAULTS.max_num_batched_tokens,
        metavar="N",
        help="tokens of one step; longer prompts are prefilled in chunks",
    )
    _add(
        group,
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=DEFAULTS.enable_prefix_caching,
        help="keep the blocks of finished requests for prompts that begin in the same way",
    )
    group.add_argument(
        "--disable-radix-cache", dest="enable_prefix_caching", action="store_false", help=argparse.SUPPRESS
    )


def _configure_text(group: argparse._ArgumentGroup) -> None:
    _add(
        group,
        "--chat-template",
        metavar="FILE",
        help="a jinja template, or a file with one (default: the checkpoint's)",
    )
    _add(
        group,
        "--trust-request-chat-template",
        action="store_true",
        help="let requests bring a template of their own, which is code, though sandboxed",
    )
    _add(
        group,
        "--generation-config",
        default="auto",
        metavar="SOURCE",
        help="default sampling values: auto (the checkpoint's generation_config.json), vllm (none), or a directory",
    )
    _add(
        group,
        "--override-generation-config",
        type=_sampling_values,
        default={},
        metavar="JSON",
        help="default sampling values, such as '{\"temperature\": 0.7}', before those of --generation-config",
    )
    _add(
        group,
        "--max-logprobs",
        type=_logprobs,
        default=20,
        metavar="N",
        help="most logprobs that a request may ask for; -1 is the whole vocabulary",
    )
    _add(
        group,
        "--seed",
        "--random-seed",
        type=int,
        default=DEFAULTS.seed,
        metavar="N",
        help="of requests without a seed",
    )


def _configure_http(group: argparse._ArgumentGroup) -> None:
    _add(group, "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every network's")
    _add(group, "--port", type=_port, default=8000, help="port to listen on; 0 takes a free one")
    _add(group, "--uds", metavar="PATH", help="listen on a Unix socket instead")
    _configure_access(group)
    _add(
        group,
        "--allowed-origins",
        type=_strings,
        default=[],
        metavar="JSON",
        help="CORS: origins whose pages may call, such as '[\"*\"]' (default: none)",
    )
    _add(group, "--root-path", default="", metavar="PATH", help="what a proxy in front strips from paths")
    _add(group, "--max-body-bytes", type=parse_size, default="32MiB", metavar="SIZE", help="largest request")
    _add(
        group,
        "--max-total-body-bytes",
        type=parse_size,
        default="256MiB",
        metavar="SIZE",
        help="all requests that are being received, above 64 KiB each; what exceeds it gets 503",
    )
    _add(group, "--ssl-keyfile", metavar="FILE", help="TLS: the private key")
    _add(group, "--ssl-certfile", metavar="FILE", help="TLS: the certificate")
    _add(group, "--ssl-ca-certs", metavar="FILE", help="TLS: whom to trust")
    _add(
        group,
        "--shutdown-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long requests may go on after SIGTERM; what is left then ends with an error",
    )
    _add(
        group,
        "--engine-timeout",
        type=_timeout,
        default=20.0,
        metavar="SECONDS",
        help="how long the engine process may show no sign of life before it counts as dead; a process that computes, "
        "however long its step takes, does show some",
    )
    _add(
        group,
        "--keep-alive-on-engine-death",
        action="store_true",
        help="answer 503 when the engine has died, instead of ending with exit code 1",
    )
    _add(group, "--disable-fastapi-docs", action="store_true", help="no /docs and no /openapi.json")


def _configure_access(group: argparse._ArgumentGroup) -> None:
    _add(
        group,
        "--api-key",
        nargs="+",
        action="extend",
        metavar="KEY",
        help="serve only requests with one of these keys (default: OCTAVO_API_KEY, or everybody). /health and /ping "
        "need none, nor do /metrics, /version, /docs and /openapi.json without --protect-all",
    )
    _add(
        group,
        "--protect-all",
        action="store_true",
        help="ask for a key on /metrics, /version, /docs and /openapi.json too",
    )
    _add(
        group,
        "--allowed-hosts",
        nargs="+",
        type=_host_pattern,
        metavar="NAME",
        help="Host headers to answer to, without a port: names, *.name, or * for any (default: on a loopback address "
        "localhost, 127.0.0.1, [::1] and --host, so that no web page can ask by DNS rebinding; elsewhere any)",
    )


def _configure_logs(group: argparse._ArgumentGroup) -> None:
    levels = ("critical", "error", "warning", "info", "debug")
    _add(group, "--uvicorn-log-level", "--log-level", choices=levels, default="warning", help="of the HTTP server")
    _add(group, "--disable-uvicorn-access-log", action="store_true", help="no line for each request at level info")
    _add(group, "--disable-log-stats", action="store_true", help="no line of statistics every ten seconds")
    _add(group, "--enable-log-requests", action="store_true", help="a line for each request, without its text")


def _add(group: argparse._ArgumentGroup, name: str, *others: str, help: str, **options: Any) -> None:
    """One flag; `others` beginning with a double dash are aliases that --help doesn't show."""
    shown = [other for other in others if not other.startswith("--")]
    if options.get("default") not in (None, "", [], {}, "auto") and "(default" not in help:
        options["help"] = f"{help} (default: %(default)s)"
    else:
        options["help"] = help.replace("%", "%%")
    action = group.add_argument(*shown, name, **options)
    for alias in others:
        if alias.startswith("--"):
            hidden = options | {"dest": action.dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            group.add_argument(alias, **hidden)


def _choices(field: str) -> tuple[str, ...]:
    """The values that a field of EngineConfig may have: stated there, and only there."""
    values: tuple[str, ...] = get_args(get_type_hints(EngineConfig)[field])
    return values


def _number(text: str, kind: type[Number], low: float, high: float, what: str) -> Number:
    """A number from low to high."""
    with contextlib.suppress(ValueError):
        value = kind(text)
        if low <= value <= high:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {what}")


def _count(text: str) -> int:
    return _number(text, int, 1, math.inf, "a count, 1 at least")


def _port(text: str) -> int:
    return _number(text, int, 0, 65535, "a port, 0 to 65535")


def _logprobs(text: str) -> int:
    return _number(text, int, -1, math.inf, "a count, or -1")


def _fraction(text: str) -> float:
    return _number(text, float, 1e-9, 1, "a share above 0, 1 at most")


def _seconds(text: str) -> float:
    return _number(text, float, 0, 1e9, "a number of seconds")


def _timeout(text: str) -> float:
    return _number(text, float, 0.1, 1e9, "a number of seconds, 0.1 at least")


def _host_pattern(text: str) -> str:
    name = text.removeprefix("*.")
    if text != "*" and (not name or any(character in name for character in "*/, ")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a host name, *.name, or *")
    return text


def _strings(text: str) -> list[str]:
    values = _json(text)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON list of strings")
    return values


def _sampling_values(text: str) -> dict[str, float]:
    from octavo.server.served_model import SAMPLING_DEFAULTS

    values = _json(text)
    if not isinstance(values, dict) or not set(values) <= set(SAMPLING_DEFAULTS):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object of {', '.join(SAMPLING_DEFAULTS)}")
    return values


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON: {error}") from None
