"""CPU body of the gated delta rule with its convolution, gates and norm: all between a layer's linear layers at once.

An item is a sequence's key head with its value heads, which no other item's numbers depend on. It goes through its
tokens in order, a few at a time: these are convolved together, and each row of a state then stays in registers and the
first cache while they go through it. A token's arithmetic is the same whichever tokens go with it, so that a sequence's
outputs and states have the same bits however it is cut into steps, and whatever else is in them.
Reference: `linear_attention.gated_delta`.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.gated_delta import NORM_EPS, GatedDeltaShape, GatedDeltaWeights
from octavo.kernels.linear_attention.gated_delta_vectors import LANES, ROWS, change_rows
from octavo.kernels.linear_attention.states import StateCache, rows_of
from octavo.kernels.native.dtypes import KINDS, exp, load_row, size_of, store_row
from octavo.kernels.native.jit import kernel, next_item, threads_for, view
from octavo.kernels.norm.cpu import normalize, silu

_REASSOCIATE = {"reassoc", "contract", "nsz"}
_TOKENS = 16  # that go through a state together

# The kernel's arguments, in the order of the call in `gated_delta`.
(_X, _GATES, _OUT, _CONV_STATE, _STATE, _CONV, _RATE, _DT_BIAS, _NORM) = range(1, 10)
(_STARTS, _ROW, _SOURCE, _SAVES, _COLUMNS) = range(10, 15)
(_SEQS, _NUM_SAVES, _KEY_HEADS, _REPEATS, _KEY_DIM, _VALUE_DIM, _TAPS, _KIND, _EPS) = range(15, 24)
_COUNT = 24


@numba.njit
def _convolve(x, conv, out, tokens, channels, taps):  # type: ignore[no-untyped-def]
    """silu of the convolution, whose inputs are the rows of x; the first taps - 1 are of earlier tokens."""
    for t in range(tokens):
        for c in range(channels):
            out[t, c] = np.float32(0)
        for i in range(taps):
            for c in range(channels):
                out[t, c] += x[t + i, c] * conv[i, c]
        for c in range(channels):
            out[t, c] = out[t, c] / (np.float32(1) + exp(-out[t, c]))


@numba.njit(fastmath=_REASSOCIATE)
def _to_length(row, length, count):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(count):
        total += row[i] * row[i]
    factor = np.float32(length / np.sqrt(total + np.float32(NORM_EPS)))
    for i in range(count):
        row[i] *= factor


@numba.njit(fastmath=_REASSOCIATE)
def _dot(row, other, count):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(count):
        total += row[i] * other[i]
    return total


@numba.njit(fastmath=_REASSOCIATE)
def _change(row, key, query, decay, change, count):  # type: ignore[no-untyped-def]
    """row = decay * row + change * key, in place, and its product with the query."""
    for i in range(count):
        row[i] = decay * row[i] + change * key[i]
    total = np.float32(0)
    for i in range(count):
        total += row[i] * query[i]
    return total


@numba.njit
def _scan(state, mixed, first_value, beta, decay, out, tokens):  # type: ignore[no-untyped-def]
    """state [dv, dk], in place; mixed [tokens, dk of a query, dk of a key, ... dv of a value ...]; out [tokens, dv]."""
    values, keys = state.shape
    if values % ROWS == 0 and keys % LANES == 0:
        for j in range(0, values, ROWS):
            rows = state.ctypes.data + j * keys * 4
            for t in range(tokens):
                row = mixed.ctypes.data + t * mixed.shape[1] * 4
                value = row + (first_value + j) * 4
                sums = out.ctypes.data + (t * values + j) * 4
                change_rows((rows, row + keys * 4, row, keys // LANES, value, sums, decay[t], beta[t]))
        return
    for j in range(values):
        for t in range(tokens):
            query = mixed[t, :keys]
            key = mixed[t, keys : 2 * keys]
            change = (mixed[t, first_value + j] - decay[t] * _dot(state[j], key, keys)) * beta[t]
            out[t, j] = _change(state[j], key, query, decay[t], change, keys)


@numba.njit
def _softplus(x):  # type: ignore[no-untyped-def]
    return x if x > 20.0 else math.log1p(math.exp(x))


@numba.njit
def _copy(history, address, columns, widths, total):  # type: ignore[no-untyped-def]
    """The convolution's inputs of one item into a row's [taps - 1, channels] at an address."""
    rows = view(address, (history.shape[0], total), np.float32)
    for i in range(history.shape[0]):
        for part in range(3):
            begin = widths[0] * part
            for c in range(widths[part]):
                rows[i, columns[part] + c] = history[i, begin + c]


@numba.njit
def _begin(a, h, row, source, columns, widths, weights, inputs):  # type: ignore[no-untyped-def]
    """An item's taps, the inputs before its first token, and its state in the row where it stays."""
    dk = a[_KEY_DIM]
    own = a[_REPEATS] * a[_VALUE_DIM]
    taps = a[_TAPS]
    total = a[_KEY_HEADS] * (2 * dk + own)
    conv = view(a[_CONV], (taps, total), np.float32)
    before = view(a[_CONV_STATE] + max(source, 0) * (taps - 1) * total * 4, (taps - 1, total), np.float32)
    columns[0] = h * dk
    columns[1] = (a[_KEY_HEADS] + h) * dk
    columns[2] = 2 * a[_KEY_HEADS] * dk + h * own
    for part in range(3):
        for c in range(widths[part]):
            for i in range(taps):
                weights[i, part * dk + c] = conv[i, columns[part] + c]
            for i in range(taps - 1):
                inputs[i, part * dk + c] = before[i, columns[part] + c] if source >= 0 else np.float32(0)
    if source != row:
        state = _state_of(a, row, h)
        if source < 0:
            state[:, :] = np.float32(0)
        else:
            state[:, :] = _state_of(a, source, h)


