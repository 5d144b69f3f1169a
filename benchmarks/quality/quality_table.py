"""The table of `peers.py` in Markdown, with intervals: `python quality_table.py NAME.json` shows one that was kept.

Intervals are of 95 %, by the paired bootstrap: windows are drawn anew within each kind of text, the same ones for both
tools.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

BEST = "octavo best"
DRAWS = 2000
HEAD = ("cell", "tool", "MB", "KL", "best's KL / its KL", "wall s", "CPU s", "peak MB")


def markdown(rows: list[dict[str, Any]], kinds: list[str]) -> str:
    """Cell after cell, the least KL first, then what each cell says about `best`."""
    head = [*HEAD[:4], *kinds, *HEAD[4:]]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    verdicts = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        here = [row for row in rows if row["cell"] == cell]
        judged = sorted((row for row in here if "KL" in row), key=_mean)
        best = next((row for row in judged if row["tool"] == BEST), None)
        for row in judged:
            ratio = "" if best in (None, row) else "{:.3f} ({:.3f} to {:.3f})".format(*_ratio(best, row))
            means = [f"{np.mean(row['KL'][kind]):.5f}" for kind in kinds]
            costs = [str(row[name]) for name in HEAD[5:]]
            words = [cell, row["tool"], str(row["MB"]), f"{_mean(row):.5f}", *means, ratio, *costs]
            lines.append("| " + " | ".join(words) + " |")
        refusals = [row for row in here if row["refusal"]]
        lines += [f"| {cell} | {row['tool']} | refused: {row['refusal'][:160]} |" for row in refusals]
        if best is not None:
            verdicts.append(f"* {cell}: {_verdict(best, judged)}")
    return "\n".join([*lines, "", *verdicts]) + "\n"


def _verdict(best: dict[str, Any], judged: list[dict[str, Any]]) -> str:
    """`judged` by their KL."""
    least = next((row for row in judged if not row["tool"].startswith("octavo")), None)
    if least is None:
        return "octavo alone"
    ratio, low, high = _ratio(best, least)
    found = f"{abs(1 - ratio):.1%} {'below' if ratio < 1 else 'above'} {least['tool']}, the least of the others"
    return found + (" (within the interval)" if low <= 1 <= high else "")


def _mean(row: dict[str, Any]) -> float:
    return float(np.mean([value for values in row["KL"].values() for value in values]))


def _ratio(best: dict[str, Any], other: dict[str, Any]) -> tuple[float, float, float]:
    """The means' ratio, and its interval."""
    rng = np.random.default_rng(0)
    sums = np.zeros((2, DRAWS))
    for kind, values in best["KL"].items():
        drawn = rng.integers(0, len(values), (DRAWS, len(values)))
        for total, row in zip(sums, (best, other), strict=True):
            total += np.asarray(row["KL"][kind])[drawn].sum(1)
    low, high = np.quantile(sums[0] / sums[1], (0.025, 0.975))
    return _mean(best) / _mean(other), float(low), float(high)


if __name__ == "__main__":
    kept = json.loads(Path(sys.argv[1]).read_text())
    print(markdown(kept["rows"], list(kept["rows"][0]["KL"])))
