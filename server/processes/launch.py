"""Starts server processes. Imports nothing that is slow: they are started before anything else is imported."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Sequence

from octavo.runtime.launch import child_environment
from octavo.text.frames import frame_of


class ServerStartError(RuntimeError):
    """A server process could not start; the message is its own."""


class ServerProcess:
    """A running server process, and this end of the socket pair that is its stdin."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket) -> None:
        self.process = process
        self.link = link

    def kill(self) -> None:
        """End it where it is. May be called again."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            self.link.close()


def start_server_process(program: Sequence[str], start: bytes, listening: socket.socket) -> ServerProcess:
    """Start `python program`, which reads `start` first. The socket `listening` has the same number there as here.

    Raises OSError.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        # -P: a file in the user's directory is no module
        command = [sys.executable, "-P", *program]
        process = subprocess.Popen(
            command, stdin=theirs.fileno(), env=child_environment(None), pass_fds=[listening.fileno()]
        )
    with contextlib.suppress(BrokenPipeError):  # it is dead already, which is noticed when it is listened to
        ours.sendall(frame_of(start))
    return ServerProcess(process, ours)
