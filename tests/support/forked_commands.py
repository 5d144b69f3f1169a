"""`octavo COMMAND ...` in a process forked off one that has imported everything: 0.1 s, not 4 s, a start.

As a script it is that process. A fork is what a new interpreter is behind its imports: it has one thread, the variables
and the files that it is given, and it ends as one does. The processes that a command starts before it has threads are
forked off it: engines, their ranks, and what renders templates. So are the engines and ranks that a test starts itself,
with `fork_children`. How a new interpreter starts is proved where `octavo_server.serving_anew` stands.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
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
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

import octavo
from octavo.runtime.parallel.lifeline import read_line

MAX_REQUEST = 1 << 17  # bytes: with its variables, more than any command here has
MAX_FILES = 16
FREE = 512  # files from this number on are nobody's
COMMAND = "octavo"
ENGINE = "octavo.runtime.process"
THREADS = {ENGINE: 1, "octavo.text.template_process": 1, "octavo.runtime.parallel.follower": 3}
"""Programs that are forked, and by how many threads at the most: two of a driver's wait outside the interpreter."""
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

    def __init__(self, status: int, stdin: IO[Any] | None = None, stdout: IO[Any] | None = None) -> None:
        self.pid = int(read_line(status))
        self.stdin = stdin
        self.stdout = stdout
        self.returncode: int | None = None
        self._status = status
        self._lock = threading.Lock()
        weakref.finalize(self, os.close, status)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            with self._lock:  # several threads may wait
                if self.returncode is None:
                    self.returncode = int(read_line(self._status))
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

    def start(self, arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> ForkedProcess:
        """Start a command; its `stdout` is what it says on stdout and stderr. variables: added to this process's."""
        environment = {**os.environ, **(variables or {})}
        said, out = os.pipe()
        status = self._start([COMMAND, *arguments], environment, {1: out, 2: out})
        os.close(out)
        return ForkedProcess(status, stdout=open(said, encoding="utf-8"))

    def run(self, *arguments: object, seconds: float = 60) -> Finished:
        """Run one command; it and all that it started are killed after so many seconds."""
        words = [COMMAND, *(str(word) for word in arguments)]
        with tempfile.TemporaryDirectory() as directory:
            files = [Path(directory, name) for name in ("out", "err")]
            begin = time.monotonic()
            with files[0].open("wb") as out, files[1].open("wb") as err:
                status = self._start(words, dict(os.environ), {1: out.fileno(), 2: err.fileno()})
            code: int | None = None
            with ForkedProcess(status) as process:
                try:
                    code = process.wait(seconds)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
            took = time.monotonic() - begin
            stdout, stderr = (file.read_text("utf-8", errors="replace") for file in files)
        return Finished(code, stdout, stderr, took)

    def popen(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        env: dict[str, str],
        stdout: int | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Any:
        """In the place of subprocess.Popen, for what octavo starts."""
        program = _program(command)
        if program is None or stdin != subprocess.PIPE:
            return subprocess.Popen(command, stdin=stdin, stdout=stdout, env=env, pass_fds=pass_fds)
        read, write = os.pipe()
        files = {0: read, 1: 1, 2: 2, **{number: number for number in pass_fds}}
        said = None
        if stdout == subprocess.PIPE:
            said, files[1] = os.pipe()
        status = self._start(program, env, files)
        os.close(read)
        if said is not None:
            os.close(files[1])
        return ForkedProcess(status, os.fdopen(write, "wb"), None if said is None else os.fdopen(said, "rb"))

    def _start(self, words: Sequence[str], variables: dict[str, str], files: dict[int, int]) -> int:
        """Fork what runs `words`, with these files by the numbers that they have there; returns its status."""
        status, theirs = os.pipe()
        request = json.dumps([list(words), variables, list(files)]).encode()
        assert len(request) < MAX_REQUEST
        with self._lock:
            socket.send_fds(self._socket, [request], [theirs, *files.values()])
        os.close(theirs)
        return status

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


def fork_children(patch: Any) -> None:
    """Have the engines and ranks that this process starts forked, for as long as the pytest.MonkeyPatch lasts."""
    _replace_popen(patch.setattr, forked_commands().popen)


def _program(command: Sequence[str]) -> list[str] | None:
    """The module and its arguments, if it is one that can be forked."""
    is_known = list(command[:3]) == [sys.executable, "-P", "-m"] and command[3] in THREADS
    return list(command[3:]) if is_known else None


def _replace_popen(setattr_: Callable[[Any, str, Any], None], popen: Callable[..., Any]) -> None:
    """In the modules that start processes."""
    from octavo.runtime import launch
    from octavo.runtime.parallel import follower_process
    from octavo.server import frame_process

    for module in (launch, follower_process, frame_process):
        setattr_(module, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": popen}))


def _serve_forks() -> None:
    """Fork a program for each request, until the socket is closed."""
    import torch

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
    import octavo.runtime.parallel.follower
    import octavo.runtime.process
    import octavo.runtime.startup
    import octavo.server.app
    import octavo.server.lifecycle
    import octavo.text.template_process  # noqa: F401
    from octavo.runtime.model import select_operators

    select_operators.warm_up(torch.device("cpu"))  # loads compiled kernels, and starts no thread
    _replace_popen(setattr, _fork_child)
    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, all that was imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who watch
    with socket.socket(fileno=os.dup(0)) as requests:
        while True:
            request, descriptors, *_ = socket.recv_fds(requests, MAX_REQUEST, MAX_FILES)
            if not request:
                return
            if os.fork() == 0:
                words, variables, numbers = json.loads(request)
                status, *files = descriptors
                _watch(words, variables, dict(zip(numbers, files, strict=True)), status)
            for descriptor in descriptors:
                os.close(descriptor)


def _watch(words: list[str], variables: dict[str, str], files: dict[int, int], status: int) -> NoReturn:
    """Fork the program, and tell its number and its end. Does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):  # to the group of the tests: `_wait` sees their end, and ends ours
        signal.signal(number, signal.SIG_IGN)
    pid = os.fork()
    if pid == 0:
        _become(words, variables, {0: os.open(os.devnull, os.O_RDONLY), **files})
    for descriptor in files.values():
        os.close(descriptor)
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


def _become(words: list[str], variables: dict[str, str], files: dict[int, int]) -> NoReturn:
    """The child: run as the interpreter would, from what a program finds to how it ends. Does not return."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _take(files)
        os.environ.clear()
        os.environ.update(variables)
        tempfile.tempdir = None  # it may have been another one
        code = _run_command(words[1:]) if words[0] == COMMAND else _run_child(words)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _take(files: dict[int, int]) -> None:
    """Have these files by these numbers, and no others: as exec leaves it, without a parent's sockets."""
    kept = {number: fcntl.fcntl(file, fcntl.F_DUPFD, FREE) for number, file in files.items()}
    for number, file in kept.items():
        os.dup2(file, number)
    begin = 3
    for number in (*sorted(set(kept) - {0, 1, 2}), os.sysconf("SC_OPEN_MAX")):
        os.closerange(begin, number)
        begin = number + 1


def _run_command(arguments: list[str]) -> int:
    from octavo.cli import main

    os.setpgid(0, 0)
    try:
        return main(arguments)
    finally:  # as the interpreter ends
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def _run_child(words: list[str]) -> int:
    """A module that is a program of octavo's own, whose last line ends the process at once."""
    if words[0] == ENGINE:
        ctypes.CDLL(None).prctl(PR_SET_NAME, FORKED_ENGINE.encode())
    logging.root.handlers.clear()  # the server's
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("octavo").setLevel(logging.NOTSET)
    sys.argv = words
    code: int = importlib.import_module(words[0]).main()
    return code


def _fork_child(
    command: list[str],
    *,
    stdin: int,
    env: dict[str, str],
    stdout: int | None = None,
    pass_fds: Sequence[int] = (),
) -> Any:
    """In the place of subprocess.Popen in a forked process: as long as it has few threads, its children are forks."""
    program = _program(command)
    if program is None or threading.active_count() > THREADS[program[0]]:
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, env=env, pass_fds=pass_fds)
    return _ForkedChild(program, env, stdin, stdout, pass_fds)


class _ForkedChild:
    """What octavo needs of subprocess.Popen, for a child that is forked."""

    def __init__(
        self, words: list[str], variables: dict[str, str], stdin: int, stdout: int | None, kept: Sequence[int]
    ) -> None:
        read = stdin
        write = said = None
        files = {1: 1, 2: 2, **{number: number for number in kept}}
        if stdin == subprocess.PIPE:
            read, write = os.pipe()
        if stdout == subprocess.PIPE:
            said, files[1] = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _become(words, variables, {0: read, **files})
        if write is not None:
            os.close(read)
        if said is not None:
            os.close(files[1])
        self.stdin = None if write is None else os.fdopen(write, "wb")
        self.stdout = None if said is None else os.fdopen(said, "rb")
        self.returncode: int | None = None
        self._lock = threading.Lock()
        self._end = os.pidfd_open(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._end], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
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


if __name__ == "__main__":
    _serve_forks()
