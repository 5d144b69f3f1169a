"""A real `octavo serve` of the tiny checkpoint, in float32, on a free port of this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from forked_commands import ENGINE, FORKED_ENGINE, ForkedProcess, forked_commands
from prometheus_client.parser import text_string_to_metric_families

import octavo

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"
PATIENCE = 300.0  # seconds; not a measurement, only so that a hang is a failure
LATE = {"TMPDIR", "OCTAVO_API_KEY"}
"""Variables that nothing reads while it is imported, so that a forked server may have its own."""
SMALL = ("--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "512", "--block-size", "16")


class Server:
    """A running server. `lines` is what it has said, on stdout and stderr together."""

    def __init__(self, process: subprocess.Popen[str] | ForkedProcess) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""
        self._is_ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"serving on (\S+)", line):
                self.url = found.group(1)
                self._is_ready.set()
        self._is_ready.set()

    def wait_until_ready(self) -> None:
        assert self._is_ready.wait(PATIENCE), self.said
        assert self.url, self.said

    @property
    def said(self) -> str:
        return "".join(self.lines)

    @property
    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(children.split()[0])

    @property
    def engine_pids(self) -> list[int]:
        """Of all engines, in the order in which they were started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [
            int(pid)
            for pid in children
            if ENGINE in _said_of(pid, "cmdline") or _said_of(pid, "comm").strip() == FORKED_ENGINE
        ]

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        """Wait for the end, and for the last line."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE, **options)


def _said_of(pid: str, name: str) -> str:
    """What the system says of a process, which may have just ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@contextmanager
def started(
    *flags: str, model: Path = TINY, environment: dict[str, str] | None = None, prefix: Sequence[str] = ()
) -> Iterator[Server]:
    """The process alone, which may not be ready, or never become so. prefix: what runs its command."""
    command = [*prefix, sys.executable, "-P", "-m", "octavo", "serve", str(model), "--port", "0", *flags]
    variables = os.environ | {"PYTHONPATH": str(Path(octavo.__file__).parent.parent)} | (environment or {})
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with ended(subprocess.Popen(command, text=True, env=variables, **pipes)) as server:
        yield server


@contextmanager
def ended(process: subprocess.Popen[str] | ForkedProcess) -> Iterator[Server]:
    """Its server, which is killed at last."""
    with process:
        server = Server(process)
        try:
            yield server
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            server._reader.join(PATIENCE)


@contextmanager
def serving(*flags: str, environment: dict[str, str] | None = None, model: Path = TINY) -> Iterator[Server]:
    """A server that is ready, forked off a process that has imported what it needs: see forked_commands.py.

    One with variables that may be read while modules are imported is started anew.
    """
    begin = forked if LATE.issuperset(environment or ()) else started
    with begin(*SMALL, *flags, environment=environment, model=model) as server:
        server.wait_until_ready()
        yield server


@contextmanager
def forked(*flags: str, environment: dict[str, str] | None = None, model: Path = TINY) -> Iterator[Server]:
    """As `started`, by a fork."""
    with ended(forked_commands().start(["serve", str(model), "--port", "0", *flags], environment)) as server:
        yield server


@contextmanager
def serving_anew(*flags: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that is ready, started as its users start it: for tests of how processes start and end."""
    with started(*SMALL, *flags, environment=environment) as server:
        server.wait_until_ready()
        yield server


def said_at_once(*arguments: str) -> str:
    """The one line that a command which can't start says."""
    done = forked_commands().run("serve", *arguments, seconds=PATIENCE)
    assert done.code == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("octavo serve: ")
    return line


def events(lines: Sequence[str] | Iterator[str]) -> Iterator[Any]:
    """The JSON of a stream's events; the stream must end with [DONE]."""
    is_done = False
    for line in lines:
        if line:
            assert not is_done, f"{line!r} after [DONE]"
            assert line.startswith("data: "), line
            is_done = line == "data: [DONE]"
            if not is_done:
                yield json.loads(line[6:])
    assert is_done, "the stream broke off"


def stream(client: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    """All events of one streamed answer."""
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        return list(events(response.iter_lines()))


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(client: httpx.Client) -> Samples:
    """All samples of /metrics: by name and labels, those aside that are the same in all."""
    found: Samples = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key not in {"model_name", "engine"}}
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def by_engine(client: httpx.Client, name: str) -> dict[str, float]:
    """A metric of each engine, of which /metrics has one sample."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return {sample.labels["engine"]: sample.value for sample in found}


def value(client: httpx.Client, name: str, **labels: str) -> float:
    """One sample of /metrics."""
    return samples(client)[name, tuple(sorted(labels.items()))]


def num_in_flight(client: httpx.Client) -> int:
    """Sequences that the engine has, running and waiting."""
    found = samples(client)
    return int(found["vllm:num_requests_running", ()] + found["vllm:num_requests_waiting", ()])


def tokens_of(client: httpx.Client, prompt: list[int] | str, count: int) -> list[int]:
    """So many greedy tokens."""
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    assert len(found) == count
    return found


def wait_until(is_so: Callable[[], bool]) -> None:
    """Ask again and again; what is asked is a server, whose every answer comes after a turn of its loop."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline, "it never comes so"
