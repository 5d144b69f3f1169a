"""What a card's table asks for, as proofs: each GEMM's launch in the block sizes of every row of `tuning/CARD.json`.

What must hold is that the sizes compile, fit, don't spill and reach tensor cores, on an H100 its own: the rooms' proofs
say more of single launches there. Rows of other kernels are compiled by the rooms' proofs alone, which take every one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from proof import Proof, meta
from torch import Tensor

from octavo.kernels.gemm.gpu.arguments import Pairs
from octavo.kernels.gemm.gpu.gemm_persistent import gemm_persistent
from octavo.kernels.gemm.gpu.gemm_swap_ab import gemm_packed, gemm_swap_ab
from octavo.kernels.gemm.gpu.packing import PackedWords, Storage
from octavo.kernels.launching import tuning
from octavo.kernels.launching.launch import Launch
from octavo.kernels.moe.gpu.route import unaligned

BF16 = torch.bfloat16
FP16 = torch.float16
E4M3 = torch.float8_e4m3fn
INT16 = torch.int16
N = 4096
K = 4096
EXPERTS = 8
PAIRS = 512
FAMILIES = (
    "fp8", "fp8 blocks", "int8", "w8a16", "int4", "int4 fp8", "moe bf16", "moe fp8", "moe fp8 blocks", "moe int8",
    "moe w8a16", "moe int4", "moe int4 fp8",
)  # fmt: skip

Sizes = dict[str, int]


def row_proofs() -> dict[str, Proof]:
    """For the card of `ahead.proofs`."""
    card = tuning.card_of(torch.device("meta"))
    cores = r"[HIQ]GMMA\." if card == "h100" else r"[HIQ]G?MMA\."
    made: dict[str, Proof] = {}
    for family, rows in tuning.rows_of(card).items():
        for row in _distinct(rows) if family in FAMILIES else ():
            wide = f"{row['block_m']} x {row['block_n']}, {row['num_warps']} warps, {row['num_stages']} stages"
            wide += f", {row['group_m']} down" if "group_m" in row else ""
            wide += ", in parts" if row["split_k"] > 1 else ""
            for variant, launch in _launches(family, row).items():
                name = f"{family}{variant} {wide}"
                if name in made:
                    raise ValueError(f"tuning/{card}.json: two rows are called {name}")
                made[name] = Proof(launch, (cores,))
    return made


def _distinct(rows: list[Sizes]) -> list[Sizes]:
    """Block sizes without bounds, each once whole and once in parts, where any row has it so."""
    found: dict[tuple[tuple[tuple[str, int], ...], bool], int] = {}
    for row in rows:
        size = {name: value for name, value in row.items() if name not in (*tuning.BOUNDS, "split_k", "dequantize")}
        parts = row.get("split_k", 1)
        key = (tuple(size.items()), parts > 1)
        found[key] = max(found.get(key, 1), parts)
    return [{**dict(size), "split_k": parts} for (size, _), parts in found.items()]


def _launches(family: str, row: Sizes) -> dict[str, Launch]:
    """The kernel's launches in these sizes by variant: what packed weights may have beside their codes.

    What isn't in parts has a bias, and of the smallest tile one token: Triton compiles an argument that is 1 apart.
    """
    sizes = dict(row)
    parts = sizes.pop("split_k")
    m = sizes["block_m"]
    m = 1 if parts == 1 and m == 16 else m
    out = meta(parts, m, N) if parts > 1 else meta(m, N, dtype=BF16)
    bias = None if parts > 1 else meta(N, dtype=BF16)
    match family:
        case "fp8 blocks":
            of_rows = _eight_bits(family, m, out, bias, {**sizes}, 1)
            return {"": _eight_bits(family, m, out, bias, sizes), ", of rows": of_rows}
        case "fp8" | "int8":
            return {"": _eight_bits(family, m, out, bias, sizes)}
        case "w8a16":
            x, half = (meta(m, K, dtype=dtype) for dtype in (BF16, FP16))
            return {
                ", rows": _packed(x, "int8", 0, False, out, bias, sizes),
                ", groups of 128 with zeros": _packed(x, "int8", 128, True, out, bias, sizes),
                ", groups of 32 with zeros, fp16": _packed(half, "int8", 32, True, out, bias, sizes),
                ", e4m3, groups of 128": _packed(x, "e4m3", 128, False, out, bias, sizes),
            }
        case "int4" | "int4 fp8":
            x = meta(m, K, dtype=E4M3 if "fp8" in family else BF16)
            found = {", groups of 128": _packed(x, "4 bits", 128, False, out, bias, sizes)}
            found[", groups of 64 with zeros"] = _packed(x, "4 bits", 64, True, out, bias, sizes)
            if m <= 64:  # as `gemm.gpu.packed_linear` has it
                found[", groups of 32 with zeros"] = _packed(x, "4 bits", 32, True, out, bias, sizes)
                if "fp8" not in family:
                    found[", 2 bits, groups of 32 with zeros"] = _packed(x, "2 bits", 32, True, out, bias, sizes)
            return found
        case "moe w8a16":
            found = {", groups of 128 with zeros": _of_experts(BF16, "int8", 128, True, sizes)}
            return {**found, ", e4m3, groups of 128": _of_experts(BF16, "e4m3", 128, False, sizes)}
        case "moe int4 fp8":
            return {", groups of 32 with zeros": _of_experts(E4M3, "4 bits", 32, True, sizes)}
        case "moe int4":
            found = {", groups of 128": _of_experts(BF16, "4 bits", 128, False, sizes)}
            return {**found, ", groups of 32 with zeros": _of_experts(BF16, "4 bits", 32, True, sizes)}
    return {"": _moe(family, sizes)}


def _eight_bits(family: str, m: int, out: Tensor, bias: Tensor | None, sizes: Sizes, rows: int = 128) -> Launch:
    """rows: of a block."""
    dtype = torch.int8 if family == "int8" else E4M3
    blocks = family == "fp8 blocks"
    x = meta(m, K, dtype=dtype)
    w = meta(N, K, dtype=dtype)
    scales = (meta(K // 128, m).T, meta(N // rows, K // 128)) if blocks else (meta(m, 1), meta(N, 1))
    body: Callable[..., Launch] = gemm_swap_ab if sizes.pop("swap_ab") else gemm_persistent
    return body(x, w, *scales, out, bias, blocks=blocks, **sizes)


def _words(experts: int, storage: Storage, group: int, has_zeros: bool, bias: Tensor | None = None) -> PackedWords:
    bits = {"2 bits": 2, "4 bits": 4}.get(storage, 8)
    tile = min(group or 128, 128) if bits == 8 else 128
    scale = meta(experts, K // (group or K), N, *([2] if has_zeros else []), dtype=BF16)
    words = meta(experts, K // tile, N, tile * bits // 16, dtype=INT16)
    return PackedWords(words, scale, storage, group, K, bias=bias)


def _packed(
    x: Tensor, storage: Storage, group: int, has_zeros: bool, out: Tensor, bias: Tensor | None, sizes: Sizes
) -> Launch:
    packed = _words(1, storage, group, has_zeros, bias)
    return gemm_packed(x, packed, out, meta(x.shape[0], 1) if x.dtype == E4M3 else None, **sizes)


def _pairs(sizes: Sizes) -> dict[str, Any]:
    given = {name: size for name, size in sizes.items() if name != "block_m"}  # that one is the alignment's
    return {"pairs": Pairs(unaligned(PAIRS, EXPERTS, sizes["block_m"], "meta"), 1, meta(PAIRS // 2, 2)), **given}


def _moe(family: str, sizes: Sizes) -> Launch:
    dtype = {"moe bf16": BF16, "moe int8": torch.int8}.get(family, E4M3)
    blocks = family == "moe fp8 blocks"
    x = meta(PAIRS, K, dtype=dtype)
    w = meta(EXPERTS, N, K, dtype=dtype)
    x_scale = w_scale = None
    if dtype != BF16:
        x_scale = meta(K // 128, PAIRS).T if blocks else meta(PAIRS, 1)
        w_scale = meta(EXPERTS, N // 128, K // 128) if blocks else meta(EXPERTS, N)
    return gemm_swap_ab(x, w, x_scale, w_scale, meta(PAIRS, N, dtype=BF16), blocks=blocks, **_pairs(sizes))


def _of_experts(dtype: torch.dtype, storage: Storage, group: int, has_zeros: bool, sizes: Sizes) -> Launch:
    packed = _words(EXPERTS, storage, group, has_zeros)
    x_scale = meta(PAIRS, 1) if dtype == E4M3 else None
    return gemm_packed(meta(PAIRS, K, dtype=dtype), packed, meta(PAIRS, N, dtype=BF16), x_scale, **_pairs(sizes))
