"""CPU body of attention for sequences with few new tokens, in bf16 (AVX-512 BF16): the context in chunks.

One item of work is a chunk of CHUNK keys of one query and one KV head, with all query heads that share it. Chunks begin
at multiples of CHUNK, so that their results don't depend on how many threads there are and what else is in the batch;
the long contexts of few sequences keep every thread busy, and an item's scores and keys stay in the L1 and L2 caches.
Where a query sees several chunks, each leaves its unnormalized output, its largest score and its sum of weights, which
a second kernel joins (arXiv 2205.14135, section 3; in the order of the chunks).
8-bit caches are converted in registers; their scales are multiplied into the scores and into the output.
Reference: `attention.reference`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.decode_tiles import E4M3, make_mix, make_scores, make_softmax
from octavo.kernels.attention.decode_vectors import first_key
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.native import cpu_features
from octavo.kernels.native.dtypes import BF16, FP8, INT8, KINDS, exp, size_of, store_row
from octavo.kernels.native.jit import kernel, next_item, threads_for, view

CHUNK = 512
"""Keys of a chunk. Tuned on 2 cores of a Zen 5."""
MIN_READS = 8192
"""Elements of keys from which on a second thread pays: each costs more here than in an elementwise pass."""
_AHEAD = 8192  # bytes between the keys or values that are computed on and those that are fetched
_LOG2E = 1.4426950408889634

_SOFTMAX1, _SOFTMAX2, _SOFTMAX4 = (make_softmax(width) for width in (1, 2, 4))

# Called by kernels only: without the wrappers for callers in Python and C, which take longer to compile than the body.
_inner = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

# The kernels' arguments, in the order of the call in `attend`.
(_Q, _OUT, _KEY, _VALUE, _TABLES, _LENGTHS, _STARTS, _KEY_SCALE, _VALUE_SCALE, _PARTS) = range(1, 11)
(_TABLE_WIDTH, _KEY_KIND, _VALUE_KIND, _SEQS, _HEADS, _KV_HEADS, _DIM, _BLOCK, _SPAN) = range(11, 20)
(_MOST, _PLACES, _THREADS, _SINKS, _SCALE, _SOFT_CAP) = range(20, 26)


def _scores_of(kind: int) -> Any:
    """The scores of up to 4 rows over keys of this kind."""
    one, two, three, four = (make_scores(rows, kind) for rows in (1, 2, 3, 4))

    @_inner
    def score(rows, q, dim, runs, ahead, block, keys, scores, factor):  # type: ignore[no-untyped-def]
        if rows == 4:
            four(q, dim, runs, ahead, block, keys, scores, factor)
        elif rows == 3:
            three(q, dim, runs, ahead, block, keys, scores, factor)
        elif rows == 2:
            two(q, dim, runs, ahead, block, keys, scores, factor)
        else:
            one(q, dim, runs, ahead, block, keys, scores, factor)

    return score


def _mix_of(kind: int) -> Any:
    """The outputs of up to 4 rows over values of this kind."""
    one, two, three, four = (make_mix(rows, kind) for rows in (1, 2, 3, 4))

    @_inner
    def mix(rows, weights, dim, runs, ahead, block, keys, out):  # type: ignore[no-untyped-def]
        if rows == 4:
            four(weights, dim, runs, ahead, block, keys, out)
        elif rows == 3:
            three(weights, dim, runs, ahead, block, keys, out)
        elif rows == 2:
            two(weights, dim, runs, ahead, block, keys, out)
        else:
            one(weights, dim, runs, ahead, block, keys, out)

    return mix


_SCORE_BF16, _SCORE_FP8, _SCORE_INT8 = (_scores_of(kind) for kind in (BF16, FP8, INT8))
_MIX_BF16, _MIX_FP8, _MIX_INT8 = (_mix_of(kind) for kind in (BF16, FP8, INT8))


@_inner
def _score(rows, kind, q, dim, runs, ahead, block, keys, scores, factor):  # type: ignore[no-untyped-def]
    if kind == BF16:
        _SCORE_BF16(rows, q, dim, runs, ahead, block, keys, scores, factor)
    elif kind == FP8:
        _SCORE_FP8(rows, q, dim, runs, ahead, block, keys, scores, factor)
    else:
        _SCORE_INT8(rows, q, dim, runs, ahead, block, keys, scores, factor)


@_inner
def _mix(rows, kind, weights, dim, runs, ahead, block, keys, out):  # type: ignore[no-untyped-def]
    if kind == BF16:
        _MIX_BF16(rows, weights, dim, runs, ahead, block, keys, out)
    elif kind == FP8:
        _MIX_FP8(rows, weights, dim, runs, ahead, block, keys, out)
    else:
        _MIX_INT8(rows, weights, dim, runs, ahead, block, keys, out)


@_inner
def _softmax(rows, scores, keys, cap, top, total):  # type: ignore[no-untyped-def]
    if rows > 2:
        _SOFTMAX4(scores, (keys + 3) // 4, cap, top, total)
    elif rows == 2:
        _SOFTMAX2(scores, (keys + 7) // 8, cap, top, total)
    else:
        _SOFTMAX1(scores, (keys + 15) // 16, cap, top, total)


@_inner
def _chunks(a, length, new):  # type: ignore[no-untyped-def]
    """The first chunk of a sequence that one of its new tokens sees, and the one behind the last."""
    return first_key(length - new, a[_SPAN]) // CHUNK, (length - 1) // CHUNK + 1


@_inner
def _find(item, a, lengths, starts, seq, base):  # type: ignore[no-untyped-def]
    """The sequence of an item, not before `seq`, whose first item is number `base`; and the number of its own first."""
    while seq < a[_SEQS]:
        new = np.int64(starts[seq + 1]) - starts[seq]
        if new <= a[_MOST]:
            first, last = _chunks(a, np.int64(lengths[seq]), new)
            count = new * a[_KV_HEADS] * (last - first)
            if item < base + count:
                break
            base += count
        seq += 1
    return seq, base


@_inner
def _locate(a, table, store, size, head, first, count, runs):  # type: ignore[no-untyped-def]
    """The addresses of the `count` runs of cached rows from key `first` on, a multiple of the block's size."""
    for i in range(count):
        block = np.int64(table[first // a[_BLOCK] + i])
        runs[i] = store + (block * a[_KV_HEADS] + head) * a[_BLOCK] * size


@_inner
def _finish(a, head, out, top, total, place, scale):  # type: ignore[no-untyped-def]
    """Write a query head's output, of weights relative to the largest score `top`; its sink adds to their sum."""
    if a[_SINKS] != 0:
        sink = view(a[_SINKS], (a[_HEADS],), np.float32)[head]
        total += exp(sink - top * np.float32(1 / _LOG2E))
    for d in range(a[_DIM]):
        out[d] *= scale / total
    store_row(out, np.float32(1), a[_OUT] + place, BF16, a[_DIM])


@kernel("qqqqqqqqqqqqqqqqqqqqqqqdd")
def _attend(args):  # type: ignore[no-untyped-def]
    """Items: (sequence, chunk, query, KV head); see `_find`."""
    a = numba.carray(args, (26,), np.int64)
    f = numba.carray(args, (26,), np.float64)
    seqs = a[_SEQS]
    kv_heads = a[_KV_HEADS]
    dim = a[_DIM]
    block = a[_BLOCK]
    share = a[_HEADS] // kv_heads
    tables = view(a[_TABLES], (seqs, a[_TABLE_WIDTH]), np.int32)
    lengths = view(a[_LENGTHS], (seqs,), np.int32)
    starts = view(a[_STARTS], (seqs + 1,), np.int32)
    key_scale = view(a[_KEY_SCALE], (kv_heads,), np.float32)
    value_scale = view(a[_VALUE_SCALE], (kv_heads,), np.float32)
    key_size = dim * size_of(a[_KEY_KIND])
    value_size = dim * size_of(a[_VALUE_KIND])
    cap = f[_SOFT_CAP]
    base_factor = f[_SCALE] * _LOG2E if cap == 0 else f[_SCALE] * 2 * _LOG2E / cap
    if a[_KEY_KIND] == FP8:
        base_factor *= E4M3
    base_scale = np.float32(E4M3 if a[_VALUE_KIND] == FP8 else 1.0)
    groups = (share + 3) // 4
    ahead = max(1, _AHEAD // (block * key_size))
    runs = np.empty(2 * (CHUNK // block + 2) + ahead, np.int64)
    scores = np.empty(4 * CHUNK + 4 * block + 16, np.float32)
    out = np.empty((4, dim), np.float32)
    top = np.empty(16, np.float32)
    total = np.empty(16, np.float32)
    seq = 0
    base = 0
    while True:
        item = next_item(args)
        seq, base = _find(item, a, lengths, starts, seq, base)
        if seq >= seqs:
            break
        new = np.int64(starts[seq + 1]) - starts[seq]
        first_chunk, end_chunk = _chunks(a, np.int64(lengths[seq]), new)
        head = (item - base) % kv_heads
        query = (item - base) // kv_heads % new
        chunk = first_chunk + (item - base) // (kv_heads * new)
        length = np.int64(lengths[seq]) - new + query + 1
        oldest = max(chunk * CHUNK, first_key(length - 1, a[_SPAN]))
        begin = oldest // block * block
        keys = min((chunk + 1) * CHUNK, length) - begin
        alone = end_chunk - first_chunk == 1
        part = ((seq * a[_MOST] + query) * kv_heads + head) * a[_PLACES] + chunk - first_chunk
        if keys > oldest - begin:
            count = (keys + block - 1) // block
            _locate(a, tables[seq], a[_KEY], key_size, head, begin, count, runs)
            _locate(a, tables[seq], a[_VALUE], value_size, head, begin, count, runs[count:])
            for i in range(ahead):
                runs[2 * count + i] = runs[2 * count - 1]
            _look_on(item + a[_THREADS], a, lengths, starts, tables, seq, base, ahead, key_size, runs[2 * count :])
        for group in range(groups):
            first_row = share * group // groups
            rows = share * (group + 1) // groups - first_row
            parts = view(a[_PARTS] + (part * share + first_row) * (dim + 16) * 4, (rows, dim + 16), np.float32)
            if keys <= oldest - begin:  # of the sequence's new tokens this one sees nothing of the chunk
                for r in range(rows):
                    parts[r, dim + 1] = 0
                continue
            place = ((starts[seq] + query) * a[_HEADS] + head * share + first_row) * dim * 2
            factor = np.float32(base_factor * key_scale[head])
            at = scores.ctypes.data
            _score(rows, a[_KEY_KIND], a[_Q] + place, dim, runs.ctypes.data, ahead, block, keys, at, factor)
            width = 4 if rows > 2 else rows
            for i in range((oldest - begin) * width):
                scores[i] = -np.inf
            for i in range(keys * width, (keys * width + 15) // 16 * 16):
                scores[i] = -np.inf
            _softmax(rows, at, keys, np.float32(cap * _LOG2E), top.ctypes.data, total.ctypes.data)
            values = runs.ctypes.data + 8 * count
            _mix(rows, a[_VALUE_KIND], at, dim, values, ahead, block, keys, out.ctypes.data)
            for r in range(rows):
                if alone:
                    of = head * share + first_row + r
                    _finish(a, of, out[r], top[r], total[r], place + r * dim * 2, base_scale * value_scale[head])
                else:
                    parts[r, :dim] = out[r]
                    parts[r, dim] = top[r]
                    parts[r, dim + 1] = total[r]


@_inner
def _look_on(item, a, lengths, starts, tables, seq, base, ahead, size, runs):  # type: ignore[no-untyped-def]
    """The first runs of an item's keys, as far as there is such an item: probably this thread's next one."""
    seq, base = _find(item, a, lengths, starts, seq, base)
    if seq < a[_SEQS]:
        new = np.int64(starts[seq + 1]) - starts[seq]
        first_chunk, _ = _chunks(a, np.int64(lengths[seq]), new)
        chunk = first_chunk + (item - base) // (a[_KV_HEADS] * new)
        count = min(ahead, (lengths[seq] - 1) // a[_BLOCK] + 1 - chunk * CHUNK // a[_BLOCK])
        _locate(a, tables[seq], a[_KEY], size, (item - base) % a[_KV_HEADS], chunk * CHUNK, count, runs)


@kernel("qqqqqqqqqqqqqqqqqqqqqqqdd")
def _join(args):  # type: ignore[no-untyped-def]
    """Items: (sequence, query, head), those of one chunk left out."""
    a = numba.carray(args, (26,), np.int64)
    seqs = a[_SEQS]
    heads = a[_HEADS]
    share = heads // a[_KV_HEADS]
    dim = a[_DIM]
    lengths = view(a[_LENGTHS], (seqs,), np.int32)
    starts = view(a[_STARTS], (seqs + 1,), np.int32)
    value_scale = view(a[_VALUE_SCALE], (a[_KV_HEADS],), np.float32)
    base_scale = np.float32(E4M3 if a[_VALUE_KIND] == FP8 else 1.0)
    out = np.empty(dim, np.float32)
    while True:
        item = next_item(args)
        seq = item // (a[_MOST] * heads)
        if seq >= seqs:
            break
        query = item // heads % a[_MOST]
        new = np.int64(starts[seq + 1]) - starts[seq]
        first, end = _chunks(a, np.int64(lengths[seq]), new)
        if query >= new or new > a[_MOST] or end - first == 1:
            continue
        head = item % heads
        chunks = view(a[_PARTS], (seqs, a[_MOST], a[_KV_HEADS], a[_PLACES], share, dim + 16), np.float32)
        parts = chunks[seq, query, head // share, :, head % share]
        top = np.float32(-3.4028234e38)
        for c in range(end - first):
            if parts[c, dim + 1] != 0:
                top = max(top, parts[c, dim])
        total = np.float32(0)
        out[:] = 0
        for c in range(end - first):
            if parts[c, dim + 1] != 0:
                factor = exp((parts[c, dim] - top) * np.float32(1 / _LOG2E))
                total += factor * parts[c, dim + 1]
                for d in range(dim):
                    out[d] += factor * parts[c, d]
        place = ((starts[seq] + query) * heads + head) * dim * 2
        _finish(a, head, out, top, total, place, base_scale * value_scale[head // share])


def fits(q: Tensor, cache: LayerCache, shape: AttentionShape) -> bool:
    """Whether `attend` can take these queries over this cache."""
    takes = q.dtype == torch.bfloat16 and shape.head_dim % 32 == 0 and cache.block_size % 4 == 0
    kinds = {KINDS.get(cache.key.dtype), KINDS.get(cache.value.dtype)}
    return takes and CHUNK % cache.block_size == 0 and kinds <= {BF16, FP8, INT8} and cpu_features.has_dot_products()


def attend(q: Tensor, out: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape, most: int) -> None:
    """Attention of every sequence with at most `most` new tokens. q and out are [T, Hq, D]."""
    seqs, blocks = inputs.block_tables.shape
    reads = shape.num_kv_heads * shape.head_dim * inputs.max_seq_len * seqs
    threads = threads_for(reads, MIN_READS)
    span = inputs.max_seq_len if shape.window is None else min(inputs.max_seq_len, shape.window + most - 1)
    places = min((span - 1) // CHUNK + 2, (inputs.max_seq_len - 1) // CHUNK + 1)  # a window may begin within a chunk
    rows = seqs * most * shape.num_heads * places if places > 1 else 0
    parts = torch.empty(rows * (shape.head_dim + 16), dtype=torch.float32)
    arguments = (
        q.data_ptr(),
        out.data_ptr(),
        cache.key.data_ptr(),
        cache.value.data_ptr(),
        inputs.block_tables.data_ptr(),
        inputs.seq_lens.data_ptr(),
        inputs.query_starts.data_ptr(),
        cache.key_scale.data_ptr(),
        cache.value_scale.data_ptr(),
        parts.data_ptr(),
        blocks,
        KINDS[cache.key.dtype],
        KINDS[cache.value.dtype],
        seqs,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        cache.block_size,
        shape.span,
        most,
        places,
        threads,
        shape.sinks_address,
        shape.scale,
        shape.soft_cap or 0.0,
    )
    _attend.start(threads, *arguments)
    if places > 1:
        _join.start(threads_for(rows * shape.head_dim), *arguments)


KERNELS = (_attend, _join)
