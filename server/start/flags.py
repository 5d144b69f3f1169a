"""The flags of `octavo serve`, made from the structs that hold their values."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from octavo.flags import add_flags, flags_of, read
from octavo.runtime.config import EngineConfig
from octavo.runtime.lora_config import LoraOptions
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.speculation.config import METHODS, OF_MODELS, SpeculativeConfig, make_speculative
from octavo.server.lora_options import LoraServerOptions
from octavo.server.options import FairBy, ListenOptions, ModelOptions, ServerOptions, TextOptions
from octavo.server.several_options import SeveralOptions
from octavo.server.upkeep_options import UpkeepOptions

BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"
RUNTIME_LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
FLAGS = flags_of(
    ModelOptions,
    EngineConfig,
    ParallelConfig,
    LoraOptions,
    LoraServerOptions,
    TextOptions,
    ListenOptions,
    ServerOptions,
    UpkeepOptions,
    SeveralOptions,
)


TASKS: dict[str, dict[str, str]] = {
    "auto": {},
    "generate": {"runner": "generate"},
    "embed": {"runner": "pooling", "convert": "embed"},
    "embedding": {"runner": "pooling", "convert": "embed"},
    "classify": {"runner": "pooling", "convert": "classify"},
    "score": {"runner": "pooling", "convert": "classify"},
    "reward": {"runner": "pooling"},
}
"""What vLLM's former --task means."""


