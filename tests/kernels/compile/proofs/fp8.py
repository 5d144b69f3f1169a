"""Launches of kernels/fp8 that are compiled ahead of time."""

from __future__ import annotations

import torch
from proof import Proof, meta

from octavo.kernels.fp8.gpu.quantize import quantize


def quantize_proofs() -> dict[str, Proof]:
    """Llamas' and SmolLM's widths: 128-bit loads throughout."""
    m = 64
    k = 14336
    x, fp8, int8 = (meta(m, k, dtype=t) for t in (torch.bfloat16, torch.float8_e4m3fn, torch.int8))
    launches = {
        "fp8 rows": quantize(x, fp8, meta(m, 1)),
        "int8 rows": quantize(x, int8, meta(m, 1)),
        "fp8 groups": quantize(x, fp8, meta(k // 128, m).T, group_size=128),
    }
    for k in (1536, 4096):
        x = meta(m, k, dtype=torch.bfloat16)
        fp8 = meta(m, k, dtype=torch.float8_e4m3fn)
        launches[f"fp8 rows {k}"] = quantize(x, fp8, meta(m, 1))
    return {name: Proof(launch, (r"LDG\.E\.128", r"STG\.E\.(64|128)")) for name, launch in launches.items()}
