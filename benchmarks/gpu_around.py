"""Cases of what else is launched around GEMMs: gathering columns, decoding a weight to memory, adding up partial sums,
a mixture's routing, sorting and summing, penalties. None has a row in the plan's table of goals.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from benchmarks.gpu_case import EXACT, Bodies, Case, Goal, some_rows
from benchmarks.gpu_gemms import GROUP, int_weight
from benchmarks.gpu_moe import CONFIG, chosen_of, clear_tokens
from torch import Tensor

from octavo.kernels.int4.gpu.dequantize import dequantize
from octavo.kernels.int4.gpu.permute_columns import gather
from octavo.kernels.moe.gpu import fused
from octavo.kernels.moe.gpu.route import align, route, unaligned
from octavo.kernels.moe.gpu.router import routing
from octavo.kernels.norm.gpu.split_k_sum import split_k_sum
from octavo.kernels.sampling.gpu.change import punish

BF16 = torch.bfloat16
EAGER = "eager chain"


def gather_case(tokens: int, width: int, device: torch.device) -> Bodies:
    x, order = torch.randn(tokens, width, device=device).bfloat16(), torch.randperm(width, device=device)
    out, short = torch.empty_like(x), order.int()

    def run() -> list[Tensor]:
        gather(x, short, out)()
        return [out]

    return Bodies(run, lambda: [x.double()[:, order]], {EAGER: lambda: x.index_select(1, order)})


def dequantize_case(n: int, k: int, device: torch.device) -> Bodies:
    weight = int_weight((torch.randn(n, k, device=device) * 0.02).bfloat16())
    out, rows = torch.empty(n, k, dtype=BF16, device=device), some_rows(n, device)

    def run() -> list[Tensor]:
        dequantize(weight.packed, out)()
        return [out]

    def eager() -> object:
        return (weight.codes.reshape(n, -1, GROUP) * weight.scale[:, :, None]).reshape(n, k)

    return Bodies(run, lambda: [weight.exact()[rows]], {EAGER: eager}, rows=rows)


def add_up_case(parts: int, tokens: int, width: int, device: torch.device) -> Bodies:
    sums, out = torch.randn(parts, tokens, width, device=device), torch.empty(tokens, width, dtype=BF16, device=device)

    def run() -> list[Tensor]:
        split_k_sum(sums, out)()
        return [out]

    return Bodies(run, lambda: [sums.double().sum(0)], {EAGER: lambda: sums.sum(0).bfloat16()})


def route_case(tokens: int, experts: int, top_k: int, device: torch.device) -> Bodies:
    logits = torch.randn(tokens, experts, device=device)
    chosen = torch.empty(tokens, top_k, dtype=torch.int32, device=device)
    weights = torch.empty(tokens, top_k, device=device)

    def run() -> list[Tensor]:
        route(logits, chosen, weights, normalize=True)()
        return [chosen, weights]

    def expected() -> list[Tensor]:
        share, best = logits.double().softmax(1).topk(top_k, 1)
        return [best.double(), share / share.sum(1, keepdim=True)]

    def eager() -> object:
        share, best = logits.softmax(1).topk(top_k, 1)
        return best, share / share.sum(1, keepdim=True)

    return Bodies(run, expected, {EAGER: eager})


def used_pairs(order: Tensor, tile_expert: Tensor, num_pairs: int) -> Tensor:
    """The pairs as they are sorted, in tiles of 16."""
    used = order[:-1].reshape(-1, 16)[tile_expert >= 0].flatten()
    return used[used < num_pairs]


def align_case(tokens: int, experts: int, top_k: int, device: torch.device) -> Bodies:
    chosen = torch.rand(tokens, experts, device=device).topk(top_k, 1)[1].int()
    pairs, flat = unaligned(tokens * top_k, experts, 16, device), chosen.flatten()

    def run() -> list[Tensor]:
        align(chosen, experts, pairs)()
        return [pairs.order, pairs.tile_expert]

    def eager() -> object:
        return flat.argsort(stable=True), torch.zeros(experts, device=device).index_add_(
            0, flat, torch.ones_like(flat) * 1.0
        )

    return Bodies(
        run, lambda: [flat.argsort(stable=True).double()], {EAGER: eager},
        lambda outputs: [used_pairs(*outputs, len(flat))],
    )  # fmt: skip


def router_case(tokens: int, experts: int, top_k: int, hidden: int, device: torch.device) -> Bodies:
    """As a decode step has it: from a token's row to sorted pairs."""
    x, router = clear_tokens(tokens, experts, top_k, hidden, device)
    chosen = torch.empty(tokens, top_k, dtype=torch.int32, device=device)
    weights = torch.empty(tokens, top_k, device=device)
    pairs = unaligned(tokens * top_k, experts, 16, device)

    def run() -> list[Tensor]:
        for launch in routing(x, router, chosen, weights, pairs, normalize=True):
            launch()
        return [chosen, weights, pairs.order, pairs.tile_expert]

    def values(outputs: list[Tensor]) -> list[Tensor]:
        return [*outputs[:2], used_pairs(*outputs[2:], tokens * top_k)]

    def expected() -> list[Tensor]:
        best, share = chosen_of(x.double() @ router.double().T, top_k)
        return [best.double(), share, best.flatten().argsort(stable=True).double()]

    def eager() -> object:
        best, share = chosen_of(torch.nn.functional.linear(x, router), top_k)
        return best.flatten().argsort(stable=True), share, best.flatten().bincount(minlength=experts)

    return Bodies(run, expected, {EAGER: eager}, values)


