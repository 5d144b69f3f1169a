"""Triton body of attention of few queries over a long paged cache: split by tokens, then merged.

out = softmax(scale q k^T) v. A program has one KV head of one sequence and a share of its tokens: the G query heads
that share the KV head are rows of one tile (padded to 16, a tensor core's least), so that keys and values are read
once. A sequence's share length follows from its own length alone, on the device: nothing that is launched depends on
the lengths, so a CUDA graph can hold it, and what a sequence gets doesn't depend on its neighbours.
Reference: `attention.reference.paged_attention`. Limit: bytes, tokens * 2 Hkv D * bytes of an element / 3.0 TB/s.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels import tables
from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.paged import (
    CODES,
    LOG2_E,
    MASKED_SCORE,
    attend,
    load_queries,
    mixed,
    nothing_yet,
    on_meta,
    words,
)
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.launch import Launch, Proof, cdiv, power_of_two
from octavo.kernels.numeric import narrow


@triton.jit
def _shares(
    sequence, seq_lens, query_starts, window,
    BLOCK_N: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Of a sequence: its first query, how many, its tokens, the first that is seen, a share's length, the shares."""
    first = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - first
    length = tl.load(seq_lens + sequence)
    begin = tl.maximum(length - queries - window + 1, 0) if HAS_WINDOW else 0
    share = tl.maximum(tl.cdiv(length - begin, MOST), LEAST)
    share = tl.cdiv(share, BLOCK_N) * BLOCK_N
    return first, queries, length, begin, share, tl.maximum(tl.cdiv(length - begin, share), 1)


