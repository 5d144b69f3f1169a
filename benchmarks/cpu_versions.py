"""Two versions of octavo beside each other on this machine: the same models, client and load, over HTTP.

    git worktree add ../old 873c544
    PYTHONPATH=src python -m benchmarks.cpu_versions --old ../old --rounds 5 MODEL [MODEL ...]

Both run in this environment, each from its own source tree; a tree is named by the directory of a checkout. Each round
starts a server of each version, times it, and then measures both while both are up, one idle while the other works,
one right after the other, the first one alternating: a slow minute of the machine falls on both. Servers are new in
each round, since where a process finds its memory makes it up to a tenth faster or slower for as long as it lives. The
table has medians, and the ratio of the medians, new / old: above 1 is faster. `--quantize` compares the quantizer
instead: seconds and peak memory of a GPTQ run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cpu_servers import IGNORE_EOS, NAME, octavo_server, running

STREAMS = (1, 8, 32)
LOADS = {f"decode {count}": ("decode", "--streams", str(count)) for count in STREAMS} | {"prefill": ("prefill",)}
ROOT = Path(__file__).parent.parent
Values = dict[str, list[float]]  # column -> one value a round


def main() -> None:
    args = parse_arguments()
    trees = {"old": args.old.resolve(), "new": args.new.resolve()}
    compare = compare_quantizers if args.quantize else compare_servers
    values: dict[tuple[str, str], Values] = {}
    for model in args.models:
        found = compare(model, trees, args.rounds)
        values |= {(model.name, version): columns for version, columns in found.items()}
        print(table([model.name for model in args.models], values), flush=True)
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.rounds} rounds")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="checkpoints, plain or quantized")
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the version to compare with")
    parser.add_argument("--new", type=Path, default=ROOT, help="a checkout of the new version (default: this one)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default 5)")
    parser.add_argument("--quantize", action="store_true", help="compare GPTQ runs of `octavo quantize`")
    return parser.parse_args()


def compare_servers(model: Path, trees: dict[str, Path], rounds: int) -> dict[str, Values]:
    """Each round's seconds to start, and measurements with both versions, one right after the other."""
    values: dict[str, Values] = {version: {} for version in trees}
    servers = {
        version: replace(octavo_server(model.name, model), environment={"PYTHONPATH": str(tree / "src")})
        for version, tree in trees.items()
    }
    for number in range(rounds):
        print(f"{model.name}, round {number + 1}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            urls = {}
            for version in alternating(trees, number):
                run = stack.enter_context(running(servers[version], Path(folder) / version))
                values[version].setdefault("start, s", []).append(run.health_seconds)
                urls[version] = run.url
            for url in urls.values():  # what is allocated or compiled on first use
                measured(url, "decode", "--tokens", "16")
                measured(url, "prefill", "--prompts", "1")
            for column, load in LOADS.items():
                for version in alternating(trees, number):
                    speed = measured(urls[version], *load, "--seed", str(number))
                    values[version].setdefault(column, []).append(speed)
    return values


def alternating(trees: dict[str, Path], number: int) -> list[str]:
    """Which version is first and which second in a round."""
    return sorted(trees, reverse=number % 2 == 0)


def measured(url: str, *load: str) -> float:
    """Tokens per second of one load."""
    client = [sys.executable, str(Path(__file__).with_name("load_client.py")), url, NAME, *load, "--extra", IGNORE_EOS]
    answer: dict[str, Any] = json.loads(subprocess.run(client, check=True, capture_output=True).stdout)
    return float(answer["tokens_per_s"])


def compare_quantizers(model: Path, trees: dict[str, Path], rounds: int) -> dict[str, Values]:
    """GPTQ runs of both versions, in turn."""
    values: dict[str, Values] = {version: {} for version in trees}
    for number in range(rounds):
        for version in alternating(trees, number):
            print(f"{model.name}, round {number + 1}, {version}", file=sys.stderr, flush=True)
            for column, value in quantized(model, trees[version], seed=number).items():
                values[version].setdefault(column, []).append(value)
    return values


def quantized(model: Path, tree: Path, seed: int) -> dict[str, float]:
    """One GPTQ run on text that the model writes itself: seconds, and the largest memory of any of its processes."""
    text = ["--num-calibration-samples", "16", "--max-seq-length", "256", "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "octavo", "quantize", str(model), "-o", f"{folder}/out", *text]
        command += ["--scheme", "W4A16", "--group-size", "64", "--algorithm", "gptq", "--no-eval"]
        begun = time.perf_counter()
        process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(tree / "src")}, stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        if status:
            raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return {"quantize, s": seconds, "peak, MB": usage.ru_maxrss / 1024}  # Linux counts KiB


def table(models: list[str], values: dict[tuple[str, str], Values]) -> str:
    """Medians and their ratio: above 1 the new version is better, of seconds and memory too."""
    columns = list(next(iter(values.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for model in models:
        old, new = values.get((model, "old")), values.get((model, "new"))
        if old is None or new is None:
            continue
        for version, found in (("old", old), ("new", new)):
            cells = [f"{statistics.median(found[column]):.2f}" for column in columns]
            lines.append(f"| {model}, {version} | {' | '.join(cells)} |")
        cells = [f"**{_ratio(column, old[column], new[column]):.3f}**" for column in columns]
        lines.append(f"| ratio | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(column: str, old: list[float], new: list[float]) -> float:
    ratio = statistics.median(new) / statistics.median(old)
    return 1 / ratio if column.endswith((", s", ", MB")) else ratio


if __name__ == "__main__":
    main()
