"""Searching a kernel's block sizes on this GPU, and writing them to `kernels/tuning/CARD.json`.

    PYTHONPATH=src python -m benchmarks.tune fp8 [--seconds 500] [--output FILE] [--dry-run]

Families are the names in kernels/tuning's tables: fp8, 'fp8 blocks', int8, w8a16, int4, 'int4 fp8', 'paged decode',
'paged prefill', 'moe bf16', 'moe fp8', 'moe fp8 blocks', 'moe int8', 'moe w8a16', 'moe int4', 'moe int4 fp8', and those
of what stands around them (norm, activation, rope, ...: `SMALL`), which `around` takes all together. Each size is a
case of the benchmarks' own; each candidate is put into the table as its only row, so that what is timed is what octavo
would launch. What doesn't compile or doesn't fit is left out, and a winner whose output is wrong is no winner. Only the
family's rows are replaced; a card without a file begins with what it takes now. Bounds of rows: M at the most, and
which of Llama-3.1-8B's layers a shape is like: wide (N from 16,384), deep (K from 8,192), or neither; of a mixture M is
the tokens of an expert, on average; what stands around them keeps the bounds that it has, and is measured at 64 tokens,
or at twice the highest bound. Of norms over heads M is KiB of q, not tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks import gpu_around, gpu_attention, gpu_gemms, gpu_moe, gpu_rows
from benchmarks.gpu_attention import Sizes
from benchmarks.gpu_case import FEW_BITS, Bodies, error_of
from benchmarks.gpu_clock import Clock, CudaClock, one_line, poisoned

from octavo.kernels.launching import tuning
from octavo.kernels.launching.launch import power_of_two
from octavo.runtime.worker.device import table_notes

Row = dict[str, int]
CLASSES: tuple[tuple[Row, str], ...] = (({"n": 16384}, "gate_up"), ({"k": 8192}, "down"), ({}, "qkv"))
FEW_TOKENS = (16, 32, 64, 128, 256, 512)  # M at the most; what is measured is that many
MANY_TOKENS = 4096
GEMMS = {
    "fp8": "fp8 rows",
    "fp8 blocks": "fp8 blocks",
    "int8": "int8 rows",
    "w8a16": "W8A16",
    "int4": "W4A16",
    "int4 fp8": "W4A8",
}
MIXTURES = ("moe bf16", "moe fp8", "moe fp8 blocks", "moe int8", "moe w8a16", "moe int4", "moe int4 fp8")
TOKENS = 64  # of what stands around the GEMMs
WARPS = (1, 2, 4, 8, 16, 32)


def card() -> str:
    """The table of the GPU that is tuned for; in a rehearsal without one, an H100's."""
    return tuning.card_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def grid(**values: tuple[int, ...]) -> list[Row]:
    """All combinations."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def gemm_rows(family: str, m: int) -> list[Row]:
    """Candidates for at most m tokens; m MANY_TOKENS: for more."""
    wide, of_codes = min(max(m, 16), 128), family in ("fp8", "int8", "fp8 blocks")
    if m >= MANY_TOKENS:
        if of_codes:
            return persistent_rows(family)
        rows = grid(split_k=(1,), block_m=(128,), block_n=(128,), group_m=(8,), num_warps=(4, 8), num_stages=(3, 4))
        return rows + ([{"dequantize": 1}] if family == "int4" else [])
    shape = {"split_k": (1, 2, 4, 8), "block_m": (min(wide, 64), wide) if wide > 64 else (wide,), "block_n": (64, 128)}
    rest = {"num_warps": (4, 8), "num_stages": (3, 4, 5, 6)}
    if of_codes:
        return grid(swap_ab=(1,), **shape, block_k=(128,), **rest) + (persistent_rows(family) if m > 128 else [])
    return grid(**shape, group_m=(1,) if family.startswith("int4") else (8,), **rest)


def persistent_rows(family: str) -> list[Row]:
    """Candidates of 8-bit codes' body for many tokens."""
    last = tuning.rows_of(card())[family][-1]  # what the card has: processors, and the memory accelerator
    tma = (1, 0) if last.get("tma", 1) else (0,)
    shape: dict[str, tuple[int, ...]] = {
        "swap_ab": (0,),
        "split_k": (1,),
        "block_m": (128,),
        "block_k": (128,),
        "group_m": (8,),
        "programs": (last.get("programs", 132),),
    }
    large = grid(**shape, block_n=(256,), subtiles=(2,), tma=tma[:1], promote=(0,), num_warps=(8,), num_stages=(3, 4))
    small = grid(**shape, block_n=(128,), subtiles=(1,), tma=tma, promote=(0,), num_warps=(4, 8), num_stages=(3, 4, 5))
    return small if family == "fp8 blocks" else large + small


