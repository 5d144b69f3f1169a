"""Triton body of a decode step's attention from the qkv GEMM on: head norms, rotation, the cache's write, attention.

`gpu.rope` and `gpu.decode` in one launch, for steps in which every sequence has one new token. Each program computes
its own queries from qkv, which may be split-K partial sums: every split of the sequence reads them once more, from L2.
The program of a KV head's last split, which has the new token, also computes that token's key and value and writes them
to the cache before it reads them there. No other program may read them, so sequences of a step must not share a block
that one of them writes to. For a norm over all heads every program reads the whole row; for more than a few tokens, as
the tuning table says, `gpu.rope` is a launch of its own. Rows may be quantized for the next GEMM (`gpu.quantize_row`).
Reference: `attention.reference.rope_and_cache`, then `paged_attention`. Limit: bytes, those of both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.arguments import Output
from octavo.kernels.attention.gpu.decode import (
    attend_split,
    decode,
    decode_attention,
    finish_split,
    kv_splits,
    output_into,
    quantized_rows,
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
    source,
    start,
    columns,
    weight,
    column,
    dtype: tl.constexpr,
    rope: tl.constexpr,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Where the norm's weights of heads at column [R] begin, and its factor if it is over all columns from start on.

    source: qkv, the size of one of its partial sums, and the norm's eps.
    """
    qkv, split_size, eps = source
    whole = 1.0
    if NORM == "all":
        weight += column[:, None]
        whole = whole_factor(qkv, start, columns, eps, split_size, dtype, WIDTH, rope.SPLIT_K)
    return weight, whole


@triton.jit
def _weights(weight, at, mask, NORM: tl.constexpr):
    """The weights of heads' elements `at`: of each head, or the same for all."""
    if NORM == "all":
        at = at[None, :]
        mask = mask[None, :]
    found = tl.load(weight + at, mask=mask, other=0.0)
    return found if NORM == "all" else found[None, :]


@triton.jit
def _rotated(
    source,
    place,
    there,
    norm,
    cos_sin,
    dtype: tl.constexpr,
    shape: tl.constexpr,
    rope: tl.constexpr,
    NORM: tl.constexpr,
    ROTATES: tl.constexpr,
):
    """Heads [R, DIM] that begin at place [R] of qkv, normed and rotated, in float32; a column's partner is read too.

    norm: what `_norm_of` returns.
    """
    qkv, split_size, eps = source
    weight, whole = norm
    at = tl.arange(0, shape.DIM)
    mask = there[:, None] & (at < shape.HEAD_DIM)[None, :]
    value = summed(qkv, place[:, None] + at[None, :], mask, split_size, dtype, rope.SPLIT_K)
    factor = tl.full((place.shape[0],), 1.0, tl.float32)
    if NORM == "head":
        factor = factor_of(tl.sum(value * value, axis=1), shape.HEAD_DIM, eps)
    if NORM == "all":
        factor *= whole
    if NORM != "":
        value *= factor[:, None] * _weights(weight, at, at < shape.HEAD_DIM, NORM)
    if ROTATES:
        HALF: tl.constexpr = rope.HALF
        turns = at < 2 * HALF
        first = at < HALF
        angle = tl.where(first, at, at - HALF)
        partner = tl.where(first, at + HALF, at - HALF)
        other = summed(qkv, place[:, None] + partner[None, :], mask & turns[None, :], split_size, dtype, rope.SPLIT_K)
        if NORM != "":
            other *= factor[:, None] * _weights(weight, partner, turns, NORM)
        cos = tl.load(cos_sin + angle, mask=turns, other=1.0)
        sin = tl.load(cos_sin + HALF + angle, mask=turns, other=0.0)
        value = value * cos[None, :] + other * tl.where(first, -sin, sin)[None, :]
    return value


@triton.jit
def _write_new(
    source,
    place,
    k_norm,
    cos_sin,
    new,
    slot,
    head,
    kv_heads,
    dtype: tl.constexpr,
    shape: tl.constexpr,
    rope: tl.constexpr,
):
    """The key that lies at a place of qkv, and its value, into the cache, for all threads of the program to read."""
    HEAD_DIM: tl.constexpr = shape.HEAD_DIM
    K_NORM: tl.constexpr = rope.K_NORM
    at = tl.arange(0, shape.DIM)[None, :]
    one = tl.zeros((1,), tl.int64)
    there = one + slot >= 0
    mask = there[:, None] & (at < HEAD_DIM)
    to = slot // shape.BLOCK_SIZE * kv_heads + head
    to = (to * shape.BLOCK_SIZE + slot % shape.BLOCK_SIZE) * HEAD_DIM + at
    norm = _norm_of(
        source,
        place - head * HEAD_DIM,
        kv_heads * HEAD_DIM,
        k_norm,
        head * HEAD_DIM + tl.arange(0, 1),
        dtype,
        rope,
        K_NORM,
        rope.K_WIDTH,
    )
    key = _rotated(source, place + one, there, norm, cos_sin, dtype, shape, rope, K_NORM, rope.ROTATES)
    tl.store(new.key + to, encoded(key, tl.load(new.key_scale + head), new.key.dtype.element_ty), mask=mask)
    place += kv_heads * HEAD_DIM
    norm = (k_norm, 1.0)
    value = _rotated(source, place + one, there, norm, cos_sin, dtype, shape, rope, "", False)
    tl.store(new.value + to, encoded(value, tl.load(new.value_scale + head), new.value.dtype.element_ty), mask=mask)
    tl.debug_barrier()


