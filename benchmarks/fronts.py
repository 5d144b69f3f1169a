"""Who serves the streams of benchmarks/takeover.py, what of it is killed, and when all of it is up again.

Each has two engines of one model, on a core each. What is killed is what dies at once: of a cell an engine, whose
requests the server gives to the other one; behind sglang-router a server with its engine, which is started again by us,
as Kubernetes would; under Ray Serve a replica, which is a server with its engine, and which Ray starts again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx

PATIENCE = 600.0  # seconds; only so that a hang is a failure
POLL_SECONDS = 0.1
STOP_SECONDS = 60.0  # for a Ray cluster to end by itself
ENGINE = "octavo.runtime.process"
REPLICA_CHILD = "octavo.server.ray_cell_process"
OWN_FLAGS = ("--served-model-name", "m", "--num-threads", "1")


class Front(Protocol):
    """name: as in FRONTS. url: what clients ask."""

    name: str
    url: str

    def kill(self, number: int) -> None:
        """End one of the two with SIGKILL."""
        ...

    async def all_up(self) -> None:
        """Wait until both answer."""
        ...


Program = list[str]
Process = subprocess.Popen[str]


def octavo(model: Path, flags: Sequence[str], port: int = 0) -> Program:
    return [sys.executable, "-P", "-m", "octavo", "serve", str(model), "--port", str(port), *OWN_FLAGS, *flags]


@contextmanager
def running(program: Program, sign: str, variables: dict[str, str] | None = None) -> Iterator[tuple[Process, str]]:
    """The process, and what matches `sign` in what it says, which is waited for."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(program, text=True, env=os.environ | (variables or {}), **pipes) as process:
        assert process.stdout is not None
        said: list[str] = []
        try:
            for line in process.stdout:
                said.append(line)
                if found := re.search(sign, line):
                    threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would hold it up
                    yield process, found[1]
                    return
            raise SystemExit(f"{' '.join(program)} ended:\n{''.join(said[-20:])}")
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    """Of a process, whichever of its threads has started them."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def runs(pid: int, program: str) -> bool:
    """Whether a process runs this program."""
    with contextlib.suppress(OSError):
        return program in Path(f"/proc/{pid}/cmdline").read_text()
    return False


async def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not await asyncio.to_thread(is_so):
        if time.monotonic() > deadline:
            raise SystemExit(f"it is not up again after {PATIENCE:g} s")
        await asyncio.sleep(POLL_SECONDS)


class Cell:
    """`octavo serve -dp 2`: an engine dies."""

    name = "cell"

    def __init__(self, process: Process, url: str) -> None:
        self.url = url
        self._process = process
        self._killed = 0

    def kill(self, number: int) -> None:
        engines = sorted(pid for pid in children(self._process.pid) if runs(pid, ENGINE))
        self._killed = engines[number % len(engines)]
        os.kill(self._killed, signal.SIGKILL)

    async def all_up(self) -> None:
        def are_up() -> bool:
            if self._killed in children(self._process.pid):  # the cell hasn't noticed yet, and takes it for up
                return False
            lines = httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text.splitlines()
            return all(line.endswith(" 1.0") for line in lines if line.startswith("octavo:engine_up{"))

        await until(are_up)


@contextmanager
def cell(model: Path, flags: Sequence[str], options: dict[str, Any]) -> Iterator[Front]:
    del options
    own = ("-dp", "2", "--max-engine-restarts", "1000000", "--engine-restart-delay", "0")
    with running(octavo(model, [*own, *flags]), r"serving on (\S+)") as (process, url):
        yield Cell(process, url)


class Router:
    """sglang-router before two servers: a server dies, and is started again at once where it was."""

    name = "sglang-router"

    def __init__(self, stack: ExitStack, program: Callable[[int], Program], ports: Sequence[int]) -> None:
        self.url = ""
        self._stack = stack
        self._program = program
        self._ports = ports
        self._servers = [self._start(port) for port in ports]
        self._is_dead = [False, False]

    def _start(self, port: int) -> Process:
        process, _ = self._stack.enter_context(running(self._program(port), r"serving on (\S+)"))
        return process

    def kill(self, number: int) -> None:
        self._servers[number].kill()
        self._is_dead[number] = True

    async def all_up(self) -> None:
        for number, is_dead in enumerate(self._is_dead):
            if is_dead:
                self._servers[number].wait()
                self._servers[number] = await asyncio.to_thread(self._start, self._ports[number])
                self._is_dead[number] = False
        await until(lambda: num_healthy(self.url) == 2)


def num_healthy(url: str) -> int:
    """Servers that a gateway sends requests to."""
    with contextlib.suppress(httpx.TransportError):
        return int(httpx.get(f"{url}/readiness", timeout=PATIENCE).json().get("healthy_workers", 0))
    return 0


@contextmanager
def router(model: Path, flags: Sequence[str], options: dict[str, Any]) -> Iterator[Front]:
    ports = [free_port() for _ in range(4)]
    with ExitStack() as stack:
        front = Router(stack, lambda port: octavo(model, flags, port), ports[:2])
        urls = [f"http://127.0.0.1:{port}" for port in ports[:2]]
        program = [str(options["gateways"] / "bin" / "python"), "-m", "sglang_router.launch_router"]
        program += ["--host", "127.0.0.1", "--port", str(ports[2]), "--policy", "cache_aware"]
        program += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(ports[3])]
        program += ["--health-check-interval-secs", "1", "--worker-urls", *urls]
        process = stack.enter_context(
            subprocess.Popen(program, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        stack.callback(process.kill)
        front.url = f"http://127.0.0.1:{ports[2]}"
        asyncio.run(front.all_up())
        yield front


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Replicas:
    """Ray Serve's own routing over two replicas: one dies, its actor and the server that it has started.

    directory: of all temporary files of this cluster, by which its processes are known.
    """

    name = "ray"

    def __init__(self, directory: Path, url: str) -> None:
        self.url = url
        self._directory = directory
        self._dead: set[int] = set()

    def _servers(self) -> list[int]:
        """Those that run and weren't killed."""
        numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        servers = [pid for pid in numbers if runs(pid, REPLICA_CHILD) and runs(pid, f"{self._directory}/")]
        return sorted(set(servers) - self._dead)

    def kill(self, number: int) -> None:
        server = self._servers()[number]
        self._dead.add(server)
        for pid in (parent_of(server), server):
            os.kill(pid, signal.SIGKILL)

    async def all_up(self) -> None:
        await until(lambda: len(self._servers()) == 2 and num_replicas(self._directory) == 2)


def num_replicas(directory: Path) -> int:
    """Replicas to which Ray sends requests, as benchmarks/ray_replicas.py tells."""
    with contextlib.suppress(OSError, ValueError):
        return int((directory / "replicas").read_text())
    return 0


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextmanager
def ray(model: Path, flags: Sequence[str], options: dict[str, Any]) -> Iterator[Front]:
    with tempfile.TemporaryDirectory() as name:
        program = [str(options["ray_python"]), "-m", "benchmarks.ray_replicas", name, str(model), *OWN_FLAGS, *flags]
        with running(program, r"Ray serves on (\S+)", {"TMPDIR": name}) as (process, url):
            front = Replicas(Path(name), url)
            try:
                asyncio.run(front.all_up())
                yield front
            finally:
                assert process.stdin is not None
                process.stdin.close()  # it takes the cluster down
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)


FRONTS: dict[str, Callable[[Path, Sequence[str], dict[str, Any]], AbstractContextManager[Front]]] = {
    "cell": cell,
    "sglang-router": router,
    "ray": ray,
}
