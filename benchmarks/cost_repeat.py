"""Whether a second cost report finds what the first one says it will.

    python -m benchmarks.cost_repeat REPORT REPORT

Of every figure that two runs of the same `octavo cost` command have, in each direction: does the interval of one
contain the other's value? Intervals are meant to do so 19 times of 20; the figures of one server are made of the same
loads, so they miss together.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Figures = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs=2, type=Path, metavar="REPORT", help="the directory that -o named")
    first, second = (figures(path / "report.json") for path in parser.parse_args().reports)
    print("| model | figures | inside | outside |\n|---|---:|---:|---|")
    whole = [0, 0]
    for label in first.keys() & second.keys():
        inside, outside = compared(first[label], second[label])
        whole = [whole[0] + inside, whole[1] + inside + len(outside)]
        print(f"| {label} | {inside + len(outside)} | {inside} | {', '.join(outside)} |")
    print(f"\n{whole[0]} of {whole[1]} inside: {whole[0] / max(1, whole[1]):.0%}")


def figures(path: Path) -> dict[str, Figures]:
    """Of each model that was measured, its figures by their names."""
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {server["label"]: server["figures"]["values"] for server in report["servers"] if server.get("figures")}


def compared(first: Figures, second: Figures) -> tuple[int, list[str]]:
    """How many intervals contain the other report's value, and the names of those that don't."""
    inside = 0
    outside = []
    for name in sorted(first.keys() & second.keys()):
        for one, other in ((first[name], second[name]), (second[name], first[name])):
            if one["low"] <= other["value"] * (1 + 1e-9) and other["value"] <= one["high"] * (1 + 1e-9):
                inside += 1
            else:
                outside.append(name)
    return inside, outside


if __name__ == "__main__":
    main()
