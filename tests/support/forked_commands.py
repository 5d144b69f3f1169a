"""`octavo COMMAND ...` in a process of its own, forked off one that has imported everything: 30 ms, not 4 s, a run.

As a script it is that process: it reads a line of JSON a run (arguments and seconds) and answers with one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True)
class Finished:
    """How a run ended. code None: it was killed since its time was over."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float


class ForkedCommands:
    """The process to fork from; a context manager."""

    def __enter__(self) -> ForkedCommands:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)

    def run(self, *arguments: object, seconds: float = 60) -> Finished:
        """Run one command; it and all that it started are killed after so many seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([list(map(str, arguments)), seconds]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Finished(**answer)


def _serve_forks() -> None:
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
    import octavo.runtime.startup
    import octavo.server.app
    import octavo.server.lifecycle  # noqa: F401

    for line in sys.stdin:
        arguments, seconds = json.loads(line)
        print(json.dumps(_fork(arguments, seconds)), flush=True)


def _fork(arguments: list[str], seconds: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        err = Path(directory) / "err"
        begin = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _run(arguments, out, err)
        code = _wait(pid, begin + seconds)
        took = time.monotonic() - begin
        text = [path.read_text("utf-8", errors="replace") if path.exists() else "" for path in (out, err)]
        return {"code": code, "stdout": text[0], "stderr": text[1], "seconds": took}


def _run(arguments: list[str], out: Path, err: Path) -> None:
    """The child: as the interpreter would run the console script. Does not return."""
    code = 1
    try:
        os.setpgid(0, 0)
        for path, fd in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        from octavo.cli import main

        code = main(arguments)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, until: float) -> int | None:
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    _serve_forks()
