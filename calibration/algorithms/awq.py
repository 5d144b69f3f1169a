"""AWQ: scale up the input channels that matter before weights are rounded, and clip groups where outputs gain by it.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023). Both searches take
the error of the outputs from the inputs' second moments, so no activations are kept and nothing is run again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.calibration.algorithms.channel_scale_search import ScaleSearch, ScaleTrials, Tie, normalized, untied
from octavo.calibration.algorithms.group_scales import round_to_groups, search_scales, search_scales_jointly
from octavo.calibration.algorithms.input_statistics import InputStats
from octavo.quant.qparams import (
    QuantizedWeight,
    WeightError,
    code_type,
    kept_type,
    of_global_scale,
    over_global_scale,
    quantize_weight,
    scale_type,
)
from octavo.quant.scheme import QuantScheme, Search
from octavo.quant.super_blocks import has_own_grid

ROUND_ROWS = 1 << 21  # elements of a weight whose scales are searched at a time


def awq_scales(
    weights: Sequence[Tensor],
    schemes: Sequence[QuantScheme],
    stats: InputStats,
    *,
    tie: Tie = untied,
    num_grid: int = 20,
    search: Search = "mse",
    scale_dtype: torch.dtype | None = None,
) -> ScaleSearch:
    """Scales [K] for the input of some linear layers, weights [N, K] each: what the op before is divided by.

    s = mean|x|^r, and s = mean|x|^r / mean|w|^(1 - r) ("duo scaling", weights relative to their group's largest), r
    a multiple of 1 / num_grid from 0 to 1, normalized to sqrt(max * min) = 1 and tied. The loss is smooth in r: every
    fourth r is tried, then the neighbours of the best, halving the distance. The best of both kinds and not scaling at
    all are then compared with weights rounded as `awq_clip` does.
    """
    trials = ScaleTrials(weights, schemes, stats, search, scale_dtype)
    strength = _weight_means(weights, schemes)
    activity = stats.absmean.clamp(min=1e-8)

    def scales(duo: bool, place: int) -> Tensor:
        r = place / num_grid
        raw = activity**r / (strength ** (1 - r) + 1e-4) if duo else activity**r
        return normalized(tie(normalized(raw)))

    def search_ratio(duo: bool) -> Tensor:
        tried: dict[int, float] = {}
        top = 0
        step = 4
        places = range(0, num_grid + 1, step)
        while step:
            tried |= {p: trials.loss(scales(duo, p)) for p in places if 0 <= p <= num_grid and p not in tried}
            top = min(tried, key=tried.__getitem__)
            step //= 2
            places = range(top - step, top + step + 1, 2 * step or 1)
        return scales(duo, top)

    before = trials.loss(torch.ones_like(stats.absmax), joint=True)
    return trials.best([search_ratio(False), search_ratio(True)], before, joint=True)


def awq_clip(
    weight: Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    *,
    search: Search = "mse",
    scale_dtype: torch.dtype | None = None,
    global_scale: Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight [N, K] to nearest, with scales that clip each group where the outputs' error is least.

    mse: a group's error is d^T H d, H its own block of the moments (a whole row: its diagonal alone). absmax: no
    clipping. global_scale: what divides e4m3 scales; None: this weight's own. Raises WeightError for NaN or infinity.
    """
    w = scheme.weight
    dtype = scale_dtype or weight.dtype
    if w.granularity.kind in ("tensor", "block") or (search == "absmax" and not has_own_grid(w)):
        return quantize_weight(weight, scheme, search, scale_dtype=dtype, global_scale=global_scale)
    if not bool(weight.isfinite().all()):
        raise WeightError("it holds NaN or infinity")
    dtype = scale_type(w, dtype)
    weight, whole = over_global_scale(weight, w, global_scale)
    k = weight.shape[1]
    size = w.granularity.group_size or k
    codes = []
    scales = []
    zeros = []
    for part in torch.split(weight, max(1, ROUND_ROWS // k)):
        values = part.t().float().contiguous()
        if size < k:
            scale, zero = search_scales_jointly(values, stats.moments, size, w, dtype)
        else:
            scale, zero = search_scales(values, _importance(stats), size, w, dtype, "mse")
        rounded = round_to_groups(values, scale, zero, size, w)[0]
        codes.append(rounded.t().to(code_type(w)))
        scales.append(scale.t().to(kept_type(dtype)))
        zeros.append(torch.empty(0) if zero is None else zero.t() if w.minima else zero.t().to(torch.int8))
    joined = torch.cat([c.contiguous().view(torch.uint8) for c in codes]).view(codes[0].dtype)
    zero_point = None if w.symmetric else torch.cat(zeros).contiguous()
    return of_global_scale(QuantizedWeight(scheme, joined, torch.cat(scales).contiguous(), zero_point), whole)


def _importance(stats: InputStats) -> Tensor:
    energy = stats.moments.diagonal().contiguous()
    return energy if bool(energy.any()) else torch.ones_like(energy)


def _weight_means(weights: Sequence[Tensor], schemes: Sequence[QuantScheme]) -> Tensor:
    """[K]: the mean over all outputs of |w| relative to the largest of its group (its row, without groups)."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight, scheme in zip(weights, schemes, strict=True):
        size = scheme.weight.granularity.tile(*weight.shape)[1]
        for columns in range(0, weight.shape[1], size):
            part = weight[:, columns : columns + size].float().abs()
            total[columns : columns + size] += (part / (part.amax(1, keepdim=True) + 1e-6)).sum(0)
    return total / sum(weight.shape[0] for weight in weights)
