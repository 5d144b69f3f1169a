"""Ctrl-C at a moment of a test's own choice."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable

import pytest


def interrupt(work: Callable[[], object], delay: float) -> None:
    """Let SIGINT come to this thread so many seconds after the work has begun; KeyboardInterrupt must come out."""
    thread = threading.get_ident()
    begins = threading.Event()

    def send() -> None:
        begins.wait()
        time.sleep(delay)
        signal.pthread_kill(thread, signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    gc.disable()  # hypothesis has Python code run at each collection, where an interrupt is printed and lost
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (it comes from here on)
            begins.set()
            work()
    finally:
        gc.enable()
    sender.join()