@numba.njit
def _state_of(a, row, h):  # type: ignore[no-untyped-def]
    """[value heads * dv, dk] of a key head."""
    own = a[_REPEATS] * a[_VALUE_DIM]
    return view(a[_STATE] + (row * a[_KEY_HEADS] + h) * own * a[_KEY_DIM] * 4, (own, a[_KEY_DIM]), np.float32)


@numba.njit
def _gates(a, table, h, r, first, tokens, beta, decay):  # type: ignore[no-untyped-def]
    """beta and decay of a value head."""
    heads = a[_KEY_HEADS] * a[_REPEATS]
    head = h * a[_REPEATS] + r
    rate = view(a[_RATE], (heads,), np.float32)
    dt_bias = view(a[_DT_BIAS], (heads,), np.float32)
    for i in range(tokens):
        gates = view(a[_GATES] + (first + i) * 2 * heads * 4, (2 * heads,), np.float32)
        beta[i] = np.float32(1.0 / (1.0 + math.exp(-np.float64(gates[table[h, 4] + r]))))
        decay[i] = np.float32(math.exp(rate[head] * _softplus(np.float64(gates[table[h, 5] + r] + dt_bias[head]))))


@numba.njit
def _finish(a, eps, column, head, first, tokens, outs, z):  # type: ignore[no-untyped-def]
    """Norm and gate what a value head says of some tokens, and write it; column: of its z."""
    dv = a[_VALUE_DIM]
    width = a[_KEY_HEADS] * a[_REPEATS] * dv
    size = size_of(a[_KIND])
    norm = view(a[_NORM], (dv,), np.float32)
    for i in range(tokens):
        x_row = (first + i) * 2 * (a[_KEY_HEADS] * a[_KEY_DIM] + width)
        load_row(a[_X] + (x_row + column) * size, a[_KIND], z, dv)
        normalize(outs[i], norm, eps, dv)
        silu(z, outs[i], dv)
        store_row(z, np.float32(1), a[_OUT] + ((first + i) * width + head * dv) * size, a[_KIND], dv)