@dataclass(frozen=True)
class ServeOptions:
    """A command line of `octavo serve`. engine.model is what was asked for, and not a directory yet."""

    model: ModelOptions
    engine: EngineConfig
    text: TextOptions
    listen: ListenOptions
    server: ServerOptions
    lora: LoraServerOptions
    upkeep: UpkeepOptions
    several: SeveralOptions


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, FLAGS)
    parser.add_argument(  # SGLang's name for --no-enable-prefix-caching
        "--disable-radix-cache",
        dest="enable_prefix_caching",
        action="store_false",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    parser.add_argument(  # SGLang's name for --generation-config, with values of its own
        "--sampling-defaults",
        dest="generation_config",
        type=_sampling_defaults,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    for switch in ("enable_expert_parallel", "enable_lora", "enable_sleep_mode"):
        parser.add_argument(
            f"--no-{switch.replace('_', '-')}",
            dest=switch,
            action="store_false",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
    parser.add_argument(  # SGLang's way to say --enable-expert-parallel
        "--ep-size",
        "--ep",
        "--expert-parallel-size",
        dest="expert_parallel_size",
        type=_count,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    parser.add_argument(  # SGLang's way to say --speculative-config
        "--speculative-algorithm",
        dest="speculative_algorithm",
        type=_speculative_algorithm,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    _add_tasks(parser)
    for count in ("num-draft-tokens", "num-steps", "eagle-topk"):
        parser.add_argument(f"--speculative-{count}", type=_count, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for names in (("draft-model-path", "draft-model"), ("draft-model-revision",)):
        flags = [f"--speculative-{name}" for name in names]
        parser.add_argument(*flags, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    """SGLang's way to say --runner pooling, and vLLM's former way to say --runner and --convert."""
    hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--is-embedding", dest="runner", action="store_const", const="pooling", **hidden)
    parser.add_argument("--task", choices=TASKS, **hidden)


class ServeError(ValueError):
    """The command line or the model is wrong; the message is one line."""


class OptionsError(ValueError):
    """Flags that contradict each other; the message is one line."""


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def _sampling_defaults(text: str) -> str:
    found = {"model": "auto", "openai": "vllm"}.get(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither model nor openai")
    return found


def _speculative_algorithm(text: str) -> str:
    method = {"standalone": "draft_model", "nextn": "mtp"}.get(text.lower(), text.lower())
    if method not in METHODS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not supported: NGRAM makes drafts out of the request's own text, SUFFIX also out of finished "
            "answers, STANDALONE by a draft model, EAGLE3 and NEXTN by a head; leave it out, or name one of these"
        )
    return method


def read_options(args: argparse.Namespace) -> ServeOptions:
    """What a command line means. Raises OptionsError."""
    server = read(ServerOptions, args)
    text = read(TextOptions, args)
    lora = _served_adapters(args)
    own = read(LoraOptions, args)
    adapters = msgspec.structs.replace(own, enable_lora=own.enable_lora or bool(lora.lora_modules))
    if lora.enable_runtime_lora and not adapters.enable_lora:
        raise OptionsError("--enable-runtime-lora without --enable-lora: no adapter could be served; add --enable-lora")
    given = {
        "lora": adapters,
        "parallel": _parallel(args),
        "deterministic": _deterministic(args),
        "speculative_config": _speculative_config(args, server.fair_by),
        **TASKS[getattr(args, "task", "auto")],
    }
    level = text.per_request_spec_decode_metrics
    if level != "none" and given["speculative_config"] is None:
        raise OptionsError(
            f"--per-request-spec-decode-metrics {level} without --speculative-config: there are no drafts to tell of; "
            "add one, or leave it out"
        )
    return ServeOptions(
        model=read(ModelOptions, args),
        engine=read(EngineConfig, args, model="", **given),
        text=text,
        listen=read(ListenOptions, args),
        server=server,
        lora=lora,
        upkeep=read(UpkeepOptions, args),
        several=read(SeveralOptions, args),
    )


def _speculative_config(args: argparse.Namespace, fair_by: FairBy) -> SpeculativeConfig | None:
    """What the flag says, or SGLang's ones. Raises OptionsError."""
    config: SpeculativeConfig | None = getattr(args, "speculative_config", None)
    names = ("num_draft_tokens", "num_steps", "eagle_topk", "draft_model_path", "draft_model_revision")
    given = {name: getattr(args, f"speculative_{name}") for name in names if hasattr(args, f"speculative_{name}")}
    method = getattr(args, "speculative_algorithm", None)
    shares = getattr(args, "share_suffixes", False)
    if config is not None and (method or given):
        raise OptionsError("--speculative-config says all that --speculative-algorithm does: leave one of them out")
    if method is None and given:
        name, value = next(iter(given.items()))
        flag = f"--speculative-{name.replace('_', '-')} {value}"
        raise OptionsError(f"{flag}: --speculative-algorithm is missing, such as NGRAM or EAGLE3")
    if method is not None:
        config = _of_sglang(method, given)
    learns = config is not None and config.method in ("suffix", "auto")
    if shares and not learns:
        raise OptionsError('--share-suffixes: --speculative-config \'{"method": "suffix"}\' is missing')
    if learns and not shares and fair_by == "none":
        raise OptionsError(
            "--speculative-config with --fair-by none: whose answers are whose is not told then; --fair-by key works, "
            "and so does --share-suffixes"
        )
    return config


def _of_sglang(method: str, given: dict[str, Any]) -> SpeculativeConfig:
    """What SGLang's flags mean: of a draft model's chain of so many steps, it counts the token in front as a draft."""
    count = given.get("num_draft_tokens")
    if method in OF_MODELS:
        steps = given.get("num_steps")
        topk = given.get("eagle_topk", 1)
        if topk != 1:
            raise OptionsError(f"--speculative-eagle-topk {topk}: drafts are a chain here, and no tree; 1 works")
        if count is not None and steps is not None and count != steps + 1:
            raise OptionsError(
                f"--speculative-num-draft-tokens {count} with --speculative-num-steps {steps}: drafts are a chain "
                f"here; {steps + 1} works, and so does leaving it out"
            )
        count = count - 1 if count is not None else steps
    elif stray := [name for name in given if name != "num_draft_tokens"]:
        flag = f"--speculative-{stray[0].replace('_', '-')}"
        raise OptionsError(f"{flag} {given[stray[0]]}: it is of STANDALONE, EAGLE3 and NEXTN; leave it out")
    keys = {"method": method, "num_speculative_tokens": count}
    keys |= {"model": given.get("draft_model_path"), "revision": given.get("draft_model_revision")}
    try:
        return make_speculative(keys)
    except ValueError as error:
        raise OptionsError(f"--speculative-algorithm: {error}") from None


def _served_adapters(args: argparse.Namespace) -> LoraServerOptions:
    """With what vLLM's variable says. Raises OptionsError."""
    lora = read(LoraServerOptions, args)
    names = [module.name for module in lora.lora_modules]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise OptionsError(f"--lora-modules: two adapters have the name {twice!r}")
    may_load = os.environ.get(RUNTIME_LORA, "").strip().lower() in ("1", "true") and getattr(args, "enable_lora", False)
    return msgspec.structs.replace(lora, enable_runtime_lora=lora.enable_runtime_lora or may_load)


def _deterministic(args: argparse.Namespace) -> bool:
    """Whether the flag, or vLLM's variable, asks for it. Raises OptionsError for a value that vLLM's doesn't have."""
    variable = os.environ.get(BATCH_INVARIANT, "0")
    if variable not in ("", "0", "1"):
        raise OptionsError(f"{BATCH_INVARIANT}={variable}: 1 asks for --deterministic, and 0 does not")
    return variable == "1" or getattr(args, "deterministic", False)


def _parallel(args: argparse.Namespace) -> ParallelConfig:
    """With what --ep-size means: experts are dealt out over all ranks of an engine, or over none."""
    parallel = read(ParallelConfig, args)
    size = getattr(args, "expert_parallel_size", 1)
    ranks = parallel.tensor_parallel_size
    if size not in (1, ranks):
        raise OptionsError(
            f"--ep-size {size} with -tp {ranks}: experts are dealt out over all ranks or over none; "
            f"--ep-size {ranks} works, and so does -tp {size}"
        )
    return msgspec.structs.replace(parallel, enable_expert_parallel=parallel.enable_expert_parallel or size > 1)


def engine_config(options: ServeOptions, directory: Path) -> EngineConfig:
    """What the engine process is told."""
    dtype = options.model.quantization or options.engine.dtype
    return msgspec.structs.replace(options.engine, model=str(directory), dtype=dtype)


def other_names(options: ServeOptions) -> set[str]:
    """What requests may call a model besides its name, loaded or not: aliases, and adapters of the start."""
    return {*options.model.model_aliases, *(module.name for module in options.lora.lora_modules)}


def check_upkeep(options: ServeOptions) -> None:
    """Raise ServeError where what requests may do to the engines can't be done to these."""
    parallel = options.engine.parallel
    elsewhere = {
        f"--api-server-count {options.listen.api_server_count}": options.listen.api_server_count > 1,
        f"--nnodes {parallel.nnodes}": parallel.nnodes > 1,
        "engines on Ray": parallel.is_on_ray,
        "engines on other machines": len(parallel.local_engines) < parallel.data_parallel_size,
    }
    upkeep = options.upkeep
    if upkeep.weights_root is not None and not upkeep.enable_weight_updates:
        raise ServeError(f"--weights-root {upkeep.weights_root}: --enable-weight-updates is missing")
    wanted = {"--enable-sleep-mode": upkeep.enable_sleep_mode, "--enable-weight-updates": upkeep.enable_weight_updates}
    for flag in [name for name, is_wanted in wanted.items() if is_wanted]:
        if (found := next((what for what, is_so in elsewhere.items() if is_so), None)) is not None:
            raise ServeError(f"{flag} with {found} is not supported: one server with its own engines works")


def model_of(options: ModelOptions) -> str:
    """The model that is named, once. Raises ServeError."""
    named = [name for name in (options.model, options.model_flag) if name is not None]
    if len(named) != 1:
        raise ServeError("name one model: serve MODEL, a directory or a Hub id")
    return named[0]
