"""Block sizes per card, read at launch: which row of `tuning/CARD.json` serves a launch of some size.

A table is a list of rows for each kernel, {"m": M at the most, "n": N at the least, "k": K at the least, ...sizes}; the
first row that fits is taken, and bounds that a row leaves out hold always. Of a GEMM they are its sizes; else m counts
tokens (or what stands for them), n columns (or heads), and k is what the launcher says with its call. Never autotuned
while serving; `benchmarks/tune.py` writes the files.

A launch's card is its tensors' (`card_of`). A card without a file takes that of its compute capability, which fits into
its shared memory: 163 KiB of a block on an A100, 99 on an L40S, 227 on an H100.
"""

from __future__ import annotations

import json
import re
from functools import cache, lru_cache
from pathlib import Path

import torch

TUNING = Path(__file__).parent.parent / "tuning"
BOUNDS = ("m", "n", "k")
OF_CAPABILITY = {80: "a100", 81: "l40s", 90: "h100", 110: "l40s"}
"""From which compute capability on cards take which table; 8.6 and 12.0 (3090, 5090) have the L40S's shared memory."""

WITHOUT_GPU = "h100"
"""The table of launches on no GPU: interpreted, or compiled ahead of time."""


def stem(name: str) -> str:
    """How a card's own file is called: h100 for 'NVIDIA H100 80GB HBM3', 4090 for 'NVIDIA GeForce RTX 4090'."""
    found = re.search(r"\b([A-Z]{0,3}\d{1,4}[A-Z]?)\b", name)
    return (found[1] if found else re.sub(r"\W+", "-", name)).lower()


def table_of(name: str, capability: int) -> str:
    """The stem of the file that a card takes. Raises ValueError for one that no kernel is made for."""
    if (TUNING / f"{stem(name)}.json").exists():
        return stem(name)
    try:
        return of_capability(capability)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; --device cpu works") from None


def of_capability(capability: int) -> str:
    """The stem of the file of a compute capability's cards: h100 for 90. Raises ValueError below an A100's."""
    known = [least for least in OF_CAPABILITY if least <= capability]
    if not known:
        said = f"{capability // 10}.{capability % 10}"
        raise ValueError(f"compute capability {said}, and octavo's kernels need 8.0 (an A100) at least")
    return OF_CAPABILITY[max(known)]


def note_of(name: str, capability: int) -> str | None:
    """What a user is to know about the block sizes on a card. Raises ValueError for one that no kernel is made for."""
    card = table_of(name, capability)
    if card == stem(name):
        return None
    return f"{name} has no table of block sizes of its own: kernels take those of tuning/{card}.json"


@cache
def card_of(device: torch.device) -> str:
    """The stem of the file that launches on a device take."""
    if device.type != "cuda":
        return WITHOUT_GPU
    found = torch.cuda.get_device_properties(device)
    return table_of(found.name, 10 * found.major + found.minor)


def choose(kernel: str, m: int, n: int, k: int, device: torch.device) -> dict[str, int]:
    """The block sizes for a size on a device, the caller's own."""
    return dict(row_of(kernel, m, n, k, card_of(device)))


@lru_cache(4096)  # a server meets every number of tokens sooner or later
def row_of(kernel: str, m: int, n: int, k: int, card: str) -> dict[str, int]:
    for row in rows_of(card)[kernel]:
        if m <= row.get("m", m) and n >= row.get("n", 0) and k >= row.get("k", 0):
            return {name: value for name, value in row.items() if name not in BOUNDS}
    raise LookupError(f"tuning/{card}.json: no row of {kernel} fits M={m}, N={n}, K={k}; the last must have no bounds")


@cache
def rows_of(card: str) -> dict[str, list[dict[str, int]]]:
    """A card's whole table, as it lies in its file."""
    tables: dict[str, list[dict[str, int]]] = json.loads((TUNING / f"{card}.json").read_text())
    return tables
