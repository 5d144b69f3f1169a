"""CPU body of a short convolution between two gates in decode steps: one token of each sequence.

A token's arithmetic is the same whichever sequences go with it. Reference: `short_conv.ShortConv`.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import StateCache, rows_of
from octavo.kernels.native.dtypes import KINDS, load_row, size_of, store_row
from octavo.kernels.native.jit import kernel, next_item, threads_for, view

PIECE = 512  # channels that are convolved together

# The kernel's arguments, in the order of the call in `short_conv_decode`.
(_X, _WEIGHT, _STATE, _ROWS, _SOURCES, _OUT, _SEQS, _CHANNELS, _TAPS, _KIND) = range(1, 11)


@numba.njit
def convolve(states, row, source, taps, first, new, out, count):  # type: ignore[no-untyped-def]
    """Add a token's convolution to out [count], of channels from `first` on, and go on to the state behind it.

    states   the address of [rows, K - 1, channels]: the inputs before each token, the oldest first
    source   the row of those before this one; -1: it has none
    taps     [K, channels]; new [count]: the token's own inputs
    """
    last = len(taps) - 1
    channels = taps.shape[1]
    after = view(states + row * last * channels * 4, (last, channels), np.float32)
    if source < 0:
        after[:, first : first + count] = np.float32(0)
    begin = row if source < 0 else source
    before = view(states + begin * last * channels * 4, (last, channels), np.float32)
    for i in range(last):
        for c in range(count):
            out[c] += before[i, first + c] * taps[i, first + c]
    for c in range(count):
        out[c] += new[c] * taps[last, first + c]
    for i in range(last):
        for c in range(count):
            after[i, first + c] = before[i + 1, first + c] if i + 1 < last else new[c]


@kernel("q" * 10)
def _short_conv(args):  # type: ignore[no-untyped-def]
    """Items are pieces of a sequence's channels."""
    a = numba.carray(args, (11,), np.int64)
    channels = a[_CHANNELS]
    kind = a[_KIND]
    pieces = (channels + PIECE - 1) // PIECE
    rows = view(a[_ROWS], (a[_SEQS],), np.int64)
    sources = view(a[_SOURCES], (a[_SEQS],), np.int64)
    taps = view(a[_WEIGHT], (a[_TAPS], channels), np.float32)
    gate = np.empty(PIECE, np.float32)
    new = np.empty(PIECE, np.float32)
    out = np.empty(PIECE, np.float32)
    while True:
        item = next_item(args)
        if item >= a[_SEQS] * pieces:
            break
        s = item // pieces
        first = (item % pieces) * PIECE
        count = min(PIECE, channels - first)
        place = a[_X] + (s * 3 * channels + first) * size_of(kind)
        load_row(place, kind, gate, count)
        load_row(place + 2 * channels * size_of(kind), kind, new, count)
        for c in range(count):
            new[c] *= gate[c]
            out[c] = np.float32(0)
        convolve(a[_STATE], rows[s], sources[s], taps, first, new, out, count)
        load_row(place + channels * size_of(kind), kind, gate, count)
        for c in range(count):
            out[c] *= gate[c]
        store_row(out, np.float32(1), a[_OUT] + (s * channels + first) * size_of(kind), kind, count)


def short_conv_decode(x: Tensor, step: StepInputs, cache: StateCache, weight: Tensor) -> Tensor:
    """x [S, 3 H], one token of each sequence, weight [taps, H] float32 -> [S, H], without copies of states."""
    x = x.contiguous()
    states = rows_of(step)
    taps, channels = weight.shape
    out = torch.empty((len(x), channels), dtype=x.dtype)
    _short_conv.start(
        threads_for(len(x) * channels * (taps + 4)),
        x.data_ptr(),
        weight.data_ptr(),
        cache.parts[0].data_ptr(),
        states.rows.data_ptr(),
        states.sources.data_ptr(),
        out.data_ptr(),
        len(x),
        channels,
        taps,
        KINDS[x.dtype],
    )
    return out


KERNELS = (_short_conv,)
