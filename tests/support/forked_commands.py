"""`octavo COMMAND ...` in a process forked off one that has imported everything: 0.1 s, not 4 s, a start.

As a script it is that process. A fork is what a new interpreter is behind its imports: it has one thread, the variables
and the three files that it is given, and a group of its own. The engines that `octavo serve` starts with itself are
forked off it. How a new interpreter starts and ends is proved where `octavo_server.serving_anew` stands.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

import octavo

MAX_REQUEST = 1 << 17  # bytes: with its variables, more than any command here has
ENGINE = "octavo.runtime.process"
FORKED_ENGINE = "octavo-engine"
"""The name by which a forked engine is known from the other children of its server; the kernel keeps 15 bytes."""
PR_SET_NAME = 15


@dataclass(frozen=True)
class Finished:
    """How a run ended. code None: it was killed since its time was over."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float


class ForkedProcess:
    """What a test needs of subprocess.Popen, for a process that is no child of this one.

    status: a pipe that says the process's number in a line and, once it has ended, its exit code in another.
    """

    def __init__(self, status: int, stdout: IO[str] | None = None) -> None:
        self._status = os.fdopen(status, "rb", buffering=0)
        self.pid = int(self._status.readline())
        self.stdout = stdout
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self.returncode = int(self._status.readline())
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> ForkedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._status.close()
        if self.stdout is not None:
            self.stdout.close()


class ForkedCommands:
    """The process to fork from, which ends with the one that has started it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        package = str(Path(octavo.__file__).parent.parent)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": package},
            )

    def start(self, arguments: Sequence[str]) -> ForkedProcess:
        """Start a command; its `stdout` is what it says on stdout and stderr."""
        said, out = os.pipe()
        process = self._start(arguments, out, out, open(said, encoding="utf-8"))  # noqa: SIM115 - closed by its owner
        os.close(out)
        return process

    def run(self, *arguments: object, seconds: float = 60) -> Finished:
        """Run one command; it and all that it started are killed after so many seconds."""
        with tempfile.TemporaryDirectory() as directory:
            files = [Path(directory, name) for name in ("out", "err")]
            begin = time.monotonic()
            with files[0].open("wb") as out, files[1].open("wb") as err:
                process = self._start([str(word) for word in arguments], out.fileno(), err.fileno())
            code: int | None = None
            with process:
                try:
                    code = process.wait(seconds)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
            took = time.monotonic() - begin
            stdout, stderr = (file.read_text("utf-8", errors="replace") for file in files)
        return Finished(code, stdout, stderr, took)

    def _start(self, arguments: Sequence[str], out: int, err: int, stdout: IO[str] | None = None) -> ForkedProcess:
        status, theirs = os.pipe()
        request = json.dumps([list(arguments), dict(os.environ)]).encode()
        assert len(request) < MAX_REQUEST
        with self._lock:
            socket.send_fds(self._socket, [request], [out, err, theirs])
        os.close(theirs)
        return ForkedProcess(status, stdout)

    def close(self) -> None:
        """End it; commands that it has started go on."""
        self._socket.close()
        self._process.wait()


@functools.cache
def forked_commands() -> ForkedCommands:
    """All tests of this process have one."""
    commands = ForkedCommands()
    atexit.register(commands.close)
    return commands


def _serve_forks() -> None:
    """Fork a command for each request, until the socket is closed."""
    import octavo.calibration.convert_model
    import octavo.calibration.quantize_model
    import octavo.commands.convert
    import octavo.commands.eval
    import octavo.commands.inspect
    import octavo.commands.quantize
    import octavo.commands.serve
    import octavo.jobs.quality
    import octavo.jobs.quantize
    import octavo.jobs.self_text
    import octavo.kernels.attention.cpu
    import octavo.quant.hub
    import octavo.runtime.model.blocks
    import octavo.runtime.process
    import octavo.runtime.startup
    import octavo.server.app
    import octavo.server.lifecycle  # noqa: F401

    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, all that was imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who watch
    with socket.socket(fileno=os.dup(0)) as requests:
        while True:
            request, descriptors, *_ = socket.recv_fds(requests, MAX_REQUEST, 3)
            if not request:
                return
            if os.fork() == 0:
                _watch(*json.loads(request), *descriptors)
            for descriptor in descriptors:
                os.close(descriptor)


def _watch(arguments: list[str], variables: dict[str, str], out: int, err: int, status: int) -> NoReturn:
    """Fork the command, and tell its number and its end. Does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        _become(lambda: _run(arguments), variables, os.open(os.devnull, os.O_RDONLY), out, err)
    os.close(out)
    os.close(err)
    with contextlib.suppress(BrokenPipeError):
        os.write(status, b"%d\n" % pid)
        _wait(pid, status)
        os.write(status, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def _wait(pid: int, status: int) -> None:
    """Until the process has ended. When nobody reads the pipe any more, as the tests were killed, it is killed too."""
    poll = select.poll()
    poll.register(os.pidfd_open(pid), select.POLLIN)
    poll.register(status, 0)
    if any(event & select.POLLERR for _, event in poll.poll()):
        os.kill(pid, signal.SIGKILL)


def _become(run: Callable[[], int], variables: dict[str, str], *files: int) -> NoReturn:
    """The child: run as the interpreter would, from what a program finds to how it ends. Does not return."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, file in enumerate([os.dup(file) for file in files]):
            os.dup2(file, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # as exec would, such as the socket on which the parent listens
        os.environ.clear()
        os.environ.update(variables)
        code = run()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(arguments: list[str]) -> int:
    from octavo.cli import main
    from octavo.runtime import launch

    os.setpgid(0, 0)
    launch.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": _start_engine})  # type: ignore[assignment]
    return main(arguments)


def _start_engine(command: list[str], stdin: int, env: dict[str, str]) -> Any:
    """Instead of subprocess.Popen: a fork, as long as there is one thread; later engines are started anew."""
    if threading.active_count() > 1 or command[-2] != ENGINE:
        return subprocess.Popen(command, stdin=stdin, env=env)
    return _ForkedEngine(command[-2:], env)


class _ForkedEngine:
    """What launch.py needs of subprocess.Popen, for a child that is forked."""

    def __init__(self, words: list[str], variables: dict[str, str]) -> None:
        theirs, ours = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ours)
            _become(lambda: _run_engine(words), variables, theirs, 1, 2)
        os.close(theirs)
        self.stdin = os.fdopen(ours, "wb")
        self.returncode: int | None = None
        self._lock = threading.Lock()
        self._end = os.pidfd_open(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._end], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"engine {self.pid}", timeout or 0.0)
        with self._lock:
            if self.returncode is None:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._end, signal.SIGKILL)


def _run_engine(words: list[str]) -> int:
    from octavo.runtime.process import main

    ctypes.CDLL(None).prctl(PR_SET_NAME, FORKED_ENGINE.encode())
    logging.root.handlers.clear()  # the server's
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("octavo").setLevel(logging.NOTSET)
    sys.argv = words
    return main()


if __name__ == "__main__":
    _serve_forks()
