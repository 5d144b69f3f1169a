"""Keyword arguments of LLM as options of `octavo serve`: the names are vLLM's, the flags with underscores.

They are read as that command reads its own line, so that what changes nothing is taken, and what octavo can't do is
refused with what works instead.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec

from octavo.flags import Flag, flags_of
from octavo.offline.errors import in_python
from octavo.runtime.config import EngineConfig
from octavo.runtime.lora_config import LoraOptions
from octavo.runtime.parallel.config import ParallelConfig
from octavo.server.lora_options import LoraServerOptions
from octavo.server.options import ListenOptions, ModelOptions, ServerOptions, TextOptions
from octavo.server.several_options import SeveralOptions
from octavo.server.start.arguments import ArgumentsError, own_arguments, words_of
from octavo.server.start.flags import OptionsError, ServeOptions, configure, read_options
from octavo.server.start.peer_flags import is_known
from octavo.server.upkeep_options import UpkeepOptions

OFFLINE = ("engine_timeout", "disable_log_stats")  # of those that are about serving
NO_SERVER = "there is no server: octavo serve has it"
NOT_BY_NAME = "a LoRARequest names the adapter and its directory: give generate or chat one as lora_request"
REFUSED = {
    **dict.fromkeys(LoraServerOptions.__struct_fields__, NOT_BY_NAME),
    **dict.fromkeys(("enable_weight_updates", "weights_root", *SeveralOptions.__struct_fields__), NO_SERVER),
    "config": NO_SERVER,
    "headless": NO_SERVER,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def options_of(model: str, given: Mapping[str, Any]) -> tuple[ServeOptions, list[str]]:
    """(the options of a server of this model, a line for each argument that changes nothing).

    Raises TypeError for an argument that nobody knows, and ValueError for a value that can't be.
    """
    parser = _Parser(allow_abbrev=False, add_help=False)
    configure(parser)
    own = {name: action.dest for action in parser._actions for name in action.option_strings}
    words = ["--model", model]
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        _check_name(name, flag, own)
        words += words_of(flag, _plain(value), own)
    try:
        words, notes = own_arguments(words, parser)
        options = read_options(parser.parse_args(words))
    except (ArgumentsError, OptionsError, ValueError) as error:
        raise ValueError(f"LLM: {in_python(str(error))}") from None
    text = msgspec.structs.replace(options.text, trust_request_chat_template=True)  # requests are the program's own
    return dataclasses.replace(options, text=text), [in_python(note) for note in notes]


def _check_name(name: str, flag: str, own: Mapping[str, str]) -> None:
    served = {*ListenOptions.__struct_fields__, *ServerOptions.__struct_fields__}
    if name in REFUSED:
        raise ValueError(f"LLM: {name}: {REFUSED[name]}")
    if own.get(flag) in served.difference(OFFLINE):
        raise ValueError(f"LLM: {name}: {NO_SERVER}")
    if flag not in own and not is_known(flag):
        raise TypeError(f"LLM has no argument {name!r}; they are the options of octavo serve, such as max_model_len")


def _plain(value: Any) -> Any:
    """A value as a configuration file could have it: torch.bfloat16 is bfloat16, and a struct an object."""
    if isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    text = str(value)
    return text.removeprefix("torch.") if text.startswith("torch.") else value


def _flags() -> list[Flag]:
    kinds = (ModelOptions, EngineConfig, ParallelConfig, LoraOptions, TextOptions, UpkeepOptions)
    return [flag for flag in flags_of(*kinds) if flag.names and flag.field not in REFUSED]


class EngineArgs:
    """The keyword arguments of LLM as a value, with vLLM's way to give them on a command line."""

    def __init__(self, model: str, **options: Any) -> None:
        self.model = model
        self.options = options

    @staticmethod
    def add_cli_args(parser: Any) -> Any:
        """Let a parser of argparse, or a group of one, take them; what isn't given leaves nothing in its namespace."""
        for flag in _flags():
            name = next(name for name in reversed(flag.names) if name.startswith("--"))
            arguments = {**flag.arguments, "default": argparse.SUPPRESS}
            dest = name.removeprefix("--").replace("-", "_")
            parser.add_argument(*flag.names, dest=dest, help=flag.help, **arguments)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        """What a command line gives."""
        return cls(**vars(args))


AsyncEngineArgs = EngineArgs
