"""Triton body of attention of few queries over a long paged cache: split by tokens, merged by the last program.

out = softmax(scale q k^T) v. A program has one KV head of one sequence and a split of its tokens: the G query heads
that share the KV head are rows of one tile (padded to 16, a tensor core's least), so that keys and values are read
once. A split's length follows from its sequence's length alone, on the device: no launch depends on lengths, so a CUDA
graph can hold it, and a sequence's result doesn't depend on its neighbors. The program that stores the last of a
token's heads may quantize its row for the next GEMM (`gpu.quantize_row`).
Reference: `attention.reference.paged_attention`. Limit: bytes, tokens * 2 Hkv D * bytes of an element / 3.0 TB/s.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.arguments import (
    Output,
    Splits,
    batch_arguments,
    cache_arguments,
    scores_of,
    shape_constants,
)
from octavo.kernels.attention.gpu.paged import (
    LOG2_E,
    MASKED_SCORE,
    accumulate_softmax,
    expect_paged,
    finalize_softmax,
    init_state,
    list_size,
    load_queries,
)
from octavo.kernels.attention.gpu.quantize_row import quantize_row, row_quant_arguments
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.last_block import counters_for, last_block
from octavo.kernels.launching.launch import Launch, cdiv, power_of_two
from octavo.kernels.launching.numerics import narrow
from octavo.kernels.quantized_activation import ActivationQuant, Hidden, QuantizedActivation


@triton.jit
def kv_splits(sequence, batch, window, splits: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """A sequence's first query, its queries, its tokens, the first that is seen, a split's tokens, and its splits."""
    first = tl.load(batch.query_starts + sequence)
    queries = tl.load(batch.query_starts + sequence + 1) - first
    length = tl.load(batch.seq_lens + sequence)
    begin = tl.maximum(length - queries - window + 1, 0) if HAS_WINDOW else 0
    split_tokens = tl.maximum(tl.cdiv(length - begin, splits.MAX_SPLITS), splits.MIN_SPLIT_TOKENS)
    split_tokens = tl.cdiv(split_tokens, splits.BLOCK_N) * splits.BLOCK_N
    return first, queries, length, begin, split_tokens, tl.maximum(tl.cdiv(length - begin, split_tokens), 1)


@triton.jit
def _store(out, result, row, first, queries, head, kv_heads, shape: tl.constexpr):
    """Rows [R] of a KV head's queries, the first of which is `first` of all, into out."""
    query = row // shape.GROUP
    at = tl.arange(0, shape.DIM)
    place = ((first + query).to(tl.int64) * kv_heads + head) * shape.GROUP + row % shape.GROUP
    here = (query < queries)[:, None] & (at < shape.HEAD_DIM)[None, :]
    tl.store(out + place[:, None] * shape.HEAD_DIM + at[None, :], narrow(result, out.dtype.element_ty), mask=here)


