"""Multiplying a layer's input channels by scales that the op before divides by: the model computes what it did.

AWQ and SmoothQuant choose such scales so that what is rounded afterwards loses less. Everything here makes new tensors
(a backup that is an alias is how AutoAWQ corrupts models on a CPU).
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

import torch
from torch import Tensor

from octavo.calibration.algorithms.input_statistics import InputStats
from octavo.quant.block_map import Fold
from octavo.quant.qparams import WeightError


def fold_scales(
    tensors: MutableMapping[str, Tensor], fold: Fold, modules: Iterable[str], scales: Tensor, stats: InputStats
) -> InputStats:
    """Divide fold.producer's output channels by scales [K], and multiply the columns of the modules, and of fold.also.

    Replaces `NAME.weight` and the producer's `NAME.bias` in `tensors` with new tensors of the same type. A norm's
    quotient is rounded first, and columns are multiplied by what it was really divided by, so that the norm's rounding
    changes nothing. Returns the statistics of the divided input. Raises WeightError for scales that aren't positive
    and finite, or not equal where the producer's rows are shared.
    """
    readers = [*modules, *fold.also]
    k = stats.moments.shape[0]
    if scales.shape != (k,) or not bool((scales.isfinite() & (scales > 0)).all()):
        raise WeightError(f"scales of {fold.producer} must be {k} positive numbers")
    scales = scales.detach().to("cpu", torch.float32)
    if fold.kind == "norm":
        divided, scales = _divide_norm(tensors[f"{fold.producer}.weight"], fold.offset, scales)
        tensors[f"{fold.producer}.weight"] = divided
        if f"{fold.producer}.bias" in tensors:
            bias = tensors[f"{fold.producer}.bias"]
            tensors[f"{fold.producer}.bias"] = (bias.float() / scales.to(bias.device)).to(bias.dtype)
    else:
        _divide_rows(tensors, fold, scales)
    for module in readers:
        weight = tensors[f"{module}.weight"]
        tensors[f"{module}.weight"] = (weight.float() * scales.to(weight.device)).to(weight.dtype)
    return stats.scaled(scales)


def tie_scales(scales: Tensor, fold: Fold) -> Tensor:
    """Scales [K] made equal where one row of the producer feeds several channels: their geometric mean."""
    if fold.repeats == 1:
        return scales
    heads = scales.float().view(-1, fold.repeats, fold.head_dim)
    return heads.log().mean(1, keepdim=True).exp().expand_as(heads).reshape(-1).contiguous()


def _divide_norm(weight: Tensor, offset: float, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The norm's new weight, w + offset = (w_old + offset) / s, and what it was divided by once it was rounded."""
    gain = weight.detach().cpu().float() + offset
    divided = (gain / scales - offset).to(weight.dtype)
    left = divided.float() + offset
    # Where rounding takes all that is left, or where there was nothing, the channel stays as it is.
    keep = (left == 0) | (gain == 0) | (left.sign() != gain.sign())
    divided = torch.where(keep, weight.detach().cpu(), divided)
    return divided.to(weight.device), torch.where(keep, torch.ones_like(scales), gain / left)


def _divide_rows(tensors: MutableMapping[str, Tensor], fold: Fold, scales: Tensor) -> None:
    """Divide rows of a linear layer, and of its bias."""
    heads = scales.view(-1, fold.repeats, fold.head_dim)
    if not torch.equal(heads, heads[:, :1].expand_as(heads)):
        raise WeightError(f"scales of {fold.producer} differ between query heads that share its rows")
    divisor = heads[:, 0].reshape(-1)
    for name in (f"{fold.producer}.weight", f"{fold.producer}.bias"):
        if name not in tensors:
            continue
        old = tensors[name]
        begin, stop = fold.rows or (0, old.shape[0])
        if stop - begin != divisor.shape[0]:
            raise WeightError(f"{name} has {stop - begin} rows for {divisor.shape[0]} scales")
        new = old.detach().clone()
        rows = divisor.to(old.device).view(-1, *[1] * (old.dim() - 1))
        new[begin:stop] = (old[begin:stop].float() / rows).to(old.dtype)
        tensors[name] = new
