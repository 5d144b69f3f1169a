"""Launches of kernels/attention that are compiled ahead of time."""

from __future__ import annotations

from typing import Any

import torch
from proof import PAST_L1, Proof, meta
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.arguments import Output
from octavo.kernels.attention.gpu.decode import decode, quantized_rows
from octavo.kernels.attention.gpu.prefill import prefill
from octavo.kernels.attention.gpu.rope import rope
from octavo.kernels.attention.gpu.rope_decode import reads_rows_again, rope_decode
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.launching import tuning
from octavo.kernels.quantized_activation import ActivationQuant


def step_on_meta(
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    key: torch.dtype,
    value: torch.dtype,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, StepInputs, LayerCache, AttentionShape]:
    """A step of 64 sequences of 8192 tokens, 64 of them new, without memory behind it."""
    keys, values = (meta(4096, kv_heads, 16, dim, dtype=kind) for kind in (key, value))
    return (
        meta(64, heads, dim, dtype=dtype),
        StepInputs.prefill([8192] * 64, 16, sizes=[64] + [0] * 63).to(torch.device("meta")),
        LayerCache(keys, values, meta(kv_heads), meta(kv_heads)),
        AttentionShape(heads, kv_heads, dim, dim**-0.5, window, soft_cap),
    )


def decode_proofs() -> dict[str, Proof]:
    """The 16-row tensor-core instructions, and keys and values fetched by 16 bytes, whatever they are."""
    bf16 = torch.bfloat16
    fp16 = torch.float16
    fp8 = torch.float8_e4m3fn
    int8 = torch.int8
    examples: dict[str, tuple[tuple[Any, ...], int, int]] = {  # queries, shares of a sequence at most
        "bf16, 32 / 8 heads of 128": ((32, 8, 128, bf16, bf16, bf16), 1, 1),
        "fp8, 32 / 8 heads of 128": ((32, 8, 128, bf16, fp8, fp8), 1, 1),
        "bf16, 32 / 8 heads of 128, listed": ((32, 8, 128, bf16, bf16, bf16), 1, 32),
        "fp8, 32 / 8 heads of 128, listed": ((32, 8, 128, bf16, fp8, fp8), 1, 32),
        "int8, 32 / 8 heads of 128": ((32, 8, 128, bf16, int8, int8), 1, 1),
        "bf16 and fp8, 32 / 8 heads of 128": ((32, 8, 128, bf16, bf16, fp8), 1, 1),
        "fp16, 9 / 3 heads of 64": ((9, 3, 64, fp16, fp16, fp16), 1, 1),
        "bf16, 8 / 4 heads of 256, window, cap": ((8, 4, 256, bf16, bf16, bf16, 4096, 50.0), 1, 1),
        "bf16, 32 heads of 80": ((32, 32, 80, bf16, bf16, bf16), 1, 1),
        "float32, 32 / 8 heads of 128": ((32, 8, 128, *(torch.float32,) * 3), 1, 1),
        "fp8, 32 / 8 heads of 128, 4 queries": ((32, 8, 128, bf16, fp8, fp8), 4, 1),
        "bf16, 32 heads of 128, listed, to fp8": ((32, 32, 128, bf16, bf16, bf16), 1, 32),
        "int8, 32 / 8 heads of 128, to int8": ((32, 8, 128, bf16, int8, int8), 1, 1),
    }
    rounds = {"to fp8": ActivationQuant(fp8), "to int8": ActivationQuant(int8)}
    made: dict[str, Proof] = {}
    for name, (example, queries, most_parts) in examples.items():
        q, inputs, cache, shape = step_on_meta(*example)
        group = shape.num_heads // shape.num_kv_heads
        sizes = tuning.choose("paged decode", group, shape.head_dim, cache.key.element_size(), q.device)
        counters = inputs.seq_lens.new_empty(64 * (shape.num_kv_heads + 1))
        lse = q.new_empty(64, shape.num_kv_heads, most_parts, queries * group, dtype=torch.float32)
        input_quant = rounds.get(name.split(", ")[-1])
        launch = decode(
            q,
            inputs,
            cache,
            shape,
            Output(q, lse, lse, counters),
            into=quantized_rows(q, input_quant),
            input_quant=input_quant,
            queries=queries,
            **sizes,
        )
        products = ("FFMA",) if q.dtype == torch.float32 else (r"HMMA\.16816", r"LDGSTS\.E\.BYPASS.*128")
        made[f"decode {name}"] = Proof(launch, (*products, r"ATOMG", PAST_L1), (r"LDS\.[US]8",))
    return made


