"""CPU bodies of sampling: a few passes over each row, no sort. Reference: `sampling.reference`.

The cut-off of top-k and top-p is found by radix selection. The weights are positive float32 numbers, so their bits are
ordered as the numbers are. A histogram over the upper bits tells in which bin the count (top-k) or the mass (top-p) is
reached; the next bits are then counted in that bin alone. torch's sort and topk take 20 to 100 times as long on a CPU.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.native.dtypes import exp
from octavo.kernels.native.jit import kernel, next_item, threads_for, view
from octavo.kernels.sampling import reference

_REASSOCIATE = {"reassoc", "contract", "nsz", "nnan"}
_CHUNK = 256
_MOST_KEPT = 64  # entries of the top list, which is kept sorted by insertion


@numba.njit(fastmath=_REASSOCIATE)
def _largest(row, begin, end):
    best = row[begin]
    for i in range(begin, end):
        best = max(best, row[i])
    return best


@numba.njit
def _weigh(row, peak, temperature, weights, vocab):
    """weights = exp((row - peak) / temperature), 0 where that is under e^-87."""
    factor = np.float32(1.0) / temperature
    for i in range(vocab):
        x = (row[i] - peak) * factor
        weights[i] = exp(x) if x > np.float32(-87.0) else np.float32(0.0)


@numba.njit
def _select(weights, bits, vocab, by_mass, target):
    """Bits of the largest weight w such that the weights >= w reach `target` in number, or in mass."""
    histogram = np.empty(2048, np.float64)
    reached = 0.0
    prefix = np.uint32(0)
    known = np.uint32(32)  # the shift that leaves the bits known so far
    for shift, size in ((21, 2048), (10, 2048), (0, 1024)):
        histogram[:size] = 0.0
        mask = np.uint32(size - 1)
        for i in range(vocab):
            if known == 32 or bits[i] >> known == prefix:
                histogram[(bits[i] >> np.uint32(shift)) & mask] += weights[i] if by_mass else 1.0
        chosen = 0
        for j in range(size - 1, -1, -1):
            if histogram[j] > 0:
                chosen = j  # if rounding leaves the target unreached, the last bin that isn't empty is taken
                if reached + histogram[j] >= target:
                    break
                reached += histogram[j]
        width = np.uint32(10 if shift == 0 else 11)
        prefix = (prefix << width) | np.uint32(chosen)
        known = np.uint32(shift)
    return prefix


@numba.njit(fastmath=_REASSOCIATE)
def _sum_from(weights, begin, end, least):
    total = 0.0
    for i in range(begin, end):
        total += np.float64(weights[i] if weights[i] >= least else np.float32(0.0))
    return total


@numba.njit
def _least_weight(weights, vocab, top_k, top_p, min_p):
    bits = weights.view(np.uint32)
    least = min_p
    found = np.empty(1, np.uint32)
    if 0 < top_k < vocab:
        found[0] = _select(weights, bits, vocab, False, np.float64(top_k))
        least = max(least, found.view(np.float32)[0])
    if top_p < np.float32(1.0):
        total = _sum_from(weights, 0, vocab, least)
        found[0] = _select(weights, bits, vocab, True, np.float64(top_p) * total)
        least = max(least, found.view(np.float32)[0])
    return least


@numba.njit
def _invert(weights, sums, vocab, least, uniform):
    """The first token at which the sum of the weights from `least` up exceeds uniform * total."""
    chunks = (vocab + _CHUNK - 1) // _CHUNK
    total = 0.0
    for c in range(chunks):
        sums[c] = _sum_from(weights, c * _CHUNK, min((c + 1) * _CHUNK, vocab), least)
        total += sums[c]
    target = uniform * total
    chunk = 0
    reached = 0.0
    end = 0.0
    for c in range(chunks):
        if sums[c] > 0:  # if rounding leaves the target unreached, the last chunk that isn't empty is taken
            chunk = c
            reached = end
            end += sums[c]
            if end > target:
                break
    token = -1
    for i in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, vocab)):
        if weights[i] >= least and weights[i] > 0:
            token = i
            reached += np.float64(weights[i])
            if reached > target:
                break
    return token


@kernel("qqqqqqq")
def _draw(args):
    """logits, [rows, 3] of temperature, top_p, min_p, top_k, uniforms, tokens, rows, vocab; items are single rows."""
    a = numba.carray(args, (8,), np.int64)
    rows = a[6]
    vocab = a[7]
    params = view(a[2], (rows, 3), np.float32)
    top_k = view(a[3], (rows,), np.int64)
    uniforms = view(a[4], (rows,), np.float64)
    tokens = view(a[5], (rows,), np.int64)
    weights = np.empty(vocab, np.float32)
    sums = np.empty(vocab // _CHUNK + 1, np.float64)
    while True:
        i = next_item(args)
        if i >= rows:
            break
        row = view(a[1] + i * vocab * 4, (vocab,), np.float32)
        _weigh(row, _largest(row, 0, vocab), params[i, 0], weights, vocab)
        least = _least_weight(weights, vocab, top_k[i], params[i, 1], params[i, 2])
        tokens[i] = _invert(weights, sums, vocab, least, uniforms[i])


@numba.njit(fastmath=_REASSOCIATE)
def _log_norm(row, vocab):
    """log(sum(exp(row)))."""
    peak = _largest(row, 0, vocab)
    total = 0.0
    for begin in range(0, vocab, _CHUNK):
        part = np.float32(0.0)
        for i in range(begin, min(begin + _CHUNK, vocab)):
            part += exp(row[i] - peak)
        total += float(part)
    return np.float32(peak + np.log(total))


@numba.njit
def _top(row, vocab, ids, values, count):
    """The `count` largest, descending, equal ones in the order of the row; both lists are kept sorted by insertion."""
    held = 0
    for begin in range(0, vocab, _CHUNK):
        end = min(begin + _CHUNK, vocab)
        if held == count and _largest(row, begin, end) <= values[count - 1]:
            continue
        for i in range(begin, end):
            if held == count and row[i] <= values[count - 1]:
                continue
            at = min(held, count - 1)
            while at > 0 and values[at - 1] < row[i]:
                values[at] = values[at - 1]
                ids[at] = ids[at - 1]
                at -= 1
            values[at] = row[i]
            ids[at] = i
            held = min(held + 1, count)


@kernel("qqqqqqqqqq")
def _logprobs(args):
    """logits, chosen, logprobs, ranks, top ids, top logprobs, rows, vocab, count, norms; items are single rows."""
    a = numba.carray(args, (11,), np.int64)
    rows = a[7]
    vocab = a[8]
    count = a[9]
    chosen = view(a[2], (rows,), np.int64)
    found = view(a[3], (rows,), np.float32)
    ranks = view(a[4], (rows,), np.int64)
    top_ids = view(a[5], (rows, count), np.int64)
    top_values = view(a[6], (rows, count), np.float32)
    norms = view(a[10], (rows,), np.float32)
    while True:
        i = next_item(args)
        if i >= rows:
            break
        row = view(a[1] + i * vocab * 4, (vocab,), np.float32)
        norm = _log_norm(row, vocab)
        picked = row[chosen[i]]
        better = 0
        for j in range(vocab):
            better += row[j] > picked
        norms[i] = norm
        found[i] = picked - norm
        ranks[i] = better + 1
        if count > 0:
            _top(row, vocab, top_ids[i], top_values[i], count)
            for j in range(count):
                top_values[i, j] -= norm


@kernel("qqqqqqq")
def _forbid(args):
    """logits, rows, bits, number of rows, vocab, words of a row, logits between rows; items are single rows."""
    a = numba.carray(args, (8,), np.int64)
    count = a[4]
    vocab = a[5]
    words = a[6]
    rows = view(a[2], (count,), np.int64)
    bits = view(a[3], (count, words), np.uint32)
    while True:
        r = next_item(args)
        if r >= count:
            break
        row = view(a[1] + rows[r] * a[7] * 4, (vocab,), np.float32)
        for word in range(words):
            allowed = bits[r, word]
            if allowed == np.uint32(0xFFFFFFFF):
                continue
            begin = word * 32
            end = min(begin + 32, vocab)
            if allowed == 0:
                row[begin:end] = np.float32(-np.inf)
                continue
            for i in range(begin, end):
                if (allowed >> np.uint32(i - begin)) & np.uint32(1) == 0:
                    row[i] = np.float32(-np.inf)


def forbid(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """`sampling.reference.forbid`; logits float32 whose columns lie side by side."""
    count = len(rows)
    threads = min(count, threads_for(count * logits.shape[1]))
    _forbid.start(
        threads,
        logits.data_ptr(),
        rows.data_ptr(),
        bits.data_ptr(),
        count,
        logits.shape[1],
        bits.shape[1],
        logits.stride(0),
    )


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor) -> Tensor:
    """`sampling.reference.draw`."""
    logits = logits.contiguous()
    rows, vocab = logits.shape
    params = torch.stack((temperature, top_p, min_p), dim=1)
    tokens = torch.empty(rows, dtype=torch.int64)
    threads = min(rows, torch.get_num_threads())
    _draw.start(
        threads,
        logits.data_ptr(),
        params.data_ptr(),
        top_k.data_ptr(),
        uniforms.data_ptr(),
        tokens.data_ptr(),
        rows,
        vocab,
    )
    return tokens


def logprobs(logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sampling.reference.logprobs`."""
    if count > _MOST_KEPT:
        return reference.logprobs(logits, chosen, count)
    return _run_logprobs(logits, chosen, count)[:4]


