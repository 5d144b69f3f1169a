"""Milliseconds of one step of SmolLM2-135M's shape, by part, for every scheme: the model's cost without the engine.

Random weights, octavo's own linear layers and operators. Run on an idle machine:

    python benchmarks/cpu_step.py [--batch 1,8,32] [--context 128,1000] [--scheme bf16,W8A8] [--rival]

`--rival` runs a second process that wants 30 % of a core in slices of a millisecond, as the HTTP server does.
An earlier eager prototype on such a machine (2 cores) is the yardstick: int4 177-190 tok/s at 1 stream; at 32 streams
of 128 tokens bf16 822 and int8 871 tok/s.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.quant.linear import Linear, make_linear
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.scheme import CHANNEL, PRESETS, QuantScheme, WeightScheme, group
from octavo.quant.target import Target
from octavo.runtime.model.layers import AddNorm, Attention, DecoderLayer, GatedMlp
from octavo.runtime.model.operators import Ops
from octavo.runtime.model.select_operators import select_ops, warm_up

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, INTER, VOCAB = 30, 576, 9, 3, 64, 1536, 49152
BLOCK = 16
EPS = 1e-5
SHAPE = AttentionShape(HEADS, KV_HEADS, DIM, DIM**-0.5)
CPU = torch.device("cpu")
SCHEMES: dict[str, QuantScheme | None] = {
    "bf16": None,
    "W8A8": PRESETS["W8A8"],
    "W4A8": QuantScheme(WeightScheme("int4", group(64)), PRESETS["W4A8"].activation),
    "W8A16": QuantScheme(WeightScheme("int8", group(64))),
    "W4A16": QuantScheme(WeightScheme("int4", group(64))),
}
HEAD_SCHEMES: dict[str, QuantScheme | None] = {
    "bf16": None,
    "int8": PRESETS["W8A8"],
    "int8w": QuantScheme(WeightScheme("int8", CHANNEL)),
}


def random_weight(n: int, k: int, scheme: QuantScheme | None) -> QuantizedWeight | Tensor:
    """Numbers of the size that a trained layer has."""
    if scheme is None:
        return (torch.randn(n, k) * k**-0.5).bfloat16()
    low, high = scheme.weight.int_range
    codes = torch.randint(low, high + 1, (n, k), dtype=torch.int8)
    scale = torch.full(scheme.weight.granularity.scale_shape(n, k), k**-0.5 / high)
    return QuantizedWeight(scheme, codes, scale)


def layer(n: int, k: int, scheme: QuantScheme | None) -> Linear:
    return make_linear([random_weight(n, k, scheme)], [None], Target.of(CPU, torch.bfloat16))


@dataclass
class Clock:
    """Seconds by part of a step."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args)
            self.seconds[part] += time.perf_counter() - begin
            return result

        return run


@dataclass
class Stack:
    """A decoder's step over random weights, through the server's own layers."""

    ops: Ops
    layers: list[tuple[Linear, Linear, Linear, Linear]]
    head: Linear
    caches: list[LayerCache]
    embedding: Tensor
    cos_sin: Tensor
    norm: Tensor

    def steps(self, clock: Clock | None = None) -> Callable[[StepInputs], Tensor]:
        """A forward pass, each call of an operator or linear layer timed by the clock, if there is one."""
        ops = self.ops if clock is None else timed_ops(self.ops, clock)
        layers = [self._layer(ops, [timed_linear(x, clock) for x in linears]) for linears in self.layers]
        head = self.head.forward if clock is None else clock.timed("head", self.head.forward)

        def step(inputs: StepInputs) -> Tensor:
            residual = self.embedding[inputs.token_ids]
            hidden = layers[0].enter.norm(residual)
            for layer, cache in zip(layers, self.caches, strict=True):
                hidden, residual = layer.forward(hidden, residual, inputs, cache)
            return head(hidden[inputs.logits_index], inputs.of_rows(inputs.logits_index))

        return step

    def _layer(self, ops: Ops, linears: list[Linear]) -> DecoderLayer:
        qkv, out, gate_up, down = linears
        norm = AddNorm(ops, EPS, self.norm)
        attention = Attention(ops, EPS, qkv, out, SHAPE, self.cos_sin, None, None)
        return DecoderLayer(norm, attention, norm, GatedMlp(gate_up, down, ops.silu_and_mul), norm)


