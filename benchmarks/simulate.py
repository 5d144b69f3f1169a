"""What a GPU that isn't there would take, predicted: each case of kernels.py, and decode steps of shapes.py's models.

    PYTHONPATH=src python -m benchmarks.simulate [--models NAME,...] [--output FILE] [--measured DIR]

No measurement. Every launch is the one that octavo's decoder, or the case, makes, on `meta` tensors, compiled for sm_90
by tests/kernels/compile/ahead.py; its time is what `gpu_model` says of it, whose docstring has the model and its
assumptions. What a case's launches move and compute is derived in `gpu_launches`; what a step's do is written here.

With --measured, what kernels.py and gpu_step.py wrote there is compared with what is predicted for the same cases.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from benchmarks import gpu_launches, kernels, shapes
from benchmarks.gpu_attention import Sizes
from benchmarks.gpu_case import Case
from benchmarks.gpu_launches import habits
from benchmarks.gpu_model import COPY, Compiler, Resources, Work, predict
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu import decode as attention
from octavo.kernels.attention.gpu.arguments import Output
from octavo.kernels.attention.gpu.rope_decode import rope_decode
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.gemm.gpu.gemm_persistent import gemm_persistent
from octavo.kernels.gemm.gpu.gemm_swap_ab import gemm_packed, gemm_swap_ab
from octavo.kernels.gemm.gpu.packing import PackedWords
from octavo.kernels.launching import tuning
from octavo.kernels.launching.launch import Launch, cdiv
from octavo.kernels.moe.gpu import fused as moe
from octavo.kernels.norm.gpu.activation import silu_and_mul
from octavo.kernels.norm.gpu.embedding import embed
from octavo.kernels.norm.gpu.norm import norm
from octavo.kernels.quantized_activation import ActivationQuant, QuantizedActivation
from octavo.kernels.sampling.gpu import draw as sampling

Compiled = Callable[[Launch], Resources]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def gemm_work(name: str, weights: str, m: int, n: int, k: int) -> tuple[Work, int]:
    """A linear layer's kernel, and in how many parts of float32 sums it leaves its output; 0: in bf16."""
    flops = shapes.gemm_flops(max(m, 16), n, k)
    if weights == "bf16":
        return Work(name, None, shapes.gemm_bytes(m, n, k, 2.0, 2), flops, "bf16"), 0
    kind, x_bytes = ("fp8", 1) if weights == "fp8" else ("int4", 2)
    sizes = dict(tuning.choose(kind, m, n, k, torch.device("meta")))
    if sizes.pop("dequantize", 0):
        return Work(name, None, n * k * 4.5 + m * (n + k) * 2, flops, "bf16"), 0
    parts = sizes.pop("split_k")
    out = meta(parts, m, n) if parts > 1 else meta(m, n, dtype=BF16)
    num_bytes = shapes.gemm_bytes(m, n, k, shapes.WEIGHT_BYTES[weights], x_bytes, 4 * parts if parts > 1 else 2)
    if weights == "fp8":
        swap_ab = sizes.pop("swap_ab")
        x, w, scales = meta(m, k, dtype=E4M3), meta(n, k, dtype=E4M3), (meta(m, 1), meta(n))
        launch = (gemm_swap_ab if swap_ab else gemm_persistent)(x, w, *scales, out, **sizes)
    else:
        words, scale = meta(1, cdiv(k, 128), n, 32, dtype=torch.int16), meta(1, cdiv(k, 128), n, dtype=BF16)
        packed = PackedWords(words, scale, "4 bits", 128, k)
        launch = gemm_packed(meta(m, k, dtype=BF16), packed, out, **sizes)
    peak, h = "fp8" if weights == "fp8" else "bf16", habits(launch)
    flops = shapes.gemm_flops(m, n, k) * h.padding
    return Work(name, launch, num_bytes, flops, peak, turns=h.turns), parts if parts > 1 else 0


def summed(m: int, n: int, parts: int) -> Tensor:
    """What a GEMM has left for the next kernel."""
    return meta(parts, m, n) if parts else meta(m, n, dtype=BF16)


def read_bytes(m: int, n: int, parts: int) -> int:
    return m * n * (4 * parts if parts else 2)