@triton.jit
def _decode(
    q, out, partial, lse, key, value, key_scale, value_scale, block_tables, seq_lens, query_starts,
    table_width, kv_heads, programs, scale, window, soft_cap,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    KEY_CODE: tl.constexpr, VALUE_CODE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    sequence, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, queries, length, begin, share, parts = _shares(
        sequence, seq_lens, query_starts, window, BLOCK_N, LEAST, MOST, HAS_WINDOW
    )
    if queries > QUERIES or part >= parts:
        return
    row, at = tl.arange(0, ROWS), tl.arange(0, DIM)
    query = row // GROUP
    place = ((first + query).to(tl.int64) * kv_heads + head) * GROUP + row % GROUP
    q, q_odd, unit = load_queries(q, place, query < queries, key, HEAD_DIM, DIM, KEY_CODE)
    begin += part * share
    state = attend(
        nothing_yet(ROWS, DIM, VALUE_CODE), (q, q_odd),
        unit * (scale * tl.load(key_scale + head) * (1.0 if HAS_CAP else LOG2_E)), key, value,
        block_tables + sequence.to(tl.int64) * table_width, head, kv_heads, begin, tl.minimum(begin + share, length),
        length - queries + query, window, soft_cap, HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_N, KEY_CODE, VALUE_CODE,
        HAS_WINDOW, HAS_CAP, True,
    )  # fmt: skip
    result = mixed(state, tl.load(value_scale + head), VALUE_CODE)
    here = (query < queries)[:, None] & (at < HEAD_DIM)[None, :]
    if parts == 1:
        tl.store(out + place[:, None] * HEAD_DIM + at[None, :], narrow(result, out.dtype.element_ty), mask=here)
    else:
        place = ((sequence.to(tl.int64) * kv_heads + head) * programs + part) * (QUERIES * GROUP) + row
        tl.store(partial + place[:, None] * HEAD_DIM + at[None, :], result, mask=here)
        tl.store(lse + place, state[0] + tl.log2(state[1]), mask=query < queries)


@triton.jit
def _merge(
    out, partial, lse, seq_lens, query_starts, kv_heads, programs, window,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_N: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    sequence, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, queries, _, _, _, parts = _shares(sequence, seq_lens, query_starts, window, BLOCK_N, LEAST, MOST, HAS_WINDOW)
    query = row // GROUP
    if queries > QUERIES or query >= queries or parts == 1:
        return
    part, at = tl.arange(0, SHARES), tl.arange(0, DIM)
    place = ((sequence.to(tl.int64) * kv_heads + head) * programs + part) * (QUERIES * GROUP) + row
    size = tl.load(lse + place, mask=part < parts, other=MASKED_SCORE)
    weight = tl.exp2(size - tl.max(size, axis=0))
    here = (part < parts)[:, None] & (at < HEAD_DIM)[None, :]
    each = tl.load(partial + place[:, None] * HEAD_DIM + at[None, :], mask=here, other=0.0)
    merged = tl.sum(each * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    place = ((first + query).to(tl.int64) * kv_heads + head) * GROUP + row % GROUP
    tl.store(out + place * HEAD_DIM + at, narrow(merged, out.dtype.element_ty), mask=at < HEAD_DIM)


def share_count(max_seq_len: int, shape: AttentionShape, *, least: int, most: int, queries: int = 1) -> int:
    """Into how many shares a sequence of at most max_seq_len tokens can fall: how many programs it is given."""
    seen = max_seq_len if shape.window is None else min(max_seq_len, shape.window + queries - 1)
    return max(min(most, cdiv(seen, least)), 1)


def decode(
    q: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    out: Tensor,
    partial: Tensor,
    lse: Tensor,
    *,
    queries: int = 1,
    block_n: int,
    least: int,
    most: int,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Launch:
    """Attention of q [T, Hq, D] into out [T, Hq, D], for every sequence with at most `queries` queries.

    partial  [S, Hkv, P, queries * Hq / Hkv, D] float32, P = `share_count` of the longest sequence
    lse      [S, Hkv, P, queries * Hq / Hkv] float32, log2 of the sum of exponentials
    least    tokens of a share at least; most: shares of a sequence at most, however long it is
    Sequences that fall into one share are done; `merge` with the same numbers does the others.
    """
    sequences, programs = inputs.seq_lens.shape[0], lse.shape[2]
    group = shape.num_heads // shape.num_kv_heads
    return Launch(
        _decode,
        (sequences, shape.num_kv_heads, programs),
        {
            "q": q, "out": out, "partial": partial, "lse": lse, "key": words(cache.key), "value": words(cache.value),
            "key_scale": cache.key_scale, "value_scale": cache.value_scale, "block_tables": inputs.block_tables,
            "seq_lens": inputs.seq_lens, "query_starts": inputs.query_starts,
            "table_width": inputs.block_tables.shape[1], "kv_heads": shape.num_kv_heads, "programs": programs,
            "scale": shape.scale, "window": shape.window or 0, "soft_cap": shape.soft_cap or 1.0,
            "HEAD_DIM": shape.head_dim, "DIM": max(power_of_two(shape.head_dim), 32), "GROUP": group,
            "QUERIES": queries, "ROWS": max(power_of_two(queries * group), 16), "BLOCK_SIZE": cache.block_size,
            "BLOCK_N": block_n, "LEAST": least, "MOST": most, "KEY_CODE": CODES.get(cache.key.dtype, ""),
            "VALUE_CODE": CODES.get(cache.value.dtype, ""), "HAS_WINDOW": shape.window is not None,
            "HAS_CAP": shape.soft_cap is not None,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip


def merge(
    inputs: StepInputs, shape: AttentionShape, out: Tensor, partial: Tensor, lse: Tensor,
    *, queries: int = 1, block_n: int, least: int, most: int,
) -> Launch:  # fmt: skip
    """Put together what `decode` left in partial and lse."""
    group = shape.num_heads // shape.num_kv_heads
    return Launch(
        _merge,
        (inputs.seq_lens.shape[0], shape.num_kv_heads, queries * group),
        {
            "out": out, "partial": partial, "lse": lse, "seq_lens": inputs.seq_lens,
            "query_starts": inputs.query_starts, "kv_heads": shape.num_kv_heads, "programs": lse.shape[2],
            "window": shape.window or 0, "HEAD_DIM": shape.head_dim, "DIM": power_of_two(shape.head_dim),
            "GROUP": group, "QUERIES": queries, "SHARES": power_of_two(most), "BLOCK_N": block_n, "LEAST": least,
            "MOST": most, "HAS_WINDOW": shape.window is not None,
        },
        num_warps=4,
        num_stages=1,
    )  # fmt: skip


def decode_attention(q: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape, out: Tensor) -> None:
    """Attention of q [T, Hq, D] into out [T, Hq, D] for every sequence with one query; others' rows are left alone."""
    group = shape.num_heads // shape.num_kv_heads
    sizes = tables.choose("paged decode", group, shape.head_dim, cache.key.element_size())
    shares = {name: sizes[name] for name in ("block_n", "least", "most")}
    programs = share_count(inputs.max_seq_len, shape, least=sizes["least"], most=sizes["most"])
    lse = torch.empty(inputs.seq_lens.shape[0], shape.num_kv_heads, programs, group, device=q.device)
    partial = lse.new_empty(*lse.shape, shape.head_dim) if programs > 1 else lse
    decode(q, inputs, cache, shape, out, partial, lse, **sizes)()
    if programs > 1:
        merge(inputs, shape, out, partial, lse, **shares)()


def proofs() -> dict[str, Proof]:
    """The 16-row tensor-core instructions, and keys and values fetched by 16 bytes, whatever they are."""
    bf16, fp16, fp8, int8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8
    examples: dict[str, tuple[tuple[Any, ...], int]] = {
        "bf16, 32 / 8 heads of 128": ((32, 8, 128, bf16, bf16, bf16), 1),
        "fp8, 32 / 8 heads of 128": ((32, 8, 128, bf16, fp8, fp8), 1),
        "int8, 32 / 8 heads of 128": ((32, 8, 128, bf16, int8, int8), 1),
        "bf16 and fp8, 32 / 8 heads of 128": ((32, 8, 128, bf16, bf16, fp8), 1),
        "fp16, 9 / 3 heads of 64": ((9, 3, 64, fp16, fp16, fp16), 1),
        "bf16, 8 / 4 heads of 256, window, cap": ((8, 4, 256, bf16, bf16, bf16, 4096, 50.0), 1),
        "bf16, 32 heads of 80": ((32, 32, 80, bf16, bf16, bf16), 1),
        "fp8, 32 / 8 heads of 128, 4 queries": ((32, 8, 128, bf16, fp8, fp8), 4),
    }
    made: dict[str, Proof] = {}
    for name, (example, queries) in examples.items():
        q, inputs, cache, shape = on_meta(*example)
        group = shape.num_heads // shape.num_kv_heads
        sizes = tables.choose("paged decode", group, shape.head_dim, cache.key.element_size())
        lse = q.new_empty(64, shape.num_kv_heads, 32, queries * group, dtype=torch.float32)
        launch = decode(q, inputs, cache, shape, q, lse, lse, queries=queries, **sizes)
        made[f"decode {name}"] = Proof(launch, (r"HMMA\.16816", r"LDGSTS\.E\.BYPASS.*128"), (r"LDS\.[US]8",))
    made["merge"] = Proof(merge(inputs, shape, q, lse, lse, block_n=64, least=256, most=32), (r"LDG\.E\.128",))
    return made
