"""CPU bodies of attention over a paged cache.

Decode: `decode_cpu` in bf16 on machines with AVX-512 BF16. Else one item of work is a group of at most 4 query heads
that share a KV head, for one sequence. The scores of the whole context are one float32 row per head (for 32k tokens 128
KB, which fit the L2 cache), so the softmax is computed at once, without rescaling. Float16 and 8-bit caches are decoded
block by block into a float32 tile, and so are rows with scales of their own.
Prefill: `prefill_cpu` in bf16 on machines with AVX-512 BF16; else keys and values are gathered out of their blocks once
and torch's flash attention runs on them.
Reference: `attention.reference`.
"""

from __future__ import annotations

from itertools import pairwise

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.attention import cache as paged
from octavo.kernels.attention import decode_cpu, prefill_cpu, reference
from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.decode_vectors import add_weighted_rows, dot_rows, fetch, first_key
from octavo.kernels.attention.step import QUERY_CLASSES, StepInputs
from octavo.kernels.attention.token_rows_cpu import kind_of, load_rows, row_bytes
from octavo.kernels.native.dtypes import BF16, FLOAT32, KINDS, exp, load_row, size_of, store_row
from octavo.kernels.native.jit import kernel, next_item, threads_for, view

MAX_KERNEL_QUERIES = QUERY_CLASSES[1]
"""Sequences with more new tokens go through `prefill_cpu`, where that fits. Tuned on 2 cores of a Zen 5."""
MAX_TORCH_QUERIES = QUERY_CLASSES[2]
"""Where it doesn't fit: with more new tokens, torch's attention runs on gathered keys and values."""

# Called by kernels only: without the wrappers for callers in Python and C, which take longer to compile than the body.
_inner = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)

# The decode kernel's arguments, in the order of the call in `_run_decode`.
(_Q, _OUT, _KEY, _VALUE, _TABLES, _LENGTHS, _STARTS, _KEY_SCALE, _VALUE_SCALE, _TABLE_WIDTH) = range(1, 11)
(_Q_KIND, _KEY_KIND, _VALUE_KIND, _SEQS, _HEADS, _KV_HEADS, _DIM, _BLOCK, _SPAN, _MOST) = range(11, 21)
(_THREADS, _SINKS, _SCALE, _SOFT_CAP) = range(21, 25)

_AHEAD = 8192  # bytes between the keys or values that are computed on and those that are prefetched


@_inner
def _softmax(scores, count, soft_cap, sink):  # type: ignore[no-untyped-def]
    """exp(s - max) in place over a float32 row; returns the sum. sink: one more score, or -infinity."""
    if soft_cap > 0:
        for j in range(count):
            scores[j] = np.float32(soft_cap) * np.float32(np.tanh(scores[j] / np.float32(soft_cap)))
    top = sink
    for j in range(count):
        top = max(top, scores[j])
    for j in range(count):
        scores[j] = exp(scores[j] - top)
    total = _sum(scores, count)
    return total if sink == -np.inf else total + exp(sink - top)


@numba.njit(fastmath={"reassoc", "contract", "nsz"})
def _sum(row, count):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for j in range(count):
        total += row[j]
    return total


@_inner
def _floats(address, kind, tile, rows, dim):  # type: ignore[no-untyped-def]
    """The address where the inner loops read a run of cached rows, and whether it is bf16.

    That is the cache itself, or the float32 tile that the run was decoded into.
    """
    if kind in (BF16, FLOAT32):
        return address, kind == BF16
    load_rows(address, kind, tile, rows, dim)
    return tile.ctypes.data, False


