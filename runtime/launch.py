"""Starting the engine process and holding on to it. Imported by the server: no torch here.

The two talk through one ZeroMQ socket each (DEALER, msgpack of runtime/messages.py); the server binds `address`, the
engine connects to it. The engine's stdin is its lifeline: it ends when the pipe closes, so it can't outlive the server.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shutil import rmtree

import msgspec

import octavo
from octavo.kernels.native.environment import ENVIRONMENT
from octavo.runtime.config import EngineConfig


class EngineStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line on the engine's stdin. spawn_time: time.time() before the process was started."""

    config: EngineConfig
    spawn_time: float


class EngineProcess:
    """A running engine process: its address, and its end."""

    def __init__(self, process: subprocess.Popen[bytes], address: str) -> None:
        self.process = process
        self.address = address

    def exit_code(self) -> int | None:
        """None while it runs; a signal's number, negative, when one killed it."""
        return self.process.poll()

    def close(self, timeout: float = 5.0) -> None:
        """End the process: close its stdin, wait, kill if that wasn't enough. May be called again."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        remove_socket(self.address)


def remove_socket(address: str) -> None:
    """Remove the directory of an engine's socket; the engine does it too, for a server that was killed."""
    rmtree(Path(address.removeprefix("ipc://")).parent, ignore_errors=True)


def start_engine(config: EngineConfig) -> EngineProcess:
    """Start the engine process; it sends Ready or Failed to whoever binds `address`. Returns at once."""
    address = f"ipc://{_socket_directory()}/engine"
    # -P: a file in the user's directory is no module
    command = [sys.executable, "-P", "-m", "octavo.runtime.process", address]
    start = EngineStart(config, time.time())
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=child_environment(config.num_threads))
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it is dead already: exit_code tells
    return EngineProcess(process, address)


def _socket_directory() -> str:
    """A directory that only this user can enter, with a path short enough for a Unix socket (107 bytes)."""
    directory = tempfile.mkdtemp(prefix="octavo-")
    if len(directory) > 90:
        os.rmdir(directory)
        directory = tempfile.mkdtemp(prefix="octavo-", dir="/tmp")
    return directory


def child_environment(num_threads: int | None) -> dict[str, str]:
    """A child's environment: this package importable as it is here, and OpenMP set up before torch loads it."""
    environment = ENVIRONMENT | os.environ
    source = str(Path(octavo.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment
