"""What a streamed token costs the server process: CPU time of that process alone, over an engine without a model.

    PYTHONPATH=src python -m benchmarks.server_streams [TREE ...]

TREE: checkouts of octavo, named by their directories, to be compared (default: this one). Their servers are up at once,
and are measured in turns. The client is another process, which parses nothing while the clock runs. The engine's steps
take as long as a real one's, so that no tokens pile up and are sent together. tokens/s of a core are tokens over the
CPU time of the server process: what it could stream if it had a core to itself. With few streams it sleeps between two
steps and finds its caches cold. Not part of octavo.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests/fixtures/tiny"
STREAMS = (1, 8, 32, 256)
STEP_SECONDS = {256: 0.04}  # of the engine, by the number of streams, where it is not 10 ms
TOKENS = {1: 400, 8: 300, 32: 300, 256: 100}
START_SECONDS = 120.0


@dataclass(frozen=True)
class Running:
    url: str
    pid: int

    def cpu_seconds(self) -> float:
        """That the process has used so far, its threads' together."""
        threads = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


@contextmanager
def running(tree: Path, step_seconds: float) -> Iterator[Running]:
    """A server of this tree over one engine whose steps take so long."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join(str(tree / name) for name in ("src", "tests/support"))
    environment = os.environ | {"PYTHONPATH": paths, "FAKE_ENGINE_STEP_SECONDS": str(step_seconds)}
    command = [sys.executable, __file__, "--serve", str(tree), "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while not answers(url):
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit(f"the server of {tree} does not start")
            time.sleep(0.1)
        yield Running(url, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=30) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def serve(tree: Path, port: str) -> int:
    """Be the server, in a process with this tree on its path."""
    from functools import partial

    from octavo import cli
    from octavo.runtime import launch

    launch.Launcher = partial(launch.Launcher, program=(str(tree / "tests/support/fake_engine.py"),))
    flags = ["--port", port, "--max-model-len", "4096", "--disable-log-stats"]
    return cli.main(["serve", str(MODEL), "--served-model-name", "smollm2", *flags])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs="*", default=[ROOT], metavar="TREE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        return serve(args.serve, args.port)
    trees = [tree.resolve() for tree in args.trees]
    columns = "tokens/s | us of CPU a token | tokens/s of a core"
    print("| streams | " + " | ".join(f"{tree.name}: {columns}" for tree in trees) + " |")
    print("|---" * (1 + 3 * len(trees)) + "|")
    for count in args.streams:
        print(f"| {count} | " + " | ".join(compare(trees, count, args.rounds)) + " |", flush=True)
    return 0


def compare(trees: list[Path], count: int, rounds: int) -> list[str]:
    """The cells of one row: medians over rounds, in which the trees take turns."""
    from benchmarks.cpu_versions import measured  # a server, which this file is too, finds no benchmarks

    speeds: dict[Path, list[float]] = {tree: [] for tree in trees}
    costs: dict[Path, list[float]] = {tree: [] for tree in trees}
    with ExitStack() as stack:
        servers = {tree: stack.enter_context(running(tree, STEP_SECONDS.get(count, 0.01))) for tree in trees}
        for number in range(-1, rounds):  # the first one is for what is made on first use
            for tree in trees if number % 2 else trees[::-1]:
                before = servers[tree].cpu_seconds()
                load = ("decode", "--streams", str(count), "--tokens", str(TOKENS.get(count, 200)))
                speed = measured(servers[tree].url, *load, "--seed", str(number + 1))
                spent = servers[tree].cpu_seconds() - before
                if number >= 0:
                    speeds[tree].append(speed)
                    costs[tree].append(1e6 * spent / (count * TOKENS.get(count, 200)))
    cells = []
    for tree in trees:
        cost = statistics.median(costs[tree])
        cells.append(f"{statistics.median(speeds[tree]):,.0f} | {cost:.1f} | {1e6 / cost:,.0f}")
    return cells


if __name__ == "__main__":
    sys.exit(main())
