"""Triton body of a decode step's attention from the qkv GEMM on: head norms, rotation, the cache's write, attention.

`gpu.rope` and `gpu.decode` in one launch, for steps in which every sequence has one new token. Each program makes its
own queries of qkv, which may be split-K partial sums: they are read once more for every share of the sequence, out of
L2. The program of a KV head's last share, which has the new token, also makes its key and value and writes them to the
cache before it reads there; no other may read them, so sequences of a step must not share a block that one of them
writes to. Of a norm over all heads at once every program reads the whole row, for its factor; for more than a few
tokens, by the table, `gpu.rope` is a launch of its own. Rows may be rounded for the GEMM behind (`gpu.row`).
Reference: `attention.reference.rope_and_cache`, then `paged_attention`. Limit: bytes, those of both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.decode import (
    attend_split,
    decode,
    decode_attention,
    finish_split,
    kv_splits,
    quantized_rows,
    room_for,
    split_at,
    splits_end,
)
from octavo.kernels.attention.gpu.paged import as_factors
from octavo.kernels.attention.gpu.prefill import paged_attention
from octavo.kernels.attention.gpu.rope import encoded, factor_of, rope_and_cache, rope_arguments, summed, whole_factor
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch
from octavo.kernels.launching.numerics import narrow
from octavo.kernels.quantized_activation import ActivationQuant, Hidden, QuantizedActivation


@triton.jit
def _norm_of(
    qkv,
    start,
    columns,
    weight,
    column,
    split_size,
    eps,
    dtype: tl.constexpr,
    SPLIT_K: tl.constexpr,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Where the norm's weights of heads at column [R] begin, and its factor if it is over all columns from start on."""
    whole = 1.0
    if NORM == "all":
        weight += column[:, None]
        whole = whole_factor(qkv, start, columns, eps, split_size, dtype, WIDTH, SPLIT_K)
    return weight, whole


@triton.jit
def _weights(weight, at, mask, NORM: tl.constexpr):
    """Those of heads' elements `at`: of each head, or the same for all."""
    if NORM == "all":
        at = at[None, :]
        mask = mask[None, :]
    found = tl.load(weight + at, mask=mask, other=0.0)
    return found if NORM == "all" else found[None, :]


@triton.jit
def _turned(
    qkv,
    place,
    there,
    weight,
    whole,
    cos_sin,
    split_size,
    eps,
    dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    SPLIT_K: tl.constexpr,
    NORM: tl.constexpr,
    ROTATES: tl.constexpr,
):
    """Heads [R, DIM] that begin at place [R] of qkv, normed and rotated, in float32; a column's partner is read too."""
    at = tl.arange(0, DIM)
    mask = there[:, None] & (at < HEAD_DIM)[None, :]
    turned = summed(qkv, place[:, None] + at[None, :], mask, split_size, dtype, SPLIT_K)
    factor = tl.full((place.shape[0],), 1.0, tl.float32)
    if NORM == "head":
        factor = factor_of(tl.sum(turned * turned, axis=1), HEAD_DIM, eps)
    if NORM == "all":
        factor *= whole
    if NORM != "":
        turned *= factor[:, None] * _weights(weight, at, at < HEAD_DIM, NORM)
    if ROTATES:
        turns = at < 2 * HALF
        first = at < HALF
        angle = tl.where(first, at, at - HALF)
        partner = tl.where(first, at + HALF, at - HALF)
        other = summed(qkv, place[:, None] + partner[None, :], mask & turns[None, :], split_size, dtype, SPLIT_K)
        if NORM != "":
            other *= factor[:, None] * _weights(weight, partner, turns, NORM)
        cos = tl.load(cos_sin + angle, mask=turns, other=1.0)
        sin = tl.load(cos_sin + HALF + angle, mask=turns, other=0.0)
        turned = turned * cos[None, :] + other * tl.where(first, -sin, sin)[None, :]
    return turned


