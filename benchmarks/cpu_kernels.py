"""GEMM bodies against stock torch operators: one thread, in thread CPU time, which a busy machine spoils less.

    python benchmarks/cpu_kernels.py

GOP/s of each body by rows of the input, N x K of SmolLM2's gate_up half, and the ratio to torch's bf16 linear.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.dense import cpu as dense
from octavo.kernels.dense import integers_cpu as integers
from octavo.kernels.int4 import cpu as int4
from octavo.kernels.int8 import cpu as int8
from octavo.kernels.native.grouped_tile import FLOAT

N, K, GROUP = 1536, 576, 64


def seconds(function: Callable[[], Tensor], count: int) -> float:
    """Best of five rounds of `count` calls, each."""
    function()
    best = float("inf")
    for _ in range(5):
        begin = time.thread_time()
        for _ in range(count):
            function()
        best = min(best, (time.thread_time() - begin) / count)
    return best


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    scales, weight = torch.rand(N, K // GROUP), torch.randn(N, K).bfloat16()
    packed8, dense16 = int8.pack(codes, scales[:, :1]), dense.pack_bf16(weight)
    packed4 = int4.pack(codes // 16, scales)
    dense4 = integers.pack(codes // 16, integers.Scales(FLOAT, scales), 4, -8)
    dense8 = integers.pack(codes, integers.Scales(FLOAT, scales), 8, -128)
    bodies: dict[str, Callable[[Tensor], Tensor]] = {
        "torch bf16": lambda x: F.linear(x, weight),
        "bf16": lambda x: dense.linear(x, dense16),
        "W8A8": lambda x: int8.linear(x, packed8),
        "W4A8": lambda x: int4.linear(x, packed4),
        "W4A16": lambda x: integers.linear(x, dense4),
        "W8A16": lambda x: integers.linear(x, dense8),
    }
    print(f"torch {torch.__version__}, 1 thread, N {N}, K {K}, group {GROUP}; GOP/s (ratio to torch bf16)")
    print(f"{'M':>5s} " + " ".join(f"{name:>14s}" for name in bodies))
    for m in (1, 2, 4, 8, 32, 256):
        x = torch.randn(m, K).bfloat16()
        count, work = max(2, 300 // m), 2 * m * N * K / 1e9
        rates = [work / seconds(partial(run, x), count) for run in bodies.values()]
        print(f"{m:5d} " + " ".join(f"{rate:7.0f} ({rate / rates[0]:4.2f})" for rate in rates))


if __name__ == "__main__":
    main()
