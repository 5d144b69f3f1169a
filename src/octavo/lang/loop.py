"""The event loop that all programs of a process share, in a thread in the background that their first one starts.

What users call waits for it from their own threads; nothing of theirs runs on it, so that no program stops another.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_started: tuple[int, asyncio.AbstractEventLoop] | None = None
"""The process that has started it, and the loop."""


def loop() -> asyncio.AbstractEventLoop:
    """The loop. Raises RuntimeError in a fork of the process that runs it: a fork has no threads but its own."""
    global _started
    with _lock:
        if _started is None:
            new = _new_loop()
            threading.Thread(target=new.run_forever, name="octavo-lang", daemon=True).start()
            _started = (os.getpid(), new)
        pid, found = _started
    if pid != os.getpid():
        raise RuntimeError(
            f"process {os.getpid()} was forked from process {pid}, which had run programs, and has no loop to run its "
            "own: start it by multiprocessing's method spawn"
        )
    return found


def _new_loop() -> asyncio.AbstractEventLoop:
    with suppress(ImportError):  # not there on Windows
        import uvloop

        return uvloop.new_event_loop()
    return asyncio.new_event_loop()


def call(function: Callable[..., object], *arguments: Any) -> None:
    """Let the loop call this soon."""
    loop().call_soon_threadsafe(function, *arguments)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Wait until the loop has done this work. Whoever interrupts the wait cancels the work."""
    try:
        future = asyncio.run_coroutine_threadsafe(work, loop())
    except BaseException:
        work.close()
        raise
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
