"""`octavo COMMAND ...`, and the two commands that have a console script of their own: `quantize` and `serve`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from octavo.version import VERSION

COMMANDS = {
    "quantize": "write a quantized copy of a checkpoint, and measure what it cost",
    "convert": "write a quantized checkpoint in another format, exactly",
    "eval": "measure a model's perplexity, and what a quantized one lost of its original",
    "serve": "serve a checkpoint behind an OpenAI-compatible HTTP server",
    "run-batch": "answer a file of requests, and go on with it where it was",
    "bench": "measure a running server: throughput, latency, dollars per million tokens",
    "top": "watch a running server: tokens per second, latencies, queue and caches",
    "cost": "say what a million tokens costs: load within an SLO, quality and dollars, in one report",
    "inspect": "say what is in a checkpoint, and what it needs to serve",
    "chat": "talk to a model in the terminal",
}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line, without a list of all options in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `octavo`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return run_command(arguments[0], arguments[1:], prog=f"octavo {arguments[0]}")
    parser = argparse.ArgumentParser(
        prog="octavo",
        description="Quantize Hugging Face checkpoints, prove what it cost, and serve them.",
        epilog="`octavo COMMAND --help` tells the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"octavo {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    parser.parse_args(arguments)
    return 0


def parse(name: str, argv: Sequence[str], prog: str) -> tuple[ModuleType, argparse.Namespace]:
    """One command's module, the only one that is imported, and what its command line says. Exits where it is wrong."""
    command = import_module(f"octavo.commands.{name.replace('-', '_')}")
    if argv and argv[0] in getattr(command, "SUBCOMMANDS", {}):
        return parse(command.SUBCOMMANDS[argv[0]], argv[1:], prog=f"{prog} {argv[0]}")
    description = (command.__doc__ or "").strip().split("\n\n")[0]
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    command.configure(parser)
    parser.set_defaults(prog=prog)
    words = command.own_words(argv, parser) if hasattr(command, "own_words") else argv
    return command, parser.parse_intermixed_args(words)  # `chat MODEL --dtype int8 QUESTION`


def run_command(name: str, argv: Sequence[str], prog: str) -> int:
    """Parse one command's own arguments and run it."""
    try:
        command, args = parse(name, argv, prog)
        prog = args.prog
        code: int = command.run(args)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        exec("")  # `python -m` ends with -2 for 130 where the interrupt came in an exec(); a new one forgets that
        return 130
    except BrokenPipeError:  # `octavo inspect M | head`
        sys.stderr.close()
        return 0
    return code


def quantize_main() -> int:
    """The console script `quantize`."""
    return run_command("quantize", sys.argv[1:], prog="quantize")


def serve_main() -> int:
    """The console script `serve`."""
    return run_command("serve", sys.argv[1:], prog="serve")
