"""CPU bodies of the rounding kernels: a strip of outputs at a time, which stays in a core's nearest cache.

Every output is computed by itself and in the same order, so the result doesn't depend on the number of threads.
Reference: `gptq.reference`.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.gptq.grid import Grid
from octavo.kernels.native.dtypes import e4m3_to_float, float_to_e4m3, round_to_e2m1
from octavo.kernels.native.jit import kernel, next_item, threads_for, view

STRIP = 64  # outputs of one item: 128 rows of them are 32 KB


@numba.njit
def _to_grid(values, scales, zeros, least, most, numbers, codes, count):  # type: ignore[no-untyped-def]
    if numbers == 1:
        for r in range(count):
            codes[r] = e4m3_to_float(float_to_e4m3(values[r] / scales[r]))
    elif numbers == 2:
        for r in range(count):
            codes[r] = round_to_e2m1(values[r] / scales[r])
    else:
        for r in range(count):
            codes[r] = min(max(np.rint(values[r] / scales[r]) + zeros[r], least), most)


@kernel("qqqqqqqqqqqqq")
def _round_columns(args):  # type: ignore[no-untyped-def]
    """values, factor, scales, zeros or 0, errors, rows, columns, begin, stop, least, most, numbers, strips."""
    a = numba.carray(args, (14,), np.int64)
    rows = a[6]
    columns = a[7]
    begin = a[8]
    stop = a[9]
    least = np.float32(a[10])
    most = np.float32(a[11])
    numbers = a[12]
    values = view(a[1], (rows, columns), np.float32)
    factor = view(a[2], (rows, rows), np.float32)
    scales = view(a[3], (rows, columns), np.float32)
    errors = view(a[5], (rows, columns), np.float32)
    strip = np.empty((rows, STRIP), np.float32)
    codes = np.empty(STRIP, np.float32)
    error = np.empty(STRIP, np.float32)
    zeros = np.zeros(STRIP, np.float32)
    while True:
        item = next_item(args)
        if item >= a[13]:
            break
        first = item * STRIP
        count = min(STRIP, columns - first)
        for j in range(begin, rows):
            for r in range(count):
                strip[j, r] = values[j, first + r]
        for i in range(begin, stop):
            scale = scales[i, first : first + count]
            if a[4] != 0:
                stored = view(a[4], (rows, columns), np.float32)
                for r in range(count):
                    zeros[r] = stored[i, first + r]
            _to_grid(strip[i], scale, zeros, least, most, numbers, codes, count)
            for r in range(count):
                error[r] = (strip[i, r] - (codes[r] - zeros[r]) * scale[r]) / factor[i, i]
                errors[i, first + r] = error[r]
                strip[i, r] = codes[r]
            for j in range(i + 1, rows):
                u = factor[i, j]
                for r in range(count):
                    strip[j, r] -= u * error[r]
        for j in range(begin, rows):
            for r in range(count):
                values[j, first + r] = strip[j, r]


@kernel("qqqqqqqqqqqq")
def _descend_columns(args):  # type: ignore[no-untyped-def]
    """codes, gradient, moments, scales, zeros or 0, steps, rows, columns, least, most, numbers, strips."""
    a = numba.carray(args, (13,), np.int64)
    rows = a[7]
    columns = a[8]
    numbers = a[11]
    least = np.float32(a[9])
    most = np.float32(a[10])
    codes = view(a[1], (rows, columns), np.float32)
    gradient = view(a[2], (rows, columns), np.float32)
    moments = view(a[3], (rows, rows), np.float32)
    scales = view(a[4], (rows, columns), np.float32)
    steps = view(a[6], (rows, columns), np.float32)
    strip = np.empty((rows, STRIP), np.float32)
    new = np.empty(STRIP, np.float32)
    old = np.empty(STRIP, np.float32)
    step = np.empty(STRIP, np.float32)
    zeros = np.zeros(STRIP, np.float32)
    while True:
        item = next_item(args)
        if item >= a[12]:
            break
        first = item * STRIP
        count = min(STRIP, columns - first)
        for j in range(rows):
            for r in range(count):
                strip[j, r] = gradient[j, first + r]
        for i in range(rows):
            scale = scales[i, first : first + count]
            if a[5] != 0:
                stored = view(a[5], (rows, columns), np.float32)
                for r in range(count):
                    zeros[r] = stored[i, first + r]
            for r in range(count):
                old[r] = (codes[i, first + r] - zeros[r]) * scale[r]
                step[r] = old[r] - strip[i, r] / moments[i, i]
            _to_grid(step, scale, zeros, least, most, numbers, new, count)
            for r in range(count):
                step[r] = (new[r] - zeros[r]) * scale[r] - old[r]
                steps[i, first + r] = step[r]
                codes[i, first + r] = new[r]
            for j in range(rows):
                h = moments[j, i]
                for r in range(count):
                    strip[j, r] += h * step[r]
        for j in range(rows):
            for r in range(count):
                gradient[j, first + r] = strip[j, r]


@kernel("qqqqqqqqqqqqq")
def _best_candidate(args):  # type: ignore[no-untyped-def]
    """values, importance, scales, zeros or 0, best, K, N, group size, candidates, groups, least, most, numbers."""
    a = numba.carray(args, (14,), np.int64)
    k = a[6]
    n = a[7]
    size = a[8]
    candidates = a[9]
    groups = a[10]
    least = np.float32(a[11])
    most = np.float32(a[12])
    numbers = a[13]
    values = view(a[1], (k, n), np.float32)
    importance = view(a[2], (k,), np.float32)
    scales = view(a[3], (candidates, groups, n), np.float32)
    best = view(a[5], (groups, n), np.int32)
    codes = np.empty(STRIP, np.float32)
    zeros = np.zeros(STRIP, np.float32)
    total = np.empty(STRIP, np.float32)
    smallest = np.empty(STRIP, np.float32)
    strips = (n + STRIP - 1) // STRIP
    while True:
        item = next_item(args)
        if item >= strips * groups:
            break
        g = item // strips
        first = item % strips * STRIP
        count = min(STRIP, n - first)
        smallest[:] = np.inf
        for c in range(candidates):
            scale = scales[c, g, first : first + count]
            if a[4] != 0:
                stored = view(a[4], (candidates, groups, n), np.float32)
                for r in range(count):
                    zeros[r] = stored[c, g, first + r]
            total[:] = 0
            for i in range(g * size, min((g + 1) * size, k)):
                row = values[i, first : first + count]
                _to_grid(row, scale, zeros, least, most, numbers, codes, count)
                for r in range(count):
                    error = (codes[r] - zeros[r]) * scale[r] - row[r]
                    total[r] += importance[i] * error * error
            for r in range(count):
                if total[r] < smallest[r]:
                    smallest[r] = total[r]
                    best[g, first + r] = c


def best_candidate(
    values: Tensor, importance: Tensor, group_size: int, scales: Tensor, zeros: Tensor | None, grid: Grid
) -> Tensor:
    """`gptq.reference.best_candidate`."""
    k, n = values.shape
    candidates, groups, _ = scales.shape
    best = torch.zeros(groups, n, dtype=torch.int32)
    _best_candidate.start(
        threads_for(k * n),
        *_addresses(values, importance, scales, zeros, best),
        k,
        n,
        group_size,
        candidates,
        groups,
        grid.least,
        grid.most,
        grid.numbers,
    )
    return best


def round_columns(
    values: Tensor,
    factor: Tensor,
    span: tuple[int, int],
    scales: Tensor,
    zeros: Tensor | None,
    grid: Grid,
    errors: Tensor,
) -> None:
    """`gptq.reference.round_columns`."""
    rows, columns = values.shape
    _round_columns.start(
        threads_for(rows * columns),
        *_addresses(values, factor, scales, zeros, errors),
        rows,
        columns,
        *span,
        grid.least,
        grid.most,
        grid.numbers,
        -(-columns // STRIP),
    )


def descend_columns(
    codes: Tensor, gradient: Tensor, moments: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid, steps: Tensor
) -> None:
    """`gptq.reference.descend_columns`."""
    rows, columns = codes.shape
    _descend_columns.start(
        threads_for(rows * columns),
        *_addresses(codes, gradient, moments, scales, zeros, steps),
        rows,
        columns,
        grid.least,
        grid.most,
        grid.numbers,
        -(-columns // STRIP),
    )


def _addresses(*tensors: Tensor | None) -> list[int]:
    """The tensors' addresses, 0 for None. The kernels read them as contiguous."""
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous()
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
