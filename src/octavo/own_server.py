"""A server for the time of one command or program: `octavo serve MODEL` on a free port of 127.0.0.1.

It runs in a session of its own, so that Ctrl-C at the terminal, which stops an answer, does not reach it; the process
that started it ends it, also by its own end, however that comes. Its log goes to a temporary file, the end of which is
shown if the server fails.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO

POLL_SECONDS = 0.05
END_SECONDS = 10.0
LOG_LINES = 10


class ServerEndedError(RuntimeError):
    """The server that was started has ended, or is not ready in time; in one line, and the end of its log."""


class OwnServer:
    """The process, its address and the key that it asks for."""

    def __init__(self, words: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.api_key = secrets.token_hex()  # other users of this machine must not use it
        self._log = log
        command = [sys.executable, "-m", "octavo.commands.tied_server", *words]
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.PIPE,  # the system closes it where this process can't do anything any more
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "OCTAVO_API_KEY": self.api_key},
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def wait_until_ready(self, seconds: float | None = None) -> None:
        """Wait for /health, by default however long: the model may have to be downloaded. Raises ServerEndedError."""
        import httpx  # takes 0.1 s: programs of octavo.lang that start no server import this module too

        begin = time.monotonic()
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while self._process.poll() is None:
                with suppress(httpx.TransportError):
                    if client.get(f"{self.url}/health").status_code == 200:
                        return
                if seconds is not None and time.monotonic() - begin > seconds:
                    raise ServerEndedError(f"the server is not ready after {seconds:g} s{self._end_of_log()}")
                time.sleep(POLL_SECONDS)
        self.check()

    def check(self) -> None:
        """Raises ServerEndedError, with the end of the log, where the process is gone."""
        code = self._process.poll()
        if code is not None:
            raise ServerEndedError(f"the server ended with code {code}{self._end_of_log()}")

    def _end_of_log(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        return "; the end of its log:" + "".join(f"\n  | {line}" for line in lines[-LOG_LINES:])

    def end(self) -> None:
        """Send SIGTERM, and kill the processes that don't end."""
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


@contextmanager
def own_server(*words: str, environment: Mapping[str, str] | None = None) -> Iterator[OwnServer]:
    """`octavo serve WORDS` until the block ends, and also when this process is told to end.

    `environment`: variables that it gets beside this process's own.
    """
    with tempfile.TemporaryFile() as log, _ending_on_signals():
        server = OwnServer(words, log, environment or {})
        try:
            yield server
        finally:
            server.end()


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP (the terminal is closed) unwind the stack, as Ctrl-C does."""

    def unwind(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, unwind) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
