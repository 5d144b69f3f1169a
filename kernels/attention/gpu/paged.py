"""What decode and prefill share: reading a paged cache by tiles of tokens, and the online softmax over them.

A tile's size has nothing to do with the cache's blocks: each row of a tile looks up its block in the table. Scores are
kept in units of log2, so that a weight is one exp2. A masked score is -1e30 instead of infinity, because the difference
of two infinities would be NaN. Until a row has seen a token its sums are meaningless; its first visible score resets
them.

8-bit caches are read as 16-bit words of two neighbouring elements, the smallest thing that `ldmatrix` moves; a word's
bytes go to two tiles, the even and the odd columns. q . k is then two products that are added up, weights @ v two
products side by side. Triton's own conversion fetches V byte by byte instead. Codes become fp16, which holds all of
them exactly, and which sm_89 and sm_90 make of e4m3 in one instruction (bf16 takes two); an A100 computes its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.launch import INTERPRETED, power_of_two
from octavo.kernels.launching.numerics import bytes_of, dot, narrow

LOG2_E = tl.constexpr(1.4426950408889634)
MASKED_SCORE = tl.constexpr(-1e30)
_INTERPRETED = tl.constexpr(INTERPRETED)
_FROM_E4M3 = tl.constexpr("""{
    .reg .b32 t;
    .reg .b16 l, h;
    prmt.b32 t, $2, $2, 0x3120;
    mov.b32 {l, h}, t;
    cvt.rn.f16x2.e4m3x2 $0, l;
    cvt.rn.f16x2.e4m3x2 $1, h;
}""")
# Without that conversion (sm_80): s eeee mmm at its place in an fp16, s 0eeee mmm0000000, is the number over 2^8, also
# where it is subnormal; a code of 0x7F (+ 1: 0x80) gets an exponent of ones, so that NaN stays NaN.
_FROM_E4M3_BITS = tl.constexpr("""{
    .reg .b32 w, s, n, m;
    mov.b32 m, 0x5C005C00;
    shl.b32 s, $2, 8;
    and.b32 s, s, 0x80008000;
    shl.b32 w, $2, 7;
    lop3.b32 w, w, 0x3F803F80, s, 0xEA;
    mul.rn.f16x2 w, w, m;
    and.b32 n, $2, 0x007F007F;
    add.u32 n, n, 0x00010001;
    and.b32 n, n, 0x00800080;
    mul.lo.u32 n, n, 0xF8;
    or.b32 $0, w, n;
    and.b32 s, $2, 0x80008000;
    shr.b32 w, $2, 1;
    lop3.b32 w, w, 0x3F803F80, s, 0xEA;
    mul.rn.f16x2 w, w, m;
    shr.b32 n, $2, 8;
    and.b32 n, n, 0x007F007F;
    add.u32 n, n, 0x00010001;
    and.b32 n, n, 0x00800080;
    mul.lo.u32 n, n, 0xF8;
    or.b32 $1, w, n;
}""")
# 0x6400 | b is the fp16 number 1024 + b; with its sign bit turned, a byte is the code + 128.
_FROM_INT8 = tl.constexpr("""{
    .reg .b32 t, c;
    mov.b32 c, 0x64806480;
    lop3.b32 t, $2, 0x00FF00FF, c, 0x6A;
    sub.rn.f16x2 $0, t, c;
    shr.b32 t, $2, 8;
    lop3.b32 t, t, 0x00FF00FF, c, 0x6A;
    sub.rn.f16x2 $1, t, c;
}""")


def expect_paged(q: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape, out: Tensor) -> None:
    """Whether all that attention over a paged cache reads and writes has its size."""
    rows = (q.shape[0], shape.num_heads, shape.head_dim)
    sequences, width = inputs.block_tables.shape
    expect(
        q=(None if q is out else q, rows),
        out=(out, rows),
        block_tables=(inputs.block_tables, (sequences, width)),
        seq_lens=(inputs.seq_lens, sequences),
        query_starts=(inputs.query_starts, sequences + 1),
    )
    cache.expect_heads(shape)


def list_size(sequences: int) -> int:
    """Of a list with an entry for each sequence, in a program: a warp's lanes at least, so that few are compiled."""
    return max(power_of_two(sequences), 32)