def timed_ops(ops: Ops, clock: Clock) -> Ops:
    small = {name: clock.timed("small", getattr(ops, name)) for name in ("add_rms_norm", "silu_and_mul")}
    return replace(ops, **small, rope_and_attention=clock.timed("attention", ops.rope_and_attention))


def timed_linear(linear: Linear, clock: Clock | None) -> Linear:
    if clock is None:
        return linear
    timed = copy.copy(linear)
    timed.partial = clock.timed("linears", linear.partial)
    return timed


def build(scheme: str, head: str, blocks: int) -> Stack:
    s = SCHEMES[scheme]
    shapes = (((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), (HIDDEN, HIDDEN), (2 * INTER, HIDDEN), (HIDDEN, INTER))
    layers = [tuple(layer(n, k, s) for n, k in shapes) for _ in range(LAYERS)]
    ones = torch.ones(KV_HEADS)
    caches = [
        LayerCache(*(torch.randn(blocks, KV_HEADS, BLOCK, DIM).bfloat16() for _ in range(2)), ones, ones)
        for _ in range(LAYERS)
    ]
    return Stack(
        ops=select_ops(CPU, torch.bfloat16),
        layers=layers,
        head=layer(VOCAB, HIDDEN, HEAD_SCHEMES[head]),
        caches=caches,
        embedding=torch.randn(VOCAB, HIDDEN).bfloat16(),
        cos_sin=torch.randn(2048, DIM),
        norm=torch.ones(HIDDEN),
    )


def decode_inputs(batch: int, context: int) -> StepInputs:
    return StepInputs.decode([context] * batch, BLOCK, token_ids=torch.randint(VOCAB, (batch,)))


def prefill_inputs(tokens: int) -> StepInputs:
    return StepInputs.prefill([tokens], BLOCK, token_ids=torch.randint(VOCAB, (tokens,)))


def measure(name: str, stack: Stack, inputs: StepInputs, seconds: float) -> None:
    """Median of whole steps, then the parts of further steps with clocks around each call."""
    step = stack.steps()
    with torch.inference_mode():
        step(inputs)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 3:
            begin = time.perf_counter()
            step(inputs)
            times.append(time.perf_counter() - begin)
        rounds = max(1, len(times) // 4)
        clock = Clock()
        timed_step = stack.steps(clock)
        begin = time.perf_counter()
        for _ in range(rounds):
            timed_step(inputs)
        other = time.perf_counter() - begin - sum(clock.seconds.values())
    whole, best = statistics.median(times), min(times)
    parts = "  ".join(f"{part} {1e3 * s / rounds:6.2f}" for part, s in (*clock.seconds.items(), ("python", other)))
    tokens = inputs.token_ids.numel()
    print(
        f"{name:44s} {1e3 * whole:8.2f} ms (best {1e3 * best:7.2f}) {tokens / whole:7.0f} tok/s | {parts}", flush=True
    )


@contextmanager
def rival(wanted: bool) -> Iterator[None]:
    """A second process busy for 0.3 ms in every millisecond."""
    process = multiprocessing.get_context("spawn").Process(target=_busy, daemon=True) if wanted else None
    if process:
        process.start()
    try:
        yield
    finally:
        if process:
            process.terminate()
            process.join()


def _busy() -> None:
    while True:
        end = time.perf_counter() + 0.0003
        while time.perf_counter() < end:
            pass
        time.sleep(0.0007)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default=",".join(SCHEMES))
    parser.add_argument("--head", default="int8")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--context", default="128,1000")
    parser.add_argument("--prefill", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.7, help="per row (default 0.7)")
    parser.add_argument("--rival", action="store_true", help="run a second process beside")
    args = parser.parse_args()
    batches = [int(b) for b in args.batch.split(",") if b]
    contexts = [int(c) for c in args.context.split(",")]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"kernels ready after {warm_up(CPU):.2f} s", flush=True)
    blocks = max(max(batches, default=1) * -(-max(contexts) // BLOCK), -(-args.prefill // BLOCK))
    with rival(args.rival):
        for scheme in args.scheme.split(","):
            for head in args.head.split(","):
                stack = build(scheme, head, blocks)
                for batch in batches:
                    for context in contexts:
                        name = f"{scheme}, head {head}, batch {batch}, context {context}"
                        measure(name, stack, decode_inputs(batch, context), args.seconds)
                if args.prefill:
                    measure(
                        f"{scheme}, head {head}, prefill {args.prefill}",
                        stack,
                        prefill_inputs(args.prefill),
                        args.seconds,
                    )


if __name__ == "__main__":
    main()
