"""Search scales per input channel by their cost: the error of a layer's outputs once its scaled weights are rounded.

For AWQ and SmoothQuant, which differ only in the scales that they propose. Only statistics are needed, no forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.algorithms.group_scales import (
    round_to_groups,
    search_scales,
    search_scales_jointly,
    static_input_scale,
)
from octavo.calibration.algorithms.input_statistics import InputStats
from octavo.quant.input_rounding import input_rounding
from octavo.quant.qparams import WeightError, over_global_scale, quantize_weight, scale_type
from octavo.quant.scheme import ActivationScheme, QuantScheme, Search

# Outputs of a layer, evenly spread, that a trial rounds: 256 find scales with 0.25 % less loss in twice the time, 64
# ones with 1.6 % more.
ROWS = 128
Tie = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ScaleSearch:
    """The best scales [K] of a search, float32, their loss (relative error of the outputs) and that of no scales."""

    scales: Tensor
    loss: float
    loss_before: float

    @property
    def gains(self) -> bool:
        return self.loss < self.loss_before


def untied(scales: Tensor) -> Tensor:
    """Every channel has a scale of its own."""
    return scales


class ScaleTrials:
    """Layers that share an input, weights [N, K] each with its scheme, and the loss of any scales for it."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        schemes: Sequence[QuantScheme],
        stats: InputStats,
        search: Search = "mse",
        scale_dtype: torch.dtype | None = None,
        rows: int = ROWS,
    ) -> None:
        self.stats = stats
        self._search = search
        self._dtype = weights[0].dtype
        self._stored = scale_dtype or self._dtype
        self._layers: list[tuple[Tensor, QuantScheme, float]] = []  # [K, rows], scheme, rows that one stands for
        for scheme in dict.fromkeys(schemes):
            alike = torch.cat([w for w, s in zip(weights, schemes, strict=True) if s == scheme])
            if not bool(alike.isfinite().all()):
                raise WeightError("it holds NaN or infinity")
            taken = min(rows, alike.shape[0])
            pick = torch.arange(taken, device=alike.device) * alike.shape[0] // taken
            self._layers.append((alike[pick].t().float().contiguous(), scheme, alike.shape[0] / taken))
        self._signal = sum(_energy(w, stats.moments) * weight for w, _, weight in self._layers)

    def loss(self, scales: Tensor, *, joint: bool = False) -> float:
        """trace(D H D^T) / trace(W H W^T) with D = Q(W s) / s - W, over all layers; and what rounding x / s adds.

        Infinite where W s needs scales that their type can't hold.

        The latter is measured on the tokens that the statistics hold (an estimate from moments and absmax missed by a
        factor where few tokens have huge inputs).

        joint: Q is `awq_clip`'s search, several times slower; else its errors' covariances are left out.
        """
        column = scales.view(-1, 1)
        noise = 0.0
        for values, scheme, each in self._layers:
            scaled = (values * column).to(self._dtype).float()
            try:
                rounded = self._round(scaled, scheme, scales, joint)
            except WeightError:  # there are others, or the layer is refused when it is solved
                return torch.inf
            change = (rounded / column).sub_(values)
            noise += each * _energy(change, self.stats.moments)
            if scheme.activation is not None:
                moved = self._input_errors(scheme.activation, scales) @ scaled
                noise += each * float(moved.square_().sum(dtype=torch.float64)) / moved.shape[0]
        return noise / self._signal if self._signal > 0 else 0.0

    def _input_errors(self, activation: ActivationScheme, scales: Tensor) -> Tensor:
        """Return the rounding errors of the sampled tokens' inputs x / s, [R, K]."""
        inputs = self.stats.rows / scales
        if inputs.shape[0] == 0:
            raise ValueError("the scheme rounds inputs, and the statistics hold no rows to try it on")
        stored = static_input_scale(self.stats.absmax / scales, activation) if activation.has_stored_scale else None
        rounds = input_rounding(activation, stored, inputs.device)
        return inputs if rounds is None else rounds(inputs).sub_(inputs)

    def best(self, candidates: Sequence[Tensor], before: float, *, joint: bool = False) -> ScaleSearch:
        """Return the candidate with the least loss; not scaling, whose loss is `before`, is one."""
        best = ScaleSearch(torch.ones_like(self.stats.absmax), before, before)
        for scales in candidates:
            loss = self.loss(scales, joint=joint)
            if loss < best.loss:
                best = ScaleSearch(scales, loss, before)
        return best

    def _round(self, values: Tensor, scheme: QuantScheme, scales: Tensor, joint: bool) -> Tensor:
        """A scaled weight [K, N] rounded to nearest, in float32."""
        w = scheme.weight
        if w.granularity.kind in ("tensor", "block"):
            return quantize_weight(values.t().contiguous(), scheme, self._search).dequantize().t()
        size = w.granularity.group_size or values.shape[0]
        stored = scale_type(w, self._stored)
        values, whole = over_global_scale(values, w, None)
        if joint and self._search == "mse" and size < values.shape[0]:
            moments = self.stats.moments / torch.outer(scales, scales)
            scale, zero = search_scales_jointly(values, moments, size, w, stored)
        else:
            importance = (self.stats.moments.diagonal() / scales.square()).contiguous()
            scale, zero = search_scales(values, importance, size, w, stored, self._search)
        rounded = round_to_groups(values, scale, zero, size, w)[1]
        return rounded if whole is None else rounded / whole


def normalized(scales: Tensor) -> Tensor:
    """Scales around 1, as AWQ has them: divided by the root of largest times least; never zero."""
    kept = scales.clamp(min=1e-4)
    return kept / (kept.amax() * kept.amin()).sqrt()


def _energy(change: Tensor, moments: Tensor) -> float:
    """trace(D^T H D) of a transposed change [K, N]."""
    return float((moments @ change).mul_(change).sum(dtype=torch.float64))
