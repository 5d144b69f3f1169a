"""Triton body of attention of few queries over a long paged cache: split by tokens, merged by whoever ends last.

out = softmax(scale q k^T) v. A program has one KV head of one sequence and a share of its tokens: the G query heads
that share the KV head are rows of one tile (padded to 16, a tensor core's least), so that keys and values are read
once. A sequence's share length follows from its own length alone, on the device: nothing that is launched depends on
the lengths, so a CUDA graph can hold it, and what a sequence gets doesn't depend on its neighbours. Who stores the last
of a token's heads may round its row for the GEMM behind (`gpu.row`).
Reference: `attention.reference.paged_attention`. Limit: bytes, tokens * 2 Hkv D * bytes of an element / 3.0 TB/s.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.paged import (
    CODES,
    LOG2_E,
    MASKED_SCORE,
    accumulate_softmax,
    expect_paged,
    finalize_softmax,
    init_state,
    list_size,
    load_queries,
    words,
)
from octavo.kernels.attention.gpu.row import round_row, row_arguments
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.last_block import counters_for, last_block
from octavo.kernels.launching.launch import Launch, cdiv, power_of_two
from octavo.kernels.launching.numerics import narrow
from octavo.kernels.quantized_activation import ActivationQuant, Hidden, QuantizedActivation


@triton.jit
def kv_splits(
    sequence,
    seq_lens,
    query_starts,
    window,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Of a sequence: its first query, how many, its tokens, the first that is seen, a share's length, the shares."""
    first = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - first
    length = tl.load(seq_lens + sequence)
    begin = tl.maximum(length - queries - window + 1, 0) if HAS_WINDOW else 0
    split_tokens = tl.maximum(tl.cdiv(length - begin, MAX_SPLITS), MIN_SPLIT_TOKENS)
    split_tokens = tl.cdiv(split_tokens, BLOCK_N) * BLOCK_N
    return first, queries, length, begin, split_tokens, tl.maximum(tl.cdiv(length - begin, split_tokens), 1)


