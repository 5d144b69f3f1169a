"""Talk to a model in the terminal, through a running server or one that is started for the conversation.

octavo chat MODEL                          serve a directory or a Hub id on a port of its own, and talk to it
octavo chat --url http://127.0.0.1:8000    talk to a running server
octavo chat --url URL "a question"         print the answer and nothing else
some-command | octavo chat --url URL       the same, with the question on stdin
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Annotated

import msgspec
from msgspec import Meta

from octavo.commands.chat_client import ChatError, ChatServer, Conversation
from octavo.flags import add_flags, flags_of, read
from octavo.own_server import ServerEndedError, own_server
from octavo.runtime.config import EngineConfig

PROG = "octavo chat"
DEFAULT_URL = "http://127.0.0.1:8000"
THE_SERVERS = "the server's own"
HELP = """\
/system TEXT   tell the model how to behave, from the next question on; /system alone shows it, /system - removes it
/clear         forget the conversation; the system text stays
/exit          end; so does Ctrl-D
Ctrl-C         stop an answer; what came of it stays in the conversation"""
COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
# A model's text must not steer the terminal, so control characters other than tab and newline are left out there
UNPRINTABLE = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
DIM = "\x1b[2m"
PLAIN = "\x1b[0m"


class ChatOptions(msgspec.Struct, frozen=True):
    """The flags of `octavo chat`; those of the server that it may start are fields of EngineConfig."""

    model: Annotated[
        str | None,
        Meta(
            description="a local directory or a Hub id, to be served here",
            extra={"positional": True, "metavar": "MODEL"},
        ),
    ] = None
    question: Annotated[
        str | None,
        Meta(
            description="print the answer to it, and end",
            extra={"positional": True, "metavar": "QUESTION", "default": "a conversation"},
        ),
    ] = None
    url: Annotated[
        str | None,
        Meta(
            description="with or without /v1",
            extra={"group": "a running server", "default": f"without a MODEL, {DEFAULT_URL}"},
        ),
    ] = None
    name: Annotated[
        str | None,
        Meta(
            description="the name of its model",
            extra={"flag": "--model", "metavar": "NAME", "default": "the first of /v1/models"},
        ),
    ] = None
    api_key: Annotated[
        str | None, Meta(description="sent as a bearer token", extra={"metavar": "KEY", "default": "$OPENAI_API_KEY"})
    ] = None
    system: Annotated[
        str | None,
        Meta(
            description="how the model is to behave",
            extra={"group": "answers", "metavar": "TEXT", "default": "nothing is said"},
        ),
    ] = None
    temperature: Annotated[
        float | None, Meta(description="sampling temperature", extra={"metavar": "T", "default": THE_SERVERS})
    ] = None
    top_p: Annotated[
        float | None,
        Meta(
            description="sample from the likeliest tokens that have this probability together",
            extra={"metavar": "P", "default": THE_SERVERS},
        ),
    ] = None
    max_tokens: Annotated[
        int | None, Meta(description="tokens of an answer, at most", extra={"metavar": "N", "default": THE_SERVERS})
    ] = None
    seed: Annotated[int | None, Meta(description="seed of the sampling", extra={"default": "none"})] = None


SERVE_FLAGS = [  # passed on to `octavo serve`
    replace(flag, group="serving MODEL here, as `octavo serve` does")
    for flag in flags_of(EngineConfig)
    if flag.field in ("dtype", "kv_cache_dtype", "max_model_len")
]
FLAGS = [*flags_of(ChatOptions), *SERVE_FLAGS]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, FLAGS)


def run(args: argparse.Namespace) -> int:
    """Talk; returns the exit code: 1 where the only answer failed, or the server could not be reached."""
    serve_words = [
        word for flag in SERVE_FLAGS if flag.field in args for word in (flag.names[0], str(vars(args)[flag.field]))
    ]
    try:
        options = _sorted_out(read(ChatOptions, args), serve_words)
        question = _question(options)
        with ExitStack() as stack:
            conversation = _begin(options, serve_words, stack)
            if question is None:
                return _converse(conversation)
            return _answer_once(conversation, question)
    except (ChatError, ServerEndedError) as e:
        print(f"{PROG}: {e}", file=sys.stderr)
        return 1


def _sorted_out(options: ChatOptions, serve_words: list[str]) -> ChatOptions:
    """The options where a lone word is the question if --url or --model is given. Raises ChatError."""
    if options.url is not None or options.name is not None:
        if options.question is not None:
            raise ChatError("MODEL is served here, --url and --model are for a running server: give one or the other")
        options = msgspec.structs.replace(options, model=None, question=options.model)
    if options.model is None and serve_words:
        raise ChatError(f"{serve_words[0]} is for a MODEL that is served here, and there is none")
    return options


def _question(options: ChatOptions) -> str | None:
    """The one question, from the command line or a stdin that isn't a terminal; None for a conversation."""
    if options.question is not None or sys.stdin.isatty():
        return options.question
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError as e:
        raise ChatError(f"what came on stdin is no text: {e}") from e
    if not text:
        raise ChatError("no question: stdin is empty, and is no terminal to talk at")
    return text


