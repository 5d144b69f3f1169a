"""Scales and zero points of groups of columns, searched with the inputs' moments in view.

Works on a transposed weight [K, N] float32. The candidates are fractions of a group's whole range, as those of
`quantize_weight` are; here each column's squared error counts by an importance.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.fp4 import reference as fp4
from octavo.kernels.gptq import reference
from octavo.kernels.gptq.grid import Grid
from octavo.quant.qparams import FP8_MAX, WeightError, as_stored, fractions_of
from octavo.quant.scheme import LARGEST, ActivationScheme, Search, WeightScheme
from octavo.quant.super_blocks import has_own_grid, search_grid

# Fractions of a group's range that the search tries, the whole range first so that it wins a tie. Above 1 the largest
# weight is not clipped to the 7 of -8..7, and there is room for the errors that GPTQ adds to columns; below 0.5 nothing
# was seen to gain, from 2 bits to 8.
FRACTIONS = (1.0, *(1 + 0.025 * i for i in range(1, 7)), *(1 - 0.025 * i for i in range(1, 21)))


def rounding_body(device: torch.device) -> Any:
    """The rounding kernels of a device: `kernels.rounding.cpu`, or the reference."""
    return importlib.import_module("octavo.kernels.gptq.cpu") if device.type == "cpu" else reference


def grid_of(w: WeightScheme) -> Grid:
    """The codes of a weight's scheme."""
    if w.dtype == "fp8_e4m3":
        return Grid(-int(FP8_MAX), int(FP8_MAX), fp8=True)
    if w.dtype == "fp4_e2m1":
        return Grid(-int(fp4.E2M1_MAX), int(fp4.E2M1_MAX), fp4=True)
    return Grid(*w.int_range)


def search_scales(
    values: Tensor, importance: Tensor, group_size: int, w: WeightScheme, dtype: torch.dtype, search: Search
) -> tuple[Tensor, Tensor | None]:
    """Scales [G, N] float32 (as `dtype` will store them) and zero points [G, N] float32 or None of values [K, N].

    absmax: they cover each group's whole range. mse: of the scales that cover a fraction of it, the one with the
    least sum of importance [K] times squared error. G = ceil(K / group_size); the last group may be short.
    Of integers over minima these are in the zero points' place, and the scales those of `search_grid`. Raises
    WeightError for a group that no scale of the type covers.
    """
    if has_own_grid(w):
        scale, minima = search_grid(values.t(), w, importance)
        return scale.t().contiguous(), None if minima is None else minima.t().contiguous()
    low, high = _ranges(values, group_size)
    fractions = fractions_of(w, FRACTIONS) if search == "mse" else FRACTIONS[:1]
    scales, zeros = _candidates(low, high, w, dtype, torch.tensor(fractions, device=values.device))
    if len(fractions) == 1:
        best = torch.zeros_like(scales[0], dtype=torch.int32)
    else:
        best = rounding_body(values.device).best_candidate(values, importance, group_size, scales, zeros, grid_of(w))
    return _chosen(scales, zeros, best.long(), dtype)


