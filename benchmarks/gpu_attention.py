"""Cases of attention over a paged cache: steps of decoding, and prompts in chunks on a prefix (rows 9 and 10)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
from octavo.kernels.attention.reference import encode
from octavo.kernels.attention.step import StepInputs

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
BLOCK = 16
KINDS = {"bf16": BF16, "fp8": E4M3, "int8": torch.int8}
DENSE, FLASH, CUDNN = "SDPA bf16, dense", "SDPA flash", "SDPA cudnn"
OUR_BF16, NO_CAP = "octavo, bf16 cache", "octavo, no cap"
IN_TWO = "octavo, two launches"
SCALES = {"bf16": 1.0, "fp8": 0.02, "int8": 0.04}  # of caches of random numbers


@dataclass(frozen=True)
class Sizes:
    """sequences of `queries` new tokens behind `prefix` cached ones; window and soft_cap as of `AttentionShape`."""

    sequences: int
    queries: int
    prefix: int
    heads: int
    kv_heads: int
    d: int
    window: int | None = None
    soft_cap: float | None = None

    @property
    def length(self) -> int:
        return self.prefix + self.queries

    @property
    def seen(self) -> int:
        """Tokens of a sequence that any query sees."""
        return min(self.length, self.queries - 1 + (self.window or self.length))

    @property
    def heads_text(self) -> str:
        """What isn't Llama-3.1-8B's about a layer."""
        own = f", {self.heads} / {self.kv_heads} heads of {self.d}" if (self.heads, self.d) != (32, 128) else ""
        window = f", window {self.window}" if self.window else ""
        return own + window + (f", cap {self.soft_cap:g}" if self.soft_cap else "")


def paged(sizes: Sizes, kind: str, device: torch.device) -> tuple[Tensor, StepInputs, LayerCache, AttentionShape]:
    """Random queries, and a cache of random keys and values in blocks of random order."""
    s, blocks = sizes, -(-sizes.length // BLOCK)
    tables = torch.randperm(s.sequences * blocks).reshape(s.sequences, blocks).int()
    tokens = s.sequences * s.queries
    new = [s.queries] * s.sequences
    inputs = StepInputs.prefill([s.length] * s.sequences, BLOCK, sizes=new, tables=tables).to(device)
    size, scale = (s.sequences * blocks, s.kv_heads, BLOCK, s.d), torch.full((s.kv_heads,), SCALES[kind], device=device)
    stores = [encode(torch.randn(size, device=device, dtype=BF16), scale[0], KINDS[kind]) for _ in range(2)]
    q = torch.randn(tokens, s.heads, s.d, device=device).bfloat16()
    shape = AttentionShape(s.heads, s.kv_heads, s.d, s.d**-0.5, s.window, s.soft_cap)
    return q, inputs, LayerCache(*stores, scale, scale), shape


def some_of(count: int, device: torch.device, most: int = 24) -> Tensor:
    """Queries to compare: the first, the last, and some between."""
    return torch.arange(min(most, count), device=device) * (count - 1) // max(min(most, count) - 1, 1)


def exact(q: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape, rows: Tensor) -> Tensor:
    """Attention of the rows' queries [R, Hq * D] in float64."""
    outputs = []
    group = shape.num_heads // shape.num_kv_heads
    for row in rows.tolist():
        sequence = int(torch.searchsorted(inputs.query_starts, row, right=True)) - 1
        first, end = (int(inputs.query_starts[sequence + i]) for i in range(2))
        seen = int(inputs.seq_lens[sequence]) - (end - 1 - row)
        begin, blocks = max(seen - (shape.window or seen), 0), inputs.block_tables[sequence, : -(-seen // BLOCK)].long()
        assert row >= first
        k, v = (
            (t[blocks].transpose(1, 2).flatten(0, 1)[begin:seen].double() * s[:, None]).repeat_interleave(group, 1)
            for t, s in ((cache.key, cache.key_scale.double()), (cache.value, cache.value_scale.double()))
        )
        scores = torch.einsum("hd,khd->hk", q[row].double(), k) * shape.scale
        if shape.soft_cap is not None:
            scores = shape.soft_cap * (scores / shape.soft_cap).tanh()
        outputs.append(torch.einsum("hk,khd->hd", scores.softmax(1), v).flatten())
    return torch.stack(outputs)


def decode_case(sizes: Sizes, kind: str, device: torch.device) -> Bodies:
    q, inputs, cache, shape = paged(sizes, kind, device)
    rows = some_of(sizes.sequences, device, 8)
    s = sizes
    dense = [torch.randn(s.sequences, s.kv_heads, s.seen, s.d, device=device, dtype=BF16) for _ in range(2)]
    queries = q[:, :, None].contiguous()

    def run(shape: AttentionShape = shape) -> list[Tensor]:
        out = torch.empty_like(q)
        decode_attention(q, inputs, cache, shape, out)
        return [out.flatten(1)]

    def stock() -> object:
        return F.scaled_dot_product_attention(queries, *dense, enable_gqa=True)

    baselines: dict[str, Callable[[], object]] = {DENSE: stock}
    if s.soft_cap:  # which the stock operator doesn't have
        baselines = {NO_CAP: lambda: run(replace(shape, soft_cap=None))}
    if kind != "bf16":
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
    baselines: dict[str, Callable[[], object]] = {}
    if s.soft_cap:
        baselines[NO_CAP] = lambda: paged_attention(q, inputs, cache, replace(shape, soft_cap=None))
    elif not s.prefix and not s.window:  # else a mask would have to be given, which its fast bodies don't take
        dense = [torch.randn(s.sequences, s.heads, s.queries, s.d, device=device, dtype=BF16) for _ in range(3)]

        def stock(backend: SDPBackend) -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*dense, is_causal=True)

        baselines = {
            FLASH: lambda: stock(SDPBackend.FLASH_ATTENTION),
            CUDNN: lambda: stock(SDPBackend.CUDNN_ATTENTION),
        }
    if kind != "bf16":
        wide = paged(sizes, "bf16", device)
        baselines[OUR_BF16] = lambda: paged_attention(*wide)
    return Bodies(
        lambda: [paged_attention(q, inputs, cache, shape)],
        lambda: [exact(q, inputs, cache, shape, rows)],
        baselines,
        rows=rows,
    )


def small(s: Sizes) -> Sizes:
    """As a rehearsal has them: few and narrow heads, a prefix if there was one, and less of it than a window sees."""
    return Sizes(min(s.sequences, 2), min(s.queries, 9), min(s.prefix, 39), 4, 2, s.d // 4, s.window and 5, s.soft_cap)


def cases(tiny: bool = False) -> list[Case]:
    """Rows 9 and 10: Llama-3.1-8B's heads, and other models'."""
    return [*_decodes(tiny), *_prefills(tiny)]


OTHERS = (  # heads, KV heads, head size, window, soft cap (2: one that numbers like these feel); of which cache
    ((32, 8, 128), "int8"),
    ((32, 8, 128, 4096), "bf16"),
    ((8, 4, 256, None, 2.0), "bf16"),
    ((32, 8, 64), "bf16"),
    ((32, 32, 96), "bf16"),
)


def _decodes(tiny: bool) -> list[Case]:
    made = []
    llama = (32, 8, 128)
    steps = (
        (1, 1024, llama, "fp8", False),
        (1, 16384, llama, "fp8", False),
        (32, 1024, llama, "fp8", False),
        (32, 4096, llama, "bf16", True),
        (32, 4096, llama, "fp8", True),
        (128, 1024, llama, "bf16", False),
        (128, 1024, llama, "fp8", False),
        (8, 16384, llama, "bf16", False),
        (8, 16384, llama, "fp8", False),
        (32, 4096, (64, 8, 128), "fp8", False),
    )
    for sequences, context, layer, kind, first in (*steps, *((8, 16384, *other, False) for other in OTHERS)):
        s = Sizes(sequences, 1, context - 1, *layer)
        goals = []
        if sequences * context >= 128 << 10:
            goals = [Goal("copy", 0.75 if kind == "bf16" else 0.65)]
            goals += [Goal(OUR_BF16, 1.6)] if kind != "bf16" else [Goal(NO_CAP if s.soft_cap else DENSE, 1.0)]
        s = small(s) if tiny else s
        num_bytes = s.sequences * (s.seen * 2 * s.kv_heads * s.d * shapes.KV_BYTES[kind] + 4 * s.heads * s.d)
        made.append(
            Case(
                "9", f"decode attention, {kind} cache", f"{s.sequences} x {s.length} tokens{s.heads_text}",
                num_bytes, 4 * s.heads * s.d * s.seen * s.sequences,
                lambda device, a=(s, kind): decode_case(*a, device), FEW_BITS, tuple(goals), first,
            )
        )  # fmt: skip
    for sequences, context in ((1, 1024), (32, 1024), (256, 1024)):
        s = Sizes(sequences, 1, context - 1, *llama)
        s = small(s) if tiny else s
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
    llama, stock = (32, 8, 128), [Goal(FLASH, 1.2), Goal(CUDNN, 0.8)]
    prompts = (
        (1, 8192, 0, llama, "bf16", [*stock, Goal("TFLOP/s", 450)], True),
        (4, 2048, 0, llama, "bf16", stock, False),
        (1, 2048, 0, llama, "bf16", stock, False),
        (1, 2048, 30720, llama, "bf16", [Goal("TFLOP/s", 450)], False),
        (1, 2048, 30720, llama, "fp8", [Goal(OUR_BF16, 0.9)], True),
        (1, 8192, 0, llama, "fp8", [Goal(OUR_BF16, 0.9)], False),
    )
    for sequences, queries, prefix, layer, kind, goals, first in (
        *prompts, *((1, 8192, 0, *other, [], False) for other in OTHERS)
    ):  # fmt: skip
        s = Sizes(sequences, queries, prefix, *layer)
        s = small(s) if tiny else s
        num_bytes = s.sequences * (
            s.length * 2 * s.kv_heads * s.d * shapes.KV_BYTES[kind] + 4 * s.queries * s.heads * s.d
        )
        behind = f" behind {s.prefix}" if s.prefix else ""
        made.append(
            Case(
                "10", f"prefill attention, {kind} cache", f"{s.sequences} x {s.queries} tokens{behind}{s.heads_text}",
                num_bytes, s.sequences * shapes.prefill_flops(s.heads, s.d, s.queries, s.prefix, s.window),
                lambda device, a=(s, kind): prefill_case(*a, device), FEW_BITS, tuple(goals), first,
            )
        )  # fmt: skip
    return made
