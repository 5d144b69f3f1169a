"""A server that tells, at SIGUSR1, which asyncio tasks it has: start it with `census_environment`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from octavo_server import Server, wait_until

import octavo

CENSUS = """\
import asyncio, collections, gc, json, signal

def tell(*_):
    tasks = [it for it in gc.get_objects() if isinstance(it, asyncio.Task) and not it.done()]
    names = collections.Counter(getattr(it.get_coro(), "__qualname__", "?") for it in tasks)
    print("census", json.dumps(names), flush=True)

signal.signal(signal.SIGUSR1, tell)
"""


def census_environment(directory: Path) -> dict[str, str]:
    """The variables of a server that can be asked."""
    (directory / "sitecustomize.py").write_text(CENSUS)
    package = Path(octavo.__file__).parent.parent
    return {"PYTHONPATH": os.pathsep.join([str(directory), str(package)])}


def census(server: Server) -> dict[str, int]:
    """How many tasks of each coroutine are not done."""
    told = sum(line.startswith("census ") for line in server.lines)
    server.send_signal(signal.SIGUSR1)
    lines: list[str] = []

    def has_come() -> bool:
        lines[:] = [line for line in server.lines if line.startswith("census ")]
        return len(lines) > told

    wait_until(has_come)
    found: dict[str, int] = json.loads(lines[-1].removeprefix("census "))
    return found
