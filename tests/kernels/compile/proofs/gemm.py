"""Launches of kernels/gemm that are compiled ahead of time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from proof import Proof, meta

from octavo.kernels.gemm.gpu.gemm_persistent import gemm_persistent
from octavo.kernels.gemm.gpu.gemm_swap_ab import gemm_packed, gemm_swap_ab
from octavo.kernels.gemm.gpu.packing import PackedWords


def swap_ab_proofs() -> dict[str, Proof]:
    """Llama's shapes for 16 to 64 tokens: 8-bit instructions of 64 rows, weights copied 16 bytes at a time."""
    fp8 = torch.float8_e4m3fn
    int8 = torch.int8
    made = {}
    n = 4096
    k = 4096
    configurations: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
        "fp8 16 x 64": (fp8, {"num_stages": 5}),
        "fp8 32 x 64": (fp8, {"block_m": 32, "num_stages": 5}),
        "fp8 64 x 64": (fp8, {"block_m": 64}),
        "fp8 128 x 128": (fp8, {"block_m": 128, "block_n": 128, "num_warps": 8}),
        "fp8 blocks 16 x 64": (fp8, {"blocks": True, "num_stages": 5}),
        "fp8 blocks 64 x 64": (fp8, {"blocks": True, "block_m": 64}),
        "int8 16 x 64": (int8, {"num_stages": 5}),
        "int8 64 x 64": (int8, {"block_m": 64}),
    }
    for name, (dtype, size) in configurations.items():
        m = size.get("block_m", 16)
        in_blocks = "blocks" in size
        x_scale, w_scale = (meta(k // 128, m).T, meta(n // 128, k // 128)) if in_blocks else (meta(m), meta(n))
        launch = gemm_swap_ab(meta(m, k, dtype=dtype), meta(n, k, dtype=dtype), x_scale, w_scale, meta(4, m, n), **size)
        op = "QGMMA" if dtype == fp8 else "IGMMA"
        expects = (rf"{op}\.64x{m}x32", r"LDGSTS\.E\.BYPASS.*128", r"STG\.E\.128")
        made[name] = Proof(launch, expects, forbids=("HMMA", "IMMA"), hopper_only=True)
    return made


def persistent_proofs() -> dict[str, Proof]:
    """8192 x 8192 x 4096: the instructions of the whole tile's width, and codes that come by the accelerator."""
    m = 8192
    n = 8192
    k = 4096
    out = meta(m, n, dtype=torch.bfloat16)
    configurations: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
        "fp8 128 x 256": (torch.float8_e4m3fn, {"block_n": 256, "subtiles": 2}),
        "fp8 128 x 128": (torch.float8_e4m3fn, {"num_warps": 4}),
        "fp8 128 x 128 promoted": (torch.float8_e4m3fn, {"promote": 1}),
        "fp8 128 x 128 pointers": (torch.float8_e4m3fn, {"tma": 0}),
        "fp8 blocks": (torch.float8_e4m3fn, {"blocks": True}),
        "int8 128 x 256": (torch.int8, {"block_n": 256, "subtiles": 2}),  # Triton takes two halves
        "int8 128 x 128": (torch.int8, {"num_warps": 4}),
    }
    made: dict[str, Proof] = {}
    for name, (dtype, size) in configurations.items():
        x = meta(m, k, dtype=dtype)
        w = meta(n, k, dtype=dtype)
        in_blocks = "blocks" in size
        x_scale = meta(k // 128, m).T if in_blocks else meta(m, 1)
        w_scale = meta(n // 128, k // 128) if in_blocks else meta(n, 1)
        op = "IGMMA" if dtype == torch.int8 else "QGMMA"
        width = 128 if dtype == torch.int8 else size.get("block_n", 128)
        loads = r"UTMALDG" if size.get("tma", 1) else r"LDGSTS\.E\.BYPASS.*128"
        launch = gemm_persistent(x, w, x_scale, w_scale, out, **size)
        made[name] = Proof(
            launch, (rf"{op}\.64x{width}x32", loads, r"STG\.E\.128"), forbids=("HMMA", "IMMA"), hopper_only=True
        )
    x = meta(m, k, dtype=torch.float8_e4m3fn)
    w = meta(n, k, dtype=torch.float8_e4m3fn)
    fp8 = (r"QGMMA\.64x",)
    launch = gemm_persistent(x, w, meta(m, 1), meta(n, 1), meta(m, n), block_n=256, subtiles=2)
    made["fp8 128 x 256 to float32"] = Proof(launch, (r"QGMMA\.64x256x32", r"UTMALDG"), hopper_only=True)
    x = meta(m, k + 4, dtype=torch.float8_e4m3fn)
    w = meta(n, k + 4, dtype=torch.float8_e4m3fn)
    for name, scales in {"": (meta(m, 1), meta(n, 1)), " in blocks": (meta(33, m).T, meta(n // 128, 33))}.items():
        launch = gemm_persistent(
            x, w, *scales, out, block_n=128 if name else 256, subtiles=1 if name else 2, blocks=bool(name)
        )
        made[f"fp8 rows of 4100{name}"] = Proof(launch, fp8, hopper_only=True)
    return made


_FEW: dict[str, int] = {"block_m": 16, "block_n": 64}
_SOME: dict[str, int] = {"block_m": 64, "block_n": 128, "num_warps": 8}
_MANY: dict[str, int] = {"block_m": 128, "block_n": 128, "group_m": 8, "num_warps": 8}
# What is compiled ahead: a name, bits, columns that share a scale, whether there are zero points, x's type, sizes.
_KINDS: tuple[tuple[str, int, int, bool, torch.dtype, dict[str, int]], ...] = (
    ("row", 4, 4096, False, torch.bfloat16, _FEW),
    ("g128", 4, 128, False, torch.bfloat16, _FEW),
    ("g128", 4, 128, False, torch.bfloat16, {**_FEW, "block_m": 32}),
    ("g128", 4, 128, False, torch.bfloat16, _SOME),
    ("g128", 4, 128, False, torch.bfloat16, _MANY),
    ("g128 zero", 4, 128, True, torch.bfloat16, _FEW),
    ("g128 zero", 4, 128, True, torch.bfloat16, _MANY),
    ("g128 zero fp16", 4, 128, True, torch.float16, _FEW),
    ("g64 zero", 4, 64, True, torch.bfloat16, _FEW),
    ("g64 zero", 4, 64, True, torch.bfloat16, _MANY),
    ("g32", 4, 32, False, torch.bfloat16, _FEW),
    ("g32 zero", 4, 32, True, torch.bfloat16, _FEW),
    ("g32 zero", 4, 32, True, torch.bfloat16, {**_SOME, "group_m": 8}),
    ("2 bits g128", 2, 128, False, torch.bfloat16, _FEW),
    ("2 bits g32 zero fp16", 2, 32, True, torch.float16, _FEW),
    ("e4m3 g128", 4, 128, False, torch.float8_e4m3fn, _FEW),
    ("e4m3 g128", 4, 128, False, torch.float8_e4m3fn, _SOME),
    ("e4m3 g128", 4, 128, False, torch.float8_e4m3fn, _MANY),
    ("e4m3 g32 zero", 4, 32, True, torch.float8_e4m3fn, _FEW),
)


def w4a16_proofs() -> dict[str, Proof]:
    """Llama's shapes: decoded weights go from registers into the tensor core, words are copied 16 bytes at a time."""
    example = partial(meta, dtype=torch.bfloat16)
    n = 4096
    k = 4096
    made: dict[str, Proof] = {}
    for name, bits, group_size, zero, dtype, sizes in _KINDS:
        bm = sizes["block_m"]
        fp8 = dtype == torch.float8_e4m3fn
        scale = example(1, k // group_size, n, 2) if zero else example(1, k // group_size, n)
        words = example(1, k // 128, n, 8 * bits, dtype=torch.int16)
        packed = PackedWords(words, scale, "2 bits" if bits == 2 else "4 bits", group_size, k)
        out = example(4, bm, n, dtype=torch.float32) if bm < 128 else example(bm, n)
        x = example(bm, k, dtype=dtype)
        x_scale = example(bm, 1, dtype=torch.float32) if fp8 else None
        op = rf"QGMMA\.64x{bm}x32.*\.RS" if fp8 else rf"HGMMA\.64x{bm}x16.*\.RS"
        made[f"{name} {bm} x {sizes['block_n']}"] = Proof(
            gemm_packed(x, packed, out, x_scale, **sizes),
            expects=(op, r"LDGSTS\.E\.BYPASS.*128", r"STG\.E\.128"),
            forbids=(r"[HQ]GMMA\.(?!.*\.RS)", "HMMA", r"I2F(?!\.RP)"),
            hopper_only=True,
        )
    return made


def w8a16_proofs() -> dict[str, Proof]:
    """Weights as the tensor core's operand from registers, and no conversion but the bit formula."""
    n = 4096
    k = 4096
    bf16 = torch.bfloat16
    fp16 = torch.float16
    configurations: dict[str, tuple[int, torch.dtype, bool, dict[str, Any]]] = {
        "e4m3 row 16": (0, bf16, False, {"num_stages": 5}),
        "e4m3 g128 64 fp16": (128, fp16, False, {"block_m": 64}),
        "row 16": (0, bf16, False, {"num_stages": 5}),
        "g128 16": (128, bf16, False, {"num_stages": 5}),
        "g128 16 fp16": (128, fp16, True, {"num_stages": 5}),
        "g128 zero 64": (128, bf16, True, {"block_m": 64}),
        "g32 zero 16": (32, bf16, True, {"num_stages": 6}),
        "g128 128": (128, bf16, False, {"block_m": 128, "block_n": 128, "num_warps": 8}),
    }
    made: dict[str, Proof] = {}
    for name, (group, dtype, has_zero, size) in configurations.items():
        m = size.get("block_m", 16)
        tile = min(group or 128, 128)
        groups = k // (group or k)
        words = meta(1, k // tile, n, tile // 2, dtype=torch.int16)
        scale = meta(1, groups, n, *([2] if has_zero else []), dtype=torch.bfloat16)
        packed = PackedWords(words, scale, "e4m3" if "e4m3" in name else "int8", group, k)
        launch = gemm_packed(meta(m, k, dtype=dtype), packed, meta(4, m, n), group_m=8, **size)
        expects = (rf"HGMMA\.64x{m}x16.*\.RS", r"LDGSTS\.E\.BYPASS.*128", r"STG\.E\.128")
        made[name] = Proof(launch, expects, forbids=("HMMA", r"I2F\.S8", r"STS\.U16"), hopper_only=True)
    return made
