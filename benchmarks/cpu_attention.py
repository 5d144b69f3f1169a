"""Milliseconds of one layer's prefill attention in bf16: octavo's kernel and torch's attention, in turns.

SmolLM2-135M's heads by default; times 30 is a step's attention. Run on an idle machine:

    python benchmarks/cpu_attention.py [--heads 9,3,64] [--cache bf16] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from unittest import mock

from octavo.kernels.native.environment import ENVIRONMENT

os.environ.update({**ENVIRONMENT, **os.environ})  # before torch is imported: as the server's process has it

import torch
from torch import Tensor

from octavo.kernels.attention import cpu
from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.native import cpu_features

BLOCK = 16
CACHES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
CASES = [  # new tokens and the length of each sequence
    ([1000], [1000]),
    ([4000], [4000]),
    ([250] * 4, [250] * 4),
    ([256], [2256]),
    ([300], [300]),
    ([100], [100]),
    ([16], [2016]),
    ([8] * 8, [500] * 8),
    ([3], [1000]),
]


def step(new: list[int], lengths: list[int]) -> StepInputs:
    per = -(-max(lengths) // BLOCK)
    tables = torch.randperm(per * len(new), dtype=torch.int32).reshape(len(new), per)
    return StepInputs.prefill(lengths, BLOCK, sizes=new, tables=tables)


def seconds(q: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape, kernel: bool) -> list[float]:
    """Of a few calls, behind one that wakes the threads: in a step the layers before have done so."""
    taken = []
    with mock.patch.object(cpu_features, "has_dot_products", return_value=kernel):
        for _ in range(4):
            begin = time.perf_counter()
            cpu.paged_attention(q, inputs, cache, shape)
            taken.append(time.perf_counter() - begin)
    return taken[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="9,3,64", help="query heads, KV heads, head size")
    parser.add_argument("--cache", default="bf16", choices=CACHES)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    heads, kv_heads, dim = (int(n) for n in args.heads.split(","))
    shape = AttentionShape(heads, kv_heads, dim, dim**-0.5)
    ones = torch.ones(kv_heads)
    for new, lengths in CASES:
        inputs = step(new, lengths)
        blocks = (inputs.block_tables.numel(), kv_heads, BLOCK, dim)
        cache = LayerCache(*(torch.randn(blocks).to(CACHES[args.cache]) for _ in range(2)), ones, ones)
        q = torch.randn(sum(new), heads, dim).bfloat16()
        times: dict[bool, list[float]] = {True: [], False: []}
        with torch.inference_mode():
            for _ in range(args.rounds):
                for kernel, taken in times.items():
                    taken += seconds(q, inputs, cache, shape, kernel)
        ours, torchs = (statistics.median(taken) for taken in times.values())
        flop = sum(4 * heads * dim * n * (length - (n - 1) / 2) for n, length in zip(new, lengths, strict=True))
        name = f"{len(new)} x {new[0]} new of {lengths[0]}"
        rate = flop / ours / 1e12
        print(
            f"{name:22s} {1e3 * ours:8.3f} ms, {rate:.2f} TFLOP/s | torch {1e3 * torchs:8.3f} ms | {torchs / ours:.1f}x"
        )


if __name__ == "__main__":
    main()