def _begin(options: ChatOptions, serve_words: list[str], stack: ExitStack) -> Conversation:
    """Reach the server, or start one; the stack ends it."""
    if options.model is None:
        server = ChatServer(options.url or DEFAULT_URL, options.api_key or os.environ.get("OPENAI_API_KEY"))
    else:
        server = _serve(options.model, serve_words, stack)
    stack.enter_context(closing(server))
    fields = {name: getattr(options, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
    given = {name: value for name, value in fields.items() if value is not None}
    return Conversation(server, options.name or server.first_model(), given, options.system)


def _serve(model: str, words: list[str], stack: ExitStack) -> ChatServer:
    from rich.console import Console

    own = stack.enter_context(own_server(model, *words))
    with Console(stderr=True).status(f"octavo serve {model}"):
        own.wait_until_ready()
    return ChatServer(own.url, own.api_key, own.check)


def _answer_once(conversation: Conversation, question: str) -> int:
    _show(conversation.ask(question), with_reasoning=False)
    if conversation.finish_reason == "length":
        print(f"{PROG}: the answer was cut off at the limit of tokens", file=sys.stderr)
    return 0


def _converse(conversation: Conversation) -> int:
    """Questions and answers until /exit, Ctrl-D, or Ctrl-C twice at the prompt."""
    import readline  # noqa: F401  # input() edits its line with it

    print(f"{conversation.model}. /help tells the commands; Ctrl-D ends.")
    interrupted = False
    while True:
        try:
            line = input("> ").strip()
            interrupted = False
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            if interrupted:
                return 0
            print("Ctrl-C again ends, and so does Ctrl-D")
            interrupted = True
            continue
        if command := COMMAND.fullmatch(line):
            if command[1] == "exit":
                return 0
            _command(conversation, command[1], command[2])
        elif line:
            _take_turn(conversation, line)


def _command(conversation: Conversation, name: str, text: str | None) -> None:
    if name == "clear":
        conversation.turns.clear()
    elif name == "system":
        if text is not None:
            conversation.system = None if text == "-" else text
        print(f"system: {conversation.system}" if conversation.system else "there is no system text")
    elif name == "help":
        print(HELP)
    else:
        print(f"there is no /{name}; /help tells the commands")


def _take_turn(conversation: Conversation, question: str) -> None:
    try:
        _show(conversation.ask(question), with_reasoning=True)
    except KeyboardInterrupt:
        print("(stopped)")
    except ChatError as e:
        print(f"{PROG}: {e}; the question is not part of the conversation", file=sys.stderr)
    if conversation.finish_reason == "length":
        print("(cut off at the limit of tokens)")


def _show(pieces: Generator[tuple[str, bool]], *, with_reasoning: bool) -> None:
    """Print an answer as it comes, and end its line; reasoning stands dim before it, at a terminal only."""
    terminal = sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack a character of the answer
    last = "\n"
    dim = False
    try:
        with closing(pieces):
            for piece, is_reasoning in pieces:
                text = piece.translate(UNPRINTABLE) if terminal else piece
                if not text or (is_reasoning and not (terminal and with_reasoning)):
                    continue
                if is_reasoning != dim:
                    print(DIM if is_reasoning else f"{PLAIN}\n", end="")
                    dim = is_reasoning
                print(text, end="", flush=True)
                last = text[-1]
    finally:
        if dim:
            print(PLAIN, end="")
        if last != "\n":
            print(flush=True)
