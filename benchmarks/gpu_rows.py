"""Cases of the kernels between GEMMs: norms, activations, rotation and cache, rounding, sampling (rows 6 to 8)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from benchmarks.gpu_case import FEW_BITS, Bodies, Case, Goal, some_rows, spread
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.rope import rope
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.fp8.gpu.quantize import quantize
from octavo.kernels.norm.gpu.activation import silu_and_mul
from octavo.kernels.norm.gpu.embedding import embed
from octavo.kernels.norm.gpu.norm import norm
from octavo.kernels.sampling.gpu import draw as sampling

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
EAGER, SORTED = "eager chain", "sort and draw"
HIDDEN, INNER, VOCAB = 4096, 14336, 128256
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
EPS = 1e-5


def random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).bfloat16()


def codes_and_scale(tokens: int, width: int, group: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for what a kernel rounds."""
    codes = torch.empty(tokens, width, dtype=E4M3, device=device)
    return codes, torch.empty(tokens, width // group if group else 1, device=device)


def as_rounded(exact: Tensor, group: int) -> Tensor:
    """What e4m3 codes with a scale for each row or group make of exact numbers, in float64."""
    tokens, width = exact.shape
    groups = exact.float().reshape(tokens, -1, group or width)
    scale = groups.abs().amax(2, keepdim=True) / 448
    return ((groups / scale).to(E4M3).double() * scale.double()).reshape(tokens, width)


def eager_rounding(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    tokens, width = x.shape
    groups = x.float().reshape(tokens, -1, group or width)
    scale = groups.abs().amax(2, keepdim=True) / 448
    return (groups / scale).clamp(-448, 448).to(E4M3), scale


def decoded(outputs: list[Tensor], group: int) -> Tensor:
    codes, scale = outputs[-2:]
    return codes.double() * spread(scale, group or codes.shape[1])


def norm_case(tokens: int, width: int, group: int, parts: int, device: torch.device) -> Bodies:
    """residual + RMSNorm to e4m3; with parts, of that many partial sums."""
    x, residual = random(tokens, width, device=device), random(tokens, width, device=device)
    weight = torch.rand(width, device=device) + 0.5
    if parts > 1:
        x = torch.randn(parts, tokens, width, device=device)
    total, (codes, scale) = torch.empty_like(residual), codes_and_scale(tokens, width, group, device)
    rows, stock_weight = some_rows(tokens, device), weight.bfloat16()

    def run() -> list[Tensor]:
        norm(x, weight, EPS, codes, residual=residual, total=total, scale=scale, group_size=group)()
        return [total, codes, scale]

    def expected() -> list[Tensor]:
        of_gemm = x.double().sum(0).float().bfloat16() if parts > 1 else x
        summed = (of_gemm[rows].float() + residual[rows].float()).bfloat16().double()
        normed = summed / (summed.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()
        return [summed, as_rounded(normed, group)]

    def eager() -> object:
        summed = (x.sum(0).bfloat16() if parts > 1 else x) + residual
        return eager_rounding(F.rms_norm(summed, (width,), stock_weight, EPS), group)

    return Bodies(run, expected, {EAGER: eager}, lambda outputs: [outputs[0], decoded(outputs, group)], rows)


def silu_case(tokens: int, width: int, group: int, device: torch.device) -> Bodies:
    x, (codes, scale) = random(tokens, 2 * width, device=device), codes_and_scale(tokens, width, group, device)
    rows = some_rows(tokens, device)

    def run() -> list[Tensor]:
        silu_and_mul(x, codes, scale=scale, group_size=group)()
        return [codes, scale]

    def expected() -> list[Tensor]:
        gate, up = x[rows].double().chunk(2, 1)
        return [as_rounded(F.silu(gate) * up, group)]

    def eager() -> object:
        return eager_rounding(F.silu(x[:, :width]) * x[:, width:], group)

    return Bodies(run, expected, {EAGER: eager}, lambda outputs: [decoded(outputs, group)], rows)


def rounding_case(tokens: int, width: int, group: int, device: torch.device) -> Bodies:
    x, (codes, scale) = random(tokens, width, device=device), codes_and_scale(tokens, width, group, device)
    rows = some_rows(tokens, device)

    def run() -> list[Tensor]:
        quantize(x, codes, scale, group_size=group)()
        return [codes, scale]

    return Bodies(
        run,
        lambda: [as_rounded(x[rows].double(), group)],
        {EAGER: lambda: eager_rounding(x, group)},
        lambda outputs: [decoded(outputs, group)],
        rows,
    )


def embed_case(tokens: int, width: int, vocab: int, device: torch.device) -> Bodies:
    table = random(vocab, width, device=device)
    ids, out = torch.randint(vocab, (tokens,), device=device), torch.empty(tokens, width, dtype=BF16, device=device)
    rows = some_rows(tokens, device)

    def run() -> list[Tensor]:
        embed(ids, table, out)()
        return [out]

    return Bodies(run, lambda: [table[ids[rows]].double()], {EAGER: lambda: F.embedding(ids, table)}, rows=rows)


def eager_rope(qkv: Tensor, table: Tensor, at: Tensor, slots: Tensor, cache: LayerCache, heads: int) -> object:
    tokens, kv_heads, d = qkv.shape[0], cache.key.shape[1], cache.key.shape[3]
    q, k, v = qkv.view(tokens, -1, d).split([heads, kv_heads, kv_heads], 1)
    cos, sin = table[at][:, None].chunk(2, 2)

    def turned(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, 2)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], 2)

    block, offset = slots // BLOCK, slots % BLOCK
    for store, values, scale in ((cache.key, turned(k), cache.key_scale), (cache.value, v, cache.value_scale)):
        codes = (values / scale[:, None]).clamp(-448, 448).to(E4M3)
        store.view(torch.uint8)[block, :, offset] = codes.view(torch.uint8)
    return turned(q).bfloat16()


def rope_case(tokens: int, heads: int, kv_heads: int, d: int, device: torch.device) -> Bodies:
    qkv = random(tokens, (heads + 2 * kv_heads) * d, device=device)
    lengths = torch.randint(1, 4097, (tokens,))
    positions = (lengths - 1).to(device)
    angle = torch.arange(4096, device=device)[:, None] / 10000 ** (torch.arange(d // 2, device=device) / (d // 2))
    table = torch.cat([angle.cos(), angle.sin()], 1)
    blocks = -(-tokens // BLOCK) + 1
    slots = torch.randperm(blocks * BLOCK, device=device)[:tokens]
    key, value = (torch.zeros(blocks, kv_heads, BLOCK, d, device=device).to(E4M3) for _ in range(2))
    scales = [torch.full((kv_heads,), 0.02, device=device) for _ in range(2)]
    cache = LayerCache(key, value, *scales)
    shape = AttentionShape(heads, kv_heads, d, d**-0.5)
    q = torch.empty(tokens, heads, d, dtype=BF16, device=device)

    step = StepInputs.decode(lengths, BLOCK).to(device)
    step = replace(step, slot_mapping=slots)

    def timed() -> None:
        rope(qkv, step, cache, shape, table, None, None, EPS, q)()

    def run() -> list[Tensor]:
        timed()
        stored = [store[slots // BLOCK, :, slots % BLOCK] for store in (key.view(torch.uint8), value.view(torch.uint8))]
        return [q, *(codes.view(E4M3) for codes in stored)]

    def expected() -> list[Tensor]:
        parts = qkv.double().view(tokens, -1, d).split([heads, kv_heads, kv_heads], 1)
        cos, sin = table[positions].double()[:, None].chunk(2, 2)

        def turned(x: Tensor) -> Tensor:
            a, b = x.chunk(2, 2)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], 2)

        codes = [(x.float() / 0.02).clamp(-448, 448).to(E4M3).double() for x in (turned(parts[1]), parts[2])]
        return [turned(parts[0]), *codes]

    baselines = {EAGER: lambda: eager_rope(qkv, table, positions, slots, cache, heads)}
    return Bodies(run, expected, baselines, timed=timed)


def sampling_case(rows: int, vocab: int, device: torch.device) -> Bodies:
    """Top-p 0.9 at temperature 0.8; compared is whether the token is one that may be drawn."""
    logits = torch.randn(rows, vocab, device=device) * 3
    full = {"device": device}
    temperature, top_p, none = (
        torch.full((rows,), 0.8, **full),
        torch.full((rows,), 0.9, **full),
        torch.zeros(rows, **full),
    )
    top_k = torch.zeros(rows, dtype=torch.int64, **full)
    uniforms = torch.rand(rows, dtype=torch.float64, **full)

    def eager() -> object:
        share, order = (logits / 0.8).softmax(1).sort(1, descending=True)
        share = share * (share.cumsum(1) - share < 0.9)
        waits = torch.empty_like(share).exponential_()  # the shortest wait is a draw; multinomial would ask the host
        return order.gather(1, (share / waits).argmax(1, keepdim=True))

    def right(outputs: list[Tensor]) -> list[Tensor]:
        share, order = (logits.double() / 0.8).softmax(1).sort(1, descending=True)
        before = share.cumsum(1) - share
        place = (order == outputs[0][:, None]).double().argmax(1, keepdim=True)
        return [(before.gather(1, place) < 0.9 + 1e-6).double()]

    return Bodies(
        lambda: [sampling.draw(logits, temperature, top_k, top_p, none, uniforms)],
        lambda: [torch.ones(rows, 1, dtype=torch.float64, device=device)],
        {SORTED: eager},
        right,
    )  # fmt: skip


def cases(tiny: bool = False) -> list[Case]:
    """Rows 6 to 8, and what has no row: rounding alone, the embedding, sampling."""
    return [*_norms(tiny), *_activations(tiny), *_ropes(tiny), *_others(tiny)]


def _norms(tiny: bool) -> list[Case]:
    made = []
    for tokens, group, parts in ((1, 0, 1), (64, 0, 1), (64, 0, 4), (4096, 0, 1), (4096, 128, 1), (16384, 0, 1)):
        t, width = (min(tokens, 3), 256) if tiny else (tokens, HIDDEN)
        goals = (
            [Goal("copy", 0.8), Goal(EAGER, 2.5)] if tokens >= 4096 else [Goal("us", 3.5)] if parts == 1 else []
        )  # fmt: skip
        read = 4 * parts if parts > 1 else 2
        kind = f"norm to fp8{f' in groups of {group}' if group else ''}{f' of {parts} sums' if parts > 1 else ''}"
        made.append(
            Case(
                "6", kind, f"{t} tokens x {width}", t * width * (read + 5), 0,
                lambda device, a=(t, width, group, parts): norm_case(*a, device), FEW_BITS, tuple(goals),
                tokens in (64, 4096),
            )
        )  # fmt: skip
    return made


def _activations(tiny: bool) -> list[Case]:
    made = []
    for tokens, group in ((1, 0), (64, 0), (2048, 0), (2048, 128), (8192, 0)):
        t, width = (min(tokens, 3), 256) if tiny else (tokens, INNER)
        goals = [Goal("copy", 0.85), Goal(EAGER, 2.5)] if tokens >= 2048 else []
        made.append(
            Case(
                "7", f"silu to fp8{f' in groups of {group}' if group else ''}", f"{t} tokens x {width}",
                t * width * 5, 0,
                lambda device, a=(t, width, group): silu_case(*a, device), FEW_BITS, tuple(goals), tokens == 2048,
            )
        )  # fmt: skip
    return made


def _ropes(tiny: bool) -> list[Case]:
    made = []
    for tokens, goals in (
        (1, [Goal("us", 4.0), Goal(EAGER, 3.0)]),
        (64, [Goal("us", 4.0), Goal(EAGER, 3.0)]),
        (8192, [Goal("copy", 0.7), Goal(EAGER, 3.0)]),
    ):
        t = min(tokens, 3) if tiny else tokens
        heads, kv_heads, d = (4, 2, 32) if tiny else (HEADS, KV_HEADS, HEAD_DIM)
        num_bytes = t * d * (2 * (heads + 2 * kv_heads) + 2 * heads + 2 * kv_heads)
        made.append(
            Case(
                "8", "rope to an fp8 cache", f"{t} tokens, {heads} / {kv_heads} heads", num_bytes, 0,
                lambda device, a=(t, heads, kv_heads, d): rope_case(*a, device), FEW_BITS, tuple(goals), tokens != 1,
            )
        )  # fmt: skip
    return made


def _others(tiny: bool) -> list[Case]:
    width, inner, vocab = (256, 512, 2000) if tiny else (HIDDEN, INNER, VOCAB)
    made = []
    for tokens in (64, 4096):
        t = 3 if tiny else tokens
        for group in (0, 128):
            kind = f"rounding to fp8{f' in groups of {group}' if group else ''}"
            made.append(
                Case("-", kind, f"{t} tokens x {inner}", t * inner * 3, 0,
                     lambda device, a=(t, inner, group): rounding_case(*a, device), FEW_BITS, (Goal(EAGER, 1.0),))
            )  # fmt: skip
        made.append(
            Case("-", "embedding", f"{t} tokens x {width}", t * width * 4, 0,
                 lambda device, t=t: embed_case(t, width, vocab, device), goals=(Goal(EAGER, 1.0),))
        )  # fmt: skip
    for tokens in (1, 64, 256):
        t = min(tokens, 2) if tiny else tokens
        made.append(
            Case("-", "sampling, top-p", f"{t} rows of {vocab}", t * vocab * 4, 0,
                 lambda device, t=t: sampling_case(t, vocab, device), goals=(Goal(SORTED, 1.0),),
                 first=tokens == 64)
        )  # fmt: skip
    return made