@triton.jit
def _rope_decode_split(
    where, source, tensors, new, attention, shape: tl.constexpr, rope: tl.constexpr, splits: tl.constexpr
):
    """where, attention: as of `decode._decode_split`. source: as of `_norm_of`."""
    sequence, head, split = where
    output, cache, batch, scores, row_quant, table_width, kv_heads, grid_splits = attention
    first, queries, length, begin, split_tokens, count = kv_splits(
        sequence, batch, scores.window, splits, shape.HAS_WINDOW
    )
    if queries == 1 and split < count:
        HEAD_DIM: tl.constexpr = shape.HEAD_DIM
        GROUP: tl.constexpr = shape.GROUP
        Q_NORM: tl.constexpr = rope.Q_NORM
        dtype: tl.constexpr = output.out.dtype.element_ty
        token = first.to(tl.int64)
        row = token * ((GROUP + 2) * kv_heads * HEAD_DIM)
        angles = tensors.cos_sin
        if rope.ROTATES:
            angles += tl.load(tensors.positions + token) * (2 * rope.HALF)
        if split == count - 1:
            _write_new(
                source,
                row + (GROUP * kv_heads + head) * HEAD_DIM,
                tensors.k_norm,
                angles,
                new,
                tl.load(tensors.slots + token),
                head,
                kv_heads,
                dtype,
                shape,
                rope,
            )
        r = tl.arange(0, splits.ROWS)
        norm = _norm_of(
            source,
            row,
            GROUP * kv_heads * HEAD_DIM,
            tensors.q_norm,
            (head * GROUP + tl.minimum(r, GROUP - 1)) * HEAD_DIM,
            dtype,
            rope,
            Q_NORM,
            rope.Q_WIDTH,
        )
        place = row + (head * GROUP + r) * HEAD_DIM
        q = _rotated(source, place, r < GROUP, norm, angles, dtype, shape, rope, Q_NORM, rope.ROTATES)
        even, odd, unit = as_factors(narrow(q, dtype), cache.key, shape)
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
            length - 1 + r * 0,
            scores,
            shape,
            splits.BLOCK_N,
        )
        finish_split(found, output, where, (count, first, 1), kv_heads, grid_splits, row_quant, shape, splits)


@triton.jit(do_not_specialize=["sequences", "table_width", "grid_splits"])
def _rope_decode(
    qkv,
    tensors,
    new,
    output,
    cache,
    batch,
    scores,
    row_quant,
    sequences,
    table_width,
    kv_heads,
    grid_splits,
    split_size,
    eps,
    shape: tl.constexpr,
    rope: tl.constexpr,
    splits: tl.constexpr,
    SEQUENCES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    source = (qkv, split_size, eps)
    attention = (output, cache, batch, scores, row_quant, table_width, kv_heads, grid_splits)
    if SEQUENCES == 0:
        where = (tl.program_id(0), tl.program_id(1), tl.program_id(2))
        _rope_decode_split(where, source, tensors, new, attention, shape, rope, splits)
    else:
        ends = splits_end(batch, sequences, scores.window, SEQUENCES, splits, shape.HAS_WINDOW)
        for item in tl.range(tl.program_id(0), tl.max(ends) * kv_heads, tl.num_programs(0), disable_licm=True):
            sequence, split = split_at(item // kv_heads, ends)
            where = (sequence, item % kv_heads, split)
            _rope_decode_split(where, source, tensors, new, attention, shape, rope, splits)


def rope_decode(
    qkv: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    output: Output,
    *,
    into: QuantizedActivation | None = None,
    input_quant: ActivationQuant | None = None,
    **sizes: int,
) -> Launch:
    """`rope` on qkv, and `decode` of the queries into the output, for every sequence with one new token."""
    expect(out=(output.out, (qkv.shape[-2], shape.num_heads, shape.head_dim)))
    plain = decode(output.out, inputs, cache, shape, output, into=into, input_quant=input_quant, **sizes)
    arguments = {**plain.arguments, **rope_arguments(qkv, inputs, cache, shape, cos_sin, q_norm, k_norm, eps)}
    del arguments["q"]  # which are made in the kernel
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
    output, sizes = output_into(out, inputs, cache, shape)
    into = quantized_rows(out, input_quant)
    launch = rope_decode(
        qkv, inputs, cache, shape, cos_sin, q_norm, k_norm, eps, output, into=into, input_quant=input_quant, **sizes
    )
    launch()
    return out.flatten(1) if into is None else into


def reads_rows_again(qkv: Tensor, shape: AttentionShape, *norms: Tensor | None) -> bool:
    """Whether programs may read whole rows of qkv for norms over all heads, if there are any: the table has a limit.

    A head's split of 256 tokens in bf16 has 128 KiB; 16 heads of 128 in 4 partial sums add 32 KiB of q. For many tokens
    the L2 cache needs longer for that than a launch takes. Not measured.
    """
    if all(w is None or w.numel() == shape.head_dim for w in norms):
        return True
    rows = qkv.numel() // qkv.shape[-1]  # of q, in all partial sums
    columns = shape.num_heads * shape.head_dim
    kib = rows * columns * qkv.element_size() // 1024
    return tuning.choose("norms over heads", kib, columns, 0, qkv.device)["again"] == 1