@triton.jit
def _merged(output, place, count, rows, shape: tl.constexpr, splits: tl.constexpr):
    """Weighted means [MERGED_ROWS, DIM] of the results of `count` splits from row `place` on, in their order.

    Other SMs wrote them, so loads go past L1. MERGED_SPLITS at a time are in registers: few enough to leave
    `accumulate_softmax` its blocks.
    """
    all_rows: tl.constexpr = splits.QUERIES * shape.GROUP
    ROWS: tl.constexpr = splits.MERGED_ROWS
    DIM: tl.constexpr = shape.DIM
    row = tl.arange(0, ROWS)
    at = tl.arange(0, DIM)
    top = tl.full((ROWS,), MASKED_SCORE, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(0, count, splits.MERGED_SPLITS):
        split = start + tl.arange(0, splits.MERGED_SPLITS)
        here = (split < count)[:, None] & (row < rows)[None, :]
        at_row = place + split[:, None] * all_rows + row[None, :]
        size = tl.load(output.lse + at_row, mask=here, other=MASKED_SCORE, cache_modifier=".cg")
        mask = here[:, :, None] & (at < shape.HEAD_DIM)[None, None, :]
        from_row = output.partial + at_row[:, :, None] * shape.HEAD_DIM + at[None, None, :]
        each = tl.load(from_row, mask=mask, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(size, axis=0))
        weight = tl.exp2(size - higher[None, :])
        shrink = tl.exp2(top - higher)
        top = higher
        total = total * shrink + tl.sum(weight, axis=0)
        result = result * shrink[:, None] + tl.sum(each * weight[:, :, None], axis=0)
    return result / total[:, None]


@triton.jit
def attend_split(
    queries,
    unit,
    cache,
    table,
    head,
    kv_heads,
    begin,
    end,
    position,
    scores,
    shape: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """For the tokens begin .. end: the weighted mean of values [R, DIM], largest score and sum of weights [R]."""
    factor = unit * (scores.scale * tl.load(cache.key_scale + head) * (1.0 if shape.HAS_CAP else LOG2_E))
    state = accumulate_softmax(
        init_state(unit.shape[0], shape),
        queries,
        factor,
        cache,
        table,
        head,
        kv_heads,
        begin,
        end,
        position,
        scores,
        shape,
        BLOCK_N,
        True,
    )
    return finalize_softmax(state, tl.load(cache.value_scale + head), shape), state[0], state[1]


@triton.jit
def finish_split(
    found, output, where, counts, kv_heads, grid_splits, row_quant, shape: tl.constexpr, splits: tl.constexpr
):
    """Store what `attend_split` found: into out if a sequence has one split, else aside, and the last one merges.

    where: the sequence, KV head and split. counts: the sequence's number of splits, its first query and its number of
    queries. The program that stores the last of a sequence's heads quantizes the row, if `row_quant` has codes.
    """
    result, top, total = found
    sequence, head, split = where
    count, first, queries = counts
    row = tl.arange(0, top.shape[0])
    at = tl.arange(0, shape.DIM)
    is_whole = count == 1
    if is_whole:
        _store(output.out, result, row, first, queries, head, kv_heads, shape)
    else:
        all_rows: tl.constexpr = splits.QUERIES * shape.GROUP
        pair = sequence.to(tl.int64) * kv_heads + head
        place = (pair * grid_splits + split) * all_rows + row
        here = row // shape.GROUP < queries
        mask = here[:, None] & (at < shape.HEAD_DIM)[None, :]
        tl.store(output.partial + place[:, None] * shape.HEAD_DIM + at[None, :], result, mask=mask)
        tl.store(output.lse + place, top + tl.log2(total), mask=here)
        is_whole = last_block(output.counters + pair, count)
        if is_whole:
            whole = _merged(output, pair * grid_splits * all_rows, count, queries * shape.GROUP, shape, splits)
            _store(output.out, whole, tl.arange(0, splits.MERGED_ROWS), first, queries, head, kv_heads, shape)
    if row_quant.codes is not None and is_whole and queries == 1:
        has_all_heads = last_block(output.counters + (row_quant.last_counter - sequence), kv_heads)
        if has_all_heads:
            quantize_row(output.out, first.to(tl.int64), row_quant, splits.ROW_GROUP, splits.ROW_BLOCK)


@triton.jit
def splits_end(batch, sequences, window, SEQUENCES: tl.constexpr, splits: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Where each sequence's splits end in a list of all splits [SEQUENCES]; with more than QUERIES it has none."""
    s = tl.arange(0, SEQUENCES)
    _, queries, _, _, _, count = kv_splits(tl.minimum(s, sequences - 1), batch, window, splits, HAS_WINDOW)
    return tl.cumsum(tl.where((s < sequences) & (queries <= splits.QUERIES), count, 0), axis=0)


@triton.jit
def split_at(place, ends):
    """The sequence, and the number in it, of the split at a place in the list of all."""
    before = ends <= place
    return tl.sum(before.to(tl.int32)), place - tl.max(tl.where(before, ends, 0))


@triton.jit
def _decode_split(where, q, attention, shape: tl.constexpr, splits: tl.constexpr):
    """where: the sequence, KV head and split. attention: the arguments that `_decode` and `_rope_decode` have both."""
    sequence, head, split = where
    output, cache, batch, scores, row_quant, table_width, kv_heads, grid_splits = attention
    first, queries, length, begin, split_tokens, count = kv_splits(
        sequence, batch, scores.window, splits, shape.HAS_WINDOW
    )
    if queries <= splits.QUERIES and split < count:
        row = tl.arange(0, splits.ROWS)
        query = row // shape.GROUP
        place = ((first + query).to(tl.int64) * kv_heads + head) * shape.GROUP + row % shape.GROUP
        even, odd, unit = load_queries(q, place, query < queries, cache.key, shape)
        begin += split * split_tokens
        found = attend_split(
            (even, odd),
            unit,
            cache,
            batch.block_tables + sequence.to(tl.int64) * table_width,
            head,
            kv_heads,
            begin,
            tl.minimum(begin + split_tokens, length),
            length - queries + query,
            scores,
            shape,
            splits.BLOCK_N,
        )
        finish_split(found, output, where, (count, first, queries), kv_heads, grid_splits, row_quant, shape, splits)


@triton.jit(do_not_specialize=["sequences", "table_width", "grid_splits"])
def _decode(
    q,
    output,
    cache,
    batch,
    scores,
    row_quant,
    sequences,
    table_width,
    kv_heads,
    grid_splits,
    shape: tl.constexpr,
    splits: tl.constexpr,
    SEQUENCES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    attention = (output, cache, batch, scores, row_quant, table_width, kv_heads, grid_splits)
    if SEQUENCES == 0:
        _decode_split((tl.program_id(0), tl.program_id(1), tl.program_id(2)), q, attention, shape, splits)
    else:
        ends = splits_end(batch, sequences, scores.window, SEQUENCES, splits, shape.HAS_WINDOW)
        for item in tl.range(tl.program_id(0), tl.max(ends) * kv_heads, tl.num_programs(0), disable_licm=True):
            sequence, split = split_at(item // kv_heads, ends)
            _decode_split((sequence, item % kv_heads, split), q, attention, shape, splits)


def split_count(
    max_seq_len: int, shape: AttentionShape, *, min_split_tokens: int, max_splits: int, queries: int = 1
) -> int:
    """How many splits a sequence of at most max_seq_len tokens can have: the programs that it is given."""
    seen = max_seq_len if shape.window is None else min(max_seq_len, shape.window + queries - 1)
    return max(min(max_splits, cdiv(seen, min_split_tokens)), 1)


def _expect_output(
    q: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    output: Output,
    queries: int,
    min_split_tokens: int,
    max_splits: int,
) -> None:
    """Check every size that `decode` is given; where no sequence has two splits, `partial` isn't used."""
    out, partial, lse, counters = output
    expect_paged(q, inputs, cache, shape, out)
    sequences = inputs.seq_lens.shape[0]
    splits = split_count(
        inputs.max_seq_len, shape, min_split_tokens=min_split_tokens, max_splits=max_splits, queries=queries
    )
    rows = (sequences, shape.num_kv_heads, splits, queries * (shape.num_heads // shape.num_kv_heads))
    expect(
        lse=(lse, rows),
        partial=(None if splits == 1 else partial, (*rows, shape.head_dim)),
        counters=(counters, max(counters.numel(), sequences * (shape.num_kv_heads + 1))),
    )


def decode(
    q: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    output: Output,
    *,
    into: QuantizedActivation | None = None,
    input_quant: ActivationQuant | None = None,
    queries: int = 1,
    block_n: int,
    min_split_tokens: int,
    max_splits: int,
    programs: int,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Launch:
    """Attention of q [T, Hq, D] into the output's out [T, Hq, D], for every sequence with at most `queries` queries.

    The output's other tensors:
    partial  [S, Hkv, P, queries * Hq / Hkv, D] float32, P = `split_count` of the longest sequence
    lse      [S, Hkv, P, queries * Hq / Hkv] float32, log2 of the sum of exponentials
    counters [S * (Hkv + 1) or more] int32, zeros before and after: those of pairs from the first on, those of sequences
             back from the last; see `counters_for`
    into     receives, beside out, rows [T, Hq D] quantized as `input_quant` says, for sequences with one query
    programs loop over a list of the splits that exist when the grid would have more programs: a CUDA graph's grid is
             for the longest contexts, and a program with nothing to do costs time too
    """
    _expect_output(q, inputs, cache, shape, output, queries, min_split_tokens, max_splits)
    sizes = {"BLOCK_N": block_n, "MIN_SPLIT_TOKENS": min_split_tokens, "MAX_SPLITS": max_splits}
    arguments = decode_arguments(inputs, cache, shape, output, into, input_quant, queries, num_warps, sizes)
    grid, more = grid_of(output.lse, programs)
    return Launch(_decode, grid, {"q": q, **arguments, **more}, num_warps=num_warps, num_stages=num_stages)


def grid_of(lse: Tensor, programs: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """A program for each split that there can be, or so many that go through a list of those that there are."""
    sequences = lse.shape[0]
    is_listed = math.prod(lse.shape[:3]) > programs
    return (programs,) if is_listed else lse.shape[:3], {"SEQUENCES": list_size(sequences) if is_listed else 0}


def decode_arguments(
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    output: Output,
    into: QuantizedActivation | None,
    input_quant: ActivationQuant | None,
    queries: int,
    num_warps: int,
    sizes: dict[str, int],
) -> dict[str, Any]:
    """What every kernel of decoding attention is told, but for its queries and its list."""
    constants = shape_constants(cache, shape)
    merged = power_of_two(queries * constants.GROUP)
    row_quant, row_group, row_block = row_quant_arguments(output.out, into, input_quant, output.counters, num_warps)
    at_a_time = min(32 * 32 * num_warps // (merged * constants.DIM), power_of_two(sizes["MAX_SPLITS"]))
    return {
        "output": output,
        "cache": cache_arguments(cache),
        "batch": batch_arguments(inputs),
        "scores": scores_of(shape),
        "row_quant": row_quant,
        "sequences": output.lse.shape[0],
        "table_width": inputs.block_tables.shape[1],
        "kv_heads": shape.num_kv_heads,
        "grid_splits": output.lse.shape[2],
        "shape": constants,
        "splits": Splits(
            **sizes,
            QUERIES=queries,
            ROWS=max(merged, 16),
            MERGED_ROWS=merged,
            MERGED_SPLITS=max(at_a_time, 1),
            ROW_GROUP=row_group,
            ROW_BLOCK=row_block,
        ),
    }


def output_into(
    out: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape
) -> tuple[Output, dict[str, int]]:
    """The output of `decode` into `out` for sequences with one query, and the block sizes of the tuning table."""
    group = shape.num_heads // shape.num_kv_heads
    sizes = tuning.choose("paged decode", group, shape.head_dim, cache.key.element_size(), cache.key.device)
    programs = split_count(
        inputs.max_seq_len, shape, min_split_tokens=sizes["min_split_tokens"], max_splits=sizes["max_splits"]
    )
    device = inputs.seq_lens.device
    sequences = inputs.seq_lens.shape[0]
    lse = torch.empty(sequences, shape.num_kv_heads, programs, group, device=device)
    partial = lse.new_empty(*lse.shape, shape.head_dim) if programs > 1 else lse
    return Output(out, partial, lse, counters_for(sequences * (shape.num_kv_heads + 1), device)), sizes


def quantized_rows(out: Tensor, input_quant: ActivationQuant | None) -> QuantizedActivation | None:
    """`into` of `decode`, for out [T, Hq, D]."""
    tokens, heads, dim = out.shape
    return (
        None
        if input_quant is None
        else QuantizedActivation.empty(tokens, heads * dim, input_quant, out.device, out.dtype)
    )


def decode_attention(
    q: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    out: Tensor,
    input_quant: ActivationQuant | None = None,
) -> Hidden:
    """Attention of q [T, Hq, D] into out [T, Hq, D] for every sequence with one query; others' rows are left alone.

    Returns out [T, Hq D], or what `input_quant` makes of it.
    """
    output, sizes = output_into(out, inputs, cache, shape)
    into = quantized_rows(out, input_quant)
    decode(q, inputs, cache, shape, output, into=into, input_quant=input_quant, **sizes)()
    return out.flatten(1) if into is None else into
