"""SmoothQuant: move the outliers of a layer's input into its weights, where rounding both loses least.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.calibration.algorithms.channel_scale_search import ScaleSearch, ScaleTrials, Tie, normalized, untied
from octavo.calibration.algorithms.input_statistics import InputStats
from octavo.quant.scheme import QuantScheme, Search

ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def smooth_scales(weights: Sequence[Tensor], inputs: Tensor, alpha: float = 0.5, tie: Tie = untied) -> Tensor:
    """s = inputs^alpha / max|w|^(1 - alpha) per input channel [K], w over all layers that share the input.

    inputs is the paper's max|x|, or another measure of a channel's size. alpha 0 evens out the weights alone, 1 the
    inputs alone; 0.5 is the paper's, llm-compressor's examples have 0.8.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha:g}; it is between 0 and 1")
    largest = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    return normalized(tie(inputs.clamp(min=1e-5) ** alpha / largest.clamp(min=1e-5) ** (1 - alpha)))


def smoothquant_scales(
    weights: Sequence[Tensor],
    schemes: Sequence[QuantScheme],
    stats: InputStats,
    *,
    alpha: float | None = None,
    tie: Tie = untied,
    search: Search = "absmax",
    scale_dtype: torch.dtype | None = None,
) -> ScaleSearch:
    """The scales for one alpha, or of the best of ALPHAS, or of none: with rounding of weights and inputs counted.

    The search tries the inputs' root mean square beside their largest, which single tokens decide.
    """
    trials = ScaleTrials(weights, schemes, stats, search, scale_dtype)
    before = trials.loss(torch.ones_like(stats.absmax))
    if alpha is not None:
        scales = smooth_scales(weights, stats.absmax, alpha, tie)
        return ScaleSearch(scales, trials.loss(scales), before)
    sizes = (stats.absmax, stats.moments.diagonal().clamp(min=0).sqrt())
    return trials.best([smooth_scales(weights, size, a, tie) for size in sizes for a in ALPHAS], before)
