"""CPU body of the steps between the qkv GEMM and attention: head norms, rotation, and the write into the cache.

One pass over each token's row, in float32 from load to store. Reference: `attention.reference.rope_and_cache`.
"""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.attention.token_rows_cpu import ROWS4, hadamard, kind_of, row_bytes, store_head
from octavo.kernels.native.dtypes import KINDS, load_row, size_of, store_row
from octavo.kernels.native.jit import kernel, next_item, threads_for, view
from octavo.kernels.norm.cpu import normalize


@numba.njit
def _rotate(row, cos_sin, half):  # type: ignore[no-untyped-def]
    for i in range(half):
        x = row[i]
        y = row[i + half]
        row[i] = x * cos_sin[i] - y * cos_sin[i + half]
        row[i + half] = y * cos_sin[i] + x * cos_sin[i + half]


@numba.njit
def _rotate_neighbors(row, cos_sin, half):  # type: ignore[no-untyped-def]
    for i in range(half):
        x = row[2 * i]
        y = row[2 * i + 1]
        row[2 * i] = x * cos_sin[i] - y * cos_sin[i + half]
        row[2 * i + 1] = y * cos_sin[i] + x * cos_sin[i + half]


@kernel("qqqqqqqqqqqqqqqqqqqqqqqqqd")
def _rope(args):  # type: ignore[no-untyped-def]
    """The arguments' order is that of the call in `rope_and_cache`. Items are tokens."""
    a = numba.carray(args, (27,), np.int64)
    eps = numba.carray(args, (27,), np.float64)[26]
    tokens = a[12]
    heads = a[13]
    kv_heads = a[14]
    dim = a[15]
    block_size = a[16]
    rotary = a[17]
    kind = a[18]
    key_kind = a[19]
    value_kind = a[20]
    q_norm_size = a[21]
    k_norm_size = a[22]
    interleaved = a[23]
    given = heads + a[24] * kv_heads
    norms_values = a[25] != 0
    positions = view(a[3], (tokens,), np.int64)
    slots = view(a[4], (tokens,), np.int64)
    key_scale = view(a[8], (kv_heads,), np.float32)
    value_scale = view(a[9], (kv_heads,), np.float32)
    q_norm = view(a[10], (q_norm_size,), np.float32)
    k_norm = view(a[11], (k_norm_size,), np.float32)
    row_size = given * dim * size_of(kind)
    q_size = heads * dim * size_of(kind)
    key_size = row_bytes(key_kind, dim)
    value_size = row_bytes(value_kind, dim)
    row = np.empty((heads + 2 * kv_heads) * dim, np.float32)
    ones = np.ones(dim if norms_values else 0, np.float32)
    while True:
        t = next_item(args)
        if t >= tokens:
            break
        load_row(a[1] + t * row_size, kind, row, given * dim)
        if a[24] == 1:  # keys are values, too
            row[given * dim :] = row[heads * dim : given * dim]
        for at in range(0, heads * dim, max(q_norm_size, 1)):  # a norm of each head, or of all heads together
            if q_norm_size > 0:
                normalize(row[at : at + q_norm_size], q_norm, eps, q_norm_size)
        for at in range(heads * dim, (heads + kv_heads) * dim, max(k_norm_size, 1)):
            if k_norm_size > 0:
                normalize(row[at : at + k_norm_size], k_norm, eps, k_norm_size)
        if norms_values:
            for at in range((heads + kv_heads) * dim, (heads + 2 * kv_heads) * dim, dim):
                normalize(row[at : at + dim], ones, eps, dim)
        if rotary > 0:
            cos_sin = view(a[2] + positions[t] * rotary * 4, (rotary,), np.float32)
            for h in range(heads + kv_heads):
                if interleaved:
                    _rotate_neighbors(row[h * dim : h * dim + rotary], cos_sin, rotary // 2)
                else:
                    _rotate(row[h * dim : h * dim + rotary], cos_sin, rotary // 2)
        if key_kind == ROWS4:
            for h in range(heads + kv_heads):
                hadamard(row[h * dim : h * dim + dim], dim)
        store_row(row, np.float32(1), a[5] + t * q_size, kind, heads * dim)
        block = slots[t] // block_size
        offset = slots[t] % block_size
        for h in range(kv_heads):
            slot = (block * kv_heads + h) * block_size + offset
            k = (heads + h) * dim
            v = (heads + kv_heads + h) * dim
            store_head(row[k : k + dim], key_scale[h], a[6] + slot * key_size, key_kind, dim)
            store_head(row[v : v + dim], value_scale[h], a[7] + slot * value_size, value_kind, dim)


def rope_and_cache(
    qkv: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """`attention.reference.rope_and_cache`."""
    qkv = qkv.contiguous()
    tokens = qkv.shape[0]
    q = qkv.new_empty(tokens, shape.num_heads, shape.head_dim)
    _rope.start(
        threads_for(qkv.numel()),
        qkv.data_ptr(),
        0 if cos_sin is None else cos_sin.data_ptr(),
        inputs.positions.data_ptr(),
        inputs.slot_mapping.data_ptr(),
        q.data_ptr(),
        cache.key.data_ptr(),
        cache.value.data_ptr(),
        cache.key_scale.data_ptr(),
        cache.value_scale.data_ptr(),
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        tokens,
        shape.num_heads,
        shape.written_heads,
        shape.head_dim,
        cache.block_size,
        0 if cos_sin is None else cos_sin.shape[1],
        KINDS[qkv.dtype],
        kind_of(cache.key, shape.head_dim),
        kind_of(cache.value, shape.head_dim),
        0 if q_norm is None else q_norm.numel(),
        0 if k_norm is None else k_norm.numel(),
        shape.interleaved,
        shape.kv_parts,
        shape.norms_values,
        eps,
    )
    return q


KERNELS = (_rope,)
