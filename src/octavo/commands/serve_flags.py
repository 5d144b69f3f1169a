"""The flags of `octavo serve`, made from the structs that hold their values."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import msgspec

from octavo.flags import add_flags, flags_of, read
from octavo.runtime.config import EngineConfig
from octavo.runtime.parallel.config import ParallelConfig
from octavo.server.options import ListenOptions, ModelOptions, ServerOptions, TextOptions

FLAGS = flags_of(ModelOptions, EngineConfig, ParallelConfig, TextOptions, ListenOptions, ServerOptions)


@dataclass(frozen=True)
class ServeOptions:
    """A command line of `octavo serve`. engine.model is what was asked for, and not a directory yet."""

    model: ModelOptions
    engine: EngineConfig
    text: TextOptions
    listen: ListenOptions
    server: ServerOptions


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


def _sampling_defaults(text: str) -> str:
    found = {"model": "auto", "openai": "vllm"}.get(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither model nor openai")
    return found


def read_options(args: argparse.Namespace) -> ServeOptions:
    """What a command line means."""
    model = read(ModelOptions, args)
    return ServeOptions(
        model=model,
        engine=read(EngineConfig, args, model="", parallel=read(ParallelConfig, args)),
        text=read(TextOptions, args),
        listen=read(ListenOptions, args),
        server=read(ServerOptions, args),
    )


def engine_config(options: ServeOptions, directory: Path) -> EngineConfig:
    """What the engine process is told."""
    dtype = options.model.quantization or options.engine.dtype
    return msgspec.structs.replace(options.engine, model=str(directory), dtype=dtype)
