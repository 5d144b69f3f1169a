"""Launches of kernels/int4 that are compiled ahead of time."""

from __future__ import annotations

import torch
from proof import Proof

from octavo.kernels.gemm.gpu.packing import PackedWords
from octavo.kernels.int4.gpu.dequantize import dequantize
from octavo.kernels.int4.gpu.permute_columns import gather


def dequantize_proofs() -> dict[str, Proof]:
    """Words are read and weights written 8 bytes or more at a time."""
    n = 4096
    k = 4096
    words = torch.empty(1, k // 128, n, 32, dtype=torch.int16, device="meta")
    out = torch.empty(n, k, dtype=torch.bfloat16, device="meta")
    made: dict[str, Proof] = {}
    for name, group_size, shape in (("g128", 128, (1, k // 128, n)), ("g32 zero", 32, (1, k // 32, n, 2))):
        scale = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        packed = PackedWords(words, scale, "4 bits", group_size, k)
        made[name] = Proof(dequantize(packed, out), (r"LDG\.E\.128", r"STG\.E\.128"), forbids=("I2F",))
    return made


def permute_columns_proofs() -> dict[str, Proof]:
    """The order is read, and x written, in wide pieces; x itself is scattered."""
    x = torch.empty(64, 4096, dtype=torch.bfloat16, device="meta")
    order = torch.empty(4096, dtype=torch.int32, device="meta")
    return {"gather": Proof(gather(x, order, x), (r"LDG\.E\.128", r"STG\.E\.128"))}
