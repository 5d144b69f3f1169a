"""A program at a terminal of its own: what it prints, the keys that are pressed, Ctrl-C among them."""

from __future__ import annotations

import codecs
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CTRL_C, CTRL_D = "\x03", "\x04"
# setsid alone gives no terminal: it has to be taken
START = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from octavo.cli import main; sys.exit(main())"
)


class Terminal:
    """`octavo ARGUMENTS` at a pseudo-terminal."""

    def __init__(self, arguments: Sequence[str], env: dict[str, str] | None = None) -> None:
        self._fd, inner = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb"} | (env or {}),
        )
        os.close(inner)
        self.printed = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a piece may end within a character

    def press(self, keys: str) -> None:
        """Ctrl-C when the program waits: CPython's input() loses one between its prompt and its wait for keys."""
        deadline = time.monotonic() + 60.0
        while CTRL_C in keys and not self._sleeps():
            assert time.monotonic() < deadline, "the program doesn't wait for keys"
            time.sleep(0.01)
        os.write(self._fd, keys.encode())

    def _sleeps(self) -> bool:
        """Whether its main thread does; a program that is gone needs no waiting for."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8")
        except FileNotFoundError:
            return True
        return stat.rpartition(")")[2].split()[0] not in ("R", "D")

    def wait_for(self, text: str, seconds: float = 60.0) -> str:
        """Read until `text` is printed; returns, and forgets, what was printed up to its end."""
        deadline = time.monotonic() + seconds
        while text not in self.printed:
            assert self._read(deadline), f"the program ended without {text!r}, after {self.printed!r}"
        before, _, self.printed = self.printed.partition(text)
        return before + text

    def end(self, seconds: float = 60.0) -> int:
        """The exit code, when the program ends by itself; what it still printed is in `printed`."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        return self.process.wait(seconds)

    def close(self) -> None:
        os.close(self._fd)  # the terminal is gone: SIGHUP, on which a program ends what it started
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read(self, deadline: float) -> bool:
        """Wait for more, and take it; False when the program is gone."""
        ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing more was printed in time, after {self.printed!r}"
        try:
            piece = os.read(self._fd, 65536)
        except OSError:  # Linux's way to say that nobody holds the other side any more
            return False
        self.printed += self._decoder.decode(piece).replace("\r\n", "\n")
        return bool(piece)


@contextmanager
def terminal(*arguments: str, **env: str) -> Iterator[Terminal]:
    """The program, hung up on at the end of the block if it still runs."""
    found = Terminal(arguments, env)
    try:
        yield found
    finally:
        found.close()
