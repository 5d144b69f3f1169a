"""CPU body of Mamba 2's state space in decode steps: one token of each sequence, whose state is gone through once.

Three launches: of pieces of channels, of heads, which read what their group's channels are convolved to, and of groups,
since a norm is over all heads of one. A token's arithmetic is the same whichever sequences go with it.
Reference: `mamba2.mamba2`.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.mamba2 import Mamba2Shape, Mamba2Weights
from octavo.kernels.linear_attention.short_conv_decode_cpu import PIECE, convolve
from octavo.kernels.linear_attention.states import StateCache, rows_of
from octavo.kernels.native.dtypes import KINDS, exp, load_row, size_of, store_row
from octavo.kernels.native.jit import kernel, next_item, threads_for, view
from octavo.kernels.norm.cpu import normalize, silu

_REASSOCIATE = {"reassoc", "contract", "nsz"}

# What all of the kernels are given first, in the order of `common` in `mamba2_decode`.
(_X, _FACTORS, _ROWS, _SOURCES, _SEQS, _WIDTH, _INNER, _CHANNELS, _KIND) = range(1, 10)
# The convolution's own.
(_CONV_STATE, _CONV, _BIAS, _CONVOLVED, _TAPS) = range(10, 15)
# Of a head's state.
(_MIXED, _STATE, _RATE, _DT_BIAS, _SKIP, _Y, _HEADS, _GROUPS, _STATE_DIM, _LOW, _HIGH) = range(10, 21)
# Of what comes out.
(_SAID, _NORM, _OUT, _NUM_GROUPS, _NORMS_FIRST, _EPS) = range(10, 16)


@numba.njit
def _load(a, sequence, column, row, count):  # type: ignore[no-untyped-def]
    """What the linear layer gives of a sequence's token, from a column on, multiplied."""
    load_row(a[_X] + (sequence * a[_WIDTH] + column) * size_of(a[_KIND]), a[_KIND], row, count)
    if a[_FACTORS] != 0:
        factors = view(a[_FACTORS] + column * 4, (count,), np.float32)
        for i in range(count):
            row[i] *= factors[i]


@kernel("q" * 14)
def _convolve(args):  # type: ignore[no-untyped-def]
    """Items are pieces of a sequence's channels."""
    a = numba.carray(args, (15,), np.int64)
    channels = a[_CHANNELS]
    pieces = (channels + PIECE - 1) // PIECE
    rows = view(a[_ROWS], (a[_SEQS],), np.int64)
    sources = view(a[_SOURCES], (a[_SEQS],), np.int64)
    conv = view(a[_CONV], (a[_TAPS], channels), np.float32)
    bias = view(a[_BIAS], (channels,), np.float32)
    new = np.empty(PIECE, np.float32)
    while True:
        item = next_item(args)
        if item >= a[_SEQS] * pieces:
            break
        s = item // pieces
        first = (item % pieces) * PIECE
        count = min(PIECE, channels - first)
        out = view(a[_CONVOLVED] + (s * channels + first) * 4, (count,), np.float32)
        _load(a, s, a[_INNER] + first, new, count)
        for c in range(count):
            out[c] = bias[first + c]
        convolve(a[_CONV_STATE], rows[s], sources[s], conv, first, new, out, count)
        for c in range(count):
            out[c] = out[c] / (np.float32(1) + exp(-out[c]))


@numba.njit(fastmath=_REASSOCIATE)
def _change(row, key, query, decay, change, count):  # type: ignore[no-untyped-def]
    """row = decay * row + change * key, in place, and its product with the query."""
    total = np.float32(0)
    for i in range(count):
        row[i] = decay * row[i] + change * key[i]
        total += row[i] * query[i]
    return total


@numba.njit
def _softplus(x):  # type: ignore[no-untyped-def]
    return x if x > 20.0 else math.log1p(math.exp(x))


