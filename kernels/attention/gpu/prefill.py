"""Triton body of attention of many queries over a paged cache: chunks of prompts on whatever prefix, in mixed batches.

out = softmax(scale q k^T) v, causal. A program has a block of neighboring queries of one sequence, each with the G
heads that share a KV head: BLOCK_M rows. It reads the tokens that all rows see without a mask, then the diagonal with
one; a window's edge is masked too. A program finds its sequence on the device: the grid has as many programs as the
batch could need, and those that are left over end at once.
Reference: `attention.reference.paged_attention`. Limit: 4 D multiply-adds' FLOPs for each query head and visible token,
at a GPU's peak (an H100's is about 800 TFLOP/s in bf16); exponentials are the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.arguments import batch_arguments, cache_arguments, scores_of, shape_constants
from octavo.kernels.attention.gpu.decode import decode_attention
from octavo.kernels.attention.gpu.paged import (
    LOG2_E,
    accumulate_softmax,
    expect_paged,
    finalize_softmax,
    init_state,
    list_size,
    load_queries,
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
    cache,
    batch,
    scores,
    sequences,
    table_width,
    kv_heads,
    fewest,
    shape: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    TOKENS: tl.constexpr = BLOCK_M // shape.GROUP
    head = tl.program_id(1)
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # a prompt's last queries have most to do: they begin
    sequence, begun = _block_of(program, batch.query_starts, sequences, TOKENS, SEQUENCES)
    first = tl.load(batch.query_starts + sequence)
    queries = tl.load(batch.query_starts + sequence + 1) - first
    if begun >= queries or queries < fewest:
        return
    length = tl.load(batch.seq_lens + sequence)
    row = tl.arange(0, BLOCK_M)
    query = begun + row // shape.GROUP
    here = (query < queries) & (row < TOKENS * shape.GROUP)
    place = ((first + query).to(tl.int64) * kv_heads + head) * shape.GROUP + row % shape.GROUP
    q, q_odd, unit = load_queries(q, place, here, cache.key, shape)
    earliest = length - queries + begun  # where the first row stands
    end = tl.minimum(earliest + TOKENS, length)
    begin = tl.maximum(earliest - scores.window + 1, 0) if shape.HAS_WINDOW else 0
    edge, full = _spans(begin, earliest + 1, end - scores.window if shape.HAS_WINDOW else 0, BLOCK_N)
    factor = unit * (scores.scale * tl.load(cache.key_scale + head) * (1.0 if shape.HAS_CAP else LOG2_E))
    table = batch.block_tables + sequence.to(tl.int64) * table_width
    position = length - queries + query
    state = init_state(BLOCK_M, shape)
    for span in tl.static_range(0 if shape.HAS_WINDOW else 1, 3):
        state = accumulate_softmax(
            state,
            (q, q_odd),
            factor,
            cache,
            table,
            head,
            kv_heads,
            begin if span == 0 else (edge if span == 1 else full),
            edge if span == 0 else (full if span == 1 else end),
            position,
            scores,
            shape,
            BLOCK_N,
            span != 1,
        )
    result = narrow(finalize_softmax(state, tl.load(cache.value_scale + head), shape), out.dtype.element_ty)
    at = tl.arange(0, shape.DIM)
    mask = here[:, None] & (at < shape.HEAD_DIM)[None, :]
    tl.store(out + place[:, None] * shape.HEAD_DIM + at[None, :], result, mask=mask)


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
            "cache": cache_arguments(cache),
            "batch": batch_arguments(inputs),
            "scores": scores_of(shape),
            "sequences": sequences,
            "table_width": inputs.block_tables.shape[1],
            "kv_heads": shape.num_kv_heads,
            "fewest": fewest,
            "shape": shape_constants(cache, shape),
            "SEQUENCES": list_size(sequences),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
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
        sizes = tuning.choose("paged prefill", shape.num_heads, shape.head_dim, cache.key.element_size(), q.device)
        prefill(q, inputs, cache, shape, out, fewest=2, **sizes)()
    return out.flatten(1)
