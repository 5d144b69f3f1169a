"""Triton body of attention of many queries over a paged cache: chunks of prompts on whatever prefix, in mixed batches.

out = softmax(scale q k^T) v, causal. A program has a block of neighbouring queries of one sequence, each with the G
heads that share a KV head: BLOCK_M rows. Tokens that all rows see are gone over without a mask, then the diagonal with
one; with a window its edge is masked too. Which sequence a program works for is found on the device: there are as many
programs as the batch could need at most, and those left over end at once.
Reference: `attention.reference.paged_attention`. Limit: 4 D multiply-adds' FLOPs for each query head and visible token,
at a GPU's peak (an H100's is about 800 TFLOP/s in bf16); exponentials are the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.decode import decode_attention
from octavo.kernels.attention.gpu.paged import (
    CODES,
    LOG2_E,
    accumulate_softmax,
    expect_paged,
    finalize_softmax,
    init_state,
    list_size,
    load_queries,
    words,
)
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.launching import tuning
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, power_of_two
from octavo.kernels.launching.numerics import narrow


@triton.jit
def _block_of(program, query_starts, sequences, TOKENS: tl.constexpr, SEQUENCES: tl.constexpr):
    """The sequence that a program works for, and the first of its queries that it does.

    Sequence s is given the programs from query_starts[s] // TOKENS + s on: always enough, and at most one too many.
    """
    s = tl.arange(0, SEQUENCES)
    start = tl.load(query_starts + s, mask=s < sequences, other=0)
    begun = (start // TOKENS + s <= program) & (s < sequences)
    sequence = tl.sum(begun.to(tl.int32), axis=0) - 1
    return sequence, (program - tl.load(query_starts + sequence) // TOKENS - sequence) * TOKENS


@triton.jit
def _spans(begin, seen_by_first, seen_by_last, BLOCK_N: tl.constexpr):
    """Where the tokens that every row sees begin and end, in whole tiles from `begin` on.

    The first row sees the tokens before seen_by_first, the last one those from seen_by_last on.
    """
    full = begin + tl.maximum(seen_by_first - begin, 0) // BLOCK_N * BLOCK_N
    edge = begin + tl.cdiv(tl.maximum(seen_by_last - begin, 0), BLOCK_N) * BLOCK_N
    return tl.minimum(edge, full), full


@triton.jit(do_not_specialize=["sequences", "table_width"])
def _prefill(
    q,
    out,
    key,
    value,
    key_scale,
    value_scale,
    block_tables,
    seq_lens,
    query_starts,
    sequences,
    table_width,
    kv_heads,
    scale,
    window,
    soft_cap,
    fewest,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_CODE: tl.constexpr,
    VALUE_CODE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(1)
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # a prompt's last queries have most to do: they begin
    sequence, begun = _block_of(program, query_starts, sequences, TOKENS, SEQUENCES)
    first = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - first
    if begun >= queries or queries < fewest:
        return
    length = tl.load(seq_lens + sequence)
    row = tl.arange(0, BLOCK_M)
    query = begun + row // GROUP
    here = (query < queries) & (row < TOKENS * GROUP)
    place = ((first + query).to(tl.int64) * kv_heads + head) * GROUP + row % GROUP
    q, q_odd, unit = load_queries(q, place, here, key, HEAD_DIM, DIM, KEY_CODE)
    earliest = length - queries + begun  # where the first row stands
    end = tl.minimum(earliest + TOKENS, length)
    begin = tl.maximum(earliest - window + 1, 0) if HAS_WINDOW else 0
    edge, full = _spans(begin, earliest + 1, end - window if HAS_WINDOW else 0, BLOCK_N)
    factor = unit * (scale * tl.load(key_scale + head) * (1.0 if HAS_CAP else LOG2_E))
    table = block_tables + sequence.to(tl.int64) * table_width
    position = length - queries + query
    state = init_state(BLOCK_M, DIM, VALUE_CODE)
    for span in tl.static_range(0 if HAS_WINDOW else 1, 3):
        state = accumulate_softmax(
            state,
            (q, q_odd),
            factor,
            key,
            value,
            table,
            head,
            kv_heads,
            begin if span == 0 else (edge if span == 1 else full),
            edge if span == 0 else (full if span == 1 else end),
            position,
            window,
            soft_cap,
            HEAD_DIM,
            DIM,
            BLOCK_SIZE,
            BLOCK_N,
            KEY_CODE,
            VALUE_CODE,
            HAS_WINDOW,
            HAS_CAP,
            span != 1,
        )
    result = narrow(finalize_softmax(state, tl.load(value_scale + head), VALUE_CODE), out.dtype.element_ty)
    at = tl.arange(0, DIM)
    tl.store(out + place[:, None] * HEAD_DIM + at[None, :], result, mask=here[:, None] & (at < HEAD_DIM)[None, :])


def prefill(
    q: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    out: Tensor,
    *,
    fewest: int = 1,
    block_m: int,
    block_n: int,
    num_warps: int = 8,
    num_stages: int = 3,
) -> Launch:
    """Attention of q [T, Hq, D] into out [T, Hq, D], for every sequence with at least `fewest` queries."""
    expect_paged(q, inputs, cache, shape, out)
    sequences = inputs.seq_lens.shape[0]
    group = shape.num_heads // shape.num_kv_heads
    block_m = max(block_m, power_of_two(group))
    return Launch(
        _prefill,
        (q.shape[0] // (block_m // group) + sequences, shape.num_kv_heads),
        {
            "q": q,
            "out": out,
            "key": words(cache.key),
            "value": words(cache.value),
            "key_scale": cache.key_scale,
            "value_scale": cache.value_scale,
            "block_tables": inputs.block_tables,
            "seq_lens": inputs.seq_lens,
            "query_starts": inputs.query_starts,
            "sequences": sequences,
            "table_width": inputs.block_tables.shape[1],
            "kv_heads": shape.num_kv_heads,
            "scale": shape.scale,
            "window": shape.window or 0,
            "soft_cap": shape.soft_cap or 1.0,
            "fewest": fewest,
            "HEAD_DIM": shape.head_dim,
            "DIM": max(power_of_two(shape.head_dim), 32),
            "GROUP": group,
            "SEQUENCES": list_size(sequences),
            "BLOCK_SIZE": cache.block_size,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "KEY_CODE": CODES.get(cache.key.dtype, ""),
            "VALUE_CODE": CODES.get(cache.value.dtype, ""),
            "HAS_WINDOW": shape.window is not None,
            "HAS_CAP": shape.soft_cap is not None,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )


def paged_attention(q: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape) -> Tensor:
    """`attention.reference.paged_attention`. What a sequence gets doesn't depend on the batch that it is in.

    In a mixed batch each of the two kernels is launched on all sequences, and leaves alone those of the other.
    """
    out = torch.empty_like(q)
    decode_attention(q, inputs, cache, shape, out)
    if inputs.max_query_len > 1:
        sizes = tuning.choose("paged prefill", shape.num_heads, shape.head_dim, cache.key.element_size())
        prefill(q, inputs, cache, shape, out, fewest=2, **sizes)()
    return out.flatten(1)