@triton.jit
def _store(
    out,
    result,
    row,
    first,
    queries,
    head,
    kv_heads,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rows [R] of a KV head's queries, the first of which is `first` of all, into out."""
    query = row // GROUP
    at = tl.arange(0, DIM)
    place = ((first + query).to(tl.int64) * kv_heads + head) * GROUP + row % GROUP
    here = (query < queries)[:, None] & (at < HEAD_DIM)[None, :]
    tl.store(out + place[:, None] * HEAD_DIM + at[None, :], narrow(result, out.dtype.element_ty), mask=here)


@triton.jit
def _merged(
    partial,
    lse,
    place,
    splits,
    rows,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Weighted means [ROWS, DIM] of what the shares from row `place` on have found, in the order of their numbers.

    Other SMs wrote them, so loads go past L1. SPLITS at a time are in registers: few enough to leave
    `accumulate_softmax` its blocks.
    """
    row = tl.arange(0, ROWS)
    at = tl.arange(0, DIM)
    top = tl.full((ROWS,), MASKED_SCORE, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        here = (split < splits)[:, None] & (row < rows)[None, :]
        at_row = place + split[:, None] * ALL_ROWS + row[None, :]
        size = tl.load(lse + at_row, mask=here, other=MASKED_SCORE, cache_modifier=".cg")
        mask = here[:, :, None] & (at < HEAD_DIM)[None, None, :]
        each = tl.load(
            partial + at_row[:, :, None] * HEAD_DIM + at[None, None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
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
    key,
    value,
    key_scale,
    value_scale,
    table,
    head,
    kv_heads,
    begin,
    end,
    position,
    scale,
    window,
    soft_cap,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_CODE: tl.constexpr,
    VALUE_CODE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Of the tokens begin .. end: the weighted mean of values [R, DIM], largest score and sum of weights [R]."""
    factor = unit * (scale * tl.load(key_scale + head) * (1.0 if HAS_CAP else LOG2_E))
    state = accumulate_softmax(
        init_state(unit.shape[0], DIM, VALUE_CODE),
        queries,
        factor,
        key,
        value,
        table,
        head,
        kv_heads,
        begin,
        end,
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
        True,
    )
    return finalize_softmax(state, tl.load(value_scale + head), VALUE_CODE), state[0], state[1]


@triton.jit
def finish_split(
    result,
    top,
    total,
    out,
    partial,
    lse,
    counters,
    sequence,
    head,
    kv_heads,
    split,
    splits,
    grid_splits,
    first,
    queries,
    rounding,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
    MERGED_SPLITS: tl.constexpr,
    ROUND_GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    """Store what `attend_split` found: into out where a share is all, else aside, and merge where it is the last.

    rounding: what `row_arguments` names; where it has codes, who stores the last of a sequence's heads rounds the row.
    """
    row = tl.arange(0, top.shape[0])
    at = tl.arange(0, DIM)
    is_whole = splits == 1
    if is_whole:
        _store(out, result, row, first, queries, head, kv_heads, HEAD_DIM, DIM, GROUP)
    else:
        all_rows: tl.constexpr = QUERIES * GROUP
        pair = sequence.to(tl.int64) * kv_heads + head
        place = (pair * grid_splits + split) * all_rows + row
        here = row // GROUP < queries
        tl.store(
            partial + place[:, None] * HEAD_DIM + at[None, :], result, mask=here[:, None] & (at < HEAD_DIM)[None, :]
        )
        tl.store(lse + place, top + tl.log2(total), mask=here)
        is_whole = last_block(counters + pair, splits)
        if is_whole:
            whole = _merged(
                partial,
                lse,
                pair * grid_splits * all_rows,
                splits,
                queries * GROUP,
                HEAD_DIM,
                DIM,
                all_rows,
                MERGED_ROWS,
                MERGED_SPLITS,
            )
            _store(out, whole, tl.arange(0, MERGED_ROWS), first, queries, head, kv_heads, HEAD_DIM, DIM, GROUP)
    codes, scales, stored, column_permutation, last_counter, row_width = rounding
    if codes is not None and is_whole and queries == 1:
        has_all_heads = last_block(counters + (last_counter - sequence), kv_heads)
        if has_all_heads:
            round_row(
                out, first.to(tl.int64), row_width, codes, scales, stored, column_permutation, ROUND_GROUP, ROW_BLOCK
            )


@triton.jit
def splits_end(
    seq_lens,
    query_starts,
    sequences,
    window,
    SEQUENCES: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Where each sequence's shares end in a list of all shares [SEQUENCES]; with more than QUERIES it has none."""
    s = tl.arange(0, SEQUENCES)
    _, queries, _, _, _, splits = kv_splits(
        tl.minimum(s, sequences - 1), seq_lens, query_starts, window, BLOCK_N, MIN_SPLIT_TOKENS, MAX_SPLITS, HAS_WINDOW
    )
    return tl.cumsum(tl.where((s < sequences) & (queries <= QUERIES), splits, 0), axis=0)


@triton.jit
def split_at(place, ends):
    """The sequence and the number of a share in the list of all."""
    before = ends <= place
    return tl.sum(before.to(tl.int32)), place - tl.max(tl.where(before, ends, 0))


@triton.jit
def _decode_split(
    sequence,
    head,
    split,
    q,
    out,
    partial,
    lse,
    counters,
    key,
    value,
    key_scale,
    value_scale,
    block_tables,
    seq_lens,
    query_starts,
    table_width,
    kv_heads,
    grid_splits,
    scale,
    window,
    soft_cap,
    rounding,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    KEY_CODE: tl.constexpr,
    VALUE_CODE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
    MERGED_SPLITS: tl.constexpr,
    ROUND_GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    first, queries, length, begin, split_tokens, splits = kv_splits(
        sequence, seq_lens, query_starts, window, BLOCK_N, MIN_SPLIT_TOKENS, MAX_SPLITS, HAS_WINDOW
    )
    if queries <= QUERIES and split < splits:
        row = tl.arange(0, ROWS)
        query = row // GROUP
        place = ((first + query).to(tl.int64) * kv_heads + head) * GROUP + row % GROUP
        even, odd, unit = load_queries(q, place, query < queries, key, HEAD_DIM, DIM, KEY_CODE)
        begin += split * split_tokens
        result, top, total = attend_split(
            (even, odd),
            unit,
            key,
            value,
            key_scale,
            value_scale,
            block_tables + sequence.to(tl.int64) * table_width,
            head,
            kv_heads,
            begin,
            tl.minimum(begin + split_tokens, length),
            length - queries + query,
            scale,
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
        )
        finish_split(
            result,
            top,
            total,
            out,
            partial,
            lse,
            counters,
            sequence,
            head,
            kv_heads,
            split,
            splits,
            grid_splits,
            first,
            queries,
            rounding,
            HEAD_DIM,
            DIM,
            GROUP,
            QUERIES,
            MERGED_ROWS,
            MERGED_SPLITS,
            ROUND_GROUP,
            ROW_BLOCK,
        )


@triton.jit(do_not_specialize=["sequences", "table_width", "grid_splits"])
def _decode(
    q,
    out,
    partial,
    lse,
    counters,
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
    grid_splits,
    scale,
    window,
    soft_cap,
    codes,
    scales,
    stored,
    column_permutation,
    last_counter,
    row_width,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    KEY_CODE: tl.constexpr,
    VALUE_CODE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
    MERGED_SPLITS: tl.constexpr,
    ROUND_GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    SEQUENCES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    rounding = (codes, scales, stored, column_permutation, last_counter, row_width)
    if SEQUENCES == 0:
        _decode_split(
            tl.program_id(0),
            tl.program_id(1),
            tl.program_id(2),
            q,
            out,
            partial,
            lse,
            counters,
            key,
            value,
            key_scale,
            value_scale,
            block_tables,
            seq_lens,
            query_starts,
            table_width,
            kv_heads,
            grid_splits,
            scale,
            window,
            soft_cap,
            rounding,
            HEAD_DIM,
            DIM,
            GROUP,
            QUERIES,
            ROWS,
            BLOCK_SIZE,
            BLOCK_N,
            MIN_SPLIT_TOKENS,
            MAX_SPLITS,
            KEY_CODE,
            VALUE_CODE,
            HAS_WINDOW,
            HAS_CAP,
            MERGED_ROWS,
            MERGED_SPLITS,
            ROUND_GROUP,
            ROW_BLOCK,
        )
    else:
        ends = splits_end(
            seq_lens,
            query_starts,
            sequences,
            window,
            SEQUENCES,
            QUERIES,
            BLOCK_N,
            MIN_SPLIT_TOKENS,
            MAX_SPLITS,
            HAS_WINDOW,
        )
        for item in tl.range(tl.program_id(0), tl.max(ends) * kv_heads, tl.num_programs(0), disable_licm=True):
            sequence, split = split_at(item // kv_heads, ends)
            _decode_split(
                sequence,
                item % kv_heads,
                split,
                q,
                out,
                partial,
                lse,
                counters,
                key,
                value,
                key_scale,
                value_scale,
                block_tables,
                seq_lens,
                query_starts,
                table_width,
                kv_heads,
                grid_splits,
                scale,
                window,
                soft_cap,
                rounding,
                HEAD_DIM,
                DIM,
                GROUP,
                QUERIES,
                ROWS,
                BLOCK_SIZE,
                BLOCK_N,
                MIN_SPLIT_TOKENS,
                MAX_SPLITS,
                KEY_CODE,
                VALUE_CODE,
                HAS_WINDOW,
                HAS_CAP,
                MERGED_ROWS,
                MERGED_SPLITS,
                ROUND_GROUP,
                ROW_BLOCK,
            )


def split_count(
    max_seq_len: int, shape: AttentionShape, *, min_split_tokens: int, max_splits: int, queries: int = 1
) -> int:
    """Into how many shares a sequence of at most max_seq_len tokens can fall: how many programs it is given."""
    seen = max_seq_len if shape.window is None else min(max_seq_len, shape.window + queries - 1)
    return max(min(max_splits, cdiv(seen, min_split_tokens)), 1)


def _expect_room(
    q: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    out: Tensor,
    room: tuple[Tensor, Tensor, Tensor],
    queries: int,
    min_split_tokens: int,
    max_splits: int,
) -> None:
    """Whether all that `decode` is given has its size; where no sequence has two shares, `partial` isn't used."""
    expect_paged(q, inputs, cache, shape, out)
    sequences = inputs.seq_lens.shape[0]
    partial, lse, counters = room
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
    out: Tensor,
    partial: Tensor,
    lse: Tensor,
    counters: Tensor,
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
    """Attention of q [T, Hq, D] into out [T, Hq, D], for every sequence with at most `queries` queries.

    partial  [S, Hkv, P, queries * Hq / Hkv, D] float32, P = `split_count` of the longest sequence
    lse      [S, Hkv, P, queries * Hq / Hkv] float32, log2 of the sum of exponentials
    counters [S * (Hkv + 1) or more] int32, zeros before and after, of pairs from the first on, of sequences back from
             the last: see `counters_for`
    into     receives, beside out, rows [T, Hq D] rounded as `input_quant` says, of the sequences with one query
    least    tokens of a share at least; most: shares of a sequence at most, however long it is
    programs go through a list of the shares that there are, where the grid would have more: a CUDA graph's is for the
             longest contexts, and a program with nothing to do costs time too
    """
    _expect_room(q, inputs, cache, shape, out, (partial, lse, counters), queries, min_split_tokens, max_splits)
    grid = lse.shape[:3]
    listed = math.prod(lse.shape[:3]) > programs
    group = shape.num_heads // shape.num_kv_heads
    dim = max(power_of_two(shape.head_dim), 32)
    merged = power_of_two(queries * group)
    return Launch(
        _decode,
        (programs,) if listed else grid,
        {
            "q": q,
            "out": out,
            "partial": partial,
            "lse": lse,
            "counters": counters,
            "key": words(cache.key),
            "value": words(cache.value),
            "key_scale": cache.key_scale,
            "value_scale": cache.value_scale,
            "block_tables": inputs.block_tables,
            "seq_lens": inputs.seq_lens,
            "query_starts": inputs.query_starts,
            "sequences": grid[0],
            "table_width": inputs.block_tables.shape[1],
            "kv_heads": shape.num_kv_heads,
            "grid_splits": grid[2],
            "SEQUENCES": list_size(grid[0]) if listed else 0,
            "scale": shape.scale,
            "window": shape.window or 0,
            "soft_cap": shape.soft_cap or 1.0,
            "HEAD_DIM": shape.head_dim,
            "DIM": dim,
            "GROUP": group,
            "QUERIES": queries,
            "ROWS": max(merged, 16),
            "BLOCK_SIZE": cache.block_size,
            "BLOCK_N": block_n,
            "MIN_SPLIT_TOKENS": min_split_tokens,
            "MAX_SPLITS": max_splits,
            "KEY_CODE": CODES.get(cache.key.dtype, ""),
            "VALUE_CODE": CODES.get(cache.value.dtype, ""),
            "HAS_WINDOW": shape.window is not None,
            "HAS_CAP": shape.soft_cap is not None,
            "MERGED_ROWS": merged,
            **row_arguments(out, into, input_quant, counters, num_warps),
            "MERGED_SPLITS": max(min(32 * 32 * num_warps // (merged * dim), power_of_two(max_splits)), 1),
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )


def room_for(
    inputs: StepInputs, cache: LayerCache, shape: AttentionShape
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, int]]:
    """For sequences with one query: `partial`, `lse` and `counters` of `decode`, and the block sizes of the table."""
    group = shape.num_heads // shape.num_kv_heads
    sizes = tuning.choose("paged decode", group, shape.head_dim, cache.key.element_size())
    programs = split_count(
        inputs.max_seq_len, shape, min_split_tokens=sizes["min_split_tokens"], max_splits=sizes["max_splits"]
    )
    device = inputs.seq_lens.device
    sequences = inputs.seq_lens.shape[0]
    lse = torch.empty(sequences, shape.num_kv_heads, programs, group, device=device)
    partial = lse.new_empty(*lse.shape, shape.head_dim) if programs > 1 else lse
    return (partial, lse, counters_for(sequences * (shape.num_kv_heads + 1), device)), sizes


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
    (partial, lse, counters), sizes = room_for(inputs, cache, shape)
    into = quantized_rows(out, input_quant)
    decode(q, inputs, cache, shape, out, partial, lse, counters, into=into, input_quant=input_quant, **sizes)()
    return out.flatten(1) if into is None else into
