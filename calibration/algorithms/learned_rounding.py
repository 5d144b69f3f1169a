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

from octavo.calibration.algorithms.group_scales import storable
from octavo.quant.qparams import QuantizedWeight

WITHIN = 0.499  # of a step: how far from its code a weight begins at most
MEAN_DECAY = 0.9  # of Adam's moving averages
SQUARE_DECAY = 0.95


class LearnedRounding:
    """One weight [N, K] of integers in groups of columns, on its way from the codes that it begins with.

    latent  [N, G, S] float32: what is rounded, in steps of its scale. A weight that begins with its nearest code begins
            where it is itself; one that was moved beyond a code's edge, as far within the edge
    factor  [N, G, 1] float32: of the scale that the group began with. It moves no code
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight) -> None:
        n, k = weight.shape
        w = start.scheme.weight
        size = w.granularity.tile(n, k)[1]
        self.start = start
        self._shape = (n, k // size, size)
        self._scale = start.scale.float().view(n, -1, 1)
        self._zero = torch.zeros(()) if start.zero_point is None else start.zero_point.float().view(n, -1, 1)
        self._least = w.int_range[0] - self._zero
        self._most = w.int_range[1] - self._zero
        self._codes = start.codes.float().view(self._shape).sub_(self._zero)
        beside = (weight.float().view(self._shape) / self._scale).sub_(self._codes)
        beyond = beside.abs().sub_(0.5)
        beside = torch.where(beyond > 0, (0.5 - beyond).clamp_(min=0).copysign_(beside), beside)
        self.latent = beside.clamp_(-WITHIN, WITHIN).add_(self._codes)
        self.factor = torch.ones_like(self._scale)
        self._rounding = _Adam(self.latent)
        self._scaling = _Adam(self.factor)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] that is now meant."""
        codes, scale = self._rounded()
        self._codes = codes
        return (codes * scale).to(dtype).view(self.start.shape)

    def step(self, gradient: Tensor, rounding_rate: float, scale_rate: float) -> None:
        """Move against the gradient [N, K] of the weight that `weight` gave last, by at most about the rates."""
        g = gradient.reshape(self._shape).float()
        self._scaling.move(self.factor, (self._codes * g).sum(2, keepdim=True), scale_rate)
        self._rounding.move(self.latent, g, rounding_rate)

    def result(self) -> QuantizedWeight:
        """Codes and scales as they are now."""
        codes, scale = self._rounded()
        stored = (codes + self._zero).to(torch.int8).view(self.start.shape)
        return replace(self.start, codes=stored, scale=scale.view(self.start.scale.shape).to(self.start.scale.dtype))

    def _rounded(self) -> tuple[Tensor, Tensor]:
        """Codes less their zero point, and the scales as they will be stored."""
        codes = torch.minimum(torch.maximum(self.latent.round(), self._least), self._most)
        return codes, storable(self._scale * self.factor, self.start.scale.dtype)


class _Adam:
    """The moving averages behind one tensor's steps."""

    def __init__(self, values: Tensor) -> None:
        self._mean = torch.zeros_like(values)
        self._square = torch.zeros_like(values)
        self._count = 0

    def move(self, values: Tensor, gradient: Tensor, rate: float) -> None:
        """Move values against a gradient, in place."""
        self._count += 1
        self._mean.lerp_(gradient, 1 - MEAN_DECAY)
        self._square.lerp_(gradient.square(), 1 - SQUARE_DECAY)
        size = self._square.div(1 - SQUARE_DECAY**self._count).sqrt_().add_(torch.finfo(torch.float32).tiny)
        values.addcdiv_(self._mean, size, value=-rate / (1 - MEAN_DECAY**self._count))
