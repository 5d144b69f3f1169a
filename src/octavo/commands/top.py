"""Watch a running server in the terminal: tokens per second, latencies, queue, KV cache and prefix hits of its engines.

It reads /metrics under vLLM's names, so vLLM's servers can be watched too. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from dataclasses import asdict
from typing import Annotated, Any

import httpx
import msgspec
from msgspec import Meta

from octavo.bench.scrape import Look, ScrapeError, figures, read_page
from octavo.bench.sse import http_error
from octavo.commands.http_client import http_client, server_url, unreachable
from octavo.flags import add_flags, flags_of, read

PROG = "octavo top"
RECENT = 60.0  # seconds of which latencies are shown
TIMEOUT = 10.0


class TopOptions(msgspec.Struct, frozen=True):
    """The flags of `octavo top`."""

    url: Annotated[
        str,
        Meta(description="the server, with or without /v1", extra={"positional": True, "metavar": "URL"}),
    ] = "http://127.0.0.1:8000"
    interval: Annotated[
        float, Meta(ge=0.1, le=3600, description="between two looks at the server", extra={"metavar": "SECONDS"})
    ] = 2.0
    once: Annotated[
        bool, Meta(description="print the figures of one interval, and end", extra={"default": "until Ctrl-C"})
    ] = False
    json: Annotated[bool, Meta(description="the same as JSON", extra={"default": "tables"})] = False
    api_key: Annotated[
        str | None, Meta(description="sent as a bearer token", extra={"metavar": "KEY", "default": "$OPENAI_API_KEY"})
    ] = None


class TopError(RuntimeError):
    """Why there are no figures, in one line."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, flags_of(TopOptions))


def run(args: argparse.Namespace) -> int:
    """Show the figures; returns the exit code: 1 where the server can't be reached, or has none."""
    options = read(TopOptions, args)
    try:
        with _Server(options.url, options.api_key or os.environ.get("OPENAI_API_KEY")) as server:
            if options.once or options.json:
                return _once(server, options)
            return _watch(server, options)
    except TopError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1


class _Server:
    """What is looked at."""

    def __init__(self, url: str, api_key: str | None) -> None:
        try:
            self.url = server_url(url.rstrip("/").removesuffix("/metrics"))
        except ValueError as error:
            raise TopError(str(error)) from error
        self._client = http_client(self.url, api_key, TIMEOUT)

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def look(self) -> Look:
        """Its figures now. Raises TopError."""
        try:
            response = self._client.get(f"{self.url}/metrics")
        except httpx.HTTPError as error:
            raise TopError(unreachable(self.url, error)) from error
        if response.status_code in (401, 403):
            raise TopError(f"{self.url}/metrics: {http_error(response.status_code, response.content)}; --api-key KEY")
        if response.status_code != 200:
            said = http_error(response.status_code, b"")
            raise TopError(f"{self.url}/metrics: {said}: this server shows no metrics there")
        try:
            return read_page(response.text, time.monotonic())
        except ScrapeError as error:
            raise TopError(f"{self.url}/metrics: {error}") from error


def _once(server: _Server, options: TopOptions) -> int:
    before = server.look()
    time.sleep(options.interval)
    after = server.look()
    if options.json:
        print(json.dumps(_facts(server.url, before, after), indent=2))
        return 0
    from rich.console import Console

    from octavo.commands.top_view import View

    Console().print(View(server.url, deque([before, after]), deque(), None).tables())
    return 0


def _facts(url: str, before: Look, after: Look) -> dict[str, Any]:
    """What --json prints."""
    engines = after.engines
    return {
        "url": url,
        "model": after.model,
        "seconds": after.time - before.time,
        "all": asdict(figures(before, after, engines)),
        "engines": {engine: asdict(figures(before, after, [engine])) for engine in engines},
    }


def _watch(server: _Server, options: TopOptions) -> int:
    """Until Ctrl-C. A server that is gone for a while is asked again."""
    from rich.console import Console
    from rich.live import Live

    from octavo.commands.top_view import HISTORY, View

    looks = deque([server.look()])
    console = Console()
    if not console.is_terminal:
        raise TopError("there is no terminal to show it in; --once prints the figures of one interval")
    rates: deque[float] = deque(maxlen=HISTORY)
    trouble: str | None = None
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(View(server.url, looks, rates, trouble).screen(options.interval), refresh=True)
                time.sleep(options.interval)
                try:
                    looks.append(server.look())
                    trouble = None
                except TopError as error:
                    trouble = str(error)
                    continue
                while looks[-1].time - looks[1].time >= RECENT:
                    looks.popleft()
                rates.append(figures(looks[-2], looks[-1], looks[-1].engines).output_rate or 0.0)
    except KeyboardInterrupt:
        return 0