def quantize_input(m: int, n: int, fp8: bool) -> tuple[Tensor, Tensor | None]:
    return (meta(m, n, dtype=E4M3), meta(m, 1)) if fp8 else (meta(m, n, dtype=BF16), None)


def norm_work(m: int, n: int, parts: int, fp8: bool, *, keeps_plain: bool = False, experts: int = 0) -> Work:
    """Of a GEMM's parts, or of what so many experts give a token."""
    out, scale = quantize_input(m, n, fp8)
    residual, plain = meta(m, n, dtype=BF16), meta(m, n, dtype=BF16) if keeps_plain and fp8 else None
    x = meta(m, experts, n, dtype=BF16).transpose(0, 1) if experts else summed(m, n, parts)
    launch = norm(x, meta(n), 1e-5, out, residual=residual, total=residual, scale=scale, plain=plain)
    num_bytes = x.nbytes + m * n * (4 + out.element_size()) + (0 if plain is None else plain.nbytes)
    return Work("norm", launch, num_bytes, near=True)


def silu_work(m: int, n: int, parts: int, fp8: bool) -> Work:
    out, scale = quantize_input(m, n, fp8)
    launch = silu_and_mul(summed(m, 2 * n, parts), out, scale=scale)
    return Work("silu", launch, read_bytes(m, 2 * n, parts) + m * n * out.element_size(), near=True)


def attention_work(
    sizes: Sizes, kv: str, qkv_parts: int, longest: int, qk_norm: bool = False, fp8: bool = False
) -> Work:
    """From qkv on, with the merge; longest: what the grid must hold, as in a CUDA graph.

    fp8: rows are rounded, too: read back out of L2 for that, twice.
    """
    s, kind = sizes, BF16 if kv == "bf16" else E4M3
    batch, group = s.sequences, s.heads // s.kv_heads
    shape = AttentionShape(s.heads, s.kv_heads, s.d, s.d**-0.5)
    stores = [meta(cdiv(longest, 16) * batch, s.kv_heads, 16, s.d, dtype=kind) for _ in range(2)]
    layer = LayerCache(*stores, meta(s.kv_heads), meta(s.kv_heads))
    step = StepInputs.decode([longest] * batch, 16).to(torch.device("meta"))
    q, width = meta(batch, s.heads, s.d, dtype=BF16), (s.heads + 2 * s.kv_heads) * s.d
    weight = meta(s.d) if qk_norm else None
    block = tuning.choose("paged decode", group, s.d, stores[0].element_size(), stores[0].device)
    programs = attention.split_count(
        longest, shape, min_split_tokens=block["min_split_tokens"], max_splits=block["max_splits"]
    )
    lse = meta(batch, s.kv_heads, programs, group)
    partial = meta(batch, s.kv_heads, programs, group, s.d)
    counters = meta(batch + 1, dtype=torch.int32)
    cached = batch * 2 * s.kv_heads * s.d * shapes.KV_BYTES[kv]
    num_bytes = s.length * cached + 2 * batch * s.heads * s.d
    rotation = (meta(longest, s.d), weight, weight, 1e-5)
    qkv, output = summed(batch, width, qkv_parts), Output(q, partial, lse, counters)
    input_quant = ActivationQuant(E4M3) if fp8 else None
    into = {"into": attention.quantized_rows(q, input_quant), "input_quant": input_quant}
    launch = rope_decode(qkv, step, layer, shape, *rotation, output, **into, **block)
    num_bytes += read_bytes(batch, width, qkv_parts) + cached + batch * s.heads * s.d * fp8
    h = habits(launch, length=s.length)
    flops = 4 * s.heads * s.d * s.length * batch * h.padding
    return Work("attention", launch, num_bytes + h.num_bytes, flops, "bf16", h.blocks, h.turns, h.trips)


