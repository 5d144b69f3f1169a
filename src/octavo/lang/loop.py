"""The event loop that all programs of a process share, in a thread in the background that their first one starts.

What users call waits for it from their own threads; nothing of theirs runs on it, so that no program stops another.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from octavo.offline.loop_thread import LoopThread

T = TypeVar("T")

_lock = threading.Lock()
_started: tuple[int, LoopThread] | None = None
"""The process that has started it, and the loop's thread."""


def _thread() -> LoopThread:
    """Raises RuntimeError in a fork of the process that runs the loop: a fork has no threads but its own."""
    global _started
    with _lock:
        if _started is None:
            _started = (os.getpid(), LoopThread("octavo-lang"))
        pid, found = _started
    if pid != os.getpid():
        raise RuntimeError(
            f"process {os.getpid()} was forked from process {pid}, which had run programs, and has no loop to run its "
            "own: start it by multiprocessing's method spawn"
        )
    return found


def call(function: Callable[..., object], *arguments: Any) -> None:
    """Let the loop call this soon."""
    _thread().soon(function, *arguments)


async def awaited(work: Coroutine[Any, Any, T]) -> T:
    """The same in a coroutine of another loop. Whoever cancels it cancels the work."""
    try:
        thread = _thread()
    except BaseException:
        work.close()
        raise
    return await thread.start(work)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Wait until the loop has done this work. Whoever interrupts the wait cancels the work."""
    try:
        thread = _thread()
    except BaseException:
        work.close()
        raise
    return thread.call(work)