def sum_case(tokens: int, width: int, top_k: int, device: torch.device) -> Bodies:
    pairs = torch.randn(tokens * top_k, width, device=device).bfloat16()
    out = torch.empty(tokens, width, dtype=BF16, device=device)

    def run() -> list[Tensor]:
        fused.sum_experts(pairs, out, top_k)()
        return [out]

    each = pairs.view(tokens, top_k, width)
    return Bodies(run, lambda: [each.double().sum(1)], {EAGER: lambda: each.sum(1)})


def penalties_case(rows: int, entries: int, vocab: int, device: torch.device) -> Bodies:
    """Each row has `entries` tokens that occurred; what is timed changes the logits again and again."""
    start = torch.randn(rows, vocab, device=device)
    tokens = torch.rand(rows, vocab, device=device).topk(entries, 1)[1]
    row = torch.arange(rows, device=device)[:, None].expand(rows, entries).flatten()
    counts, factor, part = (
        torch.ones_like(row),
        torch.full((rows,), 1.1, device=device),
        torch.full((rows,), 0.5, device=device),
    )
    logits = start.clone()

    def timed() -> None:
        punish(logits, row, tokens.flatten(), counts, factor, part, part)()

    def run() -> list[Tensor]:
        logits.copy_(start)
        timed()
        return [logits]

    def expected() -> list[Tensor]:
        old = start.double().gather(1, tokens)
        return [start.double().scatter(1, tokens, torch.where(old > 0, old / 1.1, old * 1.1) - 1.0)]

    def eager() -> object:
        old = logits.gather(1, tokens)
        return logits.scatter_(1, tokens, torch.where(old > 0, old / 1.1, old * 1.1) - 1.0)

    return Bodies(run, expected, {EAGER: eager}, timed=timed)


def cases(tiny: bool = False) -> list[Case]:
    tokens, hidden, inner, vocab = (3, 256, 512, 2000) if tiny else (64, 4096, 14336, 128256)
    experts, top_k, width, entries = (8, 2, 256, 5) if tiny else (128, 8, CONFIG["hidden_size"], 300)
    pairs = tokens * top_k
    found: dict[str, tuple[str, int, Callable[[torch.device], Bodies]]] = {
        "gathered columns": (
            f"{tokens} tokens x {inner}", tokens * inner * 4, lambda device: gather_case(tokens, inner, device)
        ),
        "int4 to bf16": (
            f"{hidden} x {inner}", hidden * inner * 5 // 2, lambda device: dequantize_case(hidden, inner, device)
        ),
        "partial sums": (
            f"4 x {tokens} tokens x {hidden}", tokens * hidden * 18,
            lambda device: add_up_case(4, tokens, hidden, device),
        ),
        "routing": (
            f"{tokens} tokens, {top_k} of {experts} experts", tokens * experts * 4 + pairs * 8,
            lambda device: route_case(tokens, experts, top_k, device),
        ),
        "router, routing and pairs": (
            f"{tokens} tokens, {top_k} of {experts} experts", (experts + tokens) * width * 2,
            lambda device: router_case(tokens, experts, top_k, width, device),
        ),
        "pairs by expert": (
            f"{tokens} tokens, {top_k} of {experts} experts", pairs * 8,
            lambda device: align_case(tokens, experts, top_k, device),
        ),
        "experts' sum": (
            f"{tokens} tokens x {hidden}", (pairs + tokens) * hidden * 2,
            lambda device: sum_case(tokens, hidden, top_k, device),
        ),
        "penalties": (
            f"{tokens} rows of {vocab}, {entries} tokens each", tokens * entries * 80,
            lambda device: penalties_case(tokens, entries, vocab, device),
        ),
    }  # fmt: skip
    return [
        Case("-", kernel, shape, num_bytes, 0, make, EXACT, (Goal(EAGER, 1.0),))
        for kernel, (shape, num_bytes, make) in found.items()
    ]
