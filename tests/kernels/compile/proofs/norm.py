"""Launches of kernels/norm that are compiled ahead of time."""

from __future__ import annotations

from functools import partial

import torch
from proof import Proof, meta

from octavo.kernels.norm.gpu.activation import gelu_tanh_and_mul, silu_and_mul
from octavo.kernels.norm.gpu.embedding import embed
from octavo.kernels.norm.gpu.norm import norm
from octavo.kernels.norm.gpu.split_k_sum import split_k_sum


def norm_proofs() -> dict[str, Proof]:
    """Widths of SmolLM and of Llamas: 128-bit loads and stores throughout."""
    example = partial(meta, dtype=torch.bfloat16)
    made: dict[str, Proof] = {}
    for width in (576, 4096, 8192):
        rows = example(64, width)
        weight = example(width, dtype=torch.float32)
        sums = example(4, 64, width, dtype=torch.float32)
        scale = example(64, 1, dtype=torch.float32)
        fp8 = example(64, width, dtype=torch.float8_e4m3fn)
        int8 = example(64, width, dtype=torch.int8)
        for name, launch in {
            "norm": norm(rows, weight, 1e-5, rows, residual=rows, total=rows),
            "norm fp8": norm(rows, weight, 1e-5, fp8, scale=scale, residual=rows, total=rows),
            "norm fp8 groups": norm(rows, weight, 1e-5, fp8, scale=scale, group_size=128, residual=rows, total=rows),
            "norm int8 of 4 partial sums": norm(sums, weight, 1e-5, int8, scale=scale, residual=rows, total=rows),
        }.items():
            made[f"{name} {width}"] = Proof(launch, expects=(r"LDG\.E\.128", r"STG\.E\.128"))
    for width in (16384, 18432):
        rows = example(64, width)
        weight = example(width, dtype=torch.float32)
        launch = norm(rows, weight, 1e-5, rows, residual=rows, total=rows)
        made[f"norm {width}"] = Proof(launch, expects=(r"LDG\.E\.128", r"STG\.E\.128"))
    rows = example(64, 2048)
    weight = example(2048, dtype=torch.float32)
    scale = example(64, 1, dtype=torch.float32)
    fp8 = example(64, 2048, dtype=torch.float8_e4m3fn)
    pairs = example(64, 8, 2048).transpose(0, 1)
    stored = example(1, dtype=torch.float32)
    column_permutation = example(2048, dtype=torch.int32)
    for name, launch in {
        "fp8 of 8 experts, and plain": norm(
            pairs, weight, 1e-6, fp8, scale=scale, residual=rows, total=rows, plain=rows
        ),
        "fp8 static, and plain": norm(
            rows, weight, 1e-6, fp8, scale=scale, residual=rows, total=rows, static_scale=stored, plain=rows
        ),
    }.items():
        made[f"norm {name} 2048"] = Proof(launch, expects=(r"LDG\.E\.128", r"STG\.E\.128"))
    for name, plain in (("moved", None), ("moved, and plain", rows)):
        launch = norm(
            rows, weight, 1e-6, rows, residual=rows, total=rows, column_permutation=column_permutation, plain=plain
        )
        made[f"norm {name} 2048"] = Proof(launch, expects=(r"LDG\.E\.128", r"STG\.E\.U16"))
    rows = example(64, 3584)
    scale = example(64, 1, dtype=torch.float32)
    weight = example(3584, dtype=torch.float32)
    sums = example(4, 64, 3584, dtype=torch.float32)
    fp8 = example(64, 3584, dtype=torch.float8_e4m3fn)
    launch = norm(sums, weight, 1e-6, fp8, scale=scale, residual=rows, total=rows, after=weight)
    made["norms fp8 of 4 partial sums 3584"] = Proof(launch, expects=(r"LDG\.E\.128", r"STG\.E\.128"))
    return made


def activation_proofs() -> dict[str, Proof]:
    """Widths of Llamas and of SmolLM: 128-bit loads throughout."""
    example = partial(meta, dtype=torch.bfloat16)
    width = 14336
    rows = example(64, 2 * width)
    out = example(64, width)
    scale = example(64, 112, dtype=torch.float32)
    fp8 = example(64, width, dtype=torch.float8_e4m3fn)
    int8 = example(64, width, dtype=torch.int8)
    sums = example(4, 64, 2 * width, dtype=torch.float32)
    made = {
        "silu": silu_and_mul(rows, out),
        "silu fp8": silu_and_mul(rows, fp8, scale=scale),
        "silu fp8 groups of 4 partial sums": silu_and_mul(sums, fp8, scale=scale, group_size=128),
        "gelu int8": gelu_tanh_and_mul(rows, int8, scale=scale),
    }
    made = {f"{name} {width}": launch for name, launch in made.items()}
    for width in (1536, 8192, 28672):
        rows = example(64, 2 * width)
        fp8 = example(64, width, dtype=torch.float8_e4m3fn)
        made[f"silu fp8 {width}"] = silu_and_mul(rows, fp8, scale=scale[:, :1])
    return {name: Proof(launch, (r"LDG\.E\.128", r"STG\.E\.(128|64)")) for name, launch in made.items()}


def embedding_proofs() -> dict[str, Proof]:
    """128-bit loads and stores."""
    table = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    launch = embed(torch.empty(64, dtype=torch.int64, device="meta"), table, table[:64], 2.0)
    return {"embedding 4096": Proof(launch, (r"LDG\.E\.128", r"STG\.E\.128"))}


def split_k_sum_proofs() -> dict[str, Proof]:
    """128-bit loads and stores."""
    launch = split_k_sum(meta(4, 64, 4096), meta(64, 4096, dtype=torch.bfloat16))
    return {"4 parts": Proof(launch, (r"LDG\.E\.128", r"STG\.E\.128"))}
