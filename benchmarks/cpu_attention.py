"""Milliseconds of one layer's attention in bf16 on a CPU: prefill beside torch's attention, decode beside the kernel of
machines without AVX-512 BF16, in turns, and how fast memory is read.

SmolLM2-135M's heads by default; times 30 is a step's attention. Run on an idle machine:

    python benchmarks/cpu_attention.py [--heads 9,3,64] [--cache bf16 int8 fp8] [--rounds 5] [--only decode]

A decode reads caches that lie in memory, as those of a model's many layers do: each call takes the next of several,
which together are larger than the processor's caches. Its GB/s are the bytes of keys and values, each read once.
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
PREFILLS = [  # new tokens and the length of each sequence
    ([1000], [1000]),
    ([4000], [4000]),
    ([2000], [8000]),
    ([2000], [32000]),
    ([250] * 4, [250] * 4),
    ([256], [2256]),
    ([300], [300]),
    ([100], [100]),
    ([16], [2016]),
    ([8] * 8, [500] * 8),
    ([3], [1000]),
]
DECODES = [  # streams and the length of each
    (1, 128),
    (1, 1000),
    (1, 2000),
    (1, 8000),
    (1, 32000),
    (8, 128),
    (8, 2000),
    (8, 8000),
    (32, 128),
    (32, 2000),
    (128, 500),
]
MEMORY = 256 << 20
"""Bytes that the caches of a decode's calls have together."""


def step(new: list[int], lengths: list[int]) -> StepInputs:
    per = -(-max(lengths) // BLOCK)
    tables = torch.randperm(per * len(new), dtype=torch.int32).reshape(len(new), per)
    return StepInputs.prefill(lengths, BLOCK, sizes=new, tables=tables)


def make_cache(inputs: StepInputs, shape: AttentionShape, dtype: torch.dtype) -> LayerCache:
    sizes = (inputs.block_tables.numel(), shape.num_kv_heads, BLOCK, shape.head_dim)
    ones = torch.ones(shape.num_kv_heads)
    return LayerCache(*(torch.randn(sizes).to(dtype) for _ in range(2)), ones, ones)


def seconds(q: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape, kernel: bool) -> list[float]:
    """Of a few calls, behind one that wakes the threads: in a step the layers before have done so."""
    taken = []
    with mock.patch.object(cpu_features, "has_dot_products", return_value=kernel):
        for _ in range(4):
            begin = time.perf_counter()
            cpu.paged_attention(q, inputs, cache, shape)
            taken.append(time.perf_counter() - begin)
    return taken[1:]


def prefill(new: list[int], lengths: list[int], cache_name: str, shape: AttentionShape, rounds: int) -> None:
    inputs = step(new, lengths)
    cache = make_cache(inputs, shape, CACHES[cache_name])
    q = torch.randn(sum(new), shape.num_heads, shape.head_dim).bfloat16()
    times: dict[bool, list[float]] = {True: [], False: []}
    if max(lengths) * max(new) > 1 << 25:  # a mask of so many floats
        del times[False]
    for _ in range(rounds):
        for kernel, taken in times.items():
            taken += seconds(q, inputs, cache, shape, kernel)
    ours = statistics.median(times[True])
    flop = sum(
        4 * shape.num_heads * shape.head_dim * n * (length - (n - 1) / 2)
        for n, length in zip(new, lengths, strict=True)
    )
    name = f"{len(new)} x {new[0]} new of {lengths[0]}, {cache_name}"
    line = f"{name:28s} {1e3 * ours:8.3f} ms, {flop / ours / 1e12:.2f} TFLOP/s"
    if False in times:
        torchs = statistics.median(times[False])
        line += f" | torch {1e3 * torchs:8.3f} ms | {torchs / ours:.1f}x"
    print(line, flush=True)


def decode(streams: int, length: int, cache_name: str, shape: AttentionShape, rounds: int) -> None:
    inputs = step([1] * streams, [length] * streams)
    first = make_cache(inputs, shape, CACHES[cache_name])
    size = first.key.nbytes + first.value.nbytes
    count = max(2, min(-(-MEMORY // size), 64))
    ones = torch.ones(shape.num_kv_heads)
    caches = [first] + [LayerCache(first.key.clone(), first.value.clone(), ones, ones) for _ in range(count - 1)]
    q = torch.randn(streams, shape.num_heads, shape.head_dim).bfloat16()
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for kernel, taken in times.items():
            with mock.patch.object(cpu_features, "has_dot_products", return_value=kernel):
                for cache in caches:
                    begin = time.perf_counter()
                    cpu.paged_attention(q, inputs, cache, shape)
                    taken.append(time.perf_counter() - begin)
    ours, others = (statistics.median(taken) for taken in times.values())
    name = f"{streams} x {length}, {cache_name}"
    speed = f"{1e3 * ours:8.3f} ms, {size / ours / 1e9:5.1f} GB/s"
    print(f"{name:28s} {speed} | in float32 {1e3 * others:8.3f} ms | {others / ours:.1f}x", flush=True)


def reading_speed() -> float:
    """Bytes a second that all threads read of memory, in the largest number of a large tensor."""
    source = torch.ones(MEMORY // 4, dtype=torch.int32)
    taken = []
    for _ in range(7):
        begin = time.perf_counter()
        source.max()
        taken.append(time.perf_counter() - begin)
    return MEMORY / statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="9,3,64", help="query heads, KV heads, head size")
    parser.add_argument("--cache", nargs="+", default=["bf16"], choices=CACHES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["prefill", "decode"])
    args = parser.parse_args()
    heads, kv_heads, dim = (int(n) for n in args.heads.split(","))
    shape = AttentionShape(heads, kv_heads, dim, dim**-0.5)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with torch.inference_mode():
        if args.only != "prefill":
            print(f"reading memory: {reading_speed() / 1e9:.1f} GB/s")
            for cache in args.cache:
                for streams, length in DECODES:
                    decode(streams, length, cache, shape, args.rounds)
        if args.only != "decode":
            for cache in args.cache:
                for new, lengths in PREFILLS:
                    prefill(new, lengths, cache, shape, args.rounds)


if __name__ == "__main__":
    main()
