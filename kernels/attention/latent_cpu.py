"""CPU body of the steps between the GEMMs of latent attention and attention itself.

One pass over each token's row, in float32 from load to store. Reference: `attention.latent.write_latents`.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.latent import LatentShape, turning
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.native.dtypes import KINDS, load_row, size_of, store_row
from octavo.kernels.native.jit import kernel, next_item, threads_for, view
from octavo.kernels.norm.cpu import normalize

# The kernel's arguments, in the order of the call in `write_latents`.
(_QUERIES, _LATENTS, _COS_SIN, _POSITIONS, _SLOTS, _OUT, _CACHE, _SCALE, _NORM) = range(1, 10)
(_TOKENS, _HEADS, _RANK, _PLAIN, _ROTARY, _STRIDE, _KIND, _CACHE_KIND, _INTERLEAVED, _EPS) = range(10, 20)


@numba.njit
def _rotate(row, cos_sin, half, interleaved, out):  # type: ignore[no-untyped-def]
    """The halves of `out`, of a row of pairs."""
    for i in range(half):
        x = row[2 * i] if interleaved else row[i]
        y = row[2 * i + 1] if interleaved else row[i + half]
        out[i] = x * cos_sin[i] - y * cos_sin[i + half]
        out[i + half] = y * cos_sin[i] + x * cos_sin[i + half]


@kernel("qqqqqqqqqqqqqqqqqqd")
def _write(args):  # type: ignore[no-untyped-def]
    """Items are tokens."""
    a = numba.carray(args, (20,), np.int64)
    eps = numba.carray(args, (20,), np.float64)[_EPS]
    tokens = a[_TOKENS]
    rank = a[_RANK]
    rotary = a[_ROTARY]
    width = rank + rotary
    size = size_of(a[_KIND])
    positions = view(a[_POSITIONS], (tokens,), np.int64)
    slots = view(a[_SLOTS], (tokens,), np.int64)
    scale = view(a[_SCALE], (1,), np.float32)
    norm = view(a[_NORM], (rank,), np.float32)
    row = np.empty(width, np.float32)
    pairs = np.empty(rotary, np.float32)
    while True:
        t = next_item(args)
        if t >= tokens:
            break
        cos_sin = view(a[_COS_SIN] + positions[t] * rotary * 4, (rotary,), np.float32)
        load_row(a[_LATENTS] + t * a[_STRIDE] * size, a[_KIND], row, width)
        normalize(row[:rank], norm, eps, rank)
        pairs[:] = row[rank:]
        _rotate(pairs, cos_sin, rotary // 2, a[_INTERLEAVED] != 0, row[rank:])
        place = a[_CACHE] + slots[t] * width * size_of(a[_CACHE_KIND])  # one KV head: slots lie side by side
        store_row(row, scale[0], place, a[_CACHE_KIND], width)
        for h in range(a[_HEADS]):
            query = (t * a[_HEADS] + h) * (a[_PLAIN] + rotary) + a[_PLAIN]
            load_row(a[_QUERIES] + query * size, a[_KIND], pairs, rotary)
            _rotate(pairs, cos_sin, rotary // 2, a[_INTERLEAVED] != 0, row)
            store_row(row, np.float32(1), a[_OUT] + ((t * a[_HEADS] + h) * width + rank) * size, a[_KIND], rotary)


def write_latents(
    queries: Tensor,
    latents: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: LatentShape,
    cos_sin: Tensor,
    norm: Tensor,
    eps: float,
) -> Tensor:
    """`attention.latent.write_latents`; latents may be columns of a wider tensor."""
    tokens = len(queries)
    queries = queries.contiguous()
    positions = turning(inputs.positions, cos_sin)
    out = torch.empty((tokens, shape.num_heads, shape.rank + shape.rotary_dim), dtype=queries.dtype)
    _write.start(
        threads_for(out.numel()),
        queries.data_ptr(),
        latents.data_ptr(),
        cos_sin.data_ptr(),
        positions.data_ptr(),
        inputs.slot_mapping.data_ptr(),
        out.data_ptr(),
        cache.key.data_ptr(),
        cache.key_scale.data_ptr(),
        norm.data_ptr(),
        tokens,
        shape.num_heads,
        shape.rank,
        shape.plain_dim,
        shape.rotary_dim,
        latents.stride(0),
        KINDS[queries.dtype],
        KINDS[cache.key.dtype],
        shape.interleaved,
        eps,
    )
    return out


KERNELS = (_write,)