def prefill_proofs() -> dict[str, Proof]:
    """Warpgroup instructions throughout, and keys and values fetched by 16 bytes; float32 has no tensor cores."""
    bf16 = torch.bfloat16
    fp16 = torch.float16
    fp8 = torch.float8_e4m3fn
    int8 = torch.int8
    examples: dict[str, tuple[Any, ...]] = {
        "bf16, 32 / 8 heads of 128": (32, 8, 128, bf16, bf16, bf16),
        "fp8, 32 / 8 heads of 128": (32, 8, 128, bf16, fp8, fp8),
        "int8, 32 / 8 heads of 128": (32, 8, 128, bf16, int8, int8),
        "bf16 and fp8, 32 / 8 heads of 128, window": (32, 8, 128, bf16, bf16, fp8, 4096),
        "fp16, 9 / 3 heads of 64": (9, 3, 64, fp16, fp16, fp16),
        "bf16, 8 / 4 heads of 256, window, cap": (8, 4, 256, bf16, bf16, bf16, 4096, 50.0),
        "bf16, 32 heads of 80": (32, 32, 80, bf16, bf16, bf16),
        "float32, 32 / 8 heads of 128": (32, 8, 128, *(torch.float32,) * 3),
        "float32, 8 / 4 heads of 256": (8, 4, 256, *(torch.float32,) * 3),
    }
    made: dict[str, Proof] = {}
    for name, example in examples.items():
        q, inputs, cache, shape = step_on_meta(*example)
        sizes = tuning.choose("paged prefill", shape.num_heads, shape.head_dim, cache.key.element_size(), q.device)
        launch = prefill(q, inputs, cache, shape, q, **sizes)
        expects = ("FFMA",) if q.dtype == torch.float32 else (r"HGMMA\.64x", r"LDGSTS\.E\.BYPASS.*128")
        made[f"prefill {name}"] = Proof(launch, expects, ("HMMA", r"LDS\.[US]8"))
    return made


def rope_proofs() -> dict[str, Proof]:
    """Every load and store of a head by 16 bytes (by 8 where a half of one is less)."""
    bf16 = torch.bfloat16
    fp8 = torch.float8_e4m3fn
    int8 = torch.int8
    made: dict[str, Proof] = {}
    for name, example, parts, norm in (
        ("bf16, 32 / 8 heads of 128", (32, 8, 128, bf16, bf16, bf16), 1, 0),
        ("fp8, 32 / 8 heads of 128, of 4 partial sums", (32, 8, 128, bf16, fp8, fp8), 4, 0),
        ("int8, 32 / 8 heads of 128, head norms", (32, 8, 128, bf16, int8, int8), 1, 128),
        ("fp8, 16 heads of 128, a norm over all", (16, 16, 128, bf16, fp8, fp8), 1, 2048),
        ("bf16, 40 heads of 128, a norm over all", (40, 40, 128, bf16, bf16, bf16), 1, 5120),
    ):
        q, inputs, cache, shape = step_on_meta(*example)
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        qkv = q.new_empty(64, width) if parts == 1 else q.new_empty(parts, 64, width, dtype=torch.float32)
        table = q.new_empty(8192, 128, dtype=torch.float32)
        weight = q.new_empty(norm, dtype=torch.float32)
        weights = weight if norm else None
        made[f"rope {name}"] = Proof(
            rope(qkv, inputs, cache, shape, table, weights, weights, 1e-5, q), (r"LDG\.E\.128", r"STG\.E\.(128|64)")
        )
    return made