def layer_works(config: shapes.Config, weights: str, kv: str, batch: int, context: int) -> list[Work]:
    """The launches of one layer of a decode step, as octavo's decoder makes them in a CUDA graph."""
    linear, fp8, hidden = shapes.linears(config), weights == "fp8", config["hidden_size"]
    heads, kv_heads, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    qkv, qkv_parts = gemm_work("qkv", weights, batch, *linear["qkv"])
    sizes = Sizes(batch, 1, context - 1, heads, kv_heads, d)
    qk_norm = config["model_type"].startswith("qwen3")
    works = [qkv, attention_work(sizes, kv, qkv_parts, max(2 * context, 8192), qk_norm, fp8)]
    o, o_parts = gemm_work("o", weights, batch, *linear["o"])
    works += [o, norm_work(batch, hidden, o_parts, fp8, keeps_plain=shapes.is_mixture(config))]
    if shapes.is_mixture(config):
        last = norm_work(batch, hidden, 0, fp8, experts=config["num_experts_per_tok"])
        return [*works, *mixture_works(config, weights, batch), last]
    gate_up, parts = gemm_work("gate_up", weights, batch, *linear["gate_up"])
    down, down_parts = gemm_work("down", weights, batch, *linear["down"])
    inner = linear["down"][1]
    return [*works, gate_up, silu_work(batch, inner, parts, fp8), down, norm_work(batch, hidden, down_parts, fp8)]


def mixture_works(config: shapes.Config, weights: str, batch: int) -> list[Work]:
    """Routing and sorting in one launch (with many tokens a GEMM of the library's and two), and the experts."""
    num, top_k = config["num_experts"], config["num_experts_per_tok"]
    (width, hidden), inner = shapes.linears(config)["gate_up"], config["moe_intermediate_size"]

    def experts(n: int, k: int) -> moe.Weights:
        if weights == "int4":
            words = meta(num, cdiv(k, 128), n, 32, dtype=torch.int16)
            return PackedWords(words, meta(num, cdiv(k, 128), n, dtype=BF16), "4 bits", 128, k)
        return (
            moe.Experts(meta(num, n, k, dtype=E4M3), meta(num, n))
            if weights == "fp8"
            else moe.Experts(meta(num, n, k, dtype=BF16))
        )

    codes, scale = quantize_input(batch, hidden, weights == "fp8")
    x = codes if scale is None else QuantizedActivation(codes, scale, meta(batch, hidden, dtype=BF16))
    results, router = meta(batch * top_k, hidden, dtype=BF16), meta(num, hidden, dtype=BF16)
    steps = moe.launches(x, router, top_k, experts(width, hidden), experts(hidden, inner), results, normalize=True)
    hit, pairs, read = shapes.experts_hit(config, batch), batch * top_k, router.nbytes + batch * hidden * 2
    works: list[Work] = []
    sizes, gemms = {width: hidden, hidden: inner}, 0
    for launch in steps:
        name, h = launch.kernel.__name__.strip("_"), habits(launch, hit)
        if name == "router":
            works.append(Work(name, launch, read + h.num_bytes, turns=h.turns, trips=h.trips, near=h.near))
        elif name == "route":
            works += [Work("router", None, read), Work(name, launch, batch * num * 4, near=True)]
        elif name == "gemm_swap_ab":
            n, k = ((width, hidden), (hidden, inner))[gemms]
            gemms += 1
            num_bytes = hit * n * k * shapes.WEIGHT_BYTES[weights] + pairs * (2 * n + sizes[n] * 2)
            flops, peak = shapes.gemm_flops(pairs, n, k) * h.padding, "fp8" if weights == "fp8" else "bf16"
            works.append(Work(f"experts {n} x {k}", launch, num_bytes, flops, peak, h.blocks, h.turns, h.trips))
        else:
            works.append(Work(name, launch, pairs * (width + hidden) * 2, near=True))
    return works


def end_works(config: shapes.Config, batch: int, greedy: bool = False) -> list[Work]:
    """What comes once in a step: embedding and first norm, the head, and tokens: drawn, or the library's argmax."""
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    whole, logits = meta(batch, dtype=torch.int64), 4 * batch * vocab
    first = embed(whole, meta(vocab, hidden, dtype=BF16), meta(batch, hidden, dtype=BF16))
    flops = shapes.gemm_flops(batch, vocab, hidden)
    return [
        Work("embedding", first, 4 * batch * hidden),
        norm_work(batch, hidden, 0, False),
        Work("head", None, shapes.head_bytes(config) + logits, flops, "bf16"),
        *([Work("argmax", None, logits, near=True)] if greedy else drawing_works(batch, vocab)),
    ]


