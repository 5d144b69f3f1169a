"""Talk to a model in the terminal: one that a server serves, or one that is served for the conversation.

octavo chat MODEL                          serve a directory or a Hub id on a port of its own, and talk to it
octavo chat --url http://127.0.0.1:8000    talk to a server that runs
octavo chat --url URL "a question"         print the answer and nothing else
some-command | octavo chat --url URL       the same, the question being what comes on stdin
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Generator
from contextlib import ExitStack, closing
from typing import Any

from octavo.commands.chat_client import ChatError, ChatServer, Conversation, ServerEndedError

PROG = "octavo chat"
DEFAULT_URL = "http://127.0.0.1:8000"
SERVE_FLAGS = ("dtype", "kv_cache_dtype", "max_model_len")
HELP = """\
/system TEXT   tell the model how to behave, from the next question on; /system alone shows it, /system - removes it
/clear         forget the conversation; the system text stays
/exit          end; so does Ctrl-D
Ctrl-C         stop an answer; what came of it stays in the conversation"""
COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
# A model's text must not steer the terminal: control characters but tab and newline are left out there
UNPRINTABLE = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
DIM = "\x1b[2m"
PLAIN = "\x1b[0m"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a local directory or a Hub id, to be served here")
    parser.add_argument(
        "question", nargs="?", metavar="QUESTION", help="print the answer to it, and end (default: a conversation)"
    )
    server = parser.add_argument_group("a server that runs")
    server.add_argument("--url", help=f"with or without /v1 (default: without a MODEL, {DEFAULT_URL})")
    server.add_argument(
        "--model", dest="name", metavar="NAME", help="the name of its model (default: the first of /v1/models)"
    )
    server.add_argument("--api-key", metavar="KEY", help="sent as a bearer token (default: $OPENAI_API_KEY)")

    own = parser.add_argument_group("serving MODEL here", "passed on to `octavo serve`, whose --help tells more")
    own.add_argument("--dtype", help="(default: auto)")
    own.add_argument("--kv-cache-dtype", help="(default: auto)")
    own.add_argument("--max-model-len", metavar="N", help="(default: the model's own)")

    answers = parser.add_argument_group("answers")
    answers.add_argument("--system", metavar="TEXT", help="how the model is to behave (default: nothing is said)")
    answers.add_argument("--temperature", type=float, metavar="T", help="(default: the server's own)")
    answers.add_argument("--top-p", type=float, metavar="P", help="(default: the server's own)")
    answers.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (default: the server's own)")
    answers.add_argument("--seed", type=int, help="of the sampling (default: none)")


def run(args: argparse.Namespace) -> int:
    """Talk; returns the exit code: 1 where the only answer failed, or the server could not be reached."""
    try:
        _sort_out(args)
        question = _question(args)
        with ExitStack() as stack:
            conversation = _begin(args, stack)
            if question is None:
                return _converse(conversation)
            return _answer_once(conversation, question)
    except ChatError as e:
        print(f"{PROG}: {e}", file=sys.stderr)
        return 1


def _sort_out(args: argparse.Namespace) -> None:
    """With --url, or --model, there is no MODEL: the one word is the question."""
    running = args.url is not None or args.name is not None
    if running and args.question is not None:
        raise ChatError("a MODEL is served here, and --url and --model are for a server that runs: one or the other")
    if running:
        args.model, args.question = None, args.model
    if args.model is None:
        args.url = args.url or DEFAULT_URL
        given = [flag for flag in SERVE_FLAGS if getattr(args, flag) is not None]
        if given:
            raise ChatError(f"--{given[0].replace('_', '-')} is for a MODEL that is served here, and there is none")


def _question(args: argparse.Namespace) -> str | None:
    """The one question, from the command line or a stdin that isn't a terminal; None for a conversation."""
    if args.question is not None or sys.stdin.isatty():
        question: str | None = args.question
        return question
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError as e:
        raise ChatError(f"what came on stdin is no text: {e}") from e
    if not text:
        raise ChatError("no question: stdin is empty, and is no terminal to talk at")
    return text


def _begin(args: argparse.Namespace, stack: ExitStack) -> Conversation:
    """Reach the server, or start one; the stack ends it."""
    if args.model is None:
        server = ChatServer(args.url, args.api_key or os.environ.get("OPENAI_API_KEY"))
    else:
        server = _serve(args, stack)
    stack.enter_context(closing(server))
    wanted = {name: getattr(args, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
    options: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    return Conversation(server, args.name or server.first_model(), options, args.system)


def _serve(args: argparse.Namespace, stack: ExitStack) -> ChatServer:
    from rich.console import Console

    from octavo.commands.chat_server import own_server

    flags = [(f"--{name.replace('_', '-')}", getattr(args, name)) for name in SERVE_FLAGS]
    own = stack.enter_context(own_server(args.model, [word for flag in flags if flag[1] is not None for word in flag]))
    with Console(stderr=True).status(f"octavo serve {args.model}"):
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
    except ServerEndedError:
        raise
    except ChatError as e:
        print(f"{PROG}: {e}; the question is not part of the conversation", file=sys.stderr)
    if conversation.finish_reason == "length":
        print("(cut off at the limit of tokens)")


def _show(pieces: Generator[tuple[str, bool]], *, with_reasoning: bool) -> None:
    """Print an answer as it comes, and end its line; reasoning stands dim before it, at a terminal only."""
    terminal = sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what the terminal's encoding lacks must not end the answer
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
