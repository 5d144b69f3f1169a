"""Launches of kernels/sampling that are compiled ahead of time."""

from __future__ import annotations

import torch
from proof import Proof, meta
from torch import Tensor

from octavo.kernels.sampling.gpu.change import add_biases, forbid, punish
from octavo.kernels.sampling.gpu.draw import launches, scratch


def change_proofs() -> dict[str, Proof]:
    """Lists of int64, as TokenCounts keeps them, and rows of float32."""
    logits = meta(64, 128_256)
    of_row = meta(64)
    listed = meta(4096, dtype=torch.int64)
    return {
        "mask": Proof(forbid(logits, meta(64, dtype=torch.int64), meta(64, 128_256 // 32, dtype=torch.int32))),
        "biases": Proof(add_biases(logits, listed, listed, of_row)),
        "penalties": Proof(punish(logits, listed, listed, listed, of_row, of_row, of_row)),
    }


def draw_proofs() -> dict[str, Proof]:
    """Gemma's and Qwen3's vocabularies: 128-bit loads."""
    made: dict[str, Proof] = {}
    for vocab, dtype in ((262_144, torch.float32), (151_936, torch.bfloat16)):

        def row(dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(64, dtype=dtype, device="meta")

        logits = torch.empty(64, vocab, dtype=dtype, device="meta")
        whole = row(torch.int64)
        doubles = row(torch.float64)
        memory = scratch(64, vocab, "meta")
        steps = launches(logits, row(), whole, row(), row(), doubles, whole, memory)
        for name, launch in zip(("peaks", "masses", "choose"), steps, strict=True):
            made[f"{name} {vocab} {str(dtype).removeprefix('torch.')}"] = Proof(launch, expects=(r"LDG\.E\.128",))
    return made
