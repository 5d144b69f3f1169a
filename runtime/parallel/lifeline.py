"""A child process's stdin: its start as one line, and then a pipe whose end is the parent's end.

And what it tells of its own end: a line.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


def read_line(descriptor: int) -> bytes:
    """One line, read byte by byte: a buffered reader would hold a lock that the interpreter needs when it exits.

    Empty if there is no whole line.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            return b""
        line += byte
    return bytes(line)


def end_with_parent(clean_up: Callable[[], object] = lambda: None) -> None:
    """From now on this process ends when its stdin does, whatever it is doing; what must be removed is removed."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        clean_up()
        os._exit(0)

    threading.Thread(target=watch, name="octavo-lifeline", daemon=True).start()


class EndedError(RuntimeError):
    """Another process of the engine has ended; the message says which, and how."""


def says_it_all(error: Exception) -> bool:
    """Whether the message is enough: octavo's own errors are sentences, others need their type."""
    return isinstance(error, (ValueError, OSError, EndedError)) and bool(str(error).strip())


def one_line(error: Exception) -> str:
    """An error for a person."""
    text = str(error).strip()
    return text if says_it_all(error) else f"{type(error).__name__}: {text}"
