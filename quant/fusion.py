"""Weights that share their input (q, k, v; gate, up) as one weight along N, wherever their numbers allow it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.quant.qparams import QuantizedWeight, Weight
from octavo.quant.scheme import CHANNEL, TENSOR, QuantScheme, WeightScheme


def fuse(parts: list[Weight]) -> list[Weight]:
    """Neighbors joined where they can be: q and k of int4 beside a v of int8 become two weights."""
    runs: list[list[Weight]] = []
    if len(parts) > 1:
        parts = [per_channel(part) for part in parts]
        if any(_ends_within_a_block(part) for part in parts[:-1]):
            parts = [_scales_of_rows(part) for part in parts]
    for part in parts:
        if runs and _can_join(runs[-1][-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    return [_join(run) for run in runs]


def join_parts(parts: list[Weight]) -> Weight | None:
    """Parts that share their input as one weight along N; None where they can't be one."""
    fused = fuse(parts)
    return fused[0] if len(fused) == 1 else None


def per_channel(w: Weight) -> Weight:
    """A weight with one scale as one with a scale per row, so that parts with different scales can be joined."""
    if isinstance(w, Tensor) or w.scheme.weight.granularity != TENSOR:
        return w
    n = w.shape[0]
    return replace(
        w,
        scheme=scheme_per_channel(w.scheme),
        scale=w.scale.reshape(1, 1).expand(n, 1),
        zero_point=None if w.zero_point is None else w.zero_point.reshape(1, 1).expand(n, 1),
    )


def scheme_per_channel(scheme: QuantScheme) -> QuantScheme:
    """What `per_channel` makes of a weight's scheme."""
    weight = scheme.weight
    if weight.granularity != TENSOR:
        return scheme
    return QuantScheme(WeightScheme(weight.dtype, CHANNEL, weight.symmetric), scheme.activation)


def _ends_within_a_block(w: Weight) -> bool:
    return isinstance(w, QuantizedWeight) and w.shape[0] % w.scheme.weight.granularity.tile(*w.shape)[0] != 0


def _scales_of_rows(w: Weight) -> Weight:
    """A weight with a scale per block as one with each row's own copy of them: behind it any row may begin."""
    block = w.scheme.weight.granularity.block if isinstance(w, QuantizedWeight) else None
    if isinstance(w, Tensor) or block is None:
        return w
    return w.with_scales_of_rows()


def _can_join(last: Weight, part: Weight) -> bool:
    """Whether a part can stand behind another in one weight. Static scales of the input must be the same."""
    if isinstance(last, Tensor) or isinstance(part, Tensor):
        return isinstance(last, Tensor) and isinstance(part, Tensor)
    return (
        part.scheme == last.scheme
        and part.scale.dtype == last.scale.dtype
        and _same(part.g_idx, last.g_idx)
        and _same(part.input_scale, last.input_scale)
        and _same(part.global_scale, last.global_scale)
        and (part.zero_point is None) == (last.zero_point is None)
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _join(parts: list[Weight]) -> Weight:
    """Parts that `_can_join` allows, as one weight along N."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    weights = [part for part in parts if isinstance(part, QuantizedWeight)]
    zero_points = [w.zero_point for w in weights if w.zero_point is not None]
    return replace(
        first,
        codes=torch.cat([w.codes for w in weights]),
        scale=torch.cat([w.scale for w in weights]),
        zero_point=torch.cat(zero_points) if zero_points else None,
    )