@triton.jit
def _bytes_of(word, CODE: tl.constexpr):
    """The numbers that stand in the low bytes of words, and in the high ones, as fp16."""
    if _INTERPRETED:
        kind: tl.constexpr = tl.float8e4nv if CODE == "e4m3" else tl.int8
        low, high = bytes_of(word, kind)
        low = low.to(tl.float16)
        high = high.to(tl.float16)
    else:  # results are written before the word is read for the last time: "&" keeps them in registers of their own
        e4m3: tl.constexpr = _FROM_E4M3 if tl.target_info.cuda_capability_geq(8, 9) else _FROM_E4M3_BITS
        asm: tl.constexpr = e4m3 if CODE == "e4m3" else _FROM_INT8
        low, high = tl.inline_asm_elementwise(
            asm, "=&r,=&r,r", [word], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    return low, high


@triton.jit
def _product(a, b, acc=None):
    """a @ b + acc. Float32 is multiplied as it is, not as tf32."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    return dot(a, b, acc)


@triton.jit
def load_queries(q, row, here, key, shape: tl.constexpr):
    """Rows of queries, as `as_factors` makes them."""
    at = tl.arange(0, shape.DIM)
    mask = here[:, None] & (at < shape.HEAD_DIM)[None, :]
    tile = tl.load(q + row[:, None] * shape.HEAD_DIM + at[None, :], mask=mask, other=0.0)
    return as_factors(tile, key, shape)


@triton.jit
def as_factors(tile, key, shape: tl.constexpr):
    """Queries [R, DIM] in the type that keys are multiplied in, and what their scores are multiplied by [R].

    For 8-bit keys these are the even columns and the odd ones [R, DIM / 2]; otherwise the same twice. fp16's range is
    shorter than bf16's: each row is divided by the power of two of its largest element.
    """
    kind: tl.constexpr = tl.float16 if shape.KEY_CODE != "" else key.dtype.element_ty
    unit = tl.full((tile.shape[0],), 1.0, tl.float32)
    if kind != tile.dtype:
        tile = tile.to(tl.float32)
        if kind == tl.float16:
            largest = tl.max(tl.abs(tile), axis=1)
            unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            unit = tl.where(unit == 0.0, 1.0, unit)
            tile = tile / unit[:, None]
        tile = narrow(tile, kind)
    even = tile
    odd = tile
    if shape.KEY_CODE != "":
        even, odd = tl.split(tl.reshape(tile, (tile.shape[0], shape.DIM // 2, 2)))
    return even, odd, unit


@triton.jit
def _load_tile(store, table, head, kv_heads, token, end, shape: tl.constexpr, CODE: tl.constexpr, MASKED: tl.constexpr):
    """The rows of tokens [N] from keys or values: even and odd columns; tokens from end on are zeros where MASKED."""
    each: tl.constexpr = 1 if CODE == "" else 2  # elements of a word
    width: tl.constexpr = shape.HEAD_DIM // each
    at = tl.arange(0, shape.DIM // each)
    if MASKED:
        block = tl.load(table + token // shape.BLOCK_SIZE, mask=token < end, other=0).to(tl.int64)
    else:
        block = tl.load(table + token // shape.BLOCK_SIZE).to(tl.int64)
    row = ((block * kv_heads + head) * shape.BLOCK_SIZE + token % shape.BLOCK_SIZE) * width
    place = store + row[:, None] + at[None, :]
    if MASKED and shape.HEAD_DIM != shape.DIM:
        tile = tl.load(place, mask=(token < end)[:, None] & (at < width)[None, :], other=0)
    elif MASKED:
        tile = tl.load(place, mask=(token < end)[:, None], other=0)
    elif shape.HEAD_DIM != shape.DIM:
        tile = tl.load(place, mask=(at < width)[None, :], other=0)
    else:
        tile = tl.load(place)
    even = tile
    odd = tile
    if CODE != "":
        even, odd = _bytes_of(tile, CODE)
    return even, odd


@triton.jit
def _capped(scores, soft_cap):
    """c tanh(scores / c), by an exponential that can't overflow."""
    e = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / soft_cap))
    size = soft_cap * ((1.0 - e) / (1.0 + e))
    return tl.where(scores < 0.0, -size, size)


@triton.jit
def accumulate_softmax(
    state,
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
    shape: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Go over the tokens begin .. end with rows of queries that stand at position [R]; factor [R] scales their scores.

    state is the rows' largest score, sum of weights, and weighted sums of values (even and odd columns) so far; the
    new one is returned. Without MASKED every row sees every token, and end - begin is a multiple of BLOCK_N.
    """
    KEY_CODE: tl.constexpr = shape.KEY_CODE
    VALUE_CODE: tl.constexpr = shape.VALUE_CODE
    top, total, even, odd = state
    q, q_odd = queries
    for start in range(begin, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        k, k_odd = _load_tile(cache.key, table, head, kv_heads, token, end, shape, KEY_CODE, MASKED)
        score = _product(q, tl.trans(k))
        if shape.KEY_CODE != "":
            score = _product(q_odd, tl.trans(k_odd), score)
        if shape.HAS_CAP:
            score = _capped(score * factor[:, None], scores.soft_cap) * LOG2_E
        elif MASKED:
            score *= factor[:, None]
        if MASKED:
            seen = token[None, :] <= position[:, None]
            if shape.HAS_WINDOW:
                seen = seen & (token[None, :] > position[:, None] - scores.window)
            score = tl.where(seen, score, MASKED_SCORE)
        if MASKED or shape.HAS_CAP:
            higher = tl.maximum(top, tl.max(score, axis=1))
            weights = tl.exp2(score - higher[:, None])
        else:  # one multiply-add for a score
            higher = tl.maximum(top, tl.max(score, axis=1) * factor)
            weights = tl.exp2(score * factor[:, None] - higher[:, None])
        shrink = tl.exp2(top - higher)
        top = higher
        total = total * shrink + tl.sum(weights, axis=1)
        v, v_odd = _load_tile(cache.value, table, head, kv_heads, token, end, shape, VALUE_CODE, MASKED)
        weights = narrow(weights, v.dtype)
        even = _product(weights, v, even * shrink[:, None])
        if shape.VALUE_CODE != "":
            odd = _product(weights, v_odd, odd * shrink[:, None])
    return top, total, even, odd


@triton.jit
def init_state(ROWS: tl.constexpr, shape: tl.constexpr):
    """The state before the first token."""
    width: tl.constexpr = shape.DIM if shape.VALUE_CODE == "" else shape.DIM // 2
    zeros = tl.zeros((ROWS, width), tl.float32)
    return tl.full((ROWS,), MASKED_SCORE, tl.float32), tl.zeros((ROWS,), tl.float32), zeros, zeros


@triton.jit
def finalize_softmax(state, value_scale, shape: tl.constexpr):
    """The weighted mean of values [R, DIM], zeros where nothing was seen."""
    _, total, even, odd = state
    if shape.VALUE_CODE != "":
        even = tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))
    nothing = total == 0.0
    return even * tl.where(nothing, 0.0, value_scale / tl.where(nothing, 1.0, total))[:, None]
