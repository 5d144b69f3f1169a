"""Cases of attention over a paged cache: steps of decoding, and prompts in chunks on a prefix (rows 9 and 10)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from benchmarks import shapes
from benchmarks.gpu_case import FEW_BITS, Bodies, Case, Goal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.kernels.attention import reference
from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.decode import decode_attention
from octavo.kernels.attention.gpu.prefill import paged_attention
from octavo.kernels.attention.gpu.rope import rope_and_cache
from octavo.kernels.attention.gpu.rope_decode import rope_and_attention
from octavo.kernels.attention.step import StepInputs

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
BLOCK = 16
KINDS = {"bf16": BF16, "fp8": E4M3}
DENSE, FLASH, CUDNN = "SDPA bf16, dense", "SDPA flash", "SDPA cudnn"
OUR_BF16 = "octavo, bf16 cache"
IN_TWO = "octavo, two launches"
SCALE = 0.02  # of an 8-bit cache


@dataclass(frozen=True)
class Sizes:
    """sequences of `queries` new tokens behind `prefix` cached ones."""

    sequences: int
    queries: int
    prefix: int
    heads: int
    kv_heads: int
    d: int

    @property
    def length(self) -> int:
        return self.prefix + self.queries


def paged(sizes: Sizes, kind: str, device: torch.device) -> tuple[Tensor, StepInputs, LayerCache, AttentionShape]:
    """Random queries, and a cache of random keys and values in blocks of random order."""
    s, blocks = sizes, -(-sizes.length // BLOCK)
    tables = torch.randperm(s.sequences * blocks, device=device).reshape(s.sequences, blocks).int()
    tokens = s.sequences * s.queries
    positions = (torch.arange(s.queries, device=device) + s.prefix).repeat(s.sequences)
    of = torch.arange(s.sequences, device=device).repeat_interleave(s.queries)
    slots = tables[of, positions // BLOCK].long() * BLOCK + positions % BLOCK
    inputs = StepInputs(
        positions, positions, slots, tables, torch.full((s.sequences,), s.length, dtype=torch.int32, device=device),
        torch.arange(s.sequences + 1, device=device).int() * s.queries, of, s.queries, s.length,
    )  # fmt: skip
    shape, factor = (s.sequences * blocks, s.kv_heads, BLOCK, s.d), SCALE if kind == "fp8" else 1.0
    stores = [(torch.randn(shape, device=device, dtype=BF16) / factor).to(KINDS[kind]) for _ in range(2)]
    scales = [torch.full((s.kv_heads,), factor, device=device) for _ in range(2)]
    q = torch.randn(tokens, s.heads, s.d, device=device).bfloat16()
    return q, inputs, LayerCache(*stores, *scales), AttentionShape(s.heads, s.kv_heads, s.d, s.d**-0.5)


def some_of(count: int, device: torch.device, most: int = 24) -> Tensor:
    """Queries to compare: the first, the last, and some between."""
    return torch.linspace(0, count - 1, min(most, count), device=device).round().long().unique()


def exact(q: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape, rows: Tensor) -> Tensor:
    """Attention of the rows' queries [R, Hq * D] in float64."""
    outputs = []
    group = shape.num_heads // shape.num_kv_heads
    for row in rows.tolist():
        sequence = int(torch.searchsorted(inputs.query_starts, row, right=True)) - 1
        first, end = (int(inputs.query_starts[sequence + i]) for i in range(2))
        seen = int(inputs.seq_lens[sequence]) - (end - 1 - row)
        blocks = inputs.block_tables[sequence, : -(-seen // BLOCK)].long()
        assert row >= first
        k, v = (
            (t[blocks].transpose(1, 2).flatten(0, 1)[:seen].double() * s[:, None].double()).repeat_interleave(group, 1)
            for t, s in ((cache.key, cache.key_scale), (cache.value, cache.value_scale))
        )
        weights = (torch.einsum("hd,khd->hk", q[row].double(), k) * shape.scale).softmax(1)
        outputs.append(torch.einsum("hk,khd->hd", weights, v).flatten())
    return torch.stack(outputs)


def decode_case(sizes: Sizes, kind: str, device: torch.device) -> Bodies:
    q, inputs, cache, shape = paged(sizes, kind, device)
    rows = some_of(sizes.sequences, device, 8)
    s = sizes
    dense = [torch.randn(s.sequences, s.kv_heads, s.length, s.d, device=device, dtype=BF16) for _ in range(2)]
    queries = q[:, :, None].contiguous()

    def run() -> list[Tensor]:
        out = torch.empty_like(q)
        decode_attention(q, inputs, cache, shape, out)
        return [out.flatten(1)]

    def stock() -> object:
        return F.scaled_dot_product_attention(queries, *dense, enable_gqa=True)

    baselines = {DENSE: stock}
    if kind == "fp8":
        wide = paged(sizes, "bf16", device)
        baselines[OUR_BF16] = lambda: decode_attention(*wide, torch.empty_like(q))
    return Bodies(run, lambda: [exact(q, inputs, cache, shape, rows)], baselines, rows=rows)


def rope_and_decode_case(sizes: Sizes, kind: str, device: torch.device, norms: bool = False) -> Bodies:
    """Beside the same in two launches; norms are over all heads. Each run writes the new keys and values again."""
    _, inputs, cache, shape = paged(sizes, kind, device)
    s, rows = sizes, some_of(sizes.sequences, device, 8)
    qkv = torch.randn(s.sequences, (s.heads + 2 * s.kv_heads) * s.d, device=device).bfloat16()
    angle = torch.arange(s.length, device=device)[:, None] / 500000 ** (torch.arange(s.d // 2, device=device) * 2 / s.d)
    weights = [torch.rand(heads * s.d, device=device) if norms else None for heads in (s.heads, s.kv_heads)]
    rotation = (torch.cat([angle.cos(), angle.sin()], 1), *weights, 1e-5)

    def expected() -> list[Tensor]:
        turned = reference.rope_and_cache(qkv.float(), inputs, cache, shape, *rotation)
        return [exact(turned, inputs, cache, shape, rows)]

    def in_two() -> object:
        return paged_attention(rope_and_cache(qkv, inputs, cache, shape, *rotation), inputs, cache, shape)

    return Bodies(
        lambda: [rope_and_attention(qkv, inputs, cache, shape, *rotation)], expected, {IN_TWO: in_two}, rows=rows
    )


def prefill_case(sizes: Sizes, kind: str, device: torch.device) -> Bodies:
    q, inputs, cache, shape = paged(sizes, kind, device)
    rows, s = some_of(q.shape[0], device), sizes
    baselines = {}
    if not s.prefix:  # behind one the mask would have to be given, which the stock operator's fast bodies don't take
        dense = [torch.randn(s.sequences, s.heads, s.queries, s.d, device=device, dtype=BF16) for _ in range(3)]

        def stock(backend: SDPBackend) -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*dense, is_causal=True)

        baselines = {
            FLASH: lambda: stock(SDPBackend.FLASH_ATTENTION),
            CUDNN: lambda: stock(SDPBackend.CUDNN_ATTENTION),
        }
    if kind == "fp8":
        wide = paged(sizes, "bf16", device)
        baselines[OUR_BF16] = lambda: paged_attention(*wide)
    return Bodies(
        lambda: [paged_attention(q, inputs, cache, shape)],
        lambda: [exact(q, inputs, cache, shape, rows)],
        baselines,
        rows=rows,
    )


def cases(tiny: bool = False) -> list[Case]:
    """Rows 9 and 10: Llama-3.1-8B's heads, and the 70B's."""
    return [*_decodes(tiny), *_prefills(tiny)]


def _decodes(tiny: bool) -> list[Case]:
    made = []
    for sequences, context, heads, kind, first in (
        (1, 1024, 32, "fp8", False),
        (1, 16384, 32, "fp8", False),
        (32, 1024, 32, "fp8", False),
        (32, 4096, 32, "bf16", True),
        (32, 4096, 32, "fp8", True),
        (128, 1024, 32, "bf16", False),
        (128, 1024, 32, "fp8", False),
        (8, 16384, 32, "bf16", False),
        (8, 16384, 32, "fp8", False),
        (32, 4096, 64, "fp8", False),
    ):
        s = Sizes(min(sequences, 2), 1, 40, 4, 2, 32) if tiny else Sizes(sequences, 1, context - 1, heads, 8, 128)
        goals = []
        if sequences * context >= 128 << 10:
            goals = [Goal("copy", 0.75 if kind == "bf16" else 0.65)]
            goals += [Goal(DENSE, 1.0)] if kind == "bf16" else [Goal(OUR_BF16, 1.6)]
        num_bytes = s.sequences * (s.length * 2 * s.kv_heads * s.d * shapes.KV_BYTES[kind] + 4 * s.heads * s.d)
        made.append(
            Case(
                "9", f"decode attention, {kind} cache", f"{s.sequences} x {s.length} tokens, {s.heads} / {s.kv_heads}",
                num_bytes, 4 * s.heads * s.d * s.length * s.sequences,
                lambda device, a=(s, kind): decode_case(*a, device), FEW_BITS, tuple(goals), first,
            )
        )  # fmt: skip
    for sequences, context in ((1, 1024), (32, 1024), (256, 1024)):
        s = Sizes(min(sequences, 2), 1, 40, 4, 2, 32) if tiny else Sizes(sequences, 1, context - 1, 32, 8, 128)
        num_bytes = s.sequences * (s.length * 2 * s.kv_heads * s.d + 2 * (2 * s.heads + 2 * s.kv_heads) * s.d)
        made.append(
            Case(
                "9", "rope and decode attention, fp8 cache", f"{s.sequences} x {s.length} tokens", num_bytes,
                4 * s.heads * s.d * s.length * s.sequences,
                lambda device, s=s: rope_and_decode_case(s, "fp8", device), FEW_BITS, (Goal(IN_TWO, 1.0),),
                sequences == 32,
            )
        )  # fmt: skip
    return made


def _prefills(tiny: bool) -> list[Case]:
    made = []
    stock = [Goal(FLASH, 1.2), Goal(CUDNN, 0.8)]
    for sequences, queries, prefix, kind, goals, first in (
        (1, 8192, 0, "bf16", [*stock, Goal("TFLOP/s", 450)], True),
        (4, 2048, 0, "bf16", stock, False),
        (1, 2048, 0, "bf16", stock, False),
        (1, 2048, 30720, "bf16", [Goal("TFLOP/s", 450)], False),
        (1, 2048, 30720, "fp8", [Goal(OUR_BF16, 0.9)], True),
        (1, 8192, 0, "fp8", [Goal(OUR_BF16, 0.9)], False),
    ):
        s = (
            Sizes(min(sequences, 2), 9, min(prefix, 20), 4, 2, 32)
            if tiny
            else Sizes(sequences, queries, prefix, 32, 8, 128)
        )
        num_bytes = s.sequences * (
            s.length * 2 * s.kv_heads * s.d * shapes.KV_BYTES[kind] + 4 * s.queries * s.heads * s.d
        )
        behind = f" behind {s.prefix}" if s.prefix else ""
        made.append(
            Case(
                "10", f"prefill attention, {kind} cache", f"{s.sequences} x {s.queries} tokens{behind}", num_bytes,
                s.sequences * shapes.prefill_flops(s.heads, s.d, s.queries, s.prefix),
                lambda device, a=(s, kind): prefill_case(*a, device), FEW_BITS, tuple(goals), first,
            )
        )  # fmt: skip
    return made
