"""SIGTERM in commands that write files: unwinds the stack as Ctrl-C does, so that what is half written is removed."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unwinding_when_terminated(prog: str) -> Iterator[None]:
    """In the block SIGTERM says so and raises SystemExit with the shell's code for it."""

    def end(number: int, frame: object) -> None:  # noqa: ARG001 (the system calls it)
        print(f"{prog}: terminated", file=sys.stderr)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
