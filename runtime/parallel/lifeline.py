"""A child process's stdin: its start as one line, and then a pipe whose end is the parent's end.

And what it tells: that it lives, as an echo, and of its own end a line.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

import zmq

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def ignore_signals() -> None:
    """SIGINT and SIGTERM are sent to the whole group, and whoever has started this process ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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


def be_killed_with_parent() -> None:
    """Have the system kill this process when the thread that started it ends: one that is stopped reads no stdin.

    Nothing is cleaned up then. Does nothing on systems other than Linux.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_heartbeat(address: str, rank: int = 0) -> None:
    """Echo whatever the server sends to `address` for this rank, for as long as this process runs.

    libzmq's proxy does it in C, without the interpreter's lock: a process in a long step, even in a kernel that holds
    the lock, still answers, and one that is stopped does not.
    """
    context = zmq.Context()  # never terminated: that would wait for the proxy, which ends with the process
    echo = context.socket(zmq.DEALER)
    echo.setsockopt(zmq.ROUTING_ID, b"%d" % rank)
    echo.setsockopt(zmq.RECONNECT_IVL, 10)
    echo.connect(address)
    threading.Thread(target=zmq.proxy, args=(echo, echo), name="octavo-heartbeat", daemon=True).start()


class EndedError(RuntimeError):
    """Another process of the engine has ended; the message says which, and how."""


def says_it_all(error: Exception) -> bool:
    """Whether the message is enough: octavo's own errors are sentences, others need their type."""
    return isinstance(error, (ValueError, OSError, EndedError)) and bool(str(error).strip())


def one_line(error: Exception) -> str:
    """An error for a person."""
    text = str(error).strip()
    return text if says_it_all(error) else f"{type(error).__name__}: {text}"
