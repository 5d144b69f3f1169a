"""The statistics of a linear layer's input that GPTQ, AWQ, SmoothQuant and static scales need.

The squared error of a layer's output over the calibration text is a function of its weight's change D and of the
inputs' second moments H alone: sum over tokens |D x|^2 = trace(D H D^T). What rounding the inputs themselves costs is
no function of the moments: for that, some tokens' inputs are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.team import ALONE, Team, largest, rows_of_all, total


@dataclass(frozen=True)
class InputStats:
    """Statistics of the inputs x [K] of one linear layer, or of several that share them, over num_tokens tokens.

    moments  [K, K] float32: the mean over tokens of x x^T (half of GPTQ's Hessian; a factor changes nothing there);
             [0, 0] where only magnitudes were asked for
    absmax   [K] float32: the largest |x| of each channel
    absmean  [K] float32: the mean |x| of each channel
    rows     [R, K] float32: the inputs of some tokens, evenly spread over all; [0, K] where they weren't asked for
    """

    moments: Tensor
    absmax: Tensor
    absmean: Tensor
    num_tokens: int
    rows: Tensor

    def scaled(self, scales: Tensor) -> InputStats:
        """The statistics of x / scales, scales [K]: what the layer sees once a previous op was divided by them."""
        s = scales.to(self.moments.device, torch.float32)
        moments = self.moments / torch.outer(s, s)
        return InputStats(moments, self.absmax / s, self.absmean / s, self.num_tokens, self.rows / s)


class StatsCollector:
    """Adds up InputStats over batches [T, K]; sums are float32, over chunks small enough for it.

    num_rows: how many tokens' inputs are kept at the most (at least half of it, once that many were seen): every n-th,
    n doubled whenever they become too many.
    """

    CHUNK = 2048  # tokens of one GEMM
    STRIP = 128  # rows of the moments made at a time: what lies left of the diagonal needn't be computed

    def __init__(self, in_features: int, device: torch.device, *, moments: bool = True, num_rows: int = 0) -> None:
        side = in_features if moments else 0
        with torch.inference_mode(False):  # whoever collects is in it, and whoever has the result is not
            self._sum = torch.zeros(side, side, device=device)  # right of the diagonal, and some more
        self._absmax = torch.zeros(in_features, device=device)
        self._abssum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._values = torch.empty(0, in_features, device=device)  # fresh memory costs as much as the sums below
        self._num_rows = num_rows
        self._every = 1
        self._rows = torch.zeros(0, in_features, device=device)
        self.num_tokens = 0

    def add(self, x: Tensor) -> None:
        """x [T, K], in any floating type."""
        if self._num_rows:
            self._keep(x)
        for chunk in torch.split(x, self.CHUNK):
            if chunk.shape[0] > self._values.shape[0]:
                self._values = torch.empty(chunk.shape, device=self._sum.device)
            values = self._values[: chunk.shape[0]].copy_(chunk)
            for begin in range(0, self._sum.shape[0], self.STRIP):
                end = begin + self.STRIP
                self._sum[begin:end, begin:].addmm_(values[:, begin:end].t(), values[:, begin:])
            values.abs_()
            self._absmax = torch.maximum(self._absmax, values.amax(0))
            self._abssum += values.sum(0, dtype=torch.float64)
        self.num_tokens += x.shape[0]

    def _keep(self, x: Tensor) -> None:
        """The last of every `_every` tokens, counted over all batches."""
        first = -(self.num_tokens + 1) % self._every
        self._rows = torch.cat([self._rows, x[first :: self._every].to(self._rows)])
        while self._rows.shape[0] > self._num_rows:
            self._rows = self._rows[1::2].clone()
            self._every *= 2

    def result(self, team: Team = ALONE) -> InputStats:
        """What all members have seen; nothing can be added any more. Raises ValueError when nothing was added."""
        num_tokens = sum(team.of_all(self.num_tokens))
        if num_tokens == 0:
            raise ValueError("no token was seen")
        mean = (total(team, self._abssum) / num_tokens).float()
        moments = total(team, self._sum).triu_().div_(num_tokens)
        for begin in range(0, moments.shape[0], self.STRIP):  # in place: of a wide layer they are half of all memory
            end = begin + self.STRIP
            moments[begin:end, begin:end] += moments[begin:end, begin:end].triu(1).t()
            moments[end:, begin:end] = moments[begin:end, end:].t()
        rows = rows_of_all(team, self._rows[:: team.size])
        return InputStats(moments, largest(team, self._absmax), mean, num_tokens, rows)