def drawing_works(batch: int, vocab: int) -> list[Work]:
    """Tokens drawn with top-p."""
    row, whole = meta(batch), meta(batch, dtype=torch.int64)
    memory = sampling.scratch(batch, vocab, "meta")
    *passes, choose = sampling.launches(
        meta(batch, vocab), row, whole, row, row, meta(batch, dtype=torch.float64), whole, memory
    )
    return [
        *(Work(launch.kernel.__name__.strip("_"), launch, 4 * batch * vocab, near=True) for launch in passes),
        Work("choose", choose, 2 * batch * vocab, trips=habits(choose).trips, near=True),
    ]


@dataclass(frozen=True)
class Step:
    """A predicted decode step, in milliseconds."""

    limit: float
    ms: float
    overhead: float
    launches: int


def step(
    config: shapes.Config, weights: str, kv: str, batch: int, context: int, compiled: Compiled, *, greedy: bool = False
) -> Step:
    layer = [predict(work, compiled) for work in layer_works(config, weights, kv, batch, context)]
    end = [predict(work, compiled) for work in end_works(config, batch, greedy)]
    layers = config["num_hidden_layers"]
    each = layers * sum(p.seconds for p in layer) + sum(p.seconds for p in end)
    overhead = layers * sum(p.overhead for p in layer) + sum(p.overhead for p in end)
    limit = shapes.step_bytes(config, weights, kv, batch, context) / COPY
    return Step(1e3 * limit, 1e3 * each, 1e3 * overhead, layers * len(layer) + len(end))


def step_table(name: str, compiled: Compiled, batches: tuple[int, ...], contexts: tuple[int, ...]) -> list[str]:
    config = shapes.CONFIGS[name]
    lines = ["", f"## {name}: a decode step, predicted", ""]
    lines += [
        "| weights, KV | context | batch | limit, ms | predicted, ms | gaps and latency, ms | launches | tok/s | "
        "of the limit |"
    ]
    lines += ["|---" * 9 + "|"]
    for weights, kv in (("bf16", "bf16"), ("fp8", "bf16"), ("fp8", "fp8"), ("int4", "bf16"), ("int4", "fp8")):
        for context in contexts:
            for batch in batches:
                held = (
                    shapes.streamed_bytes(config, weights)
                    + shapes.step_bytes(config, weights, kv, batch, context)
                    - shapes.streamed_bytes(config, weights, batch)
                )
                if held > 76e9:
                    continue  # more than the card has
                s = step(config, weights, kv, batch, context, compiled)
                lines.append(
                    f"| {weights}, {kv} | {context} | {batch} | {s.limit:.2f} | {s.ms:.2f} | {s.overhead:.2f} | "
                    f"{s.launches} | {1e3 * batch / s.ms:.0f} | {s.limit / s.ms:.0%} |"
                )
    return lines


def kernel_table(name: str, weights: str, kv: str, batch: int, context: int, compiled: Compiled) -> list[str]:
    lines = [
        "",
        f"## {name}, {weights} weights, {kv} KV: a layer's kernels at batch {batch}, context {context}, predicted",
        "",
    ]
    lines += [
        "| kernel | MB | limit, us | predicted, us | bound by | registers | shared, KiB | blocks an SM | waves |",
        "|---" * 9 + "|",
    ]
    for work in layer_works(shapes.CONFIGS[name], weights, kv, batch, context):
        p = predict(work, compiled)
        made = p.resources
        compiled_cells = (
            f"{made.registers} | {made.shared / 1024:.0f} | {p.resident} | {p.waves:.2f}" if made else "library | | |"
        )
        limit = 1e6 * work.num_bytes / COPY
        lines.append(
            f"| {work.name} | {work.num_bytes / 1e6:.2f} | {limit:.1f} | {1e6 * p.seconds:.1f} | {p.bound} | "
            f"{compiled_cells} |"
        )
    return lines


def predicted(case: Case, compiled: Compiled) -> tuple[float, str, int]:
    """Microseconds of a case of kernels.py, what bounds the longest of its launches, and how many there are."""
    works = gpu_launches.works(case)
    parts = [predict(work, compiled) for work in works]
    longest, work = max(zip(parts, works, strict=True), key=lambda pair: pair[0].seconds)
    bound = longest.bound if len(parts) == 1 else f"{work.name}: {longest.bound}"
    return 1e6 * sum(part.seconds for part in parts), bound, len(parts)