def _ranges(values: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The least and largest value of each group, zero included: [G, N]."""
    groups = torch.split(values, group_size)
    low = torch.stack([group.amin(0) for group in groups]).clamp_(max=0)
    high = torch.stack([group.amax(0) for group in groups]).clamp_(min=0)
    return low, high


def _candidates(
    low: Tensor, high: Tensor, w: WeightScheme, dtype: torch.dtype, shrinks: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Scales, and zero points when asymmetric, that cover each fraction of the range: [C, G, N].

    One beyond its type is infinite, and rounds to no number, so that others have less error.
    """
    fractions = shrinks.view(-1, 1, 1)
    if w.scales == "e8m0":
        return fp4.e8m0_to_float(fp4.mx_exponents(torch.maximum(-low, high) * fractions, w.dtype)), None
    steps = grid_of(w).most if w.is_float else ((1 << w.bits) - 1) / 2
    if w.symmetric:
        return as_stored(torch.maximum(-low, high) * (fractions / steps), dtype), None
    scales = as_stored((high - low) * (fractions / (2 * steps)), dtype)
    least, most = w.int_range
    return scales, (least - low * fractions / scales).round_().clamp_(least, most)


def _chosen(scales: Tensor, zeros: Tensor | None, best: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Of candidates [C, G, N] the ones of these indices [G, N]. Raises WeightError where none can be stored."""
    pick = best[None]
    scale = scales.gather(0, pick)[0]
    if not bool(scale.isfinite().all()):
        raise WeightError(f"a scale above {torch.finfo(dtype).max:g} is needed, which {str(dtype)[6:]} can't hold")
    return scale, None if zeros is None else zeros.gather(0, pick)[0]


def round_to_groups(
    values: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, w: WeightScheme
) -> tuple[Tensor, Tensor]:
    """Codes and decoded values, float32, of values [K, N] with scales and zero points [G, N]."""
    k = values.shape[0]
    spread = scale.repeat_interleave(group_size, dim=0)[:k]
    zeros = None if zero is None else zero.repeat_interleave(group_size, dim=0)[:k]
    if w.minima and zeros is not None:
        codes = reference.to_grid(values + zeros, spread, None, grid_of(w))
        return codes, reference.from_grid(codes, spread, None) - zeros
    codes = reference.to_grid(values, spread, zeros, grid_of(w))
    return codes, reference.from_grid(codes, spread, zeros)


def search_scales_jointly(
    values: Tensor, moments: Tensor, group_size: int, w: WeightScheme, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """As `search_scales` with mse, but a group's error is d^T H d with its own block of the moments [K, K].

    So errors of columns that move together count as they add up, or cancel, in the outputs.
    """
    if has_own_grid(w):
        return search_scales(values, moments.diagonal(), group_size, w, dtype, "mse")
    k, n = values.shape
    low, high = _ranges(values, group_size)
    scales, zeros = _candidates(low, high, w, dtype, torch.tensor(fractions_of(w, FRACTIONS), device=values.device))
    groups = scales.shape[1]
    tiles = F.pad(values, (0, 0, 0, groups * group_size - k)).view(groups, group_size, n)  # zeros round to zeros
    blocks = torch.zeros(groups, group_size, group_size, device=values.device)
    for g in range(groups):
        rows = slice(g * group_size, min((g + 1) * group_size, k))
        blocks[g, : rows.stop - rows.start, : rows.stop - rows.start] = moments[rows, rows]
    best = torch.zeros(groups, n, dtype=torch.int64, device=values.device)
    least = torch.full((groups, n), torch.inf, device=values.device)
    grid = grid_of(w)
    for c in range(scales.shape[0]):
        scale = scales[c][:, None]
        zero = None if zeros is None else zeros[c][:, None]
        change = reference.from_grid(reference.to_grid(tiles, scale, zero, grid), scale, zero).sub_(tiles)
        error = torch.bmm(blocks, change).mul_(change).sum(1)
        best[error < least] = c
        least = torch.minimum(least, error)
    return _chosen(scales, zeros, best, dtype)


def static_input_scale(absmax: Tensor, activation: ActivationScheme) -> Tensor:
    """The scale [] float32 of an input that is rounded with a stored one: it covers all that was seen, absmax [K].

    Of an input with e4m3 scales it is what divides them: the largest of them is 448 where the largest input is.
    Raises WeightError when the input was zero throughout, or not finite.
    """
    amax = absmax.amax().float().cpu()
    if not bool(amax.isfinite()):
        raise WeightError("its input holds NaN or infinity: no static scale covers that")
    if float(amax) == 0:
        raise WeightError(
            "its input was zero in the whole calibration text: there is no static scale; more text "
            "helps, or a scheme whose inputs are dynamic, such as FP8_DYNAMIC"
        )
    if activation.scales == "e4m3":
        return fp4.nvfp4_global_scale(amax)
    return amax / LARGEST[activation.dtype]
