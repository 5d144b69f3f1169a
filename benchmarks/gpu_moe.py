"""Cases of a mixture of experts in Qwen3-30B-A3B's sizes: steps of decoding and a prefill (row 11).

The stock chain is torch's: rows gathered by expert, two `_grouped_mm` with silu * up between, and each token's sum. Its
rows are sorted before the clock starts; octavo's time has the router, routing and sorting in it. And in
Qwen1.5-MoE-A2.7B's sizes, whose shared expert is run in slices with the others, beside those alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from benchmarks import shapes
from benchmarks.gpu_case import FEW_BITS, Bodies, Case, Goal, some_rows, spread, to_fp8, to_ints
from torch import Tensor

from octavo.kernels.gemm.gpu import packing
from octavo.kernels.moe.gpu.fused import Experts, Weights, fused_moe

CONFIG = shapes.CONFIGS["qwen3-30b-a3b"]
GROUPED, OUR_BF16, ALONE = "_grouped_mm chain, bf16", "octavo, bf16", "octavo, no shared expert"
GROUP = 128


@cache
def experts(num: int, n: int, k: int, kind: str, device: torch.device) -> tuple[Weights, Tensor]:
    """Weights as octavo's kernel reads them, and what they are as bf16 [E, N, K], or nearly. Kept: they are large."""
    w = (torch.randn(num, n, k, device=device) * 0.02).bfloat16()
    if kind == "bf16":
        return Experts(w), w
    if kind == "fp8":
        codes, scale = to_fp8(w.flatten(0, 1))
        dense = (codes.float() * scale).bfloat16()
        return Experts(codes.reshape(w.shape), scale.reshape(num, n)), dense.reshape(w.shape)
    if kind == "fp8 blocks":
        codes, scale = to_fp8(w.flatten(0, 1), GROUP, GROUP)
        wide = scale.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
        dense = (codes.float() * wide).bfloat16()
        return Experts(codes.reshape(w.shape), scale.reshape(num, n // GROUP, -1)), dense.reshape(w.shape)
    if kind == "w8a16":
        scale = w.float().unflatten(2, (-1, GROUP)).abs().amax(-1) / 127
        codes = (w.float() / scale.repeat_interleave(GROUP, 2)).round().to(torch.int8)
        packed = packing.stack([packing.pack(*of, None, GROUP, bits=8) for of in zip(codes, scale, strict=True)])
        return packed, packed.unpack().bfloat16()
    if kind == "int8":
        scale = w.float().abs().amax(-1) / 127
        codes = (w.float() / scale[..., None]).round().to(torch.int8)
        return Experts(codes, scale), (codes.float() * scale[..., None]).bfloat16()
    codes, scale = to_ints(w.flatten(0, 1), min(GROUP, k))
    parts = zip(codes.reshape(w.shape), scale.reshape(num, n, -1), strict=True)
    packed = packing.stack([packing.pack(*of, None, min(GROUP, k)) for of in parts], fp8=kind == "int4 fp8")
    return packed, packed.unpack().bfloat16()


def clear_tokens(tokens: int, num: int, top_k: int, hidden: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x [T, H] and a router [E, H], bf16: of twice as many tokens those of which it is clearest whom they choose."""
    x = torch.randn(2 * tokens, hidden, device=device).bfloat16()
    router = (torch.randn(num, hidden, device=device) / hidden**0.5).bfloat16()
    ordered = (x.double() @ router.double().T).sort(1, descending=True)[0]
    gaps = (ordered[:, :top_k] - ordered[:, 1 : top_k + 1]).amin(1)
    return x[gaps.topk(tokens)[1]], router


def chosen_of(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts [T, top_k] and their weights, in float64."""
    weights, chosen = logits.double().softmax(1).topk(top_k, 1)
    return chosen, weights / weights.sum(1, keepdim=True)


def between(weights: packing.PackedWords, begin: int, end: int) -> packing.PackedWords:
    """Some experts of those without zero points and act-order."""
    return replace(weights, words=weights.words[begin:end], scale=weights.scale[begin:end])


def of_expert(weights: Weights, e: int) -> Tensor:
    """Exactly what an expert's weights are, [N, K] in float64."""
    if not isinstance(weights, Experts):
        return between(weights, e, e + 1).unpack()[0].double()
    codes = weights.weight[e].double()
    if weights.scale is None:
        return codes
    return codes * (spread(weights.scale[e], GROUP, GROUP) if weights.blocks else weights.scale[e].double()[:, None])


def exact(x: Tensor, logits: Tensor, top_k: int, gate_up: Weights, down: Weights, kind: str, shared: int = 0) -> Tensor:
    """The mixture in float64, but for what is between the GEMMs, which is bf16; inputs rounded to e4m3 if they are.

    With a shared expert, in slices, its gate's logit is the last.
    """

    def quantize_input(t: Tensor) -> Tensor:
        if kind == "int8":
            step = t.float().abs().amax(1, keepdim=True) / 127.5
            return (t.float() / step).round().clamp(-128, 127).double() * step.double()
        if "fp8" not in kind:
            return t.double()
        width = GROUP if kind == "fp8 blocks" else t.shape[1]
        codes, scale = to_fp8(t, width)
        return codes.double() * scale.double().repeat_interleave(width, 1)

    def acted(x: Tensor, e: int) -> Tensor:
        gate, up = (x @ of_expert(gate_up, e).T).bfloat16().double().chunk(2, 1)
        return F.silu(gate) * up

    chosen, weights = chosen_of(logits[:, :-1] if shared else logits, top_k)
    out, x = torch.zeros_like(x, dtype=torch.float64), quantize_input(x)
    for e in chosen.unique().tolist():
        token, j = (chosen == e).nonzero(as_tuple=True)
        out.index_add_(0, token, quantize_input(acted(x[token], e)) @ of_expert(down, e).T * weights[token, j, None])
    if shared:
        behind = range(logits.shape[1] - 1, logits.shape[1] - 1 + shared)
        row = quantize_input(torch.cat([acted(x, e) for e in behind], 1))
        out += row @ torch.cat([of_expert(down, e) for e in behind], 1).T * logits[:, -1:].double().sigmoid()
    return out


def stock_chain(x: Tensor, logits: Tensor, top_k: int, gate_up: Tensor, down: Tensor):  # type: ignore[no-untyped-def]
    chosen, weights = chosen_of(logits, top_k)
    order = chosen.flatten().argsort()
    token, factor = order // top_k, weights.flatten()[order, None].bfloat16()
    ends = (chosen.flatten()[:, None] == torch.arange(len(gate_up), device=x.device)).sum(0).cumsum(0).int()

    def run() -> Tensor:
        gate, up = torch._grouped_mm(x[token], gate_up.mT, offs=ends).chunk(2, 1)
        pairs = torch._grouped_mm(F.silu(gate) * up, down.mT, offs=ends) * factor
        return torch.zeros_like(x).index_add_(0, token, pairs)

    return run


def mixture(tokens: int, kind: str, sizes: tuple[int, int, int, int], device: torch.device) -> Bodies:
    num, top_k, hidden, inner = sizes
    gate_up, dense_gate_up = experts(num, 2 * inner, hidden, kind, device)
    down, dense_down = experts(num, hidden, inner, kind, device)
    x, router = clear_tokens(tokens, num, top_k, hidden, device)
    logits, rows = x.double() @ router.double().T, some_rows(tokens, device, 64)
    baselines = {GROUPED: stock_chain(x, logits, top_k, dense_gate_up, dense_down)}
    if kind != "bf16":
        wide = Experts(dense_gate_up), Experts(dense_down)
        baselines[OUR_BF16] = lambda: fused_moe(x, router, top_k, *wide, normalize=True)
    return Bodies(
        run=lambda: [fused_moe(x, router, top_k, gate_up, down, normalize=True)],
        expected=lambda: [exact(x[rows], logits[rows], top_k, gate_up, down, kind)],
        baselines=baselines,
        rows=rows,
    )


def shared_mixture(tokens: int, kind: str, sizes: tuple[int, int, int, int, int], device: torch.device) -> Bodies:
    """Beside the same experts without the shared one: what that costs."""
    num, top_k, hidden, inner, shared = sizes
    gate_up, _ = experts(num + shared, 2 * inner, hidden, kind, device)
    down, _ = experts(num + shared, hidden, inner, kind, device)
    x, chooses = clear_tokens(tokens, num, top_k, hidden, device)
    router = torch.cat([chooses, (torch.randn(1, hidden, device=device) / hidden**0.5).bfloat16()])
    others, logits, rows = first(gate_up, num), x.double() @ router.double().T, some_rows(tokens, device, 64)
    return Bodies(
        run=lambda: [fused_moe(x, router, top_k, gate_up, down, normalize=True, shared=shared)],
        expected=lambda: [exact(x[rows], logits[rows], top_k, gate_up, down, kind, shared)],
        baselines={ALONE: lambda: fused_moe(x, chooses, top_k, others, first(down, num), normalize=True)},
        rows=rows,
    )


def first(weights: Weights, num: int) -> Weights:
    """The first experts."""
    if not isinstance(weights, Experts):
        return between(weights, 0, num)
    return Experts(weights.weight[:num], None if weights.scale is None else weights.scale[:num])


def shared_cases(tiny: bool) -> list[Case]:
    made = []
    num, top_k, hidden, inner, shared = (4, 2, 256, 128, 2) if tiny else (60, 4, 2048, 1408, 4)
    for tokens, kind in ((1, "bf16"), (16, "fp8"), (16, "int4"), (4096, "bf16")):
        t = min(tokens, 5) if tiny else tokens
        hit = shapes.experts_hit({"num_experts": num, "num_experts_per_tok": top_k}, t) + shared
        read = hit * 3 * hidden * inner * shapes.WEIGHT_BYTES[kind] + (2 * t + num) * hidden * 2
        made.append(
            Case(
                "11", f"mixture with a shared expert, {kind}", f"{t} tokens, {top_k} of {num} experts", int(read),
                2 * t * (top_k + shared) * 3 * hidden * inner,
                lambda device, a=(t, kind, (num, top_k, hidden, inner, shared)): shared_mixture(*a, device), FEW_BITS,
                (), False,
            )
        )  # fmt: skip
    return made


def cases(tiny: bool = False) -> list[Case]:
    """Row 11."""
    made = shared_cases(tiny)
    sizes = (
        CONFIG["num_experts"],
        CONFIG["num_experts_per_tok"],
        CONFIG["hidden_size"],
        CONFIG["moe_intermediate_size"],
    )
    num, top_k, hidden, inner = (4, 2, 256, 128) if tiny else sizes
    config = {"num_experts": num, "num_experts_per_tok": top_k}
    kinds = [(t, kind) for t in (1, 16, 128, 4096) for kind in ("bf16", "fp8", "int4")]
    kinds += [(t, kind) for kind in ("fp8 blocks", "int8") for t in (16, 4096)]
    for tokens, kind in [*kinds, (16, "int4 fp8"), (16, "w8a16")]:
        t = min(tokens, 5) if tiny else tokens
        read = shapes.experts_hit(config, t) * 3 * hidden * inner * shapes.WEIGHT_BYTES[kind.split()[0]]
        read += (2 * t + num) * hidden * 2
        goals = [Goal("copy", 0.55)] if 16 <= tokens <= 128 else []
        if tokens == 4096:
            than = {"bf16": 0.9, "fp8": 1.3, "fp8 blocks": 1.0, "int4": 0.7}
            goals = [Goal(GROUPED, than[kind])] if kind in than else []
        made.append(
            Case(
                "11", f"mixture, {kind}", f"{t} tokens, {top_k} of {num} experts", int(read),
                2 * t * top_k * 3 * hidden * inner,
                lambda device, a=(t, kind, (num, top_k, hidden, inner)): mixture(*a, device), FEW_BITS, tuple(goals),
                tokens in (16, 4096) and kind in ("bf16", "fp8"),
            )
        )  # fmt: skip
    return made
