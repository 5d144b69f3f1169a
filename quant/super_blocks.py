"""Scales and minima of integers over minima, and of super-blocks, whose scales are integers (GGUF's K blocks).

Two kinds of grids: w = q * s - m with q from 0 up (Q4_1, Q5_1, Q4_K, Q5_K), and w = q * s with q on both sides of 0
(Q6_K). In a super-block of 256 columns s and m are integers times a float16: of 6 bits, of 8 with a sign for Q6_K.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from octavo.quant.scheme import WeightScheme

SUPER = 256  # columns of a super-block
MOST_SCALE = 63  # of 6 bits
MOST_SIGNED = 127
SHRINK = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range, the whole first so that it wins a tie
TINY = 2.0**-24  # the least float16 above 0: a unit of small weights is subnormal
CHUNK = 1 << 20  # elements worked on at a time


def has_own_grid(w: WeightScheme) -> bool:
    """Whether scales and minima are found here."""
    return w.minima or w.scales == "super"


def search_grid(weight: Tensor, w: WeightScheme, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales [N, G] and minima [N, G] or None, float32 as they will be stored, never a scale of 0, of a weight [N, K].

    Of some ranges, each fitted again to its codes by least squares, the one with the least sum of importance [K] times
    squared error; then the scales of a super-block are rounded to its integers. Raises ValueError for columns
    that are no whole groups.
    """
    size = w.granularity.tile(*weight.shape)[1]
    k = weight.shape[1]
    whole = SUPER if w.scales == "super" else size
    if k % whole:
        raise ValueError(f"{k} columns are no whole blocks of {whole}")
    weights = torch.ones(k, device=weight.device) if importance is None else importance.float()
    weights = weights.reshape(1, k // size, size)
    scales = []
    minima = []
    for rows in torch.split(weight, max(1, CHUNK // k)):
        tiles = rows.float().reshape(len(rows), k // size, size)
        if w.minima:
            s, m = _over_minima(tiles, weights, w.int_range[1])
            if whole == SUPER:
                scale = _in_super_blocks(s, size)
                minima.append(_in_super_blocks(m, size, least=0))
            else:
                scale = s.half().float().clamp(min=TINY)
                minima.append(m.half().float())
        else:
            scale = _in_signed_super_blocks(_around_zero(tiles, weights, w.int_range), size)
        scales.append(scale)
    return torch.cat(scales), torch.cat(minima) if minima else None


def _over_minima(tiles: Tensor, weights: Tensor, most: int) -> Tensor:
    """Scales and minima [2, R, G], any numbers, minima not below 0."""
    low = tiles.amin(2).clamp(max=0)
    high = tiles.amax(2).clamp(min=0)

    def fitted(shrink: float) -> tuple[Tensor, Tensor]:
        scale = ((high - low) * (shrink / most)).clamp(min=1e-20)
        scale, minimum = _fit_over_minima(tiles, weights, most, scale, -low * shrink)
        return torch.stack((scale, minimum)), _error(tiles, weights, scale, minimum, (0, most))

    return _best(map(fitted, SHRINK))


def _best(found: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Of candidates [..., R, G], each with its error [R, G], the one with the least in every place."""
    best, least = next(found)
    for candidate, error in found:
        best = torch.where(error < least, candidate, best)
        least = torch.minimum(error, least)
    return best


def _fit_over_minima(
    tiles: Tensor, weights: Tensor, most: int, scale: Tensor, minimum: Tensor
) -> tuple[Tensor, Tensor]:
    """The scale and minimum with the least error for the codes that these give."""
    codes = ((tiles + minimum[..., None]) / scale[..., None]).round_().clamp_(0, most)
    total = weights.sum(2)
    weighted = codes * weights
    q = weighted.sum(2)
    qq = (weighted * codes).sum(2)
    t = (tiles * weights).sum(2)
    qt = (weighted * tiles).sum(2)
    determinant = total * qq - q * q
    fitted = (total * qt - q * t) / determinant
    offset = (q * fitted - t) / total
    alone = qt / qq  # without a minimum
    negative = offset < 0
    fitted = torch.where(negative, alone, fitted)
    usable = (determinant > 0) & fitted.isfinite() & (fitted > 1e-20)
    return torch.where(usable, fitted, scale), torch.where(usable, offset.clamp(min=0), minimum)


def _around_zero(tiles: Tensor, weights: Tensor, int_range: tuple[int, int]) -> Tensor:
    """Scales [R, G], any numbers: negative where the largest value is positive, which is a whole number of them.

    It is the lowest code, or up to a quarter less: of weights that were on such a grid before, that is the very one.
    """
    peak = tiles.gather(2, tiles.abs().argmax(2, keepdim=True))[..., 0]
    lowest = int_range[0]

    def fitted(code: int) -> tuple[Tensor, Tensor]:
        scale = peak / code
        scale = torch.where(scale.abs() < 1e-20, torch.full_like(scale, 1e-20), scale)
        codes = (tiles / scale[..., None]).round_().clamp_(*int_range)
        weighted = codes * weights
        own = (weighted * tiles).sum(2) / (weighted * codes).sum(2)
        scale = torch.where(own.isfinite() & (own.abs() > 1e-20), own, scale)
        return scale, _error(tiles, weights, scale, None, int_range)

    return _best(map(fitted, range(lowest, lowest * 3 // 4 + 1)))


def _error(tiles: Tensor, weights: Tensor, scale: Tensor, minimum: Tensor | None, int_range: tuple[int, int]) -> Tensor:
    shifted = tiles if minimum is None else tiles + minimum[..., None]
    codes = (shifted / scale[..., None]).round_().clamp_(*int_range)
    return ((codes * scale[..., None] - shifted).square_() * weights).sum(2)


def _in_super_blocks(values: Tensor, size: int, least: int = 1) -> Tensor:
    """Values [R, G] not below 0, as integers least..63 times a float16 for each super-block."""
    blocks = values.reshape(len(values), -1, SUPER // size)
    unit = (blocks.amax(2, keepdim=True) / MOST_SCALE).half().float()
    unit = unit.clamp(min=TINY) if least else unit
    whole = (blocks / unit.clamp(min=TINY)).round_().clamp_(least, MOST_SCALE)
    return (whole * unit).reshape(values.shape)


def _in_signed_super_blocks(values: Tensor, size: int) -> Tensor:
    """Values [R, G] as integers -128..127, but 0, times a float16 for each super-block.

    The value furthest from 0 is 127 or, as llama.cpp has it, -128: whichever is nearer to all of them.
    """
    blocks = values.reshape(len(values), -1, SUPER // size)
    peak = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))

    def rounded(unit: Tensor) -> tuple[Tensor, Tensor]:
        unit = unit.half().float()
        unit = torch.where(unit.abs() < TINY, TINY, unit)
        whole = (blocks / unit).round_().clamp_(-MOST_SIGNED - 1, MOST_SIGNED)
        found = torch.where(whole == 0, 1.0, whole) * unit
        return found, (found - blocks).square_().sum(2, keepdim=True)

    return _best(map(rounded, (peak.abs() / MOST_SIGNED, peak / (-MOST_SIGNED - 1)))).reshape(values.shape)


def factored(values: Tensor, most: int, lowest: int = 0, likely: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Values [n, groups] as a float16 [n, 1] times integers of at most `most`, both float32; the sign of the largest
    is the float16's where all have it. lowest: how far integers may go below 0 where that is further than `most`.
    likely: integers of the value furthest from 0 that are tried first, `-lowest` among them.

    Raises ValueError where they are no such products, as of NaN and infinities: what is returned is exact.
    """
    peak = values.gather(1, values.abs().argmax(1, keepdim=True))
    signs = torch.where((values <= 0).all(1, keepdim=True), -1.0, 1.0)
    unit = torch.zeros_like(peak)
    whole = torch.zeros_like(values)
    left = (peak != 0)[:, 0]

    def settle(count: int) -> None:
        """Where the furthest value may be `count` units, or `-lowest`, take that unit if all of a row are integers."""
        furthest = peak[left].abs() * signs[left] if count > 0 else peak[left]
        tried = (furthest / count).half().float()
        integers = (values[left] / tried).round_()
        in_range = (integers >= -max(most, -count)) & (integers <= most)
        exact = (in_range & (integers * tried == values[left])).all(1)
        rows = left.nonzero()[:, 0][exact]
        unit[rows] = tried[exact]
        whole[rows] = integers[exact]
        left[rows] = False

    for count in (*likely, *range(most, 0, -1), *([-lowest] if lowest else [])):
        if not bool(left.any()):
            return unit, whole
        settle(count)
    if bool(left.any()):
        raise ValueError(
            f"the scales or minima of a super-block are no integers up to {most} times one float16, which is what it "
            "holds"
        )
    return unit, whole
