"""CPU body of attention for sequences with several new tokens, in bf16 (AVX-512 BF16): flash attention.

One item of work is a block of query rows of one sequence and one KV head; a row is a (token, query head of the group)
pair. An item goes over the keys in chunks of CHUNK. A chunk is copied out of its cache blocks once, as bf16 rows, and
serves all strips of 48 rows of the item. The softmax is updated from chunk to chunk in float32 (arXiv 2205.14135). bf16
holds the codes of 8-bit caches exactly; their scales are multiplied into the scores and into the output. Rows with
scales of their own are rounded to bf16.
Chunks begin at multiples of CHUNK and every lane of a vector computes the same sums, so that a row's output is the same
to the bit whatever else is in the batch and however a prompt is split. Reference: `attention.reference`.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.decode_vectors import first_key
from octavo.kernels.attention.prefill_vectors import (
    LANES,
    LINE,
    VECTORS,
    cap16,
    clear,
    copy,
    make_score_tile,
    make_value_tile,
    mask16,
    pack_queries16,
    pack_values,
    softmax16,
    store_outputs16,
    to_bf16,
)
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.attention.token_rows_cpu import kind_of, load_rows, row_bytes
from octavo.kernels.native import cpu_features
from octavo.kernels.native.dtypes import BF16
from octavo.kernels.native.jit import kernel, next_item, threads_for, view

CHUNK = 128
"""Keys of a chunk."""
MAX_STRIPS = 8
"""Most strips of an item. Tuned on 2 cores of a Zen 5."""
_DECODED = 16  # rows decoded at once
STRIP = VECTORS * LANES
_LOG2E = 1.4426950408889634

_S1 = make_score_tile(16, 1)
_S2 = make_score_tile(8, 2)
_S3 = make_score_tile(8, 3)
_V1 = make_value_tile(16, 1)
_V2 = make_value_tile(8, 2)
_V3 = make_value_tile(8, 3)

# Called by kernels only: without the wrappers for callers in Python and C, which take longer to compile than the body.
_inner = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

# The kernel's arguments, in the order of the call in `attend`.
(_Q, _OUT, _KEY, _VALUE, _TABLES, _LENGTHS, _STARTS, _KEY_SCALE, _VALUE_SCALE, _TABLE_WIDTH) = range(1, 11)
(_KEY_KIND, _VALUE_KIND, _SEQS, _HEADS, _KV_HEADS, _DIM, _BLOCK, _SPAN, _STRIPS, _LEAST) = range(11, 21)
(_SINKS, _SCALE, _SOFT_CAP) = range(21, 24)
# Where each part of a thread's working memory begins. TOP, TOTAL, LOW and HIGH: a line a strip; PLACES: 8 bytes a row.
(_KEYS, _ROWS, _VALUES, _SCORES, _QUERIES, _SUMS, _TOP, _TOTAL, _LOW, _HIGH) = range(10)
(_FACTOR, _PLACES, _FLOATS, _END) = range(10, 14)


@_inner
def _lay_out(dim, strips, base, w):  # type: ignore[no-untyped-def]
    """Fill w with the addresses of the parts, each of whole cache lines."""
    rows = CHUNK * dim * 2
    sizes = (
        rows,
        rows,
        rows,
        CHUNK * LINE,
        strips * dim * LINE // 2,
        strips * dim * LINE,
        strips * LINE,
        strips * LINE,
        strips * LINE,
        strips * LINE,
        LINE,
        strips * STRIP * 8,
        _DECODED * dim * 4,
    )
    at = base
    for part, size in enumerate(sizes):
        w[part] = at
        at += size
    w[_END] = at


@_inner
def _find(item, a, starts):  # type: ignore[no-untyped-def]
    """An item's sequence, its KV head, and its first and last row of the sequence's new * share; long items first."""
    share = a[_HEADS] // a[_KV_HEADS]
    size = a[_STRIPS] * STRIP
    for seq in range(a[_SEQS]):
        new = np.int64(starts[seq + 1]) - starts[seq]
        blocks = (new * share + size - 1) // size if new >= a[_LEAST] else 0
        if item < blocks * a[_KV_HEADS]:
            block = blocks - 1 - item // a[_KV_HEADS]
            return seq, item % a[_KV_HEADS], block * size, min((block + 1) * size, new * share) - 1
        item -= blocks * a[_KV_HEADS]
    return -1, 0, 0, 0


@_inner
def _load_chunk(store, kind, a, table, head, begin, end, floats, rows):  # type: ignore[no-untyped-def]
    """Keys or values begin .. end (not included) as bf16 rows, and rows of zeros up to a multiple of 16."""
    dim = a[_DIM]
    block_size = a[_BLOCK]
    size = row_bytes(kind, dim)
    j = begin
    while j < end:
        offset = j % block_size
        n = min(block_size - offset, end - j, CHUNK if kind == BF16 else _DECODED)
        at = store + ((np.int64(table[j // block_size]) * a[_KV_HEADS] + head) * block_size + offset) * size
        if kind == BF16:
            copy(at, n * size, rows)
        else:
            load_rows(at, kind, floats, n, dim)
            to_bf16(floats.ctypes.data, n * dim, rows)
        rows += n * dim * 2
        j += n
    clear(rows, -(end - begin) % 16 * dim * 2)


@_inner
def _begin(a, w, head, start, new, length, first, last):  # type: ignore[no-untyped-def]
    """Prepare rows first .. last of an item: queries, the range of visible keys, empty sums. Pads with the last row."""
    share = a[_HEADS] // a[_KV_HEADS]
    strips = (last - first) // STRIP + 1
    low = view(w[_LOW], (strips * STRIP,), np.int32)
    high = view(w[_HIGH], (strips * STRIP,), np.int32)
    places = view(w[_PLACES], (strips * STRIP,), np.int64)
    top = view(w[_TOP], (strips * STRIP,), np.float32)
    for i in range(strips * STRIP):
        top[i] = np.float32(-3.4028234e38)  # not infinite: the difference of two infinities would be NaN
        row = min(first + i, last)
        position = length - new + row // share
        high[i] = position
        low[i] = first_key(position, a[_SPAN])
        places[i] = a[_Q] + ((start + row // share) * a[_HEADS] + head * share + row % share) * a[_DIM] * 2
    for i in range(strips * VECTORS):
        pack_queries16(
            w[_PLACES] + i * LANES * 8,
            a[_DIM] // 2,
            w[_QUERIES] + i // VECTORS * a[_DIM] // 2 * LINE + i % VECTORS * 64,
        )
    clear(w[_TOTAL], strips * LINE)
    if a[_SINKS] != 0:  # as if it were the first key, whose value is zero
        sinks = view(a[_SINKS], (a[_HEADS],), np.float32)
        total = view(w[_TOTAL], (strips * STRIP,), np.float32)
        for i in range(strips * STRIP):
            top[i] = sinks[head * share + min(first + i, last) % share] * np.float32(_LOG2E)
            total[i] = np.float32(1)
    clear(w[_SUMS], strips * a[_DIM] * LINE)


@_inner
def _scores(vectors, w, dim, keys, q, factor):  # type: ignore[no-untyped-def]
    step = 16 if vectors == 1 else 8
    for key in range(0, keys, step):
        rows = w[_KEYS] + key * dim * 2
        scores = w[_SCORES] + key * LINE
        if vectors == 3:
            _S3(rows, dim * 2, q, dim // 2, scores, factor)
        elif vectors == 2:
            _S2(rows, dim * 2, q, dim // 2, scores, factor)
        else:
            _S1(rows, dim * 2, q, dim // 2, scores, factor)


@_inner
def _add_values(vectors, w, dim, keys, out):  # type: ignore[no-untyped-def]
    step = 16 if vectors == 1 else 8
    for d in range(0, dim, step):
        values = w[_VALUES] + d // 16 * CHUNK * 32 + d % 16 * 4
        sums = out + d * LINE
        if vectors == 3:
            _V3(values, w[_SCORES], keys // 2, sums, w[_FACTOR])
        elif vectors == 2:
            _V2(values, w[_SCORES], keys // 2, sums, w[_FACTOR])
        else:
            _V1(values, w[_SCORES], keys // 2, sums, w[_FACTOR])


@_inner
def _attend(a, w, strip, rows, begin, end, factor, cap):  # type: ignore[no-untyped-def]
    """Add keys begin .. end (not included) to a strip of `rows` rows."""
    low = view(w[_LOW] + strip * LINE, (STRIP,), np.int32)
    high = view(w[_HIGH] + strip * LINE, (STRIP,), np.int32)
    dim = a[_DIM]
    vectors = (rows + LANES - 1) // LANES
    count = min(end, high[STRIP - 1] + 1) - begin
    if count <= 0 or end <= low[0]:
        return
    keys = (count + 7) // 8 * 8  # _S1 takes 16 at a time; the chunk is filled up with zeros
    _scores(vectors, w, dim, keys, w[_QUERIES] + strip * dim // 2 * LINE, factor)
    for v in range(vectors):
        at = w[_SCORES] + v * 64
        line = strip * LINE + v * 64
        if cap > 0:
            cap16(at, keys, cap)
        if begin + keys - 1 > high[0] or begin < low[STRIP - 1]:
            mask16(at, keys, begin, w[_LOW] + line, w[_HIGH] + line)
        softmax16(at, keys, w[_TOP] + line, w[_TOTAL] + line, w[_FACTOR] + v * 64)
    _add_values(vectors, w, dim, keys, w[_SUMS] + strip * dim * LINE)


@_inner
def _finish(a, w, rows, scale):  # type: ignore[no-untyped-def]
    for i in range((rows + LANES - 1) // LANES):
        out = w[_SUMS] + i // VECTORS * a[_DIM] * LINE + i % VECTORS * 64
        store_outputs16(out, a[_DIM], w[_TOTAL] + i * 64, w[_PLACES] + i * LANES * 8, a[_OUT] - a[_Q], scale)


@kernel("qqqqqqqqqqqqqqqqqqqqqdd")
def _prefill(args):  # type: ignore[no-untyped-def]
    """Items: (sequence, block of rows, KV head); see `_find`."""
    a = numba.carray(args, (24,), np.int64)
    f = numba.carray(args, (24,), np.float64)
    dim = a[_DIM]
    seqs = a[_SEQS]
    kv_heads = a[_KV_HEADS]
    tables = view(a[_TABLES], (seqs, a[_TABLE_WIDTH]), np.int32)
    lengths = view(a[_LENGTHS], (seqs,), np.int32)
    starts = view(a[_STARTS], (seqs + 1,), np.int32)
    key_scale = view(a[_KEY_SCALE], (kv_heads,), np.float32)
    value_scale = view(a[_VALUE_SCALE], (kv_heads,), np.float32)
    cap = f[_SOFT_CAP]
    base = f[_SCALE] * _LOG2E if cap == 0 else f[_SCALE] * 2 * _LOG2E / cap
    w = np.empty(_END + 1, np.int64)
    _lay_out(dim, a[_STRIPS], 0, w)
    memory = np.empty(w[_END] + 64, np.uint8)
    _lay_out(dim, a[_STRIPS], (memory.ctypes.data + 63) // 64 * 64, w)
    floats = view(w[_FLOATS], (_DECODED * dim,), np.float32)
    while True:
        seq, head, first, last = _find(next_item(args), a, starts)
        if seq < 0:
            break
        start = np.int64(starts[seq])
        length = np.int64(lengths[seq])
        _begin(a, w, head, start, starts[seq + 1] - start, length, first, last)
        rows = last - first + 1
        strips = (last - first) // STRIP + 1
        low = view(w[_LOW], (strips * STRIP,), np.int32)[0]
        stop = view(w[_HIGH], (strips * STRIP,), np.int32)[strips * STRIP - 1] + 1
        for begin in range(low // CHUNK * CHUNK, stop, CHUNK):
            end = min(begin + CHUNK, stop)
            _load_chunk(a[_KEY], a[_KEY_KIND], a, tables[seq], head, begin, end, floats, w[_KEYS])
            _load_chunk(a[_VALUE], a[_VALUE_KIND], a, tables[seq], head, begin, end, floats, w[_ROWS])
            pack_values(w[_ROWS], dim, (end - begin + 15) // 16 * 16, w[_VALUES], CHUNK * 32)
            factor = np.float32(base * key_scale[head])
            for strip in range(strips):
                _attend(a, w, strip, min(STRIP, rows - strip * STRIP), begin, end, factor, np.float32(cap * _LOG2E))
        _finish(a, w, rows, value_scale[head])
    memory[0] = 0  # keeps it alive: numba frees an array after its last use by name


def fits(q: Tensor, shape: AttentionShape) -> bool:
    """Whether `attend` can take these queries."""
    takes = q.dtype == torch.bfloat16 and shape.head_dim % 16 == 0 and shape.head_dim >= 32
    return takes and cpu_features.has_dot_products()


def attend(
    q: Tensor, out: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape, counts: list[int], least: int
) -> None:
    """Attention of every sequence with at least `least` new tokens. q and out are [T, Hq, D].

    counts: theirs, or near enough: they decide how the work is divided alone.
    """
    share = shape.num_heads // shape.num_kv_heads
    strips = sum(-(-n * share // STRIP) for n in counts) * shape.num_kv_heads
    threads = threads_for(strips * STRIP * shape.head_dim * inputs.max_seq_len // 64, 16384)
    _prefill.start(
        threads,
        q.data_ptr(),
        out.data_ptr(),
        cache.key.data_ptr(),
        cache.value.data_ptr(),
        inputs.block_tables.data_ptr(),
        inputs.seq_lens.data_ptr(),
        inputs.query_starts.data_ptr(),
        cache.key_scale.data_ptr(),
        cache.value_scale.data_ptr(),
        inputs.block_tables.shape[1],
        kind_of(cache.key, shape.head_dim),
        kind_of(cache.value, shape.head_dim),
        inputs.block_tables.shape[0],
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        cache.block_size,
        shape.span,
        min(MAX_STRIPS, max(1, strips // (8 * threads))),
        least,
        shape.sinks_address,
        shape.scale,
        shape.soft_cap or 0.0,
    )


KERNELS = (_prefill,)
