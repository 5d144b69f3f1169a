"""The specification of the rounding kernels in plain torch, and the body for every device that has no other.

Weights stand transposed here, [K, N] float32: a column of the layer's weight is a contiguous row, and all N outputs
advance together. scales and zeros are float32 and hold what will be stored; zeros is None on a symmetric grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.fp4.reference import round_to_e2m1
from octavo.kernels.gptq.grid import Grid


def to_grid(values: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """The codes nearest to values / scales + zeros, as float32; scales and zeros broadcast over values."""
    codes = values / scales
    if grid.fp8:
        return codes.clamp_(grid.least, grid.most).to(torch.float8_e4m3fn).float()
    if grid.fp4:
        return round_to_e2m1(codes)
    codes.round_()
    if zeros is not None:
        codes += zeros
    return codes.clamp_(grid.least, grid.most)


def from_grid(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """(codes - zeros) * scales."""
    return (codes if zeros is None else codes - zeros) * scales


def best_candidate(
    values: Tensor, importance: Tensor, group_size: int, scales: Tensor, zeros: Tensor | None, grid: Grid
) -> Tensor:
    """Of C candidate scales of each group of rows, the one that rounds with the least weighted squared error.

    values      [K, N]; importance [K], the weight of each row's squared errors
    scales      [C, G, N], G = ceil(K / group_size); zeros None or alike
    Returns [G, N] int32, the lowest index of a tie.
    """
    k, n = values.shape
    best = torch.zeros(scales.shape[1], n, dtype=torch.int32, device=values.device)
    for g in range(scales.shape[1]):
        rows = slice(g * group_size, min((g + 1) * group_size, k))
        least = torch.full((n,), torch.inf, device=values.device)
        for c in range(scales.shape[0]):
            scale = scales[c, g]
            zero = None if zeros is None else zeros[c, g]
            error = from_grid(to_grid(values[rows], scale, zero, grid), scale, zero).sub_(values[rows])
            total = importance[rows] @ error.square_()
            better = total < least
            least = torch.where(better, total, least)
            best[g] = torch.where(better, c, best[g])
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
    """GPTQ's recursion over the rows begin..stop = span of a block [B, N], in place.

    For each row i in turn: q = the code of values[i] with scales[i]; errors[i] = (values[i] - decoded q) / U[i, i];
    values[j] -= U[i, j] * errors[i] for all j > i of the block; then values[i] = q.
    factor is U [B, B], upper triangular: U^T U is the inverse of the dampened moments. scales, zeros and errors are
    [B, N] as values is. Rows before begin hold codes already and are left alone.
    """
    for i in range(*span):
        zero = None if zeros is None else zeros[i]
        codes = to_grid(values[i], scales[i], zero, grid)
        torch.div(values[i] - from_grid(codes, scales[i], zero), factor[i, i], out=errors[i])
        values[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        values[i] = codes


def descend_columns(
    codes: Tensor, gradient: Tensor, moments: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid, steps: Tensor
) -> None:
    """One round of coordinate descent on d^T H d over the rows of a block [B, N], in place.

    For each row i in turn: codes[i] = the code nearest to its value - gradient[i] / H[i, i], the best with all others
    as they are; steps[i] = how far the value went; gradient[j] += H[j, i] * steps[i] for all j of the block.
    gradient is H d, d the decoded weight's difference from the original; moments is H's block [B, B].
    """
    for i in range(codes.shape[0]):
        zero = None if zeros is None else zeros[i]
        old = from_grid(codes[i], scales[i], zero)
        codes[i] = to_grid(old - gradient[i] / moments[i, i], scales[i], zero, grid)
        torch.sub(from_grid(codes[i], scales[i], zero), old, out=steps[i])
        gradient.addr_(moments[:, i], steps[i])