@_inner
def _run(a, table, head, j, length):  # type: ignore[no-untyped-def]
    """How many cached rows lie one after another from key j on, and which row of the cache is the first."""
    offset = j % a[_BLOCK]
    row = (np.int64(table[j // a[_BLOCK]]) * a[_KV_HEADS] + head) * a[_BLOCK] + offset
    return min(a[_BLOCK] - offset, length - j), row


@_inner
def _fetch(a, table, head, j, length, store, kind):  # type: ignore[no-untyped-def]
    """Prefetch the run of cached rows that begins at key j, if there is one."""
    if j < length:
        n, row = _run(a, table, head, j, length)
        size = row_bytes(kind, a[_DIM])
        fetch(store + row * size, n * size)


@_inner
def _score(a, table, head, begin, length, rows, q, tile, scores):  # type: ignore[no-untyped-def]
    """scores[r] = q[r] . keys begin .. length."""
    dim = a[_DIM]
    kind = a[_KEY_KIND]
    ahead = _AHEAD // row_bytes(kind, dim)
    j = begin
    while j < length:
        n, row = _run(a, table, head, j, length)
        if j + ahead < length:
            _fetch(a, table, head, j + ahead, length, a[_KEY], kind)
        else:
            _fetch(a, table, head, begin + j + ahead - length, length, a[_VALUE], a[_VALUE_KIND])
        at, is_bf16 = _floats(a[_KEY] + row * row_bytes(kind, dim), kind, tile, n, dim)
        target = scores.ctypes.data + 4 * (j - begin)
        dot_rows(rows, q.ctypes.data, dim, at, is_bf16, n, target, length - begin)
        j += n


@_inner
def _mix(a, table, head, begin, length, rows, scores, tile, out, later):  # type: ignore[no-untyped-def]
    """out[r] += scores[r] . values begin .. length; at their end, prefetch the keys of item `later`."""
    dim = a[_DIM]
    kind = a[_VALUE_KIND]
    ahead = _AHEAD // row_bytes(kind, dim)
    later_table, later_head, later_begin, later_length = later
    j = begin
    while j < length:
        n, row = _run(a, table, head, j, length)
        if j + ahead < length:
            _fetch(a, table, head, j + ahead, length, a[_VALUE], kind)
        else:
            place = later_begin + j + ahead - length
            _fetch(a, later_table, later_head, place, later_length, a[_KEY], a[_KEY_KIND])
        at, is_bf16 = _floats(a[_VALUE] + row * row_bytes(kind, dim), kind, tile, n, dim)
        weights = scores.ctypes.data + 4 * (j - begin)
        add_weighted_rows(rows, out.ctypes.data, dim, at, is_bf16, n, weights, length - begin)
        j += n


@kernel("qqqqqqqqqqqqqqqqqqqqqqdd")
def _decode(args):  # type: ignore[no-untyped-def]
    """Items: (sequence, KV head, group of query heads). Sequences with more than _MOST new tokens are left out."""
    a = numba.carray(args, (25,), np.int64)
    f = numba.carray(args, (25,), np.float64)
    seqs = a[_SEQS]
    heads = a[_HEADS]
    kv_heads = a[_KV_HEADS]
    dim = a[_DIM]
    span = a[_SPAN]
    scale = np.float32(f[_SCALE])
    soft_cap = np.float32(f[_SOFT_CAP])
    tables = view(a[_TABLES], (seqs, a[_TABLE_WIDTH]), np.int32)
    lengths = view(a[_LENGTHS], (seqs,), np.int32)
    starts = view(a[_STARTS], (seqs + 1,), np.int32)
    key_scale = view(a[_KEY_SCALE], (kv_heads,), np.float32)
    value_scale = view(a[_VALUE_SCALE], (kv_heads,), np.float32)
    sinks = view(a[_SINKS], (heads if a[_SINKS] != 0 else 0,), np.float32)
    share = heads // kv_heads
    groups = (share + 3) // 4
    q_row = dim * size_of(a[_Q_KIND])
    q = np.empty((4, dim), np.float32)
    out = np.empty((4, dim), np.float32)
    tile = np.empty(a[_BLOCK] * dim, np.float32)
    sums = np.empty(4, np.float32)
    while True:
        item = next_item(args)
        if item >= seqs * kv_heads * groups:
            break
        seq = item // (kv_heads * groups)
        head = (item // groups) % kv_heads
        first = share * (item % groups) // groups
        rows = share * (item % groups + 1) // groups - first
        new = starts[seq + 1] - starts[seq]
        if new > a[_MOST]:
            continue
        after = min(item + a[_THREADS], seqs * kv_heads * groups - 1)  # probably this thread's next item
        end = lengths[after // (kv_heads * groups)]
        after_begin = first_key(end - 1, span)
        later = (tables[after // (kv_heads * groups)], (after // groups) % kv_heads, after_begin, end)
        for query in range(new):
            length = lengths[seq] - new + query + 1
            begin = first_key(length - 1, span)
            place = ((starts[seq] + query) * heads + head * share + first) * q_row
            for r in range(rows):
                load_row(a[_Q] + place + r * q_row, a[_Q_KIND], q[r], dim)
                for d in range(dim):
                    q[r, d] *= scale * key_scale[head]
                    out[r, d] = 0
            scores = np.empty((rows, length - begin), np.float32)
            _score(a, tables[seq], head, begin, length, rows, q, tile, scores)
            for r in range(rows):
                sink = sinks[head * share + first + r] if a[_SINKS] != 0 else np.float32(-np.inf)
                sums[r] = _softmax(scores[r], length - begin, soft_cap, sink)
            _mix(a, tables[seq], head, begin, length, rows, scores, tile, out, later)
            for r in range(rows):
                for d in range(dim):
                    out[r, d] *= value_scale[head] / sums[r]
                store_row(out[r], np.float32(1), a[_OUT] + place + r * q_row, a[_Q_KIND], dim)


def _run_decode(
    q: Tensor, out: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape, most: int
) -> None:
    """Attention of every sequence with at most `most` new tokens."""
    seqs, blocks = inputs.block_tables.shape
    reads = shape.num_kv_heads * shape.head_dim * inputs.max_seq_len * seqs
    threads = threads_for(reads, decode_cpu.MIN_READS)
    _decode.start(
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
        blocks,
        KINDS[q.dtype],
        kind_of(cache.key, shape.head_dim),
        kind_of(cache.value, shape.head_dim),
        seqs,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        cache.block_size,
        shape.span,
        most,
        threads,
        shape.sinks_address,
        shape.scale,
        shape.soft_cap or 0.0,
    )


def paged_attention(q: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape) -> Tensor:
    """`attention.reference.paged_attention`."""
    if shape.head_dim % 16:
        return reference.paged_attention(q, inputs, cache, shape)
    q = q.contiguous()
    out = torch.empty_like(q)
    decode = decode_cpu.attend if decode_cpu.fits(q, cache, shape) else _run_decode
    if inputs.max_query_len == 1:
        decode(q, out, inputs, cache, shape, 1)
        return out.view(q.shape[0], -1)
    flash = prefill_cpu.fits(q, shape)
    most = MAX_KERNEL_QUERIES if flash else MAX_TORCH_QUERIES
    if inputs.max_query_len <= MAX_TORCH_QUERIES:  # reads no tensor, so that it can be recorded
        tokens = q.shape[0]
        if tokens - MAX_TORCH_QUERIES * (len(inputs.seq_lens) - 1) <= most:  # else no sequence has so few
            decode(q, out, inputs, cache, shape, most)
        if inputs.max_query_len > most:
            prefill_cpu.attend(q, out, inputs, cache, shape, [tokens], most + 1)
        return out.view(tokens, -1)
    starts = inputs.query_starts.tolist()
    counts = [end - begin for begin, end in pairwise(starts)]
    if min(counts) <= most:
        decode(q, out, inputs, cache, shape, most)
    if flash and max(counts) > most:
        prefill_cpu.attend(q, out, inputs, cache, shape, [n for n in counts if n > most], most + 1)
    elif not flash:
        lengths = inputs.seq_lens.tolist()
        for s, count in enumerate(counts):
            if count > most:
                rows = slice(starts[s], starts[s + 1])
                out[rows] = _prefill(q[rows], inputs.block_tables[s], lengths[s], cache, shape)
    return out.view(q.shape[0], -1)


def invariant_attention(q: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape) -> Tensor:
    """`attention.reference.paged_attention`, batch-invariant: a query's output has the same bits in every step.

    One body takes all queries, where `paged_attention` chooses by how many new tokens a sequence has: `prefill_cpu`
    where it fits, whose chunks of keys begin at multiples of CHUNK, else the decode kernel, whose rows are whole.
    """
    if shape.head_dim % 16:
        raise ValueError(f"heads of {shape.head_dim} elements have no batch-invariant attention; multiples of 16 have")
    q = q.contiguous()
    out = torch.empty_like(q)
    most = inputs.max_query_len
    if not prefill_cpu.fits(q, shape):
        _run_decode(q, out, inputs, cache, shape, most)
        return out.view(q.shape[0], -1)
    # a decode step reads no tensor here, so that it can be recorded
    counts = [1] * len(inputs.seq_lens) if most == 1 else inputs.query_starts.diff().tolist()
    prefill_cpu.attend(q, out, inputs, cache, shape, counts, 1)
    return out.view(q.shape[0], -1)


def _prefill(q: Tensor, table: Tensor, length: int, cache: LayerCache, shape: AttentionShape) -> Tensor:
    """One sequence: q [n, Hq, D] over its `length` cached tokens -> [n, Hq, D]."""
    n = q.shape[0]
    first = paged.first_key(length - n, shape.span) // cache.block_size  # no query sees the blocks before it
    begin = first * cache.block_size
    table = table[first : -(-length // cache.block_size)].long()
    k = reference.gather(cache.key, cache.key_scale, table, length - begin, shape.head_dim, q.dtype)
    v = reference.gather(cache.value, cache.value_scale, table, length - begin, shape.head_dim, q.dtype)
    heads = q.transpose(0, 1)
    if shape.soft_cap is not None or shape.sinks is not None:
        return _in_steps(heads, k, v, shape, begin).transpose(0, 1)
    mask = None if n == length and _sees_all(shape, length) else reference.seen_keys(n, length, shape, begin=begin)
    bias = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    attended = F.scaled_dot_product_attention(
        heads[None], k[None], v[None], attn_mask=bias, is_causal=bias is None, scale=shape.scale, enable_gqa=True
    )
    return attended[0].transpose(0, 1)


def _sees_all(shape: AttentionShape, length: int) -> bool:
    return shape.window is None or shape.window >= length


def _in_steps(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, begin: int) -> Tensor:
    """With a soft cap or sinks, which torch's fused kernels lack; 256 queries at a time, to bound its memory.

    begin: the first key's position.
    """
    heads, n, _ = q.shape
    seen = reference.seen_keys(n, begin + k.shape[1], shape, begin=begin)
    out = torch.empty_like(q)
    share = heads // k.shape[0]
    k32, v32 = (x.float().repeat_interleave(share, dim=0) for x in (k, v))
    for row in range(0, n, 256):
        rows = slice(row, row + 256)
        scores = q[:, rows].float() @ k32.transpose(1, 2) * shape.scale
        out[:, rows] = (reference.weigh(scores, seen[rows], shape) @ v32).to(q.dtype)
    return out


KERNELS = (_decode,)
