"""SmoothQuant: move the outliers of a layer's input into its weights, where rounding both loses least.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.calibration.channel_scales import ScaleSearch, ScaleTrials, Tie, normalized, untied
from octavo.calibration.stats import InputStats
from octavo.quant.qparams import FP8_MAX, Search, WeightError
from octavo.quant.scheme import ActivationDtype, QuantScheme

INT8_MAX = 127.0
ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def static_input_scale(stats: InputStats, dtype: ActivationDtype) -> Tensor:
    """The scale [] float32 of an input that is rounded with a stored one: it covers all that was seen.

    Raises WeightError when the input was zero throughout, or not finite.
    """
    amax = stats.absmax.amax().float().cpu()
    if not bool(amax.isfinite()):
        raise WeightError("its input holds NaN or infinity: no static scale covers that")
    if float(amax) == 0:
        raise WeightError(
            "its input was zero in the whole calibration text: there is no static scale; more text "
            "helps, or a scheme whose inputs are dynamic, such as FP8_DYNAMIC"
        )
    return amax / (FP8_MAX if dtype == "fp8_e4m3" else INT8_MAX)


def smooth_scales(weights: Sequence[Tensor], stats: InputStats, alpha: float = 0.5, tie: Tie = untied) -> Tensor:
    """s = max|x|^alpha / max|w|^(1 - alpha) per input channel [K], w over all layers that share the input.

    alpha 0 evens out the weights alone, 1 the inputs alone; 0.5 is the paper's, llm-compressor's examples have 0.8.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha:g}; it is between 0 and 1")
    largest = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    return normalized(tie(stats.absmax.clamp(min=1e-5) ** alpha / largest.clamp(min=1e-5) ** (1 - alpha)))


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
    """The scales for one alpha, or of the best of ALPHAS, or of none: with rounding of weights and inputs counted."""
    trials = ScaleTrials(weights, schemes, stats, search, scale_dtype)
    before = trials.loss(torch.ones_like(stats.absmax))
    if alpha is not None:
        scales = smooth_scales(weights, stats, alpha, tie)
        return ScaleSearch(scales, trials.loss(scales), before)
    return trials.best([smooth_scales(weights, stats, a, tie) for a in ALPHAS], before)