def mixture_rows(family: str, m: int) -> list[Row]:
    """Candidates for experts of at most m tokens; m MANY_TOKENS: for more."""
    shape = {"block_m": (min(m, 128),) if m <= 32 else (64, 128), "block_n": (64, 128), "group_m": (1, 8)}
    if family not in ("moe w8a16", "moe int4", "moe int4 fp8"):
        shape["block_k"] = (64, 128) if family == "moe bf16" else (128,)
    return grid(**shape, num_warps=(4, 8), num_stages=(3, 4, 5))


def attention_rows(family: str) -> list[Row]:
    if family == "paged decode":
        programs = (tuning.rows_of(card())[family][-1]["programs"],)
        shape = {
            "block_n": (32, 64, 128),
            "min_split_tokens": (128, 256, 512),
            "max_splits": (16, 32),
            "programs": programs,
        }
        return grid(**shape, num_warps=(4, 8), num_stages=(2, 3, 4, 5))
    return grid(block_m=(64, 128), block_n=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4))


@dataclass(frozen=True)
class Small:
    """A kernel around the GEMMs: its candidates, and a case for m tokens and n columns (a row's, or what is usual)."""

    rows: list[Row]
    usual: int
    make: Callable[[int, int, torch.device], Bodies]
    tolerance: float = FEW_BITS