@triton.jit
def _write_new(
    qkv,
    place,
    k_norm,
    cos_sin,
    key,
    value,
    key_scale,
    value_scale,
    slot,
    head,
    kv_heads,
    split_size,
    eps,
    dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    K_NORM: tl.constexpr,
    K_WIDTH: tl.constexpr,
    ROTATES: tl.constexpr,
):
    """The key that lies at a place of qkv, and its value, into the cache, for all threads of the program to read."""
    at = tl.arange(0, DIM)[None, :]
    one = tl.zeros((1,), tl.int64)
    there = one + slot >= 0
    mask = there[:, None] & (at < HEAD_DIM)
    to = ((slot // BLOCK_SIZE * kv_heads + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + at
    weight, whole = _norm_of(
        qkv,
        place - head * HEAD_DIM,
        kv_heads * HEAD_DIM,
        k_norm,
        head * HEAD_DIM + tl.arange(0, 1),
        split_size,
        eps,
        dtype,
        SPLIT_K,
        K_NORM,
        K_WIDTH,
    )
    new = _turned(
        qkv,
        place + one,
        there,
        weight,
        whole,
        cos_sin,
        split_size,
        eps,
        dtype,
        HEAD_DIM,
        DIM,
        HALF,
        SPLIT_K,
        K_NORM,
        ROTATES,
    )
    tl.store(key + to, encoded(new, tl.load(key_scale + head), key.dtype.element_ty), mask=mask)
    place += kv_heads * HEAD_DIM
    new = _turned(
        qkv, place + one, there, k_norm, 1.0, cos_sin, split_size, eps, dtype, HEAD_DIM, DIM, HALF, SPLIT_K, "", False
    )
    tl.store(value + to, encoded(new, tl.load(value_scale + head), value.dtype.element_ty), mask=mask)
    tl.debug_barrier()


@triton.jit
def _rope_decode_split(
    sequence,
    head,
    split,
    qkv,
    positions,
    slots,
    cos_sin,
    q_norm,
    k_norm,
    out,
    partial,
    lse,
    counters,
    key,
    value,
    key_words,
    value_words,
    key_scale,
    value_scale,
    block_tables,
    seq_lens,
    query_starts,
    table_width,
    kv_heads,
    grid_splits,
    split_size,
    eps,
    scale,
    window,
    soft_cap,
    rounding,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
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
    SPLIT_K: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    Q_WIDTH: tl.constexpr,
    K_WIDTH: tl.constexpr,
    ROTATES: tl.constexpr,
):
    first, queries, length, begin, split_tokens, splits = kv_splits(
        sequence, seq_lens, query_starts, window, BLOCK_N, MIN_SPLIT_TOKENS, MAX_SPLITS, HAS_WINDOW
    )
    if queries == 1 and split < splits:
        dtype: tl.constexpr = out.dtype.element_ty
        token = first.to(tl.int64)
        row = token * ((GROUP + 2) * kv_heads * HEAD_DIM)
        angles = cos_sin
        if ROTATES:
            angles += tl.load(positions + token) * (2 * HALF)
        if split == splits - 1:
            _write_new(
                qkv,
                row + (GROUP * kv_heads + head) * HEAD_DIM,
                k_norm,
                angles,
                key,
                value,
                key_scale,
                value_scale,
                tl.load(slots + token),
                head,
                kv_heads,
                split_size,
                eps,
                dtype,
                HEAD_DIM,
                DIM,
                HALF,
                BLOCK_SIZE,
                SPLIT_K,
                K_NORM,
                K_WIDTH,
                ROTATES,
            )
        r = tl.arange(0, ROWS)
        weight, whole = _norm_of(
            qkv,
            row,
            GROUP * kv_heads * HEAD_DIM,
            q_norm,
            (head * GROUP + tl.minimum(r, GROUP - 1)) * HEAD_DIM,
            split_size,
            eps,
            dtype,
            SPLIT_K,
            Q_NORM,
            Q_WIDTH,
        )
        turned = _turned(
            qkv,
            row + (head * GROUP + r) * HEAD_DIM,
            r < GROUP,
            weight,
            whole,
            angles,
            split_size,
            eps,
            dtype,
            HEAD_DIM,
            DIM,
            HALF,
            SPLIT_K,
            Q_NORM,
            ROTATES,
        )
        even, odd, unit = as_factors(narrow(turned, dtype), key_words, DIM, KEY_CODE)
        begin += split * split_tokens
        result, top, total = attend_split(
            (even, odd),
            unit,
            key_words,
            value_words,
            key_scale,
            value_scale,
            block_tables + sequence.to(tl.int64) * table_width,
            head,
            kv_heads,
            begin,
            tl.minimum(begin + split_tokens, length),
            length - 1 + r * 0,
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
            1,
            rounding,
            HEAD_DIM,
            DIM,
            GROUP,
            1,
            MERGED_ROWS,
            MERGED_SPLITS,
            ROUND_GROUP,
            ROW_BLOCK,
        )


@triton.jit(do_not_specialize=["sequences", "table_width", "grid_splits"])
def _rope_decode(
    qkv,
    positions,
    slots,
    cos_sin,
    q_norm,
    k_norm,
    out,
    partial,
    lse,
    counters,
    key,
    value,
    key_words,
    value_words,
    key_scale,
    value_scale,
    block_tables,
    seq_lens,
    query_starts,
    sequences,
    table_width,
    kv_heads,
    grid_splits,
    split_size,
    eps,
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
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
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
    SPLIT_K: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    Q_WIDTH: tl.constexpr,
    K_WIDTH: tl.constexpr,
    ROTATES: tl.constexpr,
    SEQUENCES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    rounding = (codes, scales, stored, column_permutation, last_counter, row_width)
    if SEQUENCES == 0:
        _rope_decode_split(
            tl.program_id(0),
            tl.program_id(1),
            tl.program_id(2),
            qkv,
            positions,
            slots,
            cos_sin,
            q_norm,
            k_norm,
            out,
            partial,
            lse,
            counters,
            key,
            value,
            key_words,
            value_words,
            key_scale,
            value_scale,
            block_tables,
            seq_lens,
            query_starts,
            table_width,
            kv_heads,
            grid_splits,
            split_size,
            eps,
            scale,
            window,
            soft_cap,
            rounding,
            HEAD_DIM,
            DIM,
            GROUP,
            ROWS,
            HALF,
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
            SPLIT_K,
            Q_NORM,
            K_NORM,
            Q_WIDTH,
            K_WIDTH,
            ROTATES,
        )
    else:
        ends = splits_end(
            seq_lens, query_starts, sequences, window, SEQUENCES, 1, BLOCK_N, MIN_SPLIT_TOKENS, MAX_SPLITS, HAS_WINDOW
        )
        for item in tl.range(tl.program_id(0), tl.max(ends) * kv_heads, tl.num_programs(0), disable_licm=True):
            sequence, split = split_at(item // kv_heads, ends)
            _rope_decode_split(
                sequence,
                item % kv_heads,
                split,
                qkv,
                positions,
                slots,
                cos_sin,
                q_norm,
                k_norm,
                out,
                partial,
                lse,
                counters,
                key,
                value,
                key_words,
                value_words,
                key_scale,
                value_scale,
                block_tables,
                seq_lens,
                query_starts,
                table_width,
                kv_heads,
                grid_splits,
                split_size,
                eps,
                scale,
                window,
                soft_cap,
                rounding,
                HEAD_DIM,
                DIM,
                GROUP,
                ROWS,
                HALF,
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
                SPLIT_K,
                Q_NORM,
                K_NORM,
                Q_WIDTH,
                K_WIDTH,
                ROTATES,
            )


def rope_decode(
    qkv: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    out: Tensor,
    partial: Tensor,
    lse: Tensor,
    counters: Tensor,
    *,
    into: QuantizedActivation | None = None,
    input_quant: ActivationQuant | None = None,
    **sizes: int,
) -> Launch:
    """`rope` on qkv, and `decode` of the queries into out [T, Hq, D], for every sequence with one new token."""
    d = shape.head_dim
    expect(out=(out, (qkv.shape[-2], shape.num_heads, d)))
    plain = decode(out, inputs, cache, shape, out, partial, lse, counters, into=into, input_quant=input_quant, **sizes)
    cached = {"key_words": plain.arguments["key"], "value_words": plain.arguments["value"]}
    added = rope_arguments(qkv, inputs, cache, shape, cos_sin, q_norm, k_norm, eps)
    arguments = {**plain.arguments, **cached, **added}
    del arguments["q"], arguments["QUERIES"]
    return replace(plain, kernel=_rope_decode, arguments=arguments)


def rope_and_attention(
    qkv: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
    input_quant: ActivationQuant | None = None,
) -> Hidden:
    """`attention.reference.rope_and_cache` and `paged_attention` [T, Hq D]; dtype as in `rope_and_cache`.

    A decode step's output is quantized as `input_quant` says. The output of a step with prompts stays plain, for the
    next GEMM to quantize: two kernels compute its tokens, and quantizing takes little of such a step's time.
    """
    if inputs.max_query_len > 1 or not reads_rows_again(qkv, shape, q_norm, k_norm):
        q = rope_and_cache(qkv, inputs, cache, shape, cos_sin, q_norm, k_norm, eps, dtype)
        if inputs.max_query_len > 1:
            return paged_attention(q, inputs, cache, shape)
        return decode_attention(q, inputs, cache, shape, torch.empty_like(q), input_quant)
    out = qkv.new_empty(qkv.shape[-2], shape.num_heads, shape.head_dim, dtype=dtype or qkv.dtype)
    (partial, lse, counters), sizes = room_for(inputs, cache, shape)
    into = quantized_rows(out, input_quant)
    rope_decode(
        qkv,
        inputs,
        cache,
        shape,
        cos_sin,
        q_norm,
        k_norm,
        eps,
        out,
        partial,
        lse,
        counters,
        into=into,
        input_quant=input_quant,
        **sizes,
    )()
    return out.flatten(1) if into is None else into


def reads_rows_again(qkv: Tensor, shape: AttentionShape, *norms: Tensor | None) -> bool:
    """Whether programs may read whole rows of qkv for norms over all heads, if there are any: the table has a limit.

    To a head's share of 256 tokens in bf16, 128 KiB, come 32 KiB of q with 16 heads of 128 in 4 partial sums: for many
    tokens more than a launch takes, by the L2 cache's bandwidth. Not measured.
    """
    if all(w is None or w.numel() == shape.head_dim for w in norms):
        return True
    rows = qkv.numel() // qkv.shape[-1]  # of q, in all partial sums
    columns = shape.num_heads * shape.head_dim
    return tuning.choose("norms over heads", rows * columns * qkv.element_size() // 1024, columns, 0)["again"] == 1
