"""The processes that answer frames of the server, one after another; its end of them is server/frame_process.py.

Such a process ends when the server closes the socket, which is its stdin.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from octavo.text.frames import frame_of, receive_frame


def server_link() -> socket.socket:
    """The socket to the server. Signals don't end the process from now on."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the server drains first, then ends us
        signal.signal(number, signal.SIG_IGN)
    return socket.socket(fileno=os.dup(0))


def answer_frames(link: socket.socket, answer: Callable[[bytes], bytes], last: bytes | None = None) -> int:
    """Answer until the socket is closed; returns the exit code. last: the answer behind which the process ends."""
    while (frame := receive_frame(link)) is not None:
        if not send_answer(link, answer(frame), last):
            return 1
    return 0


def send_answer(link: socket.socket, content: bytes, last: bytes | None) -> bool:
    """Whether the process can go on."""
    try:
        link.sendall(frame_of(content))
    except (BrokenPipeError, ConnectionResetError):
        return False  # the server was killed meanwhile
    return content != last


def limit_memory(num_bytes: int) -> None:
    """Limit the process to num_bytes more than it has now; there is no limit without /proc, which says how many."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    limit = pages * resource.getpagesize() + num_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
