"""Learned rounding: which way each weight is rounded, and each group's scale, by gradients of the rounded weight.

After SignRound (Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
2023), AutoRound's method: a weight between two codes is moved towards one of them, and each group's scale by a factor;
rounding passes gradients on as they come. Two things differ. A weight begins where another algorithm has put its code.
And its steps are Adam's (Kingma and Ba, 2014), not the gradient's signs: where gradients of few tokens disagree, which
is for most weights, signs are a walk at random over every code's edge nearby (GPTQ leaves many there).
What is minimized is not this file's business.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.calibration.algorithms.group_scales import grid_of
from octavo.kernels.gptq.reference import to_grid
from octavo.quant.qparams import QuantizedWeight, as_stored, scale_type
from octavo.quant.scheme import WeightScheme
from octavo.quant.super_blocks import has_own_grid

WITHIN = 0.499  # of a step: how far from its code a weight begins at most
PIECE = 1 << 19  # weights that are moved at once, so that what is between stays in the cache
HALVINGS = 8  # of a weight's way from its code, until it rounds to that
MEAN_DECAY = 0.9  # of Adam's moving averages
SQUARE_DECAY = 0.95
EXPONENT_BITS = 0x7F800000  # of a float32


class LearnedRounding:
    """One weight [N, K] on a grid, on its way from the codes that it begins with; its scales are not those of blocks.

    latent  [R, G, S] float32: what is rounded, over its scale, in G runs of S numbers that share one; R is N, and a
            run is of a row's columns, but of a tensor with one scale both are 1. A weight that begins with its nearest
            code begins where it is itself; one that was moved beyond a code's edge, as far within the edge
    factor  [R, G, 1] float32: of the scale that the group began with. It moves no code. Powers of two have none, nor
            have scales of super-blocks and over minima, which others depend on
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight) -> None:
        w = start.scheme.weight
        n, k = weight.shape
        rows, columns = w.granularity.tile(n, k)
        shape = (n // rows, k // columns, rows * columns)
        self.start = start
        self._grid = grid_of(w)
        self._order = self._back = None
        codes = start.codes
        if start.g_idx is not None:
            ordered, self._order = start.sorted_by_group()
            self._back = self._order.argsort()
            codes = ordered.codes
            weight = weight[:, self._order]
        self._scale = start.scale.float().view(*shape[:2], 1)
        self._sign = self._scale.sign() if bool((self._scale < 0).any()) else None
        offset = None if start.zero_point is None else start.zero_point.float().view(*shape[:2], 1)
        self._zero = None if w.minima else offset
        self._minima = offset if w.minima else None
        size = max(1, PIECE * shape[0] // weight.numel())
        self._pieces = [slice(i, i + size) for i in range(0, shape[0], size)]
        self._steps = 0
        begin = self._less_zero(codes.float().reshape(shape), slice(None))
        exact = weight.float().reshape(shape)
        if self._minima is not None:
            exact = exact + self._minima
        self.latent = _begin(exact / self._scale, begin, w)
        self.factor = torch.ones_like(self._scale)
        self._rounding = _Adam(self.latent)
        self._scaling = None if self._has_fixed_scales else _Adam(self.factor)

    def write(self, weight: Tensor) -> None:
        """Write the weight that is now meant to `weight` [N, K]."""
        rows = weight.view(len(self.latent), -1)
        scale = self._stored_scale()
        for piece in self._pieces:
            values = self._less_zero(self._rounded(piece), piece).mul_(scale[piece])
            if self._minima is not None:
                values -= self._minima[piece]
            rows[piece] = self._unsorted(values)

    def step(self, gradient: Tensor, rounding_rate: float, scale_rate: float) -> None:
        """Move against the gradient [N, K] of the weight that `write` writes, by at most about the rates.

        Of latents the rate is in steps of the grid, which are wider for large numbers if these are floats.
        """
        self._steps += 1
        unbiased = (1 - SQUARE_DECAY**self._steps) ** 0.5 / (1 - MEAN_DECAY**self._steps)
        rows = gradient.reshape(len(self.latent), -1)
        for piece in self._pieces:
            ordered = rows[piece] if self._order is None else rows[piece][:, self._order]
            g = ordered.float().view(self.latent[piece].shape)
            if self._sign is not None:
                g = g * self._sign[piece]
            codes = self._less_zero(self._rounded(piece), piece)
            spacing = _spacing(codes, self.start.scheme.weight)
            if self._scaling is not None:
                of_scale = codes.mul_(g).sum(2, keepdim=True)
                self._scaling.move(self.factor, piece, of_scale, unbiased * scale_rate)
            self._rounding.move(self.latent, piece, g, unbiased * rounding_rate, spacing)

    def result(self, out: Tensor | None = None) -> QuantizedWeight:
        """Codes and scales as they are now. out: memory for the codes, which may be the start's own."""
        codes = torch.empty_like(self.start.codes) if out is None else out
        rows = codes.view(len(self.latent), -1)
        for piece in self._pieces:
            rows[piece] = self._unsorted(self._rounded(piece).to(codes.dtype))
        scale = self._stored_scale().view(self.start.scale.shape).to(self.start.scale.dtype)
        return replace(self.start, codes=codes, scale=scale)

    @property
    def _has_fixed_scales(self) -> bool:
        w = self.start.scheme.weight
        return w.scales == "e8m0" or has_own_grid(w)

    def _rounded(self, piece: slice) -> Tensor:
        """Codes of some runs as they will be stored, in float32."""
        zero = None if self._zero is None else self._zero[piece]
        return to_grid(self.latent[piece], torch.ones_like(self._scale[piece]), zero, self._grid)

    def _less_zero(self, codes: Tensor, piece: slice) -> Tensor:
        return codes if self._zero is None else codes - self._zero[piece]

    def _stored_scale(self) -> Tensor:
        """The scales as they will be stored, in float32."""
        w = self.start.scheme.weight
        if self._has_fixed_scales:
            return self._scale
        dtype = scale_type(w, self.start.scale.dtype)
        whole = self.start.global_scale
        scale = self._scale * self.factor
        if whole is None:
            return as_stored(scale.clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max), dtype)
        return as_stored(scale * whole, dtype) / whole

    def _unsorted(self, runs: Tensor) -> Tensor:
        """Rows of runs, with their numbers in the order of the weight's columns."""
        rows = runs.flatten(1)
        return rows if self._back is None else rows[:, self._back]


def _begin(exact: Tensor, codes: Tensor, w: WeightScheme) -> Tensor:
    """Where latents begin, of weights over their scale and codes less their zero point."""
    beside = exact.sub_(codes)
    if w.is_float:
        grid = grid_of(w)
        for _ in range(HALVINGS):
            moved = to_grid(codes + beside, torch.ones_like(codes), None, grid) != codes
            beside = torch.where(moved, beside / 2, beside)
        moved = to_grid(codes + beside, torch.ones_like(codes), None, grid) != codes
        return torch.where(moved, codes, codes + beside)
    beyond = beside.abs().sub_(0.5)
    beside = torch.where(beyond > 0, (0.5 - beyond).clamp_(min=0).copysign_(beside), beside)
    return beside.clamp_(-WITHIN, WITHIN).add_(codes)


def _spacing(codes: Tensor, w: WeightScheme) -> Tensor | None:
    """How far a float is from the next one on its grid; None for integers, where it is 1."""
    if not w.is_float:
        return None
    mantissa, least = (1, 0) if w.dtype == "fp4_e2m1" else (3, -6)  # bits of it, and the least normal number's exponent
    power_of_two = (codes.view(torch.int32) & EXPONENT_BITS).view(torch.float32)  # the next one towards 0
    return power_of_two.clamp_(min=2.0**least).mul_(2.0**-mantissa)


class _Adam:
    """The moving averages behind one tensor's steps."""

    def __init__(self, values: Tensor) -> None:
        self._mean = torch.zeros_like(values)
        self._square = torch.zeros_like(values)

    def move(self, values: Tensor, piece: slice, gradient: Tensor, rate: float, unit: Tensor | None = None) -> None:
        """Move a piece of the values against its gradient, in place, by about `rate` units."""
        mean = self._mean[piece].lerp_(gradient, 1 - MEAN_DECAY)
        square = self._square[piece].mul_(SQUARE_DECAY).addcmul_(gradient, gradient, value=1 - SQUARE_DECAY)
        size = square.sqrt().add_(torch.finfo(torch.float32).tiny)
        values[piece].addcdiv_(mean if unit is None else mean * unit, size, value=-rate)