def norms_case(kib: int, heads: int, device: torch.device) -> Bodies:
    """Attention with norms over all heads, of as many tokens as have so many KiB of q."""
    sizes = Sizes(max(kib * 1024 // (heads * 128 * 2), 1), 1, 1023, heads, heads, 128)
    return gpu_attention.rope_and_decode_case(sizes, "fp8", device, norms=True)


BLOCKS = grid(block=(256, 512, 1024, 2048, 4096), num_warps=(1, 2, 4, 8))
EXPERTS = gpu_moe.CONFIG["num_experts"], gpu_moe.CONFIG["num_experts_per_tok"]
SMALL = {
    "norm": Small(grid(num_warps=WARPS), 1536, lambda m, n, device: gpu_rows.norm_case(m, n, 0, 1, device)),
    "activation": Small(BLOCKS, 14336, lambda m, n, device: gpu_rows.silu_case(m, n, 128, device)),
    "activation rows": Small(grid(num_warps=WARPS), 1536, lambda m, n, device: gpu_rows.silu_case(m, n, 0, device)),
    "embedding": Small(BLOCKS, 4096, lambda m, n, device: gpu_rows.embed_case(m, n, 16384, device)),
    "quantize rows": Small(
        grid(num_warps=WARPS), 1536, lambda m, n, device: gpu_rows.rounding_case(m, n, 0, device)
    ),
    "quantize groups": Small(
        grid(rows=(1, 4, 8, 16, 32, 64), num_warps=(1, 2, 4, 8)), 14336,
        lambda m, n, device: gpu_rows.rounding_case(m, n, 128, device),
    ),
    "rope": Small(grid(num_warps=WARPS), 512, lambda m, n, device: gpu_rows.rope_case(m, n // 128, 1, 128, device)),
    "norms over heads": Small(grid(again=(0, 1)), 16 * 128, lambda kib, n, device: norms_case(kib, n // 128, device)),
    "gather": Small(BLOCKS, 14336, lambda m, n, device: gpu_around.gather_case(m, n, device)),
    "dequantize": Small(
        grid(block_n=(8, 16, 32, 64), num_warps=(1, 2, 4, 8)), 4096,
        lambda _, n, device: gpu_around.dequantize_case(n, 14336, device),
    ),
    "add up": Small(BLOCKS, 4096, lambda m, n, device: gpu_around.add_up_case(4, m, n, device)),
    "moe route": Small(
        grid(block=(128, 256, 512, 1024, 2048), num_warps=(1, 2, 4, 8)), EXPERTS[0],
        lambda m, n, device: gpu_around.route_case(m, n, EXPERTS[1], device),
    ),
    "moe router": Small(
        grid(
            max_tokens=(512,), split_k=(2, 4, 8, 16, 32), block_e=(16, 32, 64), block_k=(64, 128, 256),
            num_warps=(4, 8),
            num_stages=(4,),
        ),
        EXPERTS[0],
        lambda m, n, device: gpu_around.router_case(m, n, EXPERTS[1], gpu_moe.CONFIG["hidden_size"], device),
    ),
    "moe align": Small(
        grid(block=(512, 1024, 2048, 4096), num_warps=(1, 2, 4, 8)), EXPERTS[0],
        lambda m, n, device: gpu_around.align_case(m, n, EXPERTS[1], device),
    ),
    "moe sum": Small(BLOCKS, 2048, lambda m, n, device: gpu_around.sum_case(m, n, EXPERTS[1], device)),
    "sampling lists": Small(
        grid(block=(32, 64, 128, 256, 512), num_warps=(1, 2, 4)), gpu_rows.VOCAB,
        lambda m, n, device: gpu_around.penalties_case(m, 300, n, device),
    ),
    "sampling chunks": Small(
        grid(rows=(4, 8, 16, 32), num_warps=(2, 4, 8)), gpu_rows.VOCAB,
        lambda m, n, device: gpu_rows.sampling_case(m, n, device),
    ),
    "sampling choice": Small(
        grid(block=(1024, 2048, 4096, 8192), num_warps=(4, 8, 16, 32)), gpu_rows.VOCAB,
        lambda m, n, device: gpu_rows.sampling_case(m, n, device),
    ),
}  # fmt: skip

FAMILIES = (*GEMMS, *MIXTURES, "paged decode", "paged prefill", *SMALL)


@dataclass(frozen=True)
class Problem:
    """A row that a family is to have: its bounds, candidates, and inputs of a size (as `tables.choose` takes it)."""

    bounds: Row
    rows: list[Row]
    size: tuple[int, int, int]
    make: Callable[[torch.device], Bodies]
    num_bytes: int
    tolerance: float


def problems(family: str) -> Iterator[Problem]:
    """In the order in which the table is to have them: the last has no bounds."""
    if family in GEMMS:
        body, _, _, tolerance = gpu_gemms.KINDS[GEMMS[family]]
        for m in (*FEW_TOKENS, MANY_TOKENS):
            for bounds, layer in CLASSES:
                size = m, *gpu_gemms.LLAMA[layer]
                most = {} if m == MANY_TOKENS else {"m": m}
                make = partial(_made, body, size)
                yield Problem({**most, **bounds}, gemm_rows(family, m), size, make, size[1] * size[2] // 2, tolerance)
        return
    if family in MIXTURES:
        config = gpu_moe.CONFIG
        num, top_k = config["num_experts"], config["num_experts_per_tok"]
        hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
        for m in (16, 32, 64, MANY_TOKENS):
            tokens = min(m * num // top_k, MANY_TOKENS)
            make = partial(_made, gpu_moe.mixture, (tokens, family.removeprefix("moe "), (num, top_k, hidden, inner)))
            bounds = {} if m == MANY_TOKENS else {"m": m}
            rows = mixture_rows(family, m)
            yield Problem(bounds, rows, (m, 2 * inner, hidden), make, num * hidden * inner, FEW_BITS)
        return
    if family in SMALL:
        small, those = SMALL[family], tuning.rows_of(card())[family]
        beyond = max(TOKENS, *(2 * row.get("m", 0) for row in those))  # all bounds
        for row in those:
            bounds = {name: bound for name, bound in row.items() if name in tuning.BOUNDS}
            size = row.get("m", beyond), power_of_two(row["n"]) if "n" in row else small.usual
            yield Problem(bounds, small.rows, (*size, 0), partial(_made, small.make, size), 1 << 22, small.tolerance)
        return
    decodes = family == "paged decode"
    for bounds, kind, element in (({"k": 2}, "bf16", 2), ({}, "fp8", 1)):  # k: bytes of a cached number
        sizes = Sizes(32, 1, 4095, 32, 8, 128) if decodes else Sizes(1, 4096, 0, 32, 8, 128)
        make = partial(_made, gpu_attention.decode_case if decodes else gpu_attention.prefill_case, (sizes, kind))
        size = (4 if decodes else 32, 128, element)
        yield Problem(bounds, attention_rows(family), size, make, 1 << 28, 1e-2)


def _made(body: Callable[..., Bodies], size: tuple[Any, ...], device: torch.device) -> Bodies:
    return body(*size, device)


def untouched(family: str, before: list[Row]) -> list[Row]:
    """Rows that stay in front: attention of large heads and of float32, which isn't what is tuned."""
    return [row for row in before if "n" in row or row.get("k", 0) > 2] if family.startswith("paged") else []


def install(family: str, row: Row) -> None:
    """Let every size of a family take this row."""
    tuning.rows_of(card())[family] = [row]
    tuning.row_of.cache_clear()


def best_of(
    family: str, rows: list[Row], sets: list[Bodies], tolerance: float, clock: Clock, ends: float
) -> tuple[Row | None, float]:  # fmt: skip
    """The fastest row whose output is right, and its microseconds."""
    timed: list[tuple[float, int]] = []
    rows = [
        rows[0],
        *random.Random(0).sample(rows[1:], len(rows) - 1),
    ]  # where time ends, of every kind some were tried
    for i, row in enumerate(rows):
        if time.monotonic() > ends:
            print(f"    time is over: {len(rows) - i} of {len(rows)} candidates not tried", flush=True)
            break
        install(family, row)
        found, said = clock.together({"own": [bodies.timed or bodies.run for bodies in sets]})
        if "own" in found:
            timed.append((found["own"].us, i))
        else:
            print(f"    {row}: {said['own']}", flush=True)
    for us, i in sorted(timed):
        install(family, rows[i])
        with poisoned():
            error = error_of(sets[0], sets[0].run())
        if error <= tolerance:
            return rows[i], us
        print(f"    {rows[i]}: wrong, {error:.1e}", flush=True)
    return None, 0.0


def merge(path: Path, family: str, rows: list[Row], base: Path | None = None) -> None:
    """Put a family's rows into a table; all others stay. A file that isn't there begins as a copy of `base`."""
    source = path if path.exists() else base
    table: dict[str, list[Row]] = json.loads(source.read_text()) if source else {}
    table[family] = rows
    parts = [
        f"{json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(row)}" for row in kept) + "\n]"
        for name, kept in table.items()
    ]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


@torch.inference_mode()
def tuned(family: str, device: torch.device, clock: Clock, seconds: float) -> list[Row]:
    """The family's rows for this card, which take them from now on."""
    begun, work = time.monotonic(), list(problems(family))
    old = [dict(tuning.choose(family, *problem.size, device)) for problem in work]
    rows = untouched(family, list(tuning.rows_of(card())[family]))
    for number, problem in enumerate(work):
        ends = begun + seconds * (number + 1) / len(work)
        row: Row | None = None
        us = 0.0
        try:
            sets = [problem.make(device) for _ in range(max(2, -(-3 * clock.l2_bytes // problem.num_bytes)))]
            row, us = best_of(family, [old[number], *problem.rows], sets, problem.tolerance, clock, ends)
        except Exception as error:
            print(f"    {problem.bounds}: {one_line(error)}", flush=True)
        rows.append({**problem.bounds, **(row or old[number])})
        found = f"{us:.1f} us{', as before' if row == old[number] else ''}" if row else "none works: as before"
        print(f"{time.monotonic() - begun:5.0f} s {family} {rows[-1]}: {found}", flush=True)
        sets = []
        clock.forget()
    tuning.rows_of(card())[family] = rows
    tuning.row_of.cache_clear()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=[*FAMILIES, "around"])
    parser.add_argument("--seconds", type=float, default=500.0, help="after which no candidate begins (default 500)")
    parser.add_argument("--output", type=Path, help="the table to write (default: kernels/tuning/CARD.json)")
    parser.add_argument("--dry-run", action="store_true", help="print the rows, and write none")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device to tune for")
    device, clock = torch.device("cuda"), CudaClock(rounds=5)
    print(*table_notes(device))
    path = args.output or tuning.TUNING / f"{tuning.stem(torch.cuda.get_device_name(0))}.json"
    families = list(SMALL) if args.family == "around" else [args.family]
    for family in families:
        rows = tuned(family, device, clock, args.seconds / len(families))
        if not args.dry_run:
            merge(path, family, rows, tuning.TUNING / f"{card()}.json")


if __name__ == "__main__":
    main()
