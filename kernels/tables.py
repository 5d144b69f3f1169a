"""Block sizes measured per card, read at launch: which row of `tuning/CARD.json` serves a GEMM's or a step's size.

A table is a list of rows for each kernel, {"m": M at the most, "n": N at the least, "k": K at the least, ...sizes}; the
first row that fits is taken, and bounds that a row leaves out hold always. Never autotuned while serving;
`benchmarks/tune.py` writes the files.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

TUNING = Path(__file__).parent / "tuning"
BOUNDS = ("m", "n", "k")


def choose(kernel: str, m: int, n: int, k: int, card: str = "h100") -> dict[str, int]:
    """The block sizes for a size, the caller's own; card is a file's stem, and one that has no file takes h100's."""
    return dict(row_of(kernel, m, n, k, card))


@cache
def row_of(kernel: str, m: int, n: int, k: int, card: str) -> dict[str, int]:
    for row in _tables(card)[kernel]:
        if m <= row.get("m", m) and n >= row.get("n", 0) and k >= row.get("k", 0):
            return {name: value for name, value in row.items() if name not in BOUNDS}
    raise LookupError(f"tuning/{card}.json: no row of {kernel} fits M={m}, N={n}, K={k}; the last must have no bounds")


@cache
def _tables(card: str) -> dict[str, list[dict[str, int]]]:
    path = TUNING / f"{card}.json"
    tables: dict[str, list[dict[str, int]]] = json.loads((path if path.exists() else TUNING / "h100.json").read_text())
    return tables