def rope_decode_proofs() -> dict[str, Proof]:
    """As in `decode`; the new key and value are in memory before the loop begins to fetch."""
    bf16 = torch.bfloat16
    fp16 = torch.float16
    fp8 = torch.float8_e4m3fn
    int8 = torch.int8
    examples: dict[str, tuple[tuple[Any, ...], int, int, bool, int]] = {
        "bf16, 32 / 8 heads of 128": ((32, 8, 128, bf16, bf16, bf16), 1, 128, False, 1),
        "fp8, 32 / 8 heads of 128, of 4 partial sums": ((32, 8, 128, bf16, fp8, fp8), 4, 128, False, 1),
        "fp8, 32 / 8 heads of 128, of 4 partial sums, listed": ((32, 8, 128, bf16, fp8, fp8), 4, 128, False, 32),
        "fp8, 32 / 8 heads of 128, 4 partial sums, listed, to fp8": ((32, 8, 128, bf16, fp8, fp8), 4, 128, False, 32),
        "bf16, 32 / 8 heads of 128, listed, to fp8 in groups": ((32, 8, 128, bf16, bf16, bf16), 1, 128, False, 32),
        "bf16, 32 / 8 heads of 128, head norms, listed": ((32, 8, 128, bf16, bf16, bf16), 1, 128, True, 32),
        "int8, 32 / 8 heads of 128, head norms": ((32, 8, 128, bf16, int8, int8), 4, 128, True, 1),
        "fp16, 9 / 3 heads of 64": ((9, 3, 64, fp16, fp16, fp16), 1, 64, False, 1),
        "bf16, 8 / 4 heads of 256, window, cap": ((8, 4, 256, bf16, bf16, bf16, 4096, 50.0), 4, 256, True, 1),
        "bf16, 32 heads of 80 of which 32 rotate": ((32, 32, 80, bf16, bf16, bf16), 1, 32, False, 1),
        "bf16, 40 / 8 heads of 128, a norm over all": ((40, 8, 128, bf16, bf16, bf16), 1, 128, True, 32),
        "bf16, 32 heads, a norm over all, 4 parts, listed": ((32, 32, 128, bf16, bf16, bf16), 4, 128, True, 32),
    }
    rounds = {"to fp8": ActivationQuant(fp8), "to fp8 in groups": ActivationQuant(fp8, 128)}
    made: dict[str, Proof] = {}
    for name, (example, parts, rotary, normed, most_parts) in examples.items():
        q, inputs, cache, shape = step_on_meta(*example)
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        qkv = q.new_empty(64, width) if parts == 1 else q.new_empty(parts, 64, width, dtype=torch.float32)
        heads = (shape.num_heads, shape.num_kv_heads) if "over all" in name else (1, 1)
        norms = [meta(count * shape.head_dim) if normed else None for count in heads]
        if not reads_rows_again(qkv[..., :1, :], shape, *norms):  # a card whose registers don't hold it
            continue
        group = shape.num_heads // shape.num_kv_heads
        sizes = tuning.choose("paged decode", group, shape.head_dim, cache.key.element_size(), q.device)
        lse = meta(64, shape.num_kv_heads, most_parts, group)
        counters = inputs.seq_lens.new_empty(64 * (shape.num_kv_heads + 1))
        input_quant = rounds.get(name.split(", ")[-1])
        launch = rope_decode(
            qkv,
            inputs,
            cache,
            shape,
            meta(8192, rotary),
            norms[0],
            norms[1],
            1e-5,
            Output(q, lse, lse, counters),
            into=quantized_rows(q, input_quant),
            input_quant=input_quant,
            **sizes,
        )
        expects = (r"HMMA\.16816", r"LDGSTS\.E\.BYPASS.*128", "ATOMG", PAST_L1)
        made[f"rope and decode {name}"] = Proof(launch, expects, (r"LDS\.[US]8",))
    return made
