"""Two versions of octavo beside each other on this machine: the same models, client and load, over HTTP.

    git worktree add ../old 873c544
    PYTHONPATH=src python -m benchmarks.cpu_versions --old ../old --rounds 5 MODEL [MODEL ...]

Both run in this environment, each from its own source tree; a tree is named by the directory of a checkout. A round
visits every model with both versions, the first one alternating, so that a slow minute of the machine falls on both.
The table has the median of each version and the median of the ratios round by round, new / old: above 1 is faster.
`--quantize` compares the quantizer instead: seconds and peak memory of a GPTQ run.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cpu_servers import NAME, octavo_server, running

STREAMS = (1, 8, 32)
COLUMNS = ("start, s", *(f"decode {count}" for count in STREAMS), "prefill")
ROOT = Path(__file__).parent.parent
Values = dict[str, list[float]]  # column -> one value a round


def main() -> None:
    args = parse_arguments()
    trees = {"old": args.old.resolve(), "new": args.new.resolve()}
    visit = quantized if args.quantize else served
    values: dict[tuple[str, str], Values] = {}
    for number in range(args.rounds):
        for model in args.models:
            for version in sorted(trees, reverse=number % 2 == 0):
                print(f"round {number + 1}, {model.name}, {version}", file=sys.stderr, flush=True)
                for column, value in visit(model, trees[version], seed=number).items():
                    values.setdefault((model.name, version), {}).setdefault(column, []).append(value)
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


def served(model: Path, tree: Path, seed: int) -> dict[str, float]:
    """One server of one version, from its start to its end."""
    server = replace(octavo_server(model.name, model), environment={"PYTHONPATH": str(tree / "src")})
    client = [sys.executable, str(Path(__file__).with_name("load_client.py"))]
    with tempfile.TemporaryDirectory() as folder, running(server, Path(folder) / "log") as run:

        def measure(load: str, *flags: str) -> float:
            command = [*client, run.url, NAME, load, *flags, "--extra", server.extra, "--seed", str(seed)]
            answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            return float(answer["tokens_per_s"])

        measure("decode", "--tokens", "16")  # what is allocated or compiled on first use
        measure("prefill", "--prompts", "1")
        decodes = {f"decode {count}": measure("decode", "--streams", str(count)) for count in STREAMS}
        return {"start, s": run.health_seconds, **decodes, "prefill": measure("prefill")}


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
    """Medians, and the median of the ratios: above 1 the new version is better, of seconds and memory too."""
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
    less_is_better = column.endswith((", s", ", MB"))
    ratios = [a / b if less_is_better else b / a for a, b in zip(old, new, strict=True)]
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