@kernel("q" * (_COUNT - 2) + "d")
def _gated_delta(args):  # type: ignore[no-untyped-def]
    a = numba.carray(args, (_COUNT,), np.int64)
    eps = numba.carray(args, (_COUNT,), np.float64)[_EPS]
    heads = a[_KEY_HEADS]
    repeats = a[_REPEATS]
    dk = a[_KEY_DIM]
    dv = a[_VALUE_DIM]
    own = repeats * dv
    taps = a[_TAPS]
    size = size_of(a[_KIND])
    width = 2 * dk + own  # channels of an item
    x_row = heads * (width + own) * size
    state_row = (taps - 1) * heads * width * 4
    starts = view(a[_STARTS], (a[_SEQS] + 1,), np.int32)
    rows = view(a[_ROW], (a[_SEQS],), np.int64)
    sources = view(a[_SOURCE], (a[_SEQS],), np.int64)
    saves = view(a[_SAVES], (a[_NUM_SAVES], 2), np.int64)
    table = view(a[_COLUMNS], (heads, 6), np.int64)
    inputs = np.empty((taps - 1 + _TOKENS, width), np.float32)
    weights = np.empty((taps, width), np.float32)
    mixed = np.empty((_TOKENS, width), np.float32)
    outs = np.empty((_TOKENS, dv), np.float32)
    z = np.empty(dv, np.float32)
    beta = np.empty(_TOKENS, np.float32)
    decay = np.empty(_TOKENS, np.float32)
    columns = np.empty(3, np.int64)
    widths = np.empty(3, np.int64)
    widths[:2] = dk
    widths[2] = own
    while True:
        item = next_item(args)
        if item >= a[_SEQS] * heads:
            break
        s = item // heads
        h = item % heads
        t = np.int64(starts[s])
        end = np.int64(starts[s + 1])
        if t == end:
            continue
        _begin(a, h, rows[s], sources[s], columns, widths, weights, inputs)
        state = _state_of(a, rows[s], h)
        save = 0
        while save < a[_NUM_SAVES] and saves[save, 0] < t:
            save += 1
        while t < end:
            stop = min(t + _TOKENS, end)
            if save < a[_NUM_SAVES]:
                stop = min(stop, saves[save, 0] + 1)
            tokens = stop - t
            for i in range(tokens):
                row = inputs[taps - 1 + i]
                for part in range(3):
                    place = a[_X] + (t + i) * x_row + table[h, part] * size
                    load_row(place, a[_KIND], row[part * dk :], widths[part])
            _convolve(inputs, weights, mixed, tokens, width, taps)
            for i in range(tokens):
                _to_length(mixed[i], 1.0 / np.sqrt(np.float64(dk)), dk)
                _to_length(mixed[i, dk:], 1.0, dk)
            for r in range(repeats):
                _gates(a, table, h, r, t, tokens, beta, decay)
                _scan(state[r * dv : (r + 1) * dv], mixed, 2 * dk + r * dv, beta, decay, outs, tokens)
                _finish(a, eps, table[h, 3] + r * dv, h * repeats + r, t, tokens, outs, z)
            for i in range(taps - 1):
                inputs[i, :] = inputs[tokens + i, :]
            t = stop
            if save < a[_NUM_SAVES] and saves[save, 0] == t - 1:
                _copy(inputs[: taps - 1], a[_CONV_STATE] + saves[save, 1] * state_row, columns, widths, heads * width)
                _state_of(a, saves[save, 1], h)[:, :] = state
                save += 1
        _copy(inputs[: taps - 1], a[_CONV_STATE] + rows[s] * state_row, columns, widths, heads * width)


def gated_delta(
    x: Tensor,
    gates: Tensor,
    step: StepInputs,
    cache: StateCache,
    shape: GatedDeltaShape,
    weights: GatedDeltaWeights,
    eps: float,
) -> Tensor:
    """`linear_attention.gated_delta.gated_delta`; gates are float32."""
    x = x.contiguous()
    gates = gates.contiguous()
    states = rows_of(step)
    out = torch.empty((len(x), shape.values), dtype=x.dtype)
    conv_state, state = cache.parts
    _gated_delta.start(
        threads_for(len(x) * shape.values * shape.key_dim // 4),
        x.data_ptr(),
        gates.data_ptr(),
        out.data_ptr(),
        conv_state.data_ptr(),
        state.data_ptr(),
        weights.conv.data_ptr(),
        weights.rate.data_ptr(),
        weights.dt_bias.data_ptr(),
        weights.norm.data_ptr(),
        step.query_starts.data_ptr(),
        states.rows.data_ptr(),
        states.sources.data_ptr(),
        states.saves.data_ptr(),
        shape.columns.data_ptr(),
        len(states.rows),
        len(states.saves),
        shape.num_key_heads,
        shape.repeats,
        shape.key_dim,
        shape.value_dim,
        shape.taps,
        KINDS[x.dtype],
        eps,
    )
    return out


KERNELS = (_gated_delta,)