def invariant_logprobs(logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `logprobs`, with the same bits whatever `count` is, which is the most that any request of a step wants.

    Equal logits stand in the order of the row, as the kernel has them; torch's topk promises none.
    """
    if count <= _MOST_KEPT:
        return logprobs(logits, chosen, count)
    found, ranks, _, _, norms = _run_logprobs(logits, chosen, 0)
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return found, ranks, ids[:, :count], values[:, :count] - norms.unsqueeze(1)


def _run_logprobs(logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`logprobs` for a `count` up to _MOST_KEPT, and log(sum(exp(row))) of each row."""
    logits = logits.contiguous()
    rows, vocab = logits.shape
    found = torch.empty(rows)
    ranks = torch.empty(rows, dtype=torch.int64)
    top_ids = torch.empty(rows, count, dtype=torch.int64)
    top_values = torch.empty(rows, count)
    norms = torch.empty(rows)
    threads = min(rows, torch.get_num_threads())
    _logprobs.start(
        threads,
        logits.data_ptr(),
        chosen.data_ptr(),
        found.data_ptr(),
        ranks.data_ptr(),
        top_ids.data_ptr(),
        top_values.data_ptr(),
        rows,
        vocab,
        count,
        norms.data_ptr(),
    )
    return found, ranks, top_ids, top_values, norms
