"""What a streamed token costs the server process: CPU time of that process alone, over an engine without a model.

    PYTHONPATH=src python -m benchmarks.server_streams [TREE ...]
    PYTHONPATH=src python -m benchmarks.server_streams --engines 8 --streams 64 256

TREE: checkouts of octavo, named by their directories, to be compared (default: this one). Their servers are up at once,
and are measured in turns. The client is another process, which parses nothing while the clock runs. The engine's steps
take as long as a real one's, so that no tokens pile up and are sent together. tokens/s of a core are tokens over the
CPU time of the server process: what it could stream if it had a core to itself. With few streams it sleeps between two
steps and finds its caches cold. With --engines the streams are spread over as many engines, each of which sends a
message a step. Not part of octavo.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.cpu_servers import NAME, Server, running
from benchmarks.cpu_versions import measured

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests/fixtures/tiny"
STREAMS = (1, 8, 32, 256)
STEP_SECONDS = {256: 0.04}  # of the engine, by the number of streams, where it is not 10 ms
TOKENS = {1: 400, 8: 300, 32: 300, 256: 100}


def server(tree: Path, engines: int, step_seconds: float) -> Server:
    """`serve` below, in a process with this tree on its path, over engines whose steps take so long."""
    paths = os.pathsep.join(str(path) for path in (tree / "src", tree / "tests/support", ROOT))
    environment = {"PYTHONPATH": paths, "FAKE_ENGINE_STEP_SECONDS": str(step_seconds)}
    command = (sys.executable, "-P", "-m", "benchmarks.server_streams", "--serve", str(tree), "--port", "{port}")
    command += ("--engines", str(engines))
    return Server(tree.name, command, environment=environment)


def cpu_seconds(pid: int) -> float:
    """That a process has used so far, its threads' together."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def serve(tree: Path, engines: int, port: str) -> int:
    """Be the server. Its engines compute nothing, so they need no cores of their own."""
    from octavo import cli
    from octavo.runtime import launch
    from octavo.runtime.parallel.config import Devices

    program = (str(tree / "tests/support/fake_engine.py"),)
    launch.Launcher = partial(launch.Launcher, program=program, devices=Devices(tuple(range(engines)), engines))
    flags = ["--port", port, "--max-model-len", "4096", "--disable-log-stats", "-dp", str(engines)]
    return cli.main(["serve", str(MODEL), "--served-model-name", NAME, *flags])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs="*", default=[ROOT], metavar="TREE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        return serve(args.serve, args.engines, args.port)
    trees = [tree.resolve() for tree in args.trees]
    columns = "tokens/s | us of CPU a token | tokens/s of a core"
    print("| streams | " + " | ".join(f"{tree.name}: {columns}" for tree in trees) + " |")
    print("|---" * (1 + 3 * len(trees)) + "|")
    for count in args.streams:
        print(f"| {count} | " + " | ".join(compare(trees, args.engines, count, args.rounds)) + " |", flush=True)
    return 0


def compare(trees: list[Path], engines: int, count: int, rounds: int) -> list[str]:
    """The cells of one row: medians over rounds, in which the trees take turns."""
    speeds: dict[Path, list[float]] = {tree: [] for tree in trees}
    costs: dict[Path, list[float]] = {tree: [] for tree in trees}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {
            tree: stack.enter_context(
                running(server(tree, engines, STEP_SECONDS.get(count, 0.01)), Path(folder, str(number)))
            )
            for number, tree in enumerate(trees)
        }
        for number in range(-1, rounds):  # the first one is for what is made on first use
            for tree in trees if number % 2 else trees[::-1]:
                before = cpu_seconds(servers[tree].pid)
                load = ("decode", "--streams", str(count), "--tokens", str(TOKENS.get(count, 200)))
                speed = measured(servers[tree].url, *load, "--seed", str(number + 1))
                spent = cpu_seconds(servers[tree].pid) - before
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
