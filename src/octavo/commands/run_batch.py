"""Answer a file of requests, one a line, with a server that is started for it. All flags of `octavo serve` are taken.

octavo run-batch MODEL -i in.jsonl -o out.jsonl

A line is {"custom_id", "method": "POST", "url", "body"}, as in OpenAI's and vLLM's batches; `url` is a POST route that
takes JSON. Answers are appended as they come, so a command that was ended goes on with the lines that have none yet.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

import httpx
import msgspec
from msgspec import Meta

from octavo.commands.failure import one_line
from octavo.commands.progress_bar import ProgressBar, progress_bar
from octavo.flags import add_flags, flags_of, read
from octavo.own_server import OwnServer, ServerEndedError, own_server
from octavo.server.batch_lines import Line, LineError, answer_line, done_ids, lines_of, routes_of

PROG = "octavo run-batch"
SERVERS_OWN = ("--host", "--port", "--uds", "--api-key")  # of the server, which nobody else is to reach


class RunBatchOptions(msgspec.Struct, frozen=True):
    """The flags of `octavo run-batch` beside those of the server."""

    input_file: Annotated[
        Path,
        Meta(description="the requests, one a line", extra={"flag": ("-i", "--input-file"), "metavar": "FILE"}),
    ]
    output_file: Annotated[
        Path,
        Meta(
            description="where the answers are appended; lines whose custom_id is there are left out",
            extra={"flag": ("-o", "--output-file"), "metavar": "FILE"},
        ),
    ]
    concurrency: Annotated[
        int, Meta(ge=1, description="requests that are sent at a time; the server queues them", extra={"metavar": "N"})
    ] = 512
    serve_words: tuple[str, ...] = ()


FLAGS = flags_of(RunBatchOptions)


class RunBatchError(RuntimeError):
    """What went wrong, in one line."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, FLAGS)
    parser.add_argument("--serve-words", type=json.loads, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def own_words(argv: Sequence[str], _: argparse.ArgumentParser) -> list[str]:
    """The command line with all that is the server's as one word."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in FLAGS:
        own.add_argument(*flag.names, action="append", dest=flag.names[0])
    own.add_argument("-h", "--help", action="store_true")
    try:
        found, rest = own.parse_known_args(argv)
    except argparse.ArgumentError:
        return list(argv)  # the command's own parser says what is wrong
    words = ["--help"] if found.help else []
    for flag in FLAGS:
        for value in vars(found)[flag.names[0]] or ():
            words += [flag.names[0], value]
    return [*words, "--serve-words", json.dumps(rest)]


def run(args: argparse.Namespace) -> int:
    """Answer the file; returns the exit code: 1 where a line was not answered with status 200, or nothing could be."""
    options = read(RunBatchOptions, args)
    try:
        done, total = _checked(options)
        print(f"{PROG}: {total} requests, of which {len(done)} are answered already", file=sys.stderr)
        if len(done) >= total:
            return 0
        return _answer(options, done, total)
    except (RunBatchError, ServerEndedError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1


def _checked(options: RunBatchOptions) -> tuple[set[str], int]:
    """The lines that are answered, and the number of all; before the model is loaded. Raises RunBatchError."""
    taken = next((word for word in options.serve_words if word.partition("=")[0] in SERVERS_OWN), None)
    if taken is not None:
        raise RunBatchError(f"{taken}: the server is started for this command alone, and chooses that itself")
    try:
        done = done_ids(options.output_file)
        ids = {line.custom_id for line in lines_of(options.input_file, None)}
    except (OSError, ValueError) as error:
        raise RunBatchError(
            one_line(error) if isinstance(error, OSError) else f"{options.input_file}: {error}"
        ) from None
    if not ids:
        raise RunBatchError(f"{options.input_file}: there is no request in it")
    if strange := done - ids:
        raise RunBatchError(
            f"{options.output_file}: it answers {min(strange)[:80]!r}, which {options.input_file} doesn't ask; name "
            "another output file"
        )
    return done, len(ids)


def _answer(options: RunBatchOptions, done: set[str], total: int) -> int:
    with progress_bar("starting the server") as bar, own_server(*options.serve_words) as server:
        server.wait_until_ready()
        with options.output_file.open("ab") as output:
            run = _Run(server, output, bar, len(done), total)
            asyncio.run(run.all(options, done))
    print(f"{PROG}: {run.num_good} answered, {run.num_bad} with an error", file=sys.stderr)
    return 1 if run.num_bad else 0


class _Run:
    """The requests under way. Answers are written in the order in which they come."""

    def __init__(self, server: OwnServer, output: IO[bytes], bar: ProgressBar, num_before: int, total: int) -> None:
        self.num_good = 0
        self.num_bad = 0
        self._server = server
        self._output = output
        self._bar = bar
        self._num_before = num_before
        self._total = total

    async def all(self, options: RunBatchOptions, done: set[str]) -> None:
        """Answer all lines but those that are done. Raises RunBatchError and ServerEndedError."""
        headers = {"Authorization": f"Bearer {self._server.api_key}"}
        limits = httpx.Limits(max_connections=options.concurrency)
        async with httpx.AsyncClient(
            base_url=self._server.url, headers=headers, limits=limits, timeout=None, trust_env=False
        ) as client:
            urls = routes_of((await client.get("/openapi.json")).json())
            lines = (line for line in lines_of(options.input_file, urls) if line.custom_id not in done)
            tasks = [asyncio.create_task(self._work(lines, client)) for _ in range(options.concurrency)]
            try:
                await asyncio.gather(*tasks)
            except LineError as error:
                raise RunBatchError(f"{options.input_file}: {error}") from None
            except httpx.TransportError as error:
                self._server.check()
                raise RunBatchError(f"the server can't be reached: {error}") from None
            finally:
                for task in tasks:
                    task.cancel()

    async def _work(self, lines: Iterator[Line], client: httpx.AsyncClient) -> None:
        """Answer one line after another, as the other workers do."""
        for line in lines:
            response = await client.post(line.url, json=line.body)
            if response.status_code == 503:
                raise RunBatchError(f"the server takes no requests any more: {response.text[:200]}")
            self._write(line, response)

    def _write(self, line: Line, response: httpx.Response) -> None:
        body: Any = msgspec.json.decode(response.content)
        request_id = response.headers.get("x-request-id", "")
        self._output.write(answer_line(line, response.status_code, request_id, body))
        self._output.flush()
        is_good = response.status_code == 200
        self.num_good += is_good
        self.num_bad += not is_good
        self._bar.progress(self._num_before + self.num_good + self.num_bad, self._total, "requests")
