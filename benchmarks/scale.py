"""How tokens per second grow with engines (-dp) or with ranks of one engine (-tp, -pp): efficiency, one command each.

    PYTHONPATH=src python -m benchmarks.scale MODEL --data-parallel-size 1 2 --num-threads 1
    PYTHONPATH=src python -m benchmarks.scale MODEL --tensor-parallel-size 1 2 4
    PYTHONPATH=src python -m benchmarks.scale MODEL --data-parallel-size 1 2 --cores 2 --streams 32

Efficiency is tokens/s(n) / (n x tokens/s(1)): 1 is ideal. On a CPU each engine or rank has `--num-threads` cores, on
GPUs one card. With -dp the streams grow with the engines, so that each has the same batch; with -tp and -pp they stay
the same. With `--cores` all sizes share as many cores and have the same streams, and what is printed is tokens/s(n)
over tokens/s(1), the median of all rounds with its 95 % interval.

All sizes are up at once and measured in turns, each while the others idle, so that a slow minute falls on all of them;
with GPUs for one of them only, `--one-at-a-time`. Each figure is a median over rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.cpu_servers import Server, octavo_server, running
from benchmarks.cpu_versions import measured
from benchmarks.intervals import interval


def main() -> None:
    args = parse_arguments()
    flag, sizes = sizes_of(args)
    columns = {f"decode, {count} streams": count for count in args.streams}
    values: dict[int, dict[str, list[float]]] = {size: {name: [] for name in columns} for size in sizes}
    for number in range(args.rounds):
        print(f"round {number + 1}", file=sys.stderr, flush=True)
        groups = [[size] for size in sizes] if args.one_at_a_time else [sizes]
        for group in groups:
            measure(args, flag, group, columns, values)
    print(table_of_shares(flag, values) if args.cores else table(flag, values))
    cores = f", {args.num_threads} threads each" if args.num_threads else ""
    print(f"\n{args.model.name}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores{cores}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("-dp", "--data-parallel-size", type=int, nargs="+", help="numbers of engines; 1 must be there")
    kind.add_argument("-tp", "--tensor-parallel-size", type=int, nargs="+", help="numbers of ranks; 1 must be there")
    kind.add_argument("-pp", "--pipeline-parallel-size", type=int, nargs="+", help="numbers of stages; 1 must be there")
    parser.add_argument("--num-threads", type=int, help="CPU threads of an engine or rank")
    parser.add_argument("--cores", type=int, help="of all engines or ranks together, whatever their number")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16], help="streams (-dp: for each engine)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one-at-a-time", action="store_true", help="never have two servers up at once")
    parser.add_argument("--flags", default="", help="further flags of octavo serve, in one string")
    args = parser.parse_args()
    if 1 not in sizes_of(args)[1]:
        parser.error("1 must be among the sizes: efficiency is relative to it")
    return args


def sizes_of(args: argparse.Namespace) -> tuple[str, list[int]]:
    if args.data_parallel_size:
        return "--data-parallel-size", args.data_parallel_size
    if args.tensor_parallel_size:
        return "--tensor-parallel-size", args.tensor_parallel_size
    return "--pipeline-parallel-size", args.pipeline_parallel_size


def server(args: argparse.Namespace, flag: str, size: int) -> Server:
    number = args.cores // size if args.cores else args.num_threads
    threads = ("--num-threads", str(number)) if number else ()
    return octavo_server(str(size), args.model, flag, str(size), *threads, *args.flags.split())


def measure(
    args: argparse.Namespace,
    flag: str,
    sizes: list[int],
    columns: dict[str, int],
    values: dict[int, dict[str, list[float]]],
) -> None:
    """One round: start these sizes, warm them up, and put each load on each of them."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        urls = {
            size: stack.enter_context(running(server(args, flag, size), Path(folder) / str(size))).url for size in sizes
        }
        for size, url in urls.items():
            measured(url, "decode", "--tokens", "16", "--streams", str(size))
        for name, count in columns.items():
            for size, url in urls.items():
                streams = count * size if args.data_parallel_size and not args.cores else count
                values[size][name].append(measured(url, "decode", "--streams", str(streams)))


def table(flag: str, values: dict[int, dict[str, list[float]]]) -> str:
    """Tokens per second, and efficiency behind them."""

    def efficiency(mine: list[float], alone: list[float], size: int) -> str:
        return f"{statistics.median(mine) / size / statistics.median(alone):.2f}"

    return _table(flag, values, "efficiency", efficiency)


def table_of_shares(flag: str, values: dict[int, dict[str, list[float]]]) -> str:
    """Tokens per second, and behind them what share of size 1's they are."""

    def share(mine: list[float], alone: list[float], size: int) -> str:
        shares = [one / other for one, other in zip(mine, alone, strict=True)]
        low, high = interval(shares, statistics.median)
        return f"{statistics.median(shares):.3f} ({low:.3f} to {high:.3f})" if size > 1 else "1"

    return _table(flag, values, "of size 1's", share)


def _table(
    flag: str,
    values: dict[int, dict[str, list[float]]],
    compared: str,
    compare: Callable[[list[float], list[float], int], str],
) -> str:
    """A row for each size; compare: a size's tokens per second in all rounds, those of size 1, and the size."""
    columns = list(next(iter(values.values())))
    lines = [f"| `{flag}` | " + " | ".join(f"{name}: tokens/s | {compared}" for name in columns) + " |"]
    lines.append("|---" * (2 * len(columns) + 1) + "|")
    for size in sorted(values):
        cells = []
        for name in columns:
            mine = values[size][name]
            cells += [f"{statistics.median(mine):.1f}", compare(mine, values[1][name], size)]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