def case_table(compiled: Compiled) -> list[str]:
    lines = ["", "## Kernel cases, predicted", ""]
    lines += ["| case | MB | limit, us | predicted, us | launches | bound by |", "|---" * 6 + "|"]
    for case in kernels.every_case():
        us, bound, launches = predicted(case, compiled)
        megabytes, limit = case.num_bytes / 1e6, 1e6 * case.num_bytes / COPY
        lines.append(f"| {case.name} | {megabytes:.2f} | {limit:.1f} | {us:.1f} | {launches} | {bound} |")
    return lines


def of_kernels(results: dict[str, Any], compiled: Compiled) -> Iterator[tuple[str, float, float]]:
    """Name, predicted and measured microseconds of what kernels.py wrote."""
    cases = {case.name: case for case in kernels.every_case()}
    for result in results["results"]:
        name = f"{result['row']} {result['kernel']}, {result['shape']}"
        if result["us"] and not result["failure"] and name in cases:
            yield name, predicted(cases[name], compiled)[0], result["us"]


def of_steps(results: dict[str, Any], compiled: Compiled) -> Iterator[tuple[str, float, float]]:
    """The same of gpu_step.py's decode steps, with the greedy choice behind them."""
    weights, kv = results["weights"], results["kv"]
    for record in results["records"] if weights in ("bf16", "fp8", "int4") else ():
        if "sampling" in record and "failure" not in record:
            batch, context = record["batch"], record["context"]
            whole = step(shapes.CONFIGS[results["model"]], weights, kv, batch, context, compiled, greedy=True)
            name = f"step, {weights}, {kv} KV, {batch} sequences of {context}"
            yield name, 1e3 * whole.ms, 1e3 * (record["forward"] + record["sampling"])


def errors(directory: Path, compiled: Compiled) -> list[str]:
    """Predicted against measured, for every table of an H100's that kernels.py and gpu_step.py wrote there."""
    lines: list[str] = []
    for path in sorted([*directory.glob("kernels-*.json"), *directory.glob("gpu_step-*.json")]):
        pairs = of_kernels if path.name.startswith("kernels") else of_steps
        results = json.loads(path.read_text())
        card = results["facts"].get("card", "no GPU")
        if tuning.stem(card) != tuning.WITHOUT_GPU:
            lines += ["", f"{path.name} isn't compared: it is of {card}, and an H100 is predicted."]
            continue
        found = list(pairs(results, compiled))
        if found:
            ratios = [predicted / us for _, predicted, us in found]
            lines += ["", f"## Predicted and measured ({path.name})", ""]
            lines += ["| kernel | predicted, us | measured, us | ratio |", "|---|---|---|---|"]
            lines += [
                f"| {name} | {predicted:.1f} | {us:.1f} | {predicted / us:.2f} |" for name, predicted, us in found
            ]
            lines += ["", f"Median ratio {median(ratios):.2f}; median error {median(abs(r - 1) for r in ratios):.0%}."]
    return lines


def numbers(flag: str) -> tuple[int, ...]:
    return tuple(int(word) for word in flag.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(shapes.CONFIGS), help="names of shapes.py")
    parser.add_argument("--batches", default="1,8,32,128,256")
    parser.add_argument("--contexts", default="1024,4096")
    parser.add_argument("--measured", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--compiled", type=Path, help="a file that keeps what the compiler said")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    compiled = Compiler(args.compiled)
    lines = ["# Predicted times on an H100: no measurement", ""]
    lines += [
        "Out of bytes, FLOPs, launches and what the compiler made of each launch; the model and its assumptions are in"
    ]
    lines += [f"benchmarks/gpu_model.py, of cases in gpu_launches.py. Triton {triton.__version__}."]
    lines += [f"Limit: bytes over {COPY / 1e12:.1f} TB/s."]
    for weights, kv, batch in (("fp8", "fp8", 1), ("fp8", "fp8", 32), ("int4", "fp8", 1), ("int4", "fp8", 32)):
        lines += kernel_table(args.models.split(",")[0], weights, kv, batch, 1024, compiled)
    lines += case_table(compiled)
    for name in args.models.split(","):
        lines += step_table(name, compiled, numbers(args.batches), numbers(args.contexts))
    lines += errors(args.measured, compiled)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