@kernel("q" * 18 + "dd")
def _advance(args):  # type: ignore[no-untyped-def]
    """Items are heads of a sequence."""
    a = numba.carray(args, (21,), np.int64)
    limits = numba.carray(args, (21,), np.float64)
    heads = a[_HEADS]
    keys = a[_STATE_DIM]
    dim = a[_INNER] // heads
    rows = view(a[_ROWS], (a[_SEQS],), np.int64)
    sources = view(a[_SOURCES], (a[_SEQS],), np.int64)
    rate = view(a[_RATE], (heads,), np.float32)
    dt_bias = view(a[_DT_BIAS], (heads,), np.float32)
    skip = view(a[_SKIP], (heads,), np.float32)
    given = np.empty(1, np.float32)
    while True:
        item = next_item(args)
        if item >= a[_SEQS] * heads:
            break
        s = item // heads
        h = item % heads
        _load(a, s, a[_INNER] + a[_CHANNELS] + h, given, 1)
        dt = _softplus(np.float64(given[0] + dt_bias[h]))
        dt = min(max(dt, limits[_LOW]), limits[_HIGH])
        decay = np.float32(math.exp(rate[h] * dt))
        mixed = view(a[_MIXED] + s * a[_CHANNELS] * 4, (a[_CHANNELS],), np.float32)
        group = a[_INNER] + h * a[_GROUPS] // heads * keys
        key = mixed[group : group + keys]
        query = mixed[group + a[_GROUPS] * keys : group + (a[_GROUPS] + 1) * keys]
        values = mixed[h * dim : (h + 1) * dim]
        y = view(a[_Y] + (s * a[_INNER] + h * dim) * 4, (dim,), np.float32)
        state = view(a[_STATE] + (rows[s] * heads + h) * dim * keys * 4, (dim, keys), np.float32)
        if sources[s] < 0:
            state[:, :] = np.float32(0)
        elif sources[s] != rows[s]:
            state[:, :] = view(a[_STATE] + (sources[s] * heads + h) * dim * keys * 4, (dim, keys), np.float32)
        for p in range(dim):
            change = np.float32(dt) * values[p]
            y[p] = _change(state[p], key, query, decay, change, keys) + skip[h] * values[p]


@kernel("q" * 14 + "d")
def _finish(args):  # type: ignore[no-untyped-def]
    """Items are groups of a sequence's channels, which are normed by themselves."""
    a = numba.carray(args, (16,), np.int64)
    eps = numba.carray(args, (16,), np.float64)[_EPS]
    groups = a[_NUM_GROUPS]
    count = a[_INNER] // groups
    z = np.empty(count, np.float32)
    while True:
        item = next_item(args)
        if item >= a[_SEQS] * groups:
            break
        s = item // groups
        first = (item % groups) * count
        y = view(a[_SAID] + (s * a[_INNER] + first) * 4, (count,), np.float32)
        _load(a, s, first, z, count)
        if a[_NORM] == 0:
            silu(z, y, count)
        else:
            norm = view(a[_NORM] + first * 4, (count,), np.float32)
            if a[_NORMS_FIRST]:
                normalize(y, norm, eps, count)
            silu(z, y, count)
            if not a[_NORMS_FIRST]:
                normalize(z, norm, eps, count)
        store_row(z, np.float32(1), a[_OUT] + (s * a[_INNER] + first) * size_of(a[_KIND]), a[_KIND], count)


def mamba2_decode(
    x: Tensor, step: StepInputs, cache: StateCache, shape: Mamba2Shape, weights: Mamba2Weights, eps: float
) -> Tensor:
    """`mamba2.mamba2` of one token of each sequence, without copies of states."""
    x = x.contiguous()
    states = rows_of(step)
    seqs = len(x)
    common = (
        x.data_ptr(),
        0 if weights.factors is None else weights.factors.data_ptr(),
        states.rows.data_ptr(),
        states.sources.data_ptr(),
        seqs,
        x.shape[1],
        shape.inner,
        shape.channels,
        KINDS[x.dtype],
    )
    conv_state, state = cache.parts
    mixed = torch.empty((seqs, shape.channels), dtype=torch.float32)
    _convolve.start(
        threads_for(seqs * shape.channels * shape.taps),
        *common,
        conv_state.data_ptr(),
        weights.conv.data_ptr(),
        weights.conv_bias.data_ptr(),
        mixed.data_ptr(),
        shape.taps,
    )
    y = torch.empty((seqs, shape.inner), dtype=torch.float32)
    _advance.start(
        threads_for(seqs * shape.inner * shape.state_dim),
        *common,
        mixed.data_ptr(),
        state.data_ptr(),
        weights.rate.data_ptr(),
        weights.dt_bias.data_ptr(),
        weights.skip.data_ptr(),
        y.data_ptr(),
        shape.num_heads,
        shape.num_groups,
        shape.state_dim,
        *shape.dt_limits,
    )
    out = torch.empty((seqs, shape.inner), dtype=x.dtype)
    _finish.start(
        threads_for(seqs * shape.inner * 4),
        *common,
        y.data_ptr(),
        0 if weights.norm is None else weights.norm.data_ptr(),
        out.data_ptr(),
        shape.num_groups,
        int(shape.norms_first),
        eps,
    )
    return out


KERNELS = (_convolve, _advance, _finish)
